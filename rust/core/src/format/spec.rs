//! The description of a quantized format.

use crate::codebook::{self, Codebook};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// The family of code values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Quantiles of the normal distribution (QLoRA).
    Nf4,
    /// bitsandbytes' 4-bit float.
    Fp4,
    /// Integers -8..7, symmetric.
    Int4,
    /// Integers 0..15 with a shift per block: the block's minimum.
    Uint4,
    /// Integers -127..127.
    Int8,
    /// Integers 0..255, stored less 128, with a shift per block: the middle of its range.
    Uint8,
    /// A table of up to 16 values that travels with the weight.
    Custom,
}

impl Format {
    /// Every format, in the order of the documentation.
    pub const ALL: [Self; 7] = [Self::Nf4, Self::Fp4, Self::Int4, Self::Uint4, Self::Int8, Self::Uint8, Self::Custom];

    /// The name in the Python API and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Int4 => "int4",
            Self::Uint4 => "uint4",
            Self::Int8 => "int8",
            Self::Uint8 => "uint8",
            Self::Custom => "custom",
        }
    }

    /// The format that is called `name`.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            Error::invalid(
                "format",
                format!("{name:?}"),
                "\"nf4\", \"fp4\", \"int4\", \"uint4\", \"int8\", \"uint8\" or \"custom\"",
            )
        })
    }

    /// Bits of one code.
    pub const fn bits(self) -> usize {
        match self {
            Self::Int8 | Self::Uint8 => 8,
            _ => 4,
        }
    }

    /// Whether a block has a shift beside its scale.
    pub const fn has_shift(self) -> bool {
        self.shift().is_some()
    }

    /// What the shift of a block is, where it has one.
    pub const fn shift(self) -> Option<Shift> {
        match self {
            Self::Uint4 => Some(Shift::Minimum),
            Self::Uint8 => Some(Shift::Middle),
            _ => None,
        }
    }

    /// The built-in 16-value table; none for 8 bits, whose codes are their own values, and for `custom`.
    pub fn codebook(self) -> Option<Codebook> {
        match self {
            Self::Nf4 => Some(codebook::nf4()),
            Self::Fp4 => Some(codebook::fp4()),
            Self::Int4 => Some(codebook::int4()),
            Self::Uint4 => Some(codebook::uint4()),
            Self::Int8 | Self::Uint8 | Self::Custom => None,
        }
    }
}

/// What a quantizer takes for the shift of a block, which is the weight that a code of 0 stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shift {
    /// The smallest weight: no code is below 0.
    Minimum,
    /// The middle between the smallest and the largest: codes are signed.
    Middle,
}

impl Shift {
    /// The shift, before it is stored, of a block of weights from `low` to `high`.
    pub fn of(self, low: f32, high: f32) -> f32 {
        match self {
            Self::Minimum => low,
            // In f64 the sum is exact enough to be rounded once. The middle of zeros of either sign is +0.
            Self::Middle => f64::midpoint(low.into(), high.into()) as f32 + 0.0,
        }
    }
}

/// How many consecutive weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockSize {
    /// This many weights: a power of two from 16 to 4096.
    Elements(usize),
    /// All weights of a row.
    Row,
}

impl BlockSize {
    /// Smallest block.
    pub const MIN: usize = 16;
    /// Largest block that is not a row.
    pub const MAX: usize = 4096;

    /// A block of `size` weights.
    pub fn elements(size: usize) -> Result<Self> {
        if size.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&size) {
            Ok(Self::Elements(size))
        } else {
            Err(Error::invalid("block_size", size, "a power of two from 16 to 4096, or \"row\""))
        }
    }
}

/// What a block runs along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockOrder {
    /// Every row starts a new block and a new byte; the last block of a row may be short.
    Row,
    /// Blocks run through the flattened matrix, as in bitsandbytes.
    Flat,
}

impl BlockOrder {
    /// The name in the Python API and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Row => "row",
            Self::Flat => "flat",
        }
    }

    /// The order that is called `name`.
    pub fn parse(name: &str) -> Result<Self> {
        [Self::Row, Self::Flat]
            .into_iter()
            .find(|order| order.name() == name)
            .ok_or_else(|| Error::invalid("block_order", format!("{name:?}"), "\"row\" or \"flat\""))
    }
}

/// Everything but the shape that says how a weight is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spec {
    /// The code values.
    pub format: Format,
    /// Weights that share a scale.
    pub block_size: BlockSize,
    /// What blocks run along.
    pub block_order: BlockOrder,
    /// Storage of scales and shifts. With `double_quant` it holds for shifts alone.
    pub scale_dtype: Dtype,
    /// Whether scales are stored as 8-bit codes with a scale per 256 of them.
    pub double_quant: bool,
    /// Whether a block's scale carries the sign of its largest weight, so that this weight is always mapped to +1
    /// (BOF4-S, arXiv 2505.06653). Only custom codebooks have a use for it.
    pub signed_absmax: bool,
}

impl Spec {
    /// Checks that the parts go together.
    pub fn validate(&self) -> Result<()> {
        if self.block_size == BlockSize::Row && self.block_order == BlockOrder::Flat {
            return Err(Error::invalid("block_order", "\"flat\" with block_size=\"row\"", "block_order=\"row\""));
        }
        if self.signed_absmax && self.format != Format::Custom {
            let got = format!("true with format \"{}\"", self.format.name());
            return Err(Error::invalid("signed_absmax", got, "false, or a custom codebook"));
        }
        Ok(())
    }

    /// The table of a 4-bit format, `custom` being that of a custom one; none for 8 bits.
    pub fn codebook(&self, custom: Option<&[f32]>) -> Result<Option<Codebook>> {
        match (self.format, custom) {
            (Format::Custom, Some(values)) => Codebook::new(values).map(Some),
            (Format::Custom, None) => {
                Err(Error::invalid("codebook", "none", "the 2 to 16 values of the custom format"))
            }
            (format, None) => Ok(format.codebook()),
            (format, Some(_)) => {
                let got = format!("a table with format \"{}\"", format.name());
                Err(Error::invalid("codebook", got, "none, or format \"custom\""))
            }
        }
    }
}
