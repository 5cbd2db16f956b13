//! The product for a few tokens: bound by reading the weight, so every row is decoded in registers, once.
//!
//! A 32-bit word of codes holds 4 or 8 consecutive weights. A vector of words is decoded element by element: element
//! `e` of all words, then the next. A dot product does not care in which order its terms come as long as both factors
//! agree, so the activations are put into that order once per call and the codes are never rearranged.

use std::ops::Range;

use super::codes::{Codes, VECTOR_BYTES, padded, with_codes};
use super::isa::{Isa, Kernel, dispatch};
use super::parallel;
use super::simd::Simd;
use crate::storage::PackedWeight;

/// Most tokens that this path takes.
pub(super) const MAX_TOKENS: usize = 4;

/// How far ahead of its use a row's cache line is asked for, in bytes.
const PREFETCH: usize = 2048;

/// Activations in the order of decoding, and their sums over blocks.
struct Activations {
    /// `[tokens][groups][element][lane]`, zeros behind the last column.
    values: Vec<f32>,
    /// Length of a token in `values`.
    stride: usize,
    /// `[tokens][blocks]`, zeros up to a whole vector; empty for formats without shifts.
    block_sums: Vec<f32>,
    /// Length of a token in `block_sums`.
    sum_stride: usize,
}

/// `y[m, n] = sum_k x[m, k] * w[n, k]` for up to [`MAX_TOKENS`] tokens of a row-aligned weight: `x` is
/// `[tokens, cols]` in fp32, `y` is `[rows, tokens]`.
pub(super) fn linear(isa: Isa, weight: &PackedWeight<'_>, x: &[f32], tokens: usize, y: &mut [f32], threads: usize) {
    debug_assert!(!weight.layout().straddles_rows && tokens <= MAX_TOKENS);
    let activations = dispatch(isa, Arrange { weight, x, tokens });
    let rows = weight.layout().rows;
    let step = rows_at_once(rows, weight.layout().row_bytes(), threads);
    let parts = y.chunks_mut(step * tokens).enumerate().map(|(part, y)| (part * step, y)).collect();
    parallel::for_each(threads, parts, |(first, y)| {
        dispatch(isa, DecodeRows { weight, x: &activations, tokens, first, y });
    });
}

/// Rows that a thread takes at a time: a few parts for every thread, so that none waits long for another, yet at
/// least 16 KiB of codes, so that taking one is cheap beside working on it.
fn rows_at_once(rows: usize, row_bytes: usize, threads: usize) -> usize {
    if threads <= 1 {
        return rows;
    }
    rows.div_ceil(8 * threads).max((16 << 10) / row_bytes.max(1)).max(1)
}

struct Arrange<'a> {
    weight: &'a PackedWeight<'a>,
    x: &'a [f32],
    tokens: usize,
}

impl Kernel for Arrange<'_> {
    type Output = Activations;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Activations {
        with_codes!(simd, self.weight, codes => self.arrange(simd, codes))
    }
}

impl Arrange<'_> {
    #[inline(always)]
    fn arrange<S: Simd, C: Codes<S>>(&self, _simd: S, _codes: C) -> Activations {
        let layout = self.weight.layout();
        let group = S::LANES * C::PER_WORD;
        let stride = layout.cols.next_multiple_of(group);
        let mut values = vec![0.0; self.tokens * stride];
        for (x, values) in self.x.chunks_exact(layout.cols).zip(values.chunks_exact_mut(stride)) {
            for (x, values) in x.chunks(group).zip(values.chunks_exact_mut(group)) {
                for (lane, x) in x.chunks(C::PER_WORD).enumerate() {
                    for (element, &x) in x.iter().enumerate() {
                        values[element * S::LANES + lane] = x;
                    }
                }
            }
        }
        let sum_stride = layout.blocks_per_row().next_multiple_of(S::LANES);
        let mut block_sums = Vec::new();
        if self.weight.has_shift() {
            block_sums.resize(self.tokens * sum_stride, 0.0);
            for (x, sums) in self.x.chunks_exact(layout.cols).zip(block_sums.chunks_exact_mut(sum_stride)) {
                for (x, sum) in x.chunks(layout.block_size).zip(sums) {
                    *sum = x.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
                }
            }
        }
        Activations { values, stride, block_sums, sum_stride }
    }
}

struct DecodeRows<'a> {
    weight: &'a PackedWeight<'a>,
    x: &'a Activations,
    tokens: usize,
    first: usize,
    /// `[rows, tokens]`.
    y: &'a mut [f32],
}

impl Kernel for DecodeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_codes!(simd, self.weight, codes => match self.tokens {
            1 => self.rows::<S, _, 1>(simd, codes),
            2 => self.rows::<S, _, 2>(simd, codes),
            3 => self.rows::<S, _, 3>(simd, codes),
            _ => self.rows::<S, _, MAX_TOKENS>(simd, codes),
        });
    }
}

impl DecodeRows<'_> {
    #[inline(always)]
    fn rows<S: Simd, C: Codes<S>, const TOKENS: usize>(self, simd: S, codes: C) {
        let layout = self.weight.layout();
        let (row_bytes, blocks) = (layout.row_bytes(), layout.blocks_per_row());
        let scale_reader = ScaleReader::new::<C>(simd, layout.block_size);
        // A whole vector of scales is read from any block on.
        let padded_blocks = blocks.next_multiple_of(S::LANES) + S::LANES;
        let mut scales = vec![0.0; padded_blocks];
        let mut shifts = vec![0.0; padded_blocks];
        for (row, y) in (self.first..).zip(self.y.chunks_exact_mut(TOKENS)) {
            let bytes = &self.weight.codes()[row * row_bytes..][..row_bytes];
            self.weight.read_scales(row * blocks, &mut scales[..blocks]);
            let mut sums = row_dot::<S, C, TOKENS>(simd, codes, bytes, &scales, &scale_reader, self.x);
            if self.weight.has_shift() {
                self.weight.read_shifts(row * blocks, &mut shifts[..blocks]);
                add_shifts(simd, &shifts, blocks, self.x, &mut sums);
            }
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = simd.sum(sum);
            }
        }
    }
}

/// Spreads the scales of the blocks that a vector of words covers over its lanes.
struct ScaleReader<S: Simd> {
    /// log2 of the block size, or more than any column's where a row is one block.
    block_shift: u32,
    index: S::Index,
}

impl<S: Simd> ScaleReader<S> {
    #[inline(always)]
    fn new<C: Codes<S>>(simd: S, block_size: usize) -> Self {
        let is_power = block_size.is_power_of_two() && block_size >= crate::format::BlockSize::MIN;
        let block_shift = if is_power { block_size.trailing_zeros() } else { usize::BITS - 1 };
        let words_per_block = if is_power { block_size / C::PER_WORD } else { S::LANES };
        Self { block_shift, index: simd.runs(words_per_block.min(S::LANES)) }
    }

    /// The scale of every lane of the words that start at column `col`.
    #[inline(always)]
    fn lanes(&self, simd: S, scales: &[f32], col: usize) -> S::Vector {
        let first = col >> self.block_shift;
        debug_assert!(first + S::LANES <= scales.len());
        // SAFETY: `scales` is padded by a vector behind the last block.
        simd.permute(unsafe { simd.load(scales.as_ptr().add(first)) }, self.index)
    }
}

/// The dot products of one row with every token, a vector of partial sums each.
#[inline(always)]
fn row_dot<S: Simd, C: Codes<S>, const TOKENS: usize>(
    simd: S,
    codes: C,
    bytes: &[u8],
    scales: &[f32],
    scale_reader: &ScaleReader<S>,
    x: &Activations,
) -> [S::Vector; TOKENS] {
    let (vector_bytes, group) = (4 * S::LANES, S::LANES * C::PER_WORD);
    let whole = bytes.len() / vector_bytes;
    let has_tail = whole * vector_bytes < bytes.len();
    let mut sums = [simd.splat(0.0); TOKENS];
    for at in 0..whole + usize::from(has_tail) {
        let words = if at < whole {
            let from = bytes.as_ptr().wrapping_add(at * vector_bytes);
            simd.prefetch(from.wrapping_add(PREFETCH));
            // SAFETY: a whole vector lies within the row.
            unsafe { simd.load(from.cast::<f32>()) }
        } else {
            let tail: [u8; VECTOR_BYTES] = padded(&bytes[at * vector_bytes..]);
            // SAFETY: no vector is longer than the buffer.
            unsafe { simd.load(tail.as_ptr().cast::<f32>()) }
        };
        // SAFETY: a token has a whole group of activations for every vector of words.
        let partial =
            unsafe { group_dot::<S, C, TOKENS>(simd, codes, words, x.values.as_ptr().add(at * group), x.stride) };
        let scale = scale_reader.lanes(simd, scales, at * group);
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum = simd.fma(partial, scale, *sum);
        }
    }
    sums
}

/// `sum over elements of code * x` for one vector of words and every token.
///
/// # Safety
/// `LANES * PER_WORD` activations are readable at `x + token * stride` for every token.
#[inline(always)]
unsafe fn group_dot<S: Simd, C: Codes<S>, const TOKENS: usize>(
    simd: S,
    codes: C,
    words: S::Vector,
    x: *const f32,
    stride: usize,
) -> [S::Vector; TOKENS] {
    let mut partial = [simd.splat(0.0); TOKENS];
    for element in 0..C::PER_WORD {
        let code = codes.decode(simd, words, element);
        for (token, partial) in partial.iter_mut().enumerate() {
            // SAFETY: handed on to the caller.
            let x = unsafe { simd.load(x.add(token * stride + element * S::LANES)) };
            *partial = if element == 0 { simd.mul(code, x) } else { simd.fma(code, x, *partial) };
        }
    }
    partial
}

/// Adds `sum_b shift[b] * (sum of x over block b)`.
#[inline(always)]
fn add_shifts<S: Simd, const TOKENS: usize>(
    simd: S,
    shifts: &[f32],
    blocks: usize,
    x: &Activations,
    sums: &mut [S::Vector; TOKENS],
) {
    let vectors: Range<usize> = 0..blocks.div_ceil(S::LANES);
    for at in vectors.map(|vector| vector * S::LANES) {
        // SAFETY: `shifts` and the sums of a token are padded to whole vectors.
        unsafe {
            let shift = simd.load(shifts.as_ptr().add(at));
            for (token, sum) in sums.iter_mut().enumerate() {
                let x = simd.load(x.block_sums.as_ptr().add(token * x.sum_stride + at));
                *sum = simd.fma(shift, x, *sum);
            }
        }
    }
}
