//! Integer codebooks.

use super::{Codebook, LEN};

/// Symmetric 4-bit integers in two's complement order of the nibble's offset: code `i` stands for `i - 8`. A block's
/// absolute maximum is mapped to 7, so both signs are treated alike and the code of -8 stays unused.
pub fn int4() -> Codebook {
    from_fn(|code| code as f32 - 8.0)
}

/// Unsigned 4-bit integers 0 to 15, used with a shift per block: `w = scale * q + min`.
pub fn uint4() -> Codebook {
    from_fn(|code| code as f32)
}

fn from_fn(value: impl Fn(usize) -> f32) -> Codebook {
    let values: [f32; LEN] = std::array::from_fn(value);
    Codebook::new(&values).expect("sixteen finite values make a codebook")
}
