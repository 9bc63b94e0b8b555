//! The answers to one request: handed to the engine together, gathered or streamed as they come.
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use ernie_engine::{FinishReason, Request, SamplingParams};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use utoipa::ToSchema;

use crate::accounts::charge::Charge;
use crate::accounts::in_use::Term;
use crate::api_error::ApiError;
use crate::exchange::Notes;
use crate::grammar::GrammarConstraint;
use crate::metrics::StreamGuard;
use crate::state::State;
use crate::worker::{Event, Job, Places, Task, Token};

/// A stream that has nothing to say says so this often, so that nobody between takes it for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Of the prompts.
    pub prompt_tokens: usize,
    /// Of the answers, with those that ended them.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
}

impl Usage {
    /// Of so many.
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// What OpenAI calls it.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    if reason == FinishReason::Length { "length" } else { "stop" }
}

/// One answer, finished.
#[derive(Debug, Default)]
pub struct Answer {
    /// Without what ended it.
    pub text: String,
    /// Tokens of the text.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub reason: Option<FinishReason>,
    /// Tokens chosen.
    pub count: usize,
}

/// Answers on their way.
#[derive(Debug)]
pub struct Answers {
    events: mpsc::Receiver<(usize, Event)>,
    count: usize,
    prompt_tokens: usize,
    charge: Charge,
    term: Term,
    notes: Notes,
}

/// What each answer of a request has in common.
#[derive(Debug)]
pub struct Wanted {
    /// Answers to each prompt.
    pub n: usize,
    /// Answer i of them has the seed plus i.
    pub params: SamplingParams,
    /// Alternatives reported for each token.
    pub logprobs: Option<usize>,
    /// What each must look like.
    pub constraint: Option<GrammarConstraint>,
}

impl Answers {
    /// Sends everything to the engine: `n` answers to each prompt, one after the other. `charge` pays, for each prompt once; `notes` are told what comes.
    pub fn start(state: &State, places: &mut Places, prompts: Vec<Vec<u32>>, wanted: &Wanted, (charge, notes): (Charge, Notes)) -> Self {
        let count = prompts.len() * wanted.n;
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let (sender, events) = mpsc::channel(state.config.stream_buffer.saturating_mul(count.max(1)));
        for (index, prompt) in prompts.into_iter().enumerate() {
            for number in 0..wanted.n {
                let params = SamplingParams { seed: wanted.params.seed.wrapping_add(number as u64), ..wanted.params.clone() };
                let request = Request { prompt: prompt.clone(), params, logprobs: wanted.logprobs };
                let task = match &wanted.constraint {
                    None => Task::Generate(request),
                    Some(constraint) => Task::Constrained(request, Box::new(constraint.clone())),
                };
                let charge = Some(if number == 0 { charge.clone() } else { charge.answers_only() });
                places.send(Job { task, index: index * wanted.n + number, events: sender.clone(), charge });
            }
        }
        Answers { events, count, prompt_tokens, term: state.term(&charge), charge, notes }
    }

    /// The next event; `None` if the engine has ended before the answers.
    ///
    /// # Errors
    /// The key is not taken any more, or the time is over: nothing else will come.
    async fn next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        let event = self.term.within(self.events.recv()).await;
        if event.is_err() {
            // The engine drops what nobody waits for.
            self.events.close();
        }
        event
    }

    /// All of them, in order.
    ///
    /// # Errors
    /// The engine refused or failed one, the key is not taken any more, the time is over, or what they used cannot be written down.
    pub async fn gather(mut self) -> Result<(Vec<Answer>, Usage), ApiError> {
        let mut answers: Vec<Answer> = (0..self.count).map(|_| Answer::default()).collect();
        let mut left = self.count;
        while left > 0 {
            let (index, event) = self.next().await?.ok_or_else(ended_early)?;
            let answer = &mut answers[index];
            match event {
                Event::Token(token) => {
                    self.notes.token(index, &token);
                    answer.text.push_str(&token.text);
                    if token.id.is_some() {
                        answer.tokens.push(token);
                    }
                }
                Event::Finished { text, reason, tokens } => {
                    self.notes.text(index, &text);
                    answer.text.push_str(&text);
                    (answer.reason, answer.count) = (Some(reason), tokens);
                    left -= 1;
                }
                Event::Failed(error) => return Err(ApiError::engine(&error, "prompt")),
                Event::Scores(_) | Event::Embedding(_) => unreachable!("only continuations were asked for"),
            }
        }
        self.charge.settle().await?;
        let usage = Usage::new(self.prompt_tokens, answers.iter().map(|answer| answer.count).sum());
        Ok((answers, usage))
    }

    /// As server-sent events, in the shape of `shape`, with `[DONE]` at the end.
    pub fn stream(self, state: &Arc<State>, permit: OwnedSemaphorePermit, mut shape: impl Shape) -> Response {
        let frames = (0..self.count).filter_map(|index| shape.open(index)).collect();
        let streaming = Streaming {
            left: self.count,
            answers: self,
            frames,
            shape,
            completion_tokens: 0,
            done: false,
            _counted: (permit, state.metrics.stream()),
        };
        let frames = futures_util::stream::unfold(streaming, |mut streaming| async move {
            let frame = streaming.next().await?;
            Some((Ok::<_, Infallible>(frame), streaming))
        });
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        (headers, Body::from_stream(frames)).into_response()
    }
}

/// The engine ended before the answer, or the answer was cut off because its reader was too slow.
fn ended_early() -> ApiError {
    ApiError::unavailable("The answer was cut off: the server is stopping, or it was read too slowly.")
}

/// How a stream's events look.
pub trait Shape: Send + 'static {
    /// What comes before an answer's first token.
    fn open(&mut self, index: usize) -> Option<Bytes>;
    /// A token; `None` if there is nothing to show.
    fn token(&mut self, index: usize, token: &Token) -> Option<Bytes>;
    /// The end of an answer, with the text that was still held back.
    fn end(&mut self, index: usize, text: &str, reason: FinishReason) -> Bytes;
    /// What [`Shape::end`] called the reason of an answer's end.
    fn reason(&self, index: usize, reason: FinishReason) -> &'static str;
    /// After all of them; `None` if it was not asked for.
    fn usage(&mut self, usage: Usage) -> Option<Bytes>;
}

/// One server-sent event.
pub fn frame(data: &impl Serialize) -> Bytes {
    // The types of this crate are JSON objects with text for keys.
    let json = serde_json::to_string(data).unwrap_or_else(|error| unreachable!("{error}"));
    Bytes::from(format!("data: {json}\n\n"))
}

struct Streaming<S> {
    answers: Answers,
    left: usize,
    frames: VecDeque<Bytes>,
    shape: S,
    completion_tokens: usize,
    done: bool,
    _counted: (OwnedSemaphorePermit, StreamGuard),
}

impl<S: Shape> Streaming<S> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(frame);
            }
            if self.done {
                return None;
            }
            if self.left == 0 {
                // The last events say that all went well; until its usage is written down it did not.
                match self.answers.charge.settle().await {
                    Ok(()) => {
                        let usage = Usage::new(self.answers.prompt_tokens, self.completion_tokens);
                        self.frames.extend(self.shape.usage(usage));
                        self.finish();
                    }
                    Err(error) => self.fail(&error),
                }
                continue;
            }
            match tokio::time::timeout(KEEP_ALIVE, self.answers.next()).await {
                Err(_) => return Some(Bytes::from_static(b": waiting\n\n")),
                Ok(Err(error)) => self.fail(&error),
                Ok(Ok(None)) => self.fail(&ended_early()),
                Ok(Ok(Some((index, event)))) => self.take(index, event),
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) {
        match event {
            Event::Token(token) => {
                self.answers.notes.token(index, &token);
                self.frames.extend(self.shape.token(index, &token));
            }
            Event::Finished { text, reason, tokens } => {
                self.completion_tokens += tokens;
                self.answers.notes.text(index, &text);
                self.frames.push_back(self.shape.end(index, &text, reason));
                self.answers.notes.finished(self.shape.reason(index, reason));
                self.left -= 1;
            }
            Event::Failed(error) => self.fail(&ApiError::engine(&error, "prompt")),
            Event::Scores(_) | Event::Embedding(_) => unreachable!("only continuations were asked for"),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.answers.notes.failed();
        self.frames.push_back(frame(&error.body()));
        self.finish();
    }

    fn finish(&mut self) {
        self.frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.done = true;
    }
}

/// How many tokens an answer may have. `wanted`: what was asked for, and in which field; `default` otherwise, as far as there is room.
///
/// # Errors
/// 400 if nothing was asked for, or more than fits.
pub fn room(state: &State, prompt: &[u32], field: &str, wanted: Option<(&'static str, usize)>, default: usize) -> Result<usize, ApiError> {
    let left = state.max_len.saturating_sub(prompt.len());
    match wanted {
        Some((name, 0)) => Err(ApiError::field(name, format!("`{name}`: expected a number ≥ 1, got 0"))),
        Some((name, most)) if most > left => Err(ApiError::too_long(name, prompt.len().saturating_add(most), state.max_len)),
        Some((_, most)) => Ok(most),
        None if left == 0 => Err(ApiError::too_long(field, prompt.len() + 1, state.max_len)),
        None => Ok(default.min(left)),
    }
}
