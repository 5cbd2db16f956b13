//! The 8-bit dynamic map, with which double quantization stores the scales of blocks.

use std::sync::OnceLock;

/// Decades of the map: cells of decade `i` end at 10^(i - 6).
const DECADES: i32 = 7;

/// The signed dynamic map of bitsandbytes (8-Bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561):
/// 256 ascending values with 0 at index 127 and 1 at index 255, equal to bitsandbytes' table to the last bit.
///
/// Decade `i` holds the middles of 2^i equal cells of [0.1, 1] * 10^(i - 6), with both signs; 0 and 1 complete it.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut values = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let power = 10.0_f64.powi(decade - (DECADES - 1)) as f32;
            for edges in linspace(0.1, 1.0, (1 << decade) + 1).windows(2) {
                let magnitude = f32::midpoint(edges[0], edges[1]) * power;
                values.extend([magnitude, -magnitude]);
            }
        }
        values.sort_by(f32::total_cmp);
        std::array::from_fn(|i| values[i])
    })
}

/// `count` (2 or more) evenly spaced values from `start` to `end`, rounded as torch.linspace rounds fp32: one fused
/// multiply-add a value, the lower half counted from `start` and the upper half from `end`. The last bits of the tables
/// of bitsandbytes depend on it.
pub(super) fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count - 1) as f32;
    let from_start = |i: usize| step.mul_add(i as f32, start);
    let from_end = |i: usize| step.mul_add(-((count - 1 - i) as f32), end);
    (0..count).map(|i| if i < count / 2 { from_start(i) } else { from_end(i) }).collect()
}
