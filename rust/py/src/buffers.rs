//! Memory of torch tensors, as the addresses and lengths that Python passes.

use half::{bf16, f16};
use lowbit_core::dtype::{Dtype, Floats, FloatsMut};

/// Address and number of elements.
pub(crate) type Buffer = (usize, usize);
/// Address, number of elements and dtype's name.
pub(crate) type FloatBuffer = (usize, usize, String);

/// The elements at an address.
///
/// # Safety
/// The caller's tensor holds `count` elements of `T` there, outlives `'a`, and is not written to meanwhile.
pub(crate) unsafe fn slice<'a, T>((address, count): Buffer) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: handed on to the caller; torch aligns its elements.
    unsafe { std::slice::from_raw_parts(address as *const T, count) }
}

/// The elements at an address, to be written.
///
/// # Safety
/// As for [`slice`], and nobody else reads or writes them meanwhile.
pub(crate) unsafe fn slice_mut<'a, T>((address, count): Buffer) -> &'a mut [T] {
    if count == 0 {
        return &mut [];
    }
    // SAFETY: handed on to the caller; torch aligns its elements.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, count) }
}

/// The floats at an address.
///
/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn floats<'a>(buffer: Buffer, dtype: Dtype) -> Floats<'a> {
    // SAFETY: handed on to the caller.
    unsafe {
        match dtype {
            Dtype::Float32 => Floats::Float32(slice::<f32>(buffer)),
            Dtype::Float16 => Floats::Float16(slice::<f16>(buffer)),
            Dtype::Bfloat16 => Floats::Bfloat16(slice::<bf16>(buffer)),
        }
    }
}

/// The floats at an address, to be written.
///
/// # Safety
/// As for [`slice_mut`].
pub(crate) unsafe fn floats_mut<'a>(buffer: Buffer, dtype: Dtype) -> FloatsMut<'a> {
    // SAFETY: handed on to the caller.
    unsafe {
        match dtype {
            Dtype::Float32 => FloatsMut::Float32(slice_mut::<f32>(buffer)),
            Dtype::Float16 => FloatsMut::Float16(slice_mut::<f16>(buffer)),
            Dtype::Bfloat16 => FloatsMut::Bfloat16(slice_mut::<bf16>(buffer)),
        }
    }
}
