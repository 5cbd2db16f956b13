//! The oracle of every test: plain loops, sums in f64, no tricks.

use crate::codebook::Codebook;
use crate::format::{Format, Shift, packing};
use crate::storage::PackedWeight;

/// What a block of finite weights is packed into.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// A code per weight; 8-bit codes as two's complement.
    pub codes: Vec<u8>,
    /// The scale before it is stored.
    pub scale: f32,
    /// The shift before it is stored; 0 where the format has none.
    pub shift: f32,
}

/// Quantizes one block: `scale = absmax / limit`, codes by the codebook's thresholds (8 bits: to nearest even).
/// `shift_as_stored` is how a format with shifts rounds one when storing it.
pub fn quantize_block(
    weights: &[f32],
    format: Format,
    codebook: Option<&Codebook>,
    signed_absmax: bool,
    shift_as_stored: impl Fn(f32) -> f32,
) -> Block {
    let limit = codebook.map_or(127.0, Codebook::limit);
    let low = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let high = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shift = format.shift().map_or(0.0, |shift| shift_as_stored(shift.of(low, high)));
    let mut extent = 0.0_f32;
    for &weight in weights {
        let distance = weight - shift;
        let distance = if format.shift() == Some(Shift::Minimum) { distance.max(0.0) } else { distance };
        if distance.abs() > extent.abs() {
            extent = distance;
        }
    }
    let extent = if signed_absmax { extent } else { extent.abs() };
    let inverse = limit / extent;
    let codes = weights.iter().map(|&weight| {
        let u = if extent == 0.0 {
            0.0
        } else if inverse.is_finite() {
            (weight - shift) * inverse
        } else {
            // The inverse of a tiny extent is beyond fp32.
            ((f64::from(weight) - f64::from(shift)) * (f64::from(limit) / f64::from(extent))) as f32
        };
        match codebook {
            Some(codebook) => codebook.encode(u),
            None => (u.round_ties_even() as i8).cast_unsigned(),
        }
    });
    Block { codes: codes.collect(), scale: extent / limit, shift }
}

/// The weight at (`row`, `col`) in fp32: the product and sum of its definition with one rounding.
pub fn weight_at(weight: &PackedWeight<'_>, row: usize, col: usize) -> f32 {
    let layout = weight.layout();
    let index = layout.code_index(row, col);
    let value = match weight.codebook() {
        Some(codebook) => codebook.values()[packing::nibble(weight.codes(), index) as usize],
        None => f32::from(weight.codes()[index].cast_signed()),
    };
    let block = layout.block_of(row, col);
    let scale = weight.scale(block);
    if weight.has_shift() { value.mul_add(scale, weight.shift(block)) } else { value * scale }
}

/// `y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]` in f64, from fp32 weights.
pub fn linear(weight: &PackedWeight<'_>, x: &[f32], tokens: usize, bias: Option<&[f32]>) -> Vec<f64> {
    let (rows, cols) = (weight.layout().rows, weight.layout().cols);
    let mut y = vec![0.0; tokens * rows];
    for row in 0..rows {
        let w: Vec<f64> = (0..cols).map(|col| f64::from(weight_at(weight, row, col))).collect();
        for token in 0..tokens {
            let x = &x[token * cols..][..cols];
            let dot: f64 = x.iter().zip(&w).map(|(&x, &w)| f64::from(x) * w).sum();
            y[token * rows + row] = dot + bias.map_or(0.0, |bias| f64::from(bias[row]));
        }
    }
    y
}

/// [`linear`] with activations in int8 by row, but for columns of outliers: those with a number whose magnitude is not
/// below `threshold` (`LLM.int8()`, arXiv 2208.07339). Scales are the largest of a row's other magnitudes over 127.
pub fn linear_int8(
    weight: &PackedWeight<'_>,
    x: &[f32],
    tokens: usize,
    threshold: f32,
    bias: Option<&[f32]>,
) -> Vec<f64> {
    let cols = weight.layout().cols;
    // A NaN is below nothing.
    let is_outlier = |x: f32| !matches!(x.abs().partial_cmp(&threshold), Some(std::cmp::Ordering::Less));
    let outliers: Vec<bool> = (0..cols).map(|col| (0..tokens).any(|token| is_outlier(x[token * cols + col]))).collect();
    let mut y = Vec::new();
    for x in x.chunks_exact(cols.max(1)) {
        let absmax = x.iter().filter(|&&x| !is_outlier(x)).fold(0.0_f32, |most, x| most.max(x.abs()));
        let (scale, inverse) = (absmax / 127.0, 127.0 / absmax);
        let code = |x: f32| if inverse.is_finite() { (x * inverse).round_ties_even() } else { 0.0 };
        for row in 0..weight.layout().rows {
            let products = (0..cols).map(|col| {
                let x = if outliers[col] { f64::from(x[col]) } else { f64::from(scale) * f64::from(code(x[col])) };
                x * f64::from(weight_at(weight, row, col))
            });
            y.push(products.sum::<f64>() + bias.map_or(0.0, |bias| f64::from(bias[row])));
        }
    }
    y
}

/// `dx[m, k] = sum_n dy[m, n] * w[n, k]` in f64, from fp32 weights.
pub fn linear_grad_input(weight: &PackedWeight<'_>, grad: &[f32], tokens: usize) -> Vec<f64> {
    let (rows, cols) = (weight.layout().rows, weight.layout().cols);
    let mut dx = vec![0.0; tokens * cols];
    for row in 0..rows {
        for col in 0..cols {
            let w = f64::from(weight_at(weight, row, col));
            for token in 0..tokens {
                dx[token * cols + col] += f64::from(grad[token * rows + row]) * w;
            }
        }
    }
    dx
}
