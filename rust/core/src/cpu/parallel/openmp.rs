//! The OpenMP team of the process, where another library has brought GNU's runtime along, as torch does on Linux.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `GOMP_parallel(function, data, threads, flags)` of GNU's OpenMP: runs `function(data)` on every thread of a team of
/// which the caller is one, and returns when all are done.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, u32, u32);

/// A runtime that was found in the process.
#[derive(Clone, Copy)]
pub(super) struct Team {
    parallel: Parallel,
    /// The process that its threads belong to.
    process: u32,
}

/// The team of this process; none where there is no such runtime, and none in a forked child, whose runtime believes
/// in threads that the child does not have.
pub(super) fn team() -> Option<Team> {
    static TEAM: OnceLock<Option<Team>> = OnceLock::new();
    let team = TEAM.get_or_init(|| find().map(|parallel| Team { parallel, process: std::process::id() }));
    team.filter(|team| team.process == std::process::id())
}

#[cfg(target_os = "linux")]
fn find() -> Option<Parallel> {
    // SAFETY: the name is a C string, and the symbol has had this type since GCC 4.9.
    unsafe {
        let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr());
        (!symbol.is_null()).then(|| std::mem::transmute::<*mut c_void, Parallel>(symbol))
    }
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<Parallel> {
    None
}

/// What the threads of a team share.
struct Shared<'a> {
    work: &'a (dyn Fn() + Sync),
    /// What the first thread that panicked said: it must not unwind through C.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Team {
    /// Calls `work` on up to `threads` threads of the team; a panic of any of them is the caller's.
    pub(super) fn run(self, threads: usize, work: &(dyn Fn() + Sync)) {
        let shared = Shared { work, panic: Mutex::new(None) };
        let threads = u32::try_from(threads).unwrap_or(u32::MAX);
        // SAFETY: `shared` outlives the call, which returns when every thread is done with it.
        unsafe { (self.parallel)(on_thread, (&raw const shared).cast_mut().cast(), threads, 0) };
        if let Some(panic) = shared.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

extern "C" fn on_thread(shared: *mut c_void) {
    // SAFETY: `Team::run` passes its `Shared`, which is Sync and lives until all threads have returned.
    let shared = unsafe { &*shared.cast_const().cast::<Shared<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(shared.work)) {
        shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
}
