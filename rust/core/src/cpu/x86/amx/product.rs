//! The product in tiles: strips of outputs, chunk by chunk of the sum.
//!
//! A strip's sums stay in the cache, a chunk of its weights is decoded once and meets all tokens.

use std::arch::x86_64::{
    __m512, _mm512_cvtepi32_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_ps,
};
use std::ops::Range;

use super::fill::{Filler, Method};
use super::pack::{Form, Packed};
use super::scratch::Scratch;
use super::tiles::{Kind, Line, Operand, ROWS, Session, Sums, TILE_BYTES, multiply};
use crate::cpu::activations::Activations;
use crate::cpu::int8_rows::Codes;
use crate::cpu::linear::Finish;
use crate::cpu::panel::Direction;
use crate::cpu::parallel;
use crate::cpu::scales::read_scales;
use crate::cpu::simd::Simd;
use crate::cpu::x86::avx512::Avx512;
use crate::storage::PackedWeight;

/// Tiles that a chunk of the sum takes: with it four rows of tiles of weights take 32 KiB, two thirds of the L1 cache.
pub(super) const CHUNK_STEPS: usize = 8;
/// Rows of tiles of a strip that are multiplied at once.
const TILES_AT_ONCE: usize = 4;
/// Outputs of a strip where activations take most of the L2 cache: they are read anew for every strip. Its sums with 512
/// tokens take 1 MiB.
const LARGE_STRIP: usize = 512;
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

    fn kind(self) -> Kind {
        match self {
            Self::Bf16 { .. } => Kind::Bf16,
            Self::Int8 => Kind::Int8,
        }
    }

    /// Terms of a sum in a chunk.
    pub(super) fn chunk_terms(self) -> usize {
        match self {
            Self::Bf16 { .. } => CHUNK_STEPS * 32,
            Self::Int8 => CHUNK_STEPS * 64,
        }
    }
}

/// The decoded weights of a chunk: `[parts][tiles][CHUNK_STEPS]` tiles, of which `steps` count.
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
    /// The product of `x` with a weight, in either direction; of int8, `rounded` has its integers. Only where [`super::is_available`] has said so.
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
        let small = TILES_AT_ONCE * ROWS;
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
        let tiles = step / ROWS;
        let (_, terms) = self.direction.outputs_and_terms(self.weight);
        let mut panel = Scratch::take(self.numbers.w_parts() * tiles * CHUNK_STEPS * ROWS);
        let mut sums = Scratch::take(tiles * self.x.token_tiles * ROWS);
        for first in outputs.clone().step_by(step) {
            let outputs = first..(first + step).min(outputs.end);
            let tiles = outputs.len().div_ceil(TILES_AT_ONCE * ROWS) * TILES_AT_ONCE;
            let sums = &mut sums[..tiles * self.x.token_tiles * ROWS];
            sums.fill(Line::ZERO);
            let mut filler = Filler::new(simd, self.weight, (self.method, self.numbers), outputs.clone(), tiles);
            for (chunk, terms) in parallel::ranges(terms, self.numbers.chunk_terms()).into_iter().enumerate() {
                let steps = filler.fill(simd, terms, &mut panel);
                for first in (0..tiles).step_by(TILES_AT_ONCE) {
                    self.multiply(&session, &Panel { lines: &panel, tiles, chunk, steps }, first, sums);
                }
            }
            self.hand_over(simd, outputs, sums, finish);
        }
    }

    /// Adds the products of four rows of tiles of the panel, from `first` on, with all tokens: two times two, so that
    /// every tile is used twice, with weights that stay in the L1 cache; and at last four times one.
    fn multiply(&self, session: &Session, panel: &Panel<'_>, first: usize, sums: &mut [Line]) {
        let tokens = self.x.token_tiles;
        for tile in [first, first + 2] {
            for token_tile in (0..tokens - tokens % 2).step_by(2) {
                self.multiply_block(session, panel, (tile, token_tile), (2, 2), sums);
            }
        }
        if tokens % 2 == 1 {
            self.multiply_block(session, panel, (first, tokens - 1), (4, 1), sums);
        }
    }

    /// Adds the products of some rows of tiles of the panel and some tiles of tokens.
    #[inline]
    fn multiply_block(
        &self,
        session: &Session,
        panel: &Panel<'_>,
        (tile, token_tile): (usize, usize),
        (tiles, tokens): (usize, usize),
        sums: &mut [Line],
    ) {
        let (of_weights, of_tokens) = (self.x.token_tiles * TILE_BYTES, TILE_BYTES);
        let sums = sums[(tile * self.x.token_tiles + token_tile) * ROWS..].as_mut_ptr();
        for (w_part, x_part) in self.numbers.pairs() {
            let start = (w_part * panel.tiles + tile) * CHUNK_STEPS * ROWS;
            let w = Operand { first: panel.lines[start..].as_ptr(), stride: CHUNK_STEPS * TILE_BYTES };
            let x = self.x.operand(panel.chunk, x_part, token_tile);
            let (operands, counts, strides) = match self.direction {
                Direction::Forward => ((w, x), (tiles, tokens), (of_weights, of_tokens)),
                Direction::Gradient => ((x, w), (tokens, tiles), (of_tokens, of_weights)),
            };
            let sums = Sums { first: sums, strides };
            // SAFETY: panel and activations have CHUNK_STEPS tiles for each row of tiles, sums one for each pair, and
            // the callers leave room for as many as are multiplied.
            unsafe { multiply(session, self.numbers.kind(), counts, operands, sums, panel.steps) };
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
            for (tile, factors) in factors.chunks_exact(ROWS).enumerate() {
                let lines = &sums[(tile * token_tiles + token_tile) * ROWS..][..ROWS];
                let mut rows = [simd.splat(0.0); ROWS];
                for (row, line) in rows.iter_mut().zip(lines) {
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
            finish(tokens, outputs.clone(), &strip, stride);
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
