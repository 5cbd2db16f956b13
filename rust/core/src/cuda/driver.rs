//! NVIDIA's driver library: whether there is one, and what its errors are called.

use std::ffi::CStr;
use std::panic::catch_unwind;
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::{Error, Result};

/// `cuDriverGetVersion` of the 580 series, the first that takes the PTX of our compiler.
const OLDEST_VERSION: i32 = 13_000;
const EXPECTED: &str = "expected NVIDIA's driver 580 or newer (the CUDA toolkit is not needed)";

/// Finds and starts the driver, once; the outcome is remembered. An error says what is missing.
pub(super) fn require() -> Result<()> {
    static OUTCOME: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let outcome = OUTCOME.get_or_init(|| {
        // The bindings panic where the library, or a symbol in an old one, is missing.
        catch_unwind(probe).unwrap_or_else(|_| Err(format!("got a driver library that lacks functions, {EXPECTED}")))
    });
    outcome.clone().map_err(|reason| Error::Cuda { what: "CUDA".to_owned(), reason })
}

fn probe() -> std::result::Result<(), String> {
    // SAFETY: loading NVIDIA's library runs its initializers, which any program that uses it relies on.
    if !unsafe { sys::is_culib_present() } {
        return Err(format!("got no driver library (libcuda), {EXPECTED}"));
    }
    // SAFETY: takes a number.
    let started = unsafe { sys::cuInit(0) };
    if started != sys::CUresult::CUDA_SUCCESS {
        return Err(format!("cuInit: got {}, expected a working GPU; does nvidia-smi show one?", describe(started)));
    }
    let mut version = 0;
    // SAFETY: writes the integer.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if asked != sys::CUresult::CUDA_SUCCESS || version < OLDEST_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(format!("got a driver for CUDA {major}.{minor}, {EXPECTED}"));
    }
    Ok(())
}

/// An error, unless `result` is success; `what` names the call and what it was about.
pub(super) fn check(result: sys::CUresult, what: impl FnOnce() -> String) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(Error::Cuda { what: what(), reason: describe(result) })
}

/// CUDA's name and description of an error: `CUDA_ERROR_INVALID_VALUE (invalid argument)`.
fn describe(result: sys::CUresult) -> String {
    let (mut name, mut text) = (ptr::null(), ptr::null());
    // SAFETY: each writes a pointer to a string that lives forever, or null for a number it does not know.
    unsafe {
        sys::cuGetErrorName(result, &raw mut name);
        sys::cuGetErrorString(result, &raw mut text);
        let name = if name.is_null() { "unknown CUDA error".into() } else { CStr::from_ptr(name).to_string_lossy() };
        if text.is_null() { name.into_owned() } else { format!("{name} ({})", CStr::from_ptr(text).to_string_lossy()) }
    }
}
