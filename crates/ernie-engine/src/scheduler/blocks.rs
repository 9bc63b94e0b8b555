//! Blocks of the key/value cache: who has them, and what they hold that others can use.
//!
//! A full block is found again by its tokens and the block before it, so a chain of blocks stands for one text from its beginning on. A block that
//! nobody has any more stays findable until its room is needed; the longest unused goes first, and of one text the end before the beginning.
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::unused::{BlockId, NONE, Unused};

/// The pool of all blocks.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    /// Users of each block.
    users: Vec<u32>,
    /// Blocks that hold nothing, the lowest number last: few blocks in use are blocks at the beginning.
    free: Vec<BlockId>,
    /// Findable blocks by the block before and a hash of their tokens.
    found: HashMap<(BlockId, u64), BlockId>,
    /// Under which key a block is findable.
    keys: Vec<Option<(BlockId, u64)>>,
    /// Tokens of findable blocks, `block_size` for each block.
    tokens: Vec<u32>,
    /// Findable blocks without users.
    unused: Unused,
    evictions: u64,
}

impl BlockPool {
    /// `count` blocks of `block_size` positions, all free.
    pub fn new(count: usize, block_size: usize) -> Self {
        BlockPool {
            block_size,
            users: vec![0; count],
            free: (0..count as BlockId).rev().collect(),
            found: HashMap::with_capacity(count),
            keys: vec![None; count],
            tokens: vec![0; count * block_size],
            unused: Unused::new(count),
            evictions: 0,
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

    /// Blocks that [`BlockPool::take`] can give.
    pub fn available(&self) -> usize {
        self.free.len() + self.unused.len()
    }

    /// Findable blocks that were given up for others.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Users of a block.
    pub fn users(&self, block: BlockId) -> u32 {
        self.users[block as usize]
    }

    /// Whether a block can be found by its tokens: its content is then never changed.
    pub fn is_findable(&self, block: BlockId) -> bool {
        self.keys[block as usize].is_some()
    }

    /// A block for one user, to be written; the longest unused one is given up if none is free.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let block = self.unused.pop_oldest()?;
                self.forget(block);
                self.evictions += 1;
                block
            }
        };
        self.users[block as usize] = 1;
        Some(block)
    }

    /// The blocks that hold the beginning of `tokens`, as many whole ones as are known, into `chain`; whoever goes on to use them must
    /// [`BlockPool::share`] them.
    pub fn find(&self, tokens: &[u32], chain: &mut Vec<BlockId>) {
        chain.clear();
        let mut before = NONE;
        for chunk in tokens.chunks_exact(self.block_size) {
            let Some(block) = self.lookup(before, chunk) else { return };
            chain.push(block);
            before = block;
        }
    }

    /// Makes the caller a user of blocks.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            if self.users[block as usize] == 0 {
                self.unused.remove(block);
            }
            self.users[block as usize] += 1;
        }
    }

    /// Makes a full block findable: `before` is the block before it, `None` for a text's first. If the same text is known already, the caller becomes a
    /// user of the block that holds it instead of its own, which is freed; the block to go on with is returned.
    pub fn publish(&mut self, before: Option<BlockId>, block: BlockId, tokens: &[u32]) -> BlockId {
        assert_eq!(tokens.len(), self.block_size, "a full block");
        let before = before.unwrap_or(NONE);
        let key = (before, hash(tokens));
        match self.found.get(&key) {
            None => {
                self.found.insert(key, block);
                self.keys[block as usize] = Some(key);
                self.tokens[block as usize * self.block_size..][..self.block_size].copy_from_slice(tokens);
                block
            }
            Some(&known) if known != block && self.tokens_of(known) == tokens => {
                self.share(&[known]);
                self.release(&[block]);
                known
            }
            // Published before, or another text with the same hash: then it cannot be found, and is nobody else's.
            Some(_) => block,
        }
    }

    /// One user less for each block of a table. What has no user any more is free, or if findable may be given up, the last blocks first.
    pub fn release(&mut self, table: &[BlockId]) {
        for &block in table.iter().rev() {
            let users = &mut self.users[block as usize];
            assert!(*users > 0, "block {block} is released more often than it was taken");
            *users -= 1;
            if *users > 0 {
                continue;
            }
            if self.is_findable(block) {
                self.unused.push_newest(block);
            } else {
                self.free.push(block);
            }
        }
    }

    fn lookup(&self, before: BlockId, tokens: &[u32]) -> Option<BlockId> {
        let block = *self.found.get(&(before, hash(tokens)))?;
        (self.tokens_of(block) == tokens).then_some(block)
    }

    fn tokens_of(&self, block: BlockId) -> &[u32] {
        &self.tokens[block as usize * self.block_size..][..self.block_size]
    }

    fn forget(&mut self, block: BlockId) {
        if let Some(key) = self.keys[block as usize].take() {
            self.found.remove(&key);
        }
    }
}

fn hash(tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    tokens.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(pool: &mut BlockPool, tokens: &[u32]) -> Vec<BlockId> {
        let mut table: Vec<BlockId> = Vec::new();
        for chunk in tokens.chunks_exact(2) {
            let block = pool.take().unwrap();
            let block = pool.publish(table.last().copied(), block, chunk);
            table.push(block);
        }
        table
    }

    fn find(pool: &mut BlockPool, tokens: &[u32]) -> Vec<BlockId> {
        let mut table = Vec::new();
        pool.find(tokens, &mut table);
        pool.share(&table);
        table
    }

    #[test]
    fn a_text_is_found_as_far_as_it_agrees() {
        let mut pool = BlockPool::new(8, 2);
        let table = published(&mut pool, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(table, [0, 1, 2]);
        assert_eq!(find(&mut pool, &[1, 2, 3, 4, 9, 9]), [0, 1]);
        assert_eq!(find(&mut pool, &[1, 2, 3]), [0]);
        // The same tokens after another beginning are another text.
        assert!(find(&mut pool, &[3, 4]).is_empty());
        assert_eq!(pool.users(0), 3);
        assert_eq!(find(&mut pool, &[1, 2, 3, 4, 5, 6, 7, 8]), [0, 1, 2]);
    }

    #[test]
    fn a_second_copy_gives_way_to_the_first() {
        let mut pool = BlockPool::new(8, 2);
        let first = published(&mut pool, &[1, 2, 3, 4]);
        let second = published(&mut pool, &[1, 2, 3, 4]);
        assert_eq!(first, second);
        assert_eq!((pool.free(), pool.users(first[0])), (6, 2));
    }

    #[test]
    fn the_longest_unused_goes_first_and_of_a_text_the_end_before_the_beginning() {
        let mut pool = BlockPool::new(4, 2);
        let a = published(&mut pool, &[1, 2, 3, 4]);
        let b = published(&mut pool, &[5, 6, 7, 8]);
        pool.release(&a);
        pool.release(&b);
        assert_eq!((pool.free(), pool.unused(), pool.available()), (0, 4, 4));
        // Used again: now b is the older one.
        let again = find(&mut pool, &[1, 2]);
        pool.release(&again);
        let taken: Vec<BlockId> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken, [a[1], b[1], b[0], a[0]]);
        assert_eq!(pool.evictions(), 4);
        assert!(find(&mut pool, &[1, 2]).is_empty());
    }

    #[test]
    #[should_panic(expected = "more often")]
    fn releasing_twice_is_an_error_of_the_caller() {
        let mut pool = BlockPool::new(2, 2);
        let block = pool.take().unwrap();
        pool.release(&[block]);
        pool.release(&[block]);
    }
}
