//! Work for a given number of threads, of which the caller is one.
//!
//! Where torch is in the process, its own OpenMP team does the work: the team's threads are awake between torch's
//! calls and ours, while those of a second pool would wait for a core until the first have stopped spinning. Elsewhere
//! rayon's threads do it.

mod openmp;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Calls `work` for every item, on `threads` threads of which the caller is one. Items are taken in order as threads
/// come free, so a late thread delays nobody.
pub(crate) fn for_each<T: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) + Sync) {
    let threads = threads.min(items.len());
    if threads <= 1 {
        items.into_iter().for_each(work);
        return;
    }
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let drain = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    if let Some(team) = openmp::team() {
        team.run(threads, &drain);
        return;
    }
    pool(threads - 1).in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| drain());
        }
        drain();
    });
}

/// The ranges of `step` that cover `0..len`, the last one shorter.
pub(crate) fn ranges(len: usize, step: usize) -> Vec<std::ops::Range<usize>> {
    (0..len).step_by(step).map(|start| start..(start + step).min(len)).collect()
}

/// The pool of `helpers` threads. Pools are kept: a thread starts once, not once a call. A forked child does not
/// inherit threads, so it makes its own.
fn pool(helpers: usize) -> Arc<ThreadPool> {
    /// By process and number of threads.
    type Pools = HashMap<(u32, usize), Arc<ThreadPool>>;
    static POOLS: OnceLock<Mutex<Pools>> = OnceLock::new();
    let key = (std::process::id(), helpers);
    let mut pools = POOLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let pool = pools.entry(key).or_insert_with(|| {
        let builder = ThreadPoolBuilder::new().num_threads(helpers).thread_name(|i| format!("lowbit-{i}"));
        Arc::new(builder.build().expect("the system starts a handful of threads"))
    });
    Arc::clone(pool)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_item_is_worked_on_once() {
        for threads in [0, 1, 2, 3, 8] {
            let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            for_each(threads, (0..100).collect(), |i: usize| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn ranges_cover_the_length() {
        assert_eq!(ranges(7, 3), [0..3, 3..6, 6..7]);
        assert!(ranges(0, 3).is_empty());
    }
}
