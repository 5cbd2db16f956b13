//! Which kernels of `cuda/int8_rows.cu` and `cuda/linear_int8.cu` serve a call, and their grids.

use super::plan::{Capability, Plan, Share};
use super::weight::number;
use crate::dtype::Dtype;
use crate::format::Layout;

/// Bytes of a row of what the product copies at once, which shared memory swizzles by as much: `kStageRow`.
pub(super) const BOX_BYTES: u32 = 128;
/// Tokens of a tile: `kTileTokens`.
pub(super) const TILE_TOKENS: usize = 128;
/// Threads of a block of the product: `kProductThreads`.
const PRODUCT_THREADS: u32 = 384;
/// Most threads of a block that rounds a row, and units that each keeps: `kMaxThreads`, `kKept`.
const MAX_ROW_THREADS: usize = 512;
const KEPT_UNITS: usize = 8;
const GATHER_THREADS: usize = 256;

/// Entries for float32, float16 and bfloat16.
type Entries = [&'static str; 3];

const ROWS: Entries = ["int8_rows_float32", "int8_rows_float16", "int8_rows_bfloat16"];
const ELEMENTS: Entries = ["int8_elements_float32", "int8_elements_float16", "int8_elements_bfloat16"];
const GATHER: Entries = ["int8_gather_float32", "int8_gather_float16", "int8_gather_bfloat16"];

/// A kernel that multiplies.
struct Product {
    entries: Entries,
    /// Outputs of a tile.
    columns: usize,
    shared_bytes: u32,
    /// Microseconds that a tile takes for 128 columns.
    step_us: f32,
}

/// `Product::kSharedBytes`: the ring, what is beside it, scales and biases, barriers, and room to align.
const fn shared_bytes(columns: u32) -> u32 {
    let stage = (TILE_TOKENS as u32 + columns) * BOX_BYTES;
    let stages = if 196_608 / stage < 8 { 196_608 / stage } else { 8 };
    stages * stage + stage / 2 + 8 * columns + 256 + 1024
}

macro_rules! product {
    ($columns:literal, $step_us:literal) => {
        Product {
            entries: [
                concat!("linear_int8_float32_", $columns),
                concat!("linear_int8_float16_", $columns),
                concat!("linear_int8_bfloat16_", $columns),
            ],
            columns: $columns,
            shared_bytes: shared_bytes($columns),
            step_us: $step_us,
        }
    };
}

/// Times are those of an H200, as `benches/cuda/linear_int8.cu` measures them.
const PRODUCTS: &[Product] = &[product!(256, 0.71), product!(128, 0.42), product!(64, 0.24)];
/// Microseconds that a tile takes beside its steps, and that a call takes beside its tiles and rows: three launches and
/// what one waits for the other.
const TILE_US: f32 = 1.5;
const CALL_US: f32 = 9.5;
/// Bytes that rounding moves in a microsecond, and what a product of floats reaches: bytes of the weight and products.
const ROUNDED_BYTES: f32 = 2.5e6;
const FLOAT_BYTES: f32 = 4.3e6;
const FLOAT_PRODUCTS: f32 = 360e6;
/// Microseconds in which a weight is unpacked for a product of floats.
const UNPACKED_US: f32 = 1.2e-6;
/// The fewest tokens that are worth rounding: up to 64, `linear_batch` takes less time with the weight as it is.
const LEAST_TOKENS: usize = 128;

impl Product {
    fn tiles(&self, layout: &Layout, tokens: usize) -> usize {
        tokens.div_ceil(TILE_TOKENS) * layout.rows.div_ceil(self.columns)
    }

    /// Microseconds of a product.
    fn time(&self, layout: &Layout, tokens: usize, capability: Capability) -> f32 {
        let steps = layout.cols.div_ceil(BOX_BYTES as usize) as f32;
        let waves = self.tiles(layout, tokens).div_ceil(capability.multiprocessors as usize) as f32;
        waves * (steps * self.step_us + TILE_US)
    }

    /// The kernel whose tiles fill the multiprocessors in the least time, and that.
    fn fastest(layout: &Layout, tokens: usize, capability: Capability) -> (&'static Self, f32) {
        let timed = PRODUCTS.iter().map(|product| (product, product.time(layout, tokens, capability)));
        timed.min_by(|a, b| a.1.total_cmp(&b.1)).expect("there are some")
    }
}

/// From how many tokens on rounding activations pays beside unpacking the weight for a product of 16-bit floats, by powers
/// of two.
pub(super) fn pays_from(layout: &Layout, capability: Capability) -> Option<usize> {
    let (rows, cols) = (layout.rows as f32, layout.cols as f32);
    let pays = |&tokens: &usize| {
        let count = tokens as f32;
        let rounded = CALL_US + 3.0 * count * cols / ROUNDED_BYTES + Product::fastest(layout, tokens, capability).1;
        let floats = (2.0 * rows * cols / FLOAT_BYTES).max(count * rows * cols / FLOAT_PRODUCTS);
        rounded < floats + UNPACKED_US * rows * cols
    };
    (0..8).map(|doubled| LEAST_TOKENS << doubled).find(pays)
}

/// Names of all kernels.
#[cfg(test)]
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    [ROWS, ELEMENTS, GATHER].into_iter().chain(PRODUCTS.iter().map(|product| product.entries)).flatten()
}

fn simple(image: &'static str, entries: Entries, dtype: Dtype, blocks: usize, threads: usize) -> Plan {
    Plan {
        image,
        entry: entries[number(dtype) as usize],
        grid: [blocks as u32, 1],
        threads: threads as u32,
        shared_bytes: 0,
        is_dependent: false,
        share: Share::default(),
    }
}

/// A block for each row, with as many threads as keep it in registers.
pub(super) fn rounding(dtype: Dtype, (tokens, cols): (usize, usize), is_vectorized: bool) -> Plan {
    let (entries, of_unit) = if is_vectorized { (ROWS, 16 / dtype.size()) } else { (ELEMENTS, 1) };
    let threads = (cols / of_unit).div_ceil(KEPT_UNITS).next_multiple_of(32).clamp(64, MAX_ROW_THREADS);
    simple("int8_rows", entries, dtype, tokens, threads)
}

/// A warp for each row of activations and of the weight, as far as there are.
pub(super) fn gather(dtype: Dtype, rows: usize, capability: Capability) -> Plan {
    let blocks = rows.div_ceil(GATHER_THREADS / 32).min(8 * capability.multiprocessors as usize);
    let plan = simple("int8_rows", GATHER, dtype, blocks, GATHER_THREADS);
    Plan { is_dependent: capability.compute >= 90, ..plan }
}

/// The product of so many tokens with a weight, by the kernel whose tiles fill the multiprocessors in the least time;
/// and how many rows of the weight it copies at once.
pub(super) fn product(dtype: Dtype, layout: &Layout, tokens: usize, capability: Capability) -> (Plan, usize) {
    let (product, _) = Product::fastest(layout, tokens, capability);
    let blocks = product.tiles(layout, tokens).min(capability.multiprocessors as usize);
    let plan = simple("linear_int8", product.entries, dtype, blocks, PRODUCT_THREADS as usize);
    (Plan { shared_bytes: product.shared_bytes, is_dependent: true, ..plan }, product.columns)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, HOPPER};
    use super::*;
    use crate::format::{BlockSize, Format};

    fn layout(rows: usize, cols: usize) -> Layout {
        samples::layout(Format::Int8, BlockSize::Row, (rows, cols))
    }

    #[test]
    fn large_products_are_worth_rounding() {
        for (rows, cols, from) in
            [(4096, 4096, Some(128)), (14336, 4096, Some(128)), (8192, 28672, Some(128)), (64, 256, None)]
        {
            assert_eq!(pays_from(&layout(rows, cols), HOPPER), from, "{rows} x {cols}");
        }
    }

    #[test]
    fn products_are_built_and_fill_the_device() {
        for (rows, tokens, columns, blocks) in [(4096, 17, 64, 64), (4096, 512, 128, 128), (14336, 4096, 256, 132)] {
            let (plan, _) = product(Dtype::Bfloat16, &layout(rows, 4096), tokens, HOPPER);
            assert_eq!(plan.entry, format!("linear_int8_bfloat16_{columns}"), "{rows} {tokens}");
            assert_eq!(plan.grid, [blocks, 1]);
        }
        for product in PRODUCTS {
            assert!(product.shared_bytes <= HOPPER.shared_bytes, "{}", product.columns);
        }
        for image in ["int8_rows", "linear_int8"].into_iter().filter_map(lowbit_kernels::image) {
            assert!(image.entries.iter().all(|entry| entries().any(|name| name == *entry)));
        }
    }

    #[test]
    fn rows_are_kept_in_registers() {
        let threads = |dtype, cols, is_vectorized| rounding(dtype, (7, cols), is_vectorized).threads;
        assert_eq!(threads(Dtype::Bfloat16, 4096, true), 64);
        assert_eq!(threads(Dtype::Bfloat16, 14336, true), 224);
        assert_eq!(threads(Dtype::Float32, 28672, true), 512);
        assert_eq!(threads(Dtype::Float16, 75, false), 64);
        assert_eq!(rounding(Dtype::Float16, (7, 75), false).grid, [7, 1]);
        assert_eq!(gather(Dtype::Float16, 17, HOPPER).grid, [3, 1]);
    }
}
