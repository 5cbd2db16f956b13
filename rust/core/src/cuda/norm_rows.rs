//! What the kernels of norms have in common: which of them has room for a row, and their operands' checks.

use super::linear::DeviceActivations;
use super::plan::{Capability, Plan, Share, THREADS, too_old};
use super::weight::{DeviceFloats, number};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// Numbers of a vector, `kVector` of `cuda/include/lowbit/norm_rows.cuh`.
const VECTOR: usize = 8;
/// A kernel that keeps a row in registers.
pub(super) struct Kernel {
    /// Threads that share a row, and vectors that each of them has.
    lanes: usize,
    vectors: usize,
    /// Its entry for float32, float16 and bfloat16.
    entries: [&'static str; 3],
}

impl Kernel {
    pub(super) const fn new(lanes: usize, vectors: usize, entries: [&'static str; 3]) -> Self {
        Self { lanes, vectors, entries }
    }

    fn has_room(&self, cols: usize) -> bool {
        cols <= self.lanes * self.vectors * VECTOR
    }

    fn threads(&self) -> usize {
        if self.lanes > 32 { self.lanes } else { THREADS }
    }
}

/// The kernels of an operation.
pub(super) struct Kernels {
    pub(super) image: &'static str,
    /// The first line that has room for a row serves it.
    pub(super) in_registers: &'static [Kernel],
    /// The entries for rows of any kind, if there are such.
    pub(super) elements: Option<[&'static str; 3]>,
    /// The least compute capability.
    pub(super) oldest: u32,
}

/// The kernels whose names begin with this, for every number of lanes and vectors that there is of them.
macro_rules! in_registers {
    ($prefix:literal) => {
        in_registers!($prefix: 16 x 1, 32 x 1, 32 x 2, 128 x 1, 256 x 1, 256 x 2, 256 x 4, 512 x 4)
    };
    ($prefix:literal: $($lanes:literal x $vectors:literal),*) => {
        &[$(
            Kernel::new($lanes, $vectors, [
                concat!($prefix, "_float32_", $lanes, "x", $vectors),
                concat!($prefix, "_float16_", $lanes, "x", $vectors),
                concat!($prefix, "_bfloat16_", $lanes, "x", $vectors),
            ])
        ),*]
    };
}
pub(super) use in_registers;

impl Kernels {
    fn with_room(&self, cols: usize) -> Option<&Kernel> {
        self.in_registers.iter().find(|kernel| kernel.has_room(cols))
    }

    /// Threads of a block for such rows, where whole vectors of them can be moved.
    pub(super) fn threads(&self, cols: usize) -> usize {
        self.with_room(cols).map_or(THREADS, Kernel::threads)
    }

    /// Whether there is a kernel that keeps such rows in registers, where whole vectors of them can be moved.
    pub(super) fn have_room(&self, cols: usize) -> bool {
        self.with_room(cols).is_some()
    }

    /// The kernel for rows, with as many blocks as they take, or `blocks`, which walk them.
    pub(super) fn plan(
        &self,
        [rows, cols]: [usize; 2],
        dtype: Dtype,
        is_vectorized: bool,
        blocks: Option<usize>,
        capability: Capability,
    ) -> Result<Plan> {
        if capability.compute < self.oldest {
            return Err(too_old(capability));
        }
        let of_dtype = number(dtype) as usize;
        let refused = |what| Error::Unsupported { what, reason: format!("normalizing {rows} rows of {cols}") };
        let (entry, threads, all) = match (self.with_room(cols).filter(|_| is_vectorized), self.elements) {
            (Some(kernel), _) => {
                let at_once = kernel.threads() / kernel.lanes;
                (kernel.entries[of_dtype], kernel.threads(), rows.div_ceil(at_once))
            }
            // They walk what is left over.
            (None, Some(elements)) => (elements[of_dtype], THREADS, rows.min(1 << 20)),
            (None, None) => return Err(refused("a row of this kind")),
        };
        let blocks = blocks.unwrap_or(all);
        if blocks > i32::MAX as usize {
            return Err(refused("a grid of this size"));
        }
        Ok(Plan {
            image: self.image,
            entry,
            grid: [blocks as u32, 1],
            threads: threads as u32,
            shared_bytes: 0,
            is_dependent: false,
            share: Share::default(),
        })
    }

    /// That all of them are built, where any are.
    #[cfg(test)]
    pub(super) fn assert_built(&self) {
        if let Some(image) = lowbit_kernels::image(self.image) {
            assert_eq!(image.oldest, self.oldest);
            for entry in self.entries() {
                assert!(image.entries.contains(&entry), "{entry}");
            }
        }
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> impl Iterator<Item = &'static str> {
        self.in_registers.iter().flat_map(|kernel| kernel.entries).chain(self.elements.into_iter().flatten())
    }
}

/// Whether whole vectors can be moved: rows of them, aligned to 16 bytes. Strides are elements of `size` bytes.
pub(super) fn is_vectorized(cols: usize, addresses: &[u64], strides: &[i64], size: usize) -> bool {
    cols.is_multiple_of(VECTOR)
        && addresses.iter().all(|address| address.is_multiple_of(16))
        && strides.iter().all(|&stride| (stride as usize * size).is_multiple_of(16))
}

/// Refuses rows that are not as many and of the dtype of `x`, or not all in their buffer.
pub(super) fn check_rows(
    argument: &'static str,
    rows: &DeviceActivations,
    x: &DeviceActivations,
    cols: usize,
) -> Result<()> {
    let needed = if rows.tokens == 0 { 0 } else { (rows.tokens - 1) * rows.stride + cols };
    if rows.values.buffer.len < needed {
        let got = format!("{} elements", rows.values.buffer.len);
        return Err(Error::invalid(argument, got, format!("{} rows of {cols}", rows.tokens)));
    }
    if rows.tokens != x.tokens || rows.values.dtype != x.values.dtype {
        let got = format!("{} rows of {}", rows.tokens, rows.values.dtype.name());
        let expected = format!("{} rows of {}", x.tokens, x.values.dtype.name());
        return Err(Error::invalid(argument, got, expected));
    }
    Ok(())
}

/// Refuses a place that has no room for exactly the rows of `x`, in their dtype.
pub(super) fn check_dense(argument: &'static str, to: DeviceFloats, x: &DeviceActivations, cols: usize) -> Result<()> {
    if to.buffer.len == x.tokens * cols && to.dtype == x.values.dtype {
        return Ok(());
    }
    let got = format!("{} elements of {}", to.buffer.len, to.dtype.name());
    Err(Error::invalid(argument, got, format!("{} rows of {cols} in {}", x.tokens, x.values.dtype.name())))
}

/// Refuses a vector that has not a number for each column.
pub(super) fn check_column(argument: &'static str, column: Option<DeviceFloats>, cols: usize) -> Result<()> {
    match column {
        Some(column) if column.buffer.len != cols => {
            let got = format!("{} elements", column.buffer.len);
            Err(Error::invalid(argument, got, format!("{cols} elements")))
        }
        _ => Ok(()),
    }
}
