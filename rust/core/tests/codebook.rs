//! Codebooks: the tables of others bit for bit, optima against plain searches and integrals, errors by message.

#![allow(clippy::float_cmp)] // exact values are what is tested

use lowbit_core::codebook::{
    Codebook, Metric, block_optimal, dynamic_map, fit, fit_blocks, fp4, int4, nf4, normal_float, quantile,
};
use proptest::prelude::*;

/// The NF4 table of bitsandbytes and of its checkpoints.
#[allow(clippy::excessive_precision, clippy::unreadable_literal)] // as published
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn is_ascending(values: &[f32]) -> bool {
    values.windows(2).all(|pair| pair[0] < pair[1])
}

/// The squared distance of weighted samples to the nearest value.
fn error_of(values: &[f32], samples: &[f32], weights: &[f32]) -> f64 {
    let distance = |x: f32| values.iter().map(|&v| f64::from(x) - f64::from(v)).map(f64::abs).fold(f64::MAX, f64::min);
    samples.iter().zip(weights).map(|(&x, &weight)| f64::from(weight) * distance(x).powi(2)).sum()
}

/// Draws from N(0, 1) by Box and Muller's method, from a xorshift generator.
fn normal_samples(count: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) + 1) as f64 / (1_u64 << 53) as f64
    };
    let mut draw = || ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    (0..count).map(|_| draw()).collect()
}

/// The mean of |w - w'|^power over blocks that are divided by their (signed) absolute maximum.
fn quantization_error(samples: &[f32], block_size: usize, table: &[f32], power: i32, signed: bool) -> f64 {
    let mut sum = 0.0;
    for block in samples.chunks(block_size) {
        let largest = block.iter().fold(0.0_f32, |far, &x| if x.abs() > far.abs() { x } else { far });
        let scale = f64::from(if signed { largest } else { largest.abs() });
        for &weight in block {
            let u = f64::from(weight) / scale;
            let distance = table.iter().map(|&value| (f64::from(value) - u).abs()).fold(f64::MAX, f64::min);
            sum += (distance * scale.abs()).powi(power);
        }
    }
    sum / samples.len() as f64
}

/// What [`quantization_error`] is expected to be for draws from N(0, 1): midpoint sums over the block's maximum m and
/// over the weight w within it, the one weight that is the maximum apart.
fn expected_error(block_size: usize, table: &[f32], power: i32, signed: bool) -> f64 {
    const STEP: f64 = 0.02;
    const CELLS: usize = 2000;
    let density = |z: f64| libm::exp(-z * z / 2.0) / std::f64::consts::TAU.sqrt();
    let distance = |u: f64| table.iter().map(|&value| (f64::from(value) - u).abs()).fold(f64::MAX, f64::min);
    let distances: Vec<(f64, f64)> = (0..CELLS)
        .map(|cell| (cell as f64 + 0.5) / CELLS as f64 * 2.0 - 1.0)
        .map(|u| (u, distance(u).powi(power)))
        .collect();
    let at_the_maximum = if signed {
        distance(1.0).powi(power)
    } else {
        f64::midpoint(distance(1.0).powi(power), distance(-1.0).powi(power))
    };
    let size = block_size as f64;
    (0..500)
        .map(|i| (f64::from(i) + 0.5) * STEP)
        .map(|m| {
            let within = libm::erf(m / std::f64::consts::SQRT_2);
            let maximum_density = 2.0 * size * within.powi(block_size as i32 - 1) * density(m);
            let others: f64 = distances.iter().map(|&(u, distance)| density(m * u) * distance).sum();
            let others = others * m * (2.0 / CELLS as f64) / within;
            maximum_density * m.powi(power) * ((size - 1.0) * others + at_the_maximum) / size * STEP
        })
        .sum()
}

fn metrics() -> [(Metric, i32); 2] {
    [(Metric::Mse, 2), (Metric::Mae, 1)]
}

#[test]
fn nf4_is_the_published_table_to_the_last_bit() {
    assert_eq!(bits_of(nf4().values()), bits_of(&NF4));
    assert_eq!(bits_of(&normal_float(4).unwrap()), bits_of(&NF4));
}

#[test]
fn normal_float_keeps_the_ends_and_zero() {
    for bits in 2..=8 {
        let values = normal_float(bits).unwrap();
        assert_eq!(values.len(), 1 << bits);
        assert!(is_ascending(&values), "{bits} bits");
        let zero = (1 << (bits - 1)) - 1;
        assert_eq!([values[0], values[zero], values[values.len() - 1]], [-1.0, 0.0, 1.0]);
    }
}

#[test]
fn fp4_and_int4_have_their_codes() {
    let magnitudes = [0.0, 1.0 / 192.0, 2.0 / 3.0, 1.0, 1.0 / 3.0, 0.5, 1.0 / 6.0, 0.25];
    for (code, magnitude) in magnitudes.into_iter().enumerate() {
        assert_eq!(fp4().values()[code].to_bits(), f32::to_bits(magnitude));
        assert_eq!(fp4().values()[code + 8].to_bits(), f32::to_bits(-magnitude));
    }
    let expected: Vec<f32> = (-8_i8..8).map(f32::from).collect();
    assert_eq!(int4().values()[..], expected[..]);
    assert_eq!(int4().limit().to_bits(), 7.0_f32.to_bits());
}

#[test]
fn dynamic_map_is_sorted_and_has_its_landmarks() {
    let map = dynamic_map();
    assert!(is_ascending(map));
    assert_eq!(bits_of(&[map[0], map[127], map[128], map[255]]), bits_of(&[-0.992_968_74, 0.0, 5.500_000_4e-7, 1.0]));
    // All but the extra 1 come in pairs around zero.
    (0..127).for_each(|i| assert_eq!(bits_of(&[map[i]]), bits_of(&[-map[254 - i]])));
}

#[test]
fn quantile_takes_the_middles_of_equally_probable_cells() {
    // On a ramp a quantile is its own probability, scaled.
    let ramp: Vec<f32> = (1..=1601).map(|i| i as f32).collect();
    let expected: Vec<f32> = (0..16).map(|i| 51.0 + 100.0 * i as f32).collect();
    assert_eq!(quantile(&ramp, 4).unwrap(), expected);
    let centred: Vec<f32> = ramp.iter().map(|x| x - 801.0).collect();
    let values = quantile(&centred, 4).unwrap();
    assert_eq!(values[6..10], [-150.0, 0.0, 50.0, 150.0]);
}

#[test]
fn block_optimal_beats_nf4_by_the_documented_shares() {
    // In per mille of NF4's error, for blocks of 32, 64 and 128: MSE, MSE signed, MAE, MAE signed.
    let documented = [[99, 169, 6, 45], [55, 131, 0, 42], [23, 104, 3, 48]];
    for (block_size, shares) in [32, 64, 128].into_iter().zip(documented) {
        let mut measured = vec![];
        for (metric, power) in metrics() {
            let nf4_error = expected_error(block_size, &NF4, power, false);
            for signed in [false, true] {
                let table = block_optimal(block_size, 4, metric, signed).unwrap();
                let error = expected_error(block_size, &table, power, signed);
                assert!(error < nf4_error, "{block_size} {metric:?} {signed}: {error} against {nf4_error}");
                measured.push(((1.0 - error / nf4_error) * 1000.0).round() as i32);
            }
        }
        assert_eq!(measured, shares, "block size {block_size}");
    }
}

#[test]
fn block_optimal_beats_nf4_on_drawn_blocks() {
    let samples = normal_samples(1 << 20);
    for block_size in [32, 64, 128] {
        let nf4_error = quantization_error(&samples, block_size, &NF4, 2, false);
        for signed in [false, true] {
            let table = block_optimal(block_size, 4, Metric::Mse, signed).unwrap();
            let error = quantization_error(&samples, block_size, &table, 2, signed);
            assert!(error < nf4_error, "{block_size} {signed}");
            // A million draws say the same as the integral.
            let expected = expected_error(block_size, &table, 2, signed);
            assert!((error / expected - 1.0).abs() < 0.005, "{block_size} {signed}: {error} against {expected}");
        }
    }
}

#[test]
fn no_value_of_block_optimal_can_move_for_the_better() {
    for (block_size, signed) in [(2, false), (16, true), (64, false), (64, true), (4096, false)] {
        for (metric, power) in metrics() {
            let table = block_optimal(block_size, 3, metric, signed).unwrap();
            let least = expected_error(block_size, &table, power, signed);
            for i in 0..table.len() {
                if table[i] == 0.0 || table[i].abs() == 1.0 {
                    continue;
                }
                for step in [-0.004, 0.004] {
                    let mut moved = table.clone();
                    moved[i] += step;
                    assert!(expected_error(block_size, &moved, power, signed) > least, "{block_size} {metric:?} {i}");
                }
            }
        }
    }
}

#[test]
fn block_optimal_keeps_zero_and_the_ends_at_every_size() {
    for block_size in [2, 3, 16, 4096, 1 << 24] {
        for (metric, _) in metrics() {
            for (bits, signed) in [(2, false), (2, true), (4, false), (4, true), (8, false), (8, true)] {
                let table = block_optimal(block_size, bits, metric, signed).unwrap();
                assert_eq!(table.len(), 1 << bits);
                assert!(is_ascending(&table));
                assert!(table.contains(&0.0) && table[table.len() - 1] == 1.0);
                assert!(if signed { table[0] > -1.0 } else { table[0] == -1.0 });
            }
        }
    }
}

#[test]
fn fit_blocks_beats_the_tables_made_for_normal_weights() {
    // Skewed and heavy-tailed, in rows that are no multiple of the block size.
    let samples: Vec<f32> = normal_samples(200 * 500).iter().map(|x| x * x.abs() + 0.3 * x).collect();
    let rows = |table: &[f32], signed| {
        samples.chunks(200).map(|row| quantization_error(row, 64, table, 2, signed)).sum::<f64>() / 500.0
    };
    for signed in [false, true] {
        let fitted = fit_blocks(&samples, 200, 64, 4, signed).unwrap();
        assert!(fitted.contains(&0.0) && is_ascending(&fitted));
        for table in [NF4.to_vec(), block_optimal(64, 4, Metric::Mse, signed).unwrap(), quantile(&fitted, 4).unwrap()] {
            assert!(rows(&fitted, signed) < rows(&table, signed));
        }
    }
}

#[test]
fn fit_blocks_ignores_blocks_of_zeros_and_the_unit() {
    let samples = normal_samples(64 * 256);
    let table = fit_blocks(&samples, 256, 64, 4, false).unwrap();
    let with_zeros: Vec<f32> = samples.chunks(256).flat_map(|row| row.iter().copied().chain([0.0; 64])).collect();
    assert_eq!(fit_blocks(&with_zeros, 320, 64, 4, false).unwrap(), table);
    for exponent in [-120, 100] {
        let scaled: Vec<f32> = samples.iter().map(|x| x * 2.0_f32.powi(exponent)).collect();
        assert_eq!(fit_blocks(&scaled, 256, 64, 4, false).unwrap(), table);
    }
    assert_eq!(fit_blocks(&[0.0; 6], 3, 2, 2, false).unwrap(), [0.0; 4]);
}

#[test]
fn fit_of_large_data_is_a_fixed_point_of_lloyd() {
    let samples = normal_samples(300_000);
    let table = fit(&samples, 4, None).unwrap();
    let mut sums = [(0.0, 0.0); 16];
    let codebook = Codebook::new(&table).unwrap();
    for &x in &samples {
        let (sum, count) = &mut sums[codebook.encode(x) as usize];
        *sum += f64::from(x);
        *count += 1.0;
    }
    for (value, (sum, count)) in table.iter().zip(sums) {
        assert!((f64::from(*value) - sum / count).abs() < 1e-4, "{value} is not the mean {}", sum / count);
    }
    // 0.009497: the error of the best 16 values for N(0, 1) (Max 1960).
    let error = error_of(&table, &samples, &vec![1.0; samples.len()]) / samples.len() as f64;
    assert!((error / 0.009_497 - 1.0).abs() < 0.02, "{error}");
}

/// The least error of any cut of sorted samples into `cells` runs, by trying all.
fn least_error(samples: &[f32], weights: &[f32], cells: usize) -> f64 {
    let run_error = |run: std::ops::Range<usize>| {
        let (x, w) = (&samples[run.clone()], &weights[run]);
        let mass: f64 = w.iter().map(|&w| f64::from(w)).sum();
        let mean = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>() / mass;
        x.iter().zip(w).map(|(&x, &w)| f64::from(w) * (f64::from(x) - mean).powi(2)).sum::<f64>()
    };
    if cells == 1 || samples.len() <= 1 {
        return if samples.is_empty() { 0.0 } else { run_error(0..samples.len()) };
    }
    (1..=samples.len())
        .map(|cut| run_error(0..cut) + least_error(&samples[cut..], &weights[cut..], cells - 1))
        .fold(f64::INFINITY, f64::min)
}

proptest! {
    #[test]
    fn fit_finds_the_best_values_of_all(
        pairs in prop::collection::vec((-100.0_f32..100.0, 0.01_f32..10.0), 1..12), bits in 1_u32..3,
    ) {
        let mut pairs = pairs;
        pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (samples, weights): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        let table = fit(&samples, bits, Some(&weights)).unwrap();
        let error = error_of(&table, &samples, &weights);
        let scale: f64 = error_of(&[0.0], &samples, &weights);
        prop_assert!(error <= least_error(&samples, &weights, 1 << bits) + 1e-10 * scale);
    }

    #[test]
    fn fit_is_never_worse_than_quantiles_or_normal_float(
        samples in prop::collection::vec(prop_oneof![-1.0_f32..1.0, Just(0.0), -1e-3_f32..1e-3], 1..300), bits in 2_u32..6,
    ) {
        let weights = vec![1.0; samples.len()];
        let table = fit(&samples, bits, None).unwrap();
        prop_assert_eq!(table.len(), 1 << bits);
        prop_assert!(table.windows(2).all(|pair| pair[0] <= pair[1]));
        let error = error_of(&table, &samples, &weights);
        for start in [quantile(&samples, bits).unwrap(), normal_float(bits).unwrap()] {
            prop_assert!(error <= error_of(&start, &samples, &weights) + 1e-10);
        }
    }

    #[test]
    fn fit_keeps_samples_that_are_few_enough(distinct in prop::collection::btree_set(-1000_i32..1000, 1..16)) {
        let samples: Vec<f32> = distinct.iter().map(|&x| x as f32 / 7.0).collect();
        let table = fit(&samples, 4, None).unwrap();
        prop_assert!(samples.iter().all(|x| table.contains(x)));
        prop_assert!(table.iter().all(|value| samples.contains(value)));
    }

    #[test]
    fn fit_weighs_a_sample_as_its_copies(
        pairs in prop::collection::vec((-8.0_f32..8.0, 0_u8..4), 1..40).prop_filter("a weight", |p| p.iter().any(|x| x.1 > 0)),
    ) {
        let copies: Vec<f32> = pairs.iter().flat_map(|&(x, count)| vec![x; count.into()]).collect();
        let (samples, weights): (Vec<f32>, Vec<f32>) = pairs.iter().map(|&(x, count)| (x, f32::from(count))).unzip();
        let ones = vec![1.0; copies.len()];
        let weighted = error_of(&fit(&samples, 2, Some(&weights)).unwrap(), &copies, &ones);
        let copied = error_of(&fit(&copies, 2, None).unwrap(), &copies, &ones);
        prop_assert!((weighted - copied).abs() <= 1e-9);
    }

    #[test]
    fn fit_follows_the_unit(samples in prop::collection::vec(-1.0_f32..1.0, 1..100), exponent in -20_i32..20) {
        let factor = 2.0_f32.powi(exponent);
        let scaled: Vec<f32> = samples.iter().map(|x| x * factor).collect();
        let expected: Vec<f32> = fit(&samples, 3, None).unwrap().iter().map(|value| value * factor).collect();
        prop_assert_eq!(fit(&scaled, 3, None).unwrap(), expected);
    }

    #[test]
    fn fit_blocks_keeps_zero(
        samples in prop::collection::vec(-1.0_f32..1.0, 1..200), row in 1_usize..50, block in 1_usize..70,
        bits in 2_u32..6, signed: bool,
    ) {
        let table = fit_blocks(&samples, row, block, bits, signed).unwrap();
        prop_assert_eq!(table.len(), 1 << bits);
        prop_assert!(table.contains(&0.0));
        prop_assert!(table.windows(2).all(|pair| pair[0] <= pair[1]));
        prop_assert!(table.iter().all(|value| value.abs() <= 1.0));
    }

    #[test]
    fn quantile_is_sorted_and_keeps_zero(
        samples in prop::collection::vec(prop_oneof![-5.0_f32..5.0, Just(-1.0), Just(0.0), Just(1.0)], 1..200), bits in 2_u32..=8,
    ) {
        let table = quantile(&samples, bits).unwrap();
        prop_assert_eq!(table.len(), 1 << bits);
        prop_assert!(table.windows(2).all(|pair| pair[0] <= pair[1]));
        let both_signs = samples.iter().any(|&x| x <= 0.0) && samples.iter().any(|&x| x >= 0.0);
        prop_assert!(!both_signs || table.contains(&0.0));
    }
}

#[test]
fn errors_name_the_argument_and_what_it_takes() {
    let message = |result: lowbit_core::Result<Vec<f32>>| result.unwrap_err().to_string();
    assert_eq!(message(normal_float(1)), "bits: got 1, expected an integer from 2 to 8");
    assert_eq!(message(normal_float(9)), "bits: got 9, expected an integer from 2 to 8");
    assert_eq!(message(quantile(&[1.0], 0)), "bits: got 0, expected an integer from 2 to 8");
    assert_eq!(message(quantile(&[], 4)), "samples: got no values, expected one value or more");
    assert_eq!(message(quantile(&[0.0, f32::NAN], 4)), "samples: got NaN at index 1, expected finite values");
    assert_eq!(message(block_optimal(1, 4, Metric::Mse, false)), "block_size: got 1, expected an integer of 2 or more");
    assert_eq!(Metric::parse("rms").unwrap_err().to_string(), "metric: got \"rms\", expected \"mse\" or \"mae\"");
    assert_eq!(message(block_optimal(64, 1, Metric::Mse, true)), "bits: got 1, expected an integer from 2 to 8");
    assert_eq!(message(fit(&[1.0], 0, None)), "bits: got 0, expected an integer from 1 to 8");
    assert_eq!(message(fit(&[f32::INFINITY], 4, None)), "samples: got inf at index 0, expected finite values");
    assert_eq!(
        message(fit(&[1.0, 2.0], 4, Some(&[1.0]))),
        "weights: got 1 values, expected 2 values, one for each sample"
    );
    assert_eq!(
        message(fit(&[1.0, 2.0], 4, Some(&[1.0, -1.0]))),
        "weights: got -1 at index 1, expected finite values of 0 or more"
    );
    assert_eq!(message(fit(&[1.0], 4, Some(&[0.0]))), "weights: got only zeros, expected at least one positive value");
    assert_eq!(message(fit_blocks(&[1.0], 1, 0, 4, false)), "block_size: got 0, expected an integer of 1 or more");
    assert_eq!(message(fit_blocks(&[1.0], 0, 64, 4, false)), "row_length: got 0, expected an integer of 1 or more");
}
