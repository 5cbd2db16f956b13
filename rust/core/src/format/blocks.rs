//! Where the codes and scales of a matrix lie.

use super::{BlockOrder, BlockSize, Spec};
use crate::{Error, Result};

/// The geometry of one packed matrix `[rows, cols]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Rows: `out_features`, times the experts of a 3-D weight.
    pub rows: usize,
    /// Columns: `in_features`.
    pub cols: usize,
    /// Bits of one code, 4 or 8.
    pub bits: usize,
    /// Weights in a whole block; `cols` for row-wise blocks.
    pub block_size: usize,
    /// Whether blocks run through the flattened matrix and so may straddle rows. A flat matrix whose rows are whole
    /// blocks is laid out as a row-aligned one and not counted here.
    pub straddles_rows: bool,
}

impl Layout {
    /// The layout of a `[rows, cols]` matrix under `spec`; an error where it would not fit the address space.
    pub fn new(spec: &Spec, rows: usize, cols: usize) -> Result<Self> {
        spec.validate()?;
        let block_size = match spec.block_size {
            BlockSize::Elements(size) => size,
            BlockSize::Row => cols.max(1),
        };
        if rows.checked_mul(cols).is_none_or(|count| count > isize::MAX as usize / 8) {
            return Err(Error::invalid("shape", format!("[{rows}, {cols}]"), "fewer than 2^60 weights"));
        }
        let straddles_rows = spec.block_order == BlockOrder::Flat && !cols.is_multiple_of(block_size);
        Ok(Self { rows, cols, bits: spec.format.bits(), block_size, straddles_rows })
    }

    /// Bytes of `count` consecutive codes.
    pub fn bytes_of(&self, count: usize) -> usize {
        (count * self.bits).div_ceil(8)
    }

    /// Bytes from one row to the next; meaningless where blocks straddle rows.
    pub fn row_bytes(&self) -> usize {
        self.bytes_of(self.cols)
    }

    /// Bytes of all codes.
    pub fn code_bytes(&self) -> usize {
        if self.straddles_rows { self.bytes_of(self.rows * self.cols) } else { self.rows * self.row_bytes() }
    }

    /// Blocks in a row; meaningless where blocks straddle rows.
    pub fn blocks_per_row(&self) -> usize {
        self.cols.div_ceil(self.block_size)
    }

    /// Number of scales.
    pub fn block_count(&self) -> usize {
        if self.straddles_rows {
            (self.rows * self.cols).div_ceil(self.block_size)
        } else {
            self.rows * self.blocks_per_row()
        }
    }

    /// The block that holds the weight at (`row`, `col`).
    #[inline]
    pub fn block_of(&self, row: usize, col: usize) -> usize {
        if self.straddles_rows {
            (row * self.cols + col) / self.block_size
        } else {
            row * self.blocks_per_row() + col / self.block_size
        }
    }

    /// Position of the code at (`row`, `col`), counted in codes from the start of the buffer.
    #[inline]
    pub fn code_index(&self, row: usize, col: usize) -> usize {
        if self.straddles_rows || self.bits == 8 || self.cols.is_multiple_of(2) {
            row * self.cols + col
        } else {
            row * (self.cols + 1) + col
        }
    }
}
