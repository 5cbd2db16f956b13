//! Dot products of integers on AVX2: pairs of int16, quads of int8.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_and_si256, _mm256_broadcastsi128_si256,
    _mm256_castps_si256, _mm256_castsi256_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_shuffle_epi8, _mm256_sign_epi8, _mm256_slli_epi16, _mm256_srai_epi16, _mm256_srli_epi32,
    _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

use super::avx2::Avx2;
use crate::codebook;
use crate::cpu::simd::IntDot;

/// Needs no more than [`Avx2`].
#[derive(Clone, Copy)]
pub(crate) struct Pairs(pub(crate) Avx2);

/// Needs no more than [`Avx2`].
#[derive(Clone, Copy)]
pub(crate) struct Quads(pub(crate) Avx2);

/// The high nibbles of all bytes for `unit` 0, which are the even codes, the low ones for 1.
#[inline(always)]
fn nibbles(words: __m256, unit: usize) -> __m256i {
    // SAFETY: an `Avx2` exists wherever this private function is called.
    unsafe {
        let words = _mm256_castps_si256(words);
        let index = if unit == 0 { _mm256_srli_epi32::<4>(words) } else { words };
        _mm256_and_si256(index, _mm256_set1_epi8(0x0f))
    }
}

/// Sixteen bytes in each half, where vpshufb looks.
#[inline(always)]
fn byte_table(values: [u8; codebook::LEN]) -> __m256i {
    // SAFETY: an `Avx2` exists wherever this private function is called.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast::<__m128i>())) }
}

// SAFETY (for every block of this implementation): a value of `Avx2` exists, so the instructions do.
#[allow(clippy::undocumented_unsafe_blocks)]
impl IntDot<Avx2> for Pairs {
    type Number = i16;
    const PACK: usize = 2;
    const OFFSET: i32 = 0;
    /// Bytes are looked up in their places and then interleaved: part 0 has the lower half of each 128 bits of words,
    /// sixteen codes, part 1 the upper.
    const NIBBLE_PARTS: usize = 2;
    /// The low bytes of the sixteen numbers, and the high ones.
    type Table = (__m256i, __m256i);

    #[inline(always)]
    fn table(self, values: &[i16; codebook::LEN]) -> Self::Table {
        (byte_table(values.map(|v| v.to_le_bytes()[0])), byte_table(values.map(|v| v.to_le_bytes()[1])))
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        let byte = 16 * (lane / 4) + 8 * (unit / 2) + 2 * (lane % 4) + i;
        2 * byte + unit % 2
    }

    #[inline(always)]
    fn nibbles(self, (low, high): Self::Table, words: __m256, unit: usize) -> __m256 {
        unsafe {
            let index = nibbles(words, unit % 2);
            let (low, high) = (_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index));
            let pairs = if unit < 2 { _mm256_unpacklo_epi8(low, high) } else { _mm256_unpackhi_epi8(low, high) };
            _mm256_castsi256_ps(pairs)
        }
    }

    #[inline(always)]
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + unit + 2 * i
    }

    #[inline(always)]
    fn bytes(self, words: __m256, unit: usize) -> __m256 {
        unsafe {
            let words = _mm256_castps_si256(words);
            let top = if unit == 0 { _mm256_slli_epi16::<8>(words) } else { words };
            _mm256_castsi256_ps(_mm256_srai_epi16::<8>(top))
        }
    }

    #[inline(always)]
    fn dot(self, sum: __m256, weights: __m256, x: __m256) -> __m256 {
        unsafe {
            let [sum, weights, x] = [sum, weights, x].map(|v| _mm256_castps_si256(v));
            _mm256_castsi256_ps(_mm256_add_epi32(sum, _mm256_madd_epi16(weights, x)))
        }
    }
}

// SAFETY (for every block of this implementation): a value of `Avx2` exists, so the instructions do.
#[allow(clippy::undocumented_unsafe_blocks)]
impl IntDot<Avx2> for Quads {
    type Number = i8;
    const PACK: usize = 4;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = __m256i;

    #[inline(always)]
    fn table(self, values: &[i8; codebook::LEN]) -> __m256i {
        byte_table(values.map(i8::cast_unsigned))
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        8 * lane + 2 * i + unit
    }

    #[inline(always)]
    fn nibbles(self, table: __m256i, words: __m256, unit: usize) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_shuffle_epi8(table, nibbles(words, unit))) }
    }

    #[inline(always)]
    fn byte_element(_unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + i
    }

    #[inline(always)]
    fn bytes(self, words: __m256, _unit: usize) -> __m256 {
        words
    }

    #[inline(always)]
    fn dot(self, sum: __m256, weights: __m256, x: __m256) -> __m256 {
        unsafe {
            let [sum, weights, x] = [sum, weights, x].map(|v| _mm256_castps_si256(v));
            // |w| times x with the sign of w: two products of at most 128 * 127 fit into 16 bits.
            let magnitude = _mm256_sign_epi8(weights, weights);
            let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, weights));
            _mm256_castsi256_ps(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
        }
    }
}
