//! CUDA: the driver, its modules and launches, and the operations on weights in device memory.
//!
//! Nothing here allocates device memory or makes streams: addresses and the stream come from the caller, and kernels run in
//! the primary context of a device, which is torch's. The driver is looked for when it is first needed, so a machine
//! without one runs everything else.

mod batch;
mod decode;
mod dequantize;
mod device;
mod driver;
mod grouped;
mod int8;
mod int8_plan;
mod launch;
mod linear;
mod linear_batch;
mod modules;
mod norm;
mod norm_backward;
mod norm_rows;
mod plan;
mod quantize;
#[cfg(test)]
mod samples;
mod tensor_map;
mod weight;

pub use batch::BatchSizes;
pub use dequantize::{Window, dequantize, dequantize_rows};
pub use device::Device;
pub use grouped::linear_grouped;
pub use int8::{DeviceRows, SIDE_NUMBERS, codes_stride, linear_int8, outlier_words, round_rows, rounded_from};
pub use linear::{DeviceActivations, MAX_TOKENS, linear};
pub use linear_batch::{BatchWorkspace, Gate, batch_sizes, linear_batch};
pub use norm::{DeviceAffine, DeviceResidual, norm, norm_rounded};
pub use norm_backward::{DeviceGradient, norm_backward, norm_sum_lines};
pub use quantize::{DeviceSource, Workspace, quantize};
pub use weight::{DeviceBuffer, DeviceFloats, DeviceWeight};

/// A device and one of its streams: where an operation runs. Work is queued, not waited for.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    /// The device, whose memory all addresses are in.
    pub device: &'static Device,
    /// The driver's handle of a stream of that device; 0 is the default stream.
    pub stream: usize,
    /// Whether a product may read its weight before the kernel in front of it in the stream has ended: it must not be that
    /// kernel which writes the weight. Activations are waited for in any case.
    pub may_overlap: bool,
}

/// Whether this build has CUDA kernels.
pub fn is_built() -> bool {
    !lowbit_kernels::IMAGES.is_empty()
}
