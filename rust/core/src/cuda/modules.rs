//! The images of a device, loaded one by one as operations are first used.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::{Mutex, PoisonError, RwLock};

use cudarc::driver::sys;

use super::device::Device;
use super::driver::check;
use super::plan::Plan;
use crate::codebook::dynamic_map;
use crate::{Error, Result};

/// The table of double-quantized scales, in every module that decodes them.
const DYNAMIC_MAP: &str = "lowbit_dynamic_map";

/// Images whose kernels decode no scales: to those who watch calls, asking for a symbol that is missing is an error.
const WITHOUT_DYNAMIC_MAP: [&str; 1] = ["norm"];

/// What is loaded.
#[derive(Debug, Default)]
pub(super) struct Modules {
    functions: RwLock<HashMap<&'static str, Function>>,
    modules: Mutex<HashMap<&'static str, Module>>,
}

/// A kernel, ready for launching with as much shared memory as any plan asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function(pub(super) sys::CUfunction);

#[derive(Debug, Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}
// SAFETY: as above.
unsafe impl Send for Module {}

impl Modules {
    /// The kernel of `plan`. The device's context is current.
    pub(super) fn function(&self, device: &Device, plan: &Plan) -> Result<Function> {
        if let Some(&function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(plan.entry) {
            return Ok(function);
        }
        let module = self.module(device, plan)?;
        let name = CString::new(plan.entry).expect("entries have no zero byte");
        let mut function = ptr::null_mut();
        // SAFETY: writes a handle.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut function, module.0, name.as_ptr()) };
        check(found, || format!("cuModuleGetFunction of {} on {device}", plan.entry))?;
        if plan.shared_bytes > 0 {
            // Without asking, a kernel has 48 KiB of it; another call of this one may need more than this call does.
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let most = device.capability().shared_bytes;
            // SAFETY: takes numbers and the handle.
            let granted = unsafe { sys::cuFuncSetAttribute(function, attribute, most as i32) };
            check(granted, || format!("cuFuncSetAttribute of {} on {device}: {most} bytes", plan.entry))?;
        }
        let function = Function(function);
        self.functions.write().unwrap_or_else(PoisonError::into_inner).insert(plan.entry, function);
        Ok(function)
    }

    fn module(&self, device: &Device, plan: &Plan) -> Result<Module> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&module) = modules.get(plan.image) {
            return Ok(module);
        }
        let image = lowbit_kernels::image(plan.image).ok_or_else(|| Error::Cuda {
            what: format!("{} on {device}", plan.image),
            reason: "this build has no CUDA kernels; build without LOWBIT_CUDA=0".to_owned(),
        })?;
        let mut module = ptr::null_mut();
        // SAFETY: the image is a whole fatbin.
        let loaded = unsafe { sys::cuModuleLoadData(&raw mut module, image.bytes.as_ptr().cast()) };
        check(loaded, || {
            format!(
                "cuModuleLoadData of {} on {device}, compute capability {}",
                image.name,
                device.capability().compute
            )
        })?;
        if !WITHOUT_DYNAMIC_MAP.contains(&image.name) {
            fill_dynamic_map(device, module)?;
        }
        modules.insert(image.name, Module(module));
        Ok(Module(module))
    }
}

/// Fills the table of the dynamic map, where a module has one.
fn fill_dynamic_map(device: &Device, module: sys::CUmodule) -> Result<()> {
    let name = CString::new(DYNAMIC_MAP).expect("no zero byte");
    let (mut address, mut bytes) = (0, 0);
    // SAFETY: writes two numbers.
    let found = unsafe { sys::cuModuleGetGlobal_v2(&raw mut address, &raw mut bytes, module, name.as_ptr()) };
    if found == sys::CUresult::CUDA_ERROR_NOT_FOUND {
        return Ok(());
    }
    let named = |call: &str| format!("{call} of {DYNAMIC_MAP} on {device}");
    check(found, || named("cuModuleGetGlobal"))?;
    let map = dynamic_map();
    assert_eq!(bytes, size_of_val(map), "the kernels' table is as long as ours");
    // SAFETY: `bytes` bytes on both sides.
    check(unsafe { sys::cuMemcpyHtoD_v2(address, map.as_ptr().cast(), bytes) }, || named("cuMemcpyHtoD"))
}
