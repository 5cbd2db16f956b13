//! `RMSNorm` and `LayerNorm` of rows, after the addition of a residual where there is one.

use super::Queue;
use super::int8::{DeviceRows, prepare_rows, round_rows};
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::DeviceActivations;
use super::norm_rows::{Kernel, Kernels, check_column, check_dense, check_rows, in_registers, is_vectorized};
use super::weight::{DeviceFloats, number};
use crate::Result;
use crate::norm::Norm;

/// A residual, and where its sum with x goes: rows as dense as those of the result.
#[derive(Debug, Clone, Copy)]
pub struct DeviceResidual {
    /// What is added to x.
    pub rows: DeviceActivations,
    /// `x + residual`, rounded to the dtype. What is normalized are these rounded numbers.
    pub total: DeviceFloats,
}

/// Factor and addend of every column, of any dtype.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceAffine {
    /// The factors; one where there are none.
    pub weight: Option<DeviceFloats>,
    /// The addends; zero where there are none.
    pub bias: Option<DeviceFloats>,
}

/// As the kernels get them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct NormOperands {
    x: Pointer,
    residual: Pointer,
    weight: Pointer,
    bias: Pointer,
    out: Pointer,
    total: Pointer,
    rows: i64,
    cols: i64,
    x_stride: i64,
    residual_stride: i64,
    eps: f32,
    weight_dtype: i32,
    bias_dtype: i32,
    is_centered: i32,
    offset: f32,
    rounds_normalized: i32,
}

const _: () = assert!(size_of::<NormOperands>() == 104, "as cuda/norm.cu has it");

// SAFETY: `repr(C)`, the fields of `Norm` in `cuda/norm.cu`.
unsafe impl Argument for NormOperands {}

const KERNELS: Kernels = Kernels {
    image: "norm",
    in_registers: in_registers!("norm"),
    elements: Some(["norm_elements_float32", "norm_elements_float16", "norm_elements_bfloat16"]),
    oldest: 75,
};
/// Those that round their result to int8.
const ROUNDING: Kernels =
    Kernels { image: "norm_int8", in_registers: in_registers!("norm_int8"), elements: None, oldest: 80 };

/// Normalizes `x`, `[tokens, cols]`, into `out`. All rows have one dtype.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out` and `total`
/// meanwhile.
pub unsafe fn norm(
    queue: Queue,
    norm: Norm,
    cols: usize,
    x: DeviceActivations,
    residual: Option<DeviceResidual>,
    affine: DeviceAffine,
    out: DeviceFloats,
) -> Result<()> {
    let call = Call::new(norm, cols, x, residual, affine, out)?;
    let plan = KERNELS.plan(call.shape, out.dtype, call.is_vectorized(), None, queue.device.capability())?;
    let arguments = Arguments::new().with(&call.operands);
    // SAFETY: the parameter of every kernel of `cuda/norm.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &call.shape) }
}

/// [`norm`], and its result in int8 as [`round_rows`] makes it with this threshold: in the same pass where a kernel does it.
///
/// # Safety
/// As for both.
#[allow(clippy::too_many_arguments)] // those of both
pub unsafe fn norm_rounded(
    queue: Queue,
    norm: Norm,
    cols: usize,
    x: DeviceActivations,
    residual: Option<DeviceResidual>,
    affine: DeviceAffine,
    out: DeviceFloats,
    threshold: f32,
    rows: DeviceRows,
) -> Result<()> {
    let call = Call::new(norm, cols, x, residual, affine, out)?;
    let result = DeviceActivations { values: out, tokens: x.tokens, stride: cols };
    let capability = queue.device.capability();
    if capability.compute < ROUNDING.oldest || !call.is_vectorized() || !ROUNDING.have_room(cols) {
        // SAFETY: the caller's promises are those of both.
        return unsafe {
            self::norm(queue, norm, cols, x, residual, affine, out)?;
            round_rows(queue, result, cols, threshold, rows)
        };
    }
    let Some(rounding) = prepare_rows(queue, &result, cols, threshold, &rows)? else { return Ok(()) };
    let plan = ROUNDING.plan(call.shape, out.dtype, true, None, capability)?;
    let arguments = Arguments::new().with(&call.operands).with(&rounding);
    // SAFETY: the parameters of every kernel of `cuda/norm_int8.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &call.shape) }
}

/// A normalization whose operands go together.
struct Call {
    operands: NormOperands,
    /// Rows and columns.
    shape: [usize; 2],
    /// Bytes of a number.
    size: usize,
}

impl Call {
    fn new(
        norm: Norm,
        cols: usize,
        x: DeviceActivations,
        residual: Option<DeviceResidual>,
        affine: DeviceAffine,
        out: DeviceFloats,
    ) -> Result<Self> {
        norm.check()?;
        check(cols, &x, residual.as_ref(), affine, out)?;
        let address = |floats: Option<DeviceFloats>| Pointer(floats.map_or(0, |floats| floats.buffer.address));
        let operands = NormOperands {
            x: Pointer(x.values.buffer.address),
            residual: address(residual.map(|residual| residual.rows.values)),
            weight: address(affine.weight),
            bias: address(affine.bias),
            out: Pointer(out.buffer.address),
            total: address(residual.map(|residual| residual.total)),
            rows: x.tokens as i64,
            cols: cols as i64,
            x_stride: x.stride as i64,
            residual_stride: residual.map_or(0, |residual| residual.rows.stride) as i64,
            eps: norm.eps,
            weight_dtype: affine.weight.map_or(0, |weight| number(weight.dtype)),
            bias_dtype: affine.bias.map_or(0, |bias| number(bias.dtype)),
            is_centered: norm.is_centered.into(),
            offset: norm.offset(),
            rounds_normalized: norm.rounds_normalized.into(),
        };
        // Without columns there is nothing to do, however many rows.
        let rows = if cols == 0 { 0 } else { x.tokens };
        Ok(Self { operands, shape: [rows, cols], size: out.dtype.size() })
    }

    fn is_vectorized(&self) -> bool {
        let operands = &self.operands;
        let addresses = [operands.x, operands.residual, operands.weight, operands.bias, operands.out, operands.total];
        let strides = [operands.x_stride, operands.residual_stride];
        is_vectorized(self.shape[1], &addresses.map(|address| address.0), &strides, self.size)
    }
}

fn check(
    cols: usize,
    x: &DeviceActivations,
    residual: Option<&DeviceResidual>,
    affine: DeviceAffine,
    out: DeviceFloats,
) -> Result<()> {
    check_rows("x", x, x, cols)?;
    check_dense("out", out, x, cols)?;
    if let Some(DeviceResidual { rows, total }) = residual {
        check_rows("residual", rows, x, cols)?;
        check_dense("total", *total, x, cols)?;
    }
    check_column("weight", affine.weight, cols)?;
    check_column("bias", affine.bias, cols)
}

#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    KERNELS.entries().chain(ROUNDING.entries())
}

#[cfg(test)]
mod tests {
    use super::super::plan::Capability;
    use super::super::samples::TURING;
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn every_kernel_is_built() {
        KERNELS.assert_built();
        ROUNDING.assert_built();
    }

    #[test]
    fn rows_have_room() {
        for (cols, entry, grid, threads) in [
            (72, "norm_float16_16x1", 7, 256),
            (128, "norm_float16_16x1", 7, 256),
            (136, "norm_float16_32x1", 13, 256),
            (4096, "norm_float16_256x2", 100, 256),
            (8192, "norm_float16_256x4", 100, 256),
            (16384, "norm_float16_512x4", 100, 512),
            (16392, "norm_elements_float16", 100, 256),
        ] {
            let plan = KERNELS.plan([100, cols], Dtype::Float16, true, None, TURING).expect("a plan");
            assert_eq!((plan.entry, plan.grid, plan.threads), (entry, [grid, 1], threads));
        }
        let plan = KERNELS.plan([1 << 30, 4096], Dtype::Float32, false, None, TURING).expect("a plan");
        assert_eq!((plan.entry, plan.grid), ("norm_elements_float32", [1 << 20, 1]));
    }

    #[test]
    fn what_no_gpu_does_is_refused() {
        let volta = Capability { compute: 70, ..TURING };
        assert!(KERNELS.plan([1 << 40, 4096], Dtype::Float32, true, None, TURING).is_err());
        assert!(KERNELS.plan([1, 4096], Dtype::Float32, true, None, volta).is_err());
        assert!(ROUNDING.plan([1, 16392], Dtype::Float32, true, None, TURING).is_err());
        assert!(!ROUNDING.have_room(16392));
    }
}
