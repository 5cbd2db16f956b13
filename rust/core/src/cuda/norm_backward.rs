//! Gradients of `RMSNorm` and `LayerNorm`: to the rows that were normalized, to weight and bias.

use super::Queue;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::DeviceActivations;
use super::norm_rows::{Kernel, Kernels, check_column, check_dense, check_rows, in_registers, is_vectorized};
use super::plan::Capability;
use super::weight::{DeviceFloats, number};
use crate::dtype::Dtype;
use crate::norm::Norm;
use crate::{Error, Result};

/// What gradients are made of, and where they go. All rows have one dtype.
#[derive(Debug, Clone, Copy)]
pub struct DeviceGradient {
    /// The rows that were normalized: x, or its sum with the residual.
    pub rows: DeviceActivations,
    /// The gradient of their normalized numbers.
    pub grad: DeviceActivations,
    /// The gradient of the rows themselves from elsewhere, which is added: that of the sum with a residual.
    pub of_total: Option<DeviceActivations>,
    /// The factors of columns, of any dtype.
    pub weight: Option<DeviceFloats>,
    /// The gradient of the rows, dense.
    pub out: Option<DeviceFloats>,
    /// Partial sums in fp32, `[lines, cols]` for the weight, or `[lines, 2, cols]` for weight and bias of a centered
    /// norm: the gradients of both are the sums over lines.
    pub sums: Option<DeviceFloats>,
}

/// As the kernels get them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GradientOperands {
    x: Pointer,
    grad: Pointer,
    of_total: Pointer,
    weight: Pointer,
    out: Pointer,
    sums: Pointer,
    rows: i64,
    cols: i64,
    x_stride: i64,
    grad_stride: i64,
    of_total_stride: i64,
    eps: f32,
    weight_dtype: i32,
    is_centered: i32,
    offset: f32,
}

const _: () = assert!(size_of::<GradientOperands>() == 104, "as cuda/norm_backward.cu has it");

// SAFETY: `repr(C)`, the fields of `Gradient` in `cuda/norm_backward.cu`.
unsafe impl Argument for GradientOperands {}

const KERNELS: Kernels = Kernels {
    image: "norm_backward",
    in_registers: in_registers!("norm_backward"),
    elements: Some([
        "norm_backward_elements_float32",
        "norm_backward_elements_float16",
        "norm_backward_elements_bfloat16",
    ]),
    oldest: 75,
};
/// Threads of a multiprocessor that sum columns at once, where each has a lot to keep: about what `kResidentThreads` of the
/// sources leaves registers for.
const RESIDENT: usize = 768;
const RESIDENT_LONG: usize = 512;
/// Columns beyond which threads have that much.
const LONG: usize = 4096;

/// Lines of partial sums for the gradients of weight and bias over `rows` rows.
pub fn norm_sum_lines(device: &super::Device, rows: usize, cols: usize) -> usize {
    lines(rows, cols, device.capability())
}

fn lines(rows: usize, cols: usize, capability: Capability) -> usize {
    let threads = if cols > LONG { RESIDENT_LONG } else { RESIDENT };
    let blocks = (threads / KERNELS.threads(cols)).max(1);
    rows.min(blocks * capability.multiprocessors as usize)
}

/// Makes the gradients of rows `[tokens, cols]` that were normalized as `norm` says.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out` and `sums`
/// meanwhile.
pub unsafe fn norm_backward(queue: Queue, norm: Norm, cols: usize, gradient: DeviceGradient) -> Result<()> {
    let DeviceGradient { rows, grad, of_total, weight, out, sums } = gradient;
    norm.check()?;
    let capability = queue.device.capability();
    let blocks = lines(rows.tokens, cols, capability);
    check(norm, cols, &gradient, blocks)?;
    if rows.tokens == 0 || cols == 0 {
        return Ok(());
    }
    let address = |floats: Option<DeviceFloats>| Pointer(floats.map_or(0, |floats| floats.buffer.address));
    let operands = GradientOperands {
        x: Pointer(rows.values.buffer.address),
        grad: Pointer(grad.values.buffer.address),
        of_total: address(of_total.map(|rows| rows.values)),
        weight: address(weight),
        out: address(out),
        sums: address(sums),
        rows: rows.tokens as i64,
        cols: cols as i64,
        x_stride: rows.stride as i64,
        grad_stride: grad.stride as i64,
        of_total_stride: of_total.map_or(0, |rows| rows.stride) as i64,
        eps: norm.eps,
        weight_dtype: weight.map_or(0, |weight| number(weight.dtype)),
        is_centered: norm.is_centered.into(),
        offset: norm.offset(),
    };
    let dtype = rows.values.dtype;
    let whole = operands.is_vectorized(dtype.size());
    let plan = KERNELS.plan([rows.tokens, cols], dtype, whole, sums.map(|_| blocks), capability)?;
    let arguments = Arguments::new().with(&operands);
    // SAFETY: the parameter of every kernel of `cuda/norm_backward.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[rows.tokens, cols]) }
}

impl GradientOperands {
    fn is_vectorized(&self, size: usize) -> bool {
        let addresses = [self.x, self.grad, self.of_total, self.weight, self.out, self.sums].map(|address| address.0);
        is_vectorized(self.cols as usize, &addresses, &[self.x_stride, self.grad_stride, self.of_total_stride], size)
    }
}

fn check(norm: Norm, cols: usize, gradient: &DeviceGradient, lines: usize) -> Result<()> {
    let DeviceGradient { rows, grad, of_total, weight, out, sums } = gradient;
    check_rows("rows", rows, rows, cols)?;
    check_rows("grad", grad, rows, cols)?;
    of_total.as_ref().map_or(Ok(()), |of_total| check_rows("grad_total", of_total, rows, cols))?;
    check_column("weight", *weight, cols)?;
    out.map_or(Ok(()), |out| check_dense("out", out, rows, cols))?;
    let needed = lines * cols * if norm.is_centered { 2 } else { 1 };
    match sums {
        Some(sums) if sums.dtype != Dtype::Float32 || sums.buffer.len != needed => {
            let got = format!("{} elements of {}", sums.buffer.len, sums.dtype.name());
            Err(Error::invalid("sums", got, format!("{needed} elements of float32")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    KERNELS.entries()
}

#[cfg(test)]
mod tests {
    use super::super::samples::TURING;
    use super::*;

    #[test]
    fn every_kernel_is_built() {
        KERNELS.assert_built();
    }

    #[test]
    fn blocks_walk_rows_where_columns_are_summed() {
        let capability = Capability { multiprocessors: 10, ..TURING };
        for (rows, cols, blocks) in [(7, 4096, 7), (4096, 4096, 30), (4096, 8192, 20), (4096, 16384, 10), (99, 64, 30)]
        {
            assert_eq!(lines(rows, cols, capability), blocks);
            let plan = KERNELS.plan([rows, cols], Dtype::Bfloat16, true, Some(blocks), capability).expect("a plan");
            assert_eq!(plan.grid, [blocks as u32, 1]);
        }
    }
}
