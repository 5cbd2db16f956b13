//! AMX: products of tiles of 16 rows of 64 bytes, the matrix unit of Intel's server processors since 2023.
//!
//! `product` multiplies, `fill` and `tables` decode weights into tiles, `ahead` asks memory for them, `pack` brings
//! activations into tiles, `scratch` is their memory, `tiles` has the instructions.

mod ahead;
mod fill;
mod pack;
mod product;
mod scratch;
mod tables;
mod tiles;

pub(in crate::cpu) use product::{Numbers, Product};
pub(in crate::cpu) use tiles::is_available;
