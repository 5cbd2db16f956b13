//! Dot products of integers on AVX-512 VNNI, one instruction each. Operands are those of AVX-512 BW.

use std::arch::asm;
use std::arch::x86_64::{
    __m512, __m512i, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_sub_epi32,
    _mm512_xor_si512,
};

use std::ops::Range;

use super::avx512::Avx512;
use super::avx512_dots;
use crate::codebook;
use crate::cpu::activations::as_slice_mut;
use crate::cpu::panel::{Source, Terms};
use crate::cpu::simd::{IntDot, Simd};

/// Exists where VNNI does beside what [`Avx512`] needs.
#[derive(Clone, Copy)]
pub(crate) struct Pairs(avx512_dots::Pairs);

impl Pairs {
    /// The token.
    ///
    /// # Safety
    /// The machine has AVX-512 VNNI beside F, BW, DQ and VL, and the caller is compiled for them.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: handed on to the caller.
        Self(avx512_dots::Pairs(unsafe { Avx512::new() }))
    }
}

impl IntDot<Avx512> for Pairs {
    type Number = i16;
    const PACK: usize = 2;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = __m512i;

    #[inline(always)]
    fn table(self, values: &[i16; codebook::LEN]) -> __m512i {
        self.0.table(values)
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        avx512_dots::Pairs::nibble_element(unit, lane, i)
    }

    #[inline(always)]
    fn nibbles(self, table: __m512i, words: __m512, unit: usize) -> __m512 {
        self.0.nibbles(table, words, unit)
    }

    #[inline(always)]
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize {
        avx512_dots::Pairs::byte_element(unit, lane, i)
    }

    #[inline(always)]
    fn bytes(self, words: __m512, unit: usize) -> __m512 {
        self.0.bytes(words, unit)
    }

    #[inline(always)]
    fn dot(self, sum: __m512, weights: __m512, x: __m512) -> __m512 {
        // SAFETY: a value of `Pairs` exists, so the instruction does.
        unsafe { add_products_of_pairs(sum, weights, x) }
    }
}

/// Exists where VNNI does beside what [`Avx512`] needs.
#[derive(Clone, Copy)]
pub(crate) struct Quads(avx512_dots::Quads);

impl Quads {
    /// The token.
    ///
    /// # Safety
    /// As for [`Pairs::new`].
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: handed on to the caller.
        Self(avx512_dots::Quads(unsafe { Avx512::new() }))
    }
}

impl IntDot<Avx512> for Quads {
    type Number = i8;
    const PACK: usize = 4;
    /// VPDPBUSD takes unsigned bytes on one side.
    const OFFSET: i32 = 128;
    const NIBBLE_PARTS: usize = 1;
    type Table = __m512i;

    #[inline(always)]
    fn table(self, values: &[i8; codebook::LEN]) -> __m512i {
        self.0.table(&values.map(|value| value ^ i8::MIN))
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        avx512_dots::Quads::nibble_element(unit, lane, i)
    }

    #[inline(always)]
    fn nibbles(self, table: __m512i, words: __m512, unit: usize) -> __m512 {
        self.0.nibbles(table, words, unit)
    }

    #[inline(always)]
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize {
        avx512_dots::Quads::byte_element(unit, lane, i)
    }

    #[inline(always)]
    fn bytes(self, words: __m512, _unit: usize) -> __m512 {
        // SAFETY: a value of `Quads` exists, so the instructions do.
        as_vector(unsafe { _mm512_xor_si512(as_ints(words), _mm512_set1_epi8(i8::MIN)) })
    }

    #[inline(always)]
    fn dot(self, sum: __m512, weights: __m512, x: __m512) -> __m512 {
        let [sum, weights, x] = [sum, weights, x].map(as_ints);
        // SAFETY: a value of `Quads` exists, so the instruction does.
        as_vector(unsafe { _mm512_dpbusd_epi32(sum, weights, x) })
    }
}

/// Activations are the unsigned side: they are 128 too large.
impl Terms<Avx512> for Quads {
    const PACK: usize = 4;

    #[inline(always)]
    fn multiply_add(self, _simd: Avx512, a: __m512, b: __m512, sum: __m512) -> __m512 {
        let [sum, a, b] = [sum, a, b].map(as_ints);
        // SAFETY: a value of `Quads` exists, so the instruction does.
        as_vector(unsafe { _mm512_dpbusd_epi32(sum, a, b) })
    }

    #[inline(always)]
    fn read(self, _simd: Avx512, source: Source<'_>, token: usize, terms: &Range<usize>, lanes: &mut [u32]) {
        let Some(codes) = source.rounded else { unreachable!("activations are rounded before") };
        for (byte, &code) in as_slice_mut::<u8>(lanes).iter_mut().zip(&codes.row(token)[terms.clone()]) {
            *byte = (code ^ i8::MIN).cast_unsigned();
        }
    }

    #[inline(always)]
    unsafe fn store(self, _simd: Avx512, _to: *mut f32, _next: usize, _terms: [__m512; 2]) {
        unreachable!("codes are stored as they are")
    }

    #[inline(always)]
    fn excess(self, simd: Avx512, excess: __m512, weights: __m512) -> __m512 {
        // SAFETY: as above.
        self.multiply_add(simd, as_vector(unsafe { _mm512_set1_epi8(i8::MIN) }), weights, excess)
    }

    #[inline(always)]
    fn to_f32(self, simd: Avx512, sum: __m512, excess: __m512) -> __m512 {
        // SAFETY: as above.
        simd.ints_to_f32(as_vector(unsafe { _mm512_sub_epi32(as_ints(sum), as_ints(excess)) }))
    }
}

#[inline(always)]
fn as_ints(v: __m512) -> __m512i {
    // SAFETY: an `Avx512` exists wherever this private function is called.
    unsafe { _mm512_castps_si512(v) }
}

#[inline(always)]
fn as_vector(v: __m512i) -> __m512 {
    // SAFETY: as in `as_ints`.
    unsafe { _mm512_castsi512_ps(v) }
}

/// VPDPWSSD, but not by its intrinsic: LLVM takes that apart into a multiplication and an addition, which issue half
/// as fast.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products_of_pairs(sum: __m512, weights: __m512, x: __m512) -> __m512 {
    let mut total = sum;
    // SAFETY: this function is compiled for the instruction, which touches registers only.
    unsafe {
        asm!(
            "vpdpwssd {}, {}, {}", inout(zmm_reg) total, in(zmm_reg) weights, in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    total
}
