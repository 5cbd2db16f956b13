//! aarch64 instruction sets.

pub(super) mod neon;
