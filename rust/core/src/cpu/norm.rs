//! `RMSNorm` and `LayerNorm` of rows, after the addition of a residual where there is one. Sums are fp32.

use super::activations::Activations;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel;
use super::scales::widen;
use super::simd::Simd;
use crate::dtype::{Element, Floats, FloatsMut, with_floats};
use crate::norm::Norm;
use crate::{Error, Result};

/// Numbers that one thread normalizes before it asks for more.
const NUMBERS_AT_ONCE: usize = 1 << 15;
/// Sums that are under way at a time: more than an addition takes cycles.
const SUMS: usize = 4;

/// A residual, and where its sum with x goes: rows as dense as those of the result.
#[derive(Debug)]
pub struct Residual<'a> {
    /// What is added to x.
    pub rows: Activations<'a>,
    /// `x + residual`, rounded to the dtype. What is normalized are these rounded numbers.
    pub total: FloatsMut<'a>,
}

/// Factor and addend of every column, of any dtype.
#[derive(Debug, Clone, Copy, Default)]
pub struct Affine<'a> {
    /// The factors; one where there are none.
    pub weight: Option<Floats<'a>>,
    /// The addends; zero where there are none.
    pub bias: Option<Floats<'a>>,
}

/// Normalizes `x`, `[tokens, cols]`, into `out`. All rows have one dtype.
pub fn norm(
    norm: Norm,
    cols: usize,
    x: Activations<'_>,
    residual: Option<Residual<'_>>,
    affine: Affine<'_>,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    let isa = Isa::current()?;
    norm.check()?;
    x.check("x", cols)?;
    check_dense("out", &out, &x, cols)?;
    if let Some(Residual { rows, total }) = &residual {
        rows.check("residual", cols)?;
        check_dense("total", total, &x, cols)?;
        if rows.tokens != x.tokens || rows.values.dtype() != x.values.dtype() {
            let got = format!("{} rows of {}", rows.tokens, rows.values.dtype().name());
            let expected = format!("{} rows of {}", x.tokens, x.values.dtype().name());
            return Err(Error::invalid("residual", got, expected));
        }
    }
    let columns = Columns {
        weight: widened(isa, "weight", affine.weight, cols, norm.offset())?,
        bias: widened(isa, "bias", affine.bias, cols, 0.0)?,
    };
    if cols == 0 {
        return Ok(());
    }
    let job = Job { isa, norm, cols, columns: &columns, threads };
    match (x.values, out) {
        (Floats::Float32(values), FloatsMut::Float32(out)) => job.run(values, x.stride, typed(residual), out),
        (Floats::Float16(values), FloatsMut::Float16(out)) => job.run(values, x.stride, typed(residual), out),
        (Floats::Bfloat16(values), FloatsMut::Bfloat16(out)) => job.run(values, x.stride, typed(residual), out),
        _ => unreachable!("check_dense compared the dtypes"),
    }
    Ok(())
}

fn check_dense(argument: &'static str, to: &FloatsMut<'_>, x: &Activations<'_>, cols: usize) -> Result<()> {
    let dtype = x.values.dtype();
    if to.len() == x.tokens * cols && to.dtype() == dtype {
        return Ok(());
    }
    let got = format!("{} elements of {}", to.len(), to.dtype().name());
    Err(Error::invalid(argument, got, format!("{} rows of {cols} in {}", x.tokens, dtype.name())))
}

/// Weight and bias in fp32; the offset is in the weight.
struct Columns {
    weight: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

fn widened(
    isa: Isa,
    argument: &'static str,
    values: Option<Floats<'_>>,
    cols: usize,
    offset: f32,
) -> Result<Option<Vec<f32>>> {
    let Some(values) = values else { return Ok(None) };
    if values.len() != cols {
        return Err(Error::invalid(argument, format!("{} elements", values.len()), format!("{cols} elements")));
    }
    let mut wide = vec![0.0; cols];
    with_floats!(values, Floats, from => dispatch(isa, Widen { from, to: &mut wide }));
    for value in &mut wide {
        *value += offset;
    }
    Ok(Some(wide))
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

/// Rows of a residual, their distance, and the sums' rows.
type TypedResidual<'a, T> = (&'a [T], usize, &'a mut [T]);

/// A dtype's own slices out of those of any.
trait Typed: Element {
    fn of(residual: Residual<'_>) -> TypedResidual<'_, Self>;
}

macro_rules! typed {
    ($($element:ty, $variant:ident);*) => { $(
        impl Typed for $element {
            fn of(residual: Residual<'_>) -> TypedResidual<'_, Self> {
                match (residual.rows.values, residual.total) {
                    (Floats::$variant(rows), FloatsMut::$variant(total)) => (rows, residual.rows.stride, total),
                    _ => unreachable!("norm compared the dtypes"),
                }
            }
        }
    )* };
}
typed!(f32, Float32; half::f16, Float16; half::bf16, Bfloat16);

fn typed<T: Typed>(residual: Option<Residual<'_>>) -> Option<TypedResidual<'_, T>> {
    residual.map(T::of)
}

struct Job<'a> {
    isa: Isa,
    norm: Norm,
    cols: usize,
    columns: &'a Columns,
    threads: usize,
}

impl Job<'_> {
    fn run<T: Element>(&self, x: &[T], stride: usize, residual: Option<TypedResidual<'_, T>>, out: &mut [T]) {
        let Self { norm, cols, columns, .. } = *self;
        let rows_at_once = NUMBERS_AT_ONCE.div_ceil(cols);
        let step = rows_at_once * cols;
        let (addends, totals) = match residual {
            Some((rows, stride, total)) => (Some((rows, stride)), total.chunks_mut(step).map(Some).collect()),
            None => (None, Vec::new()),
        };
        let totals = totals.into_iter().chain(std::iter::repeat_with(|| None));
        let parts = out.chunks_mut(step).zip(totals).enumerate().collect();
        parallel::for_each(self.threads, parts, |(part, (out, total))| {
            let first = part * rows_at_once;
            dispatch(self.isa, Rows { norm, cols, columns, x, stride, addends, first, total, out });
        });
    }
}

/// The rows from `first` on that fill `out`.
struct Rows<'a, T> {
    norm: Norm,
    cols: usize,
    columns: &'a Columns,
    x: &'a [T],
    stride: usize,
    addends: Option<(&'a [T], usize)>,
    first: usize,
    total: Option<&'a mut [T]>,
    out: &'a mut [T],
}

impl<T: Element> Kernel for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { norm, cols, columns, x, stride, addends, first, mut total, out } = self;
        for (i, out) in out.chunks_exact_mut(cols).enumerate() {
            let mut row = &x[(first + i) * stride..][..cols];
            if let (Some((addends, stride)), Some(total)) = (addends, &mut total) {
                let sums = &mut total[i * cols..][..cols];
                add(simd, row, &addends[(first + i) * stride..][..cols], sums);
                row = sums;
            }
            let count = cols as f32;
            let mean = if norm.is_centered { sum::<S, T, false>(simd, row, 0.0) / count } else { 0.0 };
            let rstd = (sum::<S, T, true>(simd, row, mean) / count + norm.eps).sqrt().recip();
            finish(simd, norm.rounds_normalized, columns, (mean, rstd), row, out);
        }
    }
}

/// `out = a + b`, in fp32 with one rounding.
#[inline(always)]
fn add<S: Simd, T: Element>(simd: S, a: &[T], b: &[T], out: &mut [T]) {
    assert!(a.len() == out.len() && b.len() == out.len());
    let whole = out.len() - out.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within the three slices, which have one length.
        unsafe {
            let sum = simd.add(simd.load(a.as_ptr().add(at)), simd.load(b.as_ptr().add(at)));
            simd.store(out.as_mut_ptr().add(at), sum);
        }
    }
    for at in whole..out.len() {
        out[at] = T::from_f32(a[at].to_f32() + b[at].to_f32());
    }
}

/// The sum of the distances from `center`, or of their squares.
#[inline(always)]
fn sum<S: Simd, T: Element, const SQUARED: bool>(simd: S, row: &[T], center: f32) -> f32 {
    let shift = simd.splat(-center);
    let mut sums = [simd.splat(0.0); SUMS];
    let whole = row.len() - row.len() % S::LANES;
    for (i, at) in (0..whole).step_by(S::LANES).enumerate() {
        // SAFETY: `at + LANES` is within the row.
        let distance = simd.add(unsafe { simd.load(row.as_ptr().add(at)) }, shift);
        let sum = &mut sums[i % SUMS];
        *sum = if SQUARED { simd.fma(distance, distance, *sum) } else { simd.add(*sum, distance) };
    }
    let [a, b, c, d] = sums;
    let mut sum = simd.sum(simd.add(simd.add(a, b), simd.add(c, d)));
    for x in &row[whole..] {
        let distance = x.to_f32() - center;
        sum = if SQUARED { distance.mul_add(distance, sum) } else { sum + distance };
    }
    sum
}

/// `out = (row - mean) * rstd * weight + bias`.
#[inline(always)]
fn finish<S: Simd, T: Element>(
    simd: S,
    rounds_normalized: bool,
    columns: &Columns,
    (mean, rstd): (f32, f32),
    row: &[T],
    out: &mut [T],
) {
    assert_eq!(row.len(), out.len());
    let [weight, bias] = [&columns.weight, &columns.bias].map(|column| column.as_deref());
    assert!([weight, bias].into_iter().flatten().all(|column| column.len() == out.len()));
    let (shift, factor) = (simd.splat(-mean), simd.splat(rstd));
    let whole = out.len() - out.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within the slices, which have one length.
        unsafe {
            let to = out.as_mut_ptr().add(at);
            let mut y = simd.mul(simd.add(simd.load(row.as_ptr().add(at)), shift), factor);
            if rounds_normalized {
                simd.store(to, y);
                y = simd.load(to.cast_const());
            }
            let column = |values: &[f32]| simd.load(values.as_ptr().add(at));
            y = match (weight, bias) {
                (Some(weight), Some(bias)) => simd.fma(y, column(weight), column(bias)),
                (Some(weight), None) => simd.mul(y, column(weight)),
                (None, Some(bias)) => simd.add(y, column(bias)),
                (None, None) => y,
            };
            simd.store(to, y);
        }
    }
    for at in whole..out.len() {
        let mut y = (row[at].to_f32() - mean) * rstd;
        if rounds_normalized {
            y = T::from_f32(y).to_f32();
        }
        y = match (weight, bias) {
            (Some(weight), Some(bias)) => y.mul_add(weight[at], bias[at]),
            (Some(weight), None) => y * weight[at],
            (None, Some(bias)) => y + bias[at],
            (None, None) => y,
        };
        out[at] = T::from_f32(y);
    }
}
