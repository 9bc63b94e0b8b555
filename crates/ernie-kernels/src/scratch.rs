//! Working memory that is kept from call to call.
//!
//! A large fresh allocation costs a page fault for each 4 KiB written, which for kernels bound by memory is as dear as the work itself.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers a thread keeps for later; beyond this number the one unused for longest is freed.
const KEPT: usize = 12;

thread_local! {
    static POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    static TENSORS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
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

/// Buffers for the values of tensors, which live from the forward to the backward pass: more of them than temporaries, and of few sizes, which come
/// again every step.
const KEPT_TENSORS: usize = 1024;

/// `len` elements **with arbitrary contents**, from what [`recycle`] was given or else new.
pub fn take_buffer(len: usize) -> Vec<f32> {
    let fits = len..=len + len / 8;
    let kept = TENSORS.with_borrow_mut(|pool| {
        let best = (0..pool.len()).filter(|&i| fits.contains(&pool[i].capacity())).min_by_key(|&i| pool[i].capacity());
        best.map(|i| pool.swap_remove(i))
    });
    match kept {
        Some(mut buffer) => {
            buffer.resize(len, 0.0);
            buffer
        }
        None => vec![0.0; len],
    }
}

/// Gives a buffer that is no longer needed to this thread, for its next [`take_buffer`] of about that size.
pub fn recycle(buffer: Vec<f32>) {
    if buffer.capacity() > 0 {
        let _ = TENSORS.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            pool.push(buffer);
            if pool.len() > KEPT_TENSORS {
                pool.remove(0);
            }
        });
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
