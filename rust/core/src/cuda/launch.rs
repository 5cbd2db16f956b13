//! The one place where kernels are launched.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::sys;

use super::Queue;
use super::driver::check;
use super::plan::Plan;
use crate::Result;

/// A value that kernels take by value.
///
/// # Safety
/// Its bytes are those of the parameter's type in the CUDA sources.
pub(super) unsafe trait Argument: Copy {}

// SAFETY: `int32_t`.
unsafe impl Argument for i32 {}
// SAFETY: `int64_t`.
unsafe impl Argument for i64 {}

/// An address in device memory; 0 is null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(super) struct Pointer(pub(super) u64);

// SAFETY: a pointer of any type.
unsafe impl Argument for Pointer {}

/// Most parameters of a kernel.
const MAX_ARGUMENTS: usize = 8;

/// The arguments of a launch, in the order of the kernel's parameters.
pub(super) struct Arguments<'a> {
    pointers: [*mut c_void; MAX_ARGUMENTS],
    count: usize,
    lent: PhantomData<&'a ()>,
}

impl<'a> Arguments<'a> {
    pub(super) fn new() -> Self {
        Self { pointers: [ptr::null_mut(); MAX_ARGUMENTS], count: 0, lent: PhantomData }
    }

    /// These arguments and one more.
    pub(super) fn with<T: Argument>(mut self, argument: &'a T) -> Self {
        self.pointers[self.count] = ptr::from_ref(argument).cast_mut().cast();
        self.count += 1;
        self
    }
}

/// Queues the kernel of `plan`; `shapes` are named in errors.
///
/// # Safety
/// The arguments are those of the kernel's parameters, one for each, and what it does with them stays within memory of the
/// device that is alive until the kernel has run.
pub(super) unsafe fn launch(queue: Queue, plan: &Plan, mut arguments: Arguments<'_>, shapes: &[usize]) -> Result<()> {
    let [x, y] = plan.grid;
    if x == 0 || y == 0 {
        return Ok(());
    }
    let _entered = queue.device.enter()?;
    let function = queue.device.modules.function(queue.device, plan)?;
    // Lets the kernel start while the one before it in the stream still runs; it waits itself before it reads its results.
    let mut overlap = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: plan.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: plan.shared_bytes,
        hStream: queue.stream as sys::CUstream,
        attrs: &raw mut overlap,
        numAttrs: (plan.is_dependent && queue.may_overlap).into(),
    };
    // SAFETY: the configuration and the arguments are alive during the call, which copies them; the rest is the caller's.
    let launched = unsafe {
        sys::cuLaunchKernelEx(&raw const config, function.0, arguments.pointers.as_mut_ptr(), ptr::null_mut())
    };
    check(launched, || {
        let Plan { entry, grid, threads, shared_bytes, .. } = plan;
        let device = queue.device;
        format!(
            "{entry} on {device}, shapes {shapes:?}, grid {grid:?} x {threads}, {shared_bytes} bytes: cuLaunchKernelEx"
        )
    })
}
