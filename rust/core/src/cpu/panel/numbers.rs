//! What panels hold: fp32 numbers, pairs of bf16, or quads of int8.

use std::ops::Range;

use crate::cpu::activations::Activations;
use crate::cpu::int8_rows::Codes;
use crate::cpu::isa::{Isa, Kernel, dispatch};
use crate::cpu::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::cpu::x86::{avx512::Avx512, bf16_dots, vnni_dots};

/// The numbers of weights and activations in a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cpu) enum Numbers {
    /// fp32.
    Fp32,
    /// bf16, which activations have to be already; weights are rounded to it.
    Bf16,
    /// int8, for weights that are it by rows and activations that were rounded to it.
    Int8,
}

/// Where activations come from.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Source<'a> {
    pub(in crate::cpu) x: &'a Activations<'a>,
    /// What they were rounded to, for [`Numbers::Int8`].
    pub(in crate::cpu) rounded: Option<Codes<'a>>,
}

impl<'a> Source<'a> {
    /// Activations as they are.
    pub(in crate::cpu) fn exact(x: &'a Activations<'a>) -> Self {
        Self { x, rounded: None }
    }
}

/// How terms lie in 32-bit lanes, and the instruction that multiplies them.
pub(in crate::cpu) trait Terms<S: Simd>: Copy {
    /// Neighbouring terms in a lane: 1, 2, or 4 that are codes of the weight.
    const PACK: usize;

    /// Lane-wise `sum + a * b`, of all the terms of a lane.
    fn multiply_add(self, simd: S, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector;
    /// Some terms of row `token`, the first one a multiple of `PACK`, as lanes. What is behind the last one meets zeros.
    fn read(self, simd: S, source: Source<'_>, token: usize, terms: &Range<usize>, lanes: &mut [u32]);
    /// Stores two neighbouring terms of a vector of outputs where the first of them belongs; where they take a vector each,
    /// the second lies `next` numbers behind.
    ///
    /// # Safety
    /// The vectors are writable.
    unsafe fn store(self, simd: S, to: *mut f32, next: usize, terms: [S::Vector; 2]);
    /// What the sums of a vector of outputs are too large by, after a vector of weights more.
    #[inline(always)]
    fn excess(self, _simd: S, excess: S::Vector, _weights: S::Vector) -> S::Vector {
        excess
    }
    /// Sums in fp32, without their excess.
    #[inline(always)]
    fn to_f32(self, _simd: S, sum: S::Vector, _excess: S::Vector) -> S::Vector {
        sum
    }
}

/// One term in fp32 a lane.
#[derive(Clone, Copy)]
pub(super) struct Singles;

impl<S: Simd> Terms<S> for Singles {
    const PACK: usize = 1;

    #[inline(always)]
    fn multiply_add(self, simd: S, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector {
        simd.fma(a, b, sum)
    }

    #[inline(always)]
    fn read(self, simd: S, source: Source<'_>, token: usize, terms: &Range<usize>, lanes: &mut [u32]) {
        // SAFETY: fp32 and its bits are of one size.
        let numbers = unsafe { std::slice::from_raw_parts_mut(lanes.as_mut_ptr().cast::<f32>(), terms.len()) };
        source.x.read(simd, token, terms.start, numbers);
    }

    #[inline(always)]
    unsafe fn store(self, simd: S, to: *mut f32, next: usize, terms: [S::Vector; 2]) {
        // SAFETY: handed on to the caller.
        unsafe {
            simd.store(to, terms[0]);
            simd.store(to.add(next), terms[1]);
        }
    }
}

/// A computation written once for all numbers.
pub(super) trait TermsKernel {
    /// What it returns.
    type Output;
    /// Runs on `simd`; `#[inline(always)]` as [`Kernel::run`] is.
    fn run<S: Simd, T: Terms<S>>(self, simd: S, terms: T) -> Self::Output;
}

/// Runs `kernel` for `numbers` on `isa`, which has them.
pub(super) fn dispatch_terms<K: TermsKernel>(isa: Isa, numbers: Numbers, kernel: K) -> K::Output {
    match numbers {
        Numbers::Fp32 => dispatch(isa, InFp32(kernel)),
        #[cfg(target_arch = "x86_64")]
        Numbers::Bf16 => {
            assert!(Isa::Avx512Bf16.is_available());
            // SAFETY: as just asserted.
            unsafe { on_avx512_bf16(kernel) }
        }
        #[cfg(target_arch = "x86_64")]
        Numbers::Int8 => {
            assert!(Isa::Avx512Vnni.is_available());
            // SAFETY: as just asserted.
            unsafe { on_vnni(kernel) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Numbers::Bf16 | Numbers::Int8 => unreachable!("no instruction set here multiplies them in panels"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn on_avx512_bf16<K: TermsKernel>(kernel: K) -> K::Output {
    // SAFETY: this function is compiled for the instructions, and called only where they were detected.
    let (simd, pairs) = unsafe { (Avx512::new(), bf16_dots::Pairs::new()) };
    kernel.run(simd, pairs)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn on_vnni<K: TermsKernel>(kernel: K) -> K::Output {
    // SAFETY: as in `on_avx512_bf16`.
    let (simd, quads) = unsafe { (Avx512::new(), vnni_dots::Quads::new()) };
    kernel.run(simd, quads)
}

/// A kernel in fp32 as one of the instruction set alone.
struct InFp32<K>(K);

impl<K: TermsKernel> Kernel for InFp32<K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> K::Output {
        self.0.run(simd, Singles)
    }
}
