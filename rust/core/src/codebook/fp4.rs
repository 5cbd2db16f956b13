//! The 4-bit float of bitsandbytes: a sign, two exponent bits and one mantissa bit, scaled to a largest value of 1.

use super::{Codebook, LEN};

/// Magnitudes of codes 0 to 7; bit 3 of a code is the sign, so code 8 is -0. They are multiples of 1/12 but for the
/// subnormal 1/192.
const MAGNITUDES: [f32; 8] = [0.0, 1.0 / 192.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 6.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0];

/// Magnitude codes in ascending order of value.
const ASCENDING: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// What bitsandbytes' CUDA quantizer compares magnitudes with. Midpoints as decimal literals, of which five differ
/// from the midpoints of the fp32 values in the last bits; kept so that the codes agree.
const THRESHOLDS: [f32; 7] =
    [0.002_604_17, 0.085_937_5, 0.208_333_33, 0.291_666_67, 0.416_666_7, 0.583_333, 0.833_333_3];

/// The FP4 table. It is not monotonic in the code; ties go to the smaller magnitude, and -0 keeps its sign.
pub fn fp4() -> Codebook {
    let mut values = [0.0; LEN];
    let mut order = [0; LEN];
    let mut thresholds = [0.0; LEN - 1];
    for (rank, &magnitude_code) in ASCENDING.iter().enumerate() {
        let magnitude = MAGNITUDES[magnitude_code as usize];
        values[magnitude_code as usize] = magnitude;
        values[magnitude_code as usize + 8] = -magnitude;
        order[8 + rank] = magnitude_code;
        order[7 - rank] = magnitude_code + 8;
    }
    // `u > next_down(t)` is `u >= t`: on the negative side a tie goes up, to the smaller magnitude.
    for (i, &threshold) in THRESHOLDS.iter().enumerate() {
        thresholds[8 + i] = threshold;
        thresholds[6 - i] = (-threshold).next_down();
    }
    thresholds[7] = (0.0_f32).next_down();
    Codebook::assemble(&values, &order, &thresholds, 1.0)
}
