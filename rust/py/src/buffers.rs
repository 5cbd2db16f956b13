//! Memory of torch tensors, as the addresses and lengths that Python passes.

use half::{bf16, f16};
use lowbit_core::dtype::{Dtype, Floats, FloatsMut};
use lowbit_core::{Error, Result};

/// Address and number of elements.
pub(crate) type Buffer = (usize, usize);
/// Address, number of elements and dtype's name.
pub(crate) type FloatBuffer = (usize, usize, String);

/// Refuses an address that no element of `T` can have: torch's tensors over foreign memory may start at one, and those
/// whose storage was freed are at 0.
fn check_alignment<T>(address: usize) -> Result<()> {
    if address != 0 && address.is_multiple_of(align_of::<T>()) {
        return Ok(());
    }
    let expected = format!("a multiple of {} bytes, not 0", align_of::<T>());
    Err(Error::invalid("buffer", format!("the address {address:#x}"), expected))
}

/// The elements at an address; an error where they are not aligned.
///
/// # Safety
/// The caller's tensor holds `count` elements of `T` there, outlives `'a`, and is not written to meanwhile.
pub(crate) unsafe fn slice<'a, T>((address, count): Buffer) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check_alignment::<T>(address)?;
    // SAFETY: aligned as just checked; the rest is handed on to the caller.
    Ok(unsafe { std::slice::from_raw_parts(address as *const T, count) })
}

/// The elements at an address, to be written.
///
/// # Safety
/// As for [`slice()`], and nobody else reads or writes them meanwhile.
pub(crate) unsafe fn slice_mut<'a, T>((address, count): Buffer) -> Result<&'a mut [T]> {
    if count == 0 {
        return Ok(&mut []);
    }
    check_alignment::<T>(address)?;
    // SAFETY: aligned as just checked; the rest is handed on to the caller.
    Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut T, count) })
}

/// The floats at an address.
///
/// # Safety
/// As for [`slice()`].
pub(crate) unsafe fn floats<'a>(buffer: Buffer, dtype: Dtype) -> Result<Floats<'a>> {
    // SAFETY: handed on to the caller.
    Ok(unsafe {
        match dtype {
            Dtype::Float32 => Floats::Float32(slice::<f32>(buffer)?),
            Dtype::Float16 => Floats::Float16(slice::<f16>(buffer)?),
            Dtype::Bfloat16 => Floats::Bfloat16(slice::<bf16>(buffer)?),
        }
    })
}

/// The floats at an address, to be written.
///
/// # Safety
/// As for [`slice_mut()`].
pub(crate) unsafe fn floats_mut<'a>(buffer: Buffer, dtype: Dtype) -> Result<FloatsMut<'a>> {
    // SAFETY: handed on to the caller.
    Ok(unsafe {
        match dtype {
            Dtype::Float32 => FloatsMut::Float32(slice_mut::<f32>(buffer)?),
            Dtype::Float16 => FloatsMut::Float16(slice_mut::<f16>(buffer)?),
            Dtype::Bfloat16 => FloatsMut::Bfloat16(slice_mut::<bf16>(buffer)?),
        }
    })
}
