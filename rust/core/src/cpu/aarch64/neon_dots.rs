//! Dot products of integers on NEON: widening multiplications, which every aarch64 machine has.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, uint8x16_t, vaddq_s32, vandq_u8, vdupq_n_u8, vget_high_s8, vget_low_s8, vget_low_s16,
    vld1q_s8, vld1q_u8, vmull_high_s16, vmull_s8, vmull_s16, vpaddlq_s16, vpaddq_s32, vqtbl1q_s8, vqtbl1q_u8,
    vreinterpretq_f32_s8, vreinterpretq_f32_s16, vreinterpretq_f32_s32, vreinterpretq_f32_u8, vreinterpretq_s8_f32,
    vreinterpretq_s16_f32, vreinterpretq_s32_f32, vreinterpretq_u8_f32, vshlq_n_s16, vshrq_n_s16, vshrq_n_u8,
    vzip1q_u8, vzip2q_u8,
};

use super::neon::Neon;
use crate::codebook;
use crate::cpu::simd::IntDot;

/// Needs no more than [`Neon`].
#[derive(Clone, Copy)]
pub(crate) struct Pairs(pub(crate) Neon);

/// Needs no more than [`Neon`].
#[derive(Clone, Copy)]
pub(crate) struct Quads(pub(crate) Neon);

/// The high nibbles of all bytes for `unit` 0, which are the even codes, the low ones for 1.
#[inline(always)]
fn nibbles(words: float32x4_t, unit: usize) -> uint8x16_t {
    // SAFETY: NEON is part of the aarch64 baseline.
    unsafe {
        let bytes = vreinterpretq_u8_f32(words);
        if unit == 0 { vshrq_n_u8::<4>(bytes) } else { vandq_u8(bytes, vdupq_n_u8(0x0f)) }
    }
}

// SAFETY (for every block of this implementation): NEON is part of the aarch64 baseline.
#[allow(clippy::undocumented_unsafe_blocks)]
impl IntDot<Neon> for Pairs {
    type Number = i16;
    const PACK: usize = 2;
    const OFFSET: i32 = 0;
    /// Bytes are looked up in their places and then interleaved: part 0 has the lower half of the words, sixteen
    /// codes, part 1 the upper.
    const NIBBLE_PARTS: usize = 2;
    /// The low bytes of the sixteen numbers, and the high ones.
    type Table = (uint8x16_t, uint8x16_t);

    #[inline(always)]
    fn table(self, values: &[i16; codebook::LEN]) -> Self::Table {
        let (low, high) = (values.map(|v| v.to_le_bytes()[0]), values.map(|v| v.to_le_bytes()[1]));
        unsafe { (vld1q_u8(low.as_ptr()), vld1q_u8(high.as_ptr())) }
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        2 * (8 * (unit / 2) + 2 * lane + i) + unit % 2
    }

    #[inline(always)]
    fn nibbles(self, (low, high): Self::Table, words: float32x4_t, unit: usize) -> float32x4_t {
        unsafe {
            let index = nibbles(words, unit % 2);
            let (low, high) = (vqtbl1q_u8(low, index), vqtbl1q_u8(high, index));
            vreinterpretq_f32_u8(if unit < 2 { vzip1q_u8(low, high) } else { vzip2q_u8(low, high) })
        }
    }

    #[inline(always)]
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + unit + 2 * i
    }

    #[inline(always)]
    fn bytes(self, words: float32x4_t, unit: usize) -> float32x4_t {
        unsafe {
            let words = vreinterpretq_s16_f32(words);
            let top = if unit == 0 { vshlq_n_s16::<8>(words) } else { words };
            vreinterpretq_f32_s16(vshrq_n_s16::<8>(top))
        }
    }

    #[inline(always)]
    fn dot(self, sum: float32x4_t, weights: float32x4_t, x: float32x4_t) -> float32x4_t {
        unsafe {
            // In the order of lanes: pairs of neighbours, which for bytes may belong to two blocks.
            let (w, x) = (vreinterpretq_s16_f32(weights), vreinterpretq_s16_f32(x));
            let low = vmull_s16(vget_low_s16(w), vget_low_s16(x));
            let high = vmull_high_s16(w, x);
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(sum), vpaddq_s32(low, high)))
        }
    }
}

// SAFETY (for every block of this implementation): NEON is part of the aarch64 baseline.
#[allow(clippy::undocumented_unsafe_blocks)]
impl IntDot<Neon> for Quads {
    type Number = i8;
    const PACK: usize = 4;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = int8x16_t;

    #[inline(always)]
    fn table(self, values: &[i8; codebook::LEN]) -> int8x16_t {
        unsafe { vld1q_s8(values.as_ptr()) }
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        8 * lane + 2 * i + unit
    }

    #[inline(always)]
    fn nibbles(self, table: int8x16_t, words: float32x4_t, unit: usize) -> float32x4_t {
        unsafe { vreinterpretq_f32_s8(vqtbl1q_s8(table, nibbles(words, unit))) }
    }

    #[inline(always)]
    fn byte_element(_unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + i
    }

    #[inline(always)]
    fn bytes(self, words: float32x4_t, _unit: usize) -> float32x4_t {
        words
    }

    #[inline(always)]
    fn dot(self, sum: float32x4_t, weights: float32x4_t, x: float32x4_t) -> float32x4_t {
        unsafe {
            let (w, x) = (vreinterpretq_s8_f32(weights), vreinterpretq_s8_f32(x));
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(sum), vpaddq_s32(low, high)))
        }
    }
}
