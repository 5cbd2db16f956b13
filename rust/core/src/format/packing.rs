//! Two 4-bit codes in a byte: the even element in the high nibble, as in bitsandbytes.

/// The 4-bit code at `index`, counted in codes.
#[inline(always)]
pub fn nibble(bytes: &[u8], index: usize) -> u8 {
    let byte = bytes[index / 2];
    if index.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
}

/// Packs `codes` (values below 16) into `bytes`; an odd one out is followed by `padding`.
#[inline(always)]
pub fn pack(codes: &[u8], padding: u8, bytes: &mut [u8]) {
    let pairs = codes.len() / 2;
    for (byte, pair) in bytes.iter_mut().zip(codes.chunks_exact(2)) {
        *byte = (pair[0] << 4) | pair[1];
    }
    if codes.len() % 2 == 1 {
        bytes[pairs] = (codes[codes.len() - 1] << 4) | padding;
    }
}

/// The inverse of [`pack`]: fills `codes` from `bytes`.
#[inline(always)]
pub fn unpack(bytes: &[u8], codes: &mut [u8]) {
    for (index, code) in codes.iter_mut().enumerate() {
        *code = nibble(bytes, index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_is_a_bijection(codes in prop::collection::vec(0_u8..16, 0..300), padding in 0_u8..16) {
            let mut bytes = vec![0xaa; codes.len().div_ceil(2)];
            pack(&codes, padding, &mut bytes);
            let mut back = vec![0; codes.len()];
            unpack(&bytes, &mut back);
            prop_assert_eq!(&back, &codes);
            if codes.len() % 2 == 1 {
                prop_assert_eq!(bytes[codes.len() / 2] & 15, padding);
            }
        }

        #[test]
        fn every_byte_survives_unpack_and_pack(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut codes = vec![0; bytes.len() * 2];
            unpack(&bytes, &mut codes);
            let mut back = vec![0; bytes.len()];
            pack(&codes, 0, &mut back);
            prop_assert_eq!(back, bytes);
        }
    }
}
