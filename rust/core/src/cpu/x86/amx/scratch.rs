//! Memory for tiles, kept from call to call: fresh memory comes page by page, which takes as long as a product of few
//! tokens.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::tiles::Line;

/// Most bytes that are kept.
const KEPT: usize = 64 << 20;

static POOL: Mutex<Vec<Vec<Line>>> = Mutex::new(Vec::new());

/// Lines whose values are those of an earlier use.
pub(super) struct Scratch {
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// `len` lines of any values.
    pub(super) fn take(len: usize) -> Self {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, else the largest.
        let best = (0..pool.len()).min_by_key(|&i| (pool[i].len() < len, pool[i].len().abs_diff(len)));
        let mut lines = best.map(|i| pool.swap_remove(i)).unwrap_or_default();
        drop(pool);
        if lines.len() < len {
            lines = vec![Line::ZERO; len];
        }
        Self { lines, len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = pool.iter().map(|lines| size_of_val(&**lines)).sum();
        if kept + size_of_val(&*self.lines) <= KEPT {
            pool.push(std::mem::take(&mut self.lines));
        }
    }
}

impl Deref for Scratch {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        &self.lines[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [Line] {
        &mut self.lines[..self.len]
    }
}
