//! `POST /v1/completions`: a text continued.
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use ernie_checkpoint::Tokenizer;
use ernie_engine::FinishReason;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::accounts::charge::Charge;
use crate::accounts::in_use::Term;
use crate::answer::{Answers, Shape, Usage, Wanted, finish_reason, frame, room};
use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::exchange::Notes;
use crate::fields::{self, Known};
use crate::grammar::Form;
use crate::numbers::whole;
use crate::prompt::Prompt;
use crate::request_id::RequestId;
use crate::sampling::{MAX_TOP_LOGPROBS, Sampling};
use crate::state::{Shared, State, unix_seconds};
use crate::structured::Structured;
use crate::token_text::{token_bytes, token_text};
use crate::whole::Score;
use crate::worker::{Event, Job, Places, Task, Token};

/// Tokens of an answer if nothing was said, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// What is continued.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Completion {
    /// Text or token ids, one or several.
    pub prompt: Prompt,
    /// Begin the answer with the prompt; with `logprobs` report its tokens too.
    #[serde(default)]
    pub echo: Option<bool>,
    /// Report each token's log-probability, and as many of the likeliest in its place, at most 20.
    #[serde(default, deserialize_with = "whole")]
    #[schema(maximum = 20)]
    pub logprobs: Option<u32>,
    /// Only that of `n` is supported.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1, maximum = 128)]
    pub best_of: Option<u32>,
    /// Not supported.
    #[serde(default)]
    #[schema(max_length = 0)]
    pub suffix: Option<String>,
}

/// The body of a request.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionRequest {
    /// What is continued.
    #[serde(flatten)]
    pub completion: Completion,
    /// How.
    #[serde(flatten)]
    pub sampling: Sampling,
    /// In what form.
    #[serde(flatten)]
    pub structured: Structured,
}

/// The answer, whole or an event of a stream.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionResponse {
    /// `cmpl-` and the request's id.
    pub id: String,
    /// `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// `n` answers to each prompt, one prompt after the other; in a stream one answer's next piece.
    pub choices: Vec<CompletionChoice>,
    /// Of the whole request; in a stream, if asked for, in its last event, and null in those before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

/// One answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Its number.
    pub index: usize,
    /// Its text, or the next piece of it.
    pub text: String,
    /// If they were asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null while it goes on.
    pub finish_reason: Option<&'static str>,
}

/// Tokens and how likely they were, one entry for each in every list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// As text.
    pub tokens: Vec<String>,
    /// ln of the probability under the model; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens in its place; null for the first token of a prompt.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Characters of the text before the token; of a token that begins inside a character, before that.
    pub text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, logprob: Option<f32>, top: &[(u32, f32)], offset: &mut Offset) {
        self.text_offset.push(offset.characters);
        offset.push(&token_bytes(tokenizer, id));
        self.tokens.push(token_text(tokenizer, id));
        self.token_logprobs.push(logprob.map(finite));
        // Of tokens that read alike the likeliest counts: it comes last.
        let top = logprob.map(|_| top.iter().rev().map(|&(id, logprob)| (token_text(tokenizer, id), finite(logprob))).collect());
        self.top_logprobs.push(top);
    }
}

/// How far a text has come, of which tokens are pieces that may end inside a character.
#[derive(Clone, Debug, Default)]
struct Offset {
    /// Those that are whole.
    characters: usize,
    /// The beginning of the next.
    begun: Vec<u8>,
}

impl Offset {
    fn push(&mut self, bytes: &[u8]) {
        self.begun.extend_from_slice(bytes);
        let mut left = 0;
        let mut chunks = self.begun.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.characters += chunk.valid().chars().count();
            // What may still become a character waits; what cannot is one, U+FFFD.
            match std::str::from_utf8(chunk.invalid()) {
                Err(error) if error.error_len().is_none() && chunks.peek().is_none() => left = chunk.invalid().len(),
                Err(_) => self.characters += 1,
                Ok(_) => {}
            }
        }
        self.begun.drain(..self.begun.len() - left);
    }
}

/// JSON has no infinity; OpenAI's servers write −9999.
pub fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// A prompt as an answer repeats it.
#[derive(Clone, Debug, Default)]
struct Echo {
    text: String,
    logprobs: Option<CompletionLogprobs>,
    /// Where the tokens' texts end.
    end: Offset,
}

/// Everything about a request, checked.
struct Prepared {
    prompts: Vec<Vec<u32>>,
    /// Texts of the prompts, if they are to be repeated.
    echo: Option<Vec<String>>,
    /// `None`: nothing is to be generated.
    wanted: Option<Wanted>,
    n: usize,
    logprobs: Option<usize>,
}

fn prepare(state: &State, request: CompletionRequest) -> Result<Prepared, ApiError> {
    let CompletionRequest { completion, sampling, structured } = request;
    state.check_model(sampling.model.as_deref())?;
    let n = sampling.n()?;
    if completion.best_of.is_some_and(|best_of| best_of as usize != n) {
        return Err(ApiError::unsupported("best_of", "must equal `n`"));
    }
    if completion.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "is not supported"));
    }
    let logprobs = completion.logprobs.map(|top| top as usize);
    if let Some(top) = logprobs.filter(|top| *top > MAX_TOP_LOGPROBS as usize) {
        return Err(ApiError::field("logprobs", format!("`logprobs`: expected at most {MAX_TOP_LOGPROBS}, got {top}")));
    }
    let repeats = completion.echo.unwrap_or(false);
    let texts = match &completion.prompt {
        Prompt::Text(text) if repeats => Some(vec![text.clone()]),
        Prompt::Texts(texts) if repeats => Some(texts.clone()),
        _ => None,
    };
    let prompts = completion.prompt.encode(state, "prompt")?;
    let echo = repeats.then(|| texts.unwrap_or_else(|| prompts.iter().map(|ids| state.tokenizer.decode(ids, true)).collect()));
    let max_tokens = sampling.max_tokens();
    let wanted = if repeats && matches!(max_tokens, Some((_, 0))) {
        sampling.params(0, 1)?;
        None
    } else {
        let rooms = prompts.iter().map(|ids| room(state, ids, "prompt", max_tokens, DEFAULT_MAX_TOKENS));
        // One number for all: without one the engine ends each at the context's end.
        let most = rooms.collect::<Result<Vec<_>, _>>()?.into_iter().max().unwrap_or(DEFAULT_MAX_TOKENS);
        let params = sampling.params(state.random(), most)?;
        let constraint = state.constraint(Form::default(), structured.rule()?, &params)?;
        Some(Wanted { n, params, logprobs, constraint })
    };
    Ok(Prepared { prompts, echo, wanted, n, logprobs })
}

/// Continue texts
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest, responses(
    (status = 200, description = "The answers; with `stream` as server-sent events, each a CompletionResponse", content(
        (CompletionResponse = "application/json"), (String = "text/event-stream"),
    )),
))]
pub async fn completions(
    Extract(state): Extract<Shared>,
    Extension(RequestId(id)): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    Extension(notes): Extension<Notes>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    fields::check(&body, &Known::of("CompletionRequest"))?;
    let request = CompletionRequest { completion: body.parse()?, sampling: body.parse()?, structured: body.parse()? };
    let (streams, usage_wanted) = (request.sampling.streams()?, request.sampling.includes_usage());
    let Prepared { prompts, echo, wanted, n, logprobs } = state.compute(|state| prepare(state, request)).await?;
    let scored = echo.is_some() && logprobs.is_some();
    let jobs = if scored { prompts.len() } else { 0 } + wanted.as_ref().map_or(0, |wanted| prompts.len() * wanted.n);
    let permit = if streams { Some(state.stream()?) } else { None };
    let mut places = state.reserve(jobs)?;
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let most = wanted.as_ref().map_or(0, |wanted| (prompts.len() * wanted.n).saturating_mul(wanted.params.max_tokens));
    let mut charge = state.accounts.admit(&caller, &state.name, prompt_tokens, most).await?;
    notes.begin("text_completion", &state.name, prompt_tokens, || prompts.iter().map(|ids| state.tokenizer.decode(ids, false)).collect());
    let mut echoes: Vec<Echo> = echo.into_iter().flatten().map(|text| Echo { text, ..Echo::default() }).collect();
    if let Some(top) = logprobs.filter(|_| scored) {
        let scores = score(&mut places, &prompts, top, (&charge, state.term(&charge))).await?;
        charge = charge.answers_only();
        let ids = prompts.clone();
        let logprobs =
            state.compute(move |state| Ok(ids.iter().zip(&scores).map(|(ids, scores)| report(state, ids, scores)).collect::<Vec<_>>()));
        for (echo, (logprobs, end)) in echoes.iter_mut().zip(logprobs.await?) {
            (echo.logprobs, echo.end) = (Some(logprobs), end);
        }
    }
    let shape = CompletionShape {
        head: CompletionResponse {
            id: format!("cmpl-{id}"),
            object: "text_completion",
            created: unix_seconds(),
            model: state.name.clone(),
            choices: Vec::new(),
            usage: (streams && usage_wanted).then_some(None),
        },
        tokenizer: Arc::clone(&state.tokenizer),
        offsets: (0..prompts.len() * n).map(|index| echoes.get(index / n).map_or_else(Offset::default, |echo| echo.end.clone())).collect(),
        logprobs: logprobs.is_some(),
        usage_wanted,
        echoes,
        n,
    };
    // Without anything to generate there is nothing to wait for: a stream of no tokens.
    let nothing = Wanted { n: 0, params: Default::default(), logprobs, constraint: None };
    let generates = wanted.is_some();
    let answers = Answers::start(&state, &mut places, prompts, wanted.as_ref().unwrap_or(&nothing), (charge, notes.clone()));
    match permit {
        Some(_) if !generates => Err(ApiError::field("stream", "`stream`: there is nothing to stream with `max_tokens` 0")),
        Some(permit) => Ok(answers.stream(&state, permit, shape)),
        None => {
            let mut answers = answers.gather().await?;
            if !generates {
                answers.0 = shape
                    .offsets
                    .iter()
                    .map(|_| crate::answer::Answer { reason: Some(FinishReason::Length), ..Default::default() })
                    .collect();
                answers.1 = Usage::new(prompt_tokens, 0);
            }
            let response = shape.whole(answers);
            response.choices.iter().filter_map(|choice| choice.finish_reason).for_each(|reason| notes.finished(reason));
            Ok(Json(response).into_response())
        }
    }
}

/// The log-probabilities of the prompts' own tokens.
async fn score(
    places: &mut Places,
    prompts: &[Vec<u32>],
    top: usize,
    (charge, mut term): (&Charge, Term),
) -> Result<Vec<Vec<Score>>, ApiError> {
    let (sender, mut events) = mpsc::channel(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        places.send(Job { task: Task::Score { prompt: prompt.clone(), top }, index, events: sender.clone(), charge: Some(charge.clone()) });
    }
    drop(sender);
    let mut all = vec![Vec::new(); prompts.len()];
    while let Some((index, event)) = term.within(events.recv()).await? {
        match event {
            Event::Scores(scores) => all[index] = scores,
            Event::Failed(error) => return Err(ApiError::engine(&error, "prompt")),
            other => unreachable!("scores were asked for, not {other:?}"),
        }
    }
    if all.iter().any(Vec::is_empty) {
        return Err(ApiError::unavailable("The server is stopping."));
    }
    Ok(all)
}

/// A prompt's tokens as an answer reports them, and where their texts end.
fn report(state: &State, ids: &[u32], scores: &[Score]) -> (CompletionLogprobs, Offset) {
    let (mut logprobs, mut end) = (CompletionLogprobs::default(), Offset::default());
    for (id, score) in ids.iter().zip(scores) {
        logprobs.push(&state.tokenizer, *id, score.logprob, &score.top, &mut end);
    }
    (logprobs, end)
}

/// How answers are written.
struct CompletionShape {
    head: CompletionResponse,
    tokenizer: Arc<Tokenizer>,
    /// Where each answer has come to.
    offsets: Vec<Offset>,
    logprobs: bool,
    usage_wanted: bool,
    /// Of each prompt, if they are repeated.
    echoes: Vec<Echo>,
    n: usize,
}

impl CompletionShape {
    fn echo(&self, index: usize) -> Echo {
        self.echoes.get(index / self.n).cloned().unwrap_or_default()
    }

    fn whole(mut self, (answers, usage): (Vec<crate::answer::Answer>, Usage)) -> CompletionResponse {
        for (index, answer) in answers.into_iter().enumerate() {
            let Echo { text, logprobs, .. } = self.echo(index);
            let mut logprobs = self.logprobs.then(|| logprobs.unwrap_or_default());
            if let Some(logprobs) = &mut logprobs {
                for token in &answer.tokens {
                    self.report(logprobs, index, token);
                }
            }
            let finish_reason = answer.reason.map(finish_reason);
            self.head.choices.push(CompletionChoice { index, text: text + &answer.text, logprobs, finish_reason });
        }
        self.head.usage = Some(Some(usage));
        self.head
    }

    fn report(&mut self, logprobs: &mut CompletionLogprobs, index: usize, token: &Token) {
        if let Some(id) = token.id {
            logprobs.push(&self.tokenizer, id, token.logprob, &token.top, &mut self.offsets[index]);
        }
    }

    fn event(&self, choice: CompletionChoice) -> Bytes {
        frame(&CompletionResponse { choices: vec![choice], ..self.head.clone() })
    }
}

impl Shape for CompletionShape {
    fn open(&mut self, index: usize) -> Option<Bytes> {
        let Echo { text, logprobs, .. } = self.echo(index);
        let some = !text.is_empty() || logprobs.is_some();
        some.then(|| self.event(CompletionChoice { index, text, logprobs, finish_reason: None }))
    }

    fn token(&mut self, index: usize, token: &Token) -> Option<Bytes> {
        let logprobs = (self.logprobs && token.id.is_some()).then(|| {
            let mut logprobs = CompletionLogprobs::default();
            self.report(&mut logprobs, index, token);
            logprobs
        });
        let some = !token.text.is_empty() || logprobs.is_some();
        some.then(|| self.event(CompletionChoice { index, text: token.text.clone(), logprobs, finish_reason: None }))
    }

    fn end(&mut self, index: usize, text: &str, reason: FinishReason) -> Bytes {
        let finish_reason = Some(finish_reason(reason));
        self.event(CompletionChoice { index, text: text.to_owned(), logprobs: None, finish_reason })
    }

    fn reason(&self, _: usize, reason: FinishReason) -> &'static str {
        finish_reason(reason)
    }

    fn usage(&mut self, usage: Usage) -> Option<Bytes> {
        self.usage_wanted.then(|| frame(&CompletionResponse { usage: Some(Some(usage)), ..self.head.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::Offset;

    #[test]
    fn offsets_count_characters_that_come_in_pieces_once() {
        let mut offset = Offset::default();
        let mut places = Vec::new();
        // "a春b", "é" in two, a byte that is none, "😀" with its end missing, "c".
        for piece in [&b"a\xe6"[..], b"\x98", b"\xa5b", b"\xc3", b"\xa9", b"\xff", b"\xf0\x9f", b"\x98", b"c"] {
            places.push(offset.characters);
            offset.push(piece);
        }
        assert_eq!(places, [0, 1, 1, 3, 3, 4, 5, 5, 5]);
        assert_eq!(offset.characters, "a春bé\u{fffd}\u{fffd}c".chars().count());
    }
}
