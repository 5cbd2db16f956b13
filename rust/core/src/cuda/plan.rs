//! The one table that picks a kernel and its grid, from what is to be done and what the device can.

use super::decode;
#[cfg(test)]
use super::int8_plan;
use crate::dtype::Dtype;
use crate::format::{Layout, Spec};
use crate::{Error, Result};

/// What kernels and grids are chosen by, of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Compute capability: ten times the major version plus the minor one.
    pub compute: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block can have.
    pub shared_bytes: u32,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// `count` weights to floats, as a window of rows and columns.
    Dequantize,
    /// `count` rows, at given indices, to floats.
    DequantizeRows,
    /// `count` blocks of floats to codes.
    Quantize,
    /// The sum of `count` scales, in parts.
    SumScales,
    /// `count` scales to 8-bit codes.
    QuantizeScales,
    /// `count` tokens times the weight.
    Linear,
}

/// One task.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem {
    pub(super) operation: Operation,
    /// Of the floats that go in or come out.
    pub(super) dtype: Dtype,
    pub(super) spec: Spec,
    pub(super) layout: Layout,
    /// What the operation counts.
    pub(super) count: usize,
    /// Whether addresses and widths let the kernel move whole vectors, each within a row and a block.
    pub(super) is_vectorized: bool,
}

/// A kernel and how it is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) image: &'static str,
    pub(super) entry: &'static str,
    pub(super) grid: [u32; 2],
    pub(super) threads: u32,
    /// Dynamic shared memory.
    pub(super) shared_bytes: u32,
    /// Whether it may start before the kernel in front of it has ended.
    pub(super) is_dependent: bool,
    /// Of the kernels that decode: who does what.
    pub(super) share: Share,
}

/// How blocks and warps share a product: the divisions that would keep each of them from its first load. As in
/// `DecodeOperands` of `cuda/include/lowbit/decode_plan.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(super) struct Share {
    /// Rows of a block, and how many blocks take one more.
    pub(super) rows_each: i32,
    pub(super) rows_rest: i32,
    /// Rounds in which every warp has a unit of columns; units that are left, and warps for each of those.
    pub(super) full_rounds: i32,
    pub(super) rest_units: i32,
    pub(super) rest_parts: i32,
    /// Tiles of rows whose sums have room at a time.
    pub(super) tiles_a_pass: i32,
    /// Visits of a warp that are under way at a time.
    pub(super) depth: i32,
}

/// A line of the table.
struct Kernel {
    operation: Operation,
    image: &'static str,
    /// Its entry for float32, float16 and bfloat16.
    entries: [&'static str; 3],
    /// The least compute capability.
    compute: u32,
    takes: fn(&Problem) -> bool,
    /// Blocks along x and y.
    grid: fn(&Problem) -> [usize; 2],
}

/// Threads of a block, in every kernel: `kThreads` of the sources.
pub(super) const THREADS: usize = 256;
/// Weights of a vector, `kVector` of `cuda/dequantize.cu`.
const VECTOR: usize = 8;
/// Weights of a warp that packs, 16 a lane: `kVector` of `cuda/include/lowbit/quantize_codes.cuh`.
const WARP_WEIGHTS: usize = 512;
/// Blocks of a kernel that walks what is left over.
const MANY_BLOCKS: usize = 1 << 20;
/// Most partial sums of scales: what the kernel that reads them adds up in one step.
pub(super) const MAX_SUMS: usize = THREADS;

/// The first line that takes a problem, on a device that has what it needs, serves it.
const KERNELS: &[Kernel] = &[
    Kernel {
        operation: Operation::Dequantize,
        image: "dequantize",
        entries: ["dequantize_vectors_float32", "dequantize_vectors_float16", "dequantize_vectors_bfloat16"],
        compute: 75,
        takes: |problem| problem.is_vectorized,
        grid: |problem| [problem.count.div_ceil(THREADS * VECTOR * 4), 1],
    },
    Kernel {
        operation: Operation::Dequantize,
        image: "dequantize",
        entries: ["dequantize_elements_float32", "dequantize_elements_float16", "dequantize_elements_bfloat16"],
        compute: 75,
        takes: |_| true,
        grid: |problem| [problem.count.div_ceil(THREADS).min(MANY_BLOCKS), 1],
    },
    Kernel {
        operation: Operation::DequantizeRows,
        image: "dequantize",
        entries: ["dequantize_rows_float32", "dequantize_rows_float16", "dequantize_rows_bfloat16"],
        compute: 75,
        takes: |_| true,
        grid: |problem| [problem.count.min(MANY_BLOCKS), 1],
    },
    Kernel {
        operation: Operation::Quantize,
        image: "quantize",
        entries: ["quantize_vectors_float32", "quantize_vectors_float16", "quantize_vectors_bfloat16"],
        compute: 75,
        takes: |problem| {
            let block_size = problem.layout.block_size;
            problem.is_vectorized && block_size <= WARP_WEIGHTS && block_size.is_power_of_two()
        },
        grid: |problem| {
            let weights_of_a_thread = 64 / problem.dtype.size();
            let weights = problem.count * problem.layout.block_size;
            [weights.div_ceil(THREADS * weights_of_a_thread), 1]
        },
    },
    Kernel {
        operation: Operation::Quantize,
        image: "quantize",
        entries: ["quantize_long_float32", "quantize_long_float16", "quantize_long_bfloat16"],
        compute: 75,
        takes: |problem| problem.is_vectorized && problem.layout.block_size > WARP_WEIGHTS,
        grid: |problem| [problem.count.min(MANY_BLOCKS), 1],
    },
    Kernel {
        operation: Operation::Quantize,
        image: "quantize",
        entries: ["quantize_blocks_float32", "quantize_blocks_float16", "quantize_blocks_bfloat16"],
        compute: 75,
        takes: |_| true,
        grid: |problem| [problem.count.div_ceil(THREADS / 32).min(MANY_BLOCKS), 1],
    },
    Kernel {
        operation: Operation::SumScales,
        image: "quantize",
        entries: ["sum_scales"; 3],
        compute: 75,
        takes: |_| true,
        grid: |problem| [sums_of(problem.count), 1],
    },
    Kernel {
        operation: Operation::QuantizeScales,
        image: "quantize",
        entries: ["quantize_scales"; 3],
        compute: 75,
        takes: |_| true,
        // A warp for each 256; one block at least, since it writes the offset.
        grid: |problem| [problem.count.div_ceil(THREADS * THREADS / 32).clamp(1, 1024), 1],
    },
    Kernel {
        operation: Operation::Linear,
        image: "linear",
        entries: ["linear_straddling_float32", "linear_straddling_float16", "linear_straddling_bfloat16"],
        compute: 75,
        takes: |problem| problem.layout.straddles_rows,
        grid: |problem| [problem.layout.rows.div_ceil(THREADS / 32), problem.count],
    },
    Kernel {
        operation: Operation::Linear,
        image: "linear",
        entries: ["linear_float32_1", "linear_float16_1", "linear_bfloat16_1"],
        compute: 75,
        takes: |problem| problem.count == 1,
        grid: |problem| [problem.layout.rows.div_ceil(16), 1],
    },
    Kernel {
        operation: Operation::Linear,
        image: "linear",
        entries: ["linear_float32_2", "linear_float16_2", "linear_bfloat16_2"],
        compute: 75,
        takes: |problem| problem.count == 2,
        grid: |problem| [problem.layout.rows.div_ceil(16), 1],
    },
    Kernel {
        operation: Operation::Linear,
        image: "linear",
        entries: ["linear_float32_4", "linear_float16_4", "linear_bfloat16_4"],
        compute: 75,
        takes: |_| true,
        grid: |problem| [problem.layout.rows.div_ceil(8), problem.count.div_ceil(4)],
    },
];

/// Partial sums of `count` scales.
pub(super) fn sums_of(count: usize) -> usize {
    count.div_ceil(THREADS).min(MAX_SUMS)
}

/// Says that no kernel runs on a device of `capability`.
pub(super) fn too_old(capability: Capability) -> Error {
    Error::Unsupported {
        what: "this GPU",
        reason: format!("its compute capability is {}, and kernels start at 75 (Turing)", capability.compute),
    }
}

/// The kernel for `problem` on a device of `capability`, and its grid.
pub(super) fn plan(problem: &Problem, capability: Capability) -> Result<Plan> {
    if let Some(plan) = decode::plan(problem, capability) {
        return Ok(plan);
    }
    let serves = |kernel: &&Kernel| {
        kernel.operation == problem.operation && capability.compute >= kernel.compute && (kernel.takes)(problem)
    };
    let kernel = KERNELS.iter().find(serves).ok_or_else(|| too_old(capability))?;
    let [x, y] = (kernel.grid)(problem);
    if x > i32::MAX as usize || y > usize::from(u16::MAX) {
        let reason =
            format!("{:?} of {} x {}: {}", problem.operation, problem.layout.rows, problem.layout.cols, problem.count);
        return Err(Error::Unsupported { what: "a grid of this size", reason });
    }
    let entry = kernel.entries[match problem.dtype {
        Dtype::Float32 => 0,
        Dtype::Float16 => 1,
        Dtype::Bfloat16 => 2,
    }];
    let (image, threads) = (kernel.image, THREADS as u32);
    Ok(Plan {
        image,
        entry,
        grid: [x as u32, y as u32],
        threads,
        shared_bytes: 0,
        is_dependent: false,
        share: Share::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, HOPPER, TURING};
    use super::super::{batch, grouped, norm, norm_backward};
    use super::*;
    use crate::format::{BlockSize, Format};

    fn problem(operation: Operation, count: usize) -> Problem {
        let nf4 = samples::problem(Format::Nf4, BlockSize::Elements(64), (4096, 1024), count);
        Problem { operation, ..nf4 }
    }

    #[test]
    fn every_line_names_kernels_that_are_built() {
        if !super::super::is_built() {
            return;
        }
        for kernel in KERNELS {
            let image = lowbit_kernels::image(kernel.image).expect("an image of the list");
            assert!(kernel.compute >= image.oldest, "{} runs on {} and later", kernel.image, image.oldest);
            for entry in kernel.entries {
                assert!(image.entries.contains(&entry), "{entry} in {}", kernel.image);
            }
        }
    }

    #[test]
    fn every_decoding_kernel_is_built() {
        if let Some(image) = lowbit_kernels::image("linear_decode") {
            for entry in decode::entries() {
                assert!(image.entries.contains(&entry), "{entry}");
            }
        }
    }

    #[test]
    fn every_batch_kernel_is_built() {
        for (image, entry) in batch::entries() {
            if let Some(image) = lowbit_kernels::image(image) {
                assert!(image.entries.contains(&entry), "{entry}");
            }
        }
    }

    #[test]
    fn every_kernel_that_is_built_stands_in_a_line() {
        for image in lowbit_kernels::IMAGES {
            for entry in image.entries {
                let is_planned = KERNELS.iter().any(|kernel| kernel.entries.contains(entry))
                    || decode::entries().chain(int8_plan::entries()).any(|name| name == *entry)
                    || norm::entries().chain(norm_backward::entries()).any(|name| name == *entry)
                    || batch::entries().any(|(_, name)| name == *entry)
                    || grouped::entries().any(|name| name == *entry);
                assert!(is_planned, "{entry} in {}", image.name);
            }
        }
    }

    #[test]
    fn every_operation_is_served_from_turing_on() {
        let operations = [
            Operation::Dequantize,
            Operation::DequantizeRows,
            Operation::Quantize,
            Operation::SumScales,
            Operation::QuantizeScales,
            Operation::Linear,
        ];
        for operation in operations {
            for dtype in Dtype::ALL {
                for is_vectorized in [false, true] {
                    for count in [1, 2, 3, 4, 5, 16] {
                        let problem = Problem { dtype, is_vectorized, ..problem(operation, count) };
                        for capability in [TURING, HOPPER] {
                            plan(&problem, capability).expect("a kernel");
                        }
                    }
                }
            }
        }
        let old = Capability { compute: 70, ..TURING };
        let error = plan(&problem(Operation::Linear, 1), old).expect_err("Volta is not served");
        assert!(error.to_string().contains("compute capability is 70"), "{error}");
    }

    #[test]
    fn grids_cover_the_work() {
        for (count, blocks) in [(1, 1), (8192, 1), (8193, 2), (1 << 40, 1 << 27)] {
            assert_eq!(plan(&problem(Operation::Dequantize, count), HOPPER).expect("a plan").grid, [blocks, 1]);
        }
        for (dtype, blocks) in [(Dtype::Float32, 16), (Dtype::Bfloat16, 8)] {
            let problem = Problem { dtype, ..problem(Operation::Quantize, 1024) };
            assert_eq!(plan(&problem, HOPPER).expect("a plan").grid, [blocks, 1]);
        }
        let general = Problem { is_vectorized: false, ..problem(Operation::Linear, 1) };
        for (tokens, entry, grid) in [
            (1, "linear_bfloat16_1", [256, 1]),
            (2, "linear_bfloat16_2", [256, 1]),
            (3, "linear_bfloat16_4", [512, 1]),
            (9, "linear_bfloat16_4", [512, 3]),
        ] {
            let plan = plan(&Problem { count: tokens, ..general }, HOPPER).expect("a plan");
            assert_eq!((plan.entry, plan.grid), (entry, grid));
        }
        assert_eq!(plan(&problem(Operation::SumScales, 1 << 20), HOPPER).expect("a plan").grid, [256, 1]);
        assert_eq!(plan(&problem(Operation::QuantizeScales, 0), HOPPER).expect("a plan").grid, [1, 1]);
    }

    #[test]
    fn a_grid_that_no_gpu_has_is_refused() {
        let error = plan(&problem(Operation::Dequantize, 1 << 50), HOPPER).expect_err("too large");
        assert!(error.to_string().contains("Dequantize of 4096 x 1024"), "{error}");
    }
}
