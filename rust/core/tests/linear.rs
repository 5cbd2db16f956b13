//! The products of every instruction set against sums in f64.

mod common;

use common::{Owned, Vector, dtypes, on_every_isa, shapes, specs, weights};
use lowbit_core::cpu::{self, Activations};
use lowbit_core::dtype::Dtype;
use lowbit_core::reference;
use proptest::prelude::*;

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
/// rounded at most a few times: (terms + 8) * u * sum |x| |w|, and one rounding of the result.
fn check(got: &Vector, exact: &[f64], magnitude: &[f64], terms: usize, dtype: Dtype) -> Result<(), TestCaseError> {
    for (i, got) in got.to_f32().into_iter().enumerate() {
        let sum = (terms + 8) as f64 * roundoff(Dtype::Float32) * magnitude[i] + 1e-38;
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

/// The same weight with every number made positive: its products with |x| bound the sums.
fn absolute(packed: &Owned) -> Vec<f32> {
    packed.dequantize(Dtype::Float32).to_f32().iter().map(|w| w.abs()).collect()
}

proptest! {
    #![proptest_config(common::config(64))]

    #[test]
    fn linear_is_the_oracles(
        (rows, cols) in shapes(), (spec, table) in specs(), tokens in prop::sample::select(vec![0_usize, 1, 2, 3, 4, 5, 8, 9, 15, 17]),
        x_dtype in dtypes(), out_dtype in dtypes(), bias_dtype in prop::option::of(dtypes()), gap in 0_usize..5,
        threads in 1_usize..4, seed: u64,
    ) {
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let packed = Owned::quantize(&source, rows, cols, spec, table).unwrap();
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
        let mut repeated: Option<Vector> = None;
        on_every_isa(|_| {
            for _ in 0..2 {
                let mut out = Vector::from_f32(out_dtype, &vec![f32::NAN; tokens * rows]);
                let x = Activations { values: x.floats(), tokens, stride };
                cpu::linear(&view, x, bias.as_ref().map(Vector::floats), out.floats_mut(), threads).unwrap();
                check(&out, &exact, &magnitude, cols, out_dtype)?;
                if let Some(before) = repeated.replace(out.clone()) {
                    prop_assert_eq!(before, out, "the same call gives the same bits");
                }
            }
            repeated = None;
            Ok(())
        })?;
    }

    #[test]
    fn the_gradient_is_the_oracles(
        (rows, cols) in shapes(), (spec, table) in specs(), tokens in prop::sample::select(vec![0_usize, 1, 3, 17]),
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
        on_every_isa(|_| {
            let mut out = Vector::from_f32(dtype, &vec![f32::NAN; tokens * cols]);
            let grad = Activations { values: grad.floats(), tokens, stride: rows };
            cpu::linear_grad_input(&view, grad, out.floats_mut(), threads).unwrap();
            check(&out, &exact, &magnitude, rows, dtype)
        })?;
    }
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
        cpu::linear(&packed.view(), x, None, lowbit_core::dtype::FloatsMut::Float32(&mut out), 2).unwrap();
        let error = exact.iter().zip(&out).map(|(a, &b)| (a - f64::from(b)).powi(2)).sum::<f64>().sqrt();
        assert!(error <= 1e-6 * norm, "{} on {}", error / norm, isa.name());
        Ok::<(), ()>(())
    })
    .unwrap();
}

#[test]
fn wrong_lengths_are_named() {
    let spec = lowbit_core::format::Spec {
        format: lowbit_core::format::Format::Int8,
        block_size: lowbit_core::format::BlockSize::Row,
        block_order: lowbit_core::format::BlockOrder::Row,
        scale_dtype: Dtype::Float32,
        double_quant: false,
        signed_absmax: false,
    };
    let packed = Owned::quantize(&Vector::Float32(vec![1.0; 12]), 3, 4, spec, None).unwrap();
    let x = [0.0; 8];
    let call = |x: &[f32], bias: Option<&[f32]>, out: usize| {
        let x = Activations { values: lowbit_core::dtype::Floats::Float32(x), tokens: 2, stride: 4 };
        let mut out = vec![0.0; out];
        let bias = bias.map(lowbit_core::dtype::Floats::Float32);
        let out = lowbit_core::dtype::FloatsMut::Float32(&mut out);
        cpu::linear(&packed.view(), x, bias, out, 1).unwrap_err().to_string()
    };
    assert_eq!(call(&x[..7], None, 6), "x: got 7 elements, expected 2 rows of 4");
    assert_eq!(call(&x, Some(&[0.0; 2]), 6), "bias: got 2 elements, expected 3 elements");
    assert_eq!(call(&x, None, 5), "out: got 5 elements, expected 2 rows of 3");
}
