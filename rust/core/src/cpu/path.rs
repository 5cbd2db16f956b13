//! Which kernel multiplies: one table of costs.

use super::activations::Activations;
use super::decode;
use super::dot::Arithmetic;
use super::isa::Isa;
use super::panel::Direction;
#[cfg(target_arch = "x86_64")]
use super::x86::amx::Numbers;
use crate::dtype::Dtype;
use crate::storage::PackedWeight;
use crate::{Error, Result};

/// What activations may be rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationFormat {
    /// They stay what they are.
    None,
    /// int8 with a scale for 64 of them, or for a row beside int8 weights with a scale a row, wherever that is faster.
    Int8,
}

impl ActivationFormat {
    /// The one that is called `name`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            _ => Err(Error::invalid("activation", format!("{name:?}"), "\"none\" or \"int8\"")),
        }
    }
}

/// A kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Rows decoded in registers, a few tokens at a time.
    Decode(Arithmetic),
    /// Panels decoded to fp32.
    Panel,
    /// Tiles of AMX.
    #[cfg(target_arch = "x86_64")]
    Tiles(Numbers),
}

/// Time of one thread for 128 weights, in units of 1/2.6 ns: `weights` whatever the number of tokens, `tokens` for each
/// token or, of tiles, for 16 of them. Measured on Sapphire Rapids with NF4 in blocks of 64 (docs/cpu.md); other formats
/// shift all of a line alike.
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
    /// One product of parts; none where there are no tiles.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    tiles: Option<Cost>,
}

/// Time in which a thread reads 64 bytes, 128 weights of 4 bits, from memory: no pass over the weight is faster.
const READ: f32 = 11.0;

const fn costs(isa: Isa) -> Costs {
    const fn cost(weights: f32, tokens: f32) -> Cost {
        Cost { weights, tokens }
    }
    let tiles = if matches!(isa, Isa::Amx) { Some(cost(20.0, 10.0)) } else { None };
    match isa {
        Isa::Amx | Isa::Avx512Vnni => {
            Costs { fp32: cost(9.0, 5.0), int16: cost(5.5, 4.0), int8: cost(3.5, 3.0), panel: cost(30.0, 5.0), tiles }
        }
        Isa::Avx512 => {
            Costs { fp32: cost(9.0, 5.0), int16: cost(5.5, 6.0), int8: cost(3.5, 6.0), panel: cost(30.0, 5.0), tiles }
        }
        Isa::Avx2 | Isa::Neon | Isa::Scalar => {
            Costs { fp32: cost(28.0, 8.0), int16: cost(8.0, 10.0), int8: cost(6.0, 8.0), panel: cost(60.0, 9.0), tiles }
        }
    }
}

/// The fastest kernel for a product that may round activations as `format` says.
pub(super) fn choose(
    isa: Isa,
    weight: &PackedWeight<'_>,
    direction: Direction,
    format: ActivationFormat,
    x: &Activations<'_>,
) -> Path {
    let costs = costs(isa);
    let tokens = x.tokens as f32;
    let mut best = (Path::Panel, costs.panel.weights + costs.panel.tokens * tokens);
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
        if x.values.dtype() != Dtype::Float32 {
            consider(Path::Decode(Arithmetic::Int16), decode(costs.int16));
        }
        if format == ActivationFormat::Int8 {
            consider(Path::Decode(Arithmetic::Int8), decode(costs.int8));
        }
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(tiles) = costs.tiles {
        let numbers = tile_numbers(weight, direction, format, x.values.dtype());
        let products = numbers.product_count() as f32;
        let weights = tiles.weights * numbers.w_parts() as f32;
        consider(Path::Tiles(numbers), weights + products * tiles.tokens * (tokens / 16.0).ceil());
    }
    best.0
}

/// What tiles hold for the activations: as many parts as their dtype has of bf16, and enough of the weight's that the
/// result is as exact as the dtype. bf16 activations meet weights rounded to bf16, as a bf16 layer of torch holds them.
#[cfg(target_arch = "x86_64")]
fn tile_numbers(weight: &PackedWeight<'_>, direction: Direction, format: ActivationFormat, dtype: Dtype) -> Numbers {
    /// Longest row whose sums of int8 products fit int32.
    const LONGEST: usize = i32::MAX as usize / (128 * 127);
    // Codes of int8 with a scale a row are multiplied as they are.
    let is_exact = weight.is_int8_by_rows() && direction == Direction::Forward;
    if is_exact && format == ActivationFormat::Int8 && weight.layout().cols <= LONGEST {
        return Numbers::Int8;
    }
    let x_parts = match dtype {
        Dtype::Bfloat16 => 1,
        Dtype::Float16 => 2,
        Dtype::Float32 => 3,
    };
    Numbers::Bf16 { x_parts, w_parts: if is_exact { 1 } else { x_parts } }
}
