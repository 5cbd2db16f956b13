//! Activations in tiles.
//!
//! Forward, they are the right operand: a tile holds 16 tokens side by side, and each of its rows 32 bits of every token,
//! two neighbouring terms of the sum in bf16 or four in int8. For the gradient they are the left operand: a row of a
//! tile is 64 bytes of one token.

use std::arch::x86_64::{
    __m512, __m512i, _CMP_LT_OQ, _mm512_abs_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_sub_ps, _mm512_permutex2var_epi16,
    _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_shuffle_i32x4, _mm512_storeu_ps,
};

use half::bf16;

use super::fill::Order;
use super::product::{CHUNK_STEPS, Numbers};
use super::scratch::Scratch;
use super::tiles::{Line, Operand, ROW_BYTES, ROWS, TILE_BYTES};
use crate::cpu::activations::Activations;
use crate::cpu::int8_rows::Codes;
use crate::cpu::parallel;
use crate::cpu::simd::Simd;
use crate::cpu::x86::avx512::Avx512;
use crate::dtype::Floats;

/// Activations of all tokens in tiles.
pub(super) struct Packed {
    /// `[chunks][parts][token tiles][CHUNK_STEPS]` tiles.
    lines: Scratch,
    parts: usize,
    pub(super) token_tiles: usize,
    /// One for each token, of int8.
    pub(super) scales: Vec<f32>,
}

/// How activations are to lie in their tiles.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) numbers: Numbers,
    /// The order of the terms, which is that of the decoded weights.
    pub(super) order: Order,
    /// Whether tokens are side by side.
    pub(super) is_right: bool,
}

impl Packed {
    /// Packs `x`, rows of `terms`, or of int8 the integers that it was rounded to.
    pub(super) fn new(
        x: &Activations<'_>,
        rounded: Option<Codes<'_>>,
        terms: usize,
        form: Form,
        threads: usize,
    ) -> Self {
        debug_assert!(rounded.is_some() || form.numbers != Numbers::Int8);
        let scales = rounded.map_or_else(Vec::new, |rounded| rounded.scales().to_vec());
        let parts = form.numbers.x_parts();
        let token_tiles = x.tokens.div_ceil(ROWS);
        let chunk_lines = parts * token_tiles * CHUNK_STEPS * ROWS;
        let chunks = terms.div_ceil(form.numbers.chunk_terms());
        let mut lines = Scratch::take(chunks * chunk_lines);
        parallel::for_each(threads, lines.chunks_mut(chunk_lines).enumerate().collect(), |(chunk, lines)| {
            // SAFETY: tiles are in use only where `is_available` has said so, which asks for these instructions.
            unsafe { pack_chunk(x, rounded, terms, form, chunk, lines) };
        });
        Self { lines, parts, token_tiles, scales }
    }

    /// Bytes of all tiles.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    /// The tiles of a chunk from a token tile on, for one of the parts that numbers are split into.
    pub(super) fn operand(&self, chunk: usize, part: usize, token_tile: usize) -> Operand {
        let tile = ((chunk * self.parts + part) * self.token_tiles + token_tile) * CHUNK_STEPS;
        Operand { first: self.lines[tile * ROWS..].as_ptr(), stride: CHUNK_STEPS * TILE_BYTES }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn pack_chunk(
    x: &Activations<'_>,
    rounded: Option<Codes<'_>>,
    terms: usize,
    form: Form,
    chunk: usize,
    lines: &mut [Line],
) {
    // SAFETY: this function is compiled for its instructions.
    let simd = unsafe { Avx512::new() };
    let chunk_terms = form.numbers.chunk_terms();
    let first = chunk * chunk_terms;
    let count = chunk_terms.min(terms - first);
    let (parts, token_tiles) = (form.numbers.x_parts(), x.tokens.div_ceil(ROWS));
    let places = form.order.terms_of_words();
    let (mut row, mut permuted) = (vec![0.0; chunk_terms], vec![0.0; chunk_terms]);
    let mut tiles = vec![[simd.splat(0.0); ROWS]; parts * CHUNK_STEPS];
    for token_tile in 0..token_tiles {
        for (lane, token) in (token_tile * ROWS..).take(ROWS).enumerate() {
            if let Some(rounded) = rounded {
                let codes = if token < x.tokens { &rounded.row(token)[first..first + count] } else { &[] };
                to_lines(codes, lane, &mut tiles);
                continue;
            }
            if let (1, None, Floats::Bfloat16(values)) = (parts, &places, x.values)
                && token < x.tokens
                && count == chunk_terms
            {
                copy_bf16(&values[token * x.stride + first..][..count], form.order, lane, &mut tiles);
                continue;
            }
            if token < x.tokens {
                x.read(simd, token, first, &mut row[..count]);
                row[count..].fill(0.0);
            } else {
                row.fill(0.0);
            }
            if let Some(places) = &places {
                let groups = row.chunks_exact(places.len()).zip(permuted.chunks_exact_mut(places.len()));
                groups.for_each(|(from, to)| to.iter_mut().zip(places).for_each(|(to, &place)| *to = from[place]));
                std::mem::swap(&mut row, &mut permuted);
            }
            to_bf16(&row, form.order, lane, &mut tiles);
        }
        for (index, tile) in tiles.iter_mut().enumerate() {
            if form.is_right {
                simd.transpose(tile);
            }
            let (part, step) = (index / CHUNK_STEPS, index % CHUNK_STEPS);
            let at = ((part * token_tiles + token_tile) * CHUNK_STEPS + step) * ROWS;
            for (line, vector) in lines[at..at + ROWS].iter_mut().zip(tile.iter()) {
                // SAFETY: a line is a vector.
                unsafe { _mm512_storeu_ps(line.0.as_mut_ptr().cast(), *vector) };
            }
        }
    }
}

/// Rows of 64 int8, zeros behind the last.
#[inline]
#[target_feature(enable = "avx512f")]
fn to_lines(codes: &[i8], lane: usize, tiles: &mut [[__m512; ROWS]]) {
    let mut rest = codes;
    for tile in tiles {
        let mut bytes = Line::ZERO;
        let (now, later) = rest.split_at(rest.len().min(ROW_BYTES));
        bytes.0.iter_mut().zip(now).for_each(|(byte, code)| *byte = code.cast_unsigned());
        rest = later;
        // SAFETY: a line is a vector.
        tile[lane] = unsafe { _mm512_loadu_ps(bytes.0.as_ptr().cast()) };
    }
}

/// Rows of 32 bf16 as they are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn copy_bf16(row: &[bf16], order: Order, lane: usize, tiles: &mut [[__m512; ROWS]]) {
    for (x, tiles) in row.chunks_exact(4 * 32).zip(tiles.chunks_exact_mut(4)) {
        // SAFETY: 32 numbers of 16 bits are a vector.
        let mut rows = [0, 32, 64, 96].map(|at| unsafe { _mm512_loadu_si512(x[at..].as_ptr().cast()) });
        if order == Order::Nibbles {
            rows = in_order_of_nibbles(rows);
        }
        for (tile, row) in tiles.iter_mut().zip(rows) {
            tile[lane] = _mm512_castsi512_ps(row);
        }
    }
}

/// Rows of 32 bf16 for every part: the upper halves of the numbers, then those of what is left. Three parts hold fp32
/// exactly, two fp16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn to_bf16(row: &[f32], order: Order, lane: usize, tiles: &mut [[__m512; ROWS]]) {
    let group = if order == Order::Nibbles { order.steps_of_group() } else { 1 };
    let parts = tiles.len() / CHUNK_STEPS;
    for (at, x) in row.chunks_exact(32 * group).enumerate() {
        let mut numbers = [[_mm512_set1_ps(0.0); 2]; 4];
        for (numbers, x) in numbers.iter_mut().zip(x.chunks_exact(32)) {
            // SAFETY: 32 numbers are two vectors.
            *numbers = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] };
        }
        for part in 0..parts {
            let mut rows = [_mm512_castps_si512(_mm512_set1_ps(0.0)); 4];
            for (row, numbers) in rows.iter_mut().zip(&mut numbers).take(group) {
                *row = upper_halves(numbers[0], numbers[1]);
                *numbers = numbers.map(|v| without_upper_half(v));
            }
            if order == Order::Nibbles {
                rows = in_order_of_nibbles(rows);
            }
            for (step, row) in rows.into_iter().take(group).enumerate() {
                tiles[part * CHUNK_STEPS + at * group + step][lane] = _mm512_castsi512_ps(row);
            }
        }
    }
}

/// The upper halves of 32 fp32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn upper_halves(low: __m512, high: __m512) -> __m512i {
    const ODD: [u16; 32] = {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = 2 * i as u16 + 1;
            i += 1;
        }
        index
    };
    // SAFETY: the array is a vector.
    let index = unsafe { _mm512_loadu_si512(ODD.as_ptr().cast()) };
    _mm512_permutex2var_epi16(_mm512_castps_si512(low), index, _mm512_castps_si512(high))
}

/// What truncation to bf16 leaves: exact, and nothing of infinities and NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn without_upper_half(v: __m512) -> __m512 {
    let upper = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(!0xffff)));
    let is_finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(v), _mm512_set1_ps(f32::INFINITY));
    _mm512_maskz_sub_ps(is_finite, v, upper)
}

/// 128 terms in the order in which 4-bit codes are decoded: row `s` gets term `4 * j + s` as its number `j`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn in_order_of_nibbles(rows: [__m512i; 4]) -> [__m512i; 4] {
    const INDEX: [u16; 32] = {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = (4 * (i % 8) + i / 8) as u16;
            i += 1;
        }
        index
    };
    // SAFETY: the array is a vector.
    let index = unsafe { _mm512_loadu_si512(INDEX.as_ptr().cast()) };
    // Quarter s of each row: its terms 4 * j + s. Then quarters s of all rows are brought together.
    quarters_transposed(rows.map(|row| _mm512_permutexvar_epi16(index, row)))
}

/// Quarter `i` of vector `j` becomes quarter `j` of vector `i`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn quarters_transposed([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab_low, ab_high) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
    let (cd_low, cd_high) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
    [
        _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low),
        _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low),
        _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high),
        _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high),
    ]
}
