//! Which instruction set runs: detected once, forced by `LOWBIT_ISA` or by a test, dispatched in one place.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(target_arch = "aarch64")]
use super::aarch64::neon::Neon;
use super::scalar::Scalar;
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::x86::{amx, avx2::Avx2, avx512::Avx512};
use crate::{Error, Result};

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// The next one, and AMX: products of tiles of bf16 and int8.
    Amx,
    /// The next one, and BF16: dot products of pairs of bf16.
    Avx512Bf16,
    /// The next one, and VNNI: dot products of int16 and int8.
    Avx512Vnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// aarch64.
    Neon,
    /// Any machine.
    Scalar,
}

impl Isa {
    /// Every instruction set, best first.
    pub const ALL: [Self; 7] =
        [Self::Amx, Self::Avx512Bf16, Self::Avx512Vnni, Self::Avx512, Self::Avx2, Self::Neon, Self::Scalar];

    /// The name that `LOWBIT_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Avx512Vnni => "avx512_vnni",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Scalar => "scalar",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Self::Avx512Vnni.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => is_x86_feature_detected!("avx512vnni") && Self::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Self::Neon => cfg!(target_arch = "aarch64"),
            Self::Scalar => true,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Amx | Self::Avx512Bf16 | Self::Avx512Vnni | Self::Avx512 | Self::Avx2 => false,
        }
    }

    /// The instruction sets of this machine, best first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The available instruction set that is called `name`.
    pub fn parse(argument: &'static str, name: &str) -> Result<Self> {
        let available = Self::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
            Error::invalid(argument, format!("{name:?}"), format!("one that this machine has: {}", names.join(", ")))
        })
    }

    /// The one in use: forced by [`Isa::force`], else named by the environment's `LOWBIT_ISA`, else the best.
    pub fn current() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Isa>> = OnceLock::new();
        match Self::ALL.get(FORCED.load(Ordering::Relaxed)) {
            Some(&isa) => Ok(isa),
            None => CHOSEN.get_or_init(Self::choose).clone(),
        }
    }

    /// Makes `isa` the one in use for the whole process; none returns to the choice made at first use.
    pub fn force(isa: Option<Self>) {
        let position = isa.and_then(|isa| Self::ALL.iter().position(|&other| other == isa));
        FORCED.store(position.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    fn choose() -> Result<Self> {
        match std::env::var("LOWBIT_ISA") {
            Ok(name) if !name.is_empty() => Self::parse("LOWBIT_ISA", &name),
            _ => Ok(Self::available().into_iter().find(|isa| isa.is_fast()).unwrap_or(Self::Scalar)),
        }
    }

    /// Whether it is worth taking where nobody asks for it. Sapphire Rapids has four fp32 products for one of bf16 without
    /// its tiles, which a virtual machine may hide.
    fn is_fast(self) -> bool {
        self != Self::Avx512Bf16 || !is_intel()
    }
}

/// Whether the processor is one of Intel's.
fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        #[allow(unused_unsafe)] // safe since Rust 1.94
        // SAFETY: every x86-64 processor has CPUID.
        let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Position in [`Isa::ALL`] of the forced instruction set, or beyond it.
static FORCED: AtomicUsize = AtomicUsize::new(usize::MAX);

/// A computation written once for all instruction sets.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Runs on `simd`. Implementations are `#[inline(always)]`, so that they are compiled for its instructions.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` on `isa`, which must come from [`Isa::current`], [`Isa::available`] or [`Isa::parse`].
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    debug_assert!(isa.is_available());
    match isa {
        // SAFETY: an `Isa` in circulation was detected on this machine.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512Vnni | Isa::Avx512 => unsafe { on_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { on_avx2(kernel) },
        // SAFETY: NEON is part of the aarch64 baseline.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => kernel.run(unsafe { Neon::new() }),
        _ => kernel.run(Scalar),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn on_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function is compiled for the instructions, and `dispatch` calls it only where they were detected.
    kernel.run(unsafe { Avx512::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn on_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: as in `on_avx512`.
    kernel.run(unsafe { Avx2::new() })
}
