//! The product for a few tokens: bound by reading the weight, so every row is decoded in registers, once.
//!
//! A 32-bit word of codes holds 4 or 8 consecutive weights. A vector of words is decoded element by element: element
//! `e` of all words, then the next. A dot product does not care in which order its terms come as long as both factors
//! agree, so the activations are put into that order once per call and the codes are never rearranged.

use super::codes::{Codes, VECTOR_BYTES, padded, with_codes};
use super::isa::{Isa, Kernel, dispatch};
use super::parallel;
use super::scales::{read_scales, read_shifts};
use super::simd::Simd;
use crate::codebook::LEN;
use crate::format::Layout;
use crate::storage::PackedWeight;

/// Most tokens that this path takes.
pub(super) const MAX_TOKENS: usize = 4;

/// Codes for which another thread is worth waking: it takes tens of microseconds to come, in which one thread reads
/// about so much.
const BYTES_PER_THREAD: usize = 512 << 10;

/// How far ahead of its use a row's cache line is asked for, in bytes.
const PREFETCH: usize = 4096;

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
    let threads = threads.min(1 + weight.layout().code_bytes() / BYTES_PER_THREAD);
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

/// Rows whose scales are read at once.
const ROWS: usize = 16;

impl DecodeRows<'_> {
    #[inline(always)]
    fn rows<S: Simd, C: Codes<S>, const TOKENS: usize>(self, simd: S, codes: C) {
        let layout = self.weight.layout();
        let (row_bytes, blocks) = (layout.row_bytes(), layout.blocks_per_row());
        let row_dot = RowDot::new(simd, codes, self.x, layout);
        // A whole vector of scales is read from any block on.
        let mut scales = vec![0.0; ROWS * blocks + S::LANES];
        let mut shifts = vec![0.0; if self.weight.has_shift() { ROWS * blocks + S::LANES } else { 0 }];
        for (y, first) in self.y.chunks_mut(ROWS * TOKENS).zip((self.first..).step_by(ROWS)) {
            let count = y.len() / TOKENS;
            read_scales(simd, self.weight, first * blocks, &mut scales[..count * blocks]);
            if self.weight.has_shift() {
                read_shifts(simd, self.weight, first * blocks, &mut shifts[..count * blocks]);
            }
            for (row, y) in y.chunks_exact_mut(TOKENS).enumerate() {
                // Up to the end of the weight: the last vector of a row may run on into the next, times zeros.
                let bytes = &self.weight.codes()[(first + row) * row_bytes..];
                let mut sums = row_dot.run::<TOKENS>(bytes, &scales[row * blocks..]);
                if self.weight.has_shift() {
                    add_shifts(simd, &shifts[row * blocks..], blocks, self.x, &mut sums);
                }
                for (y, sum) in y.iter_mut().zip(sums) {
                    *y = simd.sum(sum);
                }
            }
        }
    }
}

/// The dot products of a row with all tokens.
struct RowDot<'a, S: Simd, C> {
    simd: S,
    codes: C,
    x: &'a Activations,
    /// Vectors of words in a row, the last one perhaps not full.
    vectors: usize,
    /// log2 of the block size, or more than any column's where a row is one block.
    block_shift: u32,
    /// Which of the scales from the first one on each lane of words takes; in the last vector, lanes behind the end of
    /// the row take the row's last scale.
    scale_of_lane: S::Index,
    scale_of_last_lane: S::Index,
}

impl<'a, S: Simd, C: Codes<S>> RowDot<'a, S, C> {
    #[inline(always)]
    fn new(simd: S, codes: C, x: &'a Activations, layout: &Layout) -> Self {
        let is_row = layout.block_size >= layout.cols;
        let block_shift = if is_row { usize::BITS - 1 } else { layout.block_size.trailing_zeros() };
        let words_per_block = if is_row { usize::MAX } else { layout.block_size / C::PER_WORD };
        let group = S::LANES * C::PER_WORD;
        let vectors = layout.cols.div_ceil(group);
        let last_first = (vectors.saturating_sub(1) * group) >> block_shift;
        let last = layout.blocks_per_row().saturating_sub(1) - last_first;
        Self {
            simd,
            codes,
            x,
            vectors,
            block_shift,
            scale_of_lane: simd.index(|lane| lane / words_per_block),
            scale_of_last_lane: simd.index(|lane| (lane / words_per_block).min(last)),
        }
    }

    /// A vector of partial sums for each token, from the codes and scales of the row on.
    #[inline(always)]
    fn run<const TOKENS: usize>(&self, bytes: &[u8], scales: &[f32]) -> [S::Vector; TOKENS] {
        let vector_bytes = 4 * S::LANES;
        let mut sums = [self.simd.splat(0.0); TOKENS];
        for at in 0..self.vectors - 1 {
            let from = bytes.as_ptr().wrapping_add(at * vector_bytes);
            self.simd.prefetch(from.wrapping_add(PREFETCH));
            // SAFETY: every vector but the last lies within the row.
            let words = unsafe { self.simd.load(from.cast::<f32>()) };
            self.add::<TOKENS>(words, at, scales, self.scale_of_lane, &mut sums);
        }
        let last = &bytes[(self.vectors - 1) * vector_bytes..];
        let words = if last.len() >= vector_bytes {
            // SAFETY: as just checked.
            unsafe { self.simd.load(last.as_ptr().cast::<f32>()) }
        } else {
            let tail: [u8; VECTOR_BYTES] = padded(last);
            // SAFETY: no vector is longer than the buffer.
            unsafe { self.simd.load(tail.as_ptr().cast::<f32>()) }
        };
        self.add::<TOKENS>(words, self.vectors - 1, scales, self.scale_of_last_lane, &mut sums);
        sums
    }

    /// Adds vector `at` of the row.
    #[inline(always)]
    fn add<const TOKENS: usize>(
        &self,
        words: S::Vector,
        at: usize,
        scales: &[f32],
        index: S::Index,
        sums: &mut [S::Vector; TOKENS],
    ) {
        let (simd, group) = (self.simd, S::LANES * C::PER_WORD);
        let first = (at * group) >> self.block_shift;
        debug_assert!(first + S::LANES <= scales.len());
        // SAFETY: scales are padded by a vector behind the last row's, and a token has a whole group of activations
        // for every vector of words.
        unsafe {
            let scale = simd.permute(simd.load(scales.as_ptr().add(first)), index);
            let x = self.x.values.as_ptr().add(at * group);
            let partial = group_dot::<S, C, TOKENS>(simd, self.codes, words, x, self.x.stride);
            for (sum, partial) in sums.iter_mut().zip(partial) {
                *sum = simd.fma(partial, scale, *sum);
            }
        }
    }
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
    for at in (0..blocks).step_by(S::LANES) {
        let mut shift = [0.0; LEN];
        // What follows the last shift belongs to another row.
        let count = S::LANES.min(blocks - at);
        shift[..count].copy_from_slice(&shifts[at..at + count]);
        // SAFETY: no vector is longer than the buffer, and the sums of a token are padded to whole vectors.
        unsafe {
            let shift = simd.load(shift.as_ptr());
            for (token, sum) in sums.iter_mut().enumerate() {
                let x = simd.load(x.block_sums.as_ptr().add(token * x.sum_stride + at));
                *sum = simd.fma(shift, x, *sum);
            }
        }
    }
}
