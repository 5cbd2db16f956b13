//! The choice among the tensor-core kernels of `cuda/linear_decode.cu`, whose head says what each takes.

use super::plan::{Capability, Operation, Plan, Problem, Share};
use crate::dtype::Dtype;

/// How scales are stored: fp32, 16-bit floats, or 8-bit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scales {
    Scale32,
    Scale16,
    Double,
}

/// A kernel for one kind of weight.
struct Kernel {
    bits: usize,
    /// Weights between two applications of a scale: the least block.
    group: usize,
    has_shift: bool,
    scales: Scales,
    /// Entries for float16 and bfloat16, for up to 8 and up to 16 columns.
    entries: [[&'static str; 2]; 2],
    /// For float32, where there are any.
    entries_of_float32: Option<[&'static str; 2]>,
}

macro_rules! kernel {
    ($bits:literal, $group:literal, $has_shift:literal, $scales:ident, $kind:literal) => {
        kernel!($bits, $group, $has_shift, $scales, $kind, None)
    };
    ($bits:literal, $group:literal, $has_shift:literal, $scales:ident, $kind:literal, float32) => {
        kernel!(
            $bits,
            $group,
            $has_shift,
            $scales,
            $kind,
            Some([concat!("linear_decode_float32_", $kind, "_4"), concat!("linear_decode_float32_", $kind, "_8"),])
        )
    };
    ($bits:literal, $group:literal, $has_shift:literal, $scales:ident, $kind:literal, $of_float32:expr) => {
        Kernel {
            bits: $bits,
            group: $group,
            has_shift: $has_shift,
            scales: Scales::$scales,
            entries: [
                [concat!("linear_decode_float16_", $kind, "_8"), concat!("linear_decode_bfloat16_", $kind, "_8")],
                [concat!("linear_decode_float16_", $kind, "_16"), concat!("linear_decode_bfloat16_", $kind, "_16")],
            ],
            entries_of_float32: $of_float32,
        }
    };
}

/// The first line that takes a weight serves it: those with the larger group come first.
const KERNELS: &[Kernel] = &[
    kernel!(4, 64, false, Scale32, "int4_scale32", float32),
    kernel!(4, 64, false, Scale16, "int4_scale16", float32),
    kernel!(4, 64, false, Double, "int4_double", float32),
    kernel!(4, 64, true, Scale32, "int4_shift_scale32"),
    kernel!(4, 64, true, Scale16, "int4_shift_scale16"),
    kernel!(4, 64, true, Double, "int4_shift_double"),
    kernel!(4, 32, false, Scale32, "int4_block32_scale32", float32),
    kernel!(4, 32, false, Scale16, "int4_block32_scale16"),
    kernel!(4, 32, false, Double, "int4_block32_double"),
    kernel!(4, 32, true, Scale32, "int4_block32_shift_scale32"),
    kernel!(4, 32, true, Scale16, "int4_block32_shift_scale16"),
    kernel!(4, 32, true, Double, "int4_block32_shift_double"),
    kernel!(8, 32, false, Scale32, "int8_scale32", float32),
    kernel!(8, 32, false, Scale16, "int8_scale16"),
    kernel!(8, 32, true, Scale32, "int8_shift_scale32"),
    kernel!(8, 32, true, Scale16, "int8_shift_scale16"),
];

/// Bytes of codes that a warp takes of a row at once, `kUnitBytes`; and what is in shared memory, in bytes.
const UNIT_BYTES: usize = 128;
const TABLE_BYTES: usize = 64 << 10;
const SUMS_IN_TABLE: usize = 32 << 10;
const SCALE_MAP_BYTES: usize = 1 << 10;
const TILE_ROWS: usize = 16;
const LANES: usize = 32;
/// Up to so many visits of a warp, one token in float32 is faster on CUDA cores (by 10 % at 2 of them).
const SHORT_VISITS: usize = 2;
/// From so many visits of a warp on, two of them under way at a time are faster than one: by 4 % at 14 of them and 16
/// tokens, by 1 % at 28 and one token; at 9 and 16 tokens, and at 7 and one token, they are slower by 1 to 2 %.
const LONG_VISITS: usize = 12;
/// Columns of the tensor cores' second operand that a kernel has at most; a token has one, and two in float32.
const MAX_COLUMNS: usize = 16;
const OLDEST: u32 = 80;

/// The kernel that reads the weight at the speed of memory, where there is one for it.
pub(super) fn plan(problem: &Problem, capability: Capability) -> Option<Plan> {
    let is_decode = problem.operation == Operation::Linear && (1..=MAX_COLUMNS).contains(&columns(problem));
    if !is_decode || !problem.is_vectorized || capability.compute < OLDEST {
        return None;
    }
    let kernel = KERNELS.iter().find(|kernel| kernel.takes(problem))?;
    let is_wide = columns(problem) > MAX_COLUMNS / 2;
    let grid = problem.layout.rows.min(capability.multiprocessors as usize);
    // The sums of more columns leave registers for fewer warps: 12 where the units of in-features come out evenly enough.
    let most_warps = match (is_wide, kernel.units(problem)) {
        (false, _) => 16,
        (true, 24..) => 12,
        (true, _) => 8,
    };
    // Small GPUs have no room for the stages of all of them.
    let fits = |&warps: &usize| kernel.shared_bytes(problem, warps, 1, 1) <= capability.shared_bytes as usize;
    let warps = [16, 12, 8, 4].into_iter().filter(|&warps| warps <= most_warps).find(fits)?;
    let tiles = problem.layout.rows.div_ceil(grid).div_ceil(TILE_ROWS);
    let is_short = kernel.units(problem) * tiles <= SHORT_VISITS * warps;
    if is_short && problem.count == 1 && problem.dtype == Dtype::Float32 {
        return None; // CUDA cores are done before the tables of these kernels are
    }
    let depth = kernel.depth(problem, warps, tiles, capability);
    let shared_bytes = kernel.shared_bytes(problem, warps, depth, tiles).min(capability.shared_bytes as usize);
    Some(Plan {
        image: "linear_decode",
        entry: kernel.entry(problem)?[usize::from(is_wide)],
        grid: [grid as u32, 1],
        threads: (warps * LANES) as u32,
        shared_bytes: shared_bytes as u32,
        is_dependent: capability.compute >= 90,
        share: kernel.share(problem, grid, warps, depth, shared_bytes),
    })
}

/// Columns of the tensor cores' second operand that the tokens take.
fn columns(problem: &Problem) -> usize {
    problem.count * if problem.dtype == Dtype::Float32 { 2 } else { 1 }
}

impl Kernel {
    fn takes(&self, problem: &Problem) -> bool {
        let (spec, layout) = (&problem.spec, &problem.layout);
        let scales = match (spec.double_quant, spec.scale_dtype) {
            (true, _) => Scales::Double,
            (false, Dtype::Float32) => Scales::Scale32,
            (false, _) => Scales::Scale16,
        };
        let is_kind = self.bits == layout.bits && self.has_shift == spec.format.has_shift() && self.scales == scales;
        let is_laid_out = !layout.straddles_rows
            && layout.cols.is_multiple_of(64)
            && layout.block_size >= self.group
            && (layout.block_size.is_power_of_two() || layout.blocks_per_row() == 1);
        is_kind && is_laid_out && self.takes_scales(problem) && self.entry(problem).is_some()
    }

    /// Its entries for the dtype of the activations, for up to 8 and up to 16 columns.
    fn entry(&self, problem: &Problem) -> Option<[&'static str; 2]> {
        let of_16_bits = |dtype: usize| Some(self.entries.map(|entries| entries[dtype]));
        match problem.dtype {
            Dtype::Float32 => self.entries_of_float32,
            Dtype::Float16 => of_16_bits(0),
            Dtype::Bfloat16 => of_16_bits(1),
        }
    }

    /// The scales of a unit are copied in words of 4 bytes, from where the row's begin.
    fn takes_scales(&self, problem: &Problem) -> bool {
        let (spec, layout) = (&problem.spec, &problem.layout);
        let in_unit = (UNIT_BYTES * 8 / self.bits / layout.block_size).max(1);
        let blocks = layout.blocks_per_row();
        let whole_words = |bytes: usize| (blocks * bytes).is_multiple_of((in_unit * bytes).min(4));
        if spec.double_quant {
            return blocks.is_multiple_of(in_unit)
                && whole_words(1)
                && (!self.has_shift || whole_words(spec.scale_dtype.size()));
        }
        whole_words(spec.scale_dtype.size())
    }

    /// Units of columns that warps take.
    fn units(&self, problem: &Problem) -> usize {
        (problem.layout.cols * self.bits / 8).div_ceil(UNIT_BYTES)
    }

    /// Visits of a warp that are under way at a time: two where there are many, so that the second has time to pay.
    fn depth(&self, problem: &Problem, warps: usize, tiles: usize, capability: Capability) -> usize {
        let is_long = self.units(problem) * tiles >= LONG_VISITS * warps;
        let fits = self.shared_bytes(problem, warps, 2, tiles) <= capability.shared_bytes as usize;
        if is_long && fits { 2 } else { 1 }
    }

    fn share(&self, problem: &Problem, grid: usize, warps: usize, depth: usize, shared_bytes: usize) -> Share {
        let rows = problem.layout.rows;
        let units = self.units(problem);
        let rest = units % warps;
        let tiles = rows.div_ceil(grid).div_ceil(TILE_ROWS);
        let most = (1..=tiles).rev().find(|&tiles| self.shared_bytes(problem, warps, depth, tiles) <= shared_bytes);
        let passes = tiles.div_ceil(most.unwrap_or(1));
        Share {
            rows_each: (rows / grid) as i32,
            rows_rest: (rows % grid) as i32,
            full_rounds: (units / warps) as i32,
            rest_units: rest as i32,
            rest_parts: warps.checked_div(rest).unwrap_or(1) as i32,
            tiles_a_pass: tiles.div_ceil(passes) as i32,
            depth: depth as i32,
        }
    }

    /// Shared memory of `warps` warps with `depth` stages each, with room for the sums of `tiles` tiles of rows.
    fn shared_bytes(&self, problem: &Problem, warps: usize, depth: usize, tiles: usize) -> usize {
        let groups = UNIT_BYTES * 8 / self.bits / self.group;
        let numbers = if self.has_shift { 2 } else { 1 };
        let stage = TILE_ROWS * UNIT_BYTES + TILE_ROWS * 4 * groups * numbers;
        let table = if self.bits == 4 { TABLE_BYTES } else { 0 };
        let map = if self.scales == Scales::Double { SCALE_MAP_BYTES } else { 0 };
        let sums = tiles * TILE_ROWS * 4 * warps * columns(problem).next_power_of_two().max(2);
        let is_table_full = self.bits != 4 || problem.dtype == Dtype::Float32;
        let in_table = if is_table_full { 0 } else { SUMS_IN_TABLE };
        table + map + warps * depth * stage + sums.saturating_sub(in_table)
    }
}

#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().flat_map(|kernel| kernel.entries.into_iter().chain(kernel.entries_of_float32).flatten())
}

#[cfg(test)]
mod tests {
    use super::super::samples::{ADA, HOPPER, problem};
    use super::*;
    use crate::format::{BlockSize, Format, Spec};

    #[test]
    fn shapes_of_models_are_served() {
        let nf4 = problem(Format::Nf4, BlockSize::Elements(64), (8192, 28672), 1);
        let chosen = plan(&nf4, HOPPER).expect("a kernel");
        assert_eq!(chosen.entry, "linear_decode_bfloat16_int4_scale32_8");
        // 64 KiB of table, twice 16 stages of 2304 bytes; the sums of 4 tiles lie in the table.
        assert_eq!((chosen.grid, chosen.threads, chosen.shared_bytes), ([132, 1], 512, 65536 + 2 * 16 * 2304));
        assert!(chosen.is_dependent);
        // 62 rows a block and 8 more; 112 units of 256 columns for 16 warps.
        let Share { rows_each, rows_rest, full_rounds, rest_units, rest_parts, tiles_a_pass, depth } = chosen.share;
        assert_eq!((rows_each, rows_rest, full_rounds), (62, 8, 7));
        assert_eq!((rest_units, rest_parts, tiles_a_pass, depth), (0, 1, 4, 2));
        // 14 visits of 8 warps are many, 7 of 16 are not.
        let tall = problem(Format::Nf4, BlockSize::Elements(64), (14336, 4096), 1);
        for (tokens, depth) in [(1, 1), (16, 2)] {
            let chosen = plan(&Problem { count: tokens, ..tall }, HOPPER).expect("a kernel");
            assert_eq!(chosen.share.depth, depth);
        }
        let narrow = plan(&problem(Format::Nf4, BlockSize::Elements(64), (4096, 5120), 1), HOPPER).expect("a kernel");
        assert_eq!((narrow.share.full_rounds, narrow.share.rest_units, narrow.share.rest_parts), (1, 4, 4));
        let wide = plan(&Problem { count: 9, dtype: Dtype::Float16, ..nf4 }, HOPPER).expect("a kernel");
        assert_eq!((wide.entry, wide.threads), ("linear_decode_float16_int4_scale32_16", 384));
        for (format, block_size, entry) in [
            (Format::Uint4, BlockSize::Elements(32), "linear_decode_bfloat16_int4_block32_shift_scale32_8"),
            (Format::Custom, BlockSize::Elements(4096), "linear_decode_bfloat16_int4_scale32_8"),
            (Format::Int8, BlockSize::Row, "linear_decode_bfloat16_int8_scale32_8"),
            (Format::Uint8, BlockSize::Elements(128), "linear_decode_bfloat16_int8_shift_scale32_8"),
        ] {
            assert_eq!(plan(&problem(format, block_size, (4096, 4096), 4), HOPPER).expect("a kernel").entry, entry);
        }
    }

    #[test]
    fn float32_has_two_columns_a_token() {
        let nf4 = problem(Format::Nf4, BlockSize::Elements(64), (14336, 4096), 1);
        for (tokens, entry, sums) in [(1, "_4", 2), (4, "_4", 8), (5, "_8", 16), (8, "_8", 16)] {
            let chosen = plan(&Problem { dtype: Dtype::Float32, count: tokens, ..nf4 }, HOPPER).expect("a kernel");
            assert_eq!(chosen.entry, format!("linear_decode_float32_int4_scale32{entry}"));
            // The table has no room for sums.
            let warps = chosen.threads as usize / LANES;
            let bytes = TABLE_BYTES + warps * 2304 + chosen.share.tiles_a_pass as usize * TILE_ROWS * 4 * warps * sums;
            assert!(chosen.shared_bytes as usize >= bytes);
        }
        let short = problem(Format::Nf4, BlockSize::Elements(64), (4096, 4096), 1);
        assert!(plan(&Problem { dtype: Dtype::Float32, ..short }, HOPPER).is_none());
        assert!(plan(&Problem { dtype: Dtype::Float32, count: 2, ..short }, HOPPER).is_some());
    }

    #[test]
    fn sums_without_room_take_turns() {
        let tall = problem(Format::Nf4, BlockSize::Elements(64), (152_064, 4096), 16);
        let chosen = plan(&tall, HOPPER).expect("a kernel");
        // 72 tiles of 8 KiB of sums each are more than there is room for.
        assert_eq!(chosen.shared_bytes, HOPPER.shared_bytes);
        let tiles = 1152_usize.div_ceil(TILE_ROWS);
        let passes = tiles.div_ceil(chosen.share.tiles_a_pass as usize);
        assert!(passes > 1);
        assert_eq!(chosen.share.tiles_a_pass as usize, tiles.div_ceil(passes));
    }

    #[test]
    fn small_gpus_get_fewer_warps() {
        let chosen = plan(&problem(Format::Nf4, BlockSize::Elements(64), (4096, 4096), 1), ADA).expect("a kernel");
        assert_eq!((chosen.threads, chosen.is_dependent), (384, false));
        assert!(chosen.shared_bytes <= ADA.shared_bytes);
    }

    #[test]
    fn what_no_kernel_takes_is_left_to_others() {
        let nf4 = problem(Format::Nf4, BlockSize::Elements(64), (64, 256), 1);
        assert!(plan(&nf4, HOPPER).is_some());
        let double_int8 = problem(Format::Int8, BlockSize::Elements(64), (64, 256), 1);
        let spec = Spec { double_quant: true, ..double_int8.spec };
        for other in [
            Problem { dtype: Dtype::Float32, count: 9, ..nf4 },
            Problem { dtype: Dtype::Float32, ..problem(Format::Uint4, BlockSize::Elements(64), (64, 256), 1) },
            Problem { is_vectorized: false, ..nf4 },
            Problem { count: 17, ..nf4 },
            Problem { operation: Operation::Dequantize, ..nf4 },
            problem(Format::Nf4, BlockSize::Elements(16), (64, 256), 1),
            problem(Format::Nf4, BlockSize::Elements(64), (64, 96), 1),
            Problem { spec, ..double_int8 },
        ] {
            assert!(plan(&other, HOPPER).is_none(), "{other:?}");
        }
        assert!(plan(&nf4, Capability { compute: 75, ..ADA }).is_none());
        // Three fp16 scales a row begin in the middle of a word every other row.
        let ragged = problem(Format::Nf4, BlockSize::Elements(64), (64, 192), 1);
        let spec = Spec { scale_dtype: Dtype::Float16, ..ragged.spec };
        assert!(plan(&ragged, HOPPER).is_some());
        assert!(plan(&Problem { spec, ..ragged }, HOPPER).is_none());
    }
}
