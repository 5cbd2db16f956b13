//! The instructions, and the state of a thread that they need.
//!
//! Stable Rust has no intrinsics for them, so they are assembly. The compiler never uses tile registers itself.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Bytes of a tile: 16 rows of 64.
pub(super) const TILE_BYTES: usize = 1024;
/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes of a row.
pub(super) const ROW_BYTES: usize = 64;

/// A row of a tile, at the alignment at which loads are fastest.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; ROW_BYTES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; ROW_BYTES]);
}

/// Whether the processor has tiles with bf16 and int8 beside the AVX-512 that fills them, and the system lets this
/// process use them: it saves their 8 KiB for those threads only that asked.
pub(in crate::cpu) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    // Leaf 7, EDX: AMX-BF16, AMX-TILE and AMX-INT8.
    const TILES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    #[allow(unused_unsafe)] // safe since Rust 1.94
    // SAFETY: every x86-64 processor has CPUID.
    let edx = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
    edx & TILES == TILES && is_x86_feature_detected!("avx512bf16")
}

#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and answers with one.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What LDTILECFG reads: the palette, and bytes a row and rows of every tile.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    const EMPTY: Self = Self { palette: 0, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };

    /// Eight whole tiles.
    fn whole() -> Self {
        let mut config = Self { palette: 1, ..Self::EMPTY };
        config.bytes[..8].fill(ROW_BYTES as u16);
        config.rows[..8].fill(ROWS as u8);
        config
    }
}

/// A thread whose tiles are set up. What they were set up as before comes back at the end: other libraries in the process
/// keep theirs from call to call.
pub(super) struct Session {
    before: Config,
    /// Tiles belong to a thread.
    not_send: PhantomData<*const ()>,
}

impl Session {
    /// Sets up this thread's tiles.
    ///
    /// # Safety
    /// [`is_available`] has said so.
    pub(super) unsafe fn start() -> Self {
        let mut before = Config::EMPTY;
        let config = Config::whole();
        // SAFETY: the instructions exist, and read and write 64 bytes.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack, preserves_flags));
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags));
        }
        Self { before, not_send: PhantomData }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: what was stored is loaded again; an unused state is palette 0, which releases the tiles.
        unsafe {
            if self.before.palette == 0 {
                asm!("tilerelease", options(nostack, nomem, preserves_flags));
            } else {
                asm!("ldtilecfg [{}]", in(reg) &raw const self.before, options(nostack, preserves_flags));
            }
        }
    }
}

/// A row of tiles in memory: the first one, and the bytes to the tile below it.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    /// `steps` tiles one after another.
    pub(super) first: *const Line,
    /// Bytes from the first tile of one row of tiles to that of the next.
    pub(super) stride: usize,
}

/// Tiles of sums: 16 rows of 16 numbers of 32 bits.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) first: *mut Line,
    /// Bytes from a tile to the one that belongs to the next row of the left operand, and of the right one.
    pub(super) strides: (usize, usize),
}

/// What tiles hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Pairs of bf16, summed in fp32.
    Bf16,
    /// Quads of int8, summed in int32.
    Int8,
}

/// Defines a function that adds the products of `left` rows of tiles with `right` rows of tiles over `steps` tiles:
/// sum tiles stay in registers, tiles are loaded once a step.
macro_rules! multiply {
    ($(#[$doc:meta])* $name:ident, $dot:literal, $left:tt x $right:tt) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// Operands have `steps` tiles in each row of tiles, sums are writable.
        unsafe fn $name(_: &Session, left: Operand, right: Operand, sums: Sums, steps: usize) {
            let sum = |i: usize, j: usize| {
                sums.first.wrapping_byte_add(i * sums.strides.0 + j * sums.strides.1)
            };
            // SAFETY: handed on to the caller; the session vouches for the instructions.
            unsafe { multiply!(@asm $dot, $left x $right, left, right, sum, steps) }
        }
    };
    (@asm $dot:literal, 2 x 2, $l:ident, $r:ident, $sum:ident, $steps:ident) => {
        asm!(
            "tileloadd tmm0, [{c00} + {row}]",
            "tileloadd tmm1, [{c01} + {row}]",
            "tileloadd tmm2, [{c10} + {row}]",
            "tileloadd tmm3, [{c11} + {row}]",
            "2:",
            "tileloadd tmm4, [{l0} + {row}]",
            "tileloadd tmm6, [{r0} + {row}]",
            concat!($dot, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{r1} + {row}]",
            concat!($dot, " tmm1, tmm4, tmm7"),
            "tileloadd tmm5, [{l1} + {row}]",
            concat!($dot, " tmm2, tmm5, tmm6"),
            concat!($dot, " tmm3, tmm5, tmm7"),
            "add {l0}, 1024",
            "add {l1}, 1024",
            "add {r0}, 1024",
            "add {r1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c00} + {row}], tmm0",
            "tilestored [{c01} + {row}], tmm1",
            "tilestored [{c10} + {row}], tmm2",
            "tilestored [{c11} + {row}], tmm3",
            row = in(reg) ROW_BYTES,
            steps = inout(reg) $steps => _,
            l0 = inout(reg) $l.first => _,
            l1 = inout(reg) $l.first.wrapping_byte_add($l.stride) => _,
            r0 = inout(reg) $r.first => _,
            r1 = inout(reg) $r.first.wrapping_byte_add($r.stride) => _,
            c00 = in(reg) $sum(0, 0),
            c01 = in(reg) $sum(0, 1),
            c10 = in(reg) $sum(1, 0),
            c11 = in(reg) $sum(1, 1),
            options(nostack),
        )
    };
    (@asm $dot:literal, 4 x 1, $l:ident, $r:ident, $sum:ident, $steps:ident) => {
        multiply!(@four $dot, "tmm6, tmm4", "tmm7, tmm4", $l, $r, $sum(0, 0), $sum(1, 0), $sum(2, 0), $sum(3, 0), $steps)
    };
    (@asm $dot:literal, 1 x 4, $l:ident, $r:ident, $sum:ident, $steps:ident) => {
        multiply!(@four $dot, "tmm4, tmm6", "tmm4, tmm7", $r, $l, $sum(0, 0), $sum(0, 1), $sum(0, 2), $sum(0, 3), $steps)
    };
    (@four $dot:literal, $even:literal, $odd:literal, $many:ident, $one:ident, $c0:expr, $c1:expr, $c2:expr, $c3:expr, $steps:ident) => {
        asm!(
            "tileloadd tmm0, [{c0} + {row}]",
            "tileloadd tmm1, [{c1} + {row}]",
            "tileloadd tmm2, [{c2} + {row}]",
            "tileloadd tmm3, [{c3} + {row}]",
            "2:",
            "tileloadd tmm4, [{one} + {row}]",
            "tileloadd tmm6, [{m0} + {row}]",
            concat!($dot, " tmm0, ", $even),
            "tileloadd tmm7, [{m1} + {row}]",
            concat!($dot, " tmm1, ", $odd),
            "tileloadd tmm6, [{m2} + {row}]",
            concat!($dot, " tmm2, ", $even),
            "tileloadd tmm7, [{m3} + {row}]",
            concat!($dot, " tmm3, ", $odd),
            "add {one}, 1024",
            "add {m0}, 1024",
            "add {m1}, 1024",
            "add {m2}, 1024",
            "add {m3}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c0} + {row}], tmm0",
            "tilestored [{c1} + {row}], tmm1",
            "tilestored [{c2} + {row}], tmm2",
            "tilestored [{c3} + {row}], tmm3",
            row = in(reg) ROW_BYTES,
            steps = inout(reg) $steps => _,
            one = inout(reg) $one.first => _,
            m0 = inout(reg) $many.first => _,
            m1 = inout(reg) $many.first.wrapping_byte_add($many.stride) => _,
            m2 = inout(reg) $many.first.wrapping_byte_add(2 * $many.stride) => _,
            m3 = inout(reg) $many.first.wrapping_byte_add(3 * $many.stride) => _,
            c0 = in(reg) $c0,
            c1 = in(reg) $c1,
            c2 = in(reg) $c2,
            c3 = in(reg) $c3,
            options(nostack),
        )
    };
}

multiply!(bf16_2x2, "tdpbf16ps", 2 x 2);
multiply!(bf16_4x1, "tdpbf16ps", 4 x 1);
multiply!(bf16_1x4, "tdpbf16ps", 1 x 4);
multiply!(int8_2x2, "tdpbssd", 2 x 2);
multiply!(int8_4x1, "tdpbssd", 4 x 1);

/// Adds to `sums` the products of four tiles: 2 rows of tiles of either operand, or 4 of one and 1 of the other.
///
/// # Safety
/// Operands have `steps` tiles, at least one, in each row of tiles; sums are writable.
pub(super) unsafe fn multiply(
    session: &Session,
    kind: Kind,
    rows_of_tiles: (usize, usize),
    (left, right): (Operand, Operand),
    sums: Sums,
    steps: usize,
) {
    debug_assert!(steps > 0);
    // SAFETY: handed on to the caller.
    unsafe {
        match (kind, rows_of_tiles) {
            (Kind::Bf16, (2, 2)) => bf16_2x2(session, left, right, sums, steps),
            (Kind::Bf16, (4, 1)) => bf16_4x1(session, left, right, sums, steps),
            (Kind::Bf16, (1, 4)) => bf16_1x4(session, left, right, sums, steps),
            (Kind::Int8, (2, 2)) => int8_2x2(session, left, right, sums, steps),
            (Kind::Int8, (4, 1)) => int8_4x1(session, left, right, sums, steps),
            _ => unreachable!("no kernel for {kind:?} {rows_of_tiles:?}"),
        }
    }
}
