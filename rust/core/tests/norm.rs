//! `RMSNorm` and `LayerNorm` on every instruction set, against fp64.

use half::bf16;
use lowbit_core::cpu::{Activations, Affine, Isa, Residual, norm};
use lowbit_core::dtype::{Floats, FloatsMut};
use lowbit_core::norm::Norm;

const RMS: Norm = Norm { eps: 1e-5, is_centered: false, has_unit_offset: false, rounds_normalized: false };

/// Numbers between -2 and 3 that look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let step = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503) >> 8;
    (0..count as u32).map(|i| step(i) as f32 / (1 << 24) as f32 * 5.0 - 2.0).collect()
}

fn exact(kind: Norm, row: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f64> {
    let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
    let count = row.len() as f64;
    let mean = if kind.is_centered { row.iter().sum::<f64>() / count } else { 0.0 };
    let square = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    let scale = (square + f64::from(kind.eps)).sqrt();
    let offset = if kind.has_unit_offset { 1.0 } else { 0.0 };
    let columns = weight.iter().zip(bias);
    row.iter().zip(columns).map(|(x, (&w, &b))| (x - mean) / scale * (f64::from(w) + offset) + f64::from(b)).collect()
}

#[test]
fn every_instruction_set_is_near_fp64() {
    for isa in Isa::available() {
        Isa::force(Some(isa));
        for (cols, tokens, threads) in [(1, 3, 1), (7, 2, 1), (64, 5, 2), (1003, 70, 3)] {
            let (x, weight, bias) = (numbers(cols * tokens, 1), numbers(cols, 2), numbers(cols, 3));
            for kind in [RMS, Norm { has_unit_offset: true, ..RMS }, Norm { is_centered: true, ..RMS }] {
                let mut out = vec![f32::NAN; cols * tokens];
                let rows = Activations { values: Floats::Float32(&x), tokens, stride: cols };
                let affine = Affine { weight: Some(Floats::Float32(&weight)), bias: Some(Floats::Float32(&bias)) };
                norm(kind, cols, rows, None, affine, FloatsMut::Float32(&mut out), threads).expect("a norm");
                for (row, out) in x.chunks(cols).zip(out.chunks(cols)) {
                    for (wanted, &out) in exact(kind, row, &weight, &bias).into_iter().zip(out) {
                        let bound = 1e-5 * (1.0 + wanted.abs()) * if cols == 1 { 100.0 } else { 1.0 };
                        assert!((f64::from(out) - wanted).abs() <= bound, "{isa:?} {cols} {kind:?}: {out} {wanted}");
                    }
                }
            }
        }
        Isa::force(None);
    }
}

#[test]
fn a_residual_is_added_with_one_rounding() {
    let [x, residual] = [4, 5].map(|seed| numbers(90, seed).into_iter().map(bf16::from_f32).collect::<Vec<_>>());
    let (mut out, mut total, mut again) = (vec![bf16::NAN; 90], vec![bf16::NAN; 90], vec![bf16::NAN; 90]);
    let rows = |values| Activations { values: Floats::Bfloat16(values), tokens: 3, stride: 30 };
    let with = Residual { rows: rows(&residual), total: FloatsMut::Bfloat16(&mut total) };
    let kind = Norm { rounds_normalized: true, ..RMS };
    norm(kind, 30, rows(&x), Some(with), Affine::default(), FloatsMut::Bfloat16(&mut out), 1).expect("a norm");
    for ((x, residual), total) in x.iter().zip(&residual).zip(&total) {
        assert_eq!(*total, bf16::from_f32(x.to_f32() + residual.to_f32()));
    }
    norm(kind, 30, rows(&total), None, Affine::default(), FloatsMut::Bfloat16(&mut again), 1).expect("a norm");
    assert_eq!(out, again);
}

#[test]
fn lengths_and_dtypes_are_checked() {
    let (x, mut out) = (vec![0.0; 8], vec![0.0; 8]);
    let rows = Activations { values: Floats::Float32(&x), tokens: 2, stride: 4 };
    let short = Affine { weight: Some(Floats::Float32(&x[..3])), bias: None };
    let error = norm(RMS, 4, rows, None, short, FloatsMut::Float32(&mut out), 1).expect_err("a short weight");
    assert!(error.to_string().starts_with("weight: got 3 elements"), "{error}");
    let error = norm(RMS, 4, rows, None, Affine::default(), FloatsMut::Float32(&mut out[..7]), 1).expect_err("short");
    assert!(error.to_string().starts_with("out: got 7 elements"), "{error}");
    let both = Norm { is_centered: true, rounds_normalized: true, ..RMS };
    assert!(norm(both, 4, rows, None, Affine::default(), FloatsMut::Float32(&mut out), 1).is_err());
}
