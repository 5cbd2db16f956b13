//! `RMSNorm` and `LayerNorm` of rows, after the addition of a residual where there is one.

use super::Queue;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::DeviceActivations;
use super::norm_rows::{Kernel, Kernels, check_column, check_dense, check_rows, is_vectorized, kernels};
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

const KERNELS: Kernels = kernels!("norm");

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
    norm.check()?;
    check(cols, &x, residual.as_ref(), affine, out)?;
    if x.tokens == 0 || cols == 0 {
        return Ok(());
    }
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
    let whole = operands.is_vectorized(out.dtype.size());
    let plan = KERNELS.plan([x.tokens, cols], out.dtype, whole, None, queue.device.capability())?;
    let arguments = Arguments::new().with(&operands);
    // SAFETY: the parameter of every kernel of `cuda/norm.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, cols]) }
}

impl NormOperands {
    fn is_vectorized(&self, size: usize) -> bool {
        let addresses = [self.x, self.residual, self.weight, self.bias, self.out, self.total].map(|address| address.0);
        is_vectorized(self.cols as usize, &addresses, &[self.x_stride, self.residual_stride], size)
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
mod tests {
    use super::super::norm_rows::OLDEST;
    use super::super::plan::Capability;
    use super::super::samples::TURING;
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn every_kernel_is_built() {
        if let Some(image) = lowbit_kernels::image(KERNELS.image) {
            assert_eq!(image.oldest, OLDEST);
            for entry in KERNELS.entries() {
                assert!(image.entries.contains(&entry), "{entry}");
            }
        }
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
    }
}
