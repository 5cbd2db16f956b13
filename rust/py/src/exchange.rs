//! torch's tensors, read without calling Python: through the table of C functions that `DLPack` 1.3 defines and torch has
//! from 2.10 on, in `torch.Tensor.__dlpack_c_exchange_api__`.

use std::ffi::{c_int, c_void};
use std::ptr;

use lowbit_core::dtype::Dtype;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// The version of the table that the structs below lay out.
const MAJOR: u32 = 1;

#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    to_managed: *const c_void,
    from_managed: *const c_void,
    describe: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
    current_stream: Option<unsafe extern "C" fn(c_int, i32, *mut *mut c_void) -> c_int>,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: Place,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

const _: () = assert!(size_of::<ExchangeApi>() == 56 && size_of::<DlTensor>() == 48, "as dlpack.h has them");

/// `DLPack`'s kind of a device, and its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Place {
    kind: i32,
    pub(crate) index: i32,
}

/// `DLPack`'s code of an element's type, and its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Element {
    code: u8,
    bits: u8,
}

/// What a dense tensor is to a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) element: Element,
    pub(crate) place: Place,
}

/// Functions of torch that a call needs.
pub(crate) struct Exchange {
    describe: unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int,
    current_stream: unsafe extern "C" fn(c_int, i32, *mut *mut c_void) -> c_int,
}

// SAFETY: functions of torch, without state of their own.
unsafe impl Send for Exchange {}
// SAFETY: as above.
unsafe impl Sync for Exchange {}

impl Place {
    const CUDA: i32 = 2;

    pub(crate) fn is_cuda(self) -> bool {
        self.kind == Self::CUDA
    }
}

impl Element {
    /// The float type that it is.
    pub(crate) fn float(self) -> Option<Dtype> {
        match (self.code, self.bits) {
            (2, 32) => Some(Dtype::Float32),
            (2, 16) => Some(Dtype::Float16),
            (4, 16) => Some(Dtype::Bfloat16),
            _ => None,
        }
    }
}

impl Exchange {
    /// That of a capsule of torch's; None where its version is another one.
    pub(crate) fn of_capsule(capsule: &Bound<'_, PyCapsule>) -> PyResult<Option<Self>> {
        let table = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?;
        // SAFETY: the capsule of this name holds the table, which lives as long as the process; its head is that of every
        // version, and what lies behind it that of this one.
        let api = unsafe { table.cast::<ExchangeApi>().as_ref() };
        if api.major != MAJOR {
            return Ok(None);
        }
        let functions = api.describe.zip(api.current_stream);
        Ok(functions.map(|(describe, current_stream)| Self { describe, current_stream }))
    }

    /// The memory of `tensor`, and its shape to `shape`; None for what is no dense tensor of plain elements at aligned
    /// addresses, or was freed.
    pub(crate) fn read(&self, tensor: &Bound<'_, PyAny>, shape: &mut Vec<i64>) -> Option<Memory> {
        let mut found = DlTensor {
            data: ptr::null_mut(),
            device: Place { kind: 0, index: 0 },
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: it takes any object, and writes the struct or sets an exception.
        if unsafe { (self.describe)(tensor.as_ptr().cast(), &raw mut found) } != 0 {
            drop(PyErr::take(tensor.py()));
            return None;
        }
        let ndim = usize::try_from(found.ndim).ok()?;
        shape.clear();
        let mut len = 1;
        for axis in (0..ndim).rev() {
            // SAFETY: both arrays have `ndim` elements, which live with the tensor.
            let (length, stride) = unsafe {
                (*found.shape.add(axis), if found.strides.is_null() { len } else { *found.strides.add(axis) })
            };
            if length != 1 && stride != len {
                return None;
            }
            shape.push(length);
            len *= length;
        }
        shape.reverse();
        let address = found.data as usize + found.byte_offset as usize;
        let is_plain = found.lanes == 1
            && (address != 0 || len == 0)
            && address.is_multiple_of(usize::from(found.bits / 8).max(1));
        let element = Element { code: found.code, bits: found.bits };
        (is_plain && len >= 0).then_some(Memory { address, len: len as usize, element, place: found.device })
    }

    /// The handle of torch's current stream on a device.
    pub(crate) fn current_stream(&self, py: Python<'_>, place: Place) -> PyResult<usize> {
        let mut stream = ptr::null_mut();
        // SAFETY: writes the handle, or sets an exception.
        if unsafe { (self.current_stream)(place.kind, place.index, &raw mut stream) } != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(stream as usize)
    }
}
