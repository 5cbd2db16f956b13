//! Packing: absolute maxima, scales, codes.

use std::ops::Range;
use std::sync::Mutex;

use super::isa::{Isa, Kernel, dispatch};
use super::parallel;
use super::simd::Simd;
use super::source::Source;
use crate::codebook::{self, Codebook};
use crate::dtype::{Element, FloatsMut, with_floats};
use crate::format::{Shift, Spec, double_quant, packing};
use crate::storage::{PackedWeightMut, ScalesMut};
use crate::{Error, Result};

/// What to do with NaN and infinities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFinite {
    /// Refuse the tensor, naming the first bad element.
    Error,
    /// Make every weight of the block NaN (with double quantization, of the 256 blocks that share a scale).
    Propagate,
}

impl NonFinite {
    /// The mode that is called `name`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "error" => Ok(Self::Error),
            "propagate" => Ok(Self::Propagate),
            _ => Err(Error::invalid("nonfinite", format!("{name:?}"), "\"error\" or \"propagate\"")),
        }
    }
}

/// Packs `source` into `out`. With an error, what `out` holds is unspecified.
pub fn quantize<T: Element>(
    source: Source<T>,
    out: PackedWeightMut<'_>,
    nonfinite: NonFinite,
    threads: usize,
) -> Result<()> {
    let isa = Isa::current()?;
    match out.scales {
        ScalesMut::Double { codes, scale_2, offset } => {
            let mut scales = vec![0.0; codes.len()];
            let mut plain = PackedWeightMut { scales: ScalesMut::Plain(FloatsMut::Float32(&mut scales)), ..out };
            quantize_blocks(isa, source, &mut plain, nonfinite, threads)?;
            *offset = double_quant::offset(&scales);
            let scales = scales.chunks(SCALES_AT_ONCE);
            let out = codes.chunks_mut(SCALES_AT_ONCE).zip(scale_2.chunks_mut(SCALES_AT_ONCE / double_quant::BLOCK));
            parallel::for_each(threads, scales.zip(out).collect(), |(scales, (codes, scale_2))| {
                double_quant::quantize_blocks(scales, *offset, codes, scale_2);
            });
            Ok(())
        }
        ScalesMut::Plain(_) => quantize_blocks(isa, source, &mut { out }, nonfinite, threads),
    }
}

/// A part of the weight that is packed at once: whole blocks, starting at a byte.
struct Part<'a> {
    /// Rows of the tensor and columns in them; where blocks straddle rows, `rows` is 0..1 of one long row.
    rows: Range<usize>,
    cols: Range<usize>,
    codes: Vec<&'a mut [u8]>,
    scales: Vec<FloatsMut<'a>>,
    shifts: Vec<FloatsMut<'a>>,
}

/// Columns that are widened at once, a multiple of every block size but that of whole rows.
const STEP: usize = 4096;
/// Scales that one thread quantizes before it asks for more.
const SCALES_AT_ONCE: usize = 64 * double_quant::BLOCK;
/// Rows that are read together: a cache line of a transposed 16-bit matrix.
const ROWS: usize = 32;

fn quantize_blocks<T: Element>(
    isa: Isa,
    source: Source<T>,
    out: &mut PackedWeightMut<'_>,
    nonfinite: NonFinite,
    threads: usize,
) -> Result<()> {
    let layout = out.layout;
    let rule = Rule::new(out, nonfinite);
    let ScalesMut::Plain(scales) = &mut out.scales else { unreachable!("the caller passes plain scales") };
    let (rows, cols) = if layout.straddles_rows { (1, layout.rows * layout.cols) } else { (layout.rows, layout.cols) };
    let parts = split(rows, cols, &layout, out.codes, scales, out.shifts.as_mut());
    // The first failure in the tensor's order wins, whichever thread finds one first.
    let failure: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    parallel::for_each(threads, parts, |part| {
        let at = part.rows.start * cols + part.cols.start;
        if failure.lock().expect("no panic holds it").as_ref().is_some_and(|(first, _)| *first < at) {
            return;
        }
        let flat_cols = layout.straddles_rows.then_some(layout.cols);
        if let Err(error) = dispatch(isa, QuantizePart { source: &source, rule: &rule, part, flat_cols }) {
            let mut failure = failure.lock().expect("no panic holds it");
            if failure.as_ref().is_none_or(|(first, _)| at < *first) {
                *failure = Some((at, error));
            }
        }
    });
    failure.into_inner().expect("no panic holds it").map_or(Ok(()), |(_, error)| Err(error))
}

/// Cuts the output buffers into [`Part`]s, in the tensor's order.
fn split<'a>(
    rows: usize,
    cols: usize,
    layout: &crate::format::Layout,
    mut codes: &'a mut [u8],
    scales: &'a mut FloatsMut<'_>,
    shifts: Option<&'a mut FloatsMut<'_>>,
) -> Vec<Part<'a>> {
    let block_size = layout.block_size;
    let step = if block_size <= STEP && block_size.is_power_of_two() { STEP } else { block_size };
    let ranges = parallel::ranges(cols, step);
    let (mut scales, mut shifts) = (scales.reborrow(), shifts.map(FloatsMut::reborrow));
    let mut parts = Vec::new();
    for rows in parallel::ranges(rows, ROWS) {
        let first = parts.len();
        parts.extend(ranges.iter().map(|cols| Part {
            rows: rows.clone(),
            cols: cols.clone(),
            codes: Vec::with_capacity(rows.len()),
            scales: Vec::with_capacity(rows.len()),
            shifts: Vec::new(),
        }));
        for _ in rows {
            for (part, cols) in parts[first..].iter_mut().zip(&ranges) {
                let bytes = layout.bytes_of(cols.len());
                part.codes.push(codes.split_off_mut(..bytes).expect("a code for every weight"));
                let blocks = cols.len().div_ceil(block_size);
                part.scales.push(scales.take_front(blocks));
                part.shifts.extend(shifts.as_mut().map(|shifts| shifts.take_front(blocks)));
            }
        }
    }
    parts
}

/// How blocks become codes.
struct Rule {
    spec: Spec,
    codebook: Option<Codebook>,
    /// For a table that is not sorted: the byte of two codes for the byte of two ranks.
    codes_of_ranks: Option<[u8; 256]>,
    block_size: usize,
    nonfinite: NonFinite,
}

struct QuantizePart<'a, T> {
    source: &'a Source<T>,
    rule: &'a Rule,
    part: Part<'a>,
    /// The tensor's columns, where the part counts through the flattened tensor.
    flat_cols: Option<usize>,
}

impl<T: Element> Kernel for QuantizePart<'_, T> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Result<()> {
        let Self { source, rule, mut part, flat_cols } = self;
        let width = part.cols.len();
        let mut weights = vec![0.0; part.rows.len() * width];
        match flat_cols {
            None => source.read(simd, part.rows.clone(), part.cols.clone(), &mut weights),
            Some(_) => source.read_flat(simd, part.cols.clone(), &mut weights),
        }
        let mut codes = vec![0; width];
        let shifts = part.shifts.iter_mut().map(Some).chain(std::iter::repeat_with(|| None));
        let outputs = part.codes.iter_mut().zip(&mut part.scales).zip(shifts);
        for ((row, weights), ((bytes, scales), shifts)) in
            part.rows.clone().zip(weights.chunks_exact(width.max(1))).zip(outputs)
        {
            quantize_row(simd, rule, weights, &mut codes, scales, shifts).map_err(|failure| {
                let col = part.cols.start + failure.col;
                let (row, col) = flat_cols.map_or((row, col), |cols| (col / cols, col % cols));
                failure.cause.unwrap_or_else(|| source.non_finite(row, col, failure.value))
            })?;
            match &rule.codebook {
                Some(codebook) => {
                    packing::pack(&codes, codebook.rank(0.0), bytes);
                    if let Some(codes_of_ranks) = &rule.codes_of_ranks {
                        bytes.iter_mut().for_each(|byte| *byte = codes_of_ranks[*byte as usize]);
                    }
                }
                None => bytes.copy_from_slice(&codes),
            }
        }
        Ok(())
    }
}

/// A weight that cannot be packed, at `col` of the row, or another cause.
struct Failure {
    col: usize,
    value: f32,
    cause: Option<Error>,
}

/// Quantizes consecutive blocks into one rank (or 8-bit code) a byte.
#[inline(always)]
fn quantize_row<S: Simd>(
    simd: S,
    rule: &Rule,
    weights: &[f32],
    codes: &mut [u8],
    scales: &mut FloatsMut<'_>,
    mut shifts: Option<&mut FloatsMut<'_>>,
) -> std::result::Result<(), Failure> {
    let blocks = weights.chunks(rule.block_size).zip(codes.chunks_mut(rule.block_size));
    for (index, (weights, codes)) in blocks.enumerate() {
        let range = Extremes::of(weights);
        if !range.is_finite() {
            if rule.nonfinite == NonFinite::Error {
                let offset = weights.iter().position(|weight| !weight.is_finite()).unwrap_or(0);
                return Err(Failure { col: index * rule.block_size + offset, value: weights[offset], cause: None });
            }
            codes.fill(rule.codebook.as_ref().map_or(0, |codebook| codebook.rank(0.0)));
            scales.set(index, f32::NAN);
            if let Some(shifts) = &mut shifts {
                shifts.set(index, f32::NAN);
            }
            continue;
        }
        let shift = shifts.as_mut().map_or(0.0, |shifts| shifts.set(index, rule.shift(weights, &range)));
        let block = rule.block(weights, &range, shift);
        block.encode(simd, rule, weights, codes);
        let stored = scales.set(index, block.scale());
        if !(stored.is_finite() && shift.is_finite()) {
            let got = format!("{} with a block of scale {:e}", rule.spec.scale_dtype.name(), block.scale());
            let cause = Some(Error::invalid("scale_dtype", got, "float32, or smaller weights"));
            return Err(Failure { col: 0, value: 0.0, cause });
        }
    }
    Ok(())
}

/// The smallest and largest weight and magnitude of a block, as integers that order as the numbers do: unlike float
/// comparisons, these vectorize, and NaN shows as a magnitude beyond infinity's.
struct Extremes {
    magnitude: u32,
    low: i32,
}

const INFINITY_BITS: u32 = 0x7f80_0000;

/// Flips the lower bits of negative numbers, so that bit patterns order as signed integers; its own inverse.
#[inline(always)]
fn ordered(bits: i32) -> i32 {
    bits ^ ((bits >> 31) & i32::MAX)
}

impl Extremes {
    #[inline(always)]
    fn of(weights: &[f32]) -> Self {
        let magnitude = weights.iter().map(|w| w.to_bits() & !(1 << 31)).fold(0, u32::max);
        let low = weights.iter().map(|w| ordered(w.to_bits().cast_signed())).fold(i32::MAX, i32::min);
        Self { magnitude, low }
    }

    fn is_finite(&self) -> bool {
        self.magnitude < INFINITY_BITS
    }

    fn absmax(&self) -> f32 {
        f32::from_bits(self.magnitude)
    }

    fn min(&self) -> f32 {
        f32::from_bits(ordered(self.low).cast_unsigned())
    }

    /// The largest of `weights`, which few formats ask for.
    #[inline(always)]
    fn max(weights: &[f32]) -> f32 {
        let high = weights.iter().map(|w| ordered(w.to_bits().cast_signed())).fold(i32::MIN, i32::max);
        f32::from_bits(ordered(high).cast_unsigned())
    }
}

/// How the weights of one block are normalized: `u = (w - shift) * limit / extent`.
struct Block {
    limit: f32,
    extent: f32,
    shift: f32,
}

impl Rule {
    fn new(out: &PackedWeightMut<'_>, nonfinite: NonFinite) -> Self {
        let codebook = out.codebook.clone();
        let codes_of_ranks = codebook
            .as_ref()
            .filter(|codebook| !codebook.is_sorted())
            .map(|codebook| std::array::from_fn(|byte| codebook.order()[byte >> 4] << 4 | codebook.order()[byte & 15]));
        Self { spec: out.spec, codebook, codes_of_ranks, block_size: out.layout.block_size, nonfinite }
    }

    /// The shift of a block before it is stored.
    #[inline(always)]
    fn shift(&self, weights: &[f32], range: &Extremes) -> f32 {
        match self.spec.format.shift() {
            Some(Shift::Minimum) => range.min(),
            Some(shift @ Shift::Middle) => shift.of(range.min(), Extremes::max(weights)),
            None => 0.0,
        }
    }

    #[inline(always)]
    fn block(&self, weights: &[f32], range: &Extremes, shift: f32) -> Block {
        let limit = self.codebook.as_ref().map_or(f32::from(i8::MAX), Codebook::limit);
        // Through integers again, for the compiler's sake.
        let distances = weights.iter().map(|&w| (w - shift).to_bits());
        let extent = match self.spec.format.shift() {
            // A distance below zero counts as zero.
            Some(Shift::Minimum) => f32::from_bits(distances.map(u32::cast_signed).fold(0, i32::max).cast_unsigned()),
            Some(Shift::Middle) => f32::from_bits(distances.map(|bits| bits & !(1 << 31)).fold(0, u32::max)),
            None if self.spec.signed_absmax => {
                let absmax = range.absmax();
                let is_negative = weights.iter().find(|w| w.abs() == absmax).is_some_and(|w| w.is_sign_negative());
                if is_negative { -absmax } else { absmax }
            }
            None => range.absmax(),
        };
        Block { limit, extent, shift }
    }
}

impl Block {
    /// `extent / limit`, also where the extent of a shifted block overflows fp32.
    fn scale(&self) -> f32 {
        self.extent / self.limit
    }

    #[inline(always)]
    fn encode<S: Simd>(&self, simd: S, rule: &Rule, weights: &[f32], codes: &mut [u8]) {
        let inverse = self.limit / self.extent;
        if self.extent == 0.0 {
            codes.fill(rule.codebook.as_ref().map_or(0, |codebook| codebook.rank(0.0)));
        } else if !inverse.is_finite() || inverse == 0.0 {
            self.encode_in_f64(rule, weights, codes);
        } else {
            let whole = weights.len() - weights.len() % S::LANES;
            let (shift, inverse) = (simd.splat(-self.shift), simd.splat(inverse));
            let codebook = rule.codebook.as_ref();
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: `at + LANES <= len` of both slices.
                unsafe {
                    let u = simd.mul(simd.add(simd.load(weights.as_ptr().add(at)), shift), inverse);
                    encode_vector(simd, codebook, u, codes.as_mut_ptr().add(at));
                }
            }
            if whole < weights.len() {
                let mut padded = [0.0; codebook::LEN];
                let mut tail = [0; codebook::LEN];
                padded[..weights.len() - whole].copy_from_slice(&weights[whole..]);
                // SAFETY: no vector is longer than the buffers of 16.
                unsafe {
                    let u = simd.mul(simd.add(simd.load(padded.as_ptr()), shift), inverse);
                    encode_vector(simd, codebook, u, tail.as_mut_ptr());
                }
                codes[whole..].copy_from_slice(&tail[..weights.len() - whole]);
            }
        }
    }

    /// For extents whose inverse is beyond fp32.
    #[cold]
    fn encode_in_f64(&self, rule: &Rule, weights: &[f32], codes: &mut [u8]) {
        let inverse = f64::from(self.limit) / f64::from(self.extent);
        for (code, &weight) in codes.iter_mut().zip(weights) {
            let u = ((f64::from(weight) - f64::from(self.shift)) * inverse) as f32;
            *code = match &rule.codebook {
                Some(codebook) => codebook.rank(u),
                None => (u.round_ties_even() as i8).cast_unsigned(),
            };
        }
    }
}

/// Ranks among a table's values, or rounded integers.
///
/// # Safety
/// `LANES` bytes are writable at `to`.
#[inline(always)]
unsafe fn encode_vector<S: Simd>(simd: S, codebook: Option<&Codebook>, u: S::Vector, to: *mut u8) {
    // SAFETY: handed on to the caller.
    unsafe {
        match codebook {
            Some(codebook) => simd.rank(u, codebook.thresholds(), to),
            None => simd.round_to_bytes(u, to),
        }
    }
}

impl FloatsMut<'_> {
    /// Stores `value` at `index` with one rounding and returns what was stored.
    #[inline(always)]
    fn set(&mut self, index: usize, value: f32) -> f32 {
        fn store<T: Element>(slice: &mut [T], index: usize, value: f32) -> f32 {
            slice[index] = T::from_f32(value);
            slice[index].to_f32()
        }
        with_floats!(self, FloatsMut, slice => store(slice, index, value))
    }

    fn reborrow(&mut self) -> FloatsMut<'_> {
        match self {
            Self::Float32(slice) => FloatsMut::Float32(slice),
            Self::Float16(slice) => FloatsMut::Float16(slice),
            Self::Bfloat16(slice) => FloatsMut::Bfloat16(slice),
        }
    }
}

impl<'a> FloatsMut<'a> {
    /// Splits off the first `count` elements.
    fn take_front(&mut self, count: usize) -> FloatsMut<'a> {
        match self {
            Self::Float32(slice) => FloatsMut::Float32(slice.split_off_mut(..count).expect("a scale for every block")),
            Self::Float16(slice) => FloatsMut::Float16(slice.split_off_mut(..count).expect("a scale for every block")),
            Self::Bfloat16(slice) => {
                FloatsMut::Bfloat16(slice.split_off_mut(..count).expect("a scale for every block"))
            }
        }
    }
}
