//! A GPU: its primary context, its properties, and the modules loaded into it.

use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::driver::{check, require};
use super::modules::Modules;
use super::plan::Capability;
use crate::{Error, Result};

/// More GPUs than one machine has.
const MAX_DEVICES: usize = 64;

/// A GPU whose primary context is retained for the life of the process.
#[derive(Debug)]
pub struct Device {
    ordinal: usize,
    context: sys::CUcontext,
    capability: Capability,
    pub(super) modules: Modules,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

static DEVICES: [OnceLock<Device>; MAX_DEVICES] = [const { OnceLock::new() }; MAX_DEVICES];

impl Device {
    /// The device that the driver and torch count as `ordinal`.
    pub fn get(ordinal: usize) -> Result<&'static Self> {
        static OPENING: Mutex<()> = Mutex::new(());
        let slot = DEVICES.get(ordinal);
        let slot =
            slot.ok_or_else(|| Error::invalid("device", format!("cuda:{ordinal}"), "a device of this machine"))?;
        if let Some(device) = slot.get() {
            return Ok(device);
        }
        let _opening = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = slot.get() {
            return Ok(device);
        }
        let opened = Self::open(ordinal)?;
        Ok(slot.get_or_init(|| opened))
    }

    fn open(ordinal: usize) -> Result<Self> {
        require()?;
        let named = |call: &str| format!("{call} of cuda:{ordinal}");
        let mut device = 0;
        let mut context = ptr::null_mut();
        // SAFETY: each call writes one value.
        unsafe {
            check(sys::cuDeviceGet(&raw mut device, ordinal as i32), || named("cuDeviceGet"))?;
            check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device), || named("cuDevicePrimaryCtxRetain"))?;
        }
        let attribute = |attribute: Attribute| {
            let mut value = 0;
            // SAFETY: writes the integer.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
            check(result, || named("cuDeviceGetAttribute")).map(|()| value as u32)
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let capability = Capability {
            compute: 10 * major + minor,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        Ok(Self { ordinal, context, capability, modules: Modules::default() })
    }

    /// The number that the driver and torch give it.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What kernels can be chosen by.
    pub fn capability(&self) -> Capability {
        self.capability
    }

    /// Makes its context the thread's until the guard is dropped. Costs next to nothing where it is already, which is
    /// so in a thread in which torch has used the device.
    pub(super) fn enter(&self) -> Result<Entered> {
        let mut current = ptr::null_mut();
        // SAFETY: writes a handle.
        check(unsafe { sys::cuCtxGetCurrent(&raw mut current) }, || "cuCtxGetCurrent".to_owned())?;
        let is_pushed = current != self.context;
        if is_pushed {
            // SAFETY: a context that is retained.
            check(unsafe { sys::cuCtxPushCurrent_v2(self.context) }, || format!("cuCtxPushCurrent of {self}"))?;
        }
        Ok(Entered { is_pushed })
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{}", self.ordinal)
    }
}

/// A thread's stay in a device's context.
#[must_use]
pub(super) struct Entered {
    is_pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.is_pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: takes off what `enter` put on. It can only fail as the process ends, when nobody is left to tell.
            unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}
