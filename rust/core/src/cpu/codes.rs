//! How packed codes become numbers: 4 bits through a table, 8 bits by conversion.

use super::simd::Simd;

/// A kind of codes. 32-bit words of packed codes are decoded element by element; lane `i` of a vector of words covers
/// the consecutive weights `PER_WORD * i ..`, and since a block is never shorter than 16, a lane has one scale.
pub(crate) trait Codes<S: Simd>: Copy {
    /// Codes in a 32-bit word.
    const PER_WORD: usize;

    /// Code `element` of every word.
    fn decode(self, simd: S, words: S::Vector, element: usize) -> S::Vector;

    /// `LANES` consecutive codes in their order.
    ///
    /// # Safety
    /// `4 * LANES / PER_WORD` bytes are readable at `from`.
    unsafe fn decode_in_order(self, simd: S, from: *const u8) -> S::Vector;
}

/// 4-bit codes and their table.
#[derive(Clone, Copy)]
pub(crate) struct Nibbles<S: Simd>(pub(crate) S::Table);

/// 8-bit codes.
#[derive(Clone, Copy)]
pub(crate) struct Bytes;

impl<S: Simd> Codes<S> for Nibbles<S> {
    const PER_WORD: usize = 8;

    #[inline(always)]
    fn decode(self, simd: S, words: S::Vector, element: usize) -> S::Vector {
        simd.nibble(self.0, words, element)
    }

    #[inline(always)]
    unsafe fn decode_in_order(self, simd: S, from: *const u8) -> S::Vector {
        // SAFETY: handed on to the caller.
        unsafe { simd.nibbles_in_order(self.0, from) }
    }
}

impl<S: Simd> Codes<S> for Bytes {
    const PER_WORD: usize = 4;

    #[inline(always)]
    fn decode(self, simd: S, words: S::Vector, element: usize) -> S::Vector {
        simd.byte(words, element)
    }

    #[inline(always)]
    unsafe fn decode_in_order(self, simd: S, from: *const u8) -> S::Vector {
        // SAFETY: handed on to the caller.
        unsafe { simd.bytes_in_order(from) }
    }
}

/// Runs `$body` with `$codes` bound to the weight's kind of codes.
macro_rules! with_codes {
    ($simd:expr, $weight:expr, $codes:ident => $body:expr) => {
        match $weight.codebook() {
            Some(codebook) => {
                let $codes = $crate::cpu::codes::Nibbles($simd.table(codebook.values()));
                $body
            }
            None => {
                let $codes = $crate::cpu::codes::Bytes;
                $body
            }
        }
    };
}
pub(crate) use with_codes;

/// Bytes of the widest vector.
const VECTOR_BYTES: usize = 64;

/// A vector of words from `bytes`, zeros behind its end: for the last vector of a row.
#[inline(always)]
pub(crate) fn load_words<S: Simd>(simd: S, bytes: &[u8]) -> S::Vector {
    if bytes.len() >= 4 * S::LANES {
        // SAFETY: as just checked.
        return unsafe { simd.load(bytes.as_ptr().cast::<f32>()) };
    }
    let mut buffer = [0; VECTOR_BYTES];
    buffer[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: no vector is longer than the buffer.
    unsafe { simd.load(buffer.as_ptr().cast::<f32>()) }
}
