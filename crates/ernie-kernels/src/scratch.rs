//! Working memory that is kept from call to call.
//!
//! A large fresh allocation costs a page fault for each 4 KiB written, which for kernels bound by memory is as dear as the work itself.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers a thread keeps for later; beyond this number the one unused for longest is freed.
const KEPT: usize = 12;

thread_local! {
    static POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A borrowed buffer of `f32`, given back to the thread that drops it.
#[derive(Debug)]
pub struct Scratch {
    buffer: Vec<f32>,
    len: usize,
}

impl Scratch {
    /// `len` elements **with arbitrary contents**: the smallest kept buffer that is large enough, though not far too large, or else a new one.
    pub fn take(len: usize) -> Self {
        let fits = len..=2 * len + (1 << 14);
        let kept = POOL.with_borrow_mut(|pool| {
            let best = (0..pool.len()).filter(|&i| fits.contains(&pool[i].len())).min_by_key(|&i| pool[i].len());
            best.map(|i| pool.remove(i))
        });
        Scratch { buffer: kept.unwrap_or_else(|| vec![0.0; len]), len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        // While a thread ends its pool may be gone already; the buffer is then simply freed.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            pool.push(buffer);
            if pool.len() > KEPT {
                pool.remove(0);
            }
        });
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}
