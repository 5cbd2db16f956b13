//! 4-bit weights in tiles through tables: 32 codes at a time are looked up among the weights that their block can hold,
//! `scale * codebook + shift` in bf16, so that scaling costs nothing for each weight. A register holds two tables: forward those
//! of two blocks of a row, for the gradient those of two rows.

use std::ops::Range;

use super::ahead::{Ahead, prefetch_codes};
use super::fill::split;
use super::product::{CHUNK_STEPS, LARGE_STRIP, PANEL_LINES};
use super::tiles::{Line, ROWS};
use crate::codebook::LEN;
use crate::cpu::codes::load_words;
use crate::cpu::scales::{prefetch_scale, read_scales, read_shifts};
use crate::cpu::simd::Simd;
use crate::cpu::x86::avx512::Avx512;
use crate::storage::PackedWeight;
use std::arch::x86_64::{
    __m512, __m512i, _mm512_castps_si512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_permutex2var_epi16, _mm512_permutexvar_epi16, _mm512_set1_epi16, _mm512_set1_ps, _mm512_srli_epi16,
    _mm512_storeu_si512, _mm512_ternarylogic_epi32,
};

/// Columns of a table: the smallest block that they serve.
pub(super) const TABLE_COLS: usize = 64;
/// Tiles side by side that a group of 64 bytes of codes fills, looked up in two tables.
pub(super) const GROUP_STEPS: usize = 4;
/// Most tables that a row of a panel takes: as many as a strip has columns for.
const MOST_TABLES: usize = LARGE_STRIP / TABLE_COLS;
/// How many rows before its own a row's scales are asked for.
const SCALES_AHEAD: usize = 4;
/// Groups of a chunk.
const GROUPS: usize = CHUNK_STEPS / GROUP_STEPS;

/// Rows of a weight from one column on, and what belongs to them.
pub(super) struct Rows<'a> {
    pub(super) codebook: &'a [f32; LEN],
    /// Bytes from the first row's chunk on, and from row to row.
    pub(super) codes: &'a [u8],
    pub(super) row_bytes: usize,
    /// Bytes of a row's chunk, the same for every row.
    pub(super) chunk_bytes: usize,
    /// Rows that there are; tiles are filled up with the last one.
    pub(super) count: usize,
    /// Scales from the first row's first block on, and from row to row.
    pub(super) scales: &'a [f32],
    /// As scales, or empty.
    pub(super) shifts: &'a [f32],
    pub(super) blocks: usize,
    /// The block of each table of the chunk.
    pub(super) block_of: [usize; 2 * GROUPS],
    pub(super) ahead: Ahead,
}

impl Rows<'_> {
    /// The block of each table from column `col` on. Columns behind the last are multiplied with zeros, by weights of the row's
    /// last block.
    pub(super) fn blocks_from(col: usize, block_shift: u32, blocks: usize) -> [usize; 2 * GROUPS] {
        std::array::from_fn(|table| ((col + table * TABLE_COLS) >> block_shift).min(blocks - 1))
    }

    /// Fills `panel`, `[parts][tiles]` rows of tiles.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) fn fill(&self, simd: Avx512, (parts, tiles): (usize, usize), panel: &mut [Line]) {
        match (parts, self.shifts.is_empty()) {
            (1, true) => self.fill_with::<1, false>(simd, tiles, panel),
            (1, false) => self.fill_with::<1, true>(simd, tiles, panel),
            (2, true) => self.fill_with::<2, false>(simd, tiles, panel),
            (2, false) => self.fill_with::<2, true>(simd, tiles, panel),
            (_, true) => self.fill_with::<3, false>(simd, tiles, panel),
            (_, false) => self.fill_with::<3, true>(simd, tiles, panel),
        }
    }

    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_with<const PARTS: usize, const SHIFTED: bool>(&self, simd: Avx512, tiles: usize, panel: &mut [Line]) {
        let part_lines = tiles * PANEL_LINES;
        let (whole, rest) = (self.chunk_bytes / TABLE_COLS, self.chunk_bytes % TABLE_COLS);
        let last = self.count - 1;
        assert!(whole + rest.min(1) <= GROUPS && panel.len() >= PARTS * part_lines);
        assert!(self.codes.len() >= last * self.row_bytes + self.chunk_bytes);
        assert!(self.scales.len() > last * self.blocks + self.block_of[2 * GROUPS - 1]);
        assert!(!SHIFTED || self.shifts.len() >= self.scales.len());
        for index in 0..tiles * ROWS {
            let row = index.min(last);
            let codes = self.codes[row * self.row_bytes..].as_ptr();
            self.ahead.ask(simd, index, codes.wrapping_add(self.row_bytes), self.chunk_bytes);
            let scales = self.scales.as_ptr().wrapping_add((row + SCALES_AHEAD) * self.blocks + self.block_of[0]);
            simd.prefetch_near(scales.cast());
            let first_line = (index / ROWS) * PANEL_LINES + index % ROWS;
            for group in 0..whole + rest.min(1) {
                // SAFETY: the asserts vouch for codes of whole groups, blocks, and the panel's lines.
                unsafe {
                    let words = if group < whole {
                        _mm512_loadu_si512(codes.add(group * TABLE_COLS).cast())
                    } else {
                        let codes = &self.codes[row * self.row_bytes + group * TABLE_COLS..][..rest];
                        _mm512_castps_si512(load_words(simd, codes))
                    };
                    let tables = self.tables::<PARTS, SHIFTED>(row, group);
                    let line = panel.as_mut_ptr().add(first_line + group * GROUP_STEPS * ROWS);
                    look_up::<PARTS>(words, tables, vector(&SECOND_FOR_UPPER), line, (ROWS, part_lines));
                }
            }
        }
    }

    /// The parts of the two tables of a group.
    ///
    /// # Safety
    /// The row and its blocks exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    unsafe fn tables<const PARTS: usize, const SHIFTED: bool>(&self, row: usize, group: usize) -> [__m512i; 3] {
        let [low, high] = [self.block_of[2 * group], self.block_of[2 * group + 1]];
        // SAFETY: the caller vouches for the blocks.
        unsafe {
            let codebook = _mm512_loadu_ps(self.codebook.as_ptr());
            let [low, high] = [low, high].map(|block| {
                let block = row * self.blocks + block;
                let shift = SHIFTED.then(|| *self.shifts.get_unchecked(block));
                weights(codebook, *self.scales.get_unchecked(block), shift)
            });
            split(low, high, PARTS)
        }
    }
}

/// The weights that a block can hold.
#[inline]
#[target_feature(enable = "avx512f")]
fn weights(codebook: __m512, scale: f32, shift: Option<f32>) -> __m512 {
    let scale = _mm512_set1_ps(scale);
    match shift {
        Some(shift) => _mm512_fmadd_ps(codebook, scale, _mm512_set1_ps(shift)),
        None => _mm512_mul_ps(codebook, scale),
    }
}

/// Looks up 128 codes, four of a word, and stores a line for each of the four. `high` has the fifth bit of every index, which
/// says in which of two tables a word's codes are looked up.
///
/// # Safety
/// The lines are writable: `steps` lines apart, those of parts `part_lines`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn look_up<const PARTS: usize>(
    words: __m512i,
    tables: [__m512i; 3],
    high: __m512i,
    line: *mut Line,
    (steps, part_lines): (usize, usize),
) {
    const AND_OR: i32 = 0xea; // a & b | c
    let shifted = [_mm512_srli_epi16::<4>(words), words, _mm512_srli_epi16::<12>(words), _mm512_srli_epi16::<8>(words)];
    for (step, words) in shifted.into_iter().enumerate() {
        let index = _mm512_ternarylogic_epi32::<AND_OR>(words, _mm512_set1_epi16(LEN as i16 - 1), high);
        for (part, table) in tables.into_iter().take(PARTS).enumerate() {
            // SAFETY: the caller vouches for the lines.
            unsafe {
                let line = line.add(part * part_lines + step * steps);
                _mm512_storeu_si512(line.cast(), _mm512_permutexvar_epi16(index, table));
            }
        }
    }
}

/// The second table for words from `first` on, every `step` of them.
const fn second_from(first: usize, step: usize) -> [u16; 32] {
    let mut high = [0; 32];
    let mut i = first;
    while i < 32 {
        high[i] = LEN as u16;
        i += step;
    }
    high
}

const SECOND_FOR_UPPER: [u16; 32] = second_from(16, 1);
const SECOND_FOR_ODD: [u16; 32] = second_from(1, 2);

#[inline]
#[target_feature(enable = "avx512f")]
fn vector(words: &[u16; 32]) -> __m512i {
    // SAFETY: the array is a vector.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// Words of two rows side by side: those of the lower half of both, or of the upper.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn side_by_side(even: __m512i, odd: __m512i) -> [__m512i; 2] {
    const fn index(first: u16) -> [u16; 32] {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = first + i as u16 / 2 + 32 * (i as u16 % 2);
            i += 1;
        }
        index
    }
    const LOWER: [u16; 32] = index(0);
    const UPPER: [u16; 32] = index(16);
    [LOWER, UPPER].map(|index| _mm512_permutex2var_epi16(even, vector(&index), odd))
}

/// Pairs of rows of a weight, for the gradient: a row of a tile has sixteen columns of two rows.
pub(super) struct Pairs<'a> {
    pub(super) weight: &'a PackedWeight<'a>,
    /// Columns, the first one the first of a table.
    pub(super) cols: Range<usize>,
    /// Rows; pairs are filled up with the last one.
    pub(super) rows: Range<usize>,
    pub(super) block_shift: u32,
}

/// Tiles that the columns of a group fill: every fourth column of one table and the other is in a tile.
pub(super) const GROUP_TILES: usize = 8;

impl Pairs<'_> {
    /// Fills `steps` steps of `panel`, `[parts][tiles]` rows of tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) fn fill(&self, simd: Avx512, steps: usize, (parts, tiles): (usize, usize), panel: &mut [Line]) {
        match parts {
            1 => self.fill_with::<1>(simd, steps, tiles, panel),
            2 => self.fill_with::<2>(simd, steps, tiles, panel),
            _ => self.fill_with::<3>(simd, steps, tiles, panel),
        }
    }

    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn fill_with<const PARTS: usize>(&self, simd: Avx512, steps: usize, tiles: usize, panel: &mut [Line]) {
        let Self { weight, cols, rows, block_shift } = self;
        let Some(codebook) = weight.codebook() else { unreachable!("4-bit codes have a table") };
        let layout = weight.layout();
        let blocks = layout.blocks_per_row();
        let part_lines = tiles * PANEL_LINES;
        let block = |table: usize| ((cols.start + table * TABLE_COLS) >> block_shift).min(blocks - 1);
        let tables = tiles / GROUP_TILES * 2;
        let (first_block, count) = (block(0), block(tables - 1) + 1 - block(0));
        let mut numbers = [[0.0; MOST_TABLES]; 4];
        assert!(steps <= CHUNK_STEPS && tables <= MOST_TABLES && panel.len() >= PARTS * part_lines);
        // SAFETY: a codebook is a vector.
        let codebook = unsafe { _mm512_loadu_ps(codebook.values().as_ptr()) };
        for pair in 0..steps * ROWS {
            let pair_rows = [0, 1].map(|i| (rows.start + 2 * pair + i).min(rows.end - 1));
            let [even_scales, odd_scales, even_shifts, odd_shifts] = &mut numbers;
            for (row, (scales, shifts)) in
                pair_rows.into_iter().zip([(even_scales, even_shifts), (odd_scales, odd_shifts)])
            {
                prefetch_codes(simd, weight, row + rows.len(), cols);
                prefetch_scale(simd, weight, (row + rows.len()) * blocks + first_block);
                read_scales(simd, weight, row * blocks + first_block, &mut scales[..count]);
                read_shifts(simd, weight, row * blocks + first_block, &mut shifts[..count]);
            }
            let codes = pair_rows.map(|row| {
                let start = row * layout.row_bytes();
                &weight.codes()[start + layout.bytes_of(cols.start)..start + layout.bytes_of(cols.end)]
            });
            for group in 0..tiles / GROUP_TILES {
                let [even, odd] = codes
                    .map(|codes| _mm512_castps_si512(load_words(simd, codes.get(group * 64..).unwrap_or_default())));
                for (half, words) in side_by_side(even, odd).into_iter().enumerate() {
                    let at = block(2 * group + half) - first_block;
                    let shift = |row: usize| weight.has_shift().then_some(numbers[2 + row][at]);
                    let [even, odd] = [0, 1].map(|row| weights(codebook, numbers[row][at], shift(row)));
                    let tile = group * GROUP_TILES + half * 4;
                    let line = tile * PANEL_LINES + pair;
                    // SAFETY: the panel has a line for each part, tile, step and row.
                    unsafe {
                        let line = panel.as_mut_ptr().add(line);
                        let lines = (PANEL_LINES, part_lines);
                        look_up::<PARTS>(words, split(even, odd, PARTS), vector(&SECOND_FOR_ODD), line, lines);
                    }
                }
            }
        }
    }
}
