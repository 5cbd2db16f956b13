//! What is asked of memory before it is decoded.

use std::ops::Range;

use super::tiles::ROW_BYTES;
use crate::cpu::simd::Simd;
use crate::cpu::x86::avx512::Avx512;
use crate::storage::PackedWeight;

/// What is asked for before its time. Chunks of rows are short pieces of memory, which the processor's own prefetchers do
/// not follow.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Codes to bring into the L2 cache beside the first row, and bytes from there to those of the next row.
    pub(super) codes: *const u8,
    pub(super) code_stride: usize,
    /// A scale likewise.
    pub(super) scales: *const u8,
    pub(super) scale_stride: usize,
}

impl Ahead {
    pub(super) const NOTHING: Self =
        Self { codes: std::ptr::null(), code_stride: 0, scales: std::ptr::null(), scale_stride: 0 };

    /// Asks for as many bytes of codes as row `index` takes, and brings the next row, from `near` on, into the L1 cache.
    #[inline(always)]
    pub(super) fn ask(self, simd: Avx512, index: usize, near: *const u8, bytes: usize) {
        if self.codes.is_null() {
            return;
        }
        let far = self.codes.wrapping_add(index * self.code_stride);
        for line in (0..bytes).step_by(ROW_BYTES) {
            simd.prefetch(far.wrapping_add(line));
            simd.prefetch_near(near.wrapping_add(line));
        }
        simd.prefetch(self.scales.wrapping_add(index * self.scale_stride));
    }
}

/// Asks for the codes of some columns of a row, which need not exist.
#[inline(always)]
pub(super) fn prefetch_codes(simd: Avx512, weight: &PackedWeight<'_>, row: usize, cols: &Range<usize>) {
    let layout = weight.layout();
    let first = weight.codes().as_ptr().wrapping_add(row * layout.row_bytes() + layout.bytes_of(cols.start));
    for line in (0..layout.bytes_of(cols.len())).step_by(ROW_BYTES) {
        simd.prefetch(first.wrapping_add(line));
    }
}
