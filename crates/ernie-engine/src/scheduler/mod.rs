//! What is computed in each step: a plain state machine that knows sequences, their tokens and blocks of cache, and nothing of a model.
//!
//! In every step each decoding sequence gets its next token, then prompts are computed piece by piece in the order they came, all under a budget of
//! tokens, so that a long prompt never holds up those who are already being answered. Sequences come and go between any two steps. When blocks run
//! out the latest comer gives its own back and is computed again later (preemption by recomputation); its tokens stay. Where a model has layers that see a window
//! only, their keys and values have blocks of their own, which a sequence gives back as it goes on.
mod blocks;
mod unused;
mod windows;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

pub use blocks::BlockPool;
pub use unused::BlockId;
pub use windows::{WindowPool, WindowTable};

use crate::drafts::CHECKED_TOGETHER;
use crate::error::{Error, Result};

/// A sequence's name, chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// How steps are made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Positions of a block.
    pub block_size: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Most sequences that are computed together.
    pub max_batch_size: usize,
    /// Most tokens computed in one step: it bounds how long a step takes.
    pub token_budget: usize,
    /// Sequences join and leave at any step. Without it a batch is filled only when the last one is finished altogether.
    pub dynamic_batching: bool,
    /// Keep the keys and values of texts that are finished, for texts that begin alike.
    pub prefix_cache: bool,
    /// Most tokens of a sequence, prompt and answer together.
    pub max_len: usize,
    /// For a model with layers that see a window only: the window, and the blocks of their part of the cache.
    pub windows: Option<WindowOptions>,
}

/// The part of the cache whose layers see the last positions only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowOptions {
    /// How many positions back, its own included, a position sees.
    pub window: usize,
    /// Blocks.
    pub blocks: usize,
}

impl WindowOptions {
    /// The fewest blocks with which a sequence can always go on: a step may then have to be cut into single blocks.
    pub fn fewest(window: usize, block_size: usize) -> usize {
        window.div_ceil(block_size) + 2
    }
}

/// One step.
#[derive(Debug, Default)]
pub struct Plan {
    /// What is computed, one item for each sequence that has a part in it.
    pub items: Vec<Item>,
    /// Tokens of all items.
    pub tokens: Vec<u32>,
    /// Blocks of all items.
    pub blocks: Vec<BlockId>,
    /// Blocks of all items in the layers that see a window only.
    pub window_blocks: Vec<BlockId>,
}

/// A sequence's part of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The sequence.
    pub id: SequenceId,
    /// Position of its first token.
    pub start: usize,
    /// Its tokens in [`Plan::tokens`]; guesses come last.
    pub tokens: Range<usize>,
    /// The blocks of positions 0 to the last token's, in [`Plan::blocks`].
    pub blocks: Range<usize>,
    /// Its blocks in [`Plan::window_blocks`]: without those that no token sees, of which there are so many.
    pub window_blocks: Range<usize>,
    /// Blocks before those.
    pub gone: usize,
    /// How many of the tokens are guesses.
    pub drafts: usize,
    /// The last so many tokens need logits: none for a prompt that is not done, else one and one for each guess.
    pub samples: usize,
}

/// Counts since the beginning, and how things stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that are being computed.
    pub running: usize,
    /// Blocks that hold nothing.
    pub free_blocks: usize,
    /// Blocks that nobody has but that hold known texts.
    pub cached_blocks: usize,
    /// Blocks in all.
    pub blocks: usize,
    /// Blocks of the layers that see a window only, that hold nothing.
    pub free_window_blocks: usize,
    /// Such blocks that nobody has but that hold known texts.
    pub cached_window_blocks: usize,
    /// Such blocks in all.
    pub window_blocks: usize,
    /// Prompt tokens of admitted sequences.
    pub prompt_tokens: u64,
    /// Of these, tokens that the prefix cache held.
    pub cached_tokens: u64,
    /// Sequences that gave back their blocks.
    pub preemptions: u64,
    /// Known blocks that were given up.
    pub evictions: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    options: SchedulerOptions,
    pool: BlockPool,
    windows: Option<WindowPool>,
    /// Known blocks of the beginning of a waiting sequence.
    chain: Vec<BlockId>,
    sequences: HashMap<SequenceId, Sequence>,
    waiting: VecDeque<SequenceId>,
    /// In the order of arrival.
    running: Vec<SequenceId>,
    arrivals: u64,
    /// The running sequence that comes first if the budget is too small for all.
    turn: usize,
    stats: Stats,
}

#[derive(Debug)]
struct Sequence {
    tokens: Vec<u32>,
    arrival: u64,
    /// Positions whose keys and values are in blocks.
    computed: usize,
    blocks: Vec<BlockId>,
    windowed: WindowTable,
    /// Blocks that others can find.
    published: usize,
    draft: Vec<u32>,
    /// Tokens and guesses in the plan that is being computed.
    planned: usize,
    planned_drafts: usize,
    limit: usize,
    admitted_before: bool,
}

impl Scheduler {
    /// A scheduler without sequences.
    ///
    /// # Errors
    /// [`Error::Parameter`] for an option that is 0.
    pub fn new(options: SchedulerOptions) -> Result<Self> {
        let checks = [
            ("block_size", options.block_size),
            ("blocks", options.blocks),
            ("max_batch_size", options.max_batch_size),
            ("token_budget", options.token_budget),
            ("max_len", options.max_len),
        ];
        if let Some((field, _)) = checks.into_iter().find(|(_, value)| *value == 0) {
            return Err(Error::Parameter { field, expected: "a number ≥ 1", got: "0".to_owned() });
        }
        if let Some(WindowOptions { window, blocks }) = options.windows
            && (window == 0 || blocks < WindowOptions::fewest(window, options.block_size))
        {
            let got = format!("{blocks} for a window of {window} positions");
            return Err(Error::Parameter { field: "windows.blocks", expected: "blocks for a window and two more", got });
        }
        Ok(Scheduler {
            pool: BlockPool::new(options.blocks, options.block_size),
            windows: options.windows.map(|w| WindowPool::new(w.window, w.blocks, options.blocks, options.block_size)),
            chain: Vec::new(),
            options,
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            arrivals: 0,
            turn: 0,
            stats: Stats::default(),
        })
    }

    /// Changes two options from the next plan on; sequences that run go on whatever they are.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a batch of none.
    pub fn set_batching(&mut self, max_batch_size: usize, dynamic_batching: bool) -> Result<()> {
        if max_batch_size == 0 {
            return Err(Error::Parameter { field: "max_batch_size", expected: "a number ≥ 1", got: "0".to_owned() });
        }
        (self.options.max_batch_size, self.options.dynamic_batching) = (max_batch_size, dynamic_batching);
        Ok(())
    }

    /// Most tokens that a sequence can have.
    pub fn max_len(&self) -> usize {
        self.options.max_len.min(self.options.blocks * self.options.block_size)
    }

    /// A new sequence at the end of the queue, to have at most `max_new_tokens` more tokens than its prompt.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`]; [`Error::ContextLength`] if not even one token can follow the prompt; [`Error::Parameter`] for an id in use.
    pub fn submit(&mut self, id: SequenceId, prompt: Vec<u32>, max_new_tokens: usize) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if prompt.len() > self.max_len() {
            return Err(Error::ContextLength { needed: prompt.len(), limit: self.max_len() });
        }
        if self.sequences.contains_key(&id) {
            return Err(Error::Parameter { field: "id", expected: "an id that is not in use", got: id.0.to_string() });
        }
        // The last token is chosen but never computed: a prompt may fill the cache.
        let limit = prompt.len().saturating_add(max_new_tokens).min(self.max_len() + 1);
        let mut tokens = prompt;
        tokens.reserve(limit - tokens.len());
        let sequence = Sequence {
            tokens,
            arrival: self.arrivals,
            computed: 0,
            blocks: Vec::with_capacity(limit.div_ceil(self.options.block_size)),
            windowed: WindowTable::default(),
            published: 0,
            draft: Vec::with_capacity(CHECKED_TOGETHER),
            planned: 0,
            planned_drafts: 0,
            limit,
            admitted_before: false,
        };
        self.arrivals += 1;
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
        Ok(())
    }

    /// Prompt and tokens so far.
    pub fn tokens(&self, id: SequenceId) -> Option<&[u32]> {
        self.sequences.get(&id).map(|sequence| sequence.tokens.as_slice())
    }

    /// Tokens that a sequence may still get.
    pub fn remaining(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| sequence.limit - sequence.tokens.len())
    }

    /// Whether a sequence's next step gives its next token, so that guesses can be checked with it.
    pub fn is_decoding(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| !sequence.blocks.is_empty() && sequence.computed + 1 == sequence.tokens.len())
    }

    /// The sequences that are being computed, in the order of arrival.
    pub fn running(&self) -> &[SequenceId] {
        &self.running
    }

    /// Tokens that may follow, to be checked in the next step as far as budget, blocks and limits go; for a decoding sequence.
    pub fn set_draft(&mut self, id: SequenceId, draft: &[u32]) {
        if self.is_decoding(id)
            && let Some(sequence) = self.sequences.get_mut(&id)
        {
            sequence.draft.clear();
            sequence.draft.extend_from_slice(draft);
        }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// How things stand.
    pub fn stats(&self) -> Stats {
        let windows = self.windows.as_ref();
        Stats {
            free_window_blocks: windows.map_or(0, WindowPool::free),
            cached_window_blocks: windows.map_or(0, WindowPool::unused),
            window_blocks: windows.map_or(0, WindowPool::count),
            waiting: self.waiting.len(),
            running: self.running.len(),
            free_blocks: self.pool.free(),
            cached_blocks: self.pool.unused(),
            blocks: self.pool.count(),
            evictions: self.pool.evictions(),
            ..self.stats
        }
    }

    /// Makes up the next step. Every item must then be computed and given to [`Scheduler::commit`], unless it is cancelled.
    pub fn plan(&mut self, plan: &mut Plan) {
        loop {
            plan.items.clear();
            plan.tokens.clear();
            plan.blocks.clear();
            plan.window_blocks.clear();
            let mut budget = self.options.token_budget;
            self.plan_decoding(plan, &mut budget);
            self.extend_drafts(plan, &mut budget);
            self.plan_prompts(plan, &mut budget);
            self.admit(plan, &mut budget);
            // Prompts that hold all blocks together and none of them enough: the latest gives way until one can go on.
            if !plan.items.is_empty() || self.running.len() < 2 {
                break;
            }
            let latest = self.running[self.running.len() - 1];
            self.preempt(latest);
        }
        for item in &mut plan.items {
            let Some(sequence) = self.sequences.get_mut(&item.id) else { continue };
            let first = plan.tokens.len();
            let known = sequence.planned - sequence.planned_drafts;
            plan.tokens.extend_from_slice(&sequence.tokens[item.start..item.start + known]);
            plan.tokens.extend_from_slice(&sequence.draft[..sequence.planned_drafts]);
            item.tokens = first..plan.tokens.len();
            let (first, count) = (plan.blocks.len(), (item.start + sequence.planned).div_ceil(self.options.block_size));
            plan.blocks.extend_from_slice(&sequence.blocks[..count]);
            item.blocks = first..plan.blocks.len();
            if self.windows.is_some() {
                let (first, table) = (plan.window_blocks.len(), &sequence.windowed);
                plan.window_blocks.extend_from_slice(&table.blocks[..count - table.gone]);
                (item.window_blocks, item.gone) = (first..plan.window_blocks.len(), table.gone);
            }
            item.drafts = sequence.planned_drafts;
            item.samples = if item.start + known == sequence.tokens.len() { 1 + sequence.planned_drafts } else { 0 };
            sequence.draft.clear();
        }
    }

    /// What came of an item: the tokens that follow, one and as many more as guesses were right; none for a prompt that is not done. A sequence that is
    /// `finished` is removed. An item that was cancelled is ignored.
    ///
    /// # Panics
    /// If a sequence gets tokens that its item did not ask for, or none where it did.
    pub fn commit(&mut self, id: SequenceId, new_tokens: &[u32], finished: bool) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.planned == 0 {
            return;
        }
        let known = sequence.planned - sequence.planned_drafts;
        let samples = sequence.computed + known == sequence.tokens.len();
        assert!(samples != new_tokens.is_empty(), "tokens for a prompt that is not done, or none for a sequence that asked for them");
        assert!(new_tokens.len() <= 1 + sequence.planned_drafts, "more tokens than were checked");
        sequence.computed += known + new_tokens.len().saturating_sub(1);
        sequence.tokens.extend_from_slice(new_tokens);
        (sequence.planned, sequence.planned_drafts) = (0, 0);
        if self.options.prefix_cache {
            let size = self.options.block_size;
            while (sequence.published + 1) * size <= sequence.computed {
                let index = sequence.published;
                let before = index.checked_sub(1).map(|before| sequence.blocks[before]);
                let tokens = &sequence.tokens[index * size..(index + 1) * size];
                sequence.blocks[index] = self.pool.publish(before, sequence.blocks[index], tokens);
                if let Some(windows) = &mut self.windows
                    && self.pool.is_findable(sequence.blocks[index])
                {
                    windows.publish(sequence.blocks[index], sequence.windowed.blocks[index - sequence.windowed.gone]);
                }
                sequence.published += 1;
            }
        }
        if let Some(windows) = &mut self.windows {
            windows.pass(&mut sequence.windowed, sequence.computed);
        }
        if finished {
            self.remove(id);
        }
    }

    /// Removes a sequence, whatever it is doing; its blocks are free at once. Returns whether there was one.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        self.remove(id)
    }

    fn remove(&mut self, id: SequenceId) -> bool {
        let Some(mut sequence) = self.sequences.remove(&id) else { return false };
        if let Some(windows) = &mut self.windows {
            windows.clear(&mut sequence.windowed);
        }
        self.pool.release(&sequence.blocks);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        true
    }

    /// One token for each decoding sequence, in turn if the budget is too small.
    fn plan_decoding(&mut self, plan: &mut Plan, budget: &mut usize) {
        let count = self.running.len();
        let start = if count > *budget { self.turn % count } else { 0 };
        self.turn = self.turn.wrapping_add(*budget);
        let mut order = 0;
        while order < self.running.len() && *budget > 0 {
            let id = self.running[(start + order) % self.running.len()];
            order += 1;
            if !self.is_decoding(id) || plan.items.iter().any(|item| item.id == id) {
                continue;
            }
            if self.make_room(plan, id) {
                self.push(plan, id, 1);
                *budget -= 1;
            } else {
                order = 0; // Somebody left the list.
            }
        }
    }

    /// A block for the next position, taken from the latest comer that has no part in the step yet if there is no other; `false` if that is the
    /// sequence itself.
    fn make_room(&mut self, plan: &Plan, id: SequenceId) -> bool {
        let needed = (self.sequences[&id].computed + 1).div_ceil(self.options.block_size);
        while self.grow(id, needed) < needed {
            let planned = |other: SequenceId| plan.items.iter().any(|item| item.id == other);
            let victim = self.running.iter().rev().copied().find(|&other| !planned(other)).unwrap_or(id);
            self.preempt(victim);
            if victim == id {
                return false;
            }
        }
        true
    }

    /// Gives a sequence up to `needed` blocks, as far as there are any; returns how many it has.
    fn grow(&mut self, id: SequenceId, needed: usize) -> usize {
        let Some(sequence) = self.sequences.get_mut(&id) else { return 0 };
        while sequence.blocks.len() < needed
            && let Some(block) = self.pool.take()
        {
            if let Some(windows) = &mut self.windows {
                windows.forget(block);
            }
            sequence.blocks.push(block);
        }
        let Some(windows) = &mut self.windows else { return sequence.blocks.len() };
        while sequence.windowed.end() < needed
            && let Some(block) = windows.take()
        {
            sequence.windowed.blocks.push(block);
        }
        sequence.blocks.len().min(sequence.windowed.end())
    }

    fn push(&mut self, plan: &mut Plan, id: SequenceId, tokens: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        (sequence.planned, sequence.planned_drafts) = (tokens, 0);
        plan.items.push(Item {
            id,
            start: sequence.computed,
            tokens: 0..0,
            blocks: 0..0,
            window_blocks: 0..0,
            gone: 0,
            drafts: 0,
            samples: 0,
        });
    }

    /// Guesses with what is left of the budget, and of the blocks that nobody else needs.
    fn extend_drafts(&mut self, plan: &Plan, budget: &mut usize) {
        for item in &plan.items {
            let sequence = &self.sequences[&item.id];
            // One token comes of the step in any case.
            let useful = (sequence.limit - sequence.tokens.len()).saturating_sub(1);
            // The pool must hold the guesses' positions.
            let room = self.max_len() - sequence.tokens.len().min(self.max_len());
            let wanted = sequence.draft.len().min(*budget).min(useful).min(room);
            let mut free = self.pool.free() + sequence.blocks.len();
            if let Some(windows) = &self.windows {
                free = free.min(windows.free() + sequence.windowed.end());
            }
            let needed = (sequence.computed + 1 + wanted).div_ceil(self.options.block_size).min(free);
            let got = self.grow(item.id, needed) * self.options.block_size;
            let Some(sequence) = self.sequences.get_mut(&item.id) else { continue };
            let drafts = wanted.min(got - (sequence.computed + 1));
            (sequence.planned, sequence.planned_drafts) = (1 + drafts, drafts);
            *budget -= drafts;
        }
    }

    /// Pieces of prompts that are being computed, in the order of arrival.
    fn plan_prompts(&mut self, plan: &mut Plan, budget: &mut usize) {
        for index in 0..self.running.len() {
            let id = self.running[index];
            if !self.is_decoding(id) {
                self.plan_piece(plan, id, budget);
            }
        }
    }

    /// As much of a prompt as budget and blocks allow.
    fn plan_piece(&mut self, plan: &mut Plan, id: SequenceId, budget: &mut usize) {
        let sequence = &self.sequences[&id];
        let (computed, wanted) = (sequence.computed, (sequence.tokens.len() - sequence.computed).min(*budget));
        let blocks = self.grow(id, (computed + wanted).div_ceil(self.options.block_size));
        let piece = wanted.min(blocks * self.options.block_size - computed);
        if piece > 0 {
            self.push(plan, id, piece);
            *budget -= piece;
        }
    }

    /// Lets waiting sequences in, the first one first, while there is room for all that they have.
    fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        if !self.options.dynamic_batching && !self.running.is_empty() {
            return;
        }
        while self.running.len() < self.options.max_batch_size && *budget > 0 {
            let Some(&id) = self.waiting.front() else { return };
            let Some(sequence) = self.sequences.get_mut(&id) else { return };
            let all = sequence.tokens.len().div_ceil(self.options.block_size);
            // At least the last token is computed, for its logits.
            let findable = if self.options.prefix_cache { &sequence.tokens[..sequence.tokens.len() - 1] } else { &[][..] };
            self.pool.find(findable, &mut self.chain);
            if let Some(windows) = &self.windows {
                self.chain.truncate(windows.usable(&self.chain));
            }
            let unused = self.chain.iter().filter(|&&block| self.pool.users(block) == 0).count();
            let wanted = all - self.chain.len();
            let mut room = self.pool.available() - unused >= wanted;
            if let Some(windows) = &self.windows {
                let wanted = wanted.min(windows.most_for(self.options.token_budget));
                room &= windows.available() - windows.unused_for(&self.chain) >= wanted;
            }
            if !self.running.is_empty() && !room {
                return;
            }
            self.pool.share(&self.chain);
            sequence.blocks.extend_from_slice(&self.chain);
            if let Some(windows) = &mut self.windows {
                windows.share(&self.chain, &mut sequence.windowed);
            }
            sequence.computed = sequence.blocks.len() * self.options.block_size;
            sequence.published = sequence.blocks.len();
            if !sequence.admitted_before {
                sequence.admitted_before = true;
                self.stats.prompt_tokens += sequence.tokens.len() as u64;
                self.stats.cached_tokens += sequence.computed as u64;
            }
            let arrival = sequence.arrival;
            self.waiting.pop_front();
            let place = self.running.partition_point(|other| self.sequences[other].arrival < arrival);
            self.running.insert(place, id);
            self.plan_piece(plan, id, budget);
        }
    }

    /// Takes a sequence's blocks; it goes to the front of the queue and is computed again later.
    fn preempt(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if let Some(windows) = &mut self.windows {
            windows.clear(&mut sequence.windowed);
        }
        self.pool.release(&sequence.blocks);
        sequence.blocks.clear();
        sequence.draft.clear();
        (sequence.computed, sequence.published) = (0, 0);
        (sequence.planned, sequence.planned_drafts) = (0, 0);
        self.running.retain(|&other| other != id);
        self.waiting.push_front(id);
        self.stats.preemptions += 1;
    }
}
