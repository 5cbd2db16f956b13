//! `y = x @ W^T + bias` and its gradient to `x`: checks, dtypes, and calls of the kernel that [`super::path`] chooses.

use std::ops::Range;

use super::activations::Activations;
use super::dot::Arithmetic;
use super::int8_rows::{Codes, Int8Rows};
use super::isa::{Isa, Kernel, dispatch};
use super::panel::{self, Direction, Source};
use super::path::{self, ActivationFormat, Path};
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::x86::amx;
use super::{decode, parallel};
use crate::dtype::{Element, Floats, FloatsMut, with_floats};
use crate::storage::PackedWeight;
use crate::{Error, Result};

/// Tokens that are multiplied at once; bounds the copy of the activations.
pub(super) const TOKENS_AT_ONCE: usize = 512;

/// What kernels hand their results to: `finish(tokens, outputs, strip, stride)` gets ranges of tokens and outputs and rows
/// of their values, one a token and `stride` apart. Strips come in any order and from any thread.
pub(super) type Finish<'a> = dyn Fn(Range<usize>, Range<usize>, &[f32], usize) + Sync + 'a;

/// `out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]`, summed in fp32 and rounded once to the dtype of `out`,
/// `[tokens, rows]`. `format` says what activations may be rounded to before.
pub fn linear(
    weight: &PackedWeight<'_>,
    x: Activations<'_>,
    format: ActivationFormat,
    bias: Option<Floats<'_>>,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    let rows = weight.layout().rows;
    if let Some(bias) = bias.filter(|bias| bias.len() != rows) {
        return Err(Error::invalid("bias", format!("{} elements", bias.len()), format!("{rows} elements")));
    }
    let bias: Option<Vec<f32>> = bias.map(|bias| (0..rows).map(|row| bias.get(row)).collect());
    let call = Call { isa: Isa::current()?, weight, direction: Direction::Forward, format, threads };
    call.check_and_run("x", x, bias.as_deref(), out)
}

/// `out[m, k] = sum_n grad[m, n] * w[n, k]`, summed in fp32 and rounded once to the dtype of `out`, `[tokens, cols]`.
pub fn linear_grad_input(
    weight: &PackedWeight<'_>,
    grad: Activations<'_>,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    let format = ActivationFormat::None;
    let call = Call { isa: Isa::current()?, weight, direction: Direction::Gradient, format, threads };
    call.check_and_run("grad", grad, None, out)
}

/// What all tokens of a call have in common.
struct Call<'a> {
    isa: Isa,
    weight: &'a PackedWeight<'a>,
    direction: Direction,
    format: ActivationFormat,
    threads: usize,
}

impl Call<'_> {
    fn check_and_run(
        &self,
        argument: &'static str,
        x: Activations<'_>,
        bias: Option<&[f32]>,
        out: FloatsMut<'_>,
    ) -> Result<()> {
        let (outputs, terms) = self.direction.outputs_and_terms(self.weight);
        x.check(argument, terms)?;
        if out.len() != x.tokens * outputs {
            let expected = format!("{} rows of {outputs}", x.tokens);
            return Err(Error::invalid("out", format!("{} elements", out.len()), expected));
        }
        with_floats!(out, FloatsMut, out => {
            let out = Out { base: out.as_mut_ptr(), len: out.len(), row: outputs, bias };
            if terms == 0 {
                out.write(self.isa, 0..x.tokens, 0..outputs, &vec![0.0; outputs * x.tokens], outputs);
            } else if outputs > 0 {
                match self.round(&x, terms) {
                    Some(rounded) => self.run_rounded(&x, &rounded, &out),
                    None => self.run_exact(&x, &out),
                }
            }
        });
        Ok(())
    }

    /// Activations in int8 with a scale for each row, where the kernel that is chosen for them takes these. Most of them
    /// have to be integers for that: with outliers in more than a quarter of the columns they stay what they are.
    fn round(&self, x: &Activations<'_>, terms: usize) -> Option<Int8Rows> {
        let tokens = x.tokens.min(TOKENS_AT_ONCE);
        if tokens == 0 || !self.weight.is_int8_by_rows() || !self.path(self.format, x, tokens).is_int8() {
            return None;
        }
        let rounded = Int8Rows::round(self.isa, x, terms, self.format.threshold(), self.threads);
        (4 * rounded.outlier_columns() <= terms).then_some(rounded)
    }

    fn path(&self, format: ActivationFormat, x: &Activations<'_>, tokens: usize) -> Path {
        path::choose(self.isa, self.weight, self.direction, format, (tokens, x.values.dtype()))
    }

    /// Multiplies `x` as it is, or rounded by blocks.
    fn run_exact<T: Element>(&self, x: &Activations<'_>, out: &Out<'_, T>) {
        let format = if self.weight.is_int8_by_rows() { ActivationFormat::None } else { self.format };
        for tokens in parallel::ranges(x.tokens, TOKENS_AT_ONCE) {
            let (rows, first) = (x.rows(tokens.clone()), tokens.start);
            match self.path(format, x, tokens.len()) {
                Path::Decode(arithmetic) => self.decode(arithmetic, &rows, first, out),
                Path::Panel(numbers) => self.panel(numbers, Source::exact(&rows), &out.after(self.isa, first)),
                #[cfg(target_arch = "x86_64")]
                Path::Tiles(numbers) => {
                    let product = amx::Product::new(self.weight, self.direction, numbers, &rows, None, self.threads);
                    product.run(self.threads, &out.after(self.isa, first));
                }
            }
        }
    }

    fn decode<T: Element>(&self, arithmetic: Arithmetic, x: &Activations<'_>, first: usize, out: &Out<'_, T>) {
        for tokens in parallel::ranges(x.tokens, decode::most_tokens(self.isa)) {
            let (rows, first) = (x.rows(tokens.clone()), first + tokens.start);
            match decode::Product::new(self.isa, arithmetic, self.weight, &rows, None) {
                Some(product) => product.run(self.threads, &out.after(self.isa, first)),
                // There are no integers for NaN and infinities; other tokens do not notice.
                None if rows.tokens == 1 => {
                    self.panel(panel::Numbers::Fp32, Source::exact(&rows), &out.after(self.isa, first));
                }
                None => (0..rows.tokens).for_each(|i| self.decode(arithmetic, &rows.rows(i..i + 1), first + i, out)),
            }
        }
    }

    /// Multiplies the integers that `x` was rounded to, and adds what its columns of outliers make.
    fn run_rounded<T: Element>(&self, x: &Activations<'_>, rounded: &Int8Rows, out: &Out<'_, T>) {
        let correction = rounded.correction(self.isa, self.weight, self.threads);
        for tokens in parallel::ranges(x.tokens, TOKENS_AT_ONCE) {
            let first = tokens.start;
            let store = out.after(self.isa, first);
            let finish = |tokens: Range<usize>, outputs: Range<usize>, strip: &[f32], stride: usize| match &correction {
                Some(correction) => correction.add(first, &store, (tokens, outputs), strip, stride),
                None => store(tokens, outputs, strip, stride),
            };
            self.multiply_codes(&x.rows(tokens.clone()), rounded.codes(tokens), &finish);
        }
    }

    fn multiply_codes(&self, x: &Activations<'_>, codes: Codes<'_>, finish: &Finish<'_>) {
        let path = self.path(self.format, x, x.tokens);
        if let Path::Panel(numbers @ panel::Numbers::Int8) = path {
            self.panel(numbers, Source { x, rounded: Some(codes) }, finish);
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if let Path::Tiles(amx::Numbers::Int8) = path {
            let numbers = amx::Numbers::Int8;
            let product = amx::Product::new(self.weight, self.direction, numbers, x, Some(codes), self.threads);
            product.run(self.threads, finish);
            return;
        }
        for tokens in parallel::ranges(x.tokens, decode::most_tokens(self.isa)) {
            let (rows, codes, first) = (x.rows(tokens.clone()), codes.rows(tokens.clone()), tokens.start);
            let product = decode::Product::new(self.isa, Arithmetic::Int8, self.weight, &rows, Some(codes))
                .expect("rows that are rounded have integers");
            product.run(self.threads, &|tokens, outputs, strip, stride| {
                finish(first + tokens.start..first + tokens.end, outputs, strip, stride);
            });
        }
    }

    fn panel(&self, numbers: panel::Numbers, source: Source<'_>, finish: &Finish<'_>) {
        let product = panel::Product::new(self.isa, numbers, self.weight, self.direction, source, self.threads);
        product.run(self.threads, finish);
    }
}

/// The output matrix, written in disjoint ranges by several threads.
struct Out<'a, T> {
    base: *mut T,
    len: usize,
    row: usize,
    bias: Option<&'a [f32]>,
}

// SAFETY: threads write disjoint parts, see `Out::write`.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<T: Element> Out<'_, T> {
    /// Where the results of a kernel go whose first token is token `first` of the matrix.
    fn after(&self, isa: Isa, first: usize) -> impl Fn(Range<usize>, Range<usize>, &[f32], usize) + Sync {
        move |tokens, outputs, strip, stride| {
            self.write(isa, first + tokens.start..first + tokens.end, outputs, strip, stride);
        }
    }

    /// Adds the bias to the `outputs` of every token, rows of `strip` that are `stride` apart, rounds and stores them. No
    /// other thread may be given one of these places.
    fn write(&self, isa: Isa, tokens: Range<usize>, outputs: Range<usize>, strip: &[f32], stride: usize) {
        assert!(outputs.end <= self.row && tokens.end * self.row <= self.len);
        for (token, values) in tokens.zip(strip.chunks(stride.max(1))) {
            let values = &values[..outputs.len()];
            let bias = self.bias.map(|bias| &bias[outputs.clone()]);
            // SAFETY: within the matrix as asserted, and no other thread has a part of this range.
            let to = unsafe {
                std::slice::from_raw_parts_mut(self.base.add(token * self.row + outputs.start), outputs.len())
            };
            dispatch(isa, Store { values, bias, to });
        }
    }
}

/// Stores `values + bias`.
struct Store<'a, T> {
    values: &'a [f32],
    bias: Option<&'a [f32]>,
    to: &'a mut [T],
}

impl<T: Element> Kernel for Store<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { values, bias, to } = self;
        let whole = to.len() - to.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES` is within all three slices.
            unsafe {
                let sum = simd.load(values[at..].as_ptr());
                let sum = bias.map_or(sum, |bias| simd.add(sum, simd.load(bias[at..].as_ptr())));
                simd.store(to[at..].as_mut_ptr(), sum);
            }
        }
        for at in whole..to.len() {
            to[at] = T::from_f32(values[at] + bias.map_or(0.0, |bias| bias[at]));
        }
    }
}
