//! Codebooks: the values that codes stand for. The only place where such a table is made.

use crate::{Error, Result};

mod block_optimal;
mod dynamic;
mod fit;
mod fp4;
mod int;
mod normal;
mod quantile;

pub use block_optimal::{Metric, block_optimal};
pub use dynamic::dynamic_map;
pub use fit::{fit, fit_blocks};
pub use fp4::fp4;
pub use int::{int4, uint4};
pub use normal::{nf4, normal_float};
pub use quantile::quantile;

/// Values in a 4-bit table.
pub const LEN: usize = 16;

/// Up to 16 code values and how a number is rounded to one of them.
///
/// A number `u` (a weight over its block's scale) becomes the code of rank `#{t in thresholds: u > t}` among the
/// sorted values, so a tie goes to the lower value unless a threshold says otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    values: [f32; LEN],
    thresholds: [f32; LEN - 1],
    order: [u8; LEN],
    limit: f32,
    len: usize,
}

impl Codebook {
    /// A codebook of 2 to 16 finite values, code `i` standing for `values[i]`, in any order.
    ///
    /// Values within [-1, 1] are relative to the block's absolute maximum. A table that goes beyond, such as -8..7,
    /// is scaled so that the absolute maximum falls on the largest magnitude that both signs reach (7).
    pub fn new(values: &[f32]) -> Result<Self> {
        if values.len() < 2 || values.len() > LEN {
            return Err(Error::invalid("codebook", format!("{} values", values.len()), "2 to 16 values"));
        }
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::invalid("codebook", format!("a value of {bad}"), "finite values"));
        }
        let mut order: Vec<u8> = (0..values.len() as u8).collect();
        order.sort_by(|&a, &b| values[a as usize].total_cmp(&values[b as usize]));
        let sorted: Vec<f32> = order.iter().map(|&code| values[code as usize]).collect();
        let midpoints: Vec<f32> = sorted.windows(2).map(|pair| pair[0] * 0.5 + pair[1] * 0.5).collect();
        let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
        let limit = if low >= -1.0 && high <= 1.0 {
            1.0
        } else if low < 0.0 && high > 0.0 {
            high.min(-low)
        } else {
            high.max(-low)
        };
        Ok(Self::assemble(values, &order, &midpoints, limit))
    }

    /// Pads the tables to 16: unused codes read as 0 and no number is rounded to them.
    fn assemble(values: &[f32], order: &[u8], thresholds: &[f32], limit: f32) -> Self {
        let mut codebook = Self {
            values: [0.0; LEN],
            thresholds: [f32::INFINITY; LEN - 1],
            order: [0; LEN],
            limit,
            len: values.len(),
        };
        codebook.values[..values.len()].copy_from_slice(values);
        codebook.thresholds[..thresholds.len()].copy_from_slice(thresholds);
        codebook.order[..order.len()].copy_from_slice(order);
        codebook
    }

    /// The value of each code; codes from [`Codebook::len`] on read as 0.
    pub fn values(&self) -> &[f32; LEN] {
        &self.values
    }

    /// Ascending thresholds between the sorted values, padded with infinity.
    pub fn thresholds(&self) -> &[f32; LEN - 1] {
        &self.thresholds
    }

    /// The code of each rank: `values[order[0]]` is the smallest value.
    pub fn order(&self) -> &[u8; LEN] {
        &self.order
    }

    /// Whether codes are ranks: the values ascend with the code.
    pub fn is_sorted(&self) -> bool {
        self.order[..self.len].is_sorted()
    }

    /// The magnitude that a block's absolute maximum is mapped to: `scale = absmax / limit`.
    pub fn limit(&self) -> f32 {
        self.limit
    }

    /// Number of codes in use.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// The rank among the sorted values that `u` is rounded to; NaN takes the lowest.
    pub fn rank(&self, u: f32) -> u8 {
        self.thresholds.iter().filter(|&&threshold| u > threshold).count() as u8
    }

    /// The code that `u` is rounded to.
    pub fn encode(&self, u: f32) -> u8 {
        self.order[self.rank(u) as usize]
    }

    /// The largest distance from any number of [-limit, limit] to the nearest value, in units of the limit: the bound
    /// on the error of a block over its absolute maximum. Half the largest gap for tables that reach both ends.
    pub fn covering_radius(&self) -> f32 {
        let sorted: Vec<f32> = self.order[..self.len].iter().map(|&code| self.values[code as usize]).collect();
        let inner = sorted.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max);
        let ends = (self.limit - sorted[self.len - 1]).max(sorted[0] + self.limit);
        inner.max(ends) / self.limit
    }
}
