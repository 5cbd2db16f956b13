//! Activations in int8 with a scale for each row, and columns of outliers beside them: what `LLM.int8()` multiplies
//! (Dettmers et al., arXiv 2208.07339).
//!
//! A number is an outlier unless its magnitude is below the threshold, and a column is one of outliers if any of its
//! numbers is: those columns are zero in the integers and multiplied in fp32. NaN and infinities are outliers at any
//! threshold. Scales are those of bitsandbytes: the largest magnitude of the row's numbers that are none, over 127.

use std::ops::Range;

use super::activations::{Activations, magnitude_bits, round};
use super::isa::{Isa, Kernel, dispatch};
use super::linear::Finish;
use super::parallel;
use super::simd::Simd;
use crate::storage::PackedWeight;

/// Numbers for which another thread is worth waking.
const NUMBERS_PER_THREAD: usize = 1 << 15;

/// The largest number of an int8: -128 is not used.
const LARGEST: f32 = 127.0;

/// Rows of activations, rounded.
pub(super) struct Int8Rows {
    width: usize,
    /// `[tokens][width]`, zero in columns of outliers.
    codes: Vec<i8>,
    /// One for each row.
    scales: Vec<f32>,
    /// Columns of outliers, ascending.
    columns: Vec<usize>,
    /// `[tokens][columns]`: the numbers of those columns.
    outliers: Vec<f32>,
}

/// Some rows of [`Int8Rows`], without their outliers.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    width: usize,
    numbers: &'a [i8],
    scales: &'a [f32],
}

impl<'a> Codes<'a> {
    /// The numbers of a row.
    pub(super) fn row(&self, token: usize) -> &'a [i8] {
        &self.numbers[token * self.width..][..self.width]
    }

    /// The scale of every row.
    pub(super) fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// The rows `tokens` of these.
    pub(super) fn rows(&self, tokens: Range<usize>) -> Self {
        let numbers = &self.numbers[tokens.start * self.width..tokens.end * self.width];
        Self { width: self.width, numbers, scales: &self.scales[tokens] }
    }
}

impl Int8Rows {
    /// Rounds the rows of `x`, `width` long. Without a threshold it is infinite.
    pub(super) fn round(isa: Isa, x: &Activations<'_>, width: usize, threshold: f32, threads: usize) -> Self {
        let mut codes = vec![0; x.tokens * width];
        let mut scales = vec![0.0; x.tokens];
        let threads = threads.min(1 + codes.len() / NUMBERS_PER_THREAD);
        let step = x.tokens.div_ceil(4 * threads).max(1);
        let ranges = parallel::ranges(x.tokens, step);
        let mut found: Vec<Vec<usize>> = vec![Vec::new(); ranges.len()];
        let parts = ranges.into_iter().zip(codes.chunks_mut((step * width).max(1))).zip(scales.chunks_mut(step));
        let parts = parts.zip(&mut found).collect();
        parallel::for_each(threads, parts, |(((tokens, codes), scales), found)| {
            *found = dispatch(isa, Round { x, tokens, width, threshold, codes, scales });
        });
        let mut columns: Vec<usize> = found.into_iter().flatten().collect();
        columns.sort_unstable();
        columns.dedup();
        let mut rows = Self { width, codes, scales, columns, outliers: Vec::new() };
        rows.take_out_columns(x);
        rows
    }

    /// Moves the columns of outliers out of the integers.
    fn take_out_columns(&mut self, x: &Activations<'_>) {
        if self.columns.is_empty() {
            return;
        }
        self.outliers.reserve(x.tokens * self.columns.len());
        for (token, codes) in self.codes.chunks_exact_mut(self.width).enumerate() {
            for &column in &self.columns {
                codes[column] = 0;
                self.outliers.push(x.values.get(token * x.stride + column));
            }
        }
    }

    /// How many columns have outliers.
    pub(super) fn outlier_columns(&self) -> usize {
        self.columns.len()
    }

    /// The integers of some rows.
    pub(super) fn codes(&self, tokens: Range<usize>) -> Codes<'_> {
        Codes { width: self.width, numbers: &self.codes, scales: &self.scales }.rows(tokens)
    }

    /// What the columns of outliers add to a product with `weight`; none where there are none.
    pub(super) fn correction(&self, isa: Isa, weight: &PackedWeight<'_>, threads: usize) -> Option<Correction<'_>> {
        let rows = weight.layout().rows;
        (!self.columns.is_empty()).then(|| {
            let mut weights = vec![0.0; self.columns.len() * rows];
            let parts = self.columns.iter().zip(weights.chunks_exact_mut(rows)).collect();
            parallel::for_each(threads, parts, |(&column, weights): (&usize, &mut [f32])| {
                for (row, to) in weights.iter_mut().enumerate() {
                    *to = f32::from(weight.codes()[row * self.width + column].cast_signed()) * weight.scale(row);
                }
            });
            Correction { isa, outliers: &self.outliers, weights, columns: self.columns.len(), rows }
        })
    }
}

/// Rounds some rows and tells which columns have outliers, in any order.
struct Round<'a> {
    x: &'a Activations<'a>,
    tokens: Range<usize>,
    width: usize,
    threshold: f32,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
}

impl Kernel for Round<'_> {
    type Output = Vec<usize>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<usize> {
        let Self { x, tokens, width, threshold, codes, scales } = self;
        let limit = threshold.to_bits();
        let mut row = vec![0.0; width];
        let mut is_found = vec![false; width];
        let mut found = Vec::new();
        for ((token, codes), scale) in tokens.zip(codes.chunks_exact_mut(width)).zip(scales) {
            x.read(simd, token, 0, &mut row);
            let (absmax, has_outliers) = largest_below(&row, limit);
            let inverse = LARGEST / absmax;
            if inverse.is_finite() {
                *scale = absmax / LARGEST;
                for (code, &x) in codes.iter_mut().zip(&row) {
                    // What is beyond int8 is an outlier, whose column will be zero.
                    *code = round(x * inverse) as i8;
                }
            }
            if has_outliers {
                let is_outlier = |&column: &usize| magnitude_bits(row[column]) >= limit;
                for column in (0..width).filter(is_outlier) {
                    if !std::mem::replace(&mut is_found[column], true) {
                        found.push(column);
                    }
                }
            }
        }
        found
    }
}

/// The largest magnitude of those whose bits are below `limit`, and whether there are others.
#[inline(always)]
fn largest_below(row: &[f32], limit: u32) -> (f32, bool) {
    let (mut most, mut beyond) = (0, false);
    for &x in row {
        let bits = magnitude_bits(x);
        let is_below = bits < limit;
        most = most.max(if is_below { bits } else { 0 });
        beyond |= !is_below;
    }
    (f32::from_bits(most), beyond)
}

/// The products of columns of outliers, in fp32.
pub(super) struct Correction<'a> {
    isa: Isa,
    /// `[tokens][columns]`.
    outliers: &'a [f32],
    /// `[columns][rows]`: the weights that they meet.
    weights: Vec<f32>,
    columns: usize,
    rows: usize,
}

impl Correction<'_> {
    /// Adds them to sums on their way to `finish`, whose first token is token `first` here.
    pub(super) fn add(
        &self,
        first: usize,
        finish: &Finish<'_>,
        (tokens, outputs): (Range<usize>, Range<usize>),
        strip: &[f32],
        stride: usize,
    ) {
        let mut sums = strip.to_vec();
        for (token, sums) in tokens.clone().zip(sums.chunks_mut(stride.max(1))) {
            let outliers = &self.outliers[(first + token) * self.columns..][..self.columns];
            let sums = &mut sums[..outputs.len()];
            dispatch(self.isa, Add { outliers, weights: &self.weights[outputs.start..], rows: self.rows, sums });
        }
        finish(tokens, outputs, &sums, stride);
    }
}

struct Add<'a> {
    outliers: &'a [f32],
    /// From the first output on.
    weights: &'a [f32],
    rows: usize,
    sums: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { outliers, weights, rows, sums } = self;
        let whole = sums.len() - sums.len() % S::LANES;
        for (column, &x) in outliers.iter().enumerate() {
            let weights = &weights[column * rows..][..sums.len()];
            let factor = simd.splat(x);
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: `at + LANES` is within both slices.
                unsafe {
                    let sum = simd.load(sums[at..].as_ptr());
                    let sum = simd.fma(simd.load(weights[at..].as_ptr()), factor, sum);
                    simd.store(sums[at..].as_mut_ptr(), sum);
                }
            }
            for (sum, &weight) in sums[whole..].iter_mut().zip(&weights[whole..]) {
                *sum = weight.mul_add(x, *sum);
            }
        }
    }
}
