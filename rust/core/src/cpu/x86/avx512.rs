//! AVX-512 (F, BW, DQ, VL): sixteen lanes, and a 4-bit table is one register.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _CMP_GT_OQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_HINT_T0, _MM_HINT_T1, _mm_loadl_epi64, _mm_loadu_si128, _mm_prefetch, _mm_storeu_si128, _mm256_loadu_si256,
    _mm256_storeu_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castpd_ps, _mm512_castps_pd,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi8_epi32, _mm512_cvtepi32_epi8,
    _mm512_cvtepi32_epi16, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_cvtepu8_epi64, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_cvtps_ph, _mm512_cvtsepi32_epi8, _mm512_fmadd_ps, _mm512_i32gather_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_add_epi32, _mm512_mask_mov_epi32, _mm512_maskz_set1_epi32,
    _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_shuffle_f32x4, _mm512_slli_epi32, _mm512_slli_epi64, _mm512_sllv_epi32, _mm512_srai_epi32,
    _mm512_srli_epi32, _mm512_srli_epi64, _mm512_srlv_epi32, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
    _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use crate::codebook;
use crate::cpu::simd::{Simd, nibble_shift};
use crate::dtype::{Dtype, Element};

/// Exists where F, BW, DQ and VL do.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The token.
    ///
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ and VL, and the caller is compiled for them.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

const LANES: usize = 16;

/// Rounds fp32 to bfloat16 in the low half of each lane: nearest, ties to even, NaN kept quiet. Not VCVTNEPS2BF16,
/// which flushes subnormal numbers.
#[inline(always)]
fn round_to_bf16(v: __m512) -> __m512i {
    // SAFETY: an `Avx512` exists wherever this private function is called.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet))
    }
}

// SAFETY (for every block of this implementation): a value of `Avx512` exists, so the instructions do; loads and
// stores are unaligned ones within the bounds that the trait's contract names.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 8;
    type Vector = __m512;
    type Table = __m512;
    type Index = __m512i;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    unsafe fn load<T: Element>(self, from: *const T) -> __m512 {
        unsafe {
            match T::DTYPE {
                Dtype::Float32 => _mm512_loadu_ps(from.cast()),
                Dtype::Float16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                Dtype::Bfloat16 => {
                    let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>(self, to: *mut T, v: __m512) {
        unsafe {
            match T::DTYPE {
                Dtype::Float32 => _mm512_storeu_ps(to.cast(), v),
                Dtype::Float16 => {
                    let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
                    _mm256_storeu_si256(to.cast::<__m256i>(), halves);
                }
                Dtype::Bfloat16 => {
                    _mm256_storeu_si256(to.cast::<__m256i>(), _mm512_cvtepi32_epi16(round_to_bf16(v)));
                }
            }
        }
    }

    #[inline(always)]
    fn table(self, values: &[f32; codebook::LEN]) -> __m512 {
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn nibble(self, table: __m512, words: __m512, element: usize) -> __m512 {
        unsafe {
            // vpermps reads the low four bits of every index and no more.
            let shift = _mm512_set1_epi32(nibble_shift(element));
            _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_castps_si512(words), shift), table)
        }
    }

    #[inline(always)]
    fn byte(self, words: __m512, element: usize) -> __m512 {
        unsafe {
            let shift = _mm512_set1_epi32(24 - 8 * element as i32);
            let top = _mm512_sllv_epi32(_mm512_castps_si512(words), shift);
            _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(top))
        }
    }

    #[inline(always)]
    unsafe fn nibbles_in_order(self, table: __m512, from: *const u8) -> __m512 {
        unsafe {
            // A byte a quadword: its high nibble indexes the lower lane, its low nibble the upper.
            let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(from.cast()));
            let index = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
            _mm512_permutexvar_ps(index, table)
        }
    }

    #[inline(always)]
    unsafe fn look_up_bytes(self, table: &[f32; 256], from: *const u8) -> __m512 {
        unsafe {
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_i32gather_ps::<4>(index, table.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn bytes_in_order(self, from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    fn index(self, from: impl Fn(usize) -> usize) -> __m512i {
        let index: [i32; LANES] = std::array::from_fn(|i| from(i) as i32);
        unsafe { _mm512_loadu_si512(index.as_ptr().cast()) }
    }

    #[inline(always)]
    fn permute(self, v: __m512, index: __m512i) -> __m512 {
        unsafe { _mm512_permutexvar_ps(index, v) }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [__m512]) {
        // Four rows at a time within 128-bit quarters, then the quarters of rows that are four apart, twice.
        unsafe {
            for quad in rows.chunks_exact_mut(4) {
                let low = [_mm512_unpacklo_ps(quad[0], quad[1]), _mm512_unpacklo_ps(quad[2], quad[3])];
                let high = [_mm512_unpackhi_ps(quad[0], quad[1]), _mm512_unpackhi_ps(quad[2], quad[3])];
                let [low, high] = [low.map(|v| _mm512_castps_pd(v)), high.map(|v| _mm512_castps_pd(v))];
                quad[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
                quad[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
                quad[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
                quad[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
            }
            for i in 0..4 {
                let (a, b, c, d) = (rows[i], rows[i + 4], rows[i + 8], rows[i + 12]);
                let ab_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                let cd_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
                let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
                rows[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even);
                rows[i + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even);
                rows[i + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd);
                rows[i + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd);
            }
        }
    }

    #[inline(always)]
    unsafe fn rank(self, v: __m512, thresholds: &[f32; codebook::LEN - 1], to: *mut u8) {
        // Thresholds ascend, so four comparisons find how many are below: each with the one in the middle of those left.
        // The vectors of thresholds overlap; the last lane, of which none is asked for, repeats the one before.
        let [fours, twos, ones]: [[f32; LANES]; 3] =
            [3, 1, 0].map(|first| std::array::from_fn(|lane| thresholds[(lane + first).min(codebook::LEN - 2)]));
        unsafe {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, _mm512_set1_ps(thresholds[7]));
            let mut rank = _mm512_maskz_set1_epi32(above, 8);
            for (thresholds, step) in [(&fours, 4), (&twos, 2), (&ones, 1)] {
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(
                    v,
                    _mm512_permutexvar_ps(rank, _mm512_loadu_ps(thresholds.as_ptr())),
                );
                rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
            }
            _mm_storeu_si128(to.cast::<__m128i>(), _mm512_cvtepi32_epi8(rank));
        }
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, v: __m512, to: *mut u8) {
        unsafe { _mm_storeu_si128(to.cast::<__m128i>(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    fn ints_to_f32(self, v: __m512) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(v)) }
    }

    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }

    #[inline(always)]
    fn prefetch_near(self, from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}
