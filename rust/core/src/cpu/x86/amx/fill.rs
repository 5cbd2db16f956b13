//! Weights in tiles.
//!
//! Forward, they are the left operand: a row of a tile is 64 bytes of one row of the weight. For the gradient they are the right operand: a row of a tile is two neighbouring rows of
//! the weight, their columns side by side.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm_loadu_si128, _mm512_castps_si512, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
    _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_set1_ps,
    _mm512_storeu_si512,
};
use std::ops::Range;

use super::ahead::{Ahead, prefetch_codes};
use super::pack::{upper_halves, without_upper_half};
use super::product::{CHUNK_STEPS, Numbers, PANEL_LINES, TILES_AT_ONCE};
use super::tables::{GROUP_STEPS, GROUP_TILES, Pairs, Rows, TABLE_COLS};
use super::tiles::{Line, ROW_BYTES, ROWS};
use crate::cpu::codes::{Codes, load_words, with_codes};
use crate::cpu::dequantize::{BlockScales, decode_row};
use crate::cpu::panel::Direction;
use crate::cpu::scales::{read_scales, read_shifts, stored_scale};
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
            Self::Nibbles => GROUP_STEPS,
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
    /// The same through tables.
    PairTables,
}

impl Method {
    pub(super) fn choose(weight: &PackedWeight<'_>, direction: Direction, numbers: Numbers) -> Self {
        let layout = weight.layout();
        debug_assert!(numbers != Numbers::Int8 || weight.is_int8_by_rows());
        let has_tables = layout.bits == 4 && !layout.straddles_rows && has_table_blocks(weight);
        match direction {
            Direction::Gradient if has_tables => Self::PairTables,
            Direction::Gradient => Self::PairsOfRows,
            Direction::Forward if weight.is_int8_by_rows() => Self::RowCodes,
            Direction::Forward if has_tables => Self::Tables,
            Direction::Forward if !layout.straddles_rows => Self::Words,
            Direction::Forward => Self::Rows,
        }
    }

    /// Rows of tiles that a panel has a multiple of.
    pub(super) fn tiles_at_once(self) -> usize {
        if self == Self::PairTables { GROUP_TILES } else { TILES_AT_ONCE }
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
    layout.block_size >= TABLE_COLS || layout.block_size >= layout.cols
}

/// Fills panels of a strip of outputs with a chunk of terms each.
pub(super) struct Filler<'a> {
    weight: &'a PackedWeight<'a>,
    method: Method,
    numbers: Numbers,
    /// The strip.
    outputs: Range<usize>,
    /// Rows of tiles of a panel; the last ones may lie behind the last output.
    tiles: usize,
    /// `[outputs][blocks]` and a vector more, of [`Method::Tables`] and [`Method::Words`].
    scales: Vec<f32>,
    shifts: Vec<f32>,
}

/// Memory that filling takes.
#[derive(Default)]
pub(super) struct Buffers {
    rows: [Vec<f32>; 2],
    block_scales: BlockScales,
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
        Self { weight, method, numbers, outputs, tiles, scales, shifts }
    }

    /// Fills `panel`, `[parts][tiles]` rows of tiles, with a chunk of terms of the strip's outputs from `first` on;
    /// returns how many steps count.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) fn fill(
        &self,
        simd: Avx512,
        first: usize,
        terms: &Range<usize>,
        buffers: &mut Buffers,
        panel: &mut [Line],
    ) -> usize {
        let group = self.method.order(self.weight).steps_of_group();
        let step_terms = self.numbers.chunk_terms() / CHUNK_STEPS;
        let steps = terms.len().div_ceil(step_terms * group) * group;
        let rows = first..(first + self.tiles * ROWS).min(self.outputs.len());
        let ahead = self.ahead(&rows, terms);
        let weight = self.weight;
        if self.method == Method::Tables {
            self.tables(&rows, terms, ahead).fill(simd, (self.numbers.w_parts(), self.tiles), panel);
            return steps;
        }
        if self.method == Method::PairTables {
            let cols = self.outputs.start + rows.start..self.outputs.start + rows.end;
            let pairs = Pairs { weight, cols, rows: terms.clone(), block_shift: block_shift(weight.layout()) };
            pairs.fill(simd, steps, (self.numbers.w_parts(), self.tiles), panel);
            return steps;
        }
        let job = Job { filler: self, rows, terms, steps, ahead };
        match self.method {
            Method::PairsOfRows => {
                with_codes!(simd, weight, codes => job.fill_pairs(simd, codes, buffers, panel));
            }
            Method::Words => with_codes!(simd, weight, codes => job.fill_by_words(simd, codes, panel)),
            _ => job.fill_rows(simd, buffers, panel),
        }
        steps
    }

    /// What to ask for while `rows` of the strip are decoded. Where they are the whole strip, that is a part of the next
    /// strip as long as theirs, line by line in the order of memory, and its scales; else what is filled next.
    fn ahead(&self, rows: &Range<usize>, terms: &Range<usize>) -> Ahead {
        let layout = self.weight.layout();
        if layout.straddles_rows {
            return Ahead::NOTHING;
        }
        let (row_bytes, bytes) = (layout.row_bytes(), layout.bytes_of(terms.len()));
        let (strip, start) = (self.outputs.len(), layout.bytes_of(terms.start));
        let codes = self.weight.codes().as_ptr().wrapping_add(self.outputs.start * row_bytes);
        if rows.len() < strip {
            let offset = if rows.end < strip { rows.end * row_bytes + start } else { start + bytes };
            return Ahead { codes: codes.wrapping_add(offset), code_stride: row_bytes, ..Ahead::NOTHING };
        }
        let blocks = layout.blocks_per_row();
        let block = self.outputs.end * blocks + terms.start / layout.block_size;
        Ahead {
            codes: codes.wrapping_add(strip * (row_bytes + start)),
            code_stride: bytes,
            scales: stored_scale(self.weight, block),
            scale_stride: stored_scale(self.weight, blocks) as usize - stored_scale(self.weight, 0) as usize,
        }
    }

    fn tables(&self, rows: &Range<usize>, terms: &Range<usize>, ahead: Ahead) -> Rows<'_> {
        let layout = self.weight.layout();
        let Some(codebook) = self.weight.codebook() else { unreachable!("4-bit codes have a table") };
        let (blocks, row_bytes) = (layout.blocks_per_row(), layout.row_bytes());
        let first = rows.start * blocks;
        Rows {
            codebook: codebook.values(),
            codes: &self.weight.codes()[(self.outputs.start + rows.start) * row_bytes + layout.bytes_of(terms.start)..],
            row_bytes,
            chunk_bytes: layout.bytes_of(terms.len()),
            count: rows.len(),
            scales: &self.scales[first..],
            shifts: self.shifts.get(first..).unwrap_or_default(),
            blocks,
            block_of: Rows::blocks_from(terms.start, block_shift(layout), blocks),
            ahead,
        }
    }

    /// The bytes of 8-bit codes.
    fn row_codes(&self, row: usize, terms: &Range<usize>) -> &'a [u8] {
        let layout = self.weight.layout();
        &self.weight.codes()[row * layout.row_bytes()..][terms.clone()]
    }
}

/// A panel to fill.
struct Job<'a> {
    filler: &'a Filler<'a>,
    /// Outputs within the strip.
    rows: Range<usize>,
    terms: &'a Range<usize>,
    /// Tiles side by side that count.
    steps: usize,
    ahead: Ahead,
}

impl Job<'_> {
    /// The row of the weight that row `index` of the panel has; behind the last one, the last.
    fn row(&self, index: usize) -> usize {
        self.filler.outputs.start + (self.rows.start + index).min(self.rows.end - 1)
    }

    /// Asks for codes ahead, and for those of the row after `index`.
    #[inline(always)]
    fn ask(&self, simd: Avx512, index: usize) {
        let Filler { weight, .. } = self.filler;
        let layout = weight.layout();
        let near = (self.row(index) + 1) * layout.row_bytes() + layout.bytes_of(self.terms.start);
        self.ahead.ask(simd, index, weight.codes().as_ptr().wrapping_add(near), layout.bytes_of(self.terms.len()));
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_rows(&self, simd: Avx512, buffers: &mut Buffers, panel: &mut [Line]) {
        let tiles = self.filler.tiles;
        for index in 0..tiles * ROWS {
            self.ask(simd, index);
            self.fill_row(simd, index, buffers, Lines { panel, tiles, tile: index / ROWS, row: index % ROWS });
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_row(&self, simd: Avx512, index: usize, buffers: &mut Buffers, lines: Lines<'_>) {
        let (filler, row) = (self.filler, self.row(index));
        match (filler.method, filler.numbers) {
            (Method::RowCodes, Numbers::Int8) => copy_codes(simd, filler.row_codes(row, self.terms), self.steps, lines),
            (Method::RowCodes, _) => widen_codes(filler.row_codes(row, self.terms), self.steps, lines),
            _ => with_codes!(simd, filler.weight, codes => self.fill_any(simd, codes, row, buffers, lines)),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_by_words<C: Codes<Avx512>>(&self, simd: Avx512, codes: C, panel: &mut [Line]) {
        let Filler { weight, tiles, numbers, ref scales, ref shifts, .. } = *self.filler;
        let (layout, parts) = (weight.layout(), numbers.w_parts());
        let (blocks, row_bytes, block_shift) = (layout.blocks_per_row(), layout.row_bytes(), block_shift(layout));
        let group_terms = C::PER_WORD * Avx512::LANES;
        let scale_of_lane = |last: usize| simd.index(|lane| ((lane * C::PER_WORD) >> block_shift).min(last));
        let whole = scale_of_lane(usize::MAX);
        for index in 0..tiles * ROWS {
            let row = self.row(index);
            let bytes = &weight.codes()[row * row_bytes..];
            let first_block = (row - self.filler.outputs.start) * blocks;
            self.ask(simd, index);
            for group in 0..self.terms.len().div_ceil(group_terms) {
                let col = self.terms.start + group * group_terms;
                let block = (col >> block_shift).min(blocks - 1);
                // Columns behind the last are multiplied with zeros, by weights of the row's last block.
                let lanes = if col + group_terms <= layout.cols { whole } else { scale_of_lane(blocks - 1 - block) };
                // SAFETY: a vector lies behind every block's scale and shift.
                let load =
                    |values: &[f32]| unsafe { simd.permute(simd.load(values[first_block + block..].as_ptr()), lanes) };
                let scale = load(scales);
                let shift = if shifts.is_empty() { simd.splat(0.0) } else { load(shifts) };
                let words = load_words(simd, bytes.get(layout.bytes_of(col)..).unwrap_or_default());
                for step in 0..C::PER_WORD / 2 {
                    let pair = [0, 1].map(|i| simd.fma(codes.decode(simd, words, 2 * step + i), scale, shift));
                    let mut lines = Lines { panel, tiles, tile: index / ROWS, row: index % ROWS };
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
        &self,
        simd: Avx512,
        codes: C,
        row: usize,
        Buffers { rows: [buffer, _], block_scales }: &mut Buffers,
        mut lines: Lines<'_>,
    ) {
        let count = self.terms.len();
        buffer.resize(self.steps * 32, 0.0);
        buffer[count..].fill(0.0);
        decode_row(simd, codes, self.filler.weight, row, self.terms.clone(), block_scales, &mut buffer[..count]);
        let parts = self.filler.numbers.w_parts();
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
        &self,
        simd: Avx512,
        codes: C,
        Buffers { rows, block_scales }: &mut Buffers,
        panel: &mut [Line],
    ) {
        let Filler { weight, tiles, numbers, ref outputs, .. } = *self.filler;
        let parts = numbers.w_parts();
        let cols = outputs.start + self.rows.start..outputs.start + self.rows.end;
        for pair in 0..self.steps * ROWS {
            for (i, buffer) in rows.iter_mut().enumerate() {
                buffer.resize(tiles * ROWS, 0.0);
                let row = self.terms.start + 2 * pair + i;
                let out = &mut buffer[..cols.len()];
                if row < self.terms.end {
                    prefetch_codes(simd, weight, row + self.terms.len(), &cols);
                    decode_row(simd, codes, weight, row, cols.clone(), block_scales, out);
                } else {
                    out.fill(0.0);
                }
            }
            let [even, odd] = &*rows;
            for (tile, (even, odd)) in even.chunks_exact(ROWS).zip(odd.chunks_exact(ROWS)).enumerate() {
                // SAFETY: sixteen numbers are a vector.
                unsafe {
                    let split = split(_mm512_loadu_ps(even.as_ptr()), _mm512_loadu_ps(odd.as_ptr()), parts);
                    for (part, w) in split.into_iter().take(parts).enumerate() {
                        let mut lines = Lines { panel, tiles, tile, row: pair % ROWS };
                        lines.store(part, pair / ROWS, interleave_halves(w));
                    }
                }
            }
        }
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
        let at = (part * self.tiles + self.tile) * PANEL_LINES + step * ROWS + self.row;
        // SAFETY: a line is a vector.
        unsafe { _mm512_storeu_si512(self.panel[at].0.as_mut_ptr().cast(), v) };
    }
}

/// 32 numbers in bf16: rounded where there is one part; else truncated, and the parts that follow hold what is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn split(low: __m512, high: __m512, parts: usize) -> [__m512i; 3] {
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
