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

impl Operand {
    /// The tiles of a step, in two rows of tiles.
    fn step(self, step: usize) -> [*const Line; 2] {
        [step * TILE_BYTES, step * TILE_BYTES + self.stride].map(|bytes| self.first.wrapping_byte_add(bytes))
    }
}

/// Tiles of sums: 16 rows of 16 numbers of 32 bits.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) first: *mut Line,
    /// Bytes from a tile to the one that belongs to the next row of the left operand, and of the right one.
    pub(super) strides: (usize, usize),
    /// Whether nothing has been added to them yet, so that what is in memory does not count.
    pub(super) are_new: bool,
}

impl Sums {
    fn at(self, left: usize, right: usize) -> *mut Line {
        self.first.wrapping_byte_add(left * self.strides.0 + right * self.strides.1)
    }
}

/// What is multiplied.
pub(super) trait Numbers {
    /// Adds the products of two tiles of either operand to four sums, in the tiles 0 to 3.
    ///
    /// # Safety
    /// There are tiles at the addresses, and a [`Session`].
    unsafe fn two_by_two(left: [*const Line; 2], right: [*const Line; 2]);
    /// Adds the products of two tiles of the left operand with one of the right to two sums, in the tiles 0 and 1.
    ///
    /// # Safety
    /// As [`Self::two_by_two`].
    unsafe fn two_by_one(left: [*const Line; 2], right: *const Line);
    /// The same with sides changed.
    ///
    /// # Safety
    /// As [`Self::two_by_two`].
    unsafe fn one_by_two(left: *const Line, right: [*const Line; 2]);
}

/// Pairs of bf16, summed in fp32.
pub(super) struct Bf16;
/// Quads of int8, summed in int32.
pub(super) struct Int8;

macro_rules! implement_numbers {
    ($numbers:ty, $dot:literal) => {
        impl Numbers for $numbers {
            #[inline(always)]
            unsafe fn two_by_two(left: [*const Line; 2], right: [*const Line; 2]) {
                // SAFETY: handed on to the caller.
                unsafe {
                    asm!(
                        "tileloadd tmm4, [{l0} + {row}]",
                        "tileloadd tmm6, [{r0} + {row}]",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{r1} + {row}]",
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        "tileloadd tmm5, [{l1} + {row}]",
                        concat!($dot, " tmm2, tmm5, tmm6"),
                        concat!($dot, " tmm3, tmm5, tmm7"),
                        row = in(reg) ROW_BYTES,
                        l0 = in(reg) left[0],
                        l1 = in(reg) left[1],
                        r0 = in(reg) right[0],
                        r1 = in(reg) right[1],
                        options(nostack, preserves_flags, readonly),
                    );
                }
            }

            #[inline(always)]
            unsafe fn two_by_one(left: [*const Line; 2], right: *const Line) {
                // SAFETY: handed on to the caller.
                unsafe {
                    asm!(
                        "tileloadd tmm6, [{r} + {row}]",
                        "tileloadd tmm4, [{l0} + {row}]",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm5, [{l1} + {row}]",
                        concat!($dot, " tmm1, tmm5, tmm6"),
                        row = in(reg) ROW_BYTES,
                        l0 = in(reg) left[0],
                        l1 = in(reg) left[1],
                        r = in(reg) right,
                        options(nostack, preserves_flags, readonly),
                    );
                }
            }

            #[inline(always)]
            unsafe fn one_by_two(left: *const Line, right: [*const Line; 2]) {
                // SAFETY: handed on to the caller.
                unsafe {
                    asm!(
                        "tileloadd tmm4, [{l} + {row}]",
                        "tileloadd tmm6, [{r0} + {row}]",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{r1} + {row}]",
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        row = in(reg) ROW_BYTES,
                        l = in(reg) left,
                        r0 = in(reg) right[0],
                        r1 = in(reg) right[1],
                        options(nostack, preserves_flags, readonly),
                    );
                }
            }
        }
    };
}

implement_numbers!(Bf16, "tdpbf16ps");
implement_numbers!(Int8, "tdpbssd");

/// Where the sums of the tiles 0 and 1 are in memory, or those of 0 to 3.
#[derive(Clone, Copy)]
enum Places {
    Two([*mut Line; 2]),
    Four([*mut Line; 4]),
}

impl Places {
    /// Loads the sums.
    ///
    /// # Safety
    /// There are tiles at the addresses, and a [`Session`].
    #[inline(always)]
    unsafe fn load(self) {
        // SAFETY: handed on to the caller.
        unsafe {
            match self {
                Self::Two([c0, c1]) => asm!(
                    "tileloadd tmm0, [{c0} + {row}]",
                    "tileloadd tmm1, [{c1} + {row}]",
                    row = in(reg) ROW_BYTES, c0 = in(reg) c0, c1 = in(reg) c1,
                    options(nostack, preserves_flags, readonly),
                ),
                Self::Four([c0, c1, c2, c3]) => asm!(
                    "tileloadd tmm0, [{c0} + {row}]",
                    "tileloadd tmm1, [{c1} + {row}]",
                    "tileloadd tmm2, [{c2} + {row}]",
                    "tileloadd tmm3, [{c3} + {row}]",
                    row = in(reg) ROW_BYTES, c0 = in(reg) c0, c1 = in(reg) c1, c2 = in(reg) c2, c3 = in(reg) c3,
                    options(nostack, preserves_flags, readonly),
                ),
            }
        }
    }

    /// Stores the sums.
    ///
    /// # Safety
    /// As [`Self::load`], writable.
    #[inline(always)]
    unsafe fn store(self) {
        // SAFETY: handed on to the caller.
        unsafe {
            match self {
                Self::Two([c0, c1]) => asm!(
                    "tilestored [{c0} + {row}], tmm0",
                    "tilestored [{c1} + {row}], tmm1",
                    row = in(reg) ROW_BYTES, c0 = in(reg) c0, c1 = in(reg) c1,
                    options(nostack, preserves_flags),
                ),
                Self::Four([c0, c1, c2, c3]) => asm!(
                    "tilestored [{c0} + {row}], tmm0",
                    "tilestored [{c1} + {row}], tmm1",
                    "tilestored [{c2} + {row}], tmm2",
                    "tilestored [{c3} + {row}], tmm3",
                    row = in(reg) ROW_BYTES, c0 = in(reg) c0, c1 = in(reg) c1, c2 = in(reg) c2, c3 = in(reg) c3,
                    options(nostack, preserves_flags),
                ),
            }
        }
    }
}

/// Adds to `sums` the products of one or two rows of tiles of either operand, of one of them two. Sums stay in registers.
///
/// # Safety
/// Operands have `steps` tiles in each row of tiles, sums are writable.
#[inline(always)]
pub(super) unsafe fn multiply<N: Numbers>(
    _: &Session,
    rows_of_tiles: (usize, usize),
    (left, right): (Operand, Operand),
    sums: Sums,
    steps: usize,
) {
    let places = match rows_of_tiles {
        (2, 2) => Places::Four([sums.at(0, 0), sums.at(0, 1), sums.at(1, 0), sums.at(1, 1)]),
        (2, 1) => Places::Two([sums.at(0, 0), sums.at(1, 0)]),
        (1, 2) => Places::Two([sums.at(0, 0), sums.at(0, 1)]),
        _ => unreachable!("no kernel for {rows_of_tiles:?}"),
    };
    // SAFETY: handed on to the caller.
    unsafe {
        if sums.are_new {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags)
            );
        } else {
            places.load();
        }
        for step in 0..steps {
            let (left, right) = (left.step(step), right.step(step));
            match rows_of_tiles {
                (2, 2) => N::two_by_two(left, right),
                (2, 1) => N::two_by_one(left, right[0]),
                _ => N::one_by_two(left[0], right),
            }
        }
        places.store();
    }
}
