//! The product for a few tokens: bound by reading the weight, so every row is decoded in registers, once.
//!
//! A vector of packed codes is decoded operand by operand ([`Dot`]). A dot product does not care in which order its terms
//! come as long as both factors agree, so the activations are put into that order once per call and the codes are never
//! rearranged. Scales are applied to sums in fp32.

use std::ops::Range;

use super::activations::{Activations, Lanes};
use super::codes::load_words;
use super::dot::{Arithmetic, Dot, DotKernel, dispatch_dot};
use super::int8_rows::Codes;
use super::isa::Isa;
use super::linear::Finish;
use super::parallel;
use super::scales::{prefetch_scale, read_scales, read_shifts};
use super::simd::Simd;
use crate::codebook::LEN;
use crate::format::Layout;
use crate::storage::PackedWeight;

/// Codes for which another thread is worth waking: it takes some microseconds to come, in which one thread reads
/// about so much.
const BYTES_PER_THREAD: usize = 64 << 10;

/// What suits the caches of a machine, in bytes.
#[derive(Clone, Copy)]
struct Caches {
    /// Activations that are worked on at a time: they stay in the L1 cache beside the codes that pass through.
    activations: usize,
    /// How far ahead of its use a cache line of codes is asked for: from memory, and from the L2 cache.
    ahead: [usize; 2],
}

/// Measured on Sapphire Rapids, whose L1 cache has 48 KiB, and on Zen 4, whose has 32 as most others have.
const fn caches(isa: Isa) -> Caches {
    match isa {
        Isa::Amx => Caches { activations: 32 << 10, ahead: [8192, 1024] },
        _ => Caches { activations: 16 << 10, ahead: [16384, 2048] },
    }
}

/// Rows whose scales are read, and whose results are handed over, at once.
const ROWS: usize = 16;

/// The product of a row-aligned weight and a few tokens.
pub(super) struct Product<'a> {
    weight: &'a PackedWeight<'a>,
    arithmetic: Arithmetic,
    isa: Isa,
    lanes: Lanes,
    tokens: usize,
    room: usize,
}

impl<'a> Product<'a> {
    /// The product with up to as many tokens as [`most_tokens`] says; for int8 by rows `rounded` has their integers. None
    /// where other integers are asked for and an activation is NaN or infinite.
    pub(super) fn new(
        isa: Isa,
        arithmetic: Arithmetic,
        weight: &'a PackedWeight<'a>,
        x: &Activations<'_>,
        rounded: Option<Codes<'_>>,
    ) -> Option<Self> {
        debug_assert!(!weight.layout().straddles_rows);
        let room = match x.tokens {
            3..=4 => 4,
            5.. => 8,
            few => few,
        };
        let lanes = Lanes::new(isa, arithmetic, weight, x, rounded, room)?;
        Some(Self { weight, arithmetic, isa, lanes, tokens: x.tokens, room })
    }

    /// Computes it and hands it over, all tokens at once.
    pub(super) fn run(&self, threads: usize, finish: &Finish<'_>) {
        let layout = self.weight.layout();
        let threads = threads.min(1 + layout.code_bytes() * self.room / BYTES_PER_THREAD);
        let step = rows_at_once(layout.rows, layout.row_bytes(), threads);
        parallel::for_each(threads, parallel::ranges(layout.rows, step), |rows| {
            dispatch_dot(self.isa, self.arithmetic, self.weight, DecodeRows { product: self, range: rows, finish });
        });
    }
}

/// Most tokens that are multiplied at once, 4 or 8 by the number of registers.
pub(super) fn most_tokens(isa: Isa) -> usize {
    struct Tokens;
    impl super::isa::Kernel for Tokens {
        type Output = usize;
        fn run<S: Simd>(self, _simd: S) -> usize {
            S::TILE_TOKENS
        }
    }
    super::isa::dispatch(isa, Tokens)
}

/// Rows that a thread takes at a time: a few parts for every thread, so that none waits long for another, yet at
/// least 16 KiB of codes, so that taking one is cheap beside working on it.
fn rows_at_once(rows: usize, row_bytes: usize, threads: usize) -> usize {
    if threads <= 1 {
        return rows;
    }
    rows.div_ceil(8 * threads).max((16 << 10) / row_bytes.max(1)).next_multiple_of(ROWS)
}

struct DecodeRows<'a> {
    product: &'a Product<'a>,
    range: Range<usize>,
    finish: &'a Finish<'a>,
}

impl DotKernel for DecodeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd, D: Dot<S>>(self, simd: S, dot: D) {
        match self.product.room {
            1 => self.rows::<S, D, 1>(simd, dot),
            2 => self.rows::<S, D, 2>(simd, dot),
            4 => self.rows::<S, D, 4>(simd, dot),
            _ => self.rows::<S, D, 8>(simd, dot),
        }
    }
}

impl DecodeRows<'_> {
    #[inline(always)]
    fn rows<S: Simd, D: Dot<S>, const TOKENS: usize>(self, simd: S, dot: D) {
        let Product { weight, lanes, tokens, .. } = self.product;
        let layout = weight.layout();
        let (row_bytes, blocks) = (layout.row_bytes(), layout.blocks_per_row());
        let row_dot = RowDot::new(simd, dot, lanes, layout);
        let Caches { activations, ahead } = caches(self.product.isa);
        let groups_at_once = (activations / (TOKENS * D::UNITS * 4 * S::LANES)).max(1);
        // A whole vector of scales is read from any block on.
        let mut scales = vec![0.0; ROWS * blocks + S::LANES];
        let mut shifts = vec![0.0; if weight.has_shift() { ROWS * blocks + S::LANES } else { 0 }];
        let mut strip = vec![0.0; TOKENS * ROWS];
        for first in self.range.clone().step_by(ROWS) {
            let rows = first..(first + ROWS).min(self.range.end);
            read_scales(simd, weight, first * blocks, &mut scales[..rows.len() * blocks]);
            if weight.has_shift() {
                read_shifts(simd, weight, first * blocks, &mut shifts[..rows.len() * blocks]);
            }
            let mut sums = [[simd.splat(0.0); TOKENS]; ROWS];
            for groups in parallel::ranges(row_dot.groups, groups_at_once) {
                // Where a row is worked on in pieces, what comes next is the same piece of the rows below.
                let piece = groups.len() * 4 * S::LANES;
                let is_whole = groups.len() == row_dot.groups;
                let ahead = ahead.map(|bytes| if is_whole { bytes } else { bytes.div_ceil(piece) * row_bytes });
                for (row, sums) in sums[..rows.len()].iter_mut().enumerate() {
                    // Up to the end of the weight: the last vector of a row may run on into the next, times zeros.
                    let bytes = &weight.codes()[(first + row) * row_bytes..];
                    prefetch_scales(simd, weight, (first + ROWS + row) * blocks, &groups, D::GROUP);
                    row_dot.add((bytes, ahead), &scales[row * blocks..], groups.clone(), sums);
                }
            }
            for (row, sums) in sums[..rows.len()].iter_mut().enumerate() {
                for sum in sums.iter_mut() {
                    *sum = simd.mul(*sum, row_dot.factor);
                }
                if weight.has_shift() {
                    add_shifts(simd, &shifts[row * blocks..], blocks, lanes, sums);
                }
                for (token, sum) in sums.iter().enumerate() {
                    strip[token * ROWS + row] = simd.sum(*sum);
                }
            }
            (self.finish)(0..*tokens, rows, &strip, ROWS);
        }
    }
}

/// The dot products of a row with all tokens.
struct RowDot<'a, S: Simd, D> {
    simd: S,
    dot: D,
    x: &'a Lanes,
    /// Vectors of words in a row, the last one perhaps not full.
    groups: usize,
    /// log2 of the block size, or more than any column's where a row is one block.
    block_shift: u32,
    /// Which of the scales from the first one on each lane of the parts takes; in the last vector, lanes behind the
    /// end of the row take the row's last scale.
    scale_of_lane: [S::Index; 2],
    scale_of_last_lane: [S::Index; 2],
    /// What decoded weights are to be multiplied with.
    factor: S::Vector,
}

impl<'a, S: Simd, D: Dot<S>> RowDot<'a, S, D> {
    #[inline(always)]
    fn new(simd: S, dot: D, x: &'a Lanes, layout: &Layout) -> Self {
        let is_row = layout.block_size >= layout.cols;
        let block_shift = if is_row { usize::BITS - 1 } else { layout.block_size.trailing_zeros() };
        let groups = layout.cols.div_ceil(D::GROUP);
        let last_first = (groups.saturating_sub(1) * D::GROUP) >> block_shift;
        let last = layout.blocks_per_row().saturating_sub(1) - last_first;
        let scale = |part: usize, lane: usize| D::element(part * D::UNITS / D::PARTS, lane, 0) >> block_shift;
        Self {
            simd,
            dot,
            x,
            groups,
            block_shift,
            scale_of_lane: [0, 1].map(|part| simd.index(|lane| scale(part % D::PARTS, lane))),
            scale_of_last_lane: [0, 1].map(|part| simd.index(|lane| scale(part % D::PARTS, lane).min(last))),
            factor: simd.splat(dot.factor()),
        }
    }

    /// Adds the products of a row's `groups` to the partial sums of each token. `bytes` and `scales` go from the row on;
    /// `far` bytes ahead is what memory is asked for, `near` bytes what the L2 cache is.
    #[inline(always)]
    fn add<const TOKENS: usize>(
        &self,
        (bytes, [far, near]): (&[u8], [usize; 2]),
        scales: &[f32],
        groups: Range<usize>,
        sums: &mut [S::Vector; TOKENS],
    ) {
        let vector_bytes = 4 * S::LANES;
        let mut totals = *sums;
        for at in groups.start..groups.end.min(self.groups - 1) {
            let from = bytes.as_ptr().wrapping_add(at * vector_bytes);
            self.simd.prefetch(from.wrapping_add(far));
            self.simd.prefetch_near(from.wrapping_add(near));
            // SAFETY: every vector but the last lies within the row.
            let words = unsafe { self.simd.load(from.cast::<f32>()) };
            self.add_group::<TOKENS>(words, at, scales, &self.scale_of_lane, &mut totals);
        }
        if groups.end == self.groups {
            let last = &bytes[(self.groups - 1) * vector_bytes..];
            let words = load_words(self.simd, last);
            self.add_group::<TOKENS>(words, self.groups - 1, scales, &self.scale_of_last_lane, &mut totals);
        }
        *sums = totals;
    }

    /// Adds vector `at` of the row.
    #[inline(always)]
    fn add_group<const TOKENS: usize>(
        &self,
        words: S::Vector,
        at: usize,
        scales: &[f32],
        index: &[S::Index; 2],
        sums: &mut [S::Vector; TOKENS],
    ) {
        let (simd, dot) = (self.simd, self.dot);
        let first = (at * D::GROUP) >> self.block_shift;
        debug_assert!(first + S::LANES <= scales.len());
        // SAFETY: scales are padded by a vector behind the last row's.
        let scales = unsafe { simd.load(scales.as_ptr().wrapping_add(first)) };
        for (part, &index) in index.iter().enumerate().take(D::PARTS) {
            let scale = simd.permute(scales, index);
            let partial = self.partial::<TOKENS>(words, at, part);
            for (token, (sum, partial)) in sums.iter_mut().zip(partial).enumerate() {
                let partial = dot.to_f32(simd, partial);
                let partial = if D::ARITHMETIC.is_integer() {
                    simd.mul(partial, self.side(&self.x.scales, token, at, part))
                } else {
                    partial
                };
                *sum = simd.fma(partial, scale, *sum);
            }
        }
    }

    /// `sum of weight * x` over one vector of words, for a part and every token.
    #[inline(always)]
    fn partial<const TOKENS: usize>(&self, words: S::Vector, at: usize, part: usize) -> [S::Vector; TOKENS] {
        let (simd, dot) = (self.simd, self.dot);
        let mut partial = [simd.splat(0.0); TOKENS];
        if D::OFFSET != 0 {
            for (token, partial) in partial.iter_mut().enumerate() {
                *partial = self.side(&self.x.starts, token, at, part);
            }
        }
        for unit in part * D::UNITS / D::PARTS..(part + 1) * D::UNITS / D::PARTS {
            let operand = dot.operand(simd, words, unit);
            for (token, partial) in partial.iter_mut().enumerate() {
                let from = ((at * self.x.room + token) * D::UNITS + unit) * S::LANES;
                debug_assert!(from + S::LANES <= self.x.units.len());
                // SAFETY: a token has a vector of activations for every unit of every vector of words.
                let x = unsafe { simd.load(self.x.units.as_ptr().add(from).cast::<f32>()) };
                *partial = dot.dot(simd, *partial, operand, x);
            }
        }
        partial
    }

    /// The vector of `values`, `[groups][room][PARTS][lane]`, at a place.
    #[inline(always)]
    fn side(&self, values: &[u32], token: usize, at: usize, part: usize) -> S::Vector {
        let from = ((at * self.x.room + token) * D::PARTS + part) * S::LANES;
        debug_assert!(from + S::LANES <= values.len());
        // SAFETY: both arrays that are passed have a vector of 32-bit numbers for every such place.
        unsafe { self.simd.load(values.as_ptr().add(from).cast::<f32>()) }
    }
}

/// Asks for the scales that `groups` of a row take, from the row's first one on: the next rows' are read at once, when
/// these are done.
#[inline(always)]
fn prefetch_scales<S: Simd>(simd: S, weight: &PackedWeight<'_>, first: usize, groups: &Range<usize>, group: usize) {
    let block_size = weight.layout().block_size;
    for block in (groups.start * group / block_size..(groups.end * group).div_ceil(block_size)).step_by(LEN) {
        prefetch_scale(simd, weight, first + block);
    }
}

/// Adds `sum_b shift[b] * (sum of x over block b)`.
#[inline(always)]
fn add_shifts<S: Simd, const TOKENS: usize>(
    simd: S,
    shifts: &[f32],
    blocks: usize,
    x: &Lanes,
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
