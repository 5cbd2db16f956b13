//! The choice among the kernels of `cuda/linear_batch.cu`, whose head says what each takes, and between them and unpacking
//! the weight for a library's product.

use super::decode;
use super::plan::{Capability, Operation, Plan, Problem, Share};
use crate::dtype::Dtype;

/// A kernel for tiles of up to `tokens` tokens.
struct Kernel {
    image: &'static str,
    /// For float16 and bfloat16.
    entries: [&'static str; 2],
    tokens: usize,
    /// Panels of 64 in-features in a step.
    panels: usize,
    /// Whether it applies scales to sums: for blocks of at least a panel, and no shifts.
    scales_sums: bool,
    /// Nanoseconds of a step on a busy H200 with wgmma and without; none where there is no such kernel.
    step: [Option<f64>; 2],
}

macro_rules! kernel {
    ($image:literal, $tokens:literal, $panels:literal, $scales_sums:literal, $step:expr) => {
        Kernel {
            image: $image,
            entries: [concat!($image, "_float16_", $tokens), concat!($image, "_bfloat16_", $tokens)],
            tokens: $tokens,
            panels: $panels,
            scales_sums: $scales_sums,
            step: $step,
        }
    };
}

/// Step times were fitted to `benches/cuda/linear_batch.cu`, NF4.
const KERNELS: &[Kernel] = &[
    kernel!("linear_batch_narrow", 32, 2, true, [Some(650.0), None]),
    kernel!("linear_batch_narrow", 64, 2, true, [Some(720.0), None]),
    kernel!("linear_batch_narrow", 96, 2, true, [Some(860.0), None]),
    kernel!("linear_batch", 32, 2, false, [Some(880.0), Some(1040.0)]),
    kernel!("linear_batch", 64, 2, false, [Some(900.0), Some(1370.0)]),
    kernel!("linear_batch_wide", 128, 1, false, [Some(515.0), None]),
    kernel!("linear_batch_wide", 192, 1, false, [Some(595.0), None]),
    kernel!("linear_batch_wide", 256, 1, false, [Some(850.0), None]),
];

/// Threads with wgmma and without.
const THREADS: [u32; 2] = [384, 512];
/// Nanoseconds of a kernel beside its steps: to start and to end; and to share tiles. Each with a part for a token of a tile.
const START: [f64; 2] = [3500.0, 16.0];
const SHARING: [f64; 2] = [2500.0, 60.0];
/// Unpacking: bytes of a part, nanoseconds for each part, and bytes written a nanosecond. A library's product: its least
/// time, bytes and operations a nanosecond. All on an H200.
const PART_BYTES: f64 = (128 << 20) as f64;
const UNPACKING: f64 = 1000.0;
const UNPACKED_BYTES: f64 = 2850.0;
const PRODUCT: f64 = 6000.0;
const PRODUCT_BYTES: f64 = 3900.0;
const PRODUCT_OPERATIONS: f64 = 780_000.0;

/// Up to 16 tokens: least time, and bytes of the weight a nanosecond, on an H200.
const FEW: f64 = 4000.0;
const FEW_BYTES: f64 = 3000.0;
/// Where tiles of 128 and 256 tokens end.
const TILE_END: usize = 128;

/// Rows of a tile, in-features of a panel, and what is in shared memory, in bytes.
const TILE_ROWS: usize = 128;
const PANEL: usize = 64;
const TABLE_BYTES: usize = 64 << 10;
const BARRIER_BYTES: usize = 16;
const MAX_STAGES: usize = 8;
const MIN_STAGES: usize = 3;
const LEAST_BLOCK: usize = 16;
const OLDEST: u32 = 80;
/// The compute capability that has wgmma.
const WGMMA: u32 = 90;
/// Tiles of one call: a counter for each.
const MAX_TILES: usize = 1 << 16;

/// How CTAs share the steps of a product. As in `BatchOperands` of `cuda/include/lowbit/batch_plan.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct BatchShare {
    pub(super) token_tiles: i32,
    /// Steps of a tile; of a CTA, and how many CTAs take one more.
    pub(super) steps: i32,
    pub(super) steps_each: i32,
    pub(super) steps_rest: i32,
    pub(super) stages: i32,
    /// log2 of the blocks of a row in a step.
    pub(super) log_blocks: i32,
    pub(super) stage_bytes: i32,
}

/// A kernel, its launch, and the workspace that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchPlan {
    pub(super) plan: Plan,
    pub(super) share: BatchShare,
    pub(super) sizes: BatchSizes,
    /// What the copy engine brings at a time, where there is one.
    pub(super) boxes: Option<Boxes>,
}

/// `BatchMaps` of `cuda/include/lowbit/batch_plan.cuh`: columns and rows, of activations and of bytes of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Boxes {
    pub(super) x: [u32; 2],
    pub(super) codes: [u32; 2],
}

/// Elements of the workspace of a product; none of either where every tile has one CTA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchSizes {
    /// Float32.
    pub partials: usize,
    /// Int32, which are 0 before and after.
    pub arrivals: usize,
}

/// How a product of many tokens is done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choice {
    /// By one kernel.
    pub(super) whole: BatchPlan,
    /// By one kernel but for so many tokens at the end, where the kernels for few tokens take less time than a tile more.
    pub(super) divided: Option<(BatchPlan, usize)>,
    /// Whether the quicker of these takes less time than unpacking the weight.
    pub(super) is_faster: bool,
}

impl Choice {
    /// Enough for either.
    pub(super) fn sizes(&self) -> BatchSizes {
        let (one, other) = (self.whole.sizes, self.divided.unwrap_or((self.whole, 0)).0.sizes);
        BatchSizes { partials: one.partials.max(other.partials), arrivals: one.arrivals.max(other.arrivals) }
    }
}

/// The kernel that multiplies many tokens, where there is one.
pub(super) fn plan(problem: &Problem, capability: Capability) -> Option<Choice> {
    if !takes(problem, capability) {
        return None;
    }
    let best = |count| {
        let problem = Problem { count, ..*problem };
        let candidates = KERNELS.iter().filter_map(|kernel| kernel.plan(&problem, capability));
        candidates.min_by(|(a, _), (b, _)| a.total_cmp(b))
    };
    let (whole_time, whole) = best(problem.count)?;
    let divided = few_at_the_end(problem, capability).and_then(|left| {
        let (time, planned) = best(problem.count - left)?;
        let time = time + few_time(problem);
        (time < whole_time).then_some((time, (planned, left)))
    });
    let (time, divided) = divided.map_or((whole_time, None), |(time, divided)| (time, Some(divided)));
    Some(Choice { whole, divided, is_faster: time < unpacking_time(problem) })
}

/// Tokens behind the last whole tile, where the kernels for few tokens take that many on tensor cores.
fn few_at_the_end(problem: &Problem, capability: Capability) -> Option<usize> {
    let left = problem.count % TILE_END;
    if problem.count < TILE_END {
        return None;
    }
    decode::plan(&Problem { count: left, ..*problem }, capability).map(|_| left)
}

/// What up to 16 tokens take beside others, in nanoseconds.
fn few_time(problem: &Problem) -> f64 {
    let layout = &problem.layout;
    let bits = layout.bits as f64 + 32.0 / layout.block_size as f64;
    FEW + layout.rows as f64 * layout.cols as f64 * bits / 8.0 / FEW_BYTES
}

fn takes(problem: &Problem, capability: Capability) -> bool {
    let layout = &problem.layout;
    let is_laid_out = !layout.straddles_rows
        && layout.block_size >= LEAST_BLOCK
        && (layout.block_size.is_power_of_two() || layout.blocks_per_row() == 1);
    problem.operation == Operation::Linear
        && problem.dtype != Dtype::Float32
        && problem.is_vectorized
        && capability.compute >= OLDEST
        && layout.cols > 0
        && is_laid_out
}

/// What unpacking the weight and multiplying with a library takes, in nanoseconds.
fn unpacking_time(problem: &Problem) -> f64 {
    let (rows, cols, tokens) = (problem.layout.rows as f64, problem.layout.cols as f64, problem.count as f64);
    let bytes = rows * cols * problem.dtype.size() as f64;
    let product = (bytes / PRODUCT_BYTES).max(2.0 * rows * cols * tokens / PRODUCT_OPERATIONS);
    UNPACKING * (bytes / PART_BYTES).ceil() + bytes / UNPACKED_BYTES + PRODUCT + product
}

impl Kernel {
    /// How it would serve a problem, and its time in nanoseconds.
    fn plan(&self, problem: &Problem, capability: Capability) -> Option<(f64, BatchPlan)> {
        let layout = &problem.layout;
        let way = usize::from(capability.compute != WGMMA);
        let step = self.step[way]?;
        if self.scales_sums && (problem.spec.format.has_shift() || layout.block_size < PANEL.min(layout.cols)) {
            return None;
        }
        let stage = self.stage_bytes(problem);
        let room = (capability.shared_bytes as usize).checked_sub(TABLE_BYTES)? / (stage + BARRIER_BYTES);
        let stages = room.min(MAX_STAGES);
        let token_tiles = problem.count.div_ceil(self.tokens);
        let tiles = layout.rows.div_ceil(TILE_ROWS) * token_tiles;
        let steps = layout.cols.div_ceil(self.cols());
        if stages < MIN_STAGES || tiles > MAX_TILES || i32::try_from(tiles * steps).is_err() {
            return None;
        }
        let (time, grid) = self.grid(tiles, steps, capability, step);
        let total = tiles * steps;
        let is_shared = !total.is_multiple_of(grid) || !(total / grid).is_multiple_of(steps);
        let partials = if is_shared { 2 * grid * self.tokens * TILE_ROWS } else { 0 };
        let plan = Plan {
            image: self.image,
            entry: self.entries[usize::from(problem.dtype == Dtype::Bfloat16)],
            grid: [grid as u32, 1],
            threads: THREADS[way],
            shared_bytes: (TABLE_BYTES + stages * (stage + BARRIER_BYTES)) as u32,
            is_dependent: capability.compute >= WGMMA,
            share: Share::default(),
        };
        let share = BatchShare {
            token_tiles: token_tiles as i32,
            steps: steps as i32,
            steps_each: (tiles * steps / grid) as i32,
            steps_rest: (tiles * steps % grid) as i32,
            stages: stages as i32,
            log_blocks: (self.cols() / layout.block_size).max(1).trailing_zeros() as i32,
            stage_bytes: stage as i32,
        };
        let sizes = BatchSizes { partials, arrivals: if is_shared { tiles } else { 0 } };
        let boxes = (way == 0).then(|| Boxes {
            x: [PANEL as u32, self.tokens as u32],
            codes: [(self.cols() * layout.bits / 8) as u32, TILE_ROWS as u32],
        });
        Some((time, BatchPlan { plan, share, sizes, boxes }))
    }

    /// In-features of a step.
    fn cols(&self) -> usize {
        PANEL * self.panels
    }

    /// Whole tiles for every CTA, or an equal share of the steps, whichever takes less time.
    fn grid(&self, tiles: usize, steps: usize, capability: Capability, step: f64) -> (f64, usize) {
        let most = capability.multiprocessors as usize;
        let fixed = |[once, a_token]: [f64; 2]| once + a_token * self.tokens as f64;
        let whole = fixed(START) + (tiles.div_ceil(most) * steps) as f64 * step;
        let shared_grid = most.min(tiles * steps);
        let shared = fixed(START) + fixed(SHARING) + (tiles * steps).div_ceil(shared_grid) as f64 * step;
        if whole <= shared { (whole, tiles.div_ceil(tiles.div_ceil(most))) } else { (shared, shared_grid) }
    }

    fn stage_bytes(&self, problem: &Problem) -> usize {
        let layout = &problem.layout;
        let blocks = (self.cols() / layout.block_size).max(1);
        let numbers = if problem.spec.format.has_shift() { 2 } else { 1 };
        let number = if self.scales_sums { 4 } else { 8 };
        let bytes =
            self.cols() * (2 * self.tokens + TILE_ROWS * layout.bits / 8) + TILE_ROWS * number * blocks * numbers;
        bytes.next_multiple_of(1024)
    }
}

#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = (&'static str, &'static str)> {
    KERNELS.iter().flat_map(|kernel| kernel.entries.map(|entry| (kernel.image, entry)))
}

#[cfg(test)]
mod tests {
    use super::super::samples::{ADA, AMPERE, HOPPER, problem};
    use super::*;
    use crate::format::{BlockSize, Format};

    #[test]
    fn every_step_has_one_cta() {
        for capability in [HOPPER, AMPERE] {
            for (rows, cols) in [(4096, 4096), (14336, 4096), (77, 896), (130, 96), (16, 64), (1000, 4160)] {
                for tokens in [17, 33, 64, 100, 257, 1000] {
                    let nf4 = problem(Format::Nf4, BlockSize::Elements(64), (rows, cols), tokens);
                    for kernel in KERNELS {
                        let Some((_, planned)) = kernel.plan(&nf4, capability) else { continue };
                        let (share, grid) = (planned.share, planned.plan.grid[0] as i32);
                        let tiles = rows.div_ceil(TILE_ROWS) as i32 * share.token_tiles;
                        assert_eq!(grid * share.steps_each + share.steps_rest, tiles * share.steps);
                        assert!(share.steps_rest < grid && share.steps_each > 0);
                        assert!(planned.plan.shared_bytes <= capability.shared_bytes);
                        let is_whole = share.steps_rest == 0 && share.steps_each % share.steps == 0;
                        assert_eq!(is_whole, planned.sizes == BatchSizes::default());
                    }
                }
            }
        }
    }

    #[test]
    fn few_tokens_keep_the_weight_packed_and_many_unpack_it() {
        let nf4 = |tokens| problem(Format::Nf4, BlockSize::Elements(64), (14336, 4096), tokens);
        let few = plan(&nf4(32), HOPPER).expect("a kernel");
        let launched = few.whole.plan;
        assert_eq!((launched.entry, launched.threads, few.is_faster), ("linear_batch_narrow_bfloat16_32", 384, true));
        assert_eq!(plan(&nf4(32), AMPERE).expect("a kernel").whole.plan.threads, 512);
        assert!(!plan(&nf4(8192), HOPPER).expect("a kernel").is_faster);
    }

    #[test]
    fn few_tokens_behind_a_tile_are_left_to_the_kernels_for_few() {
        let nf4 = |tokens| problem(Format::Nf4, BlockSize::Elements(64), (14336, 4096), tokens);
        let choice = |tokens| plan(&nf4(tokens), HOPPER).expect("a kernel");
        let left = |tokens| choice(tokens).divided.map_or(0, |(_, left)| left);
        assert_eq!([256, 264, 272, 273, 100].map(left), [0, 8, 16, 0, 0]);
        let (most, _) = choice(264).divided.expect("8 tokens are left");
        assert_eq!(most, choice(256).whole);
        // Who may not leave any has a plan and a workspace for all.
        let (whole, sizes) = (choice(264).whole, choice(264).sizes());
        assert_eq!((whole.share.token_tiles, most.share.token_tiles), (2, 1));
        assert!(whole != most && sizes.partials >= whole.sizes.partials && sizes.partials >= most.sizes.partials);
    }

    #[test]
    fn the_ring_has_room_for_every_format() {
        for format in [Format::Nf4, Format::Uint4, Format::Int8] {
            for block_size in [16, 32, 64, 128, 4096] {
                let problem = problem(format, BlockSize::Elements(block_size), (4096, 4096), 100);
                for capability in [HOPPER, AMPERE] {
                    let planned = plan(&problem, capability).expect("a kernel").whole;
                    let blocks = 1 << planned.share.log_blocks;
                    assert!(blocks == 1 || blocks * block_size == 128 || blocks * block_size == 64);
                }
            }
        }
    }

    #[test]
    fn what_no_kernel_takes_is_left_to_others() {
        let nf4 = problem(Format::Nf4, BlockSize::Elements(64), (4096, 4096), 32);
        for other in [
            Problem { dtype: Dtype::Float32, ..nf4 },
            Problem { is_vectorized: false, ..nf4 },
            Problem { operation: Operation::Dequantize, ..nf4 },
        ] {
            assert!(plan(&other, HOPPER).is_none(), "{other:?}");
        }
        assert!(plan(&nf4, Capability { compute: 75, ..AMPERE }).is_none());
        // Less shared memory than the table and three stages take.
        assert!(plan(&nf4, ADA).is_none());
    }
}
