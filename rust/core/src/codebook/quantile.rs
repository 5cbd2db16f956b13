//! Equal-probability codebooks.

use rayon::slice::ParallelSliceMut;

use super::normal::check_bits;
use crate::{Error, Result};

/// 2^bits values (2 to 8 bits) between which `samples` are spread equally, ascending, in the unit of the samples.
///
/// Value `i` is the quantile at `(i + 1/2) / 2^bits`, the median of the `i`-th of 2^bits equally probable cells,
/// interpolated linearly between neighbouring samples. Where zero lies in the range of the samples, the value nearest to
/// it becomes zero (the lower of two), so that padding and pruned weights stay exact.
pub fn quantile(samples: &[f32], bits: u32) -> Result<Vec<f32>> {
    check_bits(bits, 2)?;
    check_samples(samples)?;
    let mut sorted = samples.to_vec();
    sorted.par_sort_unstable_by(f32::total_cmp);
    let count = 1_u32 << bits;
    let mut values: Vec<f32> =
        (0..count).map(|i| interpolate(&sorted, (f64::from(i) + 0.5) / f64::from(count))).collect();
    if sorted[0] <= 0.0 && sorted[sorted.len() - 1] >= 0.0 {
        let nearest = nearest_to_zero(&values);
        values[nearest] = 0.0;
    }
    Ok(values)
}

/// The index of the ascending value nearest to zero: of equal ones that which can become zero without disorder.
fn nearest_to_zero(values: &[f32]) -> usize {
    let negative = values.partition_point(|&value| value < 0.0);
    let lower_is_nearer = negative > 0 && values.get(negative).is_none_or(|upper| -values[negative - 1] <= *upper);
    if lower_is_nearer { negative - 1 } else { negative }
}

/// The samples that every codebook of data takes: at least one, all finite.
pub(super) fn check_samples(samples: &[f32]) -> Result<()> {
    if samples.is_empty() {
        return Err(Error::invalid("samples", "no values", "one value or more"));
    }
    match samples.iter().position(|sample| !sample.is_finite()) {
        Some(index) => {
            let got = format!("{} at index {index}", samples[index]);
            Err(Error::invalid("samples", got, "finite values"))
        }
        None => Ok(()),
    }
}

/// The quantile at probability `p` as `numpy.quantile` has it.
fn interpolate(sorted: &[f32], p: f64) -> f32 {
    let position = p * (sorted.len() - 1) as f64;
    let below = f64::from(sorted[position as usize]);
    let above = f64::from(sorted[(position as usize + 1).min(sorted.len() - 1)]);
    (below + (above - below) * position.fract()) as f32
}
