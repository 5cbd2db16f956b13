//! Codebooks fitted to data: Lloyd-Max, which is k-means in one dimension.

use self::partition::{Partition, Span};
use self::samples::{Moments, WeightedSamples};
use super::normal::check_bits;
use super::quantile::check_samples;
use crate::{Error, Result};

mod partition;
mod samples;

/// The 2^bits values (1 to 8 bits), ascending, that minimise the squared distance of `samples` to the nearest value,
/// each sample counted with its weight (or 1). Values are in the unit of the samples; none is pinned, so zero is kept
/// only where it happens to be best. If there are fewer distinct samples than values, the largest is repeated.
///
/// Dynamic programming finds the best cells whose edges lie between groups of neighbouring samples (up to about 4096
/// groups, and one for each distinct sample where there are no more than 2048). Lloyd's iteration over the samples
/// themselves follows; it can only lower the error. Takes 8 bytes a sample, and about the time of sorting them. Weights
/// under 1e-16 of their sum may get lost.
pub fn fit(samples: &[f32], bits: u32, weights: Option<&[f32]>) -> Result<Vec<f32>> {
    check_bits(bits, 1)?;
    check_samples(samples)?;
    let pairs = match weights {
        Some(weights) => {
            check_weights(weights, samples.len())?;
            samples.iter().copied().zip(weights.iter().copied()).filter(|&(_, weight)| weight > 0.0).collect()
        }
        None => samples.iter().map(|&sample| (sample, 1.0)).collect(),
    };
    let samples = WeightedSamples::new(pairs);
    let count = 1 << bits;
    let span = Span { groups: 0..samples.group_count(), first: None, last: None };
    let values = Partition::new(&samples, span, count).values(count);
    Ok(to_table(&lloyd(&samples, values, None), count))
}

/// The value that [`fit_blocks`] leaves where it is.
const PINNED: f64 = 0.0;

/// The 2^bits values (2 to 8 bits), ascending, that minimise the squared error of `samples` quantized in blocks divided
/// by their absolute maximum (with `signed`, by the weight of largest magnitude with its sign): each is divided
/// likewise and counted with the square of its block's divisor. The same method as [`fit`]; blocks of zeros count for
/// nothing.
///
/// `samples` are rows of `row_length` weights one after another; blocks start anew at each row.
///
/// 0 is exact. The ends are not held to -1 and 1, since that leaves more error: of normal weights in blocks of 64, 3.6 %
/// more (0.8 % with `signed`). So a block's largest weight is decoded some percent short.
pub fn fit_blocks(samples: &[f32], row_length: usize, block_size: usize, bits: u32, signed: bool) -> Result<Vec<f32>> {
    check_bits(bits, 2)?;
    check_samples(samples)?;
    for (name, length) in [("row_length", row_length), ("block_size", block_size)] {
        if length == 0 {
            return Err(Error::invalid(name, length, "an integer of 1 or more"));
        }
    }
    let samples = WeightedSamples::new(normalize(samples, row_length, block_size, signed));
    let count = 1 << bits;
    let values = best_around_pinned(&samples, count - 1);
    Ok(to_table(&lloyd(&samples, values, Some(PINNED)), count))
}

/// The pinned value and `free` others, spread over its two sides in the best way.
fn best_around_pinned(samples: &WeightedSamples, free: usize) -> Vec<f64> {
    let zero = samples.first_group_from_zero();
    let below_zero = Span { groups: 0..zero, first: None, last: Some(PINNED) };
    let above_zero = Span { groups: zero..samples.group_count(), first: Some(PINNED), last: None };
    let negative = Partition::new(samples, below_zero, free);
    let positive = Partition::new(samples, above_zero, free);
    let error = |below: usize| negative.error(below) + positive.error(free - below);
    let below = (0..=free).min_by(|&a, &b| error(a).total_cmp(&error(b))).expect("0 is in the range");
    let mut values = negative.values(below);
    values.extend_from_slice(&positive.values(free - below)[1..]);
    values
}

/// Samples over their block's divisor, with the square of that divisor over the largest of all.
fn normalize(samples: &[f32], row_length: usize, block_size: usize, signed: bool) -> Vec<(f32, f32)> {
    // The first of several largest magnitudes gives the sign, as in the quantizer.
    let extent = |values: &[f32]| values.iter().fold(0.0_f32, |far, &x| if x.abs() > far.abs() { x } else { far });
    let largest = extent(samples).abs();
    let mut pairs = Vec::with_capacity(samples.len());
    for block in samples.chunks(row_length).flat_map(|row| row.chunks(block_size)) {
        let extent = extent(block);
        let divisor = if signed { extent } else { extent.abs() };
        let weight = (divisor / largest).powi(2);
        if weight > 0.0 {
            pairs.extend(block.iter().map(|sample| (sample / divisor, weight)));
        }
    }
    pairs
}

/// Lloyd's iteration: every value but the pinned one moves to the mean of the samples nearest to it, until none moves.
fn lloyd(samples: &WeightedSamples, mut values: Vec<f64>, pinned: Option<f64>) -> Vec<f64> {
    const MOST_ROUNDS: usize = 500;
    const TOLERANCE: f64 = 1e-9;
    let (least, greatest) = samples.range_of_groups(0, samples.group_count());
    for _ in 0..MOST_ROUNDS {
        let middles: Vec<f64> = values.windows(2).map(|pair| f64::midpoint(pair[0], pair[1])).collect();
        let (mut low, mut below) = (least, Moments::default());
        let mut furthest = 0.0_f64;
        for (i, value) in values.iter_mut().enumerate() {
            let (high, up_to_high) = match middles.get(i) {
                Some(&middle) => (middle, samples.moments_up_to(middle)),
                None => (greatest, samples.total()),
            };
            let cell = up_to_high - below;
            if cell.mass > 0.0 && pinned != Some(*value) {
                let mean = cell.mean_within(low, high);
                furthest = furthest.max((mean - *value).abs());
                *value = mean;
            }
            (low, below) = (high, up_to_high);
        }
        if furthest <= TOLERANCE * (greatest - least) {
            break;
        }
    }
    values
}

/// Rounds to fp32 and fills up to `count` values with the largest.
fn to_table(values: &[f64], count: usize) -> Vec<f32> {
    let mut table: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    table.resize(count, table[table.len() - 1]);
    table
}

fn check_weights(weights: &[f32], expected: usize) -> Result<()> {
    if weights.len() != expected {
        let got = format!("{} values", weights.len());
        return Err(Error::invalid("weights", got, format!("{expected} values, one for each sample")));
    }
    if let Some(index) = weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0)) {
        let got = format!("{} at index {index}", weights[index]);
        return Err(Error::invalid("weights", got, "finite values of 0 or more"));
    }
    if weights.iter().all(|&weight| weight == 0.0) {
        return Err(Error::invalid("weights", "only zeros", "at least one positive value"));
    }
    Ok(())
}
