//! Unpacking whole weights and single rows.

use std::ops::Range;

use super::codes::{Codes, with_codes};
use super::isa::{Isa, Kernel, dispatch};
use super::parallel;
use super::scales::{read_scales, read_shifts};
use super::simd::Simd;
use crate::dtype::{Element, FloatsMut, with_floats};
use crate::format::packing;
use crate::storage::PackedWeight;
use crate::{Error, Result};

/// Weights that one thread unpacks before it asks for more.
const WEIGHTS_AT_ONCE: usize = 1 << 17;

/// Unpacks `weight` into `out`, `[rows, cols]`, with one rounding from fp32.
pub fn dequantize(weight: &PackedWeight<'_>, out: FloatsMut<'_>, threads: usize) -> Result<()> {
    let rows = weight.layout().rows;
    unpack(weight, rows, |i| i, out, threads)
}

/// Unpacks row `rows[i]` of `weight` into row `i` of `out`, `[rows.len(), cols]`.
pub fn dequantize_rows(weight: &PackedWeight<'_>, rows: &[i64], out: FloatsMut<'_>, threads: usize) -> Result<()> {
    let count = weight.layout().rows;
    if let Some(bad) = rows.iter().find(|&&row| usize::try_from(row).map_or(true, |row| row >= count)) {
        return Err(Error::invalid("input", format!("index {bad}"), format!("indices from 0 to {}", count.max(1) - 1)));
    }
    unpack(weight, rows.len(), |i| rows[i] as usize, out, threads)
}

fn unpack(
    weight: &PackedWeight<'_>,
    count: usize,
    row_of: impl Fn(usize) -> usize + Sync,
    out: FloatsMut<'_>,
    threads: usize,
) -> Result<()> {
    let cols = weight.layout().cols;
    if out.len() != count * cols {
        return Err(Error::invalid("out", format!("{} elements", out.len()), format!("{count} rows of {cols}")));
    }
    let isa = Isa::current()?;
    if cols == 0 {
        return Ok(());
    }
    let rows_at_once = WEIGHTS_AT_ONCE.div_ceil(cols);
    with_floats!(out, FloatsMut, out => {
        let parts = out.chunks_mut(rows_at_once * cols).enumerate().collect();
        parallel::for_each(threads, parts, |(part, out)| {
            let first = part * rows_at_once;
            dispatch(isa, Rows { weight, first, row_of: &row_of, out });
        });
    });
    Ok(())
}

struct Rows<'a, T, F> {
    weight: &'a PackedWeight<'a>,
    first: usize,
    row_of: &'a F,
    out: &'a mut [T],
}

impl<T: Element, F: Fn(usize) -> usize> Kernel for Rows<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.weight.layout().cols;
        let mut scales = BlockScales::default();
        with_codes!(simd, self.weight, codes => {
            for (i, out) in self.out.chunks_mut(cols).enumerate() {
                let row = (self.row_of)(self.first + i);
                decode_row(simd, codes, self.weight, row, 0..cols, &mut scales, out);
            }
        });
    }
}

/// The scales and shifts of the blocks that a run of weights lies in.
#[derive(Default)]
pub(super) struct BlockScales {
    scales: Vec<f32>,
    shifts: Vec<f32>,
}

impl BlockScales {
    #[inline(always)]
    fn read<S: Simd>(&mut self, simd: S, weight: &PackedWeight<'_>, blocks: Range<usize>) {
        self.scales.resize(blocks.len(), 0.0);
        self.shifts.resize(blocks.len(), 0.0);
        read_scales(simd, weight, blocks.start, &mut self.scales);
        read_shifts(simd, weight, blocks.start, &mut self.shifts);
    }
}

/// Decodes `cols` of `row` into `out`, in order, for any layout.
#[inline(always)]
pub(super) fn decode_row<S: Simd, C: Codes<S>, T: Element>(
    simd: S,
    codes: C,
    weight: &PackedWeight<'_>,
    row: usize,
    cols: Range<usize>,
    scratch: &mut BlockScales,
    out: &mut [T],
) {
    if cols.is_empty() {
        return;
    }
    let layout = weight.layout();
    let (first, last) = (layout.block_of(row, cols.start), layout.block_of(row, cols.end - 1));
    scratch.read(simd, weight, first..last + 1);
    // Where blocks straddle rows, they are counted from the start of the matrix.
    let offset = if layout.straddles_rows { row * layout.cols } else { 0 };
    let mut col = cols.start;
    for (&scale, &shift) in scratch.scales.iter().zip(&scratch.shifts) {
        let end = ((offset + col) / layout.block_size + 1) * layout.block_size - offset;
        let end = end.min(cols.end);
        let index = layout.code_index(row, col);
        decode_run(simd, codes, weight, index, (scale, shift), &mut out[col - cols.start..end - cols.start]);
        col = end;
    }
}

/// Decodes consecutive weights of one block, the first at `index`.
#[inline(always)]
fn decode_run<S: Simd, C: Codes<S>, T: Element>(
    simd: S,
    codes: C,
    weight: &PackedWeight<'_>,
    index: usize,
    (scale, shift): (f32, f32),
    out: &mut [T],
) {
    let (bits, has_shift) = (weight.layout().bits, weight.has_shift());
    let (scales, shifts) = (simd.splat(scale), simd.splat(shift));
    let one = |index: usize| {
        let value = match weight.codebook() {
            Some(codebook) => codebook.values()[packing::nibble(weight.codes(), index) as usize],
            None => f32::from(weight.codes()[index].cast_signed()),
        };
        T::from_f32(if has_shift { value.mul_add(scale, shift) } else { value * scale })
    };
    // A run starts inside a byte only where blocks straddle rows.
    let lead = (!(index * bits).is_multiple_of(8) && !out.is_empty()).into();
    let whole = lead + (out.len() - lead) / S::LANES * S::LANES;
    if lead == 1 {
        out[0] = one(index);
    }
    let bytes = &weight.codes()[(index + lead) * bits / 8..];
    debug_assert!(bytes.len() * 8 >= (whole - lead) * bits);
    for at in (lead..whole).step_by(S::LANES) {
        // SAFETY: `at + LANES <= len` of `out`, and its codes lie within the weight's.
        unsafe {
            let value = codes.decode_in_order(simd, bytes.as_ptr().add((at - lead) * bits / 8));
            let w = if has_shift { simd.fma(value, scales, shifts) } else { simd.mul(value, scales) };
            simd.store(out.as_mut_ptr().add(at), w);
        }
    }
    for (at, out) in out.iter_mut().enumerate().skip(whole) {
        *out = one(index + at);
    }
}
