//! Double quantization: the scales of a weight as 8-bit codes with a scale per 256 of them (QLoRA, section 3).
//!
//! ```text
//! scale[i] = map[code[i]] * scale_2[i / 256] + offset
//! ```

use std::sync::OnceLock;

use crate::codebook::dynamic_map;

/// Scales that share a second-level scale.
pub const BLOCK: usize = 256;

/// What the codes of `scales` count from: the mean of those that are finite, summed in f64, so that it does not depend on the
/// order.
pub fn offset(scales: &[f32]) -> f32 {
    let finite = || scales.iter().filter(|scale| scale.is_finite()).map(|&scale| f64::from(scale));
    // The sum of nothing is -0.
    let mean = (finite().sum::<f64>() + 0.0) / finite().count().max(1) as f64;
    mean as f32
}

/// Quantizes `scales`, from the first of a block on, into `codes` and `scale_2`, one per [`BLOCK`], rounded up.
///
/// Codes are the exact nearest values of the dynamic map, ties to the even code. A NaN scale makes its 256 neighbours NaN.
pub fn quantize_blocks(scales: &[f32], offset: f32, codes: &mut [u8], scale_2: &mut [f32]) {
    for ((block, codes), scale_2) in scales.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scale_2) {
        let absmax = if block.iter().all(|scale| scale.is_finite()) {
            block.iter().map(|&scale| (scale - offset).abs()).fold(0.0, f32::max)
        } else {
            f32::NAN
        };
        // A subnormal maximum has no finite inverse; its block is all offset then.
        let inverse = if (1.0 / absmax).is_finite() { 1.0 / absmax } else { 0.0 };
        *scale_2 = absmax;
        for (code, &scale) in codes.iter_mut().zip(block) {
            *code = nearest((scale - offset) * inverse);
        }
    }
}

/// The scale of one code, with the two fp32 roundings of bitsandbytes' definition.
#[inline(always)]
pub fn restore(code: u8, scale_2: f32, offset: f32) -> f32 {
    dynamic_map()[code as usize] * scale_2 + offset
}

/// The code of the dynamic map's value nearest to `u`; a tie goes to the even code.
fn nearest(u: f32) -> u8 {
    let u = f64::from(u);
    let midpoints = midpoints();
    let below = midpoints.partition_point(|&midpoint| midpoint < u);
    let is_tie = midpoints.get(below) == Some(&u);
    if is_tie && below % 2 == 1 { below as u8 + 1 } else { below as u8 }
}

/// The 255 midpoints of the map, exact in f64.
fn midpoints() -> &'static [f64] {
    static MIDPOINTS: OnceLock<Vec<f64>> = OnceLock::new();
    MIDPOINTS.get_or_init(|| {
        let map = dynamic_map();
        map.windows(2).map(|pair| f64::midpoint(f64::from(pair[0]), f64::from(pair[1]))).collect()
    })
}
