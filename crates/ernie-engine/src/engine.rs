//! Many requests at once: the scheduler decides what each step computes, the model computes it, samplers choose.
//!
//! Every request gets the same tokens and log-probabilities, to the bit, whatever else is running, however its prompt is cut, and whether its beginning
//! was computed for it or found in the cache.
use std::collections::HashMap;
use std::sync::Arc;

use ernie_kernels::logits as kernels;
use ernie_kernels::paged::BLOCK;

use crate::cache::CacheLayout;
use crate::constraint::{Constraint, TokenSet};
use crate::drafts::{CHECKED_TOGETHER, DraftOptions, Drafter};
use crate::error::{Error, Result};
use crate::generate::FinishReason;
use crate::load::Load;
use crate::logprobs::LogProbs;
use crate::model::Model;
use crate::paragraphs::Ends;
use crate::profile::Profile;
use crate::runner::Runner;
use crate::sampler::{Sampler, SamplingParams};
use crate::scheduler::{Plan, Scheduler, SchedulerOptions, SequenceId, Stats, WindowOptions};

/// Most tokens of an answer that memory for guesses is taken for in advance: requests often allow far more than they use.
const MAX_FORESEEN: usize = 4096;

/// How an engine works. `Default` is for a server on a small machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Memory of the key/value cache in bytes, rounded down to whole blocks of 32 positions; taken from the system as it is used.
    pub cache_bytes: usize,
    /// Most requests computed together.
    pub max_batch_size: usize,
    /// Most tokens computed in one step: what a long prompt may hold up those who are being answered.
    pub token_budget: usize,
    /// Requests join and leave at any step; without it a batch is filled only when the last one is finished altogether.
    pub dynamic_batching: bool,
    /// Keep the keys and values of finished texts for requests that begin alike.
    pub prefix_cache: bool,
    /// Most tokens of a request, prompt and answer together; 0 takes what the model was made for.
    pub max_len: usize,
    /// Guessing ahead; never changes a token.
    pub drafts: DraftOptions,
    /// Tokens of a step up to which guesses are worth their while: beyond, the processor is busy with the requests themselves.
    pub draft_batch: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            cache_bytes: 1 << 30,
            max_batch_size: 16,
            token_budget: 256,
            dynamic_batching: true,
            prefix_cache: true,
            max_len: 0,
            drafts: DraftOptions::default(),
            draft_batch: CHECKED_TOGETHER,
        }
    }
}

/// What to continue, and how.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How to choose tokens and when to stop; stop strings are for who turns tokens into text.
    pub params: SamplingParams,
    /// Report the log-probability of each token, and of as many of the likeliest tokens in its place.
    pub logprobs: Option<usize>,
}

/// A request's name.
pub type RequestId = SequenceId;

/// What a step brought.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token {
        /// Whose.
        id: RequestId,
        /// Which.
        token: u32,
        /// ln of its probability under the model, before temperature and penalties, if that was asked for.
        logprob: Option<f32>,
        /// The likeliest tokens in its place with theirs, as many as were asked for, the likeliest first.
        top: Vec<(u32, f32)>,
    },
    /// A request is finished; nothing more will come of it.
    Finished {
        /// Which.
        id: RequestId,
        /// Why.
        reason: FinishReason,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens chosen.
        output_tokens: usize,
    },
    /// A request came to an end because the model's numbers are damaged.
    Failed {
        /// Which.
        id: RequestId,
        /// Token whose logit is no number.
        token: usize,
        /// Its value.
        value: f32,
    },
    /// A request came to an end because its constraint cannot say how the text may go on.
    Stuck {
        /// Which.
        id: RequestId,
        /// Why.
        reason: String,
    },
}

/// Counts of the guesses since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Tokens guessed and checked.
    pub guessed: u64,
    /// Of these, tokens that the model would have chosen itself.
    pub right: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    options: EngineOptions,
    scheduler: Scheduler,
    runner: Runner,
    requests: HashMap<RequestId, Active>,
    plan: Plan,
    events: Vec<Event>,
    draft: Vec<u32>,
    accepted: Vec<u32>,
    /// Rows of a step, and the tokens that followed them, for the prediction block.
    rows: Vec<u32>,
    next: Vec<u32>,
    /// What a constraint allows, and the logits that it leaves.
    allowed: TokenSet,
    masked: Vec<f32>,
    next_id: u64,
    draft_stats: DraftStats,
}

/// How many blocks of either kind the cache's memory is: those of windows for all requests that run together and as many again for known texts, if that is
/// not too much; the rest for the layers that see everything.
fn share_out(options: &EngineOptions, layout: &CacheLayout, max_len: usize) -> Result<(usize, Option<WindowOptions>)> {
    let small = || {
        let got = options.cache_bytes.to_string();
        Err(Error::Parameter {
            field: "cache_bytes",
            expected: "room for a block of 32 positions, and for a window and two blocks where the model has one",
            got,
        })
    };
    let (block, window_block) = (layout.block_bytes(), layout.window_block_bytes());
    let longest = max_len.div_ceil(BLOCK);
    // More than all sequences together could fill are of no use.
    let most = if options.prefix_cache { usize::MAX } else { options.max_batch_size.saturating_mul(longest) };
    let mut bytes = options.cache_bytes;
    let mut windows = None;
    if let Some(window) = layout.window {
        let fewest = WindowOptions::fewest(window, BLOCK);
        let each = (window + options.token_budget).div_ceil(BLOCK) + 1;
        let wanted = options.max_batch_size.saturating_mul(2 * each.min(longest + 1)).max(fewest);
        // No more of them than of the others, which each of them has beside it.
        let blocks = wanted.min(bytes / (block + window_block)).min(most.max(fewest));
        if blocks < fewest {
            return small();
        }
        bytes -= blocks * window_block;
        windows = Some(WindowOptions { window, blocks });
    }
    // Where all layers have windows, blocks of the others are numbers without memory.
    let blocks = bytes.checked_div(block).unwrap_or(options.max_batch_size.saturating_mul(2 * longest));
    let blocks = blocks.min(most);
    if blocks == 0 { small() } else { Ok((blocks, windows)) }
}

/// A request on its way.
#[derive(Debug)]
struct Active {
    prompt_tokens: usize,
    output_tokens: usize,
    params: SamplingParams,
    logprobs: Option<usize>,
    constraint: Option<Box<dyn Constraint>>,
    sampler: Sampler,
    drafter: Drafter,
    paragraphs: Ends,
    /// What the model's own prediction block guesses for the token after the next.
    predicted: Option<u32>,
}

impl Engine {
    /// An engine without requests.
    ///
    /// # Errors
    /// [`Error::Parameter`] for an option that makes no sense; [`Error::OutOfMemory`].
    pub fn new(model: Arc<Model>, options: EngineOptions) -> Result<Self> {
        let config = model.config();
        let max_len = if options.max_len == 0 { config.max_position_embeddings } else { options.max_len };
        if max_len > config.max_position_embeddings {
            return Err(Error::ContextLength { needed: max_len, limit: config.max_position_embeddings });
        }
        let (blocks, windows) = share_out(&options, &model.cache_layout(), max_len)?;
        // First of all, for a cache that is too large must be refused before lists are made of its blocks.
        let mut runner = Runner::new(&model, blocks, windows.map_or(0, |windows| windows.blocks))?;
        let scheduler = Scheduler::new(SchedulerOptions {
            block_size: BLOCK,
            blocks,
            max_batch_size: options.max_batch_size,
            token_budget: options.token_budget,
            dynamic_batching: options.dynamic_batching,
            prefix_cache: options.prefix_cache,
            max_len,
            windows,
        })?;
        runner.work.load = Arc::new(Load::new(config));
        // Lists of blocks grow while sequences do; up to a size that is not worth mentioning they need not.
        let listed = options.max_batch_size.saturating_mul(max_len.div_ceil(BLOCK)).min(1 << 16);
        runner.work.spans.full.reserve(listed);
        if config.mechanisms.paragraphs.is_some() {
            runner.work.spans.paragraphs.reserve(options.max_batch_size, listed);
        }
        let mut plan = Plan::default();
        plan.blocks.reserve(listed);
        if windows.is_some() {
            runner.work.spans.windowed.reserve(listed);
            plan.window_blocks.reserve(listed);
        }
        Ok(Engine {
            runner,
            model,
            options,
            scheduler,
            requests: HashMap::new(),
            plan,
            // A step brings a token for each row that asks for one, and may end every request.
            events: Vec::with_capacity(options.max_batch_size.saturating_mul(2).saturating_add(options.draft_batch).min(1 << 16)),
            draft: Vec::with_capacity(options.drafts.max_tokens.min(options.draft_batch)),
            accepted: Vec::with_capacity(options.draft_batch.min(1 << 16)),
            rows: Vec::new(),
            next: Vec::new(),
            allowed: TokenSet::default(),
            masked: Vec::new(),
            next_id: 0,
            draft_stats: DraftStats::default(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Measures where the time of the model's steps goes from now on, or no more.
    pub fn set_profile(&mut self, on: bool) {
        self.runner.work.profile.set(on);
    }

    /// Where the time went since.
    pub fn profile(&self) -> &Profile {
        &self.runner.work.profile
    }

    /// Most tokens of a request, prompt and answer together.
    pub fn max_len(&self) -> usize {
        self.scheduler.max_len()
    }

    /// A new request at the end of the queue.
    ///
    /// # Errors
    /// A parameter out of range, an empty prompt, one with unknown tokens or longer than the context.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        self.submit_with(request, None)
    }

    /// A new request at the end of the queue whose answer obeys a constraint: other tokens are taken out before the sampler sees the logits, so that
    /// it draws from what is left of the model's distribution. Log-probabilities stay the model's own. The answer ends when nothing more may follow.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn submit_constrained(&mut self, request: Request, constraint: Box<dyn Constraint>) -> Result<RequestId> {
        self.submit_with(request, Some(constraint))
    }

    fn submit_with(&mut self, request: Request, constraint: Option<Box<dyn Constraint>>) -> Result<RequestId> {
        let mut sampler = Sampler::new(&request.params)?;
        self.model.check_ids(&request.prompt)?;
        let vocab = self.model.config().vocab_size;
        if let Some((id, _)) = request.params.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
            return Err(Error::Parameter { field: "logit_bias", expected: "tokens of the vocabulary", got: id.to_string() });
        }
        sampler.observe_prompt(&request.prompt);
        let id = SequenceId(self.next_id);
        let prompt_tokens = request.prompt.len();
        self.scheduler.submit(id, request.prompt, request.params.max_tokens)?;
        self.next_id += 1;
        let foreseen = request.params.max_tokens.min(MAX_FORESEEN).min(self.max_len());
        let drafter = Drafter::new(self.options.drafts, prompt_tokens + foreseen);
        let longest = if self.model.config().mechanisms.paragraphs.is_some() { self.max_len() } else { 0 };
        let active = Active {
            prompt_tokens,
            output_tokens: 0,
            params: request.params,
            logprobs: request.logprobs,
            constraint,
            sampler,
            drafter,
            paragraphs: Ends::with_capacity(longest),
            predicted: None,
        };
        self.requests.insert(id, active);
        Ok(id)
    }

    /// Ends a request at once; nothing more will come of it. Returns whether there was one.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.requests.remove(&id);
        self.scheduler.cancel(id)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Queue, cache and preemptions.
    pub fn stats(&self) -> Stats {
        self.scheduler.stats()
    }

    /// Memory of the keys and values of the requests that are being computed.
    pub fn kv_bytes_in_use(&self) -> usize {
        let (stats, layout) = (self.scheduler.stats(), self.model.cache_layout());
        (stats.blocks - stats.free_blocks - stats.cached_blocks) * layout.block_bytes()
            + (stats.window_blocks - stats.free_window_blocks - stats.cached_window_blocks) * layout.window_block_bytes()
    }

    /// What experts and heads had to do; may be kept and read at any time.
    pub fn load(&self) -> &Arc<Load> {
        &self.runner.work.load
    }

    /// Changes [`EngineOptions::max_batch_size`] and [`EngineOptions::dynamic_batching`] from the next step on. Nothing that runs is interrupted: a batch
    /// that has become too large takes nobody in until enough of it has ended.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a batch of none.
    pub fn set_batching(&mut self, max_batch_size: usize, dynamic_batching: bool) -> Result<()> {
        self.scheduler.set_batching(max_batch_size, dynamic_batching)
    }

    /// Guesses and how many were right.
    pub fn draft_stats(&self) -> DraftStats {
        self.draft_stats
    }

    /// Computes one step and returns what it brought; nothing if there is nothing to do.
    pub fn step(&mut self) -> &[Event] {
        self.events.clear();
        if self.scheduler.is_idle() {
            return &self.events;
        }
        self.guess();
        self.scheduler.plan(&mut self.plan);
        let work = &mut self.runner.work;
        work.spans.clear();
        work.wanted.clear();
        work.gates.drafts.clear();
        for item in &self.plan.items {
            work.gates.drafts.push(item.drafts);
            work.spans.full.push(item.tokens.len(), item.start, &self.plan.blocks[item.blocks.clone()]);
            if self.model.has_windows() {
                let blocks = &self.plan.window_blocks[item.window_blocks.clone()];
                work.spans.windowed.push_from(item.tokens.len(), item.start, item.gone, blocks);
            }
            if let Some(rule) = &self.model.config().mechanisms.paragraphs
                && let (Some(request), Some(tokens)) = (self.requests.get_mut(&item.id), self.scheduler.tokens(item.id))
            {
                request.paragraphs.follow(rule, tokens);
                let guesses = &self.plan.tokens[item.tokens.end - item.drafts..item.tokens.end];
                let (last, blocks) = (item.start + item.tokens.len(), &self.plan.blocks[item.blocks.clone()]);
                request.paragraphs.push_to(&mut work.spans.paragraphs, rule, guesses, item.start, last, blocks);
            }
            work.wanted.extend((item.tokens.end - item.samples) as u32..item.tokens.end as u32);
        }
        self.runner.step(&self.model, &self.plan.tokens);
        let plan = std::mem::take(&mut self.plan);
        let mut row = 0;
        for (index, item) in plan.items.iter().enumerate() {
            let guesses = &plan.tokens[item.tokens.end - item.drafts..item.tokens.end];
            self.choose(item.id, guesses, row, item.samples, index);
            row += item.samples;
        }
        if self.model.predicts() && self.options.drafts.max_tokens > 0 {
            self.predict(&plan);
        }
        self.plan = plan;
        &self.events
    }

    /// Guesses for the decoding sequences, if they are few enough.
    fn guess(&mut self) {
        let running = self.scheduler.running().len();
        if self.options.drafts.max_tokens == 0 || running == 0 {
            return;
        }
        let most = (self.options.draft_batch / running).saturating_sub(1);
        for index in 0..running {
            let id = self.scheduler.running()[index];
            if most == 0 || !self.scheduler.is_decoding(id) {
                continue;
            }
            let (Some(request), Some(tokens)) = (self.requests.get_mut(&id), self.scheduler.tokens(id)) else { continue };
            request.drafter.guess(tokens, most, &mut self.draft);
            if self.draft.is_empty() {
                self.draft.extend(request.predicted);
            }
            self.scheduler.set_draft(id, &self.draft);
        }
    }

    /// Lets the model's prediction block guess the token after the next of every sequence that got a token. The block has keys and values of its own for
    /// every position, so it also follows prompts that are not done. At the end of a block of the cache it has seen the token that followed there,
    /// which another text that shares the block need not have: such a guess may be worse, never wrong.
    fn predict(&mut self, plan: &Plan) {
        let work = &mut self.runner.work;
        work.spans.clear();
        work.wanted.clear();
        self.rows.clear();
        self.next.clear();
        for item in &plan.items {
            let Some(tokens) = self.scheduler.tokens(item.id) else { continue };
            // Rows of guesses that were wrong are no part of the text.
            let count = item.tokens.len().min(tokens.len() - 1 - item.start);
            if count == 0 {
                continue;
            }
            work.spans.full.push(count, item.start, &plan.blocks[item.blocks.clone()]);
            self.rows.extend((item.tokens.start..item.tokens.start + count).map(|row| row as u32));
            self.next.extend_from_slice(&tokens[item.start + 1..item.start + 1 + count]);
            if item.samples > 0 {
                work.wanted.push(self.rows.len() as u32 - 1);
            }
        }
        if self.rows.is_empty() {
            return;
        }
        self.runner.predict(&self.model, &self.rows, &self.next);
        let vocab = self.model.config().vocab_size;
        let items = plan.items.iter().filter(|item| item.samples > 0 && self.scheduler.tokens(item.id).is_some());
        for (item, logits) in items.zip(self.runner.work.logits.chunks_exact(vocab)) {
            let (max, _) = kernels::largest(logits);
            let guess = kernels::first_equal(logits, max).map(|id| id as u32);
            if let Some(request) = self.requests.get_mut(&item.id) {
                request.predicted = guess;
            }
        }
    }

    /// Chooses the tokens that follow an item, from its logits at `row..row + samples`: as long as what is chosen was guessed, the next logits are
    /// those of the text as it is. What is drawn is the same as without guesses, for each token is drawn from its own distribution in its turn.
    fn choose(&mut self, id: RequestId, guesses: &[u32], row: usize, samples: usize, span: usize) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let vocab = self.model.config().vocab_size;
        self.accepted.clear();
        let mut finish = None;
        for sample in 0..samples {
            let logits = &self.runner.work.logits[(row + sample) * vocab..][..vocab];
            let chosen = choose_one(request, logits, &mut self.allowed, &mut self.masked);
            let token = match chosen {
                Ok(token) => token,
                Err(Error::BadLogit { id: token, value }) => {
                    self.events.push(Event::Failed { id, token, value });
                    self.cancel(id);
                    return;
                }
                Err(Error::Constraint { reason }) => {
                    self.events.push(Event::Stuck { id, reason });
                    self.cancel(id);
                    return;
                }
                Err(error) => unreachable!("the parameters were checked: {error}"),
            };
            let (logprob, top) = match request.logprobs {
                None => (None, Vec::new()),
                Some(count) => {
                    let scores = LogProbs::of(logits);
                    (Some(scores.of_token(token)), scores.top(count))
                }
            };
            self.events.push(Event::Token { id, token, logprob, top });
            self.accepted.push(token);
            request.output_tokens += 1;
            let ends = request.params.stop_ids.contains(&token)
                || (!request.params.ignore_eos && self.model.config().eos_token_id.contains(&token))
                || request.constraint.as_ref().is_some_and(|constraint| constraint.is_complete());
            if ends {
                finish = Some(FinishReason::Stop);
                break;
            }
            if self.accepted.len() == self.scheduler.remaining(id) {
                finish = Some(FinishReason::Length);
                break;
            }
            if guesses.get(sample) != Some(&token) {
                break;
            }
        }
        let right = self.accepted.iter().zip(guesses).take_while(|(a, b)| a == b).count();
        // A guess of the prediction block is always one token long.
        if request.predicted.is_none() || guesses.len() > 1 {
            request.drafter.learn(guesses.len(), right);
        }
        self.draft_stats.guessed += guesses.len() as u64;
        self.draft_stats.right += right as u64;
        if self.model.has_gates() {
            self.runner.accept(span, self.accepted.len().saturating_sub(1));
        }
        self.scheduler.commit(id, &self.accepted, finish.is_some());
        if let Some(reason) = finish {
            let (prompt_tokens, output_tokens) = (request.prompt_tokens, request.output_tokens);
            self.requests.remove(&id);
            self.events.push(Event::Finished { id, reason, prompt_tokens, output_tokens });
        }
    }
}

/// The next token of a request: one that its constraint allows, if it has one.
fn choose_one(request: &mut Active, logits: &[f32], allowed: &mut TokenSet, masked: &mut Vec<f32>) -> Result<u32> {
    let Some(constraint) = &mut request.constraint else { return request.sampler.sample(logits) };
    let stuck = |reason| Error::Constraint { reason };
    allowed.clear();
    constraint.allow(allowed).map_err(stuck)?;
    allowed.mask(logits, masked);
    // Numbers that are damaged are the model's fault even where they are masked.
    let token = match kernels::largest(masked).0 == f32::NEG_INFINITY && !kernels::largest(logits).1 {
        true => return Err(stuck("no token may follow".to_owned())),
        false => request.sampler.sample(masked)?,
    };
    constraint.accept(token).map_err(stuck)?;
    Ok(token)
}
