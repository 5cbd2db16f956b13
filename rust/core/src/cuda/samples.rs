//! GPUs, weights and problems that tests plan for.

use super::plan::{Capability, Operation, Problem};
use crate::dtype::Dtype;
use crate::format::{BlockOrder, BlockSize, Format, Layout, Spec};

pub(super) const TURING: Capability = Capability { compute: 75, multiprocessors: 40, shared_bytes: 64 << 10 };
pub(super) const AMPERE: Capability = Capability { compute: 80, multiprocessors: 108, shared_bytes: 163 << 10 };
pub(super) const ADA: Capability = Capability { compute: 89, multiprocessors: 128, shared_bytes: 99 << 10 };
pub(super) const HOPPER: Capability = Capability { compute: 90, multiprocessors: 132, shared_bytes: 227 << 10 };

/// A format with float32 scales, blocks that start with the row.
pub(super) fn spec(format: Format, block_size: BlockSize) -> Spec {
    Spec {
        format,
        block_size,
        block_order: BlockOrder::Row,
        scale_dtype: Dtype::Float32,
        double_quant: false,
        signed_absmax: false,
    }
}

pub(super) fn layout(format: Format, block_size: BlockSize, (rows, cols): (usize, usize)) -> Layout {
    Layout::new(&spec(format, block_size), rows, cols).expect("a valid layout")
}

/// The product of so many bf16 tokens with a weight.
pub(super) fn problem(format: Format, block_size: BlockSize, shape: (usize, usize), tokens: usize) -> Problem {
    Problem {
        operation: Operation::Linear,
        dtype: Dtype::Bfloat16,
        spec: spec(format, block_size),
        layout: layout(format, block_size, shape),
        count: tokens,
        is_vectorized: true,
    }
}
