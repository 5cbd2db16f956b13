//! What the copy engine of compute capability 9.0 has to know of a matrix in device memory.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::driver::check;
use crate::Result;

/// A `CUtensorMap`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap([u64; 16]);

const _: () = assert!(size_of::<TensorMap>() == size_of::<sys::CUtensorMap>());

/// How much more of a row the L2 cache fetches than was asked for: all around it of this many bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fetch {
    Bytes128,
    Bytes256,
}

/// A matrix whose rows lie `row_bytes` apart, a multiple of 16 as the address is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub(super) address: u64,
    /// 1 or 2.
    pub(super) element_bytes: usize,
    /// Rows and columns.
    pub(super) shape: [usize; 2],
    pub(super) row_bytes: usize,
}

impl TensorMap {
    /// Of nothing.
    pub(super) fn unused() -> Self {
        Self([0; 16])
    }
}

impl Matrix {
    /// For boxes of so many columns and rows, each up to 256. The columns are 32, 64 or 128 bytes, and chunks of 16 bytes
    /// change places as in the swizzle of that width. Elements outside the matrix are 0.
    pub(super) fn map(&self, [columns, rows]: [u32; 2], fetch: Fetch) -> Result<TensorMap> {
        use sys::{CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle};
        let swizzle = match columns as usize * self.element_bytes {
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let element = match self.element_bytes {
            1 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        };
        let promotion = match fetch {
            Fetch::Bytes128 => Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            Fetch::Bytes256 => Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        };
        let shape = [self.shape[1] as u64, self.shape[0] as u64];
        let strides = [self.row_bytes as u64];
        let (size, steps) = ([columns, rows], [1, 1]);
        let mut map = TensorMap::unused();
        // SAFETY: the arrays have as many numbers as a matrix needs, and the map is large enough and aligned. The address
        // is not looked at here.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                element,
                2,
                self.address as *mut c_void,
                shape.as_ptr(),
                strides.as_ptr(),
                size.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                promotion,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(encoded, || format!("{self:?}, boxes of {columns} x {rows}: cuTensorMapEncodeTiled"))?;
        Ok(map)
    }
}
