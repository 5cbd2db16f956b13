//! The CUDA kernels, compiled: one image an operation, as `cuda/kernels.list` names them.
//!
//! An image is a fatbin with PTX for some compute capabilities, which the driver compiles for any later one, and in wheels
//! with machine code. This crate has no dependencies and knows nothing of the driver.

pub mod list;

/// The kernels of one operation.
#[derive(Debug)]
pub struct Image {
    /// The operation: the name of its source file.
    pub name: &'static str,
    /// The least compute capability that it runs on, ten times the major version plus the minor one.
    pub oldest: u32,
    /// How many PTX targets it holds.
    pub ptx_targets: usize,
    /// The names of its kernels.
    pub entries: &'static [&'static str],
    /// What the driver loads.
    pub bytes: &'static [u8],
}

/// Every image; none where the crate was built without CUDA kernels.
pub const IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The image of an operation.
pub fn image(name: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.name == name)
}
