//! The product for many tokens: a panel of the weight is decoded to fp32 once and used for all of them.
//!
//! Both directions are one product, `y[m, o] = sum_r x[m, r] * panel[r][o]`. Forward, `r` runs along the columns of
//! the weight and `o` along its rows; for the gradient to the input it is the other way round. Only the filling of a
//! panel differs.

use std::ops::Range;

use super::codes::{Codes, load_words, with_codes};
use super::dequantize::{BlockScales, decode_row};
use super::isa::{Isa, Kernel, dispatch};
use super::linear::Finish;
use super::parallel;
use super::scales::{read_scales, read_shifts};
use super::simd::Simd;
use crate::storage::PackedWeight;

/// Vectors of outputs in a register tile: with 8 tokens it fills 24 of 32 registers, with 4 tokens 12 of 16.
const VECTORS: usize = 3;
/// Terms of the sum that are decoded at once: a panel of 48 outputs takes 96 KiB, a tile of 8 tokens 16 KiB. A
/// multiple of every ISA's group of words.
const TERMS: usize = 512;
/// Panels side by side that a thread works on, so that a tile of activations is loaded once for them.
const MAX_PANELS: usize = 4;

/// Products for which another thread is worth waking: about 50 microseconds of one thread.
const PRODUCTS_PER_THREAD: usize = 4 << 20;

/// Which way the weight is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// `x @ W^T`.
    Forward,
    /// `grad @ W`.
    Gradient,
}

impl Direction {
    /// Numbers of the result for a token, and terms of the sum that each of them is.
    pub(super) fn outputs_and_terms(self, weight: &PackedWeight<'_>) -> (usize, usize) {
        let layout = weight.layout();
        match self {
            Self::Forward => (layout.rows, layout.cols),
            Self::Gradient => (layout.cols, layout.rows),
        }
    }
}

/// One product: `tokens` rows of `x` with any weight, into `y`, both fp32.
pub(super) struct Product<'a> {
    pub(super) weight: &'a PackedWeight<'a>,
    pub(super) direction: Direction,
    /// `[tokens, terms]`, rows `x_stride` apart.
    pub(super) x: &'a [f32],
    pub(super) x_stride: usize,
    pub(super) tokens: usize,
}

impl Product<'_> {
    /// Computes the product and hands it over, all tokens at once.
    pub(super) fn run(&self, isa: Isa, threads: usize, finish: &Finish<'_>) {
        let width = dispatch(isa, PanelWidth);
        let (outputs, terms) = self.direction.outputs_and_terms(self.weight);
        let products = terms * outputs * self.tokens;
        let threads = threads.min(1 + products / PRODUCTS_PER_THREAD);
        let panels = (outputs.div_ceil(width) / (4 * threads.max(1))).clamp(1, MAX_PANELS);
        parallel::for_each(threads, parallel::ranges(outputs, panels * width), |range| {
            let stride = range.len().next_multiple_of(width);
            let mut sums = vec![0.0; self.tokens * stride];
            dispatch(isa, Strip { product: self, outputs: range.clone(), sums: &mut sums, stride });
            finish(0..self.tokens, range, &sums, stride);
        });
    }
}

/// Outputs in one panel.
struct PanelWidth;

impl Kernel for PanelWidth {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> usize {
        VECTORS * S::LANES
    }
}

/// A range of outputs for all tokens.
struct Strip<'a> {
    product: &'a Product<'a>,
    outputs: Range<usize>,
    /// `[tokens][stride]`, zeros at first.
    sums: &'a mut [f32],
    stride: usize,
}

impl Kernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_codes!(simd, self.product.weight, codes => self.compute(simd, codes));
    }
}

impl Strip<'_> {
    #[inline(always)]
    fn compute<S: Simd, C: Codes<S>>(mut self, simd: S, codes: C) {
        let width = VECTORS * S::LANES;
        let (_, terms) = self.product.direction.outputs_and_terms(self.product.weight);
        let mut panels = vec![0.0; TERMS * self.stride];
        let mut filler = Filler { weight: self.product.weight, scratch: Scratch::default() };
        for range in parallel::ranges(terms, TERMS) {
            let starts = (self.outputs.start..self.outputs.end).step_by(width);
            for (first, panel) in starts.zip(panels.chunks_exact_mut(TERMS * width)) {
                match self.product.direction {
                    Direction::Forward => filler.fill_forward(simd, codes, range.clone(), first, panel),
                    Direction::Gradient => filler.fill_gradient(simd, codes, range.clone(), first, panel),
                }
            }
            self.multiply(simd, &panels, &range);
        }
    }
}

impl Strip<'_> {
    /// Adds the product of a range of terms to the sums, tile by tile.
    #[inline(always)]
    fn multiply<S: Simd>(&mut self, simd: S, panels: &[f32], terms: &Range<usize>) {
        let Product { x, x_stride, tokens, .. } = *self.product;
        let width = VECTORS * S::LANES;
        let mut token = 0;
        while token < tokens {
            let left = tokens - token;
            let step = match left {
                8.. if S::TILE_TOKENS >= 8 => 8,
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
            for (index, panel) in panels.chunks_exact(TERMS * width).enumerate() {
                let tile = Tile {
                    x: &x[token * x_stride + terms.start..(token + step - 1) * x_stride + terms.end],
                    x_stride,
                    terms: terms.len(),
                    panel,
                    sums: &mut self.sums[token * self.stride + index * width..],
                    stride: self.stride,
                };
                match step {
                    8 => tile.run::<S, 8>(simd),
                    4 => tile.run::<S, 4>(simd),
                    2 => tile.run::<S, 2>(simd),
                    _ => tile.run::<S, 1>(simd),
                }
            }
            token += step;
        }
    }
}

/// `TOKENS` tokens times one panel, accumulated in registers.
struct Tile<'a> {
    x: &'a [f32],
    x_stride: usize,
    terms: usize,
    panel: &'a [f32],
    sums: &'a mut [f32],
    stride: usize,
}

impl Tile<'_> {
    #[inline(always)]
    fn run<S: Simd, const TOKENS: usize>(self, simd: S) {
        let width = VECTORS * S::LANES;
        assert!(self.x.len() >= (TOKENS - 1) * self.x_stride + self.terms);
        assert!(self.panel.len() >= self.terms * width);
        assert!(self.sums.len() >= (TOKENS - 1) * self.stride + width);
        let (x, panel, sums) = (self.x.as_ptr(), self.panel.as_ptr(), self.sums.as_mut_ptr());
        let mut tile = [[simd.splat(0.0); VECTORS]; TOKENS];
        for term in 0..self.terms {
            // SAFETY: within the bounds asserted above.
            unsafe {
                let w: [S::Vector; VECTORS] =
                    std::array::from_fn(|v| simd.load(panel.add(term * width + v * S::LANES)));
                for (token, tile) in tile.iter_mut().enumerate() {
                    let x = simd.splat(*x.add(token * self.x_stride + term));
                    for (sum, w) in tile.iter_mut().zip(w) {
                        *sum = simd.fma(x, w, *sum);
                    }
                }
            }
        }
        for (token, tile) in tile.into_iter().enumerate() {
            for (v, sum) in tile.into_iter().enumerate() {
                // SAFETY: within the bounds asserted above.
                unsafe {
                    let to = sums.add(token * self.stride + v * S::LANES);
                    simd.store(to, simd.add(simd.load(to), sum));
                }
            }
        }
    }
}

/// Decodes parts of the weight into panels, `[terms][VECTORS * LANES]`.
struct Filler<'a> {
    weight: &'a PackedWeight<'a>,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    blocks: BlockScales,
    row: Vec<f32>,
    /// `[blocks][LANES]` for the rows of a vector.
    scales: Vec<f32>,
    shifts: Vec<f32>,
    one_row: Vec<f32>,
}

impl Filler<'_> {
    /// Terms are columns, outputs are the rows from `first` on; rows behind the last repeat it.
    #[inline(always)]
    fn fill_forward<S: Simd, C: Codes<S>>(
        &mut self,
        simd: S,
        codes: C,
        terms: Range<usize>,
        first: usize,
        panel: &mut [f32],
    ) {
        let layout = self.weight.layout();
        for vector in 0..VECTORS {
            let first = first + vector * S::LANES;
            let row = |lane: usize| (first + lane).min(layout.rows - 1);
            if !layout.straddles_rows {
                self.fill_rows(simd, codes, &terms, row, vector, panel);
                continue;
            }
            self.scratch.row.resize(terms.len(), 0.0);
            for lane in 0..S::LANES {
                let (blocks, out) = (&mut self.scratch.blocks, &mut self.scratch.row[..]);
                decode_row(simd, codes, self.weight, row(lane), terms.clone(), blocks, out);
                for (value, panel) in out.iter().zip(panel.chunks_exact_mut(VECTORS * S::LANES)) {
                    panel[vector * S::LANES + lane] = *value;
                }
            }
        }
    }

    /// `LANES` rows become one vector of a row-aligned weight's panel: words of codes are transposed, so that a lane
    /// is a row, and decoded element by element.
    #[inline(always)]
    fn fill_rows<S: Simd, C: Codes<S>>(
        &mut self,
        simd: S,
        codes: C,
        terms: &Range<usize>,
        row: impl Fn(usize) -> usize,
        vector: usize,
        panel: &mut [f32],
    ) {
        let layout = self.weight.layout();
        let (group, width) = (S::LANES * C::PER_WORD, VECTORS * S::LANES);
        let first_block = terms.start / layout.block_size;
        self.read_scales(simd, first_block..(terms.end - 1) / layout.block_size + 1, &row);
        let out = panel.as_mut_ptr();
        for start in (terms.start..terms.end).step_by(group) {
            let mut words = [simd.splat(0.0); 16];
            for (lane, word) in words[..S::LANES].iter_mut().enumerate() {
                let bytes = &self.weight.codes()[row(lane) * layout.row_bytes()..][..layout.row_bytes()];
                let bytes = &bytes[layout.bytes_of(start)..];
                *word = load_words(simd, bytes);
            }
            simd.transpose(&mut words[..S::LANES]);
            for (index, &words) in words[..S::LANES].iter().enumerate() {
                let col = start + index * C::PER_WORD;
                if col >= terms.end {
                    break;
                }
                let block = (col / layout.block_size - first_block) * S::LANES;
                // SAFETY: the scratch has a vector a block, and a panel has room for whole groups of terms.
                unsafe {
                    let scale = simd.load(self.scratch.scales[block..].as_ptr());
                    let shift = simd.load(self.scratch.shifts[block..].as_ptr());
                    for element in 0..C::PER_WORD {
                        let code = codes.decode(simd, words, element);
                        let w = simd.fma(code, scale, shift);
                        let term = col - terms.start + element;
                        debug_assert!(term < TERMS);
                        simd.store(out.add(term * width + vector * S::LANES), w);
                    }
                }
            }
        }
    }

    /// Reads the scales and shifts of `blocks` of `LANES` rows into the scratch, a vector of rows a block.
    #[inline(always)]
    fn read_scales<S: Simd>(&mut self, simd: S, blocks: Range<usize>, row: &impl Fn(usize) -> usize) {
        let lanes = S::LANES;
        let Scratch { scales, shifts, one_row, .. } = &mut self.scratch;
        scales.resize(blocks.len() * lanes, 0.0);
        shifts.resize(blocks.len() * lanes, 0.0);
        one_row.resize(blocks.len(), 0.0);
        for lane in 0..lanes {
            let first = row(lane) * self.weight.layout().blocks_per_row() + blocks.start;
            read_scales(simd, self.weight, first, one_row);
            scales[lane..].iter_mut().step_by(lanes).zip(&*one_row).for_each(|(to, from)| *to = *from);
            if self.weight.has_shift() {
                read_shifts(simd, self.weight, first, one_row);
                shifts[lane..].iter_mut().step_by(lanes).zip(&*one_row).for_each(|(to, from)| *to = *from);
            }
        }
    }

    /// Terms are rows, outputs are the columns from `first` on; columns behind the last keep what was there.
    #[inline(always)]
    fn fill_gradient<S: Simd, C: Codes<S>>(
        &mut self,
        simd: S,
        codes: C,
        terms: Range<usize>,
        first: usize,
        panel: &mut [f32],
    ) {
        let width = VECTORS * S::LANES;
        let cols = first..(first + width).min(self.weight.layout().cols);
        for (row, panel) in terms.zip(panel.chunks_exact_mut(width)) {
            let out = &mut panel[..cols.len()];
            decode_row(simd, codes, self.weight, row, cols.clone(), &mut self.scratch.blocks, out);
        }
    }
}
