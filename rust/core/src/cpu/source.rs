//! Float tensors of any strides, widened to fp32 a few rows at a time.

use std::ops::Range;

use super::simd::Simd;
use crate::Error;
use crate::codebook;
use crate::dtype::Element;

/// A strided view of a float tensor `[experts, rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub struct Source<T> {
    base: *const T,
    shape: [usize; 3],
    strides: [isize; 3],
}

// SAFETY: it is only read, and `Source::new` asks for memory that nobody writes meanwhile.
unsafe impl<T: Sync> Sync for Source<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Send for Source<T> {}

impl<T: Element> Source<T> {
    /// A view of `shape` elements at `base`, `strides` counted in elements.
    ///
    /// # Safety
    /// Every element of the view is readable and not written to while the view lives.
    pub unsafe fn new(base: *const T, shape: [usize; 3], strides: [isize; 3]) -> Self {
        Self { base, shape, strides }
    }

    /// The element at a row of all experts' rows and a column.
    #[inline(always)]
    fn row(&self, row: usize) -> *const T {
        let (expert, row) = (row / self.shape[1].max(1), row % self.shape[1].max(1));
        self.base.wrapping_offset(expert as isize * self.strides[0] + row as isize * self.strides[1])
    }

    /// Widens the elements of `rows` x `cols` into `out`, row after row.
    #[inline(always)]
    pub(super) fn read<S: Simd>(&self, simd: S, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let width = cols.len();
        let step = self.strides[2];
        let mut first = rows.start;
        for out in out.chunks_mut(S::LANES * width.max(1)) {
            let count = S::LANES.min(rows.end - first);
            let whole = width - width % S::LANES;
            // In a transposed matrix the rows are the neighbours in memory.
            let is_turned = self.strides[1] == 1 && first % self.shape[1] + S::LANES <= self.shape[1];
            let done = if step == 1 {
                for (row, out) in (first..).zip(out.chunks_exact_mut(width.max(1))) {
                    let from = self.row(row).wrapping_add(cols.start);
                    for col in (0..whole).step_by(S::LANES) {
                        // SAFETY: `col + LANES <= width`, within the view's row and within `out`.
                        unsafe { simd.store(out.as_mut_ptr().add(col), simd.load(from.wrapping_add(col))) };
                    }
                }
                whole
            } else if is_turned && count == S::LANES {
                for col in (0..whole).step_by(S::LANES) {
                    self.read_turned(simd, first, cols.start + col, &mut out[col..], width);
                }
                whole
            } else {
                0
            };
            for (row, out) in (first..).zip(out.chunks_exact_mut(width.max(1))) {
                for (col, out) in (cols.start..).zip(out).skip(done) {
                    // SAFETY: an element of the view.
                    *out = unsafe { self.row(row).wrapping_offset(col as isize * step).read_unaligned() }.to_f32();
                }
            }
            first += count;
        }
    }

    /// Widens a range of the flattened tensor.
    #[inline(always)]
    pub(super) fn read_flat<S: Simd>(&self, simd: S, range: Range<usize>, out: &mut [f32]) {
        let cols = self.shape[2];
        let mut at = range.start;
        while at < range.end {
            let (row, col) = (at / cols, at % cols);
            let count = (cols - col).min(range.end - at);
            self.read(simd, row..row + 1, col..col + count, &mut out[at - range.start..][..count]);
            at += count;
        }
    }

    /// Widens `LANES` rows, which are neighbours in memory, of as many columns into rows `width` apart.
    #[inline(always)]
    fn read_turned<S: Simd>(&self, simd: S, row: usize, col: usize, out: &mut [f32], width: usize) {
        let mut columns = [simd.splat(0.0); codebook::LEN];
        let columns = &mut columns[..S::LANES];
        for (i, column) in columns.iter_mut().enumerate() {
            let from = self.row(row).wrapping_offset((col + i) as isize * self.strides[2]);
            // SAFETY: `LANES` elements of the view.
            *column = unsafe { simd.load(from) };
        }
        simd.transpose(columns);
        for (i, row) in columns.iter().enumerate() {
            let to = &mut out[i * width..][..S::LANES];
            // SAFETY: `to` has room for a vector.
            unsafe { simd.store(to.as_mut_ptr(), *row) };
        }
    }

    /// The error for the element at (`row`, `col`), whose position is named as the caller counts dimensions.
    pub(super) fn non_finite(&self, row: usize, col: usize, value: f32) -> Error {
        let (expert, row) = (row / self.shape[1].max(1), row % self.shape[1].max(1));
        let index = if self.shape[0] == 1 { vec![row, col] } else { vec![expert, row, col] };
        Error::NonFinite { index, value }
    }
}
