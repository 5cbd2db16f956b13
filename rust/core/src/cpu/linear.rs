//! `y = x @ W^T + bias` and its gradient to `x`: checks, dtypes, and the choice between the kernels.

use std::ops::Range;

use super::isa::{Isa, Kernel, dispatch};
use super::panel::{Direction, Product};
use super::scales::widen;
use super::simd::Simd;
use super::{decode, parallel};
use crate::dtype::{Element, Floats, FloatsMut, with_floats};
use crate::storage::PackedWeight;
use crate::{Error, Result};

/// Tokens that are multiplied at once; bounds the fp32 copy of the activations.
const TOKENS_AT_ONCE: usize = 512;

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

impl Activations<'_> {
    fn check(&self, argument: &'static str, width: usize) -> Result<()> {
        let needed = if self.tokens == 0 { 0 } else { (self.tokens - 1) * self.stride + width };
        if self.values.len() < needed {
            let got = format!("{} elements", self.values.len());
            return Err(Error::invalid(argument, got, format!("{} rows of {width}", self.tokens)));
        }
        Ok(())
    }
}

/// `out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]`, summed in fp32 and rounded once to the dtype of `out`,
/// `[tokens, rows]`.
pub fn linear(
    weight: &PackedWeight<'_>,
    x: Activations<'_>,
    bias: Option<Floats<'_>>,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    let rows = weight.layout().rows;
    if let Some(bias) = bias.filter(|bias| bias.len() != rows) {
        return Err(Error::invalid("bias", format!("{} elements", bias.len()), format!("{rows} elements")));
    }
    let bias: Option<Vec<f32>> = bias.map(|bias| (0..rows).map(|row| bias.get(row)).collect());
    multiply(weight, Direction::Forward, x, bias.as_deref(), out, threads)
}

/// `out[m, k] = sum_n grad[m, n] * w[n, k]`, summed in fp32 and rounded once to the dtype of `out`, `[tokens, cols]`.
pub fn linear_grad_input(
    weight: &PackedWeight<'_>,
    grad: Activations<'_>,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    multiply(weight, Direction::Gradient, grad, None, out, threads)
}

fn multiply(
    weight: &PackedWeight<'_>,
    direction: Direction,
    x: Activations<'_>,
    bias: Option<&[f32]>,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    let layout = weight.layout();
    let (argument, terms, outputs) = match direction {
        Direction::Forward => ("x", layout.cols, layout.rows),
        Direction::Gradient => ("grad", layout.rows, layout.cols),
    };
    x.check(argument, terms)?;
    if out.len() != x.tokens * outputs {
        let expected = format!("{} rows of {outputs}", x.tokens);
        return Err(Error::invalid("out", format!("{} elements", out.len()), expected));
    }
    let isa = Isa::current()?;
    with_floats!(out, FloatsMut, out => {
        for tokens in parallel::ranges(x.tokens, TOKENS_AT_ONCE) {
            let out = &mut out[tokens.start * outputs..tokens.end * outputs];
            let x = closely_packed(isa, &x, &tokens, terms, threads);
            let call = Call { isa, weight, direction, x: &x, terms, outputs, bias, threads };
            call.run(tokens.len(), out);
        }
    });
    Ok(())
}

/// One product of fp32 activations, `[tokens, terms]`.
struct Call<'a> {
    isa: Isa,
    weight: &'a PackedWeight<'a>,
    direction: Direction,
    x: &'a [f32],
    terms: usize,
    outputs: usize,
    bias: Option<&'a [f32]>,
    threads: usize,
}

impl Call<'_> {
    fn run<T: Element>(&self, tokens: usize, out: &mut [T]) {
        let Self { isa, weight, x, terms, threads, .. } = *self;
        let out = Out { base: out.as_mut_ptr(), len: out.len(), row: self.outputs, bias: self.bias };
        let is_small = self.direction == Direction::Forward && tokens <= decode::MAX_TOKENS;
        if terms == 0 || self.outputs == 0 {
            out.write(0..self.outputs, tokens, |_, _| 0.0);
        } else if is_small && !weight.layout().straddles_rows {
            let mut y = vec![0.0; tokens * self.outputs];
            decode::linear(isa, weight, x, tokens, &mut y, threads);
            out.write(0..self.outputs, tokens, |token, output| y[output * tokens + token]);
        } else {
            let product = Product { weight, direction: self.direction, x, x_stride: terms, tokens };
            product.run(isa, threads, |outputs, strip, stride| {
                let first = outputs.start;
                out.write(outputs, tokens, |token, output| strip[token * stride + output - first]);
            });
        }
    }
}

/// The output matrix, written in disjoint ranges of columns by several threads.
struct Out<'a, T> {
    base: *mut T,
    len: usize,
    row: usize,
    bias: Option<&'a [f32]>,
}

// SAFETY: threads write disjoint columns, see `Out::write`.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<T: Element> Out<'_, T> {
    /// Rounds `value(token, output)` plus the bias for the `outputs` of every token. No other thread may be given one
    /// of these outputs.
    #[inline]
    fn write(&self, outputs: Range<usize>, tokens: usize, value: impl Fn(usize, usize) -> f32) {
        assert!(outputs.end <= self.row && tokens * self.row <= self.len);
        for token in 0..tokens {
            for output in outputs.clone() {
                let bias = self.bias.map_or(0.0, |bias| bias[output]);
                // SAFETY: within the matrix as asserted, and no other thread writes this output.
                unsafe { self.base.add(token * self.row + output).write(T::from_f32(value(token, output) + bias)) };
            }
        }
    }
}

/// The rows `tokens` of `x` in fp32, closely packed.
fn closely_packed(isa: Isa, x: &Activations<'_>, tokens: &Range<usize>, width: usize, threads: usize) -> Vec<f32> {
    let mut out = vec![0.0; tokens.len() * width];
    if out.is_empty() {
        return out;
    }
    with_floats!(x.values, Floats, values => {
        let at_once = ((1 << 16) / width).max(1);
        let parts = out.chunks_mut(at_once * width).zip((tokens.start..).step_by(at_once)).collect();
        parallel::for_each(threads, parts, |(out, first)| {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                dispatch(isa, Widen { from: &values[(first + row) * x.stride..][..width], to: out });
            }
        });
    });
    out
}

struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Element> Kernel for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        widen(simd, self.from, self.to);
    }
}
