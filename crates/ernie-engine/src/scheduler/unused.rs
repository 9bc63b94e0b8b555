//! Blocks that nobody has but that hold something known, in the order in which they are given up.

/// Number of a block.
pub type BlockId = u32;

/// No block.
pub(super) const NONE: BlockId = BlockId::MAX;

/// A list through two arrays, the longest unused block first: every operation takes the same time however long it is.
#[derive(Debug)]
pub(super) struct Unused {
    newer: Vec<BlockId>,
    older: Vec<BlockId>,
    oldest: BlockId,
    newest: BlockId,
    len: usize,
}

impl Unused {
    /// An empty list for blocks with numbers below `count`.
    pub fn new(count: usize) -> Self {
        Unused { newer: vec![NONE; count], older: vec![NONE; count], oldest: NONE, newest: NONE, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn push_newest(&mut self, block: BlockId) {
        (self.older[block as usize], self.newer[block as usize]) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = block,
            newest => self.newer[newest as usize] = block,
        }
        self.newest = block;
        self.len += 1;
    }

    pub fn pop_oldest(&mut self) -> Option<BlockId> {
        let block = self.oldest;
        if block == NONE {
            return None;
        }
        self.remove(block);
        Some(block)
    }

    /// Takes a block that is in the list out of it.
    pub fn remove(&mut self, block: BlockId) {
        let (older, newer) = (self.older[block as usize], self.newer[block as usize]);
        match older {
            NONE => self.oldest = newer,
            older => self.newer[older as usize] = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.older[newer as usize] = older,
        }
        self.len -= 1;
    }
}
