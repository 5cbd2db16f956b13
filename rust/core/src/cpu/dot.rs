//! How codes meet activations: one at a time in fp32, in pairs of int16, or in quads of int8.
//!
//! A vector of packed codes decodes to `UNITS` operands, each of which is multiplied with a vector of activations.
//! A 32-bit lane of an operand holds `PACK` weights. Which ones is the decoder's choice ([`Dot::element`]);
//! activations are put into its order once a call, so that codes are never moved into order.

mod dispatch;
mod rounding;

pub(super) use dispatch::{DotKernel, dispatch_dot};

use super::codes::Codes;
use super::simd::{IntDot, Simd};

/// What activations are multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arithmetic {
    /// fp32.
    Fp32,
    /// bf16, for activations that are it and 4-bit codes; the codebook is rounded alike.
    Bf16,
    /// int16 with 14 bits and a sign, a power of two as scale for every 16 activations; the codebook is rounded alike.
    /// It holds bf16 to the last bit down to 1/64 of the largest of the 16.
    Int16,
    /// int8 with a scale for an interval of activations; the codebook is rounded to int8.
    Int8,
}

impl Arithmetic {
    /// Whether activations become integers, with scales.
    pub(super) const fn is_integer(self) -> bool {
        matches!(self, Self::Int16 | Self::Int8)
    }
}

/// A kind of codes together with an arithmetic.
pub(super) trait Dot<S: Simd>: Copy {
    /// What activations are multiplied as.
    const ARITHMETIC: Arithmetic;
    /// Codes in a 32-bit word.
    const PER_WORD: usize;
    /// Activations in a 32-bit lane.
    const PACK: usize;
    /// Operands that a vector of words decodes to.
    const UNITS: usize = Self::PER_WORD / Self::PACK;
    /// Into how many sums the operands go: lanes of operands of different parts belong to different blocks.
    const PARTS: usize = 1;
    /// Codes in a vector of words.
    const GROUP: usize = Self::PER_WORD * S::LANES;
    /// Sums start from minus this times the activations that go into them, as integers.
    const OFFSET: i32 = 0;

    /// Which code of a group is number `i` of `lane` of operand `unit`. All that go into a lane of a part are of one
    /// block.
    fn element(unit: usize, lane: usize, i: usize) -> usize;
    /// Operand `unit` of a vector of words.
    fn operand(self, simd: S, words: S::Vector, unit: usize) -> S::Vector;
    /// `sum + operand . x` for every lane.
    fn dot(self, simd: S, sum: S::Vector, operand: S::Vector, x: S::Vector) -> S::Vector;
    /// Sums as fp32.
    fn to_f32(self, simd: S, sum: S::Vector) -> S::Vector;
    /// What the weights that it decodes to are to be multiplied with.
    fn factor(self) -> f32 {
        1.0
    }
}

/// Any codes in fp32.
#[derive(Clone, Copy)]
struct Singles<C>(C);

impl<S: Simd, C: Codes<S>> Dot<S> for Singles<C> {
    const ARITHMETIC: Arithmetic = Arithmetic::Fp32;
    const PER_WORD: usize = C::PER_WORD;
    const PACK: usize = 1;

    #[inline(always)]
    fn element(unit: usize, lane: usize, _i: usize) -> usize {
        C::PER_WORD * lane + unit
    }

    #[inline(always)]
    fn operand(self, simd: S, words: S::Vector, unit: usize) -> S::Vector {
        self.0.decode(simd, words, unit)
    }

    #[inline(always)]
    fn dot(self, simd: S, sum: S::Vector, operand: S::Vector, x: S::Vector) -> S::Vector {
        simd.fma(operand, x, sum)
    }

    #[inline(always)]
    fn to_f32(self, _simd: S, sum: S::Vector) -> S::Vector {
        sum
    }
}

/// The arithmetic of which so many integers are in a 32-bit lane.
const fn of_integers(pack: usize) -> Arithmetic {
    if pack == 2 { Arithmetic::Int16 } else { Arithmetic::Int8 }
}

/// 4-bit codes in integers: the table is a multiple of the codebook, rounded.
#[derive(Clone, Copy)]
struct IntNibbles<I, T> {
    ints: I,
    table: T,
    factor: f32,
}

impl<S: Simd, I: IntDot<S>> Dot<S> for IntNibbles<I, I::Table> {
    const ARITHMETIC: Arithmetic = of_integers(I::PACK);
    const PER_WORD: usize = 8;
    const PACK: usize = I::PACK;
    const PARTS: usize = I::NIBBLE_PARTS;
    const OFFSET: i32 = I::OFFSET;

    #[inline(always)]
    fn element(unit: usize, lane: usize, i: usize) -> usize {
        I::nibble_element(unit, lane, i)
    }

    #[inline(always)]
    fn operand(self, _simd: S, words: S::Vector, unit: usize) -> S::Vector {
        self.ints.nibbles(self.table, words, unit)
    }

    #[inline(always)]
    fn dot(self, _simd: S, sum: S::Vector, operand: S::Vector, x: S::Vector) -> S::Vector {
        self.ints.dot(sum, operand, x)
    }

    #[inline(always)]
    fn to_f32(self, simd: S, sum: S::Vector) -> S::Vector {
        simd.ints_to_f32(sum)
    }

    #[inline(always)]
    fn factor(self) -> f32 {
        self.factor
    }
}

/// 8-bit codes in integers, which hold them exactly.
#[derive(Clone, Copy)]
struct IntBytes<I>(I);

impl<S: Simd, I: IntDot<S>> Dot<S> for IntBytes<I> {
    const ARITHMETIC: Arithmetic = of_integers(I::PACK);
    const PER_WORD: usize = 4;
    const PACK: usize = I::PACK;
    const OFFSET: i32 = I::OFFSET;

    #[inline(always)]
    fn element(unit: usize, lane: usize, i: usize) -> usize {
        I::byte_element(unit, lane, i)
    }

    #[inline(always)]
    fn operand(self, _simd: S, words: S::Vector, unit: usize) -> S::Vector {
        self.0.bytes(words, unit)
    }

    #[inline(always)]
    fn dot(self, _simd: S, sum: S::Vector, operand: S::Vector, x: S::Vector) -> S::Vector {
        self.0.dot(sum, operand, x)
    }

    #[inline(always)]
    fn to_f32(self, simd: S, sum: S::Vector) -> S::Vector {
        simd.ints_to_f32(sum)
    }
}
