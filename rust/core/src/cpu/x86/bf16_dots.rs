//! Dot products of pairs of bf16 on AVX-512 BF16, one instruction each: sums are fp32, subnormal factors and sums count as
//! zero.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm512_broadcast_i64x4, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh,
    _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_storeu_ps,
};

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::avx512::Avx512;
use super::avx512_dots;
use crate::codebook::LEN;
use crate::cpu::activations::as_slice_mut;
use crate::cpu::dot::{Arithmetic, Dot};
use crate::cpu::panel::{Source, Terms};
use crate::cpu::simd::IntDot;
use crate::dtype::Floats;

/// Exists where AVX-512 BF16 does beside what [`Avx512`] needs.
#[derive(Clone, Copy)]
pub(crate) struct Pairs(Avx512);

impl Pairs {
    /// The token.
    ///
    /// # Safety
    /// The machine has AVX-512 BF16 beside F, BW, DQ and VL, and the caller is compiled for them.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: handed on to the caller.
        Self(unsafe { Avx512::new() })
    }
}

/// 4-bit codes in bf16: the table is the codebook, rounded.
#[derive(Clone, Copy)]
pub(crate) struct Nibbles {
    pairs: Pairs,
    table: __m512i,
}

impl Nibbles {
    /// The codes of a codebook.
    #[inline(always)]
    pub(crate) fn new(pairs: Pairs, codebook: &[f32; LEN]) -> Self {
        let values = codebook.map(|value| bf16::from_f32(value).to_bits());
        // SAFETY: a value of `Pairs` exists, so the instructions do. Twice, as in `avx512_dots`.
        let table = unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(values.as_ptr().cast())) };
        Self { pairs, table }
    }
}

impl Dot<Avx512> for Nibbles {
    const ARITHMETIC: Arithmetic = Arithmetic::Bf16;
    const PER_WORD: usize = 8;
    const PACK: usize = 2;

    #[inline(always)]
    fn element(unit: usize, lane: usize, i: usize) -> usize {
        avx512_dots::Pairs::nibble_element(unit, lane, i)
    }

    #[inline(always)]
    fn operand(self, simd: Avx512, words: __m512, unit: usize) -> __m512 {
        avx512_dots::Pairs(simd).nibbles(self.table, words, unit)
    }

    #[inline(always)]
    fn dot(self, _simd: Avx512, sum: __m512, operand: __m512, x: __m512) -> __m512 {
        dot(self.pairs, sum, operand, x)
    }

    #[inline(always)]
    fn to_f32(self, _simd: Avx512, sum: __m512) -> __m512 {
        sum
    }
}

impl Terms<Avx512> for Pairs {
    const PACK: usize = 2;

    #[inline(always)]
    fn multiply_add(self, _simd: Avx512, a: __m512, b: __m512, sum: __m512) -> __m512 {
        dot(self, sum, a, b)
    }

    #[inline(always)]
    fn read(self, _simd: Avx512, source: Source<'_>, token: usize, terms: &Range<usize>, lanes: &mut [u32]) {
        let Floats::Bfloat16(values) = source.x.values else {
            unreachable!("other activations are multiplied in fp32")
        };
        let numbers = &values[token * source.x.stride..][terms.clone()];
        let halves = as_slice_mut::<u16>(lanes);
        let (halves, behind) = halves.split_at_mut(numbers.len());
        halves.copy_from_slice(numbers.reinterpret_cast());
        behind.fill(0);
    }

    #[inline(always)]
    unsafe fn store(self, _simd: Avx512, to: *mut f32, _next: usize, [first, second]: [__m512; 2]) {
        // SAFETY: a value of `Pairs` exists, so the instructions do; the caller vouches for the vector.
        unsafe {
            let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
            let pairs = _mm512_permutexvar_epi16(_mm512_loadu_si512(SIDE_BY_SIDE.as_ptr().cast()), halves);
            _mm512_storeu_ps(to, _mm512_castsi512_ps(pairs));
        }
    }
}

/// Words of the lower half of a vector beside those of its upper half.
const SIDE_BY_SIDE: [u16; 32] = {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 32 {
        index[i] = i as u16 / 2 + 16 * (i as u16 % 2);
        i += 1;
    }
    index
};

/// `sum + a . b` for every lane of two numbers.
#[inline(always)]
fn dot(_: Pairs, sum: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: a value of `Pairs` exists, so the instruction does; vectors are bits.
    unsafe { _mm512_dpbf16_ps(sum, as_pairs(a), as_pairs(b)) }
}

#[inline(always)]
fn as_pairs(v: __m512) -> __m512bh {
    // SAFETY: both are the bits of a register.
    unsafe { std::mem::transmute(v) }
}
