//! One conversation with a model: its tokens and their keys and values.
use ernie_kernels::paged::BLOCK;

use crate::drafts::DraftOptions;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::paragraphs::Ends;
use crate::past::WindowBlocks;
use crate::profile::Profile;
use crate::runner::Runner;

/// Prompt tokens that go through the layers together: enough that reading the weights is not what takes the time.
pub const PREFILL_CHUNK: usize = 256;

/// Tokens so far and the key/value cache for them. Logits are the same bits whether tokens come one by one, in chunks or all at once.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    max_len: usize,
    ids: Vec<u32>,
    runner: Runner,
    /// The cache's blocks, in order: a session has them to itself.
    blocks: Vec<u32>,
    /// Those of the layers that see a window, if there are any.
    windows: Option<WindowBlocks>,
    paragraphs: Ends,
    drafts: DraftOptions,
}

impl<'m> Session<'m> {
    /// An empty session for at most `max_len` tokens. Memory for the cache is taken as the session grows; that of layers which see a window stops growing with it.
    ///
    /// # Errors
    /// [`Error::Parameter`] if `max_len` is 0, [`Error::ContextLength`] if the model was not made for as many, [`Error::OutOfMemory`].
    pub fn new(model: &'m Model, max_len: usize) -> Result<Self> {
        // A block more than is seen: gates go back to the end of one, and a text is often taken back by a few tokens.
        Self::with_window(model, max_len, model.cache_layout().window.map(|window| window + BLOCK))
    }

    /// The same, but it keeps what its windows have passed: [`Session::truncate`] then goes back to any token, whatever the model's layers see.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn keeping_all(model: &'m Model, max_len: usize) -> Result<Self> {
        Self::with_window(model, max_len, model.cache_layout().window.map(|_| usize::MAX))
    }

    /// `window`: for how many positions back it keeps what layers with a window have; `None` without such layers.
    fn with_window(model: &'m Model, max_len: usize, window: Option<usize>) -> Result<Self> {
        let config = model.config();
        if max_len == 0 {
            return Err(Error::Parameter { field: "max_len", expected: "a number ≥ 1", got: "0".to_owned() });
        }
        if max_len > config.max_position_embeddings {
            return Err(Error::ContextLength { needed: max_len, limit: config.max_position_embeddings });
        }
        let blocks = max_len.div_ceil(BLOCK);
        let windows = window.map(|window| WindowBlocks::new(window, max_len, PREFILL_CHUNK));
        let runner = Runner::new(model, blocks, windows.as_ref().map_or(0, WindowBlocks::count))?;
        let (ids, blocks, paragraphs, drafts) = (Vec::new(), (0..blocks as u32).collect(), Ends::default(), DraftOptions { max_tokens: 0 });
        Ok(Session { model, max_len, ids, runner, blocks, windows, paragraphs, drafts })
    }

    /// The same session, with guesses of what follows checked together while text is generated in it: the same tokens, sooner where text repeats itself. Without
    /// this nothing is guessed, and of a model with gated heads never, for those keep no state between the ends of blocks to go back to.
    pub fn with_drafts(mut self, drafts: DraftOptions) -> Self {
        self.drafts = DraftOptions { max_tokens: if self.model.has_gates() { 0 } else { drafts.max_tokens } };
        self
    }

    /// How much is guessed.
    pub(crate) fn drafts(&self) -> DraftOptions {
        self.drafts
    }

    /// Measures where the time goes from now on, or no more.
    pub fn set_profile(&mut self, on: bool) {
        self.runner.work.profile.set(on);
    }

    /// Where the time went since.
    pub fn profile(&self) -> &Profile {
        &self.runner.work.profile
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Tokens so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Number of tokens so far.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Most tokens this session can hold.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Memory of the keys and values that it holds.
    pub fn kv_bytes_in_use(&self) -> usize {
        let layout = self.model.cache_layout();
        self.len().div_ceil(BLOCK) * layout.block_bytes()
            + self.windows.as_ref().map_or(0, WindowBlocks::in_use) * layout.window_block_bytes()
    }

    /// Forgets all but the first `len` tokens; of a model with gated heads, whose state is kept at the ends of blocks, perhaps up to 31 more. Where layers see a
    /// window and no longer have what the next token would see, more: perhaps all that came after the last prompt, and if that is cut too, all of it.
    /// [`Session::len`] tells what is left.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.ids.len() {
            return;
        }
        let len = if self.model.has_gates() { len / BLOCK * BLOCK } else { len };
        let len = self.windows.as_mut().map_or(len, |windows| windows.truncate(len));
        self.ids.truncate(len);
        self.paragraphs.truncate(len);
    }

    /// Forgets what differs from `prompt`, and its last token if all of it is known, so that its logits can be computed by a
    /// [`Session::prefill`] of the rest. Returns how many tokens of `prompt` remain known. The session can come back to this prompt until it is given another.
    pub fn keep_common_prefix(&mut self, prompt: &[u32]) -> usize {
        let common = self.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let all_but_one = prompt.len().saturating_sub(1);
        self.truncate(common.min(all_but_one));
        if let Some(windows) = &mut self.windows {
            // As gates have it: at the end of a block.
            windows.keep(if self.model.has_gates() { all_but_one / BLOCK * BLOCK } else { all_but_one });
        }
        self.len()
    }

    /// Appends tokens; returns the logits `[vocab]` after the last one.
    ///
    /// # Errors
    /// No or unknown tokens, more than fit, no memory; the session is then as it was.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<&[f32]> {
        self.check_room(ids)?;
        let chunks = ids.chunks(PREFILL_CHUNK);
        let count = chunks.len();
        for (index, chunk) in chunks.enumerate() {
            self.step(chunk, usize::from(index + 1 == count));
        }
        Ok(&self.runner.work.logits)
    }

    /// Appends one token; returns the logits `[vocab]` after it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, id: u32) -> Result<&[f32]> {
        self.prefill(&[id])
    }

    /// Appends a token that was chosen and those that are guessed to follow it; [`Session::logits`] has a row after each.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub(crate) fn check(&mut self, chosen_and_guesses: &[u32]) -> Result<()> {
        self.check_room(chosen_and_guesses)?;
        self.step(chosen_and_guesses, chosen_and_guesses.len());
        Ok(())
    }

    /// The logits of the last tokens, as they were asked for: `[wanted, vocab]`.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.runner.work.logits
    }

    /// Appends tokens; returns the logits `[last, vocab]` after each of the last `last` of them.
    ///
    /// # Errors
    /// As [`Session::prefill`]; [`Error::Parameter`] unless 1 ≤ `last` ≤ the number of tokens.
    pub fn logits_for(&mut self, ids: &[u32], last: usize) -> Result<Vec<f32>> {
        if last == 0 || last > ids.len() {
            self.model.check_ids(ids)?;
            return Err(Error::Parameter {
                field: "last",
                expected: "a number from 1 to the number of tokens given",
                got: last.to_string(),
            });
        }
        self.check_room(ids)?;
        let mut logits = Vec::new();
        let mut done = 0;
        for chunk in ids.chunks(PREFILL_CHUNK) {
            done += chunk.len();
            let wanted = done.saturating_sub(ids.len() - last).min(chunk.len());
            self.step(chunk, wanted);
            logits.extend_from_slice(&self.runner.work.logits);
        }
        Ok(logits)
    }

    /// Appends tokens; returns the model's final states `[tokens, hidden]`, after the last norm: what the head turns into logits.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn states_for(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check_room(ids)?;
        let hidden = self.model.config().hidden_size;
        let mut states_th = vec![0.0; ids.len() * hidden];
        for (chunk, states_ch) in ids.chunks(PREFILL_CHUNK).zip(states_th.chunks_mut(PREFILL_CHUNK * hidden)) {
            self.step(chunk, 0);
            self.model.final_states(&self.runner.work, states_ch);
        }
        Ok(states_th)
    }

    /// Appends tokens; returns the logits of the checkpoint's multi-token-prediction block, `[tokens − 1, vocab]`: row j, at its position and told the token
    /// that follows, scores the token after that. `None` if the checkpoint has no such block. For an empty session.
    ///
    /// # Errors
    /// As [`Session::prefill`]; [`Error::Parameter`] if the session has tokens or fewer than two are given.
    pub fn logits_ahead(&mut self, ids: &[u32]) -> Result<Option<Vec<f32>>> {
        self.check_room(ids)?;
        if !self.is_empty() || ids.len() < 2 {
            let got = format!("{} after {}", ids.len(), self.len());
            return Err(Error::Parameter { field: "ids", expected: "at least two tokens for an empty session", got });
        }
        if !self.model.predicts() {
            return Ok(None);
        }
        let (count, mut logits) = (ids.len() - 1, Vec::new());
        for start in (0..count).step_by(PREFILL_CHUNK) {
            let end = (start + PREFILL_CHUNK).min(count);
            self.step(&ids[start..end], 0);
            let work = &mut self.runner.work;
            work.spans.clear();
            work.spans.full.push(end - start, start, &self.blocks[..end.div_ceil(BLOCK)]);
            work.wanted.clear();
            work.wanted.extend(0..(end - start) as u32);
            let rows: Vec<u32> = (0..(end - start) as u32).collect();
            self.runner.predict(self.model, &rows, &ids[start + 1..=end]);
            logits.extend_from_slice(&self.runner.work.logits);
        }
        self.step(&ids[count..], 0);
        Ok(Some(logits))
    }

    fn check_room(&self, ids: &[u32]) -> Result<()> {
        self.model.check_ids(ids)?;
        let needed = self.len() + ids.len();
        if needed > self.max_len { Err(Error::ContextLength { needed, limit: self.max_len }) } else { Ok(()) }
    }

    /// Tokens through the model, at most [`PREFILL_CHUNK`], logits for the last `wanted` of them.
    fn step(&mut self, ids: &[u32], wanted: usize) {
        let work = &mut self.runner.work;
        let start = self.ids.len();
        work.spans.clear();
        work.gates.drafts.clear();
        let blocks = &self.blocks[..(start + ids.len()).div_ceil(BLOCK)];
        work.spans.full.push(ids.len(), start, blocks);
        if let Some(windows) = &mut self.windows {
            let (gone, blocks) = windows.step(start, ids.len());
            work.spans.windowed.push_from(ids.len(), start, gone, blocks);
        }
        if let Some(rule) = &self.model.config().mechanisms.paragraphs {
            self.paragraphs.follow(rule, &self.ids);
            self.paragraphs.push_to(&mut work.spans.paragraphs, rule, ids, start, start + ids.len(), blocks);
        }
        work.wanted.clear();
        work.wanted.extend(ids.len() as u32 - wanted as u32..ids.len() as u32);
        self.runner.step(self.model, ids);
        self.ids.extend_from_slice(ids);
    }
}
