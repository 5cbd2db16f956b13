//! What a packed weight is made of: its [`Spec`], the [`Layout`] of its blocks, nibbles, and double-quantized scales.

mod blocks;
pub mod double_quant;
pub mod packing;
mod spec;

pub use blocks::Layout;
pub use spec::{BlockOrder, BlockSize, Format, Shift, Spec};
