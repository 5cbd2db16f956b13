//! Rows sorted by expert, times the matrices of a stack: how many rows each expert has stays in device memory.

use super::Queue;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::DeviceActivations;
use super::plan::{Capability, Plan, Share};
use super::weight::{DeviceBuffer, DeviceFloats, DeviceWeight};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// As the kernels get them: `GroupedOperands` of `cuda/include/lowbit/grouped_plan.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Operands {
    x: Pointer,
    counts: Pointer,
    out: Pointer,
    rows: i32,
    x_stride: i32,
    experts: i32,
    outputs: i32,
}

const _: () = assert!(size_of::<Operands>() == 40, "as grouped_plan.cuh has it");

// SAFETY: `repr(C)`, the fields of `GroupedOperands` in their order.
unsafe impl Argument for Operands {}

/// A kernel of `cuda/linear_grouped.cu`, by the rows of an expert that a block takes at once.
struct Kernel {
    tokens: usize,
    /// Groups of 64 columns of a stage, and stages.
    groups: usize,
    stages: usize,
    /// Entries for float16 and bfloat16.
    entries: [&'static str; 2],
}

macro_rules! kernel {
    ($tokens:literal, $groups:literal, $stages:literal) => {
        Kernel {
            tokens: $tokens,
            groups: $groups,
            stages: $stages,
            entries: [concat!("linear_grouped_float16_", $tokens), concat!("linear_grouped_bfloat16_", $tokens)],
        }
    };
}

/// The first whose tile holds the rows that an expert has on average serves, with one for stragglers above it.
const KERNELS: &[Kernel] = &[kernel!(8, 2, 3), kernel!(16, 1, 5), kernel!(32, 1, 4), kernel!(64, 1, 3)];

const IMAGE: &str = "linear_grouped";
const OLDEST: u32 = 80;
const THREADS: u32 = 128;
/// Blocks of a multiprocessor that shared memory and registers have room for.
const BLOCKS_EACH: u32 = 3;
const TABLE_BYTES: usize = 33 << 10;
const START_BYTES: usize = 8;
/// Rows of the matrices that a block takes at once.
const TILE_ROWS: usize = 128;
const GROUP: usize = 64;

/// `out[r] = x[r] W[e]^T` for the `counts[0]` first rows with matrix 0, the next `counts[1]` with matrix 1, and so on; rows
/// beyond the sum of counts become zero. The weight is a stack of `experts` matrices. False, with nothing done, where no
/// kernel takes such a weight or such activations.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out` meanwhile.
pub unsafe fn linear_grouped(
    queue: Queue,
    weight: &DeviceWeight,
    experts: usize,
    x: DeviceActivations,
    counts: DeviceBuffer,
    out: DeviceFloats,
) -> Result<bool> {
    let layout = weight.layout();
    if experts == 0 || !layout.rows.is_multiple_of(experts) || counts.len != experts {
        return Err(Error::invalid("counts", format!("{} numbers", counts.len), format!("{experts}, as experts")));
    }
    let outputs = layout.rows / experts;
    x.check(layout.cols, outputs, None, out)?;
    let Some(plan) = plan(weight, experts, &x, queue.device.capability()) else {
        return Ok(false);
    };
    let number = |what, value: usize| {
        i32::try_from(value).map_err(|_| Error::invalid(what, format!("{value} elements"), "fewer than 2^31"))
    };
    let operands = Operands {
        x: Pointer(x.values.buffer.address),
        counts: Pointer(counts.address),
        out: Pointer(out.buffer.address),
        rows: number("x", x.tokens)?,
        x_stride: number("x", x.stride)?,
        experts: number("counts", experts)?,
        outputs: number("weight", outputs)?,
    };
    let arguments = Arguments::new().with(weight.kernel()).with(&operands);
    // SAFETY: the parameters of every kernel of `cuda/linear_grouped.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, experts, outputs, layout.cols])? };
    Ok(true)
}

fn plan(weight: &DeviceWeight, experts: usize, x: &DeviceActivations, capability: Capability) -> Option<Plan> {
    if !takes(weight, x) || capability.compute < OLDEST || lowbit_kernels::image(IMAGE).is_none() {
        return None;
    }
    let of_dtype = match x.values.dtype {
        Dtype::Float32 => return None,
        Dtype::Float16 => 0,
        Dtype::Bfloat16 => 1,
    };
    // Experts get different numbers of rows; those of the average fit into a tile, and so do most others.
    let rows_each = x.tokens.div_ceil(experts);
    let kernel = KERNELS.iter().find(|kernel| rows_each * 4 <= kernel.tokens * 3).or(KERNELS.last())?;
    let tiles = (weight.layout().rows / experts).div_ceil(TILE_ROWS) * experts.min(x.tokens).max(1);
    let most_tiles = tiles + x.tokens / kernel.tokens * tiles.div_ceil(experts);
    let grid = (capability.multiprocessors * BLOCKS_EACH).min(u32::try_from(most_tiles).unwrap_or(u32::MAX)).max(1);
    let shared = kernel.shared_bytes(experts);
    (shared <= capability.shared_bytes as usize).then_some(Plan {
        image: IMAGE,
        entry: kernel.entries[of_dtype],
        grid: [grid, 1],
        threads: THREADS,
        shared_bytes: shared as u32,
        is_dependent: false,
        share: Share::default(),
    })
}

/// Whether the weight and the activations lie as the head of `cuda/linear_grouped.cu` asks for.
fn takes(weight: &DeviceWeight, x: &DeviceActivations) -> bool {
    let (spec, layout, kernel) = (weight.spec(), weight.layout(), weight.kernel());
    let scale_bytes = if spec.double_quant { 1 } else { spec.scale_dtype.size() };
    let is_kind = layout.bits == 4 && !spec.format.has_shift() && !layout.straddles_rows;
    let has_blocks = layout.blocks_per_row() == 1
        || (layout.block_size.is_power_of_two() && layout.block_size.is_multiple_of(GROUP));
    let is_aligned = [kernel.codes.0, kernel.scales.0, x.values.buffer.address].iter().all(|address| address % 16 == 0);
    is_kind
        && has_blocks
        && layout.cols.is_multiple_of(GROUP)
        && is_aligned
        && x.stride.is_multiple_of(8)
        && (layout.rows * layout.blocks_per_row() * scale_bytes).is_multiple_of(4)
}

impl Kernel {
    fn shared_bytes(&self, experts: usize) -> usize {
        TABLE_BYTES + self.stages * self.groups * (5120 + 128 * self.tokens) + START_BYTES * (experts + 1)
    }
}

#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().flat_map(|kernel| kernel.entries)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{HOPPER, spec};
    use super::super::weight::DeviceFloats;
    use super::*;
    use crate::format::{BlockSize, Format};

    const EXPERTS: usize = 64;

    fn weight(format: Format, block_size: usize) -> DeviceWeight {
        let spec = spec(format, BlockSize::Elements(block_size));
        let (rows, cols) = (EXPERTS * 128, 1408);
        let buffer = |len| DeviceBuffer { address: 256, len };
        let scales = buffer(rows * cols / block_size);
        let shifts = format.has_shift().then_some(scales);
        DeviceWeight::new(spec, (rows, cols), buffer(rows * cols / 2), scales, None, shifts, None).expect("a weight")
    }

    fn rows(tokens: usize, dtype: Dtype) -> DeviceActivations {
        DeviceActivations { values: DeviceFloats::new(256, tokens * 1408, dtype), tokens, stride: 1408 }
    }

    #[test]
    fn every_kernel_is_built_and_three_blocks_fit() {
        if let Some(image) = lowbit_kernels::image(IMAGE) {
            for entry in entries() {
                assert!(image.entries.contains(&entry), "{entry}");
            }
        }
        for kernel in KERNELS {
            let each = kernel.shared_bytes(EXPERTS) + (1 << 10);
            assert!(each * BLOCKS_EACH as usize <= 228 << 10, "{each} bytes for {} rows", kernel.tokens);
        }
    }

    #[test]
    fn tiles_grow_with_the_rows_of_an_expert() {
        if lowbit_kernels::image(IMAGE).is_none() {
            return;
        }
        let nf4 = weight(Format::Nf4, 64);
        for (tokens, entry) in [
            (1, "linear_grouped_bfloat16_8"),
            (96, "linear_grouped_bfloat16_8"),
            (640, "linear_grouped_bfloat16_16"),
            (1536, "linear_grouped_bfloat16_32"),
            (3072, "linear_grouped_bfloat16_64"),
            (100_000, "linear_grouped_bfloat16_64"),
        ] {
            let plan = plan(&nf4, EXPERTS, &rows(tokens, Dtype::Bfloat16), HOPPER).expect("a kernel");
            assert_eq!(plan.entry, entry, "{tokens} rows");
        }
    }

    #[test]
    fn what_kernels_do_not_take_is_left() {
        let nf4 = weight(Format::Nf4, 64);
        assert!(plan(&nf4, EXPERTS, &rows(96, Dtype::Float32), HOPPER).is_none());
        for other in [weight(Format::Uint4, 64), weight(Format::Nf4, 32)] {
            assert!(plan(&other, EXPERTS, &rows(96, Dtype::Bfloat16), HOPPER).is_none());
        }
        let old = Capability { compute: 75, ..HOPPER };
        assert!(plan(&nf4, EXPERTS, &rows(96, Dtype::Bfloat16), old).is_none());
    }
}
