//! Blocks of the layers that see a window only: a sequence gives them back as it goes on.
//!
//! A block here goes with the block of the other layers that holds the same positions of the same text, its *partner*, and is found by it: the text's
//! beginning need not be here any more. A sequence that has a block has its partner too, so a partner that nobody has leaves a block that nobody has.
use std::ops::Range;

use super::unused::{BlockId, NONE, Unused};

/// The pool of these blocks, and how far a position sees.
#[derive(Debug)]
pub struct WindowPool {
    /// How many positions back, its own included, a position sees.
    window: usize,
    block_size: usize,
    users: Vec<u32>,
    /// Blocks that hold nothing that can be found, the lowest number last.
    free: Vec<BlockId>,
    /// By partner: the block, or [`NONE`].
    by_partner: Vec<BlockId>,
    partner: Vec<BlockId>,
    /// Findable blocks without users.
    unused: Unused,
}

/// A sequence's blocks here: those of its last positions.
#[derive(Debug, Default)]
pub struct WindowTable {
    /// Blocks that came before and are gone.
    pub gone: usize,
    /// The blocks after them.
    pub blocks: Vec<BlockId>,
}

impl WindowTable {
    /// Blocks that the sequence has had so far.
    pub fn end(&self) -> usize {
        self.gone + self.blocks.len()
    }
}

impl WindowPool {
    /// `count` blocks, all free, beside `partners` blocks of the other layers.
    pub fn new(window: usize, count: usize, partners: usize, block_size: usize) -> Self {
        WindowPool {
            window,
            block_size,
            users: vec![0; count],
            free: (0..count as BlockId).rev().collect(),
            by_partner: vec![NONE; partners],
            partner: vec![NONE; count],
            unused: Unused::new(count),
        }
    }

    /// Blocks in all.
    pub fn count(&self) -> usize {
        self.users.len()
    }

    /// Blocks that hold nothing.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that nobody has but that can be found again.
    pub fn unused(&self) -> usize {
        self.unused.len()
    }

    /// Blocks that [`WindowPool::take`] can give.
    pub fn available(&self) -> usize {
        self.free.len() + self.unused.len()
    }

    /// The first block that a token at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window) / self.block_size
    }

    /// Most blocks that a sequence needs at once while `tokens` tokens are computed in a step.
    pub fn most_for(&self, tokens: usize) -> usize {
        (self.window - 1 + tokens).div_ceil(self.block_size) + 1
    }

    /// A block for one user, to be written; the longest unused one is given up if none is free.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let block = self.unused.pop_oldest()?;
                self.part(block);
                block
            }
        };
        self.users[block as usize] = 1;
        Some(block)
    }

    /// How many of the blocks `chain` of a text's beginning can be gone on from: as many as have what the next position sees here.
    pub fn usable(&self, chain: &[BlockId]) -> usize {
        let mut count = chain.len();
        while count > 0 {
            // The last block that is not here, if it would be seen, ends the search from the beginning.
            match self.needed(count).rev().find(|&index| self.by_partner[chain[index] as usize] == NONE) {
                None => break,
                Some(missing) => count = missing,
            }
        }
        count
    }

    /// Which blocks the position after `count` whole blocks sees.
    fn needed(&self, count: usize) -> Range<usize> {
        self.first_seen(count * self.block_size).min(count)..count
    }

    /// Blocks that nobody has among those that [`WindowPool::share`] would give.
    pub fn unused_for(&self, chain: &[BlockId]) -> usize {
        let blocks = chain[self.needed(chain.len())].iter().map(|&partner| self.by_partner[partner as usize]);
        blocks.filter(|&block| self.users[block as usize] == 0).count()
    }

    /// The table of a sequence that goes on after `chain`, which must be [`WindowPool::usable`] as a whole; it is a user of its blocks.
    pub fn share(&mut self, chain: &[BlockId], table: &mut WindowTable) {
        let needed = self.needed(chain.len());
        table.gone = needed.start;
        table.blocks.clear();
        for &partner in &chain[needed] {
            let block = self.by_partner[partner as usize];
            if self.users[block as usize] == 0 {
                self.unused.remove(block);
            }
            self.users[block as usize] += 1;
            table.blocks.push(block);
        }
    }

    /// Makes a full block findable by its partner, if the partner has none yet.
    pub fn publish(&mut self, partner: BlockId, block: BlockId) {
        if self.by_partner[partner as usize] == NONE && self.partner[block as usize] == NONE {
            self.by_partner[partner as usize] = block;
            self.partner[block as usize] = partner;
        }
    }

    /// The partner holds another text from now on: what went with it is free.
    pub fn forget(&mut self, partner: BlockId) {
        let block = self.by_partner[partner as usize];
        if block == NONE {
            return;
        }
        assert_eq!(self.users[block as usize], 0, "block {block} has users, and its partner none");
        self.unused.remove(block);
        self.part(block);
        self.free.push(block);
    }

    /// Gives back the blocks that no token from `position` on sees.
    pub fn pass(&mut self, table: &mut WindowTable, position: usize) {
        let passed = self.first_seen(position).saturating_sub(table.gone).min(table.blocks.len());
        self.release(&table.blocks[..passed]);
        table.blocks.drain(..passed);
        table.gone += passed;
    }

    /// Gives back all blocks of a sequence.
    pub fn clear(&mut self, table: &mut WindowTable) {
        self.release(&table.blocks);
        table.blocks.clear();
        table.gone = 0;
    }

    fn release(&mut self, blocks: &[BlockId]) {
        // The blocks that were written last are what is looked for first: they go last.
        for &block in blocks {
            let users = &mut self.users[block as usize];
            assert!(*users > 0, "block {block} is released more often than it was taken");
            *users -= 1;
            if *users > 0 {
                continue;
            }
            if self.partner[block as usize] == NONE {
                self.free.push(block);
            } else {
                self.unused.push_newest(block);
            }
        }
    }

    fn part(&mut self, block: BlockId) {
        let partner = std::mem::replace(&mut self.partner[block as usize], NONE);
        if partner != NONE {
            self.by_partner[partner as usize] = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of 2 positions, each position sees 3 back.
    fn pool(count: usize) -> WindowPool {
        WindowPool::new(3, count, 16, 2)
    }

    fn written(pool: &mut WindowPool, partners: &[BlockId]) -> WindowTable {
        let mut table = WindowTable::default();
        for &partner in partners {
            let block = pool.take().unwrap();
            pool.publish(partner, block);
            table.blocks.push(block);
        }
        table
    }

    #[test]
    fn what_no_position_sees_any_more_is_given_back() {
        let mut pool = pool(8);
        let mut table = written(&mut pool, &[10, 11, 12, 13]);
        // Position 8 sees 6, 7 and itself: block 3 and the next.
        pool.pass(&mut table, 8);
        assert_eq!((table.gone, &table.blocks[..]), (3, &[3][..]));
        assert_eq!((pool.free(), pool.unused()), (4, 3));
        assert_eq!((pool.most_for(1), pool.most_for(6)), (3, 5));
    }

    #[test]
    fn a_text_goes_on_where_its_window_is_known() {
        let mut pool = pool(4);
        let mut table = written(&mut pool, &[10, 11, 12, 13]);
        pool.clear(&mut table);
        // The oldest is given up for another text.
        assert_eq!(pool.take(), Some(0));
        assert_eq!(pool.usable(&[10, 11, 12, 13]), 4);
        assert_eq!(pool.usable(&[10, 11]), 2, "position 4 sees 2 and 3, which are in block 1");
        assert_eq!(pool.usable(&[10]), 0, "position 2 sees 0 and 1");
        assert_eq!(pool.unused_for(&[10, 11, 12]), 1);
        let mut again = WindowTable::default();
        pool.share(&[10, 11, 12], &mut again);
        assert_eq!((again.gone, &again.blocks[..], again.end()), (2, &[2][..], 3));
        // Its partner's text is gone.
        pool.forget(13);
        assert_eq!((pool.usable(&[10, 11, 12, 13]), pool.free(), pool.unused()), (3, 1, 1));
    }

    #[test]
    #[should_panic(expected = "more often")]
    fn releasing_twice_is_an_error_of_the_caller() {
        let mut pool = pool(2);
        let block = pool.take().unwrap();
        let table = || WindowTable { gone: 0, blocks: vec![block] };
        pool.clear(&mut table());
        pool.clear(&mut table());
    }
}
