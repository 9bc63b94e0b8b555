//! The scheduler without a model: a store stands for the cache, and knows whether what a token sees is really its own past.
use std::collections::HashMap;

use ernie_engine::Error;
use ernie_engine::scheduler::{BlockId, Plan, Scheduler, SchedulerOptions, SequenceId, WindowOptions};

const OPTIONS: SchedulerOptions = SchedulerOptions {
    block_size: 4,
    blocks: 64,
    max_batch_size: 8,
    token_budget: 16,
    dynamic_batching: true,
    prefix_cache: true,
    max_len: 200,
    windows: None,
};

/// Reproducible numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}

/// What this "model" says follows some tokens.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token)) % 50
}

fn answer(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    (0..count).for_each(|_| tokens.push(next_token(&tokens)));
    tokens.split_off(prompt.len())
}

/// A scheduler, the cache it manages, and the sequences whose answers are expected.
struct World {
    options: SchedulerOptions,
    scheduler: Scheduler,
    plan: Plan,
    /// What each place of each block holds.
    store: HashMap<(BlockId, usize), u32>,
    /// The same of the layers that see a window, with the position it was written for.
    window_store: HashMap<(BlockId, usize), (usize, u32)>,
    prompts: HashMap<SequenceId, (Vec<u32>, usize)>,
    finished: HashMap<SequenceId, Vec<u32>>,
    steps: usize,
}

impl World {
    fn new(options: SchedulerOptions) -> Self {
        let scheduler = Scheduler::new(options).unwrap();
        World {
            options,
            scheduler,
            plan: Plan::default(),
            store: HashMap::new(),
            window_store: HashMap::new(),
            prompts: HashMap::new(),
            finished: HashMap::new(),
            steps: 0,
        }
    }

    fn submit(&mut self, id: u64, prompt: Vec<u32>, max_new_tokens: usize) {
        let id = SequenceId(id);
        self.scheduler.submit(id, prompt.clone(), max_new_tokens).unwrap();
        let count = max_new_tokens.min(self.scheduler.max_len() + 1 - prompt.len());
        self.prompts.insert(id, (prompt, count));
    }

    /// Plans, computes and commits a step; `cancel` names a sequence to cancel between planning and committing.
    fn step(&mut self, cancel: Option<SequenceId>) {
        let World { options, scheduler, plan, store, window_store, .. } = self;
        scheduler.plan(plan);
        self.steps += 1;
        assert!(plan.tokens.len() <= options.token_budget, "{} tokens under a budget of {}", plan.tokens.len(), options.token_budget);
        assert!(plan.items.len() <= options.max_batch_size && scheduler.running().len() <= options.max_batch_size);
        assert!(plan.items.iter().enumerate().all(|(i, item)| plan.items[..i].iter().all(|other| other.id != item.id)));
        // All keys and values are written before anything is read, as in a layer of the model.
        let mut written = HashMap::new();
        for item in &plan.items {
            let blocks = &plan.blocks[item.blocks.clone()];
            for (position, &token) in (item.start..).zip(&plan.tokens[item.tokens.clone()]) {
                let place = (blocks[position / options.block_size], position % options.block_size);
                assert!(written.insert(place, item.id).is_none(), "two tokens write to one place");
                store.insert(place, token);
            }
        }
        if options.windows.is_some() {
            let mut written = HashMap::new();
            for item in &plan.items {
                let blocks = &plan.window_blocks[item.window_blocks.clone()];
                for (position, &token) in (item.start..).zip(&plan.tokens[item.tokens.clone()]) {
                    let place = (blocks[position / options.block_size - item.gone], position % options.block_size);
                    assert!(written.insert(place, item.id).is_none(), "two tokens write to one place of the windows");
                    window_store.insert(place, (position, token));
                }
            }
        }
        let mut results = Vec::new();
        for item in &plan.items {
            let known = scheduler.tokens(item.id).unwrap();
            let tokens = &plan.tokens[item.tokens.clone()];
            let blocks = &plan.blocks[item.blocks.clone()];
            assert_eq!(&known[item.start..item.start + tokens.len() - item.drafts], &tokens[..tokens.len() - item.drafts]);
            let mut all = known[..item.start].to_vec();
            all.extend(tokens);
            for (position, token) in all.iter().enumerate() {
                let place = (blocks[position / options.block_size], position % options.block_size);
                assert_eq!(store.get(&place), Some(token), "{:?}: position {position} of its past is not its own", item.id);
                assert!(written.get(&place).is_none_or(|writer| *writer == item.id), "a block in use is written by another");
            }
            if let Some(WindowOptions { window, .. }) = options.windows {
                let blocks = &plan.window_blocks[item.window_blocks.clone()];
                for (position, &token) in all.iter().enumerate().skip((item.start + 1).saturating_sub(window)) {
                    let place = (blocks[position / options.block_size - item.gone], position % options.block_size);
                    assert_eq!(window_store.get(&place), Some(&(position, token)), "{:?}: position {position} of its window", item.id);
                }
            }
            let mut accepted = Vec::new();
            for sample in 0..item.samples {
                let seen = all.len() - item.samples + 1 + sample;
                accepted.push(next_token(&all[..seen]));
                if all.get(seen) != accepted.last() {
                    break;
                }
            }
            results.push((item.id, accepted));
        }
        if let Some(id) = cancel {
            scheduler.cancel(id);
            self.prompts.remove(&id);
        }
        for (id, accepted) in results {
            let Some((prompt, count)) = self.prompts.get(&id) else {
                scheduler.commit(id, &accepted, false);
                continue;
            };
            let so_far = scheduler.tokens(id).unwrap().len() - prompt.len() + accepted.len();
            assert!(so_far <= *count, "{id:?} gets more tokens than it may");
            if so_far == *count {
                let mut tokens = scheduler.tokens(id).unwrap()[prompt.len()..].to_vec();
                tokens.extend(&accepted);
                assert_eq!(tokens, answer(prompt, *count), "{id:?} is answered as if it were alone");
                self.finished.insert(id, tokens);
                self.prompts.remove(&id);
                scheduler.commit(id, &accepted, true);
            } else {
                scheduler.commit(id, &accepted, false);
            }
        }
        let stats = scheduler.stats();
        assert_eq!(stats.running + stats.waiting, self.prompts.len());
        assert!(stats.free_blocks + stats.cached_blocks <= stats.blocks);
        assert!(stats.free_window_blocks + stats.cached_window_blocks <= stats.window_blocks);
    }

    fn run(&mut self) {
        let work: usize = self.prompts.values().map(|(prompt, count)| prompt.len() + count).sum();
        let limit = self.steps + 50 + 20 * work;
        while !self.scheduler.is_idle() {
            self.step(None);
            assert!(self.steps < limit, "{} sequences are not finished after {limit} steps", self.prompts.len());
        }
        let stats = self.scheduler.stats();
        assert_eq!(stats.free_blocks + stats.cached_blocks, stats.blocks, "a block is lost");
        assert_eq!(stats.free_window_blocks + stats.cached_window_blocks, stats.window_blocks, "a block of a window is lost");
    }
}

#[test]
fn random_arrivals_cancels_and_tiny_caches_lose_nothing_and_change_no_answer() {
    let (mut preemptions, mut found_in_windows) = (0, 0);
    for seed in 0..1200 {
        let random = &mut Random(seed);
        let block_size = 1 + random.below(6);
        let windows = (seed >= 600).then(|| {
            let window = 1 + random.below(20);
            WindowOptions { window, blocks: WindowOptions::fewest(window, block_size) + random.below(16) }
        });
        let options = SchedulerOptions {
            block_size,
            blocks: 1 + random.below(24),
            max_batch_size: 1 + random.below(6),
            token_budget: 1 + random.below(20),
            dynamic_batching: seed % 5 != 0,
            prefix_cache: seed % 3 != 0,
            max_len: 8 + random.below(60),
            windows,
        };
        let mut world = World::new(options);
        let longest = world.scheduler.max_len();
        // Prompts that begin alike, sometimes.
        let common: Vec<u32> = (0..longest).map(|_| random.below(50) as u32).collect();
        let (count, mut next) = (1 + random.below(14), 0);
        while next < count || !world.scheduler.is_idle() {
            while next < count && random.below(3) > 0 {
                let length = 1 + random.below(longest);
                let shared = random.below(length + 1);
                let mut prompt = common[..shared].to_vec();
                prompt.extend((shared..length).map(|_| random.below(50) as u32));
                world.submit(next as u64, prompt, 1 + random.below(20));
                next += 1;
            }
            let running = world.scheduler.running().to_vec();
            for &id in &running {
                // Guesses that are right for a while.
                if world.scheduler.is_decoding(id) && random.below(2) == 0 {
                    let right = random.below(5);
                    let mut draft = answer(world.scheduler.tokens(id).unwrap(), right);
                    draft.extend((0..random.below(3)).map(|_| random.below(50) as u32));
                    world.scheduler.set_draft(id, &draft);
                }
            }
            let anyone = world.prompts.keys().min().copied();
            let cancel = if random.below(12) == 0 { anyone } else { None };
            world.step(cancel);
            if random.below(25) == 0
                && let Some(id) = world.prompts.keys().max().copied()
            {
                assert!(world.scheduler.cancel(id));
                world.prompts.remove(&id);
            }
            assert!(world.steps < 4000, "seed {seed}: no end");
        }
        world.run();
        preemptions += world.scheduler.stats().preemptions;
        found_in_windows += if seed >= 600 { world.scheduler.stats().cached_tokens } else { 0 };
    }
    assert!(found_in_windows > 500, "known beginnings were to be found: {found_in_windows} tokens");
    assert!(preemptions > 100, "the caches were meant to be too small: {preemptions} preemptions");
}

#[test]
fn decoding_goes_on_while_a_long_prompt_is_computed_in_pieces() {
    let mut world = World::new(OPTIONS);
    world.submit(1, vec![1, 2, 3], 30);
    world.step(None);
    world.submit(2, (0..100).collect(), 2);
    for _ in 0..6 {
        world.step(None);
        let items: Vec<(u64, usize, usize)> = world.plan.items.iter().map(|i| (i.id.0, i.tokens.len(), i.samples)).collect();
        assert_eq!(items, [(1, 1, 1), (2, 15, 0)], "a token for the one, what is left of the budget for the other");
    }
    world.step(None);
    assert_eq!(world.plan.items[1].samples, 1, "10 tokens were left: the prompt is done");
    world.run();
    assert_eq!(world.finished.len(), 2);
}

#[test]
fn a_known_beginning_is_not_computed_again() {
    let mut world = World::new(OPTIONS);
    let prompt: Vec<u32> = (0..18).collect();
    world.submit(1, prompt.clone(), 3);
    world.run();
    world.submit(2, prompt.clone(), 3);
    world.step(None);
    // Four whole blocks of 4 are known, and two tokens are left.
    assert_eq!((world.plan.items[0].start, world.plan.items[0].tokens.len()), (16, 2));
    world.run();
    // A prompt of whole blocks leaves its last one to be computed, for the logits of its last token.
    world.submit(3, prompt[..16].to_vec(), 3);
    world.step(None);
    assert_eq!((world.plan.items[0].start, world.plan.items[0].tokens.len()), (12, 4));
    assert_eq!(world.scheduler.stats().cached_tokens, 28);
    world.run();
}

#[test]
fn the_latest_comer_gives_way_and_comes_back_first() {
    let mut world = World::new(SchedulerOptions { blocks: 6, prefix_cache: false, ..OPTIONS });
    for id in 1..=2 {
        world.submit(id, vec![id as u32; 8], 12);
    }
    world.submit(3, vec![3; 4], 4);
    while world.scheduler.stats().preemptions == 0 {
        world.step(None);
    }
    assert_eq!(world.scheduler.running(), [SequenceId(1)], "the second gave way");
    while world.scheduler.running().iter().all(|id| id.0 == 1) {
        world.step(None);
    }
    assert_eq!(world.scheduler.running()[0], SequenceId(2), "and is let in before the third");
    world.run();
    assert_eq!(world.finished.len(), 3);
}

#[test]
fn a_long_text_holds_the_blocks_of_its_window_and_no_more() {
    let windows = Some(WindowOptions { window: 10, blocks: 12 });
    let mut world = World::new(SchedulerOptions { windows, prefix_cache: false, max_batch_size: 1, ..OPTIONS });
    world.submit(1, (0..40).collect(), 100);
    while !world.scheduler.is_idle() {
        world.step(None);
        let stats = world.scheduler.stats();
        let (held, most) = (stats.window_blocks - stats.free_window_blocks, 10usize.div_ceil(4) + 1);
        assert!(held <= most, "{held} blocks between two steps");
    }
    assert_eq!(world.finished.len(), 1);
}

#[test]
fn a_known_beginning_needs_only_its_window() {
    let windows = Some(WindowOptions { window: 6, blocks: 5 });
    let mut world = World::new(SchedulerOptions { windows, token_budget: 4, ..OPTIONS });
    let prompt: Vec<u32> = (0..34).collect();
    world.submit(1, prompt.clone(), 3);
    world.run();
    // Of the eight whole blocks the first have long been given up by the windows.
    world.submit(2, prompt.clone(), 3);
    world.step(None);
    assert_eq!((world.plan.items[0].start, world.plan.items[0].gone), (32, 6));
    world.run();
    assert_eq!(world.scheduler.stats().cached_tokens, 32);
}

#[test]
fn static_batches_wait_for_their_slowest() {
    let mut world = World::new(SchedulerOptions { dynamic_batching: false, max_batch_size: 2, ..OPTIONS });
    world.submit(1, vec![1], 2);
    world.submit(2, vec![2], 9);
    world.submit(3, vec![3], 2);
    while world.prompts.contains_key(&SequenceId(2)) {
        world.step(None);
        assert!(!world.scheduler.running().contains(&SequenceId(3)));
    }
    world.run();
    assert_eq!(world.finished.len(), 3);
}

#[test]
fn everyone_gets_a_turn_under_a_budget_for_few() {
    let mut world = World::new(SchedulerOptions { token_budget: 2, ..OPTIONS });
    for id in 0..7 {
        world.submit(id, vec![id as u32], 10);
    }
    let mut most_apart = 0;
    while !world.scheduler.is_idle() {
        world.step(None);
        let lengths: Vec<usize> = world.scheduler.running().iter().map(|id| world.scheduler.tokens(*id).unwrap().len()).collect();
        if lengths.len() == 7 {
            most_apart = most_apart.max(lengths.iter().max().unwrap() - lengths.iter().min().unwrap());
        }
    }
    assert!(most_apart <= 8, "one sequence is {most_apart} tokens ahead of another");
}

#[test]
fn guesses_are_cut_to_budget_limits_and_free_blocks_and_forgotten_when_wrong() {
    let mut world = World::new(OPTIONS);
    world.submit(1, vec![1, 2, 3], 9);
    world.step(None);
    let id = SequenceId(1);
    let right = answer(world.scheduler.tokens(id).unwrap(), 40);
    world.scheduler.set_draft(id, &right);
    world.step(None);
    // Eight tokens are allowed after the first; the step gives one of them in any case.
    assert_eq!((world.plan.items[0].drafts, world.plan.items[0].samples), (7, 8));
    world.run();

    let mut world = World::new(OPTIONS);
    world.submit(1, vec![1, 2, 3], 30);
    world.step(None);
    world.scheduler.set_draft(id, &[99; 3]);
    world.step(None);
    assert_eq!(world.plan.items[0].drafts, 3);
    assert_eq!(world.scheduler.tokens(id).unwrap().len(), 5, "one token came of the step");
    world.run();
    assert_eq!(world.finished[&id].len(), 30);
}

#[test]
fn cancelling_frees_everything_at_once() {
    let mut world = World::new(OPTIONS);
    world.submit(1, (0..60).collect(), 5);
    world.submit(2, vec![1], 5);
    world.step(None);
    assert!(world.scheduler.cancel(SequenceId(1)) && world.scheduler.cancel(SequenceId(2)));
    assert!(!world.scheduler.cancel(SequenceId(2)));
    let stats = world.scheduler.stats();
    assert_eq!(stats.free_blocks + stats.cached_blocks, stats.blocks);
    assert!(world.scheduler.is_idle());
}

#[test]
fn what_cannot_be_is_refused() {
    let mut scheduler = Scheduler::new(SchedulerOptions { blocks: 3, ..OPTIONS }).unwrap();
    let id = SequenceId(1);
    assert!(matches!(scheduler.submit(id, vec![], 1), Err(Error::EmptyPrompt)));
    assert!(matches!(scheduler.submit(id, vec![1; 13], 1), Err(Error::ContextLength { needed: 13, limit: 12 })));
    scheduler.submit(id, vec![1; 12], 5).unwrap();
    assert_eq!(scheduler.remaining(id), 1, "the last token has no place in the cache and needs none");
    assert!(matches!(scheduler.submit(id, vec![1], 1), Err(Error::Parameter { field: "id", .. })));
    for (field, options) in [
        ("blocks", SchedulerOptions { blocks: 0, ..OPTIONS }),
        ("token_budget", SchedulerOptions { token_budget: 0, ..OPTIONS }),
        ("max_batch_size", SchedulerOptions { max_batch_size: 0, ..OPTIONS }),
        ("windows.blocks", SchedulerOptions { windows: Some(WindowOptions { window: 9, blocks: 4 }), ..OPTIONS }),
    ] {
        assert!(matches!(Scheduler::new(options), Err(Error::Parameter { field: got, .. }) if got == field));
    }
}
