//! The product for many tokens: a panel of the weight is decoded once and used for all of them.
//!
//! Both directions are one product, `y[m, o] = sum_r x[m, r] * panel[r][o]`. Forward, `r` runs along the columns of
//! the weight and `o` along its rows; for the gradient to the input it is the other way round. Only the filling of a
//! panel differs.

mod fill;
mod numbers;
mod pack;

use std::ops::Range;

use fill::Filler;
pub(super) use numbers::{Numbers, Source, Terms};
use numbers::{TermsKernel, dispatch_terms};
use pack::{Packed, tiles};

use super::codes::with_codes;
use super::isa::{Isa, Kernel, dispatch};
use super::linear::Finish;
use super::parallel;
use super::simd::Simd;
use crate::storage::PackedWeight;

/// Most vectors of outputs in a register tile.
const MAX_VECTORS: usize = 3;

/// Vectors of outputs in a register tile: with 8 tokens it fills 24 of 32 registers, with 4 tokens 8 of 16. With twelve of them
/// the compiler keeps one in memory, at twice the time.
const fn vectors<S: Simd>() -> usize {
    if S::TILE_TOKENS >= 8 { MAX_VECTORS } else { 2 }
}

/// Terms of the sum that are decoded at once: a panel of 48 outputs takes 96 KiB in fp32, a tile of 8 tokens 16 KiB. A
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

/// One product: rows of activations with any weight.
pub(super) struct Product<'a> {
    weight: &'a PackedWeight<'a>,
    direction: Direction,
    isa: Isa,
    numbers: Numbers,
    x: Packed,
    /// What sums are multiplied with where both factors are codes: of each token and of each output.
    scales: Option<[Vec<f32>; 2]>,
}

impl<'a> Product<'a> {
    /// The product of `weight` and activations that have `numbers`.
    pub(super) fn new(
        isa: Isa,
        numbers: Numbers,
        weight: &'a PackedWeight<'a>,
        direction: Direction,
        source: Source<'_>,
        threads: usize,
    ) -> Self {
        let (outputs, terms) = direction.outputs_and_terms(weight);
        let scales = source.rounded.map(|rounded| {
            let of_outputs = (0..outputs).map(|row| weight.scale(row)).collect();
            [rounded.scales().to_vec(), of_outputs]
        });
        let x = Packed::new(isa, numbers, source, terms, threads);
        Self { weight, direction, isa, numbers, x, scales }
    }

    /// Computes the product and hands it over, all tokens at once.
    pub(super) fn run(&self, threads: usize, finish: &Finish<'_>) {
        let width = dispatch(self.isa, PanelWidth);
        let (outputs, terms) = self.direction.outputs_and_terms(self.weight);
        let products = terms * outputs * self.x.tokens;
        let threads = threads.min(1 + products / PRODUCTS_PER_THREAD);
        let panels = panels_at_once(outputs.div_ceil(width), threads);
        parallel::for_each(threads, parallel::ranges(outputs, panels * width), |range| {
            let stride = range.len().next_multiple_of(width);
            let mut sums = vec![0.0; self.x.tokens * stride];
            let strip = Strip { product: self, outputs: range.clone(), sums: &mut sums, stride };
            dispatch_terms(self.isa, self.numbers, strip);
            if let Some([of_tokens, of_outputs]) = &self.scales {
                for (sums, x_scale) in sums.chunks_exact_mut(stride).zip(of_tokens) {
                    for (sum, scale) in sums.iter_mut().zip(&of_outputs[range.clone()]) {
                        *sum *= x_scale * scale;
                    }
                }
            }
            finish(0..self.x.tokens, range, &sums, stride);
        });
    }
}

/// Panels that a thread takes at a time: so many that tiles of activations serve well, so few that every thread gets some
/// four parts and the last ones do not wait for each other.
fn panels_at_once(panels: usize, threads: usize) -> usize {
    let most = (panels / (4 * threads.max(1))).clamp(1, MAX_PANELS);
    // Time until the last thread is done; a part of it, for each time that activations are loaded.
    let time = |at_once: usize| panels.div_ceil(at_once).div_ceil(threads.max(1)) * (32 * at_once + 1);
    (1..=most).min_by_key(|&at_once| time(at_once)).unwrap_or(1)
}

/// Outputs in one panel.
struct PanelWidth;

impl Kernel for PanelWidth {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> usize {
        vectors::<S>() * S::LANES
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

impl TermsKernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd, T: Terms<S>>(mut self, simd: S, numbers: T) {
        let Product { weight, direction, .. } = *self.product;
        let width = vectors::<S>() * S::LANES;
        let (_, terms) = direction.outputs_and_terms(weight);
        let mut panels = vec![0.0; TERMS / T::PACK * self.stride];
        let mut excess = vec![0.0; self.stride];
        let mut filler = Filler::new(weight, simd, numbers, self.outputs.len());
        for range in parallel::ranges(terms, TERMS) {
            let starts = (self.outputs.start..self.outputs.end).step_by(width);
            let panels_of = panels.chunks_exact_mut(TERMS / T::PACK * width).zip(excess.chunks_exact_mut(width));
            for (first, (panel, excess)) in starts.zip(panels_of) {
                with_codes!(simd, weight, codes => filler.fill(codes, direction, &range, first, panel, excess));
            }
            self.multiply(simd, numbers, (&panels, &excess), &range);
        }
    }
}

impl Strip<'_> {
    /// Adds the product of a range of terms to the sums, tile by tile.
    #[inline(always)]
    fn multiply<S: Simd, T: Terms<S>>(
        &mut self,
        simd: S,
        numbers: T,
        (panels, excess): (&[f32], &[f32]),
        terms: &Range<usize>,
    ) {
        let width = vectors::<S>() * S::LANES;
        let lanes = terms.start / T::PACK..terms.end.div_ceil(T::PACK);
        for tokens in tiles(self.product.x.tokens, S::TILE_TOKENS) {
            let x = self.product.x.tile(&tokens, &lanes);
            for (index, panel) in panels.chunks_exact(TERMS / T::PACK * width).enumerate() {
                let sums = &mut self.sums[tokens.start * self.stride + index * width..];
                let (panel, excess) = (&panel[..lanes.len() * width], &excess[index * width..][..width]);
                let tile = Tile { x, panel, excess, sums, stride: self.stride };
                match tokens.len() {
                    8 => tile.run::<S, T, 8>(simd, numbers),
                    4 => tile.run::<S, T, 4>(simd, numbers),
                    2 => tile.run::<S, T, 2>(simd, numbers),
                    _ => tile.run::<S, T, 1>(simd, numbers),
                }
            }
        }
    }
}

/// `TOKENS` tokens times one panel, accumulated in registers.
struct Tile<'a> {
    /// `[lanes][TOKENS]`, fp32 by their bits.
    x: &'a [u32],
    /// `[lanes][vectors * LANES]`.
    panel: &'a [f32],
    /// `[vectors * LANES]`.
    excess: &'a [f32],
    sums: &'a mut [f32],
    stride: usize,
}

impl Tile<'_> {
    #[inline(always)]
    fn run<S: Simd, T: Terms<S>, const TOKENS: usize>(self, simd: S, numbers: T) {
        let width = vectors::<S>() * S::LANES;
        let lanes = self.panel.len() / width;
        assert!(self.excess.len() >= width);
        assert!(self.x.len() >= lanes * TOKENS && self.sums.len() >= (TOKENS - 1) * self.stride + width);
        let (x, panel, sums) = (self.x.as_ptr(), self.panel.as_ptr(), self.sums.as_mut_ptr());
        let mut tile = [[simd.splat(0.0); MAX_VECTORS]; TOKENS];
        for lane in 0..lanes {
            // SAFETY: within the bounds asserted above.
            unsafe {
                let mut weights = [simd.splat(0.0); MAX_VECTORS];
                for (v, w) in weights.iter_mut().enumerate().take(vectors::<S>()) {
                    *w = simd.load(panel.add(lane * width + v * S::LANES));
                }
                for (token, tile) in tile.iter_mut().enumerate() {
                    let x = simd.splat(f32::from_bits(*x.add(lane * TOKENS + token)));
                    for (sum, w) in tile.iter_mut().zip(weights).take(vectors::<S>()) {
                        *sum = numbers.multiply_add(simd, x, w, *sum);
                    }
                }
            }
        }
        for (token, tile) in tile.into_iter().enumerate() {
            for (v, sum) in tile.into_iter().enumerate().take(vectors::<S>()) {
                // SAFETY: within the bounds asserted above.
                unsafe {
                    let to = sums.add(token * self.stride + v * S::LANES);
                    let excess = simd.load(self.excess.as_ptr().add(v * S::LANES));
                    simd.store(to, simd.add(simd.load(to), numbers.to_f32(simd, sum, excess)));
                }
            }
        }
    }
}
