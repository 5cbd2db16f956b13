//! Normal-float codebooks: quantiles of the normal distribution (arXiv 2305.14314, section 3 and appendix E).

use std::f64::consts::{FRAC_1_SQRT_2, PI};
use std::sync::OnceLock;

use super::Codebook;
use super::dynamic::linspace;
use crate::{Error, Result};

/// The NF4 table, `normal_float(4)`: what bitsandbytes' checkpoints store, to the last bit.
pub fn nf4() -> Codebook {
    static NF4: OnceLock<Codebook> = OnceLock::new();
    NF4.get_or_init(build_nf4).clone()
}

fn build_nf4() -> Codebook {
    let values = normal_float(4).expect("4 is a number of bits");
    Codebook::new(&values).expect("sixteen finite values make a codebook")
}

/// The 2^bits normal-float values, ascending, for 2 to 8 bits.
///
/// They are quantiles of N(0, 1) over the largest one: 2^(bits-1) above zero and one fewer below, at probabilities
/// that are evenly spaced from an outermost one to 1/2 on either side, with zero in between. So -1, 0 and 1 are exact.
pub fn normal_float(bits: u32) -> Result<Vec<f32>> {
    check_bits(bits, 2)?;
    let half = 1 << (bits - 1);
    let outermost = outermost_probability(bits);
    let side = |count: usize| -> Vec<f32> {
        linspace(outermost, 0.5, count + 1)[..count]
            .iter()
            .map(|&p| quantile_above_median(f64::from(p)) as f32)
            .collect()
    };
    let (below, above) = (side(half - 1), side(half));
    let largest = above[0];
    let negative = below.iter().map(|value| -value / largest);
    let positive = above.iter().rev().map(|value| value / largest);
    Ok(negative.chain([0.0]).chain(positive).collect())
}

/// Codebooks that keep zero exactly need 2 bits, those that need not have 1; all stop at 8.
pub(super) fn check_bits(bits: u32, fewest: u32) -> Result<()> {
    if (fewest..=8).contains(&bits) {
        Ok(())
    } else {
        Err(Error::invalid("bits", bits, format!("an integer from {fewest} to 8")))
    }
}

/// Where the outermost quantiles lie: half a cell from the end, averaged over 2^bits cells and the 2^bits - 1 that
/// the values other than zero leave. For 4 bits the published 0.9677083 has seven decimals, and the last bits of
/// the NF4 table follow from that, so the other widths are rounded alike.
fn outermost_probability(bits: u32) -> f32 {
    let cells = f64::from(1 << bits);
    let probability = 1.0 - f64::midpoint(0.5 / cells, 0.5 / (cells - 1.0));
    ((probability * 1e7).round() / 1e7) as f32
}

/// The quantile of N(0, 1) at `p`, 1/2 <= p < 1. The cumulative function is concave there, so Newton's method started
/// at the median climbs to the root without overshooting.
fn quantile_above_median(p: f64) -> f64 {
    let mut z = 0.0;
    loop {
        let step = (p - 0.5 - probability_from_zero(z)) / density(z);
        z += step;
        if step <= 1e-15 * z {
            return z;
        }
    }
}

/// Density of N(0, 1).
pub(super) fn density(z: f64) -> f64 {
    libm::exp(-0.5 * z * z) / (2.0 * PI).sqrt()
}

/// Probability that a draw from N(0, 1) lies between 0 and `z`.
pub(super) fn probability_from_zero(z: f64) -> f64 {
    0.5 * libm::erf(z * FRAC_1_SQRT_2)
}
