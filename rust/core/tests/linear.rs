//! The products of every instruction set against sums in f64.

mod common;

use common::{Owned, Vector, dtypes, on_every_isa, shapes, specs, weights};
use lowbit_core::cpu::{self, ActivationFormat, Activations};
use lowbit_core::dtype::Dtype;
use lowbit_core::reference;
use proptest::prelude::*;

fn formats() -> impl Strategy<Value = ActivationFormat> {
    prop_oneof![2 => Just(ActivationFormat::None), 1 => Just(ActivationFormat::Int8 { threshold: f32::INFINITY })]
}

/// Unit roundoff of a dtype.
fn roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Float32 => 2.0_f64.powi(-24),
        Dtype::Float16 => 2.0_f64.powi(-11),
        Dtype::Bfloat16 => 2.0_f64.powi(-8),
    }
}

/// Half the smallest subnormal of a dtype: what rounding loses near zero.
fn underflow(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Float32 => 2.0_f64.powi(-149),
        Dtype::Float16 => 2.0_f64.powi(-25),
        Dtype::Bfloat16 => 2.0_f64.powi(-134),
    }
}

/// Checks `got` against `exact` within the bound of a sum of `terms` products in fp32, in any order, each factor
/// rounded at most a few times: (terms + 16) * u * sum |x| |w|, what rounding of the factors may add, and one rounding of
/// the result.
fn check(
    got: &Vector,
    exact: &[f64],
    magnitude: &[f64],
    factors: &[f64],
    terms: usize,
    dtype: Dtype,
) -> Result<(), TestCaseError> {
    for (i, got) in got.to_f32().into_iter().enumerate() {
        let sum = (terms + 16) as f64 * roundoff(Dtype::Float32) * magnitude[i] + factors[i] + 1e-38;
        let bound = sum + roundoff(dtype) * (exact[i].abs() + sum) + underflow(dtype);
        let is_overflow = dtype == Dtype::Float16 && exact[i].abs() > 65000.0;
        let error = (f64::from(got) - exact[i]).abs();
        prop_assert!(
            error <= bound || is_overflow,
            "element {i}: {got} for {}, error {error:e} over {bound:e}",
            exact[i]
        );
    }
    Ok(())
}

/// The largest of every `interval` numbers of a row, for each of them.
fn largest_around(row: &[f32], interval: usize) -> Vec<f64> {
    let largest = |x: &[f32]| f64::from(x.iter().fold(0.0_f32, |most, x| most.max(x.abs())));
    row.chunks(interval).flat_map(|x| vec![largest(x); x.len()]).collect()
}

/// By how much rounding the factors of products may change the results `[tokens, rows]`, for activations `[tokens,
/// cols]` of a dtype: by the largest of what the kernels do.
///
/// Beside bf16 and fp16 a table is rounded to 14 bits of its largest value and activations to 14 bits of the largest of 16,
/// or weights to bf16 and twice that. With int8 a table and its activations are rounded to 7 bits, a table at worst to 6.
fn rounding(packed: &Owned, x: &[f32], dtype: Dtype, format: ActivationFormat) -> Vec<f64> {
    let (rows, cols) = (packed.rows, packed.cols);
    let w = absolute(packed);
    let shifts = packed.block_shifts();
    let scales = packed.block_scales();
    let view = packed.view();
    let largest_code =
        view.codebook().map_or(0.0, |table| table.values().iter().fold(0.0, |m: f64, v| m.max(f64::from(v.abs()))));
    let (table_step, x_step, interval, w_step) = match (format, dtype) {
        (ActivationFormat::None, Dtype::Float32) => return vec![0.0; x.len() / cols.max(1) * rows],
        (ActivationFormat::None, Dtype::Bfloat16) => (0.5 / 8191.0, 0.5 / 8192.0, 16, 2.0_f64.powi(-8)),
        (ActivationFormat::None, Dtype::Float16) => (0.5 / 8191.0, 0.5 / 8192.0, 16, 2.0_f64.powi(-13)),
        (_, _) => (0.5 / 63.0, 0.5 / 126.0, cols.max(1), 2.0_f64.powi(-8)),
    };
    let mut out = Vec::new();
    for x in x.chunks(cols.max(1)) {
        let around = largest_around(x, interval);
        out.extend((0..rows).map(|row| {
            (0..cols)
                .map(|col| {
                    let block = view.layout().block_of(row, col);
                    let (weight, shift) = (f64::from(w[row * cols + col]), f64::from(shifts[block].abs()));
                    let table = f64::from(scales[block].abs()) * largest_code * table_step;
                    (table + weight * w_step) * f64::from(x[col].abs()) + (weight + shift) * x_step * around[col]
                })
                .sum::<f64>()
        }));
    }
    out
}

/// The same weight with every number made positive: its products with |x| bound the sums.
fn absolute(packed: &Owned) -> Vec<f32> {
    packed.dequantize(Dtype::Float32).to_f32().iter().map(|w| w.abs()).collect()
}

proptest! {
    #![proptest_config(common::config(64))]

    #[test]
    fn linear_is_the_oracles(
        (rows, cols) in shapes(), (spec, table) in specs(), tokens in prop::sample::select(vec![0_usize, 1, 2, 3, 4, 5, 8, 9, 15, 17, 33, 70]),
        x_dtype in dtypes(), out_dtype in dtypes(), bias_dtype in prop::option::of(dtypes()), gap in 0_usize..5,
        format in formats(), threads in 1_usize..4, seed: u64,
    ) {
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let mut packed = Owned::quantize(&source, rows, cols, spec, table).unwrap();
        if spec.format.bits() == 8 {
            // Weights that others quantized have codes of -128.
            packed.codes.iter_mut().step_by(13).for_each(|code| *code = i8::MIN.cast_unsigned());
        }
        let stride = cols + gap;
        let x = Vector::from_f32(x_dtype, &weights(tokens * stride, seed ^ 1, 1.0));
        let dense: Vec<f32> =
            x.to_f32().chunks(stride).flat_map(|row| row[..cols].to_vec()).collect();
        let bias = bias_dtype.map(|dtype| Vector::from_f32(dtype, &weights(rows, seed ^ 2, 1.0)));
        let bias_values = bias.as_ref().map(Vector::to_f32);
        let view = packed.view();
        let exact = reference::linear(&view, &dense, tokens, bias_values.as_deref());
        let w = absolute(&packed);
        let shift_sums = shift_magnitude(&packed);
        let magnitude: Vec<f64> = (0..tokens * rows).map(|i| {
            let (token, row) = (i / rows, i % rows);
            let x = &dense[token * cols..][..cols];
            let dot: f64 = x.iter().zip(&w[row * cols..]).zip(&shift_sums[row * cols..])
                .map(|((x, w), s)| f64::from(x.abs()) * f64::from(w + s)).sum();
            dot + bias_values.as_ref().map_or(0.0, |bias| f64::from(bias[row].abs()))
        }).collect();
        let factors = rounding(&packed, &dense, x_dtype, format);
        let mut repeated: Option<Vector> = None;
        on_every_isa(|_| {
            for _ in 0..2 {
                let mut out = Vector::from_f32(out_dtype, &vec![f32::NAN; tokens * rows]);
                let x = Activations { values: x.floats(), tokens, stride };
                cpu::linear(&view, x, format, bias.as_ref().map(Vector::floats), out.floats_mut(), threads).unwrap();
                check(&out, &exact, &magnitude, &factors, cols, out_dtype)?;
                if let Some(before) = repeated.replace(out.clone()) {
                    prop_assert_eq!(before, out, "the same call gives the same bits");
                }
            }
            repeated = None;
            Ok(())
        })?;
    }

    #[test]
    fn activations_in_int8_are_rounded_as_defined(
        (rows, cols) in (1_usize..40, 1_usize..300), tokens in prop::sample::select(vec![1_usize, 2, 5, 16, 33]),
        dtype in dtypes(), threshold in prop::sample::select(vec![2.0_f32, 6.0, f32::INFINITY]),
        planted in prop::collection::vec((0_usize..40, 0_usize..300, prop::sample::select(vec![6.0_f32, 50.0, 3000.0])), 0..4),
        is_auto: bool, threads in 1_usize..4, seed: u64,
    ) {
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let packed = Owned::quantize(&source, rows, cols, int8_by_rows(), None).unwrap();
        let mut x = weights(tokens * cols, seed ^ 1, 0.1);
        for (token, col, value) in planted {
            x[token % tokens * cols + col % cols] = value;
        }
        let x = Vector::from_f32(dtype, &x);
        let (view, values) = (packed.view(), x.to_f32());
        let format = if is_auto { ActivationFormat::Auto { threshold } } else { ActivationFormat::Int8 { threshold } };
        let kept = reference::linear(&view, &values, tokens, None);
        let rounded = reference::linear_int8(&view, &values, tokens, threshold, None);
        let w = absolute(&packed);
        let magnitude: Vec<f64> = (0..tokens * rows).map(|i| {
            let pairs = values[i / rows * cols..][..cols].iter().zip(&w[i % rows * cols..]);
            pairs.map(|(x, w)| f64::from(x.abs()) * f64::from(*w)).sum()
        }).collect();
        let factors = rounding(&packed, &values, dtype, ActivationFormat::None);
        on_every_isa(|_| {
            let mut out = Vector::from_f32(dtype, &vec![f32::NAN; tokens * rows]);
            let x = Activations { values: x.floats(), tokens, stride: cols };
            cpu::linear(&view, x, format, None, out.floats_mut(), threads).unwrap();
            // int8 is a permission: a kernel takes it, or is as exact as without.
            check(&out, &rounded, &magnitude, &vec![0.0; factors.len()], cols, dtype)
                .or_else(|_| check(&out, &kept, &magnitude, &factors, cols, dtype))
        })?;
    }

    #[test]
    fn the_gradient_is_the_oracles(
        (rows, cols) in shapes(), (spec, table) in specs(), tokens in prop::sample::select(vec![0_usize, 1, 3, 17, 40]),
        dtype in dtypes(), threads in 1_usize..4, seed: u64,
    ) {
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let packed = Owned::quantize(&source, rows, cols, spec, table).unwrap();
        let grad = Vector::from_f32(dtype, &weights(tokens * rows, seed ^ 1, 1.0));
        let values = grad.to_f32();
        let view = packed.view();
        let exact = reference::linear_grad_input(&view, &values, tokens);
        let w = absolute(&packed);
        let magnitude: Vec<f64> = (0..tokens * cols).map(|i| {
            let (token, col) = (i / cols, i % cols);
            (0..rows).map(|row| f64::from(values[token * rows + row].abs()) * f64::from(w[row * cols + col])).sum()
        }).collect();
        // At worst, weights are rounded to bf16, or to twice that beside fp16.
        let step = match dtype {
            Dtype::Float32 => 0.0,
            Dtype::Float16 => 2.0_f64.powi(-13),
            Dtype::Bfloat16 => 2.0_f64.powi(-8),
        };
        let factors: Vec<f64> = magnitude.iter().map(|magnitude| step * magnitude).collect();
        on_every_isa(|_| {
            let mut out = Vector::from_f32(dtype, &vec![f32::NAN; tokens * cols]);
            let grad = Activations { values: grad.floats(), tokens, stride: rows };
            cpu::linear_grad_input(&view, grad, out.floats_mut(), threads).unwrap();
            check(&out, &exact, &magnitude, &factors, rows, dtype)
        })?;
    }
}

fn int8_by_rows() -> lowbit_core::format::Spec {
    lowbit_core::format::Spec {
        format: lowbit_core::format::Format::Int8,
        block_size: lowbit_core::format::BlockSize::Row,
        block_order: lowbit_core::format::BlockOrder::Row,
        scale_dtype: Dtype::Float32,
        double_quant: false,
        signed_absmax: false,
    }
}

#[test]
fn many_tokens_are_rounded_and_outliers_are_not() {
    let (rows, cols, tokens) = (33, 300, 530);
    let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, 7, 1.0));
    let packed = Owned::quantize(&source, rows, cols, int8_by_rows(), None).unwrap();
    let mut x = weights(tokens * cols, 8, 0.1);
    (0..tokens).for_each(|token| x[token * cols + 17] = 1000.0);
    x[529 * cols + 3] = f32::NAN;
    let format = ActivationFormat::Auto { threshold: 6.0 };
    let exact = reference::linear_int8(&packed.view(), &x, tokens, 6.0, None);
    on_every_isa(|isa| {
        let from = cpu::rounded_from(&packed.view(), format, Dtype::Float32).unwrap();
        let mut out = vec![f32::NAN; tokens * rows];
        let x = Activations { values: lowbit_core::dtype::Floats::Float32(&x), tokens, stride: cols };
        let to = lowbit_core::dtype::FloatsMut::Float32(&mut out);
        cpu::linear(&packed.view(), x, format, None, to, 2).unwrap();
        let (finite, nan) = out.split_at(529 * rows);
        assert!(nan.iter().all(|y| y.is_nan()), "the row of the NaN, on {}", isa.name());
        let error = exact.iter().zip(finite).map(|(a, &b)| (a - f64::from(b)).powi(2)).sum::<f64>().sqrt();
        let norm = exact[..finite.len()].iter().map(|y| y * y).sum::<f64>().sqrt();
        let is_rounded = error <= 1e-6 * norm;
        assert!(is_rounded == from.is_some(), "{} on {}", error / norm, isa.name());
        Ok::<(), ()>(())
    })
    .unwrap();
}

/// |scale * code| + |shift| beyond |weight|, for every weight: with a shift the two parts are summed apart.
fn shift_magnitude(packed: &Owned) -> Vec<f32> {
    let view = packed.view();
    let shifts = packed.block_shifts();
    (0..packed.rows * packed.cols)
        .map(|i| 2.0 * shifts[view.layout().block_of(i / packed.cols, i % packed.cols)].abs())
        .collect()
}

#[test]
fn a_long_sum_runs_through_several_panels() {
    let (rows, cols, tokens) = (131, 3000, 530);
    let spec = lowbit_core::format::Spec {
        format: lowbit_core::format::Format::Nf4,
        block_size: lowbit_core::format::BlockSize::Elements(64),
        block_order: lowbit_core::format::BlockOrder::Row,
        scale_dtype: Dtype::Float32,
        double_quant: true,
        signed_absmax: false,
    };
    let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, 7, 1.0));
    let packed = Owned::quantize(&source, rows, cols, spec, None).unwrap();
    let x = weights(tokens * cols, 8, 1.0);
    let exact = reference::linear(&packed.view(), &x, tokens, None);
    let norm = exact.iter().map(|y| y * y).sum::<f64>().sqrt();
    on_every_isa(|isa| {
        let mut out = vec![f32::NAN; tokens * rows];
        let values = lowbit_core::dtype::Floats::Float32(&x);
        let x = Activations { values, tokens, stride: cols };
        cpu::linear(
            &packed.view(),
            x,
            ActivationFormat::None,
            None,
            lowbit_core::dtype::FloatsMut::Float32(&mut out),
            2,
        )
        .unwrap();
        let error = exact.iter().zip(&out).map(|(a, &b)| (a - f64::from(b)).powi(2)).sum::<f64>().sqrt();
        assert!(error <= 1e-6 * norm, "{} on {}", error / norm, isa.name());
        Ok::<(), ()>(())
    })
    .unwrap();
}

#[test]
fn wrong_lengths_are_named() {
    let packed = Owned::quantize(&Vector::Float32(vec![1.0; 12]), 3, 4, int8_by_rows(), None).unwrap();
    let x = [0.0; 8];
    let call = |x: &[f32], bias: Option<&[f32]>, out: usize| {
        let x = Activations { values: lowbit_core::dtype::Floats::Float32(x), tokens: 2, stride: 4 };
        let mut out = vec![0.0; out];
        let bias = bias.map(lowbit_core::dtype::Floats::Float32);
        let out = lowbit_core::dtype::FloatsMut::Float32(&mut out);
        cpu::linear(&packed.view(), x, ActivationFormat::None, bias, out, 1).unwrap_err().to_string()
    };
    assert_eq!(call(&x[..7], None, 6), "x: got 7 elements, expected 2 rows of 4");
    assert_eq!(call(&x, Some(&[0.0; 2]), 6), "bias: got 2 elements, expected 3 elements");
    assert_eq!(call(&x, None, 5), "out: got 5 elements, expected 2 rows of 3");
}
