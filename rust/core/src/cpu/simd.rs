//! The few vector operations that every kernel is written in.
//!
//! A kernel is one generic function over [`Simd`]; an instruction set supplies this trait and nothing else. An
//! implementing type is a token: it exists only where its instructions were detected, which is what makes its safe
//! methods safe.

use crate::codebook;
use crate::dtype::Element;

/// Vectors of `LANES` fp32 numbers.
///
/// Every method is `#[inline(always)]` in every implementation: it must end up inside a function that is compiled for
/// the instruction set (see `isa::dispatch`).
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// fp32 numbers in a vector; a power of two up to 16.
    const LANES: usize;
    /// Tokens of the largest register tile of the matrix product, 4 or 8.
    const TILE_TOKENS: usize;
    /// `LANES` fp32 numbers, or as many 32-bit words.
    type Vector: Copy;
    /// Sixteen fp32 numbers that can be looked up by a 4-bit index.
    type Table: Copy;
    /// Which lane each lane of a vector is taken from.
    type Index: Copy;

    /// All lanes equal.
    fn splat(self, value: f32) -> Self::Vector;
    /// Lane-wise sum.
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Lane-wise product.
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Lane-wise `a * b + c`, rounded once.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Sum of all lanes, in a fixed order.
    fn sum(self, v: Self::Vector) -> f32;

    /// Loads `LANES` elements and widens them to fp32.
    ///
    /// # Safety
    /// `LANES` elements are readable at `from`, at any alignment.
    unsafe fn load<T: Element>(self, from: *const T) -> Self::Vector;
    /// Rounds `LANES` numbers to `T` (nearest, ties to even) and stores them.
    ///
    /// # Safety
    /// `LANES` elements are writable at `to`, at any alignment.
    unsafe fn store<T: Element>(self, to: *mut T, v: Self::Vector);

    /// Prepares a codebook for lookups.
    fn table(self, values: &[f32; codebook::LEN]) -> Self::Table;
    /// Looks up nibble `element` (0 to 7, in the order of packed elements) of every 32-bit lane.
    fn nibble(self, table: Self::Table, words: Self::Vector, element: usize) -> Self::Vector;
    /// Converts signed byte `element` (0 to 3) of every 32-bit lane to fp32.
    fn byte(self, words: Self::Vector, element: usize) -> Self::Vector;
    /// Decodes `LANES` consecutive 4-bit codes in their order.
    ///
    /// # Safety
    /// `LANES / 2` bytes are readable at `from`.
    unsafe fn nibbles_in_order(self, table: Self::Table, from: *const u8) -> Self::Vector;
    /// Looks up `LANES` consecutive bytes in a table of 256.
    ///
    /// # Safety
    /// `LANES` bytes are readable at `from`.
    unsafe fn look_up_bytes(self, table: &[f32; 256], from: *const u8) -> Self::Vector;
    /// Converts `LANES` consecutive signed bytes to fp32.
    ///
    /// # Safety
    /// `LANES` bytes are readable at `from`.
    unsafe fn bytes_in_order(self, from: *const u8) -> Self::Vector;

    /// Lane `i` is taken from lane `from(i)`.
    fn index(self, from: impl Fn(usize) -> usize) -> Self::Index;
    /// Rearranges lanes.
    fn permute(self, v: Self::Vector, index: Self::Index) -> Self::Vector;
    /// Transposes a `LANES` x `LANES` matrix of 32-bit words; `rows` holds `LANES` vectors.
    fn transpose(self, rows: &mut [Self::Vector]);

    /// For every lane, the number of thresholds below it, as bytes at `to`. NaN counts none.
    ///
    /// # Safety
    /// `LANES` bytes are writable at `to`.
    unsafe fn rank(self, v: Self::Vector, thresholds: &[f32; codebook::LEN - 1], to: *mut u8);
    /// Rounds to the nearest integer, ties to even, saturating to a signed byte.
    ///
    /// # Safety
    /// `LANES` bytes are writable at `to`.
    unsafe fn round_to_bytes(self, v: Self::Vector, to: *mut u8);

    /// Converts lanes that hold int32 to fp32.
    fn ints_to_f32(self, v: Self::Vector) -> Self::Vector;

    /// Asks memory for the cache line at `from`, which is brought into the L2 cache; any address will do.
    fn prefetch(self, from: *const u8);
    /// Asks the L2 cache for the cache line at `from`; any address will do.
    fn prefetch_near(self, from: *const u8);
}

/// Dot products of integers, exact in int32. A 32-bit lane of a vector holds `PACK` of them, or a sum.
pub(crate) trait IntDot<S: Simd>: Copy {
    /// What is multiplied.
    type Number;
    /// Numbers in a lane.
    const PACK: usize;
    /// What is added to every weight for the instruction's sake.
    const OFFSET: i32;
    /// See [`Dot::PARTS`](super::dot::Dot::PARTS), for 4-bit codes.
    const NIBBLE_PARTS: usize;
    /// Sixteen numbers that can be looked up by a 4-bit index.
    type Table: Copy;

    /// Prepares a table.
    fn table(self, values: &[Self::Number; codebook::LEN]) -> Self::Table;
    /// Which code of a vector of words is number `i` of `lane` of operand `unit`.
    fn nibble_element(unit: usize, lane: usize, i: usize) -> usize;
    /// Operand `unit` of a vector of words of 4-bit codes.
    fn nibbles(self, table: Self::Table, words: S::Vector, unit: usize) -> S::Vector;
    /// As [`Self::nibble_element`], for bytes.
    fn byte_element(unit: usize, lane: usize, i: usize) -> usize;
    /// Operand `unit` of a vector of words of signed bytes.
    fn bytes(self, words: S::Vector, unit: usize) -> S::Vector;
    /// `sum + weights . x` for every lane. `x` holds no -128 where numbers are bytes.
    fn dot(self, sum: S::Vector, weights: S::Vector, x: S::Vector) -> S::Vector;
}

/// The shift that brings nibble `element` of a little-endian word of packed codes to the low bits: the even element
/// is the high nibble of its byte.
pub(crate) const fn nibble_shift(element: usize) -> i32 {
    (8 * (element / 2) + 4 * (1 - element % 2)) as i32
}
