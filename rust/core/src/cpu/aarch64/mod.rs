//! aarch64 instruction sets.

pub(super) mod neon;
pub(super) mod neon_dots;
