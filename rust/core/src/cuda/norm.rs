//! `RMSNorm` and `LayerNorm` of rows, after the addition of a residual where there is one.

use super::Queue;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::DeviceActivations;
use super::plan::{Capability, Plan, Share, THREADS, too_old};
use super::weight::{DeviceFloats, number};
use crate::dtype::Dtype;
use crate::norm::Norm;
use crate::{Error, Result};

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

/// Numbers of a vector, `kVector` of `cuda/norm.cu`.
const VECTOR: usize = 8;
/// The least compute capability.
const OLDEST: u32 = 75;
/// The image and its entries for rows of any kind.
const IMAGE: &str = "norm";
const ELEMENTS: [&str; 3] = ["norm_elements_float32", "norm_elements_float16", "norm_elements_bfloat16"];
/// Most blocks of those, which walk what is left over.
const MANY_BLOCKS: usize = 1 << 20;

/// A kernel that keeps a row in registers.
struct Kernel {
    /// Threads that share a row, and vectors that each of them has.
    lanes: usize,
    vectors: usize,
    /// Its entry for float32, float16 and bfloat16.
    entries: [&'static str; 3],
}

macro_rules! kernel {
    ($lanes:literal, $vectors:literal) => {
        Kernel {
            lanes: $lanes,
            vectors: $vectors,
            entries: [
                concat!("norm_float32_", $lanes, "x", $vectors),
                concat!("norm_float16_", $lanes, "x", $vectors),
                concat!("norm_bfloat16_", $lanes, "x", $vectors),
            ],
        }
    };
}

/// The first line that has room for a row serves it.
const KERNELS: &[Kernel] = &[
    kernel!(16, 1),
    kernel!(32, 1),
    kernel!(32, 2),
    kernel!(128, 1),
    kernel!(256, 1),
    kernel!(256, 2),
    kernel!(256, 4),
    kernel!(512, 4),
];

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
    let plan = plan(x.tokens, cols, out.dtype, operands.is_vectorized(out.dtype.size()), queue.device.capability())?;
    let arguments = Arguments::new().with(&operands);
    // SAFETY: the parameter of every kernel of `cuda/norm.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, cols]) }
}

impl NormOperands {
    /// Whether whole vectors can be moved: rows of them, aligned to 16 bytes.
    fn is_vectorized(&self, size: usize) -> bool {
        let addresses = [self.x, self.residual, self.weight, self.bias, self.out, self.total];
        let strides = [self.x_stride, self.residual_stride];
        (self.cols as usize).is_multiple_of(VECTOR)
            && addresses.iter().all(|address| address.0.is_multiple_of(16))
            && strides.iter().all(|&stride| (stride as usize * size).is_multiple_of(16))
    }
}

/// The kernel for `rows` rows, and its grid.
fn plan(rows: usize, cols: usize, dtype: Dtype, is_vectorized: bool, capability: Capability) -> Result<Plan> {
    if capability.compute < OLDEST {
        return Err(too_old(capability));
    }
    let of_dtype = number(dtype) as usize;
    let has_room = |kernel: &&Kernel| is_vectorized && cols <= kernel.lanes * kernel.vectors * VECTOR;
    let (entry, threads, blocks) = match KERNELS.iter().find(has_room) {
        Some(kernel) => {
            let threads = if kernel.lanes > 32 { kernel.lanes } else { THREADS };
            (kernel.entries[of_dtype], threads, rows.div_ceil(threads / kernel.lanes))
        }
        None => (ELEMENTS[of_dtype], THREADS, rows.min(MANY_BLOCKS)),
    };
    if blocks > i32::MAX as usize {
        let reason = format!("normalizing {rows} rows of {cols}");
        return Err(Error::Unsupported { what: "a grid of this size", reason });
    }
    Ok(Plan {
        image: IMAGE,
        entry,
        grid: [blocks as u32, 1],
        threads: threads as u32,
        shared_bytes: 0,
        is_dependent: false,
        share: Share::default(),
    })
}

fn check(
    cols: usize,
    x: &DeviceActivations,
    residual: Option<&DeviceResidual>,
    affine: DeviceAffine,
    out: DeviceFloats,
) -> Result<()> {
    check_rows("x", x, cols)?;
    let check_dense = |argument, to: DeviceFloats| {
        if to.buffer.len == x.tokens * cols && to.dtype == x.values.dtype {
            return Ok(());
        }
        let got = format!("{} elements of {}", to.buffer.len, to.dtype.name());
        Err(Error::invalid(argument, got, format!("{} rows of {cols} in {}", x.tokens, x.values.dtype.name())))
    };
    check_dense("out", out)?;
    if let Some(DeviceResidual { rows, total }) = residual {
        check_rows("residual", rows, cols)?;
        check_dense("total", *total)?;
        if rows.tokens != x.tokens || rows.values.dtype != x.values.dtype {
            let got = format!("{} rows of {}", rows.tokens, rows.values.dtype.name());
            let expected = format!("{} rows of {}", x.tokens, x.values.dtype.name());
            return Err(Error::invalid("residual", got, expected));
        }
    }
    for (argument, column) in [("weight", affine.weight), ("bias", affine.bias)] {
        if let Some(column) = column.filter(|column| column.buffer.len != cols) {
            let got = format!("{} elements", column.buffer.len);
            return Err(Error::invalid(argument, got, format!("{cols} elements")));
        }
    }
    Ok(())
}

fn check_rows(argument: &'static str, rows: &DeviceActivations, cols: usize) -> Result<()> {
    let needed = if rows.tokens == 0 { 0 } else { (rows.tokens - 1) * rows.stride + cols };
    if rows.values.buffer.len < needed {
        let got = format!("{} elements", rows.values.buffer.len);
        return Err(Error::invalid(argument, got, format!("{} rows of {cols}", rows.tokens)));
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().flat_map(|kernel| kernel.entries).chain(ELEMENTS)
}

#[cfg(test)]
mod tests {
    use super::super::samples::TURING;
    use super::*;

    #[test]
    fn every_kernel_is_built() {
        if let Some(image) = lowbit_kernels::image(IMAGE) {
            assert_eq!(image.oldest, OLDEST);
            for entry in entries() {
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
            let plan = plan(100, cols, Dtype::Float16, true, TURING).expect("a plan");
            assert_eq!((plan.entry, plan.grid, plan.threads), (entry, [grid, 1], threads));
        }
        let plan = plan(1 << 30, 4096, Dtype::Float32, false, TURING).expect("a plan");
        assert_eq!((plan.entry, plan.grid), ("norm_elements_float32", [1 << 20, 1]));
    }

    #[test]
    fn what_no_gpu_does_is_refused() {
        assert!(plan(1 << 40, 4096, Dtype::Float32, true, TURING).is_err());
        assert!(plan(1, 4096, Dtype::Float32, true, Capability { compute: 70, ..TURING }).is_err());
    }
}
