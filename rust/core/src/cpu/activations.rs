//! Activations as the decoding kernels multiply them: in the arithmetic's number type and in the order of decoding.

use std::ops::Range;

use super::aligned::Aligned;
use super::dot::{Arithmetic, Dot, DotKernel, dispatch_dot};
use super::int8_rows::Codes;
use super::isa::Isa;
use super::scales::widen;
use super::simd::Simd;
use crate::dtype::{Floats, with_floats};
use crate::format::BlockSize;
use crate::storage::PackedWeight;
use crate::{Error, Result};

/// Rows of activations or gradients: `tokens` rows of a known width, `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Activations<'a> {
    /// The elements, from the first of the first row to the last of the last.
    pub values: Floats<'a>,
    /// Number of rows.
    pub tokens: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> Activations<'a> {
    pub(super) fn check(&self, argument: &'static str, width: usize) -> Result<()> {
        let needed = if self.tokens == 0 { 0 } else { (self.tokens - 1) * self.stride + width };
        if self.values.len() < needed {
            let got = format!("{} elements", self.values.len());
            return Err(Error::invalid(argument, got, format!("{} rows of {width}", self.tokens)));
        }
        Ok(())
    }

    /// The rows `tokens` of these.
    pub(super) fn rows(&self, tokens: Range<usize>) -> Activations<'a> {
        let start = (tokens.start * self.stride).min(self.values.len());
        let values = match self.values {
            Floats::Float32(values) => Floats::Float32(&values[start..]),
            Floats::Float16(values) => Floats::Float16(&values[start..]),
            Floats::Bfloat16(values) => Floats::Bfloat16(&values[start..]),
        };
        Activations { values, tokens: tokens.len(), stride: self.stride }
    }

    /// Widens row `token` from its element `first` on into `out`.
    #[inline(always)]
    pub(super) fn read<S: Simd>(&self, simd: S, token: usize, first: usize, out: &mut [f32]) {
        let at = token * self.stride + first;
        with_floats!(self.values, Floats, values => widen(simd, &values[at..at + out.len()], out));
    }
}

/// Most activations beside 4-bit weights or blocks that share a scale of int8.
const INT8_INTERVAL: usize = 64;
/// Activations that share a scale of int16: no block is smaller.
const INT16_INTERVAL: usize = BlockSize::MIN;

/// How many activations share a scale, and their sum a scale of the weight. `LLM.int8()` has one scale for a row of
/// either.
pub(super) fn interval(weight: &PackedWeight<'_>, arithmetic: Arithmetic) -> usize {
    let layout = weight.layout();
    match arithmetic {
        Arithmetic::Int16 => INT16_INTERVAL,
        Arithmetic::Int8 if weight.is_int8_by_rows() => layout.cols,
        Arithmetic::Int8 => layout.block_size.min(INT8_INTERVAL),
        Arithmetic::Fp32 | Arithmetic::Bf16 => layout.block_size,
    }
}

/// The activations of a few tokens for [`super::decode`].
pub(super) struct Lanes {
    /// `[groups][room][UNITS][lane]`, zeros behind the last column. Tokens are side by side: rows a power of two apart
    /// would meet in the same few lines of the L1 cache.
    pub(super) units: Aligned,
    /// Tokens that there is room for.
    pub(super) room: usize,
    /// `[groups][room][PARTS][lane]` each: fp32 scales, and the int32 that sums start from. Empty where not needed.
    pub(super) scales: Aligned,
    pub(super) starts: Aligned,
    /// `[tokens][blocks]`, zeros up to a whole vector; empty for formats without shifts.
    pub(super) block_sums: Vec<f32>,
    /// Length of a token in `block_sums`.
    pub(super) sum_stride: usize,
}

impl Lanes {
    /// The activations `x`, `room` tokens wide, the last ones zero. For int8 by rows `rounded` has their integers. None
    /// where other integers are asked for and an activation is NaN or infinite: that has no integer.
    pub(super) fn new(
        isa: Isa,
        arithmetic: Arithmetic,
        weight: &PackedWeight<'_>,
        x: &Activations<'_>,
        rounded: Option<Codes<'_>>,
        room: usize,
    ) -> Option<Self> {
        let interval = interval(weight, arithmetic);
        dispatch_dot(isa, arithmetic, weight, Arrange { weight, x, rounded, room, interval })
    }
}

struct Arrange<'a> {
    weight: &'a PackedWeight<'a>,
    x: &'a Activations<'a>,
    rounded: Option<Codes<'a>>,
    room: usize,
    interval: usize,
}

impl DotKernel for Arrange<'_> {
    type Output = Option<Lanes>;

    #[inline(always)]
    fn run<S: Simd, D: Dot<S>>(self, simd: S, _dot: D) -> Option<Lanes> {
        let layout = self.weight.layout();
        let groups = layout.cols.div_ceil(D::GROUP);
        let side = groups * D::PARTS * S::LANES;
        let count = |is_needed: bool, each: usize| if is_needed { self.room * each } else { 0 };
        let sum_stride = layout.blocks_per_row().next_multiple_of(S::LANES);
        let mut lanes = Lanes {
            units: Aligned::zeros(self.room * groups * D::UNITS * S::LANES),
            room: self.room,
            scales: Aligned::zeros(count(D::ARITHMETIC.is_integer(), side)),
            starts: Aligned::zeros(count(D::OFFSET != 0, side)),
            block_sums: vec![0.0; count(self.weight.has_shift(), sum_stride)],
            sum_stride,
        };
        let places = places::<S, D>();
        let mut row = vec![0.0; groups * D::GROUP];
        for token in 0..self.x.tokens {
            self.x.read(simd, token, 0, &mut row[..layout.cols]);
            let (units, scales, starts) = (&mut lanes.units, &mut lanes.scales, &mut lanes.starts);
            let of = Token { token, room: self.room };
            match D::ARITHMETIC {
                Arithmetic::Fp32 => place(&row, f32::to_bits, &places, of, units),
                Arithmetic::Bf16 => place(&row, upper_half, &places, of, as_slice_mut(units)),
                Arithmetic::Int16 => {
                    let (numbers, steps) = to_int16(&row)?;
                    place(&numbers, i16::cast_unsigned, &places, of, as_slice_mut(units));
                    fill_side::<S, D>(scales, of, |column| steps[column / INT16_INTERVAL].to_bits());
                }
                Arithmetic::Int8 => {
                    let (numbers, steps) = match self.rounded {
                        Some(rounded) => (padded(rounded.row(token), row.len()), vec![rounded.scales()[token]]),
                        None => to_int8(&row[..layout.cols], row.len(), self.interval)?,
                    };
                    place(&numbers, i8::cast_unsigned, &places, of, as_slice_mut(units));
                    fill_side::<S, D>(scales, of, |column| {
                        steps.get(column / self.interval).map_or(0, |step| step.to_bits())
                    });
                    fill_starts::<S, D>(as_slice_mut(units), of, starts);
                }
            }
            if self.weight.has_shift() {
                let sums = &mut lanes.block_sums[token * sum_stride..][..sum_stride];
                for (x, sum) in row[..layout.cols].chunks(layout.block_size).zip(sums) {
                    *sum = x.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
                }
            }
        }
        Some(lanes)
    }
}

/// One of the tokens that are side by side.
#[derive(Clone, Copy)]
struct Token {
    token: usize,
    room: usize,
}

impl Token {
    /// Its part of every group, `len` long.
    #[inline(always)]
    fn groups<T>(self, values: &mut [T], len: usize) -> impl Iterator<Item = &mut [T]> {
        values.chunks_exact_mut(len).skip(self.token).step_by(self.room)
    }
}

/// The numbers of a row, and zeros up to `room`.
#[inline(always)]
fn padded(row: &[i8], room: usize) -> Vec<i8> {
    let mut numbers = vec![0; room];
    numbers[..row.len()].copy_from_slice(row);
    numbers
}

/// For every place in the units of a group, the code of the group that belongs there.
#[inline(always)]
fn places<S: Simd, D: Dot<S>>() -> Vec<usize> {
    let place = |at: usize| D::element(at / (S::LANES * D::PACK), at / D::PACK % S::LANES, at % D::PACK);
    (0..D::GROUP).map(place).collect()
}

/// Puts the numbers of every group into their places.
#[inline(always)]
fn place<T: Copy, U>(numbers: &[T], bits: impl Fn(T) -> U, places: &[usize], of: Token, units: &mut [U]) {
    assert!(places.iter().all(|&place| place < places.len()));
    for (group, units) in numbers.chunks_exact(places.len()).zip(of.groups(units, places.len())) {
        for (to, &from) in units.iter_mut().zip(places) {
            // SAFETY: a group has as many numbers as there are places, and no place is beyond it.
            *to = bits(unsafe { *group.get_unchecked(from) });
        }
    }
}

/// Fills a token's `[groups][PARTS][lane]` by the first column of each lane.
#[inline(always)]
fn fill_side<S: Simd, D: Dot<S>>(side: &mut [u32], of: Token, of_column: impl Fn(usize) -> u32) {
    for (group, side) in of.groups(side, D::PARTS * S::LANES).enumerate() {
        for (at, to) in side.iter_mut().enumerate() {
            let element = D::element(at / S::LANES * (D::UNITS / D::PARTS), at % S::LANES, 0);
            *to = of_column(group * D::GROUP + element);
        }
    }
}

/// `-OFFSET` times the sum of the bytes that go into every lane.
#[inline(always)]
fn fill_starts<S: Simd, D: Dot<S>>(bytes: &mut [u8], of: Token, starts: &mut [u32]) {
    let groups = of.groups(bytes, D::GROUP).zip(of.groups(starts, D::PARTS * S::LANES));
    for (bytes, starts) in groups {
        for (at, start) in starts.iter_mut().enumerate() {
            let (part, lane) = (at / S::LANES, at % S::LANES);
            let units = part * D::UNITS / D::PARTS..(part + 1) * D::UNITS / D::PARTS;
            let quads = units.map(|unit| &bytes[(unit * S::LANES + lane) * D::PACK..][..D::PACK]);
            let sum: i32 = quads.flatten().map(|&byte| i32::from(byte.cast_signed())).sum();
            *start = (-D::OFFSET * sum).cast_unsigned();
        }
    }
}

/// A bf16 number in fp32 as its bits: the lower half is zero.
#[inline(always)]
fn upper_half(x: f32) -> u16 {
    (x.to_bits() >> 16) as u16
}

/// The units as smaller integers.
#[inline(always)]
pub(super) fn as_slice_mut<T>(units: &mut [u32]) -> &mut [T] {
    // SAFETY: every bit pattern is a u8 or u16, which are the types this is called for, and they divide a u32.
    let (before, middle, after) = unsafe { units.align_to_mut::<T>() };
    debug_assert!(before.is_empty() && after.is_empty());
    middle
}

/// A row in int16, whose length is a multiple of [`INT16_INTERVAL`], and the power of two that each interval is
/// counted in: its largest number has 14 bits. None where a number is NaN or infinite.
#[inline(always)]
fn to_int16(row: &[f32]) -> Option<(Vec<i16>, Vec<f32>)> {
    let mut numbers = vec![0; row.len()];
    let mut steps = vec![0.0; row.len() / INT16_INTERVAL];
    let intervals = row.chunks_exact(INT16_INTERVAL).zip(numbers.chunks_exact_mut(INT16_INTERVAL));
    let mut most = 0;
    for ((x, numbers), step) in intervals.zip(&mut steps) {
        let absmax = largest_bits(x);
        most = most.max(absmax);
        // Biased exponents. The smallest ones share a step whose inverse is finite.
        let exponent = (absmax >> 23).clamp(14, 254);
        *step = f32::from_bits((exponent - 13) << 23);
        let inverse = f32::from_bits((254 - (exponent - 13)) << 23);
        for (number, &x) in numbers.iter_mut().zip(x) {
            *number = round(x * inverse) as i16;
        }
    }
    (most < f32::INFINITY.to_bits()).then_some((numbers, steps))
}

/// A row in int8, `room` long, with a scale for each `interval`: absmax / 127, as llama.cpp's block-wise quantization has
/// it. None where a number is NaN or infinite.
#[inline(always)]
fn to_int8(row: &[f32], room: usize, interval: usize) -> Option<(Vec<i8>, Vec<f32>)> {
    let mut numbers = vec![0; room];
    let mut steps = vec![0.0; row.len().div_ceil(interval)];
    let mut most = 0;
    for ((x, numbers), step) in row.chunks(interval).zip(numbers.chunks_mut(interval)).zip(&mut steps) {
        let absmax = largest_bits(x);
        most = most.max(absmax);
        let inverse = 127.0 / f32::from_bits(absmax);
        if inverse.is_finite() {
            *step = f32::from_bits(absmax) / 127.0;
            for (number, &x) in numbers.iter_mut().zip(x) {
                *number = round(x * inverse) as i8;
            }
        }
    }
    (most < f32::INFINITY.to_bits()).then_some((numbers, steps))
}

/// The nearest integer to a number below 2^22, ties to even: beyond 2^23 floats have no fraction. Conversions of the
/// language saturate, which no instruction does for a vector at once.
#[inline(always)]
pub(super) fn round(x: f32) -> i32 {
    const INTEGERS: f32 = 1.5 * (1 << 23) as f32;
    (x + INTEGERS).to_bits().wrapping_sub(INTEGERS.to_bits()).cast_signed()
}

/// The bits of a magnitude: as integers, magnitudes are in the order of the numbers, NaN above infinity.
#[inline(always)]
pub(super) fn magnitude_bits(x: f32) -> u32 {
    x.to_bits() & i32::MAX.cast_unsigned()
}

/// The bits of the largest magnitude.
#[inline(always)]
fn largest_bits(x: &[f32]) -> u32 {
    x.iter().fold(0, |most, &x| most.max(magnitude_bits(x)))
}
