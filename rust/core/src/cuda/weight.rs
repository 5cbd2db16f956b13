//! A packed weight in device memory: checked addresses, and the form in which kernels get it.

use super::launch::{Argument, Pointer};
use crate::codebook::{self, Codebook};
use crate::dtype::Dtype;
use crate::format::{Layout, Spec};
use crate::storage::Buffers;
use crate::{Error, Result};

/// Elements in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBuffer {
    /// Address of the first.
    pub address: u64,
    /// Their number.
    pub len: usize,
}

/// Floats in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFloats {
    /// The elements.
    pub buffer: DeviceBuffer,
    /// Their type.
    pub dtype: Dtype,
}

/// A packed `[rows, cols]` weight in device memory, whose buffers are known to have the right lengths.
#[derive(Debug, Clone)]
pub struct DeviceWeight {
    spec: Spec,
    layout: Layout,
    kernel: KernelWeight,
}

/// As kernels get it: `Weight` of `cuda/include/lowbit/weight.cuh`, field by field.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct KernelWeight {
    pub(super) codes: Pointer,
    pub(super) scales: Pointer,
    pub(super) scale_2: Pointer,
    pub(super) scale_offset: Pointer,
    pub(super) shifts: Pointer,
    pub(super) codebook: Pointer,
    pub(super) rows: i64,
    pub(super) cols: i64,
    pub(super) row_codes: i64,
    pub(super) blocks_per_row: i64,
    pub(super) block_size: i64,
    block_shift: i32,
    straddles_rows: i32,
    bits: i32,
    scale_dtype: i32,
    codebook_length: i32,
    table: [f32; codebook::LEN],
}

const _: () = assert!(size_of::<KernelWeight>() == 176, "as weight.cuh has it");

// SAFETY: `repr(C)`, the fields of `Weight` in their order.
unsafe impl Argument for KernelWeight {}

/// The number of a dtype in kernels: `Dtype` of `cuda/include/lowbit/dtype.cuh`.
pub(super) fn number(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::Float32 => 0,
        Dtype::Float16 => 1,
        Dtype::Bfloat16 => 2,
    }
}

impl DeviceWeight {
    /// A weight over buffers of the lengths that `spec` and the shape ask for; `double_quant` has the second-level scales
    /// and the offset. Shifts and plain scales are in the dtype of the spec.
    pub fn new(
        spec: Spec,
        (rows, cols): (usize, usize),
        codes: DeviceBuffer,
        scales: DeviceBuffer,
        double_quant: Option<(DeviceBuffer, DeviceBuffer)>,
        shifts: Option<DeviceBuffer>,
        codebook: Option<DeviceBuffer>,
    ) -> Result<Self> {
        let layout = Layout::new(&spec, rows, cols)?;
        Buffers {
            codes: codes.len,
            scales: scales.len,
            scale_dtype: (!spec.double_quant).then_some(spec.scale_dtype),
            scale_2: double_quant.map(|(scale_2, _)| scale_2.len),
            shifts: shifts.map(|shifts| (shifts.len, spec.scale_dtype)),
        }
        .check(&spec, &layout)?;
        if let Some((_, offset)) = double_quant.filter(|(_, offset)| offset.len != 1) {
            return Err(Error::invalid("scale_offset", format!("{} elements", offset.len), "1 element"));
        }
        let table = match codebook {
            Some(values) if !(2..=codebook::LEN).contains(&values.len) => {
                return Err(Error::invalid("codebook", format!("{} values", values.len), "2 to 16 values"));
            }
            // The values of a custom table are in device memory, and stay there.
            Some(_) => spec.codebook(Some(&[0.0, 1.0])).map(|_| [0.0; codebook::LEN])?,
            None => spec.codebook(None)?.as_ref().map_or([0.0; codebook::LEN], |codebook| *codebook.values()),
        };
        let pointer = |buffer: Option<DeviceBuffer>| buffer.map_or(Pointer(0), |buffer| Pointer(buffer.address));
        let kernel = KernelWeight {
            codes: Pointer(codes.address),
            scales: Pointer(scales.address),
            scale_2: pointer(double_quant.map(|(scale_2, _)| scale_2)),
            scale_offset: pointer(double_quant.map(|(_, offset)| offset)),
            shifts: pointer(shifts),
            codebook: pointer(codebook),
            rows: rows as i64,
            cols: cols as i64,
            row_codes: row_codes(&layout) as i64,
            blocks_per_row: layout.blocks_per_row() as i64,
            block_size: layout.block_size as i64,
            block_shift: block_shift(&layout),
            straddles_rows: layout.straddles_rows.into(),
            bits: layout.bits as i32,
            scale_dtype: number(spec.scale_dtype),
            codebook_length: codebook.map_or(codebook::LEN, |codebook| codebook.len) as i32,
            table,
        };
        Ok(Self { spec, layout, kernel })
    }

    /// How it is packed.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Where its codes and scales lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn kernel(&self) -> &KernelWeight {
        &self.kernel
    }

    /// The table that a tensor is packed with, `custom` being that of a custom format.
    pub(super) fn table(&self, custom: Option<&[f32]>) -> Result<Option<Codebook>> {
        self.spec.codebook(custom)
    }
}

/// Codes from one row to the next, with the padding of an odd one.
pub(super) fn row_codes(layout: &Layout) -> usize {
    layout.code_index(1, 0)
}

/// log2 of the block size, or -1 where it is no power of two.
fn block_shift(layout: &Layout) -> i32 {
    if layout.block_size.is_power_of_two() { layout.block_size.trailing_zeros() as i32 } else { -1 }
}
