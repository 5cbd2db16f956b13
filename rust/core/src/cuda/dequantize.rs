//! Unpacking weights, parts of them, and single rows.

use super::Queue;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::plan::{Operation, Problem, plan};
use super::weight::{DeviceBuffer, DeviceFloats, DeviceWeight, row_codes};
use crate::{Error, Result};

/// Weights that a thread unpacks together: `kVector` of `cuda/dequantize.cu`.
const VECTOR: usize = 8;

/// A part of a weight: `rows` x `cols` of it from (`first_row`, `first_col`) on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first row.
    pub first_row: usize,
    /// The first column.
    pub first_col: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
}

/// As the kernels get it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct KernelWindow {
    first_row: i64,
    first_col: i64,
    rows: i64,
    cols: i64,
}

// SAFETY: `repr(C)`, the fields of `Window` in `cuda/dequantize.cu`.
unsafe impl Argument for KernelWindow {}

/// Unpacks a part of `weight` into `out`, `[window.rows, window.cols]`, with one rounding from fp32.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out` meanwhile.
pub unsafe fn dequantize(queue: Queue, weight: &DeviceWeight, window: Window, out: DeviceFloats) -> Result<()> {
    let layout = weight.layout();
    let is_inside = window.first_row.checked_add(window.rows).is_some_and(|end| end <= layout.rows)
        && window.first_col.checked_add(window.cols).is_some_and(|end| end <= layout.cols);
    if !is_inside {
        return Err(Error::invalid(
            "window",
            format!("{window:?}"),
            format!("a part of [{}, {}]", layout.rows, layout.cols),
        ));
    }
    let count = window.rows * window.cols;
    if out.buffer.len != count {
        let expected = format!("{} rows of {}", window.rows, window.cols);
        return Err(Error::invalid("out", format!("{} elements", out.buffer.len), expected));
    }
    let window = flattened(weight, window);
    let is_vectorized = is_vectorized(weight, window, out);
    let problem = Problem {
        operation: Operation::Dequantize,
        dtype: out.dtype,
        spec: *weight.spec(),
        layout: *layout,
        count,
        is_vectorized,
    };
    let plan = plan(&problem, queue.device.capability())?;
    let Window { first_row, first_col, rows, cols } = window;
    let part =
        KernelWindow { first_row: first_row as i64, first_col: first_col as i64, rows: rows as i64, cols: cols as i64 };
    let to = Pointer(out.buffer.address);
    let arguments = Arguments::new().with(weight.kernel()).with(&part).with(&to);
    // SAFETY: the parameters of `dequantize_*`; the window lies within the weight and fills `out`.
    unsafe { launch(queue, &plan, arguments, &[layout.rows, layout.cols]) }
}

/// A window of whole rows as one long row, where codes and blocks run on from row to row.
fn flattened(weight: &DeviceWeight, window: Window) -> Window {
    let layout = weight.layout();
    let blocks_run_on = layout.straddles_rows || layout.cols.is_multiple_of(layout.block_size);
    if window.cols == layout.cols && row_codes(layout) == layout.cols && blocks_run_on {
        return Window { rows: 1.min(window.rows), cols: window.rows * window.cols, ..window };
    }
    window
}

/// Whether whole vectors can be moved: aligned, and each within a row and a block.
fn is_vectorized(weight: &DeviceWeight, window: Window, out: DeviceFloats) -> bool {
    let layout = weight.layout();
    let first_code = window.first_row * row_codes(layout) + window.first_col;
    let rows_are_aligned =
        window.rows == 1 || (window.cols.is_multiple_of(VECTOR) && row_codes(layout).is_multiple_of(VECTOR));
    rows_are_aligned
        && first_code.is_multiple_of(VECTOR)
        && layout.block_size.is_multiple_of(VECTOR)
        && (!layout.straddles_rows || window.rows == 1)
        && window.cols < 1 << 34
        && weight.kernel().codes.0.is_multiple_of((VECTOR * layout.bits / 8) as u64)
        && out.buffer.address.is_multiple_of(16)
}

/// Unpacks row `rows[i]` of `weight` (int64 indices) into row `i` of `out`, `[rows.len, cols]`.
///
/// An index outside the weight fails an assertion on the device, which torch reports as it does its own.
///
/// # Safety
/// As for [`dequantize()`].
pub unsafe fn dequantize_rows(
    queue: Queue,
    weight: &DeviceWeight,
    rows: DeviceBuffer,
    out: DeviceFloats,
) -> Result<()> {
    let layout = weight.layout();
    if out.buffer.len != rows.len * layout.cols {
        let expected = format!("{} rows of {}", rows.len, layout.cols);
        return Err(Error::invalid("out", format!("{} elements", out.buffer.len), expected));
    }
    let problem = Problem {
        operation: Operation::DequantizeRows,
        dtype: out.dtype,
        spec: *weight.spec(),
        layout: *layout,
        count: rows.len,
        is_vectorized: false,
    };
    let plan = plan(&problem, queue.device.capability())?;
    let (from, count, to) = (Pointer(rows.address), rows.len as i64, Pointer(out.buffer.address));
    let arguments = Arguments::new().with(weight.kernel()).with(&from).with(&count).with(&to);
    // SAFETY: the parameters of `dequantize_rows_*`; it checks the indices, and `out` has a row for each.
    unsafe { launch(queue, &plan, arguments, &[layout.rows, layout.cols, rows.len]) }
}
