//! Packing and unpacking against the oracle, and the bounds that follow from the definition.

mod common;

use common::{Owned, Vector, dtypes, on_every_isa, round_to, shapes, specs, weights};
use lowbit_core::codebook::dynamic_map;
use lowbit_core::cpu::{self, NonFinite};
use lowbit_core::dtype::Dtype;
use lowbit_core::format::{BlockOrder, BlockSize, Format, Shift, Spec, packing};
use lowbit_core::{Error, reference};
use proptest::prelude::*;

const PLAIN: Spec = Spec {
    format: Format::Nf4,
    block_size: BlockSize::Elements(64),
    block_order: BlockOrder::Row,
    scale_dtype: Dtype::Float32,
    double_quant: false,
    signed_absmax: false,
};

/// Code of the weight at (`row`, `col`).
fn code_at(owned: &Owned, row: usize, col: usize) -> u8 {
    let index = owned.view().layout().code_index(row, col);
    if owned.spec.format.bits() == 8 { owned.codes[index] } else { packing::nibble(&owned.codes, index) }
}

/// The positions of every block's weights, in order.
fn blocks(owned: &Owned) -> Vec<Vec<(usize, usize)>> {
    let view = owned.view();
    let layout = view.layout();
    let mut blocks = vec![Vec::new(); layout.block_count()];
    for row in 0..owned.rows {
        for col in 0..owned.cols {
            blocks[layout.block_of(row, col)].push((row, col));
        }
    }
    blocks
}

proptest! {
    #![proptest_config(common::config(64))]

    #[test]
    fn codes_and_scales_are_the_oracles(
        (rows, cols) in shapes(), (spec, table) in specs(), dtype in dtypes(), seed: u64,
    ) {
        let source = Vector::from_f32(dtype, &weights(rows * cols, seed, 0.05));
        let values = source.to_f32();
        on_every_isa(|isa| {
            let packed = Owned::quantize(&source, rows, cols, spec, table).unwrap();
            let codebook = spec.codebook(table).unwrap();
            let (scales, shifts) = (packed.block_scales(), packed.block_shifts());
            for (index, block) in blocks(&packed).iter().enumerate() {
                let weights: Vec<f32> = block.iter().map(|&(row, col)| values[row * cols + col]).collect();
                let stored = |value| round_to(spec.scale_dtype, value);
                let expected =
                    reference::quantize_block(&weights, spec.format, codebook.as_ref(), spec.signed_absmax, stored);
                let codes: Vec<u8> = block.iter().map(|&(row, col)| code_at(&packed, row, col)).collect();
                prop_assert_eq!(&codes, &expected.codes, "codes of block {} on {}", index, isa.name());
                prop_assert_eq!(shifts[index], expected.shift);
                if !spec.double_quant {
                    prop_assert_eq!(scales[index], stored(expected.scale));
                }
            }
            Ok(())
        })?;
    }

    #[test]
    fn unpacked_weights_are_the_oracles(
        (rows, cols) in shapes(), (spec, table) in specs(), dtype in dtypes(), seed: u64,
    ) {
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let packed = Owned::quantize(&source, rows, cols, spec, table).unwrap();
        let view = packed.view();
        let exact: Vec<f32> =
            (0..rows * cols).map(|i| reference::weight_at(&view, i / cols, i % cols)).collect();
        let expected = Vector::from_f32(dtype, &exact);
        on_every_isa(|isa| {
            prop_assert_eq!(&packed.dequantize(dtype), &expected, "on {}", isa.name());
            let picked = [rows - 1, 0, rows / 2];
            let mut some = Vector::zeros(dtype, picked.len() * cols);
            cpu::dequantize_rows(&view, &picked.map(|row| row as i64), some.floats_mut(), 2).unwrap();
            let all = expected.to_f32();
            let want: Vec<f32> = picked.iter().flat_map(|&row| &all[row * cols..][..cols]).copied().collect();
            prop_assert_eq!(some.to_f32(), want);
            Ok(())
        })?;
    }

    #[test]
    fn the_error_is_bounded_by_the_codebook((rows, cols) in shapes(), (spec, table) in specs(), seed: u64) {
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let values = source.to_f32();
        let packed = Owned::quantize(&source, rows, cols, spec, table).unwrap();
        let back = packed.dequantize(Dtype::Float32).to_f32();
        let codebook = spec.codebook(table).unwrap();
        let exact = Owned::quantize(
            &source, rows, cols, Spec { double_quant: false, scale_dtype: Dtype::Float32, ..spec }, table,
        ).unwrap();
        let (limit, largest) = codebook.as_ref().map_or((127.0, 127.0), |codebook| {
            (codebook.limit(), codebook.values().iter().fold(0.0, |m: f32, v| m.max(v.abs())))
        });
        let (scales, exact_scales) = (packed.block_scales(), exact.block_scales());
        let (shifts, exact_shifts) = (packed.block_shifts(), exact.block_shifts());
        for (index, block) in blocks(&packed).iter().enumerate() {
            let extent = exact_scales[index].abs() * limit;
            let radius = match &codebook {
                // One-sided tables with a shift cover [0, limit] in steps.
                Some(_) if spec.format.has_shift() => 0.5 / 15.0,
                Some(codebook) => codebook.covering_radius(),
                None => 0.5 / 127.0,
            };
            // Storing a scale or shift in fewer bits moves every weight by at most these.
            let moved = (scales[index] - exact_scales[index]).abs() * largest
                + 2.0 * (shifts[index] - exact_shifts[index]).abs();
            for &(row, col) in block {
                let at = row * cols + col;
                let rounding = 4.0 * f32::EPSILON * (extent + values[at].abs()) + f32::MIN_POSITIVE;
                let error = (values[at] - back[at]).abs();
                prop_assert!(error <= extent * radius + moved + rounding, "{error} at {row}, {col}");
            }
        }
    }

    #[test]
    fn a_power_of_two_scales_exactly((rows, cols) in shapes(), (spec, table) in specs(), seed: u64, power in -20..20) {
        let spec = Spec { scale_dtype: Dtype::Float32, ..spec };
        let values = weights(rows * cols, seed, 1.0);
        let factor = 2.0_f32.powi(power);
        let scaled: Vec<f32> = values.iter().map(|value| value * factor).collect();
        let one = Owned::quantize(&Vector::Float32(values), rows, cols, spec, table).unwrap();
        let two = Owned::quantize(&Vector::Float32(scaled), rows, cols, spec, table).unwrap();
        prop_assert_eq!(&one.codes, &two.codes);
        let expected: Vec<f32> = one.dequantize(Dtype::Float32).to_f32().iter().map(|w| w * factor).collect();
        prop_assert_eq!(two.dequantize(Dtype::Float32).to_f32(), expected);
    }

    #[test]
    fn strides_do_not_matter(
        (rows, cols) in shapes(), experts in 1_usize..4, (spec, table) in specs(), dtype in dtypes(), seed: u64,
    ) {
        let source = Vector::from_f32(dtype, &weights(experts * rows * cols, seed, 1.0));
        let values = source.to_f32();
        let mut transposed = vec![0.0; values.len()];
        for (i, &value) in values.iter().enumerate() {
            let (expert, row, col) = (i / (rows * cols), i / cols % rows, i % cols);
            transposed[(col * rows + row) * experts + expert] = value;
        }
        let (e, r, c) = (experts as isize, rows as isize, cols as isize);
        let dense = Owned::quantize_strided(&source, [experts, rows, cols], [r * c, c, 1], spec, table, NonFinite::Error);
        let transposed = Vector::from_f32(dtype, &transposed);
        let turned =
            Owned::quantize_strided(&transposed, [experts, rows, cols], [1, e, r * e], spec, table, NonFinite::Error);
        prop_assert_eq!(dense.unwrap(), turned.unwrap());
    }

    #[test]
    fn double_quantization_adds_no_more_than_half_a_gap(
        (rows, cols) in shapes(), block_size in prop::sample::select(vec![16_usize, 64]), seed: u64,
    ) {
        let spec = Spec { block_size: BlockSize::Elements(block_size), ..PLAIN };
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let plain = Owned::quantize(&source, rows, cols, spec, None).unwrap();
        let double = Owned::quantize(&source, rows, cols, Spec { double_quant: true, ..spec }, None).unwrap();
        prop_assert_eq!(&plain.codes, &double.codes);
        let half_gap = dynamic_map().windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max);
        // The map's lowest value is -0.993, the smallest normalized scale -1.
        let half_gap = half_gap.max(dynamic_map()[0] + 1.0);
        for (i, (exact, restored)) in plain.block_scales().iter().zip(double.block_scales()).enumerate() {
            let bound = double.scale_2[i / 256] * half_gap;
            let rounding = 4.0 * f32::EPSILON * (double.offset.abs() + double.scale_2[i / 256]);
            prop_assert!((exact - restored).abs() <= bound + rounding, "{exact} became {restored}");
        }
    }

    #[test]
    fn packing_again_gives_the_same_codes((rows, cols) in shapes(), (spec, table) in specs(), seed: u64) {
        // Tables that map the largest weight of a block to an end: the second absmax is then the first.
        prop_assume!(spec.format != Format::Custom && !spec.double_quant);
        // A minimum is a weight of its block again, unless it was rounded to 16 bits. A middle is not, and is rounded
        // another way the second time.
        let shift = spec.format.shift();
        prop_assume!(shift.is_none() || shift == Some(Shift::Minimum) && spec.scale_dtype == Dtype::Float32);
        let source = Vector::from_f32(Dtype::Float32, &weights(rows * cols, seed, 1.0));
        let once = Owned::quantize(&source, rows, cols, spec, table).unwrap();
        let twice = Owned::quantize(&once.dequantize(Dtype::Float32), rows, cols, spec, table).unwrap();
        // FP4 has a code for -0, which is not below zero when it is packed again.
        let no_sign = |codes: &[u8]| -> Vec<u8> {
            let plus = |code| if spec.format == Format::Fp4 && code == 8 { 0 } else { code };
            codes.iter().map(|byte| plus(byte >> 4) << 4 | plus(byte & 15)).collect()
        };
        if spec.format.bits() == 8 {
            prop_assert_eq!(&once.codes, &twice.codes);
        } else {
            prop_assert_eq!(no_sign(&once.codes), no_sign(&twice.codes));
        }
    }

    #[test]
    fn the_first_bad_weight_is_named(
        (rows, cols) in shapes(), (spec, table) in specs(), bad in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
        what in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]), seed: u64,
    ) {
        let mut values = weights(rows * cols, seed, 1.0);
        let positions: Vec<usize> = bad.iter().map(|index| index.index(values.len())).collect();
        for &at in &positions {
            values[at] = what;
        }
        let first = *positions.iter().min().unwrap();
        let source = Vector::Float32(values);
        match Owned::quantize(&source, rows, cols, spec, table) {
            Err(Error::NonFinite { index, value }) => {
                prop_assert_eq!(index, vec![first / cols, first % cols]);
                prop_assert_eq!(value.is_nan(), what.is_nan());
            }
            other => prop_assert!(false, "{other:?}"),
        }
        let strides = [0, cols as isize, 1];
        let packed =
            Owned::quantize_strided(&source, [1, rows, cols], strides, spec, table, NonFinite::Propagate).unwrap();
        let back = packed.dequantize(Dtype::Float32).to_f32();
        let spoiled = blocks(&packed).into_iter().filter(|block| {
            block.iter().any(|&(row, col)| positions.contains(&(row * cols + col)))
        });
        for (row, col) in spoiled.flatten() {
            prop_assert!(back[row * cols + col].is_nan());
        }
        if !spec.double_quant {
            let clean = blocks(&packed).into_iter().filter(|block| {
                !block.iter().any(|&(row, col)| positions.contains(&(row * cols + col)))
            });
            prop_assert!(clean.flatten().all(|(row, col)| back[row * cols + col].is_finite()));
        }
    }
}

#[test]
fn extreme_magnitudes_keep_their_codes() {
    on_every_isa(|isa| {
        for magnitude in [1e-45_f32, 1e-41, 1e-38, 1e-30, 1.0, 1e30, 3.4e38] {
            let values: Vec<f32> = (0..64).map(|i| magnitude * ((i as f32 - 31.0) / 32.0)).collect();
            let packed = Owned::quantize(&Vector::Float32(values.clone()), 1, 64, PLAIN, None).unwrap();
            let absmax = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert_eq!(packed.block_scales(), [absmax], "{magnitude:e} on {}", isa.name());
            let codebook = Format::Nf4.codebook().unwrap();
            for (col, &value) in values.iter().enumerate() {
                let exact = (f64::from(value) / f64::from(absmax)) as f32;
                let near = [exact.next_down().next_down(), exact, exact.next_up().next_up()];
                let code = code_at(&packed, 0, col);
                assert!(near.map(|u| codebook.encode(u)).contains(&code), "{value:e} of {absmax:e}");
            }
        }
        Ok::<(), ()>(())
    })
    .unwrap();
}

#[test]
fn zero_blocks_unpack_to_zeros() {
    for format in Format::ALL.into_iter().filter(|&format| format != Format::Custom) {
        for double_quant in [false, true] {
            let spec = Spec { format, double_quant, ..PLAIN };
            let mut values = vec![0.0; 64 * 4];
            values[70] = 3.0;
            let packed = Owned::quantize(&Vector::Float32(values), 2, 128, spec, None).unwrap();
            let back = packed.dequantize(Dtype::Float32).to_f32();
            assert!(back.iter().enumerate().all(|(i, &w)| w == 0.0 || (64..128).contains(&i)), "{format:?}");
        }
    }
}

#[test]
fn a_scale_beyond_float16_is_refused() {
    let spec = Spec { scale_dtype: Dtype::Float16, ..PLAIN };
    let error = Owned::quantize(&Vector::Float32(vec![1e6; 64]), 1, 64, spec, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "scale_dtype: got float16 with a block of scale 1e6, expected float32, or smaller weights"
    );
}

#[test]
fn empty_weights_are_packed() {
    for (rows, cols) in [(0, 0), (0, 64), (3, 0)] {
        for spec in [PLAIN, Spec { double_quant: true, ..PLAIN }, Spec { block_size: BlockSize::Row, ..PLAIN }] {
            let packed = Owned::quantize(&Vector::Float32(Vec::new()), rows, cols, spec, None).unwrap();
            assert_eq!(packed.dequantize(Dtype::Float32), Vector::Float32(Vec::new()));
        }
    }
}
