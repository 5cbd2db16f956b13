//! NEON: four lanes, and a 4-bit table is the 64 bytes that one `tbl` reads.

use std::arch::aarch64::{
    float32x4_t, uint8x16_t, uint8x16x4_t, uint32x4_t, vaddq_f32, vaddq_u32, vaddvq_f32, vandq_u32, vbslq_u32,
    vceqq_f32, vcgtq_f32, vcombine_s16, vcvtnq_s32_f32, vcvtq_f32_s32, vdup_n_u32, vdupq_n_f32, vdupq_n_s32,
    vdupq_n_u32, vfmaq_f32, vget_lane_u32, vget_low_s16, vld1_u8, vld1q_f32, vld1q_u8, vmlaq_n_u32, vmovl_s8,
    vmovl_s16, vmovl_u16, vmovn_u32, vmulq_f32, vorrq_u32, vqmovn_s16, vqmovn_s32, vqtbl1q_u8, vqtbl4q_u8,
    vreinterpret_s8_u32, vreinterpret_u16_u8, vreinterpret_u32_s8, vreinterpretq_f32_f64, vreinterpretq_f32_u8,
    vreinterpretq_f32_u32, vreinterpretq_f64_f32, vreinterpretq_s32_f32, vreinterpretq_s32_u32, vreinterpretq_u8_f32,
    vreinterpretq_u8_u32, vreinterpretq_u32_f32, vreinterpretq_u32_s32, vshlq_n_u32, vshlq_s32, vshlq_u32, vshrq_n_s32,
    vshrq_n_u32, vst1_u16, vst1q_f32, vsubq_u32, vtrn1q_f32, vtrn1q_f64, vtrn2q_f32, vtrn2q_f64,
};

use crate::codebook;
use crate::cpu::simd::{Simd, nibble_shift};
use crate::dtype::{Dtype, Element};

/// Exists on every aarch64 machine.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    /// The token.
    ///
    /// # Safety
    /// The machine has NEON.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

const LANES: usize = 4;

/// The fp32 entry `index & 15` of every lane: a byte index 4 * i + {0, 1, 2, 3} per lane, looked up at once.
#[inline(always)]
fn look_up(table: uint8x16x4_t, index: uint32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of the aarch64 baseline.
    unsafe {
        let index = vandq_u32(index, vdupq_n_u32(15));
        let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), index, 0x0404_0404);
        vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
    }
}

/// Rounds fp32 to bfloat16 in the low half of each lane: nearest, ties to even, NaN kept quiet.
#[inline(always)]
fn round_to_bf16(v: float32x4_t) -> uint32x4_t {
    // SAFETY: NEON is part of the aarch64 baseline.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vshrq_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), rounded, quiet))
    }
}

// SAFETY (for every block of this implementation): NEON is part of the aarch64 baseline; loads and stores are
// unaligned ones within the bounds that the trait's contract names.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 8;
    type Vector = float32x4_t;
    type Table = uint8x16x4_t;
    type Index = uint8x16_t;

    #[inline(always)]
    fn splat(self, value: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn sum(self, v: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(v) }
    }

    #[inline(always)]
    unsafe fn load<T: Element>(self, from: *const T) -> float32x4_t {
        unsafe {
            match T::DTYPE {
                Dtype::Float32 => vld1q_f32(from.cast()),
                Dtype::Bfloat16 => {
                    let halves = vreinterpret_u16_u8(vld1_u8(from.cast()));
                    vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(halves)))
                }
                // `half` uses the conversion instruction; stable Rust has no intrinsic for it.
                Dtype::Float16 => {
                    let values: [f32; LANES] = std::array::from_fn(|i| from.add(i).read_unaligned().to_f32());
                    vld1q_f32(values.as_ptr())
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>(self, to: *mut T, v: float32x4_t) {
        unsafe {
            match T::DTYPE {
                Dtype::Float32 => vst1q_f32(to.cast(), v),
                Dtype::Bfloat16 => vst1_u16(to.cast(), vmovn_u32(round_to_bf16(v))),
                Dtype::Float16 => {
                    let mut values = [0.0; LANES];
                    vst1q_f32(values.as_mut_ptr(), v);
                    for (i, value) in values.into_iter().enumerate() {
                        to.add(i).write_unaligned(T::from_f32(value));
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn table(self, values: &[f32; codebook::LEN]) -> uint8x16x4_t {
        unsafe {
            let quarter = |i: usize| vreinterpretq_u8_f32(vld1q_f32(values[LANES * i..].as_ptr()));
            uint8x16x4_t(quarter(0), quarter(1), quarter(2), quarter(3))
        }
    }

    #[inline(always)]
    fn nibble(self, table: uint8x16x4_t, words: float32x4_t, element: usize) -> float32x4_t {
        unsafe {
            let shift = vdupq_n_s32(-nibble_shift(element)); // a negative shift is to the right
            look_up(table, vshlq_u32(vreinterpretq_u32_f32(words), shift))
        }
    }

    #[inline(always)]
    fn byte(self, words: float32x4_t, element: usize) -> float32x4_t {
        unsafe {
            let shift = vdupq_n_s32(24 - 8 * element as i32);
            vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_s32(vreinterpretq_s32_f32(words), shift)))
        }
    }

    #[inline(always)]
    unsafe fn nibbles_in_order(self, table: uint8x16x4_t, from: *const u8) -> float32x4_t {
        unsafe {
            let pair = u32::from(from.cast::<u16>().read_unaligned());
            let shifts: [i32; LANES] = std::array::from_fn(|i| -nibble_shift(i));
            look_up(table, vshlq_u32(vdupq_n_u32(pair), std::arch::aarch64::vld1q_s32(shifts.as_ptr())))
        }
    }

    #[inline(always)]
    unsafe fn look_up_bytes(self, table: &[f32; 256], from: *const u8) -> float32x4_t {
        unsafe {
            let values: [f32; LANES] = std::array::from_fn(|i| table[from.add(i).read() as usize]);
            vld1q_f32(values.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn bytes_in_order(self, from: *const u8) -> float32x4_t {
        unsafe {
            let word = from.cast::<u32>().read_unaligned();
            let words = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word)));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))
        }
    }

    #[inline(always)]
    fn index(self, from: impl Fn(usize) -> usize) -> uint8x16_t {
        let bytes: [u8; 4 * LANES] = std::array::from_fn(|i| (4 * from(i / 4) + i % 4) as u8);
        unsafe { vld1q_u8(bytes.as_ptr()) }
    }

    #[inline(always)]
    fn permute(self, v: float32x4_t, index: uint8x16_t) -> float32x4_t {
        unsafe { vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), index)) }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [float32x4_t]) {
        unsafe {
            let (a, b) = (vtrn1q_f32(rows[0], rows[1]), vtrn2q_f32(rows[0], rows[1]));
            let (c, d) = (vtrn1q_f32(rows[2], rows[3]), vtrn2q_f32(rows[2], rows[3]));
            let [a, b, c, d] = [a, b, c, d].map(|v| vreinterpretq_f64_f32(v));
            rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
            rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
            rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
            rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
        }
    }

    #[inline(always)]
    unsafe fn rank(self, v: float32x4_t, thresholds: &[f32; codebook::LEN - 1], to: *mut u8) {
        unsafe {
            let mut rank = vdupq_n_u32(0);
            for &threshold in thresholds {
                rank = vsubq_u32(rank, vcgtq_f32(v, vdupq_n_f32(threshold))); // a true lane is -1
            }
            store_bytes(vreinterpretq_f32_u32(rank), to);
        }
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, v: float32x4_t, to: *mut u8) {
        unsafe { store_bytes(vreinterpretq_f32_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(v))), to) }
    }

    #[inline(always)]
    fn ints_to_f32(self, v: float32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(vreinterpretq_s32_f32(v)) }
    }

    #[inline(always)]
    fn prefetch(self, _from: *const u8) {
        // Stable Rust has no aarch64 prefetch; the hardware's own follows the rows.
    }

    #[inline(always)]
    fn prefetch_near(self, _from: *const u8) {}
}

/// Saturates four 32-bit integers to signed bytes and stores them.
///
/// # Safety
/// Four bytes are writable at `to`.
#[inline(always)]
unsafe fn store_bytes(words: float32x4_t, to: *mut u8) {
    // SAFETY: NEON is part of the aarch64 baseline; the caller vouches for the four bytes.
    unsafe {
        let halves = vqmovn_s32(vreinterpretq_s32_u32(vreinterpretq_u32_f32(words)));
        let bytes = vqmovn_s16(vcombine_s16(halves, halves));
        to.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_s8(bytes)));
    }
}
