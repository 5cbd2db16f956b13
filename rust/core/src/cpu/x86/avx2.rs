//! AVX2 with FMA and F16C: eight lanes, a 4-bit table is two registers.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_GT_OQ, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _MM_HINT_T1,
    _mm_add_ps, _mm_add_ss, _mm_cvtsi32_si128, _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128, _mm_movehdup_ps,
    _mm_movehl_ps, _mm_packs_epi16, _mm_packs_epi32, _mm_prefetch, _mm_storel_epi64, _mm_storeu_si128,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_blendv_ps, _mm256_castps_si256, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_cvtepu8_epi64, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32,
    _mm256_cvtps_ph, _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_i32gather_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_mul_ps, _mm256_or_si256, _mm256_packus_epi32, _mm256_permute2f128_ps,
    _mm256_permute4x64_epi64, _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256,
    _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_slli_epi64, _mm256_sllv_epi32, _mm256_srai_epi32, _mm256_srli_epi32,
    _mm256_srli_epi64, _mm256_srlv_epi32, _mm256_storeu_ps, _mm256_sub_epi32, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use crate::codebook;
use crate::cpu::simd::{Simd, nibble_shift};
use crate::dtype::{Dtype, Element};

/// Exists where AVX2, FMA and F16C do.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token.
    ///
    /// # Safety
    /// The machine has AVX2, FMA and F16C, and the caller is compiled for them.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

const LANES: usize = 8;

/// A table of sixteen: entries 0 to 7 and 8 to 15.
#[derive(Clone, Copy)]
pub(crate) struct Table(__m256, __m256);

impl Table {
    /// Entry `index & 15` for every lane. vpermps reads three bits; the fourth chooses between the halves.
    #[inline(always)]
    fn look_up(self, index: __m256i) -> __m256 {
        // SAFETY: an `Avx2` exists wherever this private type does.
        unsafe {
            let low = _mm256_permutevar8x32_ps(self.0, index);
            let high = _mm256_permutevar8x32_ps(self.1, index);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
        }
    }
}

/// Rounds fp32 to bfloat16 in the low half of each lane: nearest, ties to even, NaN kept quiet.
#[inline(always)]
fn round_to_bf16(v: __m256) -> __m256i {
    // SAFETY: an `Avx2` exists wherever this private function is called.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        let chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
        _mm256_srli_epi32::<16>(_mm256_castps_si256(chosen))
    }
}

// SAFETY (for every block of this implementation): a value of `Avx2` exists, so the instructions do; loads and stores
// are unaligned ones within the bounds that the trait's contract names.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 4;
    type Vector = __m256;
    type Table = Table;
    type Index = __m256i;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn load<T: Element>(self, from: *const T) -> __m256 {
        unsafe {
            match T::DTYPE {
                Dtype::Float32 => _mm256_loadu_ps(from.cast()),
                Dtype::Float16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                Dtype::Bfloat16 => {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>(self, to: *mut T, v: __m256) {
        unsafe {
            match T::DTYPE {
                Dtype::Float32 => _mm256_storeu_ps(to.cast(), v),
                Dtype::Float16 => {
                    let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
                    _mm_storeu_si128(to.cast::<__m128i>(), halves);
                }
                Dtype::Bfloat16 => {
                    let halves = round_to_bf16(v);
                    let packed = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(halves, halves));
                    _mm_storeu_si128(to.cast::<__m128i>(), _mm256_castsi256_si128(packed));
                }
            }
        }
    }

    #[inline(always)]
    fn table(self, values: &[f32; codebook::LEN]) -> Table {
        unsafe { Table(_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[LANES..].as_ptr())) }
    }

    #[inline(always)]
    fn nibble(self, table: Table, words: __m256, element: usize) -> __m256 {
        unsafe {
            let shift = _mm256_set1_epi32(nibble_shift(element));
            table.look_up(_mm256_srlv_epi32(_mm256_castps_si256(words), shift))
        }
    }

    #[inline(always)]
    fn byte(self, words: __m256, element: usize) -> __m256 {
        unsafe {
            let shift = _mm256_set1_epi32(24 - 8 * element as i32);
            let top = _mm256_sllv_epi32(_mm256_castps_si256(words), shift);
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(top))
        }
    }

    #[inline(always)]
    unsafe fn nibbles_in_order(self, table: Table, from: *const u8) -> __m256 {
        unsafe {
            // A byte a quadword: its high nibble indexes the lower lane, its low nibble the upper.
            let bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(from.cast::<i32>().read_unaligned()));
            table.look_up(_mm256_or_si256(_mm256_srli_epi64::<4>(bytes), _mm256_slli_epi64::<32>(bytes)))
        }
    }

    #[inline(always)]
    unsafe fn look_up_bytes(self, table: &[f32; 256], from: *const u8) -> __m256 {
        unsafe {
            let index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            _mm256_i32gather_ps::<4>(table.as_ptr(), index)
        }
    }

    #[inline(always)]
    unsafe fn bytes_in_order(self, from: *const u8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    fn index(self, from: impl Fn(usize) -> usize) -> __m256i {
        let index: [i32; LANES] = std::array::from_fn(|i| from(i) as i32);
        unsafe { _mm256_loadu_si256(index.as_ptr().cast()) }
    }

    #[inline(always)]
    fn permute(self, v: __m256, index: __m256i) -> __m256 {
        unsafe { _mm256_permutevar8x32_ps(v, index) }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [__m256]) {
        // Four rows at a time within 128-bit halves, then the halves of rows that are four apart.
        unsafe {
            for quad in rows.chunks_exact_mut(4) {
                let (low, high) = (_mm256_unpacklo_ps(quad[0], quad[1]), _mm256_unpackhi_ps(quad[0], quad[1]));
                let (low_next, high_next) =
                    (_mm256_unpacklo_ps(quad[2], quad[3]), _mm256_unpackhi_ps(quad[2], quad[3]));
                quad[0] = _mm256_shuffle_ps::<0b01_00_01_00>(low, low_next);
                quad[1] = _mm256_shuffle_ps::<0b11_10_11_10>(low, low_next);
                quad[2] = _mm256_shuffle_ps::<0b01_00_01_00>(high, high_next);
                quad[3] = _mm256_shuffle_ps::<0b11_10_11_10>(high, high_next);
            }
            for i in 0..4 {
                let (a, b) = (rows[i], rows[i + 4]);
                rows[i] = _mm256_permute2f128_ps::<0x20>(a, b);
                rows[i + 4] = _mm256_permute2f128_ps::<0x31>(a, b);
            }
        }
    }

    #[inline(always)]
    unsafe fn rank(self, v: __m256, thresholds: &[f32; codebook::LEN - 1], to: *mut u8) {
        unsafe {
            let mut rank = _mm256_setzero_si256();
            for &threshold in thresholds {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(v, _mm256_set1_ps(threshold));
                rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above)); // a true lane is -1
            }
            _mm_storel_epi64(to.cast::<__m128i>(), narrow_to_bytes(rank));
        }
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, v: __m256, to: *mut u8) {
        unsafe { _mm_storel_epi64(to.cast::<__m128i>(), narrow_to_bytes(_mm256_cvtps_epi32(v))) }
    }

    #[inline(always)]
    fn ints_to_f32(self, v: __m256) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_castps_si256(v)) }
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

/// Saturates eight 32-bit integers to signed bytes in the low half.
#[inline(always)]
fn narrow_to_bytes(v: __m256i) -> __m128i {
    // SAFETY: an `Avx2` exists wherever this private function is called.
    unsafe {
        let words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        _mm_packs_epi16(words, words)
    }
}
