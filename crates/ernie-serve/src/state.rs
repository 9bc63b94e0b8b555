//! What all requests share.
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ernie_checkpoint::{ChatTemplate, Tokenizer};
use ernie_engine::{Model, SamplingParams};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::accounts::Accounts;
use crate::accounts::charge::Charge;
use crate::accounts::in_use::Term;
use crate::api_error::ApiError;
use crate::config::ServeConfig;
use crate::grammar::{Form, GrammarConstraint, Grammars};
use crate::metrics::Metrics;
use crate::structured::Asked;
use crate::worker::{Places, Worker};

/// A model with what turns text into its tokens and back.
#[derive(Debug)]
pub struct ServedModel {
    /// What clients call it.
    pub name: String,
    /// In memory.
    pub model: Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub template: ChatTemplate,
}

/// See [`State`].
pub type Shared = Arc<State>;

/// What all requests share.
#[derive(Debug)]
pub struct State {
    /// As it was given.
    pub config: ServeConfig,
    /// What clients call the model.
    pub name: String,
    /// The model.
    pub model: Arc<Model>,
    /// Most tokens of a request, prompt and answer together.
    pub max_len: usize,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template.
    pub template: ChatTemplate,
    /// What answers can be made to look like.
    pub grammars: Grammars,
    /// The way to the engine.
    pub worker: Worker,
    /// Who may use it, and what they used.
    pub accounts: Arc<Accounts>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Streams that may begin.
    pub streams: Arc<Semaphore>,
    /// Those who may look on at `/v1/live`.
    pub watchers: Arc<Semaphore>,
    /// The way to the collector of traces, if there is one.
    #[cfg(feature = "otel")]
    pub traces: Option<crate::otel::Traces>,
    /// Set when the shutdown begins.
    pub draining: AtomicBool,
    /// Set when all that was asked for in time is computed: what is still being asked is answered no more.
    pub closing: watch::Sender<bool>,
    /// Set when it waits no longer for those who read.
    pub cutting_off: AtomicBool,
    /// When the server started, Unix seconds.
    pub started: u64,
    /// Where random numbers come from: its keys are the system's.
    pub random: RandomState,
}

impl State {
    /// Whether `name` is the model's; a request without one means it.
    ///
    /// # Errors
    /// 404, as OpenAI answers for a model it does not have.
    pub fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.name => Err(ApiError::no_model(name)),
            _ => Ok(()),
        }
    }

    /// How long an answer may go on that begins now.
    pub fn term(&self, charge: &Charge) -> Term {
        Term::new(charge.key_in_use(), Duration::from_secs(self.config.answer_timeout_s))
    }

    /// Places in the engine's queue.
    ///
    /// # Errors
    /// 429, 503, or 400 for more than there are.
    pub fn reserve(&self, count: usize) -> Result<Places, ApiError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(ApiError::refused(crate::worker::Refused::Closed));
        }
        self.worker.reserve(count).map_err(ApiError::refused)
    }

    /// Leave to stream an answer.
    ///
    /// # Errors
    /// 429 if as many as may be are streamed.
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let most = self.config.max_streams;
        Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| ApiError::busy(format!("{most} answers are being streamed; try again later.")))
    }

    /// Work that takes a while, away from the threads that serve connections.
    ///
    /// # Errors
    /// Those of the work; 500 if it panics.
    pub async fn compute<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&State) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let state = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&state)).await.map_err(|_| ApiError::internal("The request could not be prepared."))?
    }

    /// The constraint for a form with the rule that was asked for.
    ///
    /// # Errors
    /// 400 that names the rule's field: there is no such grammar, or the answer is to go on past its end.
    pub fn constraint(&self, form: Form, asked: Option<Asked>, params: &SamplingParams) -> Result<Option<GrammarConstraint>, ApiError> {
        let (rule, field) = asked.map_or((None, "tools"), |(rule, field)| (Some(rule), field));
        let constraint =
            self.grammars.compile(&Form { rule, ..form }).map_err(|error| ApiError::field(field, format!("`{field}`: {error}")))?;
        if constraint.is_some() && params.ignore_eos {
            let message = format!("`ignore_eos`: an answer that has its form from `{field}` cannot go on past its end");
            return Err(ApiError::field("ignore_eos", message));
        }
        Ok(constraint)
    }

    /// Waits until the server ends.
    pub async fn closed(&self) {
        // Without a sender there is no server either.
        drop(self.closing.subscribe().wait_for(|closing| *closing).await);
    }

    /// Whether connections are ended with what they were about.
    pub fn is_cutting_off(&self) -> bool {
        self.cutting_off.load(Ordering::SeqCst)
    }

    /// 64 bits that nobody can foresee.
    pub fn random(&self) -> u64 {
        // SipHash of the time under keys that the system gave.
        self.random.hash_one((SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), std::thread::current().id()))
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
