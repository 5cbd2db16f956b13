//! Weights in tiles.
//!
//! Forward, they are the left operand: a row of a tile is 64 bytes of one row of the weight. 4-bit codes are looked up
//! 32 at a time in a table of the block's own 16 weights, `scale * codebook + shift` in bf16, so that scaling costs
//! nothing for each weight. For the gradient they are the right operand: a row of a tile is two neighbouring rows of
//! the weight, their columns side by side.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm_loadu_si128, _mm512_castps_si512, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
    _mm512_cvtne2ps_pbh, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi16,
    _mm512_set1_epi16, _mm512_set1_ps, _mm512_srli_epi16, _mm512_storeu_si512, _mm512_ternarylogic_epi32,
};
use std::ops::Range;

use super::pack::{upper_halves, without_upper_half};
use super::product::{CHUNK_STEPS, Numbers};
use super::tiles::{Line, ROW_BYTES, ROWS};
use crate::codebook::LEN;
use crate::cpu::codes::{Codes, load_words, with_codes};
use crate::cpu::dequantize::{BlockScales, decode_row};
use crate::cpu::panel::Direction;
use crate::cpu::scales::{prefetch_scale, read_scales, read_shifts};
use crate::cpu::simd::Simd;
use crate::cpu::x86::avx512::Avx512;
use crate::format::Layout;
use crate::storage::PackedWeight;

/// In which order the terms of a sum follow each other in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As in memory.
    Natural,
    /// In groups of 128, whose four tiles have every fourth term each: as 16-bit words of codes are decoded.
    Nibbles,
    /// As 32-bit words of so many codes are decoded: a row of a tile has the first of two neighbours of sixteen words,
    /// then the second.
    Words(usize),
}

impl Order {
    /// Tiles side by side that a group of terms fills.
    pub(super) fn steps_of_group(self) -> usize {
        match self {
            Self::Natural => 1,
            Self::Nibbles => 4,
            Self::Words(per_word) => per_word / 2,
        }
    }

    /// For words: which term of a group each number of its tiles' rows is.
    pub(super) fn terms_of_words(self) -> Option<Vec<usize>> {
        let Self::Words(per_word) = self else { return None };
        let term = |at: usize| per_word * (at % 16) + 2 * (at / 32) + at / 16 % 2;
        Some((0..16 * per_word).map(term).collect())
    }
}

/// How weights get into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// 4-bit codes through tables of blocks of at least 64.
    Tables,
    /// 8-bit codes with one scale a row, which sums are multiplied with.
    RowCodes,
    /// Codes of any blocks, a vector of words at a time.
    Words,
    /// Any weights, row by row through fp32.
    Rows,
    /// For the gradient.
    PairsOfRows,
}

/// Smallest block that the tables serve: 64 bytes of codes are looked up in two of them.
const SMALLEST_TABLE_BLOCK: usize = 64;

impl Method {
    pub(super) fn choose(weight: &PackedWeight<'_>, direction: Direction, numbers: Numbers) -> Self {
        let layout = weight.layout();
        debug_assert!(numbers != Numbers::Int8 || weight.is_int8_by_rows());
        match direction {
            Direction::Gradient => Self::PairsOfRows,
            Direction::Forward if weight.is_int8_by_rows() => Self::RowCodes,
            Direction::Forward if layout.bits == 4 && !layout.straddles_rows && has_table_blocks(weight) => {
                Self::Tables
            }
            Direction::Forward if !layout.straddles_rows => Self::Words,
            Direction::Forward => Self::Rows,
        }
    }

    pub(super) fn order(self, weight: &PackedWeight<'_>) -> Order {
        match self {
            Self::Tables => Order::Nibbles,
            Self::Words => Order::Words(32 / weight.layout().bits),
            _ => Order::Natural,
        }
    }
}

/// log2 of the block size, or more than any column's where a row is one block.
fn block_shift(layout: &Layout) -> u32 {
    if layout.block_size >= layout.cols { usize::BITS - 1 } else { layout.block_size.trailing_zeros() }
}

fn has_table_blocks(weight: &PackedWeight<'_>) -> bool {
    let layout = weight.layout();
    layout.block_size >= SMALLEST_TABLE_BLOCK || layout.block_size >= layout.cols
}

/// Fills panels of a strip of outputs with a chunk of terms each.
pub(super) struct Filler<'a> {
    weight: &'a PackedWeight<'a>,
    method: Method,
    numbers: Numbers,
    /// The strip, and the tiles that it takes; the last ones may lie behind the last output.
    outputs: Range<usize>,
    tiles: usize,
    /// `[outputs][blocks]` and a vector more, of [`Method::Tables`] and [`Method::Words`].
    scales: Vec<f32>,
    shifts: Vec<f32>,
    block_scales: BlockScales,
    rows: [Vec<f32>; 2],
}

impl<'a> Filler<'a> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) fn new(
        simd: Avx512,
        weight: &'a PackedWeight<'a>,
        (method, numbers): (Method, Numbers),
        outputs: Range<usize>,
        tiles: usize,
    ) -> Self {
        let layout = weight.layout();
        let blocks = layout.blocks_per_row();
        let (mut scales, mut shifts) = (Vec::new(), Vec::new());
        if matches!(method, Method::Tables | Method::Words) {
            // A whole vector is read from any block on.
            let count = outputs.len() * blocks;
            scales.resize(count + Avx512::LANES, 0.0);
            read_scales(simd, weight, outputs.start * blocks, &mut scales[..count]);
            if weight.has_shift() {
                shifts.resize(count + Avx512::LANES, 0.0);
                read_shifts(simd, weight, outputs.start * blocks, &mut shifts[..count]);
            }
        }
        let rows = [Vec::new(), Vec::new()];
        Self { weight, method, numbers, outputs, tiles, scales, shifts, block_scales: BlockScales::default(), rows }
    }

    /// Fills `panel`, `[parts][tiles][CHUNK_STEPS]` tiles, with the terms of a chunk; returns how many steps count.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) fn fill(&mut self, simd: Avx512, terms: Range<usize>, panel: &mut [Line]) -> usize {
        let group = self.method.order(self.weight).steps_of_group();
        let step_terms = self.numbers.chunk_terms() / CHUNK_STEPS;
        let steps = terms.len().div_ceil(step_terms * group) * group;
        match self.method {
            Method::PairsOfRows => {
                with_codes!(simd, self.weight, codes => self.fill_pairs(simd, codes, terms, steps, panel));
            }
            Method::Words => {
                with_codes!(simd, self.weight, codes => self.fill_by_words(simd, codes, terms, steps, panel));
            }
            Method::Tables => match self.numbers.w_parts() {
                1 => self.fill_by_tables::<1>(simd, terms, steps, panel),
                2 => self.fill_by_tables::<2>(simd, terms, steps, panel),
                _ => self.fill_by_tables::<3>(simd, terms, steps, panel),
            },
            _ => {
                for index in 0..self.tiles * ROWS {
                    let row = (self.outputs.start + index).min(self.outputs.end - 1);
                    self.prefetch_next_strip(simd, row - self.outputs.start, &terms);
                    let lines = Lines { panel, tiles: self.tiles, tile: index / ROWS, row: index % ROWS };
                    self.fill_row(simd, row, terms.clone(), steps, lines);
                }
            }
        }
        steps
    }

    /// Asks for a part of the strip that comes next, as long as the terms of row `index` of this one, and for those of
    /// the next row. Chunks of rows are short pieces of memory, which the processor's own prefetchers do not follow: so
    /// the next strip is asked for line by line, in the order of memory, while this one is decoded.
    #[inline(always)]
    fn prefetch_next_strip(&self, simd: Avx512, index: usize, terms: &Range<usize>) {
        let layout = self.weight.layout();
        if layout.straddles_rows {
            return;
        }
        let (row_bytes, bytes) = (layout.row_bytes(), layout.bytes_of(terms.len()));
        let rows = self.outputs.len();
        let codes = self.weight.codes().as_ptr().wrapping_add(self.outputs.start * row_bytes);
        let near = codes.wrapping_add((index + 1) * row_bytes + layout.bytes_of(terms.start));
        let far = codes.wrapping_add(rows * (row_bytes + layout.bytes_of(terms.start)) + index * bytes);
        for line in (0..bytes).step_by(ROW_BYTES) {
            simd.prefetch(far.wrapping_add(line));
            simd.prefetch_near(near.wrapping_add(line));
        }
        let block = (self.outputs.end + index) * layout.blocks_per_row() + terms.start / layout.block_size;
        prefetch_scale(simd, self.weight, block);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_row(&mut self, simd: Avx512, row: usize, terms: Range<usize>, steps: usize, lines: Lines<'_>) {
        match (self.method, self.numbers) {
            (Method::RowCodes, Numbers::Int8) => copy_codes(simd, self.row_codes(row, terms), steps, lines),
            (Method::RowCodes, _) => widen_codes(self.row_codes(row, terms), steps, lines),
            _ => with_codes!(simd, self.weight, codes => self.fill_any(simd, codes, row, terms, steps, lines)),
        }
    }

    /// The bytes of 8-bit codes.
    fn row_codes(&self, row: usize, terms: Range<usize>) -> &'a [u8] {
        let layout = self.weight.layout();
        &self.weight.codes()[row * layout.row_bytes()..][terms]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_by_tables<const PARTS: usize>(&self, simd: Avx512, terms: Range<usize>, steps: usize, panel: &mut [Line]) {
        let layout = self.weight.layout();
        let Some(codebook) = self.weight.codebook() else { unreachable!("4-bit codes have a table") };
        // SAFETY: a codebook is a vector.
        let codebook = unsafe { _mm512_loadu_ps(codebook.values().as_ptr()) };
        let (blocks, row_bytes) = (layout.blocks_per_row(), layout.row_bytes());
        let block_shift = block_shift(layout);
        let groups = steps / Order::Nibbles.steps_of_group();
        let part_lines = self.tiles * CHUNK_STEPS * ROWS;
        assert!(panel.len() >= PARTS * part_lines);
        for index in 0..self.tiles * ROWS {
            let row = index.min(self.outputs.len() - 1);
            let scales = &self.scales[row * blocks..][..blocks];
            let shifts = self.shifts.get(row * blocks..).unwrap_or_default();
            let codes = &self.weight.codes()[(self.outputs.start + row) * row_bytes + terms.start / 2..];
            let mut line = (index / ROWS) * CHUNK_STEPS * ROWS + index % ROWS;
            self.prefetch_next_strip(simd, row, &terms);
            for group in 0..groups {
                let col = terms.start + group * 2 * SMALLEST_TABLE_BLOCK;
                // Columns behind the last are multiplied with zeros, by weights of the row's last block.
                let [low, high] = [col, col + SMALLEST_TABLE_BLOCK].map(|col| {
                    let block = (col >> block_shift).min(blocks - 1);
                    let scale = _mm512_set1_ps(scales[block]);
                    match shifts.get(block) {
                        Some(&shift) => _mm512_fmadd_ps(codebook, scale, _mm512_set1_ps(shift)),
                        None => _mm512_mul_ps(codebook, scale),
                    }
                });
                let tables = split(low, high, PARTS);
                let words = _mm512_castps_si512(load_words(simd, &codes[group * SMALLEST_TABLE_BLOCK..]));
                let shifted = [
                    _mm512_srli_epi16::<4>(words),
                    words,
                    _mm512_srli_epi16::<12>(words),
                    _mm512_srli_epi16::<8>(words),
                ];
                for words in shifted {
                    let index = table_index(words);
                    for (part, table) in tables.iter().take(PARTS).enumerate() {
                        // SAFETY: a line is a vector, and the panel has one for each part, tile, step and row.
                        unsafe {
                            let line = panel.as_mut_ptr().add(part * part_lines + line);
                            _mm512_storeu_si512(line.cast(), _mm512_permutexvar_epi16(index, *table));
                        }
                    }
                    line += ROWS;
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_by_words<C: Codes<Avx512>>(
        &mut self,
        simd: Avx512,
        codes: C,
        terms: Range<usize>,
        steps: usize,
        panel: &mut [Line],
    ) {
        let (layout, parts) = (self.weight.layout(), self.numbers.w_parts());
        let (blocks, row_bytes, block_shift) = (layout.blocks_per_row(), layout.row_bytes(), block_shift(layout));
        let group_terms = C::PER_WORD * Avx512::LANES;
        let scale_of_lane = |last: usize| simd.index(|lane| ((lane * C::PER_WORD) >> block_shift).min(last));
        let whole = scale_of_lane(usize::MAX);
        for index in 0..self.tiles * ROWS {
            let row = index.min(self.outputs.len() - 1);
            let bytes = &self.weight.codes()[(self.outputs.start + row) * row_bytes..];
            self.prefetch_next_strip(simd, row, &terms);
            for group in 0..steps * 2 / C::PER_WORD {
                let col = terms.start + group * group_terms;
                let block = (col >> block_shift).min(blocks - 1);
                // Columns behind the last are multiplied with zeros, by weights of the row's last block.
                let lanes = if col + group_terms <= layout.cols { whole } else { scale_of_lane(blocks - 1 - block) };
                // SAFETY: a vector lies behind every block's scale and shift.
                let load =
                    |values: &[f32]| unsafe { simd.permute(simd.load(values[row * blocks + block..].as_ptr()), lanes) };
                let scale = load(&self.scales);
                let shift = if self.shifts.is_empty() { simd.splat(0.0) } else { load(&self.shifts) };
                let words = load_words(simd, bytes.get(layout.bytes_of(col)..).unwrap_or_default());
                for step in 0..C::PER_WORD / 2 {
                    let pair = [0, 1].map(|i| simd.fma(codes.decode(simd, words, 2 * step + i), scale, shift));
                    let mut lines = Lines { panel, tiles: self.tiles, tile: index / ROWS, row: index % ROWS };
                    for (part, w) in split(pair[0], pair[1], parts).into_iter().take(parts).enumerate() {
                        lines.store(part, group * C::PER_WORD / 2 + step, w);
                    }
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_any<C: Codes<Avx512>>(
        &mut self,
        simd: Avx512,
        codes: C,
        row: usize,
        terms: Range<usize>,
        steps: usize,
        mut lines: Lines<'_>,
    ) {
        let buffer = &mut self.rows[0];
        buffer.resize(steps * 32, 0.0);
        buffer[terms.len()..].fill(0.0);
        decode_row(simd, codes, self.weight, row, terms.clone(), &mut self.block_scales, &mut buffer[..terms.len()]);
        let parts = self.numbers.w_parts();
        for (step, w) in buffer.chunks_exact(32).enumerate() {
            // SAFETY: 32 numbers are two vectors.
            unsafe {
                let split = split(_mm512_loadu_ps(w.as_ptr()), _mm512_loadu_ps(w.as_ptr().add(16)), parts);
                for (part, w) in split.into_iter().take(parts).enumerate() {
                    lines.store(part, step, w);
                }
            }
        }
    }

    /// Rows of tiles are pairs of rows of the weight: `terms` are rows, outputs are columns.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_pairs<C: Codes<Avx512>>(
        &mut self,
        simd: Avx512,
        codes: C,
        terms: Range<usize>,
        steps: usize,
        panel: &mut [Line],
    ) {
        let parts = self.numbers.w_parts();
        for pair in 0..steps * ROWS {
            for (i, buffer) in self.rows.iter_mut().enumerate() {
                buffer.resize(self.tiles * ROWS, 0.0);
                let row = terms.start + 2 * pair + i;
                let out = &mut buffer[..self.outputs.len()];
                if row < terms.end {
                    prefetch_codes(simd, self.weight, row + terms.len(), &self.outputs);
                    decode_row(simd, codes, self.weight, row, self.outputs.clone(), &mut self.block_scales, out);
                } else {
                    out.fill(0.0);
                }
            }
            let [even, odd] = &self.rows;
            for (tile, (even, odd)) in even.chunks_exact(ROWS).zip(odd.chunks_exact(ROWS)).enumerate() {
                // SAFETY: sixteen numbers are a vector.
                unsafe {
                    let split = split(_mm512_loadu_ps(even.as_ptr()), _mm512_loadu_ps(odd.as_ptr()), parts);
                    for (part, w) in split.into_iter().take(parts).enumerate() {
                        let mut lines = Lines { panel, tiles: self.tiles, tile, row: pair % ROWS };
                        lines.store(part, pair / ROWS, interleave_halves(w));
                    }
                }
            }
        }
    }
}

/// Asks for the codes of some columns of a row, which need not exist.
#[inline(always)]
fn prefetch_codes(simd: Avx512, weight: &PackedWeight<'_>, row: usize, cols: &Range<usize>) {
    let layout = weight.layout();
    let first = weight.codes().as_ptr().wrapping_add(row * layout.row_bytes() + layout.bytes_of(cols.start));
    for line in (0..layout.bytes_of(cols.len())).step_by(ROW_BYTES) {
        simd.prefetch(first.wrapping_add(line));
    }
}

/// The lines of one row in a panel's tiles.
struct Lines<'a> {
    panel: &'a mut [Line],
    tiles: usize,
    tile: usize,
    row: usize,
}

impl Lines<'_> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(&mut self, part: usize, step: usize, v: __m512i) {
        let at = ((part * self.tiles + self.tile) * CHUNK_STEPS + step) * ROWS + self.row;
        // SAFETY: a line is a vector.
        unsafe { _mm512_storeu_si512(self.panel[at].0.as_mut_ptr().cast(), v) };
    }
}

/// 32 numbers in bf16: rounded where there is one part; else truncated, and the parts that follow hold what is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn split(low: __m512, high: __m512, parts: usize) -> [__m512i; 3] {
    let mut out = [_mm512_castps_si512(_mm512_set1_ps(0.0)); 3];
    let mut numbers = [low, high];
    for out in &mut out[..parts - 1] {
        *out = upper_halves(numbers[0], numbers[1]);
        numbers = numbers.map(|v| without_upper_half(v));
    }
    // SAFETY: both are 512 bits of which every pattern is valid.
    out[parts - 1] = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(numbers[1], numbers[0])) };
    out
}

/// The low four bits of every word, and the half of the vector that it lies in as the fifth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn table_index(words: __m512i) -> __m512i {
    const AND_OR: i32 = 0xea; // a & b | c
    const HALVES: [u16; 32] = {
        let mut halves = [0; 32];
        let mut i = LEN;
        while i < 32 {
            halves[i] = LEN as u16;
            i += 1;
        }
        halves
    };
    // SAFETY: the array is a vector.
    let halves = unsafe { _mm512_loadu_si512(HALVES.as_ptr().cast()) };
    _mm512_ternarylogic_epi32::<AND_OR>(words, _mm512_set1_epi16(LEN as i16 - 1), halves)
}

/// Number `i` of the lower half beside number `i` of the upper, for all `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave_halves(v: __m512i) -> __m512i {
    const INDEX: [u16; 32] = {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = (i / 2 + 16 * (i % 2)) as u16;
            i += 1;
        }
        index
    };
    // SAFETY: the array is a vector.
    let index = unsafe { _mm512_loadu_si512(INDEX.as_ptr().cast()) };
    _mm512_permutexvar_epi16(index, v)
}

/// Signed bytes as they are, zeros behind the last.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn copy_codes(simd: Avx512, codes: &[u8], steps: usize, mut lines: Lines<'_>) {
    for step in 0..steps {
        let bytes = codes.get(step * ROW_BYTES..).unwrap_or_default();
        lines.store(0, step, _mm512_castps_si512(load_words(simd, bytes)));
    }
}

/// Signed bytes in bf16, which holds them exactly.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn widen_codes(codes: &[u8], steps: usize, mut lines: Lines<'_>) {
    for step in 0..steps {
        let bytes = codes.get(step * 32..).unwrap_or_default();
        let mut buffer = [0; 32];
        let bytes = if bytes.len() >= 32 {
            bytes
        } else {
            buffer[..bytes.len()].copy_from_slice(bytes);
            &buffer
        };
        // SAFETY: there are twice 16 bytes.
        let floats = unsafe {
            [0, 16].map(|at| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes[at..].as_ptr().cast()))))
        };
        lines.store(0, step, split(floats[0], floats[1], 1)[0]);
    }
}
