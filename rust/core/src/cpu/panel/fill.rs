//! Parts of a weight decoded into panels.

use std::ops::Range;

use super::numbers::Terms;
use super::{Direction, TERMS, vectors};
use crate::cpu::codes::{Codes, load_words};
use crate::cpu::dequantize::{BlockScales, decode_row};
use crate::cpu::scales::{prefetch_scale, read_scales, read_shifts};
use crate::cpu::simd::Simd;
use crate::storage::PackedWeight;

/// A chunk of terms, so many rows below another.
#[derive(Clone, Copy)]
struct Chunk {
    rows: usize,
    first: usize,
}

/// Decodes parts of the weight into panels, `[terms / PACK][vectors * LANES]` lanes; codes themselves stay what they are.
pub(super) struct Filler<'a, S: Simd, T> {
    weight: &'a PackedWeight<'a>,
    simd: S,
    terms: T,
    /// Outputs of all the panels of a chunk of terms.
    strip: usize,
    blocks: BlockScales,
    /// Rows decoded in order: of terms for the gradient, of outputs where blocks straddle rows.
    decoded: Vec<f32>,
    /// `[TERMS][LANES]`: rows of outputs as columns.
    columns: Vec<f32>,
    /// `[blocks][LANES]` for the rows of a vector, and both as they were read, `[LANES][blocks]`.
    scales: Vec<f32>,
    shifts: Vec<f32>,
    rows: Vec<f32>,
}

impl<'a, S: Simd, T: Terms<S>> Filler<'a, S, T> {
    const WIDTH: usize = vectors::<S>() * S::LANES;

    pub(super) fn new(weight: &'a PackedWeight<'a>, simd: S, terms: T, strip: usize) -> Self {
        let [decoded, columns, scales, shifts, rows] = [const { Vec::new() }; 5];
        let blocks = BlockScales::default();
        Self { weight, simd, terms, strip, blocks, decoded, columns, scales, shifts, rows }
    }

    /// Fills a panel with `terms` of the outputs from `first` on; `excess` is told what their sums are too large by.
    #[inline(always)]
    pub(super) fn fill<C: Codes<S>>(
        &mut self,
        codes: C,
        direction: Direction,
        terms: &Range<usize>,
        first: usize,
        panel: &mut [f32],
        excess: &mut [f32],
    ) {
        assert!(terms.len() <= TERMS && panel.len() >= TERMS / T::PACK * Self::WIDTH);
        match direction {
            Direction::Forward => self.fill_forward(codes, terms, first, panel, excess),
            Direction::Gradient => self.fill_gradient(codes, terms, first, panel),
        }
    }

    /// Terms are columns, outputs are the rows from `first` on; rows behind the last repeat it.
    #[inline(always)]
    fn fill_forward<C: Codes<S>>(
        &mut self,
        codes: C,
        terms: &Range<usize>,
        first: usize,
        panel: &mut [f32],
        excess: &mut [f32],
    ) {
        let layout = self.weight.layout();
        for vector in 0..vectors::<S>() {
            let first = first + vector * S::LANES;
            let row = |lane: usize| (first + lane).min(layout.rows - 1);
            if T::PACK == C::PER_WORD {
                self.fill_codes::<C>(terms, row, vector, panel, &mut excess[vector * S::LANES..][..S::LANES]);
            } else if layout.straddles_rows {
                self.fill_straddling(codes, terms, row, vector, panel);
            } else {
                self.fill_rows(codes, terms, row, vector, panel);
            }
        }
    }

    /// `LANES` rows become one vector of a row-aligned weight's panel: words of codes are transposed, so that a lane
    /// is a row, and decoded element by element.
    #[inline(always)]
    fn fill_rows<C: Codes<S>>(
        &mut self,
        codes: C,
        terms: &Range<usize>,
        row: impl Fn(usize) -> usize,
        vector: usize,
        panel: &mut [f32],
    ) {
        let (simd, layout) = (self.simd, self.weight.layout());
        let group = S::LANES * C::PER_WORD;
        let first_block = terms.start / layout.block_size;
        let next = self.next(terms);
        self.read_scales(first_block..(terms.end - 1) / layout.block_size + 1, next, &row);
        for start in (terms.start..terms.end).step_by(group) {
            let words = self.load_columns(start, terms, next, &row);
            let mut block = start / layout.block_size;
            let mut end = (block + 1) * layout.block_size;
            for (index, &words) in words[..S::LANES].iter().enumerate() {
                let col = start + index * C::PER_WORD;
                if col >= terms.end {
                    break;
                }
                if col >= end {
                    (block, end) = (block + 1, end + layout.block_size);
                }
                let block = (block - first_block) * S::LANES;
                // SAFETY: the scratch has a vector a block, and a panel has room for whole groups of terms.
                unsafe {
                    let scale = simd.load(self.scales[block..].as_ptr());
                    let shift = simd.load(self.shifts[block..].as_ptr());
                    for element in (0..C::PER_WORD).step_by(2) {
                        let weights = [element, element + 1]
                            .map(|element| simd.fma(codes.decode(simd, words, element), scale, shift));
                        self.store(panel, col - terms.start + element, vector, weights);
                    }
                }
            }
        }
    }

    /// Words of codes from column `start` on, a lane for each row, and asks for those of the next chunk.
    #[inline(always)]
    fn load_columns(
        &self,
        start: usize,
        terms: &Range<usize>,
        next: Chunk,
        row: &impl Fn(usize) -> usize,
    ) -> [S::Vector; 16] {
        let (simd, layout) = (self.simd, self.weight.layout());
        let ahead = next.rows * layout.row_bytes() + layout.bytes_of(next.first);
        let mut words = [simd.splat(0.0); 16];
        for (lane, word) in words[..S::LANES].iter_mut().enumerate() {
            let bytes = &self.weight.codes()[row(lane) * layout.row_bytes()..][..layout.row_bytes()];
            let bytes = &bytes[layout.bytes_of(start)..];
            simd.prefetch(bytes.as_ptr().wrapping_add(ahead).wrapping_sub(layout.bytes_of(terms.start)));
            *word = load_words(simd, bytes);
        }
        simd.transpose(&mut words[..S::LANES]);
        words
    }

    /// The same for codes that are multiplied as they are.
    #[inline(always)]
    fn fill_codes<C: Codes<S>>(
        &self,
        terms: &Range<usize>,
        row: impl Fn(usize) -> usize,
        vector: usize,
        panel: &mut [f32],
        excess: &mut [f32],
    ) {
        let (simd, next) = (self.simd, self.next(terms));
        let mut sum = simd.splat(0.0);
        for start in (terms.start..terms.end).step_by(S::LANES * C::PER_WORD) {
            let words = self.load_columns(start, terms, next, &row);
            for (index, &words) in words[..S::LANES].iter().enumerate() {
                let lane = (start - terms.start) / C::PER_WORD + index;
                debug_assert!(lane < TERMS / C::PER_WORD);
                // SAFETY: a panel has room for whole groups of terms.
                unsafe { simd.store(panel.as_mut_ptr().add(lane * Self::WIDTH + vector * S::LANES), words) };
                sum = self.terms.excess(simd, sum, words);
            }
        }
        assert!(excess.len() >= S::LANES);
        // SAFETY: as just asserted.
        unsafe { simd.store(excess.as_mut_ptr(), sum) };
    }

    /// What is filled after a chunk of a row. It is asked for while this one is: short pieces of rows are no stream that
    /// the processor's own prefetchers follow.
    fn next(&self, terms: &Range<usize>) -> Chunk {
        let is_last = terms.end == self.weight.layout().cols;
        if is_last { Chunk { rows: self.strip, first: 0 } } else { Chunk { rows: 0, first: terms.end } }
    }

    /// The same row by row, for blocks that straddle rows.
    #[inline(always)]
    fn fill_straddling<C: Codes<S>>(
        &mut self,
        codes: C,
        terms: &Range<usize>,
        row: impl Fn(usize) -> usize,
        vector: usize,
        panel: &mut [f32],
    ) {
        self.columns.resize(TERMS * S::LANES, 0.0);
        self.decoded.resize(terms.len(), 0.0);
        for lane in 0..S::LANES {
            let (blocks, out) = (&mut self.blocks, &mut self.decoded[..]);
            decode_row(self.simd, codes, self.weight, row(lane), terms.clone(), blocks, out);
            self.columns[lane..].iter_mut().step_by(S::LANES).zip(&*out).for_each(|(to, from)| *to = *from);
        }
        for term in (0..terms.len()).step_by(2) {
            // SAFETY: there is a vector for each of an even number of terms, here and in the panel.
            unsafe {
                let weights = [term, term + 1].map(|term| self.simd.load(self.columns[term * S::LANES..].as_ptr()));
                self.store(panel, term, vector, weights);
            }
        }
    }

    /// Reads the scales and shifts of `blocks` of `LANES` rows into the scratch, a vector of rows a block.
    #[inline(always)]
    fn read_scales(&mut self, blocks: Range<usize>, next: Chunk, row: &impl Fn(usize) -> usize) {
        let (simd, weight) = (self.simd, self.weight);
        let next = next.rows * weight.layout().blocks_per_row() + next.first / weight.layout().block_size;
        self.scales.resize(blocks.len().next_multiple_of(S::LANES) * S::LANES, 0.0);
        self.shifts.resize(self.scales.len(), 0.0);
        let first = |lane: usize| row(lane) * weight.layout().blocks_per_row() + blocks.start;
        let (rows, all) = (&mut self.rows, weight.layout().rows * weight.layout().blocks_per_row());
        columns(simd, rows, &mut self.scales, all, first, |first, out| {
            prefetch_scale(simd, weight, first - blocks.start + next);
            read_scales(simd, weight, first, out);
        });
        if weight.has_shift() {
            columns(simd, rows, &mut self.shifts, all, first, |first, out| read_shifts(simd, weight, first, out));
        }
    }

    /// Terms are rows, outputs are the columns from `first` on; columns behind the last are whatever was there.
    #[inline(always)]
    fn fill_gradient<C: Codes<S>>(&mut self, codes: C, terms: &Range<usize>, first: usize, panel: &mut [f32]) {
        let cols = first..(first + Self::WIDTH).min(self.weight.layout().cols);
        self.decoded.resize(2 * Self::WIDTH, 0.0);
        for term in (0..terms.len()).step_by(2) {
            for (row, out) in [term, term + 1].into_iter().zip(self.decoded.chunks_exact_mut(Self::WIDTH)) {
                let row = (terms.start + row).min(terms.end - 1);
                decode_row(self.simd, codes, self.weight, row, cols.clone(), &mut self.blocks, &mut out[..cols.len()]);
            }
            for vector in 0..vectors::<S>() {
                let columns = [0, 1].map(|row| row * Self::WIDTH + vector * S::LANES);
                // SAFETY: two rows of a panel's width were decoded, and a panel has an even number of terms.
                unsafe {
                    let weights = columns.map(|at| self.simd.load(self.decoded[at..].as_ptr()));
                    self.store(panel, term, vector, weights);
                }
            }
        }
    }

    /// Stores a vector of outputs of two terms, the first of them an even one.
    ///
    /// # Safety
    /// The terms are of the panel.
    #[inline(always)]
    unsafe fn store(&self, panel: &mut [f32], term: usize, vector: usize, weights: [S::Vector; 2]) {
        debug_assert!(term.is_multiple_of(2) && term < TERMS);
        let at = term / T::PACK * Self::WIDTH + vector * S::LANES;
        // SAFETY: the caller vouches for the terms.
        unsafe { self.terms.store(self.simd, panel.as_mut_ptr().add(at), Self::WIDTH, weights) };
    }
}

/// Fills `out`, `[numbers][LANES]`, with as many numbers of `LANES` rows, side by side: lane `i` of a number is what `read`
/// gives for it from `first(i)` on. It reads whole vectors, also beyond what is wanted, up to `end`.
#[inline(always)]
fn columns<S: Simd>(
    simd: S,
    rows: &mut Vec<f32>,
    out: &mut [f32],
    end: usize,
    first: impl Fn(usize) -> usize,
    read: impl Fn(usize, &mut [f32]),
) {
    let width = out.len() / S::LANES;
    rows.resize(out.len(), 0.0);
    for (lane, row) in rows.chunks_exact_mut(width).enumerate() {
        let count = width.min(end - first(lane));
        read(first(lane), &mut row[..count]);
    }
    for (at, out) in out.chunks_exact_mut(S::LANES * S::LANES).enumerate() {
        let mut square = [simd.splat(0.0); 16];
        let square = &mut square[..S::LANES];
        for (vector, row) in square.iter_mut().zip(rows.chunks_exact(width)) {
            // SAFETY: the width is a multiple of a vector.
            *vector = unsafe { simd.load(row[at * S::LANES..].as_ptr()) };
        }
        simd.transpose(square);
        for (vector, out) in square.iter().zip(out.chunks_exact_mut(S::LANES)) {
            // SAFETY: a chunk is a vector.
            unsafe { simd.store(out.as_mut_ptr(), *vector) };
        }
    }
}
