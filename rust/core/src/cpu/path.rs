//! Which kernel multiplies: one table of costs.

use super::decode;
use super::dot::Arithmetic;
use super::isa::Isa;
use super::linear::TOKENS_AT_ONCE;
use super::panel::{self, Direction};
#[cfg(target_arch = "x86_64")]
use super::x86::amx::Numbers;
use crate::dtype::Dtype;
use crate::storage::PackedWeight;
use crate::{Error, Result};

/// What activations may be rounded to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ActivationFormat {
    /// They stay what they are.
    None,
    /// int8 with a scale for 64 of them, or for a row beside int8 weights with a scale a row, wherever that is faster.
    /// Beside those, columns with a magnitude of `threshold` or more stay what they are; it may be infinite.
    Int8 {
        /// The smallest outlier.
        threshold: f32,
    },
    /// As [`Self::Int8`], beside int8 weights with a scale a row alone, and where that is much faster.
    Auto {
        /// The smallest outlier.
        threshold: f32,
    },
}

impl ActivationFormat {
    /// The one that is called `name`; a threshold of 0 is none.
    pub fn parse(name: &str, threshold: f32) -> Result<Self> {
        if threshold.is_nan() || threshold < 0.0 {
            return Err(Error::invalid("threshold", threshold.to_string(), "a positive number, or 0 for none"));
        }
        let threshold = if threshold == 0.0 { f32::INFINITY } else { threshold };
        match name {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8 { threshold }),
            "auto" => Ok(Self::Auto { threshold }),
            _ => Err(Error::invalid("activation", format!("{name:?}"), "\"none\", \"int8\" or \"auto\"")),
        }
    }

    /// The smallest outlier.
    pub(super) fn threshold(self) -> f32 {
        match self {
            Self::None => f32::INFINITY,
            Self::Int8 { threshold } | Self::Auto { threshold } => threshold,
        }
    }
}

/// A kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Rows decoded in registers, a few tokens at a time.
    Decode(Arithmetic),
    /// Panels decoded once for many tokens.
    Panel(panel::Numbers),
    /// Tiles of AMX.
    #[cfg(target_arch = "x86_64")]
    Tiles(Numbers),
}

/// Time of one thread for 128 weights, in units of 1/2.6 ns: `weights` whatever the number of tokens, `tokens` for each
/// token or, of tiles, for 16 of them. Measured with NF4 in blocks of 64 (docs/cpu.md), on Zen 4 what is for AVX-512 BF16 and
/// on Sapphire Rapids the rest, but on Cascade Lake what is for AVX-512 VNNI: there in proportion to each other, since it
/// is slower throughout. Other formats shift all of a line alike.
#[derive(Clone, Copy)]
struct Cost {
    weights: f32,
    tokens: f32,
}

/// The costs on an instruction set.
struct Costs {
    fp32: Cost,
    int16: Cost,
    int8: Cost,
    panel: Cost,
    /// In bf16, decoding and panels; none where no instruction multiplies it, or slowly.
    bf16: Option<[Cost; 2]>,
    /// Panels of codes of int8; none where no instruction multiplies them so.
    int8_panel: Option<Cost>,
    /// One product of parts; none where there are no tiles.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    tiles: Option<Cost>,
}

/// Tiles of int8 beside int8 weights by row, in proportion to those of bf16: codes are copied and not widened, and a tile
/// has twice the terms.
#[cfg(target_arch = "x86_64")]
const INT8_TILES: Cost = Cost { weights: 13.0, tokens: 5.5 };

/// How much faster rounded activations have to be for [`ActivationFormat::Auto`] to take them, also with many tokens: where
/// they do not pay then, nobody looks for them.
const AUTO_GAIN: f32 = 1.4;

/// Time in which a thread reads 64 bytes, 128 weights of 4 bits, from memory: no pass over the weight is faster.
const READ: f32 = 11.0;

const fn costs(isa: Isa) -> Costs {
    const fn cost(weights: f32, tokens: f32) -> Cost {
        Cost { weights, tokens }
    }
    let tiles = if matches!(isa, Isa::Amx) { Some(cost(20.0, 10.0)) } else { None };
    match isa {
        Isa::Avx512Bf16 => Costs {
            fp32: cost(3.0, 9.1),
            int16: cost(8.5, 5.0),
            int8: cost(13.0, 4.9),
            panel: cost(57.0, 5.8),
            bf16: Some([cost(5.0, 4.2), cost(37.0, 3.05)]),
            int8_panel: Some(cost(18.0, 1.7)),
            tiles,
        },
        Isa::Avx512Vnni => Costs {
            fp32: cost(9.0, 9.0),
            int16: cost(9.0, 8.25),
            int8: cost(7.0, 6.0),
            panel: cost(100.0, 5.4),
            bf16: None,
            int8_panel: Some(cost(26.0, 1.3)),
            tiles,
        },
        Isa::Amx => Costs {
            fp32: cost(9.0, 5.0),
            int16: cost(5.5, 4.0),
            int8: cost(3.5, 3.0),
            panel: cost(30.0, 5.0),
            bf16: None,
            int8_panel: Some(cost(18.0, 1.7)),
            tiles,
        },
        Isa::Avx512 => Costs {
            fp32: cost(9.0, 5.0),
            int16: cost(5.5, 6.0),
            int8: cost(3.5, 6.0),
            panel: cost(30.0, 5.0),
            bf16: None,
            int8_panel: None,
            tiles,
        },
        Isa::Avx2 | Isa::Neon | Isa::Scalar => Costs {
            fp32: cost(28.0, 8.0),
            int16: cost(8.0, 10.0),
            int8: cost(6.0, 8.0),
            panel: cost(60.0, 9.0),
            bf16: None,
            int8_panel: None,
            tiles,
        },
    }
}

impl Path {
    /// Whether activations are rounded to int8.
    pub(super) fn is_int8(self) -> bool {
        match self {
            Self::Decode(arithmetic) => arithmetic == Arithmetic::Int8,
            Self::Panel(numbers) => numbers == panel::Numbers::Int8,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(numbers) => numbers == Numbers::Int8,
        }
    }
}

/// The kernel for a product of `tokens` activations of a dtype, which may round them as `format` says.
pub(super) fn choose(
    isa: Isa,
    weight: &PackedWeight<'_>,
    direction: Direction,
    format: ActivationFormat,
    (tokens, dtype): (usize, Dtype),
) -> Path {
    let fastest = |rounds: bool, tokens: usize| fastest(isa, weight, direction, rounds, (tokens, dtype));
    let pays = |tokens: usize| fastest(false, tokens).1 >= AUTO_GAIN * fastest(true, tokens).1;
    let rounds = match format {
        ActivationFormat::None => false,
        ActivationFormat::Int8 { .. } => true,
        ActivationFormat::Auto { .. } => weight.is_int8_by_rows() && pays(tokens) && pays(TOKENS_AT_ONCE),
    };
    fastest(rounds, tokens).0
}

/// From how many tokens on activations of a dtype are rounded to int8; none if never.
pub fn rounded_from(weight: &PackedWeight<'_>, format: ActivationFormat, dtype: Dtype) -> Result<Option<usize>> {
    let isa = Isa::current()?;
    let is_int8 = |&tokens: &usize| choose(isa, weight, Direction::Forward, format, (tokens, dtype)).is_int8();
    Ok((1..=TOKENS_AT_ONCE).find(is_int8))
}

/// The fastest kernel, and its cost; one that `rounds` may take int8 for activations.
fn fastest(
    isa: Isa,
    weight: &PackedWeight<'_>,
    direction: Direction,
    rounds: bool,
    (tokens, dtype): (usize, Dtype),
) -> (Path, f32) {
    let costs = costs(isa);
    let tokens = tokens as f32;
    let panel = |cost: Cost| cost.weights + cost.tokens * tokens;
    let in_bf16 = costs.bf16.filter(|_| dtype == Dtype::Bfloat16);
    let mut best = (Path::Panel(panel::Numbers::Fp32), panel(costs.panel));
    let mut consider = |path: Path, cost: f32| {
        if cost < best.1 {
            best = (path, cost);
        }
    };
    if direction == Direction::Forward && !weight.layout().straddles_rows {
        let at_once = decode::most_tokens(isa) as f32;
        let passes = (tokens / at_once).ceil();
        let decode = |cost: Cost| passes * (cost.weights + cost.tokens * tokens.min(at_once)).max(READ);
        consider(Path::Decode(Arithmetic::Fp32), decode(costs.fp32));
        if dtype != Dtype::Float32 {
            consider(Path::Decode(Arithmetic::Int16), decode(costs.int16));
        }
        if let Some([cost, _]) = in_bf16.filter(|_| weight.codebook().is_some()) {
            consider(Path::Decode(Arithmetic::Bf16), decode(cost));
        }
        if rounds {
            consider(Path::Decode(Arithmetic::Int8), decode(costs.int8));
        }
    }
    if let Some(cost) =
        costs.int8_panel.filter(|_| rounds && direction == Direction::Forward && weight.is_int8_by_rows())
    {
        consider(Path::Panel(panel::Numbers::Int8), panel(cost));
    }
    if let Some([_, cost]) = in_bf16 {
        consider(Path::Panel(panel::Numbers::Bf16), panel(cost));
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(tiles) = costs.tiles {
        let numbers = tile_numbers(weight, direction, rounds, dtype);
        let products = numbers.product_count() as f32;
        let tiles = if numbers == Numbers::Int8 { INT8_TILES } else { tiles };
        let weights = tiles.weights * numbers.w_parts() as f32;
        consider(Path::Tiles(numbers), weights + products * tiles.tokens * (tokens / 16.0).ceil());
    }
    best
}

/// What tiles hold for the activations: as many parts as their dtype has of bf16, and enough of the weight's that the
/// result is as exact as the dtype. bf16 activations meet weights rounded to bf16, as a bf16 layer of torch holds them.
#[cfg(target_arch = "x86_64")]
fn tile_numbers(weight: &PackedWeight<'_>, direction: Direction, rounds: bool, dtype: Dtype) -> Numbers {
    /// Longest row whose sums of int8 products fit int32.
    const LONGEST: usize = i32::MAX as usize / (128 * 127);
    // Codes of int8 with a scale a row are multiplied as they are.
    let is_exact = weight.is_int8_by_rows() && direction == Direction::Forward;
    if is_exact && rounds && weight.layout().cols <= LONGEST {
        return Numbers::Int8;
    }
    let x_parts = match dtype {
        Dtype::Bfloat16 => 1,
        Dtype::Float16 => 2,
        Dtype::Float32 => 3,
    };
    Numbers::Bf16 { x_parts, w_parts: if is_exact { 1 } else { x_parts } }
}
