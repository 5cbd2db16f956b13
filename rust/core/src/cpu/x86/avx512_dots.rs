//! Dot products of integers on AVX-512 BW: pairs of int16, quads of int8.

use std::arch::x86_64::{
    __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_abs_epi8, _mm512_add_epi32, _mm512_and_si512,
    _mm512_broadcast_i32x4, _mm512_broadcast_i64x4, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_madd_epi16,
    _mm512_maddubs_epi16, _mm512_mask_sub_epi8, _mm512_movepi8_mask, _mm512_permutexvar_epi16, _mm512_set1_epi8,
    _mm512_set1_epi16, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16, _mm512_srai_epi16,
    _mm512_srli_epi32,
};

use super::avx512::Avx512;
use crate::codebook;
use crate::cpu::simd::IntDot;

/// Needs no more than [`Avx512`].
#[derive(Clone, Copy)]
pub(crate) struct Pairs(pub(crate) Avx512);

/// Needs no more than [`Avx512`].
#[derive(Clone, Copy)]
pub(crate) struct Quads(pub(crate) Avx512);

// SAFETY (for every block of this implementation): a value of `Avx512` exists, so the instructions do.
#[allow(clippy::undocumented_unsafe_blocks)]
impl IntDot<Avx512> for Pairs {
    type Number = i16;
    const PACK: usize = 2;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = __m512i;

    #[inline(always)]
    fn table(self, values: &[i16; codebook::LEN]) -> __m512i {
        // Twice, so that vpermw, which reads five bits of an index, does not care for the fifth.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        8 * lane + unit + 4 * i
    }

    #[inline(always)]
    fn nibbles(self, table: __m512i, words: __m512, unit: usize) -> __m512 {
        // Brings nibbles `unit` and `unit + 4` of every word to the low bits of its halves.
        unsafe {
            let words = _mm512_castps_si512(words);
            let index = match unit {
                0 => _mm512_srli_epi32::<4>(words),
                1 => words,
                2 => _mm512_srli_epi32::<12>(words),
                _ => _mm512_srli_epi32::<8>(words),
            };
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table))
        }
    }

    #[inline(always)]
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + unit + 2 * i
    }

    #[inline(always)]
    fn bytes(self, words: __m512, unit: usize) -> __m512 {
        unsafe {
            let words = _mm512_castps_si512(words);
            let top = if unit == 0 { _mm512_slli_epi16::<8>(words) } else { words };
            _mm512_castsi512_ps(_mm512_srai_epi16::<8>(top))
        }
    }

    #[inline(always)]
    fn dot(self, sum: __m512, weights: __m512, x: __m512) -> __m512 {
        unsafe {
            let [sum, weights, x] = [sum, weights, x].map(|v| _mm512_castps_si512(v));
            _mm512_castsi512_ps(_mm512_add_epi32(sum, _mm512_madd_epi16(weights, x)))
        }
    }
}

// SAFETY (for every block of this implementation): a value of `Avx512` exists, so the instructions do.
#[allow(clippy::undocumented_unsafe_blocks)]
impl IntDot<Avx512> for Quads {
    type Number = i8;
    const PACK: usize = 4;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = __m512i;

    #[inline(always)]
    fn table(self, values: &[i8; codebook::LEN]) -> __m512i {
        // Sixteen bytes in each quarter, where vpshufb looks.
        unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        8 * lane + 2 * i + unit
    }

    #[inline(always)]
    fn nibbles(self, table: __m512i, words: __m512, unit: usize) -> __m512 {
        // The even codes of a word are its high nibbles, the odd ones its low nibbles.
        unsafe {
            let words = _mm512_castps_si512(words);
            let index = if unit == 0 { _mm512_srli_epi32::<4>(words) } else { words };
            _mm512_castsi512_ps(_mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(0x0f))))
        }
    }

    #[inline(always)]
    fn byte_element(_unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + i
    }

    #[inline(always)]
    fn bytes(self, words: __m512, _unit: usize) -> __m512 {
        words
    }

    #[inline(always)]
    fn dot(self, sum: __m512, weights: __m512, x: __m512) -> __m512 {
        unsafe {
            let [sum, weights, x] = [sum, weights, x].map(|v| _mm512_castps_si512(v));
            // |w| times x with the sign of w: two products of at most 128 * 127 fit into 16 bits.
            let signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), x);
            let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), signed_x);
            _mm512_castsi512_ps(_mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))))
        }
    }
}
