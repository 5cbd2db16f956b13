//! CPU kernels. Each is one generic function over the trait `Simd`, compiled for every instruction set and chosen by
//! `isa::dispatch`.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activations;
mod aligned;
mod codes;
mod decode;
mod dequantize;
mod dot;
mod int8_rows;
mod isa;
mod linear;
mod norm;
mod panel;
mod parallel;
mod path;
mod quantize;
mod scalar;
mod scales;
mod simd;
mod source;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::Activations;
pub use dequantize::{dequantize, dequantize_rows};
pub use isa::Isa;
pub use linear::{linear, linear_grad_input};
pub use norm::{Affine, Residual, norm};
pub use path::{ActivationFormat, rounded_from};
pub use quantize::{NonFinite, quantize};
pub use source::Source;
