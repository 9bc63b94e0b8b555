//! One request with its answer, up to the last byte: what the log says when it is over, and what is traced.
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::Method;
use hyper::body::{Frame, SizeHint};

use crate::accounts::keys::Key;
use crate::request_id::RequestId;
use crate::state::Shared;
use crate::worker::Token;

/// What is noted of a request whose reader left before it was answered; nginx's number for that.
const LEFT: u16 = 499;

/// What a request asks of the model, and what came of it so far.
#[derive(Clone, Debug, Default)]
pub struct Inference {
    /// As OpenTelemetry names it: `chat`, `text_completion`, `embeddings`.
    pub operation: &'static str,
    /// The model's name.
    pub model: String,
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens that came from the engine.
    pub completion_tokens: usize,
    /// Why the answers ended, as clients are told.
    pub finish_reasons: Vec<&'static str>,
    /// From the request to its first token.
    pub first_token: Option<Duration>,
    /// The prompts and the answers, if they are logged.
    texts: Option<Texts>,
}

#[derive(Clone, Debug, Default)]
struct Texts {
    prompts: Vec<String>,
    answers: Vec<String>,
}

impl Texts {
    fn push(&mut self, index: usize, text: &str) {
        if self.answers.len() <= index {
            self.answers.resize(index + 1, String::new());
        }
        self.answers[index].push_str(text);
    }
}

#[derive(Debug, Default)]
struct Noted {
    key: Option<Arc<Key>>,
    inference: Option<Inference>,
    failed: bool,
}

/// What those who answer a request tell of it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Notes {
    began: Instant,
    /// Whether prompts and answers are kept for the log.
    texts: bool,
    noted: Arc<Mutex<Noted>>,
}

impl Notes {
    fn new(began: Instant, texts: bool) -> Self {
        Notes { began, texts, noted: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Noted> {
        // Nothing there is half written.
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose key it was.
    pub fn key(&self, key: &Arc<Key>) {
        self.lock().key = Some(Arc::clone(key));
    }

    /// The key that [`Notes::key`] told.
    pub fn known_key(&self) -> Option<Arc<Key>> {
        self.lock().key.clone()
    }

    /// The model is asked. `prompts`: only called if they are logged.
    pub fn begin(&self, operation: &'static str, model: &str, prompt_tokens: usize, prompts: impl FnOnce() -> Vec<String>) {
        let texts = self.texts.then(|| Texts { prompts: prompts(), answers: Vec::new() });
        self.lock().inference = Some(Inference { operation, model: model.to_owned(), prompt_tokens, texts, ..Inference::default() });
    }

    fn with(&self, change: impl FnOnce(&mut Inference)) {
        if let Some(inference) = &mut self.lock().inference {
            change(inference);
        }
    }

    /// A token came.
    pub fn token(&self, index: usize, token: &Token) {
        let elapsed = self.began.elapsed();
        self.with(|inference| {
            inference.completion_tokens += 1;
            inference.first_token.get_or_insert(elapsed);
            inference.texts.iter_mut().for_each(|texts| texts.push(index, &token.text));
        });
    }

    /// The rest of an answer's text.
    pub fn text(&self, index: usize, text: &str) {
        self.with(|inference| inference.texts.iter_mut().for_each(|texts| texts.push(index, text)));
    }

    /// An answer ended.
    pub fn finished(&self, reason: &'static str) {
        self.with(|inference| inference.finish_reasons.push(reason));
    }

    /// The answer cannot be given to its end.
    pub fn failed(&self) {
        self.lock().failed = true;
    }
}

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of the answer was handed over, be it a refusal.
    Finished,
    /// Nobody was there any more to take it.
    ClientLeft,
    /// The server could not give it.
    Failed,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Outcome::Finished => "finished",
            Outcome::ClientLeft => "client_left",
            Outcome::Failed => "failed",
        }
    }
}

/// What of a request's head is told again at its end.
#[derive(Debug)]
pub struct Asked {
    /// Its name.
    pub id: RequestId,
    /// Its method.
    pub method: Method,
    /// The pattern of its path.
    pub route: String,
}

/// Held by each exchange of a connection: with no other holder than the connection itself none is under way.
#[derive(Clone, Debug, Default)]
pub struct UnderWay(Arc<()>);

impl UnderWay {
    /// Whether there is an exchange.
    pub fn is_held(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// A request and its answer, which is told of when this is dropped.
#[derive(Debug)]
pub struct Exchange {
    state: Shared,
    asked: Asked,
    began: Instant,
    notes: Notes,
    status: Option<u16>,
    handed_over: bool,
    _under_way: Option<UnderWay>,
    #[cfg(feature = "otel")]
    span: Option<crate::otel::Pending>,
}

impl Exchange {
    /// Of a request that has just come.
    pub fn new(state: &Shared, asked: Asked, head: &Request) -> Self {
        let began = Instant::now();
        Exchange {
            notes: Notes::new(began, state.config.log_prompts),
            state: Arc::clone(state),
            #[cfg(feature = "otel")]
            span: state.traces.as_ref().map(|traces| traces.begin(head)),
            asked,
            began,
            status: None,
            handed_over: false,
            _under_way: head.extensions().get().cloned(),
        }
    }

    /// For those who answer it.
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    /// The head of the answer is there: its status is counted.
    pub fn answered(&mut self, status: u16) {
        self.state.metrics.answered(&self.asked.route, status);
        self.status = Some(status);
    }

    /// A body whose end is that of the exchange.
    pub fn over(self, body: Body) -> Body {
        Body::new(Watched { exchange: self, body })
    }

    fn outcome(&self, failed: bool) -> Outcome {
        match self.status {
            _ if failed => Outcome::Failed,
            Some(500..) => Outcome::Failed,
            Some(_) if self.handed_over => Outcome::Finished,
            // Connections that a shutdown cut off did not leave.
            _ if self.state.is_cutting_off() => Outcome::Failed,
            _ => Outcome::ClientLeft,
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.answered(LEFT);
        }
        let Noted { key, inference, failed } = std::mem::take(&mut *self.notes.lock());
        let outcome = self.outcome(failed);
        let Asked { id, method, route } = &self.asked;
        let elapsed = self.began.elapsed();
        #[cfg(feature = "otel")]
        if let Some(span) = self.span.take() {
            span.end(&self.asked, self.status.unwrap_or(LEFT), outcome, inference.as_ref());
        }
        let known = inference.as_ref();
        let texts = known.and_then(|inference| inference.texts.as_ref());
        // As JSON, so that a line stays one line whatever they hold.
        let json = |texts: &Vec<String>| serde_json::json!(texts).to_string();
        tracing::info!(
            request_id = %id.0,
            key_id = key.as_ref().map_or("", |key| &*key.id),
            %method,
            %route,
            status = self.status,
            outcome = outcome.as_str(),
            operation = known.map(|inference| inference.operation),
            model = known.map(|inference| &*inference.model),
            prompt_tokens = known.map(|inference| inference.prompt_tokens),
            completion_tokens = known.map(|inference| inference.completion_tokens),
            finish_reasons = known.map(|inference| inference.finish_reasons.join(",")),
            first_token_seconds = known.and_then(|inference| inference.first_token).map(|time| time.as_secs_f64()),
            seconds = elapsed.as_secs_f64(),
            prompts = texts.map(|texts| json(&texts.prompts)),
            answers = texts.map(|texts| json(&texts.answers)),
            "{}", if self.status == Some(LEFT) { "left unanswered" } else { "answered" }
        );
    }
}

/// A body that tells how far it was read.
#[derive(Debug)]
struct Watched {
    exchange: Exchange,
    body: Body,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.exchange.handed_over |= frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Of a body whose length is known hyper does not ask for more when it has all of it; and of none for HEAD.
        self.exchange.handed_over |= self.body.is_end_stream() || self.exchange.asked.method == Method::HEAD;
    }
}
