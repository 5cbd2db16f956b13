//! 4-bit weights in tiles through tables: 32 codes at a time are looked up among the weights that their block can hold,
//! `scale * codebook + shift` in bf16, so that scaling costs nothing for each weight.

use super::fill::{Ahead, split};
use super::product::CHUNK_STEPS;
use super::tiles::{Line, ROWS};
use crate::codebook::LEN;
use crate::cpu::codes::load_words;
use crate::cpu::x86::avx512::Avx512;
use std::arch::x86_64::{
    __m512, __m512i, _mm512_castps_si512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_permutexvar_epi16, _mm512_set1_epi16, _mm512_set1_ps, _mm512_srli_epi16, _mm512_storeu_si512,
    _mm512_ternarylogic_epi32,
};

/// Columns of a table: the smallest block that they serve.
pub(super) const TABLE_COLS: usize = 64;
/// Tiles side by side that a group of 64 bytes of codes fills, looked up in two tables.
pub(super) const GROUP_STEPS: usize = 4;
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

    /// Fills `panel`, `[parts][tiles][CHUNK_STEPS]` tiles.
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
        let part_lines = tiles * CHUNK_STEPS * ROWS;
        let (whole, rest) = (self.chunk_bytes / TABLE_COLS, self.chunk_bytes % TABLE_COLS);
        let last = self.count - 1;
        assert!(whole + rest.min(1) <= GROUPS && panel.len() >= PARTS * part_lines);
        assert!(self.codes.len() >= last * self.row_bytes + self.chunk_bytes);
        assert!(self.scales.len() >= last * self.blocks + self.block_of[2 * GROUPS - 1] + 1);
        assert!(!SHIFTED || self.shifts.len() >= self.scales.len());
        for index in 0..tiles * ROWS {
            let row = index.min(last);
            let codes = self.codes[row * self.row_bytes..].as_ptr();
            self.ahead.ask(simd, index, codes.wrapping_add(self.row_bytes), self.chunk_bytes);
            let first_line = (index / ROWS) * CHUNK_STEPS * ROWS + index % ROWS;
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
                    look_up::<PARTS>(words, tables, line, part_lines);
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
            let low = self.table::<SHIFTED>(row * self.blocks + low);
            let high = self.table::<SHIFTED>(row * self.blocks + high);
            split(low, high, PARTS)
        }
    }

    /// The weights that a block can hold.
    ///
    /// # Safety
    /// The block exists.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    unsafe fn table<const SHIFTED: bool>(&self, block: usize) -> __m512 {
        // SAFETY: the caller vouches for the block.
        unsafe {
            let codebook = _mm512_loadu_ps(self.codebook.as_ptr());
            let scale = _mm512_set1_ps(*self.scales.get_unchecked(block));
            if SHIFTED {
                _mm512_fmadd_ps(codebook, scale, _mm512_set1_ps(*self.shifts.get_unchecked(block)))
            } else {
                _mm512_mul_ps(codebook, scale)
            }
        }
    }
}

/// Looks up 128 codes and stores a line to each of four tiles, for every part.
///
/// # Safety
/// The lines are writable, those of parts `part_lines` apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn look_up<const PARTS: usize>(words: __m512i, tables: [__m512i; 3], line: *mut Line, part_lines: usize) {
    let shifted = [_mm512_srli_epi16::<4>(words), words, _mm512_srli_epi16::<12>(words), _mm512_srli_epi16::<8>(words)];
    for (step, words) in shifted.into_iter().enumerate() {
        let index = table_index(words);
        for (part, table) in tables.into_iter().take(PARTS).enumerate() {
            // SAFETY: the caller vouches for the lines.
            unsafe {
                let line = line.add(part * part_lines + step * ROWS);
                _mm512_storeu_si512(line.cast(), _mm512_permutexvar_epi16(index, table));
            }
        }
    }
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
