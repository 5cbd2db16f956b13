//! Scales and shifts of consecutive blocks in fp32, from whatever they are stored as.

use super::simd::Simd;
use crate::codebook::dynamic_map;
use crate::dtype::{Element, Floats, with_floats};
use crate::format::double_quant;
use crate::storage::{PackedWeight, Scales};

/// Fills `out` with the scales of the blocks from `first` on.
#[inline(always)]
pub(super) fn read_scales<S: Simd>(simd: S, weight: &PackedWeight<'_>, first: usize, out: &mut [f32]) {
    match weight.scales() {
        Scales::Plain(floats) => read_floats(simd, floats, first, out),
        Scales::Double { codes, scale_2, offset } => {
            let codes = &codes[first..][..out.len()];
            let offsets = simd.splat(offset);
            let mut at = 0;
            while at < out.len() {
                // Up to where the next second-level scale begins.
                let group = (first + at) / double_quant::BLOCK;
                let end = out.len().min((group + 1) * double_quant::BLOCK - first);
                let factor = simd.splat(scale_2[group]);
                while at + S::LANES <= end {
                    // SAFETY: `at + LANES` is within both slices. Product and sum are rounded apart, by definition.
                    unsafe {
                        let value = simd.look_up_bytes(dynamic_map(), codes.as_ptr().add(at));
                        simd.store(out.as_mut_ptr().add(at), simd.add(simd.mul(value, factor), offsets));
                    }
                    at += S::LANES;
                }
                while at < end {
                    out[at] = double_quant::restore(codes[at], scale_2[group], offset);
                    at += 1;
                }
            }
        }
    }
}

/// Asks for the stored scale of a block.
#[inline(always)]
pub(super) fn prefetch_scale<S: Simd>(simd: S, weight: &PackedWeight<'_>, block: usize) {
    simd.prefetch(stored_scale(weight, block));
}

/// Where the scale of a block is stored; the block need not exist.
#[inline(always)]
pub(super) fn stored_scale(weight: &PackedWeight<'_>, block: usize) -> *const u8 {
    match weight.scales() {
        Scales::Plain(floats) => with_floats!(floats, Floats, slice => slice.as_ptr().wrapping_add(block).cast()),
        Scales::Double { codes, .. } => codes.as_ptr().wrapping_add(block),
    }
}

/// Fills `out` with the shifts of the blocks from `first` on, or with zeros where there are none.
#[inline(always)]
pub(super) fn read_shifts<S: Simd>(simd: S, weight: &PackedWeight<'_>, first: usize, out: &mut [f32]) {
    match weight.shifts() {
        Some(floats) => read_floats(simd, floats, first, out),
        None => out.fill(0.0),
    }
}

#[inline(always)]
fn read_floats<S: Simd>(simd: S, floats: Floats<'_>, first: usize, out: &mut [f32]) {
    with_floats!(floats, Floats, slice => widen(simd, &slice[first..][..out.len()], out));
}

/// Widens `from` into `to`, of the same length.
#[inline(always)]
pub(super) fn widen<S: Simd, T: Element>(simd: S, from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    let whole = to.len() - to.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES` is within both slices.
        unsafe { simd.store(to.as_mut_ptr().add(at), simd.load(from.as_ptr().add(at))) };
    }
    for (to, from) in to[whole..].iter_mut().zip(&from[whole..]) {
        *to = from.to_f32();
    }
}
