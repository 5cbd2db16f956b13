//! Which instructions multiply in which arithmetic on which instruction set.

use super::{Arithmetic, Dot, IntBytes, IntNibbles, Singles, rounding};
#[cfg(target_arch = "aarch64")]
use crate::cpu::aarch64::{neon::Neon, neon_dots};
use crate::cpu::codes::{Bytes, Nibbles};
use crate::cpu::isa::{Isa, Kernel, dispatch};
use crate::cpu::scalar::{Scalar, ScalarPairs, ScalarQuads};
use crate::cpu::simd::{IntDot, Simd};
#[cfg(target_arch = "x86_64")]
use crate::cpu::x86::{avx2::Avx2, avx2_dots, avx512::Avx512, avx512_dots, bf16_dots, vnni_dots};
use crate::storage::PackedWeight;

/// A computation written once for all ways to multiply.
pub(in crate::cpu) trait DotKernel {
    /// What it returns.
    type Output;
    /// Runs on `simd`; `#[inline(always)]` as [`Kernel::run`] is.
    fn run<S: Simd, D: Dot<S>>(self, simd: S, dot: D) -> Self::Output;
}

/// Runs `kernel` for the codes of `weight` in `arithmetic` on `isa`.
pub(in crate::cpu) fn dispatch_dot<K: DotKernel>(
    isa: Isa,
    arithmetic: Arithmetic,
    weight: &PackedWeight<'_>,
    kernel: K,
) -> K::Output {
    debug_assert!(isa.is_available());
    match (arithmetic, isa) {
        (Arithmetic::Fp32, _) => dispatch(isa, InFp32 { weight, kernel }),
        // SAFETY: an `Isa` in circulation was detected on this machine.
        #[cfg(target_arch = "x86_64")]
        (Arithmetic::Bf16, Isa::Amx | Isa::Avx512Bf16) => unsafe { on_avx512_bf16(weight, kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (_, Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512Vnni) => unsafe { on_vnni(arithmetic, weight, kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (_, Isa::Avx512) => unsafe { on_avx512(arithmetic, weight, kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (_, Isa::Avx2) => unsafe { on_avx2(arithmetic, weight, kernel) },
        #[cfg(target_arch = "aarch64")]
        (_, Isa::Neon) => {
            // SAFETY: NEON is part of the aarch64 baseline.
            let simd = unsafe { Neon::new() };
            in_ints(arithmetic, simd, neon_dots::Pairs(simd), neon_dots::Quads(simd), weight, kernel)
        }
        _ => in_ints(arithmetic, Scalar, ScalarPairs, ScalarQuads, weight, kernel),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn on_avx512_bf16<K: DotKernel>(weight: &PackedWeight<'_>, kernel: K) -> K::Output {
    let Some(codebook) = weight.codebook() else { unreachable!("bytes are multiplied in other arithmetics") };
    // SAFETY: as in `on_vnni`.
    let (simd, pairs) = unsafe { (Avx512::new(), bf16_dots::Pairs::new()) };
    kernel.run(simd, bf16_dots::Nibbles::new(pairs, codebook.values()))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn on_vnni<K: DotKernel>(arithmetic: Arithmetic, weight: &PackedWeight<'_>, kernel: K) -> K::Output {
    // SAFETY: this function is compiled for the instructions, and called only where they were detected.
    let (simd, pairs, quads) = unsafe { (Avx512::new(), vnni_dots::Pairs::new(), vnni_dots::Quads::new()) };
    in_ints(arithmetic, simd, pairs, quads, weight, kernel)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn on_avx512<K: DotKernel>(arithmetic: Arithmetic, weight: &PackedWeight<'_>, kernel: K) -> K::Output {
    // SAFETY: as in `on_vnni`.
    let simd = unsafe { Avx512::new() };
    in_ints(arithmetic, simd, avx512_dots::Pairs(simd), avx512_dots::Quads(simd), weight, kernel)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn on_avx2<K: DotKernel>(arithmetic: Arithmetic, weight: &PackedWeight<'_>, kernel: K) -> K::Output {
    // SAFETY: as in `on_vnni`.
    let simd = unsafe { Avx2::new() };
    in_ints(arithmetic, simd, avx2_dots::Pairs(simd), avx2_dots::Quads(simd), weight, kernel)
}

#[inline(always)]
fn in_ints<S: Simd, P: IntDot<S, Number = i16>, Q: IntDot<S, Number = i8>, K: DotKernel>(
    arithmetic: Arithmetic,
    simd: S,
    pairs: P,
    quads: Q,
    weight: &PackedWeight<'_>,
    kernel: K,
) -> K::Output {
    match arithmetic {
        Arithmetic::Int8 => with_ints(simd, quads, weight, kernel),
        _ => with_ints(simd, pairs, weight, kernel),
    }
}

#[inline(always)]
fn with_ints<S: Simd, I: IntDot<S>, K: DotKernel>(simd: S, ints: I, weight: &PackedWeight<'_>, kernel: K) -> K::Output
where
    I::Number: rounding::Integer,
{
    match weight.codebook() {
        Some(codebook) => {
            let rounded = rounding::to_integers::<I::Number>(codebook.values());
            kernel.run(simd, IntNibbles { ints, table: ints.table(&rounded.values), factor: rounded.factor })
        }
        None => kernel.run(simd, IntBytes(ints)),
    }
}

/// [`Arithmetic::Fp32`] as a kernel of the instruction set alone.
struct InFp32<'a, K> {
    weight: &'a PackedWeight<'a>,
    kernel: K,
}

impl<K: DotKernel> Kernel for InFp32<'_, K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> K::Output {
        match self.weight.codebook() {
            Some(codebook) => self.kernel.run(simd, Singles(Nibbles::<S>(simd.table(codebook.values())))),
            None => self.kernel.run(simd, Singles(Bytes)),
        }
    }
}
