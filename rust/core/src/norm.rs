//! What is asked of `RMSNorm` and `LayerNorm`, on any device.

use crate::{Error, Result};

/// `y = (t - mean) / sqrt(mean((t - mean)^2) + eps) * weight + bias` of every row of `t = x + residual`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// What is added to the mean square.
    pub eps: f32,
    /// `LayerNorm`: the mean is subtracted. It is zero in `RMSNorm`.
    pub is_centered: bool,
    /// Gemma: the factor is `1 + weight`.
    pub has_unit_offset: bool,
    /// Llama: the normalized number is rounded to the dtype before it is multiplied by the weight.
    pub rounds_normalized: bool,
}

impl Norm {
    /// What is added to the weight.
    pub(crate) fn offset(self) -> f32 {
        if self.has_unit_offset { 1.0 } else { 0.0 }
    }

    /// Refuses what no kernel does.
    pub(crate) fn check(self) -> Result<()> {
        if self.is_centered && self.rounds_normalized {
            return Err(Error::invalid("norm", "a centered one that rounds before it multiplies", "one of the two"));
        }
        Ok(())
    }
}
