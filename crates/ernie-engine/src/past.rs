//! Where a session keeps the keys and values of its layers with a window: blocks that no token to come sees are written again.
//!
//! A text may be taken back. To where the last step began that is always possible, for no step gives up what its own first token sees; and so it is to the
//! end of the last prompt, whose window is kept while the text goes on, for the next prompt may differ from the answer.
use std::ops::Range;

use ernie_kernels::paged::BLOCK;

/// In place of a block that is gone.
const GONE: u32 = u32::MAX;

/// The blocks of one text's last positions, and of those at which it may be gone on from.
#[derive(Debug)]
pub(crate) struct WindowBlocks {
    /// How many positions back, its own included, a position sees.
    window: usize,
    /// By number of the block in the text: where it lies, or [`GONE`].
    places: Vec<u32>,
    /// Blocks below are gone, except those that are seen from `kept`.
    first: usize,
    /// A length that can be gone back to at any time.
    kept: usize,
    free: Vec<u32>,
    count: usize,
}

impl WindowBlocks {
    /// For a text of at most `max_len` positions, computed in steps of at most `step`.
    pub fn new(window: usize, max_len: usize, step: usize) -> Self {
        let blocks = max_len.div_ceil(BLOCK);
        // What a step sees and writes, and what is kept to go back; a window that does not begin with a block takes one more.
        let seen = |tokens: usize| window.saturating_add(tokens).div_ceil(BLOCK).saturating_add(1);
        let count = blocks.min(seen(step).saturating_add(seen(0)));
        WindowBlocks { window, places: Vec::with_capacity(blocks), first: 0, kept: 0, free: (0..count as u32).rev().collect(), count }
    }

    /// Blocks in all.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Blocks that hold something.
    pub fn in_use(&self) -> usize {
        self.count - self.free.len()
    }

    /// Blocks for `tokens` positions from `start`, where the text ends, and for what they see: the number of the first in the text, and where they lie.
    /// Blocks that none of them sees are given up.
    pub fn step(&mut self, start: usize, tokens: usize) -> (usize, &[u32]) {
        let first = self.seen_from(start).start;
        self.give_up(self.first..first);
        self.first = self.first.max(first);
        let end = (start + tokens).div_ceil(BLOCK);
        while self.places.len() < end {
            let place = self.free.pop().expect("there are blocks for what a step sees and writes");
            self.places.push(place);
        }
        (first, &self.places[first..end])
    }

    /// The text is cut to its first `len` positions, or fewer where the next position would see what is gone: returns how many are left.
    pub fn truncate(&mut self, mut len: usize) -> usize {
        while let Some(gone) = self.seen_from(len).rev().find(|&index| self.places[index] == GONE) {
            len = gone * BLOCK;
        }
        let blocks = len.div_ceil(BLOCK);
        self.free.extend(self.places.drain(blocks.min(self.places.len())..).filter(|&place| place != GONE));
        self.first = self.first.min(self.seen_from(len).start);
        self.kept = self.kept.min(len);
        len
    }

    /// Keeps from now on what is seen from the length `len`, which the text has not passed, and no longer what was kept for another length.
    pub fn keep(&mut self, len: usize) {
        let before = self.seen_from(self.kept);
        self.kept = len;
        self.give_up(before.start..before.end.min(self.first));
    }

    /// The blocks of the first `len` positions that the position after them sees.
    fn seen_from(&self, len: usize) -> Range<usize> {
        (len + 1).saturating_sub(self.window) / BLOCK..len.div_ceil(BLOCK)
    }

    fn give_up(&mut self, blocks: Range<usize>) {
        let kept = self.seen_from(self.kept);
        for index in blocks.filter(|index| !kept.contains(index)) {
            let place = std::mem::replace(&mut self.places[index], GONE);
            if place != GONE {
                self.free.push(place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: usize = 100;
    const MAX_LEN: usize = 2000;

    /// What stands where: the position and the writing that put it there.
    struct Store {
        blocks: WindowBlocks,
        written: Vec<[(usize, u32); BLOCK]>,
        text: Vec<u32>,
    }

    impl Store {
        fn new(window: usize) -> Self {
            let blocks = WindowBlocks::new(window, MAX_LEN, STEP);
            Store { written: vec![[(usize::MAX, 0); BLOCK]; blocks.count()], blocks, text: Vec::new() }
        }

        /// Writes a step and reads all that its positions see.
        fn step(&mut self, window: usize, tokens: usize, mark: u32) {
            let (start, end) = (self.text.len(), self.text.len() + tokens);
            self.text.resize(end, mark);
            let (first, places) = self.blocks.step(start, tokens);
            let place = |position: usize| places[position / BLOCK - first] as usize;
            for position in start..end {
                self.written[place(position)][position % BLOCK] = (position, mark);
            }
            for position in (start + 1).saturating_sub(window)..end {
                let expected = (position, self.text[position]);
                assert_eq!(self.written[place(position)][position % BLOCK], expected, "window {window}, step at {start}");
            }
        }

        fn truncate(&mut self, len: usize) -> usize {
            let left = self.blocks.truncate(len);
            self.text.truncate(left);
            left
        }
    }

    fn random(state: &mut u64, below: usize) -> usize {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*state >> 33) as usize) % below
    }

    #[test]
    fn what_a_position_sees_is_there_wherever_the_text_is_taken_back_to() {
        for window in [1, 5, 31, 32, 33, 64, 100, 500, usize::MAX] {
            let (mut store, mut state) = (Store::new(window), window as u64);
            // Where the last step began, and what was kept.
            let (mut last, mut kept) = (0, 0);
            for mark in 0..3000 {
                let len = store.text.len();
                let back = match random(&mut state, 10) {
                    0 => Some(random(&mut state, len + 1)),
                    1 => Some(last),
                    2 => Some(kept.min(len)),
                    _ => None,
                };
                if let Some(asked) = back {
                    let left = store.truncate(asked);
                    assert!(left == asked || left < asked && asked < last, "window {window}: {left} left of {asked}, step at {last}");
                    assert!(asked < kept || left >= kept, "window {window}: {left} left of {asked}, {kept} kept");
                    assert!(window < usize::MAX || left == asked, "{left} left of {asked}");
                    (last, kept) = (last.min(left), kept.min(left));
                } else if random(&mut state, 8) == 0 {
                    kept = len + random(&mut state, 2);
                    store.blocks.keep(kept);
                } else {
                    let tokens = if random(&mut state, 2) == 0 { 1 } else { 1 + random(&mut state, STEP) };
                    if len + tokens <= MAX_LEN {
                        store.step(window, tokens, mark);
                        last = len;
                    } else {
                        (last, kept) = (store.truncate(0), 0);
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_are_as_many_as_a_step_and_the_way_back_need() {
        let mut blocks = WindowBlocks::new(40, 1 << 20, 256);
        assert_eq!(blocks.count(), 10 + 1 + 2 + 1);
        assert_eq!(WindowBlocks::new(40, 33, 256).count(), 2);
        assert_eq!(WindowBlocks::new(usize::MAX, 3200, 256).count(), 100);
        blocks.keep(64);
        blocks.step(0, 64);
        for start in 64..5000 {
            blocks.step(start, 1);
            assert!(blocks.in_use() <= 2 + 3, "{} blocks at {start}", blocks.in_use());
        }
        assert_eq!((blocks.truncate(4000), blocks.in_use()), (64, 2));
        assert_eq!((blocks.truncate(0), blocks.in_use()), (0, 0));
    }
}
