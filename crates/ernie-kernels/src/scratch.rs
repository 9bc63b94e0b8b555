//! Working memory that is kept from call to call.
//!
//! A large fresh allocation costs a page fault for each 4 KiB written, which for kernels bound by memory is as dear as the work itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

/// Buffers a thread keeps for later; beyond this number the one unused for longest is freed.
const KEPT: usize = 32;

thread_local! {
    static POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    static TENSORS: RefCell<Tensors> = RefCell::default();
}

/// A borrowed buffer of `f32`, given back to the thread that drops it.
#[derive(Debug)]
pub struct Scratch {
    buffer: Vec<f32>,
    start: usize,
    len: usize,
}

/// Elements in a line of the processor's caches.
const LINE: usize = 16;

impl Scratch {
    /// `len` elements **with arbitrary contents**: the smallest kept buffer that is large enough, though not far too large, or else a new one.
    pub fn take(len: usize) -> Self {
        let fits = len..=2 * len + (1 << 14);
        let kept = POOL.with_borrow_mut(|pool| {
            let best = (0..pool.len()).filter(|&i| fits.contains(&pool[i].len())).min_by_key(|&i| pool[i].len());
            best.map(|i| pool.remove(i))
        });
        // Sizes in steps of an eighth, so that what varies a little from call to call finds the same buffers.
        let step = (len.next_power_of_two() / 16).max(1);
        Scratch { buffer: kept.unwrap_or_else(|| vec![0.0; len.next_multiple_of(step)]), start: 0, len }
    }

    /// [`Scratch::take`], from the beginning of a cache line on.
    pub fn take_lines(len: usize) -> Self {
        let mut scratch = Self::take(len + LINE - 1);
        scratch.start = scratch.buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
        scratch.len = len;
        scratch
    }
}

/// Idle buffers for the values of tensors, which live from the forward to the backward pass: the same sizes come again every step. They
/// take at most twice as much memory as was in use at once.
///
/// Freeing idle buffers for the sake of another size, so that gradients would take the place of activations, was measured: it saved 3% of the
/// memory of a run and cost 25% of its speed in page faults.
#[derive(Default)]
struct Tensors {
    idle: VecDeque<Vec<f32>>,
    idle_elements: usize,
    used_elements: usize,
    most_used: usize,
}

impl Tensors {
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let fits = len..=len + len / 8;
        let best = (0..self.idle.len()).filter(|&i| fits.contains(&self.idle[i].capacity())).min_by_key(|&i| self.idle[i].capacity());
        let found = best.and_then(|i| self.idle.remove(i));
        self.idle_elements -= found.as_ref().map_or(0, Vec::capacity);
        self.used_elements += found.as_ref().map_or(len, Vec::capacity);
        self.most_used = self.most_used.max(self.used_elements);
        found
    }

    fn give(&mut self, buffer: Vec<f32>) {
        self.used_elements = self.used_elements.saturating_sub(buffer.capacity());
        self.idle_elements += buffer.capacity();
        self.idle.push_back(buffer);
        // Twice: gradients and activations are never all in use together, and both must be found again.
        while self.idle_elements > 2 * self.most_used
            && let Some(oldest) = self.idle.pop_front()
        {
            self.idle_elements -= oldest.capacity();
        }
    }
}

/// `len` elements **with arbitrary contents**, from what [`recycle`] was given or else new.
pub fn take_buffer(len: usize) -> Vec<f32> {
    match TENSORS.with_borrow_mut(|tensors| tensors.take(len)) {
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
        // While a thread ends its pool may be gone already; the buffer is then simply freed.
        let _ = TENSORS.try_with(|tensors| tensors.borrow_mut().give(buffer));
    }
}

/// Says that a step of training, or a forward pass of validation, is over: buffers that were taken and not recycled by now are freed or in
/// other hands, and no longer counted as in use.
pub fn end_step() {
    TENSORS.with_borrow_mut(|tensors| tensors.used_elements = 0);
}

/// Frees this thread's idle buffers: before something else than a step needs memory.
pub fn free_idle() {
    POOL.set(Vec::new());
    TENSORS.with_borrow_mut(|tensors| {
        tensors.idle = VecDeque::new();
        tensors.idle_elements = 0;
    });
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
        &self.buffer[self.start..][..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_begin_at_lines() {
        for len in [1, 15, 16, 17, 1000, 70_000] {
            let mut scratch = Scratch::take_lines(len);
            assert!(scratch.len() == len && (scratch.as_ptr() as usize).is_multiple_of(4 * LINE), "{len}");
            scratch.fill(1.0);
            assert_eq!(scratch.iter().sum::<f32>(), len as f32);
        }
    }

    #[test]
    fn buffers_are_used_again_and_idle_ones_are_bounded() {
        std::thread::spawn(|| {
            let address = |buffer: &Vec<f32>| buffer.as_ptr() as usize;
            let buffer = take_buffer(900);
            let first = address(&buffer);
            recycle(buffer);
            assert_eq!(address(&take_buffer(890)), first, "a buffer of about the size is used again");
            // Buffers that come from elsewhere and are given here do not pile up.
            for _ in 0..100 {
                recycle(vec![0.0; 500]);
                end_step();
            }
            assert!(TENSORS.with_borrow(|tensors| tensors.idle_elements) <= 2 * 900);
            // What is freed instead of given back does not raise the bound.
            for _ in 0..100 {
                drop(take_buffer(500));
                end_step();
            }
            assert!(TENSORS.with_borrow(|tensors| tensors.most_used) <= 2 * 900);
            free_idle();
            assert!(TENSORS.with_borrow_mut(|tensors| tensors.take(500).is_none() && tensors.idle_elements == 0));
        })
        .join()
        .expect("the thread with a pool of its own");
    }
}
