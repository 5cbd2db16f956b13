//! Block-quantized weights and the kernels that multiply with them.
//!
//! A 4-bit format is data: a [`codebook::Codebook`] of up to 16 values, a block size, a way to store the scale of a
//! block, and optionally a shift per block. One quantizer, one dequantizer and one matrix product serve them all:
//!
//! ```text
//! w[n, k] = scale[n, b] * codebook[q[n, k]] + shift[n, b],     b = k / block_size
//! ```
//!
//! Modules depend on one another in one direction only: `error`, `dtype` <- `codebook`, `format` <- `storage`,
//! `reference` <- `cpu`, `cuda`.

pub mod codebook;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod format;
pub mod norm;
pub mod reference;
pub mod storage;

pub use error::{Error, Result};
