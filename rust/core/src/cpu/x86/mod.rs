//! x86-64 instruction sets.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx2_dots;
pub(super) mod avx512;
pub(super) mod avx512_dots;
pub(super) mod bf16_dots;
pub(super) mod vnni_dots;
