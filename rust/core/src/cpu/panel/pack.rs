//! Activations in the order in which tiles of a product take them.

use std::ops::Range;

use super::TERMS;
use super::numbers::{Numbers, Source, Terms, TermsKernel, dispatch_terms};
use crate::cpu::aligned::Aligned;
use crate::cpu::isa::Isa;
use crate::cpu::parallel;
use crate::cpu::simd::Simd;

/// Rows of activations, a few tokens of a tile at a time: a tile reads one piece of memory from its beginning to its end. Rows
/// a power of two apart, as they lie in memory, would meet in the same few lines of the L1 cache.
pub(super) struct Packed {
    /// For each of [`tiles`] `[terms / PACK][tokens]`.
    lanes: Aligned,
    /// Lanes of a token.
    width: usize,
    pub(super) tokens: usize,
}

/// Tokens of the tiles of a product: `most` each, the last ones powers of two.
pub(super) fn tiles(tokens: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = tokens - first;
        let count = if left >= most { most } else { left.checked_ilog2().map(|log| 1 << log)? };
        first += count;
        Some(first - count..first)
    })
}

impl Packed {
    /// The first `terms` numbers of each row.
    pub(super) fn new(isa: Isa, numbers: Numbers, source: Source<'_>, terms: usize, threads: usize) -> Self {
        let (most, pack) = dispatch_terms(isa, numbers, TileShape);
        let (tokens, width) = (source.x.tokens, terms.div_ceil(pack));
        let mut lanes = Aligned::zeros(tokens * width);
        let parts = lanes.chunks_mut((most * width).max(1)).enumerate().collect();
        parallel::for_each(threads, parts, |(index, lanes)| {
            let first = index * most;
            for tile in tiles((tokens - first).min(most), most) {
                let lanes = &mut lanes[tile.start * width..tile.end * width];
                let tokens = first + tile.start..first + tile.end;
                dispatch_terms(isa, numbers, Pack { source, terms, tokens, lanes });
            }
        });
        Self { lanes, width, tokens }
    }

    /// Some lanes of the tokens of a tile, `[lanes][tokens]`.
    pub(super) fn tile(&self, tokens: &Range<usize>, lanes: &Range<usize>) -> &[u32] {
        let first = tokens.start * self.width;
        &self.lanes[first + lanes.start * tokens.len()..first + lanes.end * tokens.len()]
    }
}

/// Tokens of the largest tile, and terms in a lane.
struct TileShape;

impl TermsKernel for TileShape {
    type Output = (usize, usize);

    #[inline(always)]
    fn run<S: Simd, T: Terms<S>>(self, _simd: S, _numbers: T) -> (usize, usize) {
        (S::TILE_TOKENS, T::PACK)
    }
}

/// Packs a tile, `[lanes][tokens]`.
struct Pack<'a> {
    source: Source<'a>,
    terms: usize,
    tokens: Range<usize>,
    lanes: &'a mut [u32],
}

impl TermsKernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd, T: Terms<S>>(self, simd: S, numbers: T) {
        let count = self.tokens.len();
        let mut rows = Aligned::zeros(count * TERMS / T::PACK);
        for terms in parallel::ranges(self.terms, TERMS) {
            let first = terms.start / T::PACK * count;
            let width = terms.len().div_ceil(T::PACK);
            for (token, row) in self.tokens.clone().zip(rows.chunks_exact_mut(TERMS / T::PACK)) {
                numbers.read(simd, self.source, token, &terms, &mut row[..width]);
            }
            transpose(simd, &rows, TERMS / T::PACK, &mut self.lanes[first..first + width * count]);
        }
    }
}

/// Writes columns of `rows`, each `stride` long, as rows of `to`.
#[inline(always)]
fn transpose<S: Simd>(simd: S, rows: &[u32], stride: usize, to: &mut [u32]) {
    let count = rows.len() / stride;
    assert!(count <= S::LANES && to.len() <= rows.len());
    let mut column = 0;
    // Whole vectors are stored, each over what is too much of the one before.
    while (column + S::LANES - 1) * count + S::LANES <= to.len() {
        let mut square = [simd.splat(0.0); 16];
        let square = &mut square[..S::LANES];
        // SAFETY: a row is long enough for its columns, as is `to` for the last vector.
        unsafe {
            for (vector, row) in square.iter_mut().zip(rows.chunks_exact(stride)) {
                *vector = simd.load(row.as_ptr().add(column).cast::<f32>());
            }
            simd.transpose(square);
            for (lane, vector) in square.iter().enumerate() {
                simd.store(to.as_mut_ptr().add((column + lane) * count).cast::<f32>(), *vector);
            }
        }
        column += S::LANES;
    }
    for (column, to) in (column..).zip(to[column * count..].chunks_exact_mut(count)) {
        for (to, row) in to.iter_mut().zip(rows.chunks_exact(stride)) {
            *to = row[column];
        }
    }
}
