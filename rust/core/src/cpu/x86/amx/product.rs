//! The product in tiles: strips of outputs, chunk by chunk of the sum.
//!
//! A strip's sums stay in the cache, a chunk of its weights is decoded once and meets all tokens.

use std::arch::x86_64::{
    __m512, _mm512_castpd_si512, _mm512_castps_pd, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};
use std::ops::Range;

use super::fill::{Buffers, Filler, Method};
use super::pack::{Form, Packed, quarters_transposed};
use super::scratch::Scratch;
use super::tiles::{self, Line, Operand, ROW_BYTES, ROWS, Session, Sums, TILE_BYTES, multiply};
use crate::cpu::activations::Activations;
use crate::cpu::int8_rows::Codes;
use crate::cpu::linear::Finish;
use crate::cpu::panel::Direction;
use crate::cpu::parallel;
use crate::cpu::scales::read_scales;
use crate::cpu::simd::Simd;
use crate::cpu::x86::avx512::Avx512;
use crate::storage::PackedWeight;

/// Tiles that a chunk of the sum takes: with it a panel of two rows of tiles takes 16 KiB, a third of the L1
/// cache, and as much of the activations is multiplied with it at once. Filling it is short enough for the matrix unit not to
/// fall asleep, which it does after some 400 ns, to take as long until it is awake.
pub(super) const CHUNK_STEPS: usize = 8;
/// Lines from a row of tiles in a panel to the next: one more than there are, so that lines below each other do not compete for
/// one set of the L1 cache.
pub(super) const PANEL_LINES: usize = CHUNK_STEPS * ROWS + 1;
/// Rows of tiles that are multiplied at once.
pub(super) const TILES_AT_ONCE: usize = 2;
/// Outputs of a strip where activations take most of the L2 cache: they are read anew for every strip. Its sums with 512
/// tokens take 1 MiB.
pub(super) const LARGE_STRIP: usize = 512;
/// Bytes of activations from which on strips are large.
const MANY_ACTIVATIONS: usize = 1 << 20;

/// The numbers that are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cpu) enum Numbers {
    /// bf16; with several parts a number is their sum.
    Bf16 {
        /// Parts of an activation: 1 holds bf16, 2 fp16, 3 fp32.
        x_parts: usize,
        /// Parts of a weight.
        w_parts: usize,
    },
    /// int8, with a scale for each row of weights and of activations: `LLM.int8()`.
    Int8,
}

impl Numbers {
    /// Parts of an activation.
    pub(super) fn x_parts(self) -> usize {
        match self {
            Self::Bf16 { x_parts, .. } => x_parts,
            Self::Int8 => 1,
        }
    }

    /// Parts of a weight.
    pub(in crate::cpu) fn w_parts(self) -> usize {
        match self {
            Self::Bf16 { w_parts, .. } => w_parts,
            Self::Int8 => 1,
        }
    }

    /// The parts whose products count: each part is 2^-8 of the one before, and what is smaller than the last part of
    /// either factor is left out.
    fn pairs(self) -> impl Iterator<Item = (usize, usize)> {
        let (x_parts, w_parts) = (self.x_parts(), self.w_parts());
        let pairs = (0..w_parts).flat_map(move |w| (0..x_parts).map(move |x| (w, x)));
        pairs.filter(move |(w, x)| w + x < x_parts.max(w_parts))
    }

    /// How many products of parts make a product.
    pub(in crate::cpu) fn product_count(self) -> usize {
        self.pairs().count()
    }

    /// Terms of a sum in a chunk.
    pub(super) fn chunk_terms(self) -> usize {
        match self {
            Self::Bf16 { .. } => CHUNK_STEPS * 32,
            Self::Int8 => CHUNK_STEPS * 64,
        }
    }
}

/// The decoded weights of a chunk: `[parts][tiles]` rows of [`CHUNK_STEPS`] tiles, of which `steps` count,
/// [`PANEL_LINES`] apart.
struct Panel<'a> {
    lines: &'a [Line],
    tiles: usize,
    chunk: usize,
    steps: usize,
}

/// One product.
pub(in crate::cpu) struct Product<'a> {
    weight: &'a PackedWeight<'a>,
    direction: Direction,
    numbers: Numbers,
    method: Method,
    x: Packed,
    tokens: usize,
}

impl<'a> Product<'a> {
    /// The product of `x` with a weight, in either direction; of int8, `rounded` has its integers. Only where
    /// [`super::is_available`] has said so.
    pub(in crate::cpu) fn new(
        weight: &'a PackedWeight<'a>,
        direction: Direction,
        numbers: Numbers,
        x: &Activations<'_>,
        rounded: Option<Codes<'_>>,
        threads: usize,
    ) -> Self {
        assert!(super::is_available());
        let method = Method::choose(weight, direction, numbers);
        let form = Form { numbers, order: method.order(weight), is_right: direction == Direction::Forward };
        let (_, terms) = direction.outputs_and_terms(weight);
        let packed = Packed::new(x, rounded, terms, form, threads);
        Self { weight, direction, numbers, method, x: packed, tokens: x.tokens }
    }

    /// Computes it and hands it over, up to 16 tokens at once.
    pub(in crate::cpu) fn run(&self, threads: usize, finish: &Finish<'_>) {
        let (outputs, _) = self.direction.outputs_and_terms(self.weight);
        let small = self.method.tiles_at_once() * ROWS;
        let step = outputs.div_ceil(4 * threads.max(1)).next_multiple_of(small).min(LARGE_STRIP);
        // For the gradient, a strip is as many columns of every row of the weight: the more, the better.
        let is_small = self.direction == Direction::Forward && self.x.bytes() < MANY_ACTIVATIONS;
        let strip = if is_small { small } else { step };
        parallel::for_each(threads, parallel::ranges(outputs, step), |outputs| {
            // SAFETY: `new` has asserted that the instructions are there.
            unsafe { self.strips(outputs, strip, finish) };
        });
    }

    /// Computes some outputs, `step` at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn strips(&self, outputs: Range<usize>, step: usize, finish: &Finish<'_>) {
        // SAFETY: this function is compiled for its instructions, and called only where there are tiles.
        let (simd, session) = unsafe { (Avx512::new(), Session::start()) };
        let (_, terms) = self.direction.outputs_and_terms(self.weight);
        let chunks = parallel::ranges(terms, self.numbers.chunk_terms());
        let at_once = self.method.tiles_at_once();
        // A row of a panel of few columns is a short piece of memory, which counts where weights are read for few tokens.
        let is_wide = match self.method {
            Method::PairsOfRows => true,
            Method::PairTables => self.x.bytes() < MANY_ACTIVATIONS,
            _ => false,
        };
        let panel_tiles = if is_wide { step / ROWS } else { at_once };
        let mut lines = Scratch::take(self.numbers.w_parts() * panel_tiles * PANEL_LINES);
        let tile_sums = self.x.token_tiles * ROWS;
        let mut sums = Scratch::take(step / ROWS * tile_sums);
        let mut buffers = Buffers::default();
        for first in outputs.clone().step_by(step) {
            let outputs = first..(first + step).min(outputs.end);
            let tiles = outputs.len().div_ceil(at_once * ROWS) * at_once;
            let panel_tiles = panel_tiles.min(tiles);
            let sums = &mut sums[..tiles * tile_sums];
            let filler = Filler::new(simd, self.weight, (self.method, self.numbers), outputs.clone(), panel_tiles);
            for (chunk, terms) in chunks.iter().enumerate() {
                for (at, sums) in sums.chunks_exact_mut(panel_tiles * tile_sums).enumerate() {
                    let steps = filler.fill(simd, at * panel_tiles * ROWS, terms, &mut buffers, &mut lines);
                    let panel = Panel { lines: &lines, tiles: panel_tiles, chunk, steps };
                    match self.numbers {
                        Numbers::Bf16 { .. } => self.multiply::<tiles::Bf16>(&session, &panel, sums),
                        Numbers::Int8 => self.multiply::<tiles::Int8>(&session, &panel, sums),
                    }
                }
            }
            self.hand_over(simd, outputs, sums, finish);
        }
    }

    /// Adds the products of a panel with all tokens: two rows of tiles with two at once, so that every tile that is loaded
    /// is used twice.
    fn multiply<N: tiles::Numbers>(&self, session: &Session, panel: &Panel<'_>, sums: &mut [Line]) {
        for tile in (0..panel.tiles).step_by(TILES_AT_ONCE) {
            for token_tile in (0..self.x.token_tiles).step_by(2) {
                let tokens = (self.x.token_tiles - token_tile).min(2);
                for (index, parts) in self.numbers.pairs().enumerate() {
                    let are_new = panel.chunk == 0 && index == 0;
                    let (operands, counts, sums) = self.block(panel, parts, (tile, token_tile, tokens), sums, are_new);
                    // SAFETY: panel and activations have CHUNK_STEPS tiles for each row of tiles, sums one for each pair.
                    unsafe { multiply::<N>(session, counts, operands, sums, panel.steps) };
                }
            }
        }
    }

    /// Left and right operand, how many rows of tiles of each, and their sums, of two rows of tiles of the panel and one
    /// or two tiles of tokens.
    #[inline]
    fn block(
        &self,
        panel: &Panel<'_>,
        (w_part, x_part): (usize, usize),
        (tile, token_tile, tokens): (usize, usize, usize),
        sums: &mut [Line],
        are_new: bool,
    ) -> ((Operand, Operand), (usize, usize), Sums) {
        let (of_weights, of_tokens) = (self.x.token_tiles * TILE_BYTES, TILE_BYTES);
        let start = (w_part * panel.tiles + tile) * PANEL_LINES;
        let w = Operand { first: panel.lines[start..].as_ptr(), stride: PANEL_LINES * ROW_BYTES };
        let x = self.x.operand(panel.chunk, x_part, token_tile);
        let first = sums[(tile * self.x.token_tiles + token_tile) * ROWS..].as_mut_ptr();
        match self.direction {
            Direction::Forward => {
                ((w, x), (TILES_AT_ONCE, tokens), Sums { first, strides: (of_weights, of_tokens), are_new })
            }
            Direction::Gradient => {
                ((x, w), (tokens, TILES_AT_ONCE), Sums { first, strides: (of_tokens, of_weights), are_new })
            }
        }
    }

    /// Brings the sums of a strip into rows of outputs, 16 tokens at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn hand_over(&self, simd: Avx512, outputs: Range<usize>, sums: &[Line], finish: &Finish<'_>) {
        let token_tiles = self.x.token_tiles;
        let tiles = sums.len() / (token_tiles * ROWS);
        let stride = tiles * ROWS;
        let mut factors = vec![1.0; stride];
        if self.method == Method::RowCodes {
            read_scales(simd, self.weight, outputs.start, &mut factors[..outputs.len()]);
        }
        let mut strip = vec![0.0; ROWS * stride];
        for token_tile in 0..token_tiles {
            let tokens = token_tile * ROWS..((token_tile + 1) * ROWS).min(self.tokens);
            let sums = |tile: usize| &sums[(tile * token_tiles + token_tile) * ROWS..][..ROWS];
            if self.method == Method::PairTables {
                self.tables_in_order(simd, sums, &mut strip, stride);
            } else {
                self.tiles_in_order(simd, sums, (tokens.clone(), &factors), &mut strip, stride);
            }
            finish(tokens, outputs.clone(), &strip, stride);
        }
    }

    /// The sums of sixteen tokens as rows of outputs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn tiles_in_order<'s>(
        &self,
        simd: Avx512,
        sums: impl Fn(usize) -> &'s [Line],
        (tokens, factors): (Range<usize>, &[f32]),
        strip: &mut [f32],
        stride: usize,
    ) {
        for (tile, factors) in factors.chunks_exact(ROWS).enumerate() {
            let mut rows = [simd.splat(0.0); ROWS];
            for (row, line) in rows.iter_mut().zip(sums(tile)) {
                *row = self.sums_of(line);
            }
            if self.direction == Direction::Forward {
                simd.transpose(&mut rows);
            }
            for (i, (token, row)) in tokens.clone().zip(rows).enumerate() {
                let scale = self.x.scales.get(token).copied().unwrap_or(1.0);
                // SAFETY: factors and the strip have a vector for every tile.
                unsafe {
                    let factor = _mm512_mul_ps(_mm512_loadu_ps(factors.as_ptr()), _mm512_set1_ps(scale));
                    simd.store(strip[i * stride + tile * ROWS..].as_mut_ptr(), _mm512_mul_ps(row, factor));
                }
            }
        }
    }

    /// The same of [`Method::PairTables`], where each of four tiles has every fourth column.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn tables_in_order<'s>(&self, simd: Avx512, sums: impl Fn(usize) -> &'s [Line], strip: &mut [f32], stride: usize) {
        for tile in (0..stride / ROWS).step_by(4) {
            let lines = [sums(tile), sums(tile + 1), sums(tile + 2), sums(tile + 3)];
            for (token, strip) in strip.chunks_exact_mut(stride).enumerate() {
                let columns = interleaved(lines.map(|lines| self.sums_of(&lines[token])));
                for (columns, strip) in columns.into_iter().zip(strip[tile * ROWS..].chunks_exact_mut(ROWS)) {
                    // SAFETY: a row of a tile is a vector.
                    unsafe { simd.store(strip.as_mut_ptr(), columns) };
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn sums_of(&self, line: &Line) -> __m512 {
        // SAFETY: a line is a vector.
        unsafe {
            match self.numbers {
                Numbers::Bf16 { .. } => _mm512_loadu_ps(line.0.as_ptr().cast()),
                Numbers::Int8 => _mm512_cvtepi32_ps(_mm512_loadu_si512(line.0.as_ptr().cast())),
            }
        }
    }
}

/// The numbers of four vectors in turn: the first of each, then the second of each.
#[inline]
#[target_feature(enable = "avx512f")]
fn interleaved([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    let pairs = |low, high| (_mm512_castps_pd(low), _mm512_castps_pd(high));
    let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
    let ((ab, cd), (ab_high, cd_high)) = (pairs(ab, cd), pairs(ab_high, cd_high));
    // Quarter i of vector j has the numbers 4 * i + j of all four.
    let columns = [
        _mm512_unpacklo_pd(ab, cd),
        _mm512_unpackhi_pd(ab, cd),
        _mm512_unpacklo_pd(ab_high, cd_high),
        _mm512_unpackhi_pd(ab_high, cd_high),
    ];
    quarters_transposed(columns.map(|v| _mm512_castpd_si512(v))).map(|v| _mm512_castsi512_ps(v))
}
