//! The portable instruction set: arrays, which the compiler may vectorize for its baseline target.

use super::simd::{IntDot, Simd, nibble_shift};
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
    fn ints_to_f32(self, v: Self::Vector) -> Self::Vector {
        v.map(|v| v.to_bits().cast_signed() as f32)
    }

    #[inline(always)]
    fn prefetch(self, _from: *const u8) {}

    #[inline(always)]
    fn prefetch_near(self, _from: *const u8) {}
}

/// Dot products of pairs of int16.
#[derive(Clone, Copy)]
pub(crate) struct ScalarPairs;

/// Dot products of quads of int8.
#[derive(Clone, Copy)]
pub(crate) struct ScalarQuads;

/// The lanes of two vectors as arrays of small integers, multiplied and added to a sum.
#[inline(always)]
fn add_products<const PACK: usize>(
    sum: [f32; LANES],
    weights: [f32; LANES],
    x: [f32; LANES],
    numbers: impl Fn(u32) -> [i32; PACK],
) -> [f32; LANES] {
    std::array::from_fn(|lane| {
        let pairs = numbers(weights[lane].to_bits()).into_iter().zip(numbers(x[lane].to_bits()));
        let products: i32 = pairs.map(|(w, x)| w * x).sum();
        f32::from_bits(sum[lane].to_bits().wrapping_add(products.cast_unsigned()))
    })
}

/// Two int16 in the bits of an fp32, the first in the low half.
#[inline(always)]
fn pair(low: i16, high: i16) -> f32 {
    f32::from_bits(u32::from(low.cast_unsigned()) | u32::from(high.cast_unsigned()) << 16)
}

impl IntDot<Scalar> for ScalarPairs {
    type Number = i16;
    const PACK: usize = 2;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = [i16; codebook::LEN];

    #[inline(always)]
    fn table(self, values: &[i16; codebook::LEN]) -> Self::Table {
        *values
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        8 * lane + unit + 4 * i
    }

    #[inline(always)]
    fn nibbles(self, table: Self::Table, words: [f32; LANES], unit: usize) -> [f32; LANES] {
        let entry = |word: f32, element| table[(word.to_bits() >> nibble_shift(element) & 15) as usize];
        words.map(|word| pair(entry(word, unit), entry(word, unit + 4)))
    }

    #[inline(always)]
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + unit + 2 * i
    }

    #[inline(always)]
    fn bytes(self, words: [f32; LANES], unit: usize) -> [f32; LANES] {
        let byte = |word: f32, i: usize| i16::from(word.to_bits().to_le_bytes()[i].cast_signed());
        words.map(|word| pair(byte(word, unit), byte(word, unit + 2)))
    }

    #[inline(always)]
    fn dot(self, sum: [f32; LANES], weights: [f32; LANES], x: [f32; LANES]) -> [f32; LANES] {
        add_products(sum, weights, x, |bits| [(bits as i16).into(), ((bits >> 16) as i16).into()])
    }
}

impl IntDot<Scalar> for ScalarQuads {
    type Number = i8;
    const PACK: usize = 4;
    const OFFSET: i32 = 0;
    const NIBBLE_PARTS: usize = 1;
    type Table = [i8; codebook::LEN];

    #[inline(always)]
    fn table(self, values: &[i8; codebook::LEN]) -> Self::Table {
        *values
    }

    #[inline(always)]
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize {
        8 * lane + 2 * i + unit
    }

    #[inline(always)]
    fn nibbles(self, table: Self::Table, words: [f32; LANES], unit: usize) -> [f32; LANES] {
        let entry = |word: u32, i: usize| table[(word >> nibble_shift(2 * i + unit) & 15) as usize].cast_unsigned();
        words.map(|word| f32::from_bits(u32::from_le_bytes(std::array::from_fn(|i| entry(word.to_bits(), i)))))
    }

    #[inline(always)]
    fn byte_element(_unit: usize, lane: usize, i: usize) -> usize {
        4 * lane + i
    }

    #[inline(always)]
    fn bytes(self, words: [f32; LANES], _unit: usize) -> [f32; LANES] {
        words
    }

    #[inline(always)]
    fn dot(self, sum: [f32; LANES], weights: [f32; LANES], x: [f32; LANES]) -> [f32; LANES] {
        add_products(sum, weights, x, |bits| bits.to_le_bytes().map(|byte| byte.cast_signed().into()))
    }
}
