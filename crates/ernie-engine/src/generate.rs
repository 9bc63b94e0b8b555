//! A prompt continued until something ends it.
use std::ops::ControlFlow;
use std::time::Instant;

use crate::drafts::{CHECKED_TOGETHER, Drafter};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sampler::{Sampler, SamplingParams};
use crate::session::Session;
use crate::stop::StopMatcher;

/// Turns tokens into text, piece by piece; whole characters only. Implemented for the tokenizer's streaming decoder, and for `()`, which gives no
/// text: for models without a tokenizer.
pub trait TextDecoder {
    /// The characters that are complete now that `id` has come; may be empty.
    fn push(&mut self, id: u32) -> String;
    /// What is left at the end.
    fn finish(&mut self) -> String;
}

impl TextDecoder for () {
    fn push(&mut self, _: u32) -> String {
        String::new()
    }
    fn finish(&mut self) -> String {
        String::new()
    }
}

impl TextDecoder for ernie_checkpoint::DecodeStream<'_> {
    fn push(&mut self, id: u32) -> String {
        self.push(id)
    }
    fn finish(&mut self) -> String {
        self.finish()
    }
}

impl<D: TextDecoder + ?Sized> TextDecoder for &mut D {
    fn push(&mut self, id: u32) -> String {
        (**self).push(id)
    }
    fn finish(&mut self) -> String {
        (**self).finish()
    }
}

/// One step of a generation, for the caller who shows it as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The token just chosen; `None` at the very end, when held-back text is released.
    pub token: Option<u32>,
    /// Text that can be shown now: never part of a stop string or of a character; may be empty.
    pub text: &'a str,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token or one of `stop_ids`.
    Stop,
    /// One of the strings in `stop`.
    StopString,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The callback asked for it.
    Cancelled,
}

impl FinishReason {
    /// Lower-case name, as it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::StopString => "stop_string",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// Where the time went. Seconds of wall-clock time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose keys and values the session still had.
    pub cached_tokens: usize,
    /// Time for the other prompt tokens.
    pub prefill_seconds: f64,
    /// From the call to the first token.
    pub first_token_seconds: f64,
    /// Time for the tokens after the first.
    pub decode_seconds: f64,
    /// Tokens after the first, per second of `decode_seconds`; 0 if there are none.
    pub decode_tokens_per_second: f64,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Every token chosen, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Their text without the ending token or stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Where the time went.
    pub timings: Timings,
}

/// Continues `prompt` with a fresh session. See [`generate_in`].
///
/// # Errors
/// As [`generate_in`].
pub fn generate(
    model: &Model,
    prompt: &[u32],
    params: &SamplingParams,
    decoder: impl TextDecoder,
    on_token: impl FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Generation> {
    let limit = model.config().max_position_embeddings;
    let mut session = Session::new(model, limit.min(prompt.len().saturating_add(params.max_tokens)))?;
    generate_in(&mut session, prompt, params, decoder, on_token)
}

/// Continues `prompt` in a session, keeping what the session already holds of it: the result is the same, sooner. `on_token` is called after each
/// token and can end the generation; no call is made for an ending token's text, since it has none.
///
/// # Errors
/// A parameter out of range, an empty prompt, one with unknown tokens or longer than the context (all before anything is computed);
/// [`Error::BadLogit`]; no memory for the cache.
pub fn generate_in(
    session: &mut Session<'_>,
    prompt: &[u32],
    params: &SamplingParams,
    mut decoder: impl TextDecoder,
    mut on_token: impl FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Generation> {
    let began = Instant::now();
    let mut sampler = Sampler::new(params)?;
    session.model().check_ids(prompt)?;
    if prompt.len() > session.max_len() {
        return Err(Error::ContextLength { needed: prompt.len(), limit: session.max_len() });
    }
    let model = session.model();
    let ends = |id: u32| params.stop_ids.contains(&id) || (!params.ignore_eos && model.config().eos_token_id.contains(&id));
    sampler.observe_prompt(prompt);
    let mut stops = StopMatcher::new(&params.stop);
    let (mut tokens, mut text) = (Vec::new(), String::new());
    let mut timings = Timings { prompt_tokens: prompt.len(), ..Timings::default() };
    let vocab = model.config().vocab_size;
    // What is known of the text, for guesses.
    let mut known = prompt.to_vec();
    let mut drafter = Drafter::new(session.drafts(), known.len());
    // The token chosen last with the guesses after it, as they were computed together, and the row of logits that is looked at.
    let (mut checked, mut row) = (Vec::new(), 0);

    timings.cached_tokens = session.keep_common_prefix(prompt);
    let logits = session.prefill(&prompt[timings.cached_tokens..])?;
    timings.prefill_seconds = began.elapsed().as_secs_f64();
    let mut next = sampler.sample(logits)?;
    timings.first_token_seconds = began.elapsed().as_secs_f64();

    let finish_reason = loop {
        tokens.push(next);
        let ended = ends(next);
        let piece = if ended { String::new() } else { stops.push(&decoder.push(next)) };
        text.push_str(&piece);
        let flow = on_token(Event { token: Some(next), text: &piece });
        if ended {
            break FinishReason::Stop;
        }
        if stops.found() {
            break FinishReason::StopString;
        }
        if flow.is_break() {
            break FinishReason::Cancelled;
        }
        // The last token is chosen and never computed.
        let room = session.max_len() - known.len();
        if tokens.len() == params.max_tokens || room == 0 {
            break FinishReason::Length;
        }
        known.push(next);
        if checked.get(row + 1) == Some(&next) {
            // Guessed right: what follows is computed already.
            row += 1;
        } else {
            drafter.learn(checked.len().saturating_sub(1), row);
            session.truncate(known.len() - 1);
            let most = (room - 1).min(params.max_tokens - tokens.len() - 1).min(CHECKED_TOGETHER - 1);
            drafter.guess(&known, most, &mut checked);
            checked.insert(0, next);
            row = 0;
            session.check(&checked)?;
        }
        next = sampler.sample(&session.logits()[row * vocab..][..vocab])?;
    };
    // Of guesses that were not reached nothing stays.
    session.truncate(known.len());
    timings.decode_seconds = began.elapsed().as_secs_f64() - timings.first_token_seconds;
    if tokens.len() > 1 {
        timings.decode_tokens_per_second = (tokens.len() - 1) as f64 / timings.decode_seconds.max(f64::MIN_POSITIVE);
    }
    if finish_reason == FinishReason::StopString {
        return Ok(Generation { tokens, text, finish_reason, timings });
    }
    // A character cut off by the end may complete a stop string only now.
    let mut rest = stops.push(&decoder.finish());
    let finish_reason = if stops.found() { FinishReason::StopString } else { finish_reason };
    if !stops.found() {
        rest.push_str(&stops.finish());
    }
    if !rest.is_empty() {
        text.push_str(&rest);
        // Nothing is left to cancel.
        let _ = on_token(Event { token: None, text: &rest });
    }
    Ok(Generation { tokens, text, finish_reason, timings })
}
