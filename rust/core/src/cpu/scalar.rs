//! The portable instruction set: arrays, which the compiler may vectorize for its baseline target.

use super::simd::{Simd, nibble_shift};
use crate::codebook;
use crate::dtype::Element;

/// Needs nothing of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

const LANES: usize = 4;

impl Simd for Scalar {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 4;
    type Vector = [f32; LANES];
    type Table = [f32; codebook::LEN];
    type Index = [usize; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn sum(self, v: Self::Vector) -> f32 {
        (v[0] + v[1]) + (v[2] + v[3])
    }

    #[inline(always)]
    unsafe fn load<T: Element>(self, from: *const T) -> Self::Vector {
        // SAFETY: the caller vouches for `LANES` readable elements.
        std::array::from_fn(|i| unsafe { from.add(i).read_unaligned() }.to_f32())
    }

    #[inline(always)]
    unsafe fn store<T: Element>(self, to: *mut T, v: Self::Vector) {
        for (i, value) in v.into_iter().enumerate() {
            // SAFETY: the caller vouches for `LANES` writable elements.
            unsafe { to.add(i).write_unaligned(T::from_f32(value)) };
        }
    }

    #[inline(always)]
    fn table(self, values: &[f32; codebook::LEN]) -> Self::Table {
        *values
    }

    #[inline(always)]
    fn nibble(self, table: Self::Table, words: Self::Vector, element: usize) -> Self::Vector {
        words.map(|word| table[(word.to_bits() >> nibble_shift(element) & 15) as usize])
    }

    #[inline(always)]
    fn byte(self, words: Self::Vector, element: usize) -> Self::Vector {
        words.map(|word| f32::from(word.to_bits().to_le_bytes()[element].cast_signed()))
    }

    #[inline(always)]
    unsafe fn nibbles_in_order(self, table: Self::Table, from: *const u8) -> Self::Vector {
        // SAFETY: the caller vouches for two readable bytes.
        let bytes = unsafe { [from.read(), from.add(1).read()] };
        std::array::from_fn(|i| table[(bytes[i / 2] >> (4 * (1 - i % 2)) & 15) as usize])
    }

    #[inline(always)]
    unsafe fn look_up_bytes(self, table: &[f32; 256], from: *const u8) -> Self::Vector {
        // SAFETY: the caller vouches for `LANES` readable bytes.
        std::array::from_fn(|i| table[unsafe { from.add(i).read() } as usize])
    }

    #[inline(always)]
    unsafe fn bytes_in_order(self, from: *const u8) -> Self::Vector {
        // SAFETY: the caller vouches for `LANES` readable bytes.
        std::array::from_fn(|i| f32::from(unsafe { from.add(i).read() }.cast_signed()))
    }

    #[inline(always)]
    fn index(self, from: impl Fn(usize) -> usize) -> Self::Index {
        std::array::from_fn(from)
    }

    #[inline(always)]
    fn permute(self, v: Self::Vector, index: Self::Index) -> Self::Vector {
        index.map(|lane| v[lane])
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [Self::Vector]) {
        let words: [Self::Vector; LANES] = std::array::from_fn(|i| rows[i]);
        for (i, row) in rows.iter_mut().enumerate() {
            *row = words.map(|word| word[i]);
        }
    }

    #[inline(always)]
    unsafe fn rank(self, v: Self::Vector, thresholds: &[f32; codebook::LEN - 1], to: *mut u8) {
        for (i, value) in v.into_iter().enumerate() {
            let rank: u8 = thresholds.iter().map(|&threshold| u8::from(value > threshold)).sum();
            // SAFETY: the caller vouches for `LANES` writable bytes.
            unsafe { to.add(i).write(rank) };
        }
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, v: Self::Vector, to: *mut u8) {
        for (i, value) in v.into_iter().enumerate() {
            // SAFETY: the caller vouches for `LANES` writable bytes.
            unsafe { to.add(i).write((value.round_ties_even() as i8).cast_unsigned()) };
        }
    }

    #[inline(always)]
    fn prefetch(self, _from: *const u8) {}
}
