//! The engine's thread. Jobs come in through a bounded queue, events go out through a bounded channel of each reader.
//!
//! The thread waits for nobody: a reader whose channel is full or gone has its job cancelled before the next step, and the others do not notice. Text is
//! decoded here, beside the engine, so that a stop string ends its request at the token that completes it, as in `ernie generate`.
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use ernie_checkpoint::{DecodeStream, Tokenizer};
use ernie_engine::{Constraint, Engine, EngineEvent, FinishReason, Model, Request, RequestId, SamplingParams, StopMatcher};
use tokio::sync::mpsc::{self, error::TryRecvError, error::TrySendError};

use crate::accounts::charge::Charge;
use crate::metrics::Metrics;
use crate::settings::{Current, Settings, SettingsPatch};
use crate::turn::MARKERS;
use crate::whole::{Score, Whole};

/// What is to be computed.
#[derive(Debug)]
pub enum Task {
    /// Continue a prompt.
    Generate(Request),
    /// Continue a prompt with what a constraint allows.
    Constrained(Request, Box<dyn Constraint>),
    /// Log-probabilities of the prompt's own tokens, with as many of the likeliest tokens in the place of each.
    Score {
        /// Token ids.
        prompt: Vec<u32>,
        /// How many alternatives.
        top: usize,
    },
    /// The mean of the model's final states over a text.
    Embed {
        /// Token ids.
        prompt: Vec<u32>,
    },
}

/// What a job brought.
#[derive(Debug)]
pub enum Event {
    /// A token was chosen.
    Token(Token),
    /// A continuation came to its end.
    Finished {
        /// Text that was held back until it was known to be no stop string.
        text: String,
        /// Why.
        reason: FinishReason,
        /// Tokens chosen.
        tokens: usize,
    },
    /// The answer to [`Task::Score`], one for each token.
    Scores(Vec<Score>),
    /// The answer to [`Task::Embed`]: `[hidden]`.
    Embedding(Vec<f32>),
    /// Nothing more will come.
    Failed(ernie_engine::Error),
}

/// A token of a continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Which; `None` for one that ends the text and is no part of it.
    pub id: Option<u32>,
    /// Text that can be shown now; may be empty.
    pub text: String,
    /// ln of its probability under the model, if asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens in its place.
    pub top: Vec<(u32, f32)>,
}

/// Where events go: several jobs of one HTTP request share a channel, each with its number.
pub type Events = mpsc::Sender<(usize, Event)>;

/// A task and who waits for it.
#[derive(Debug)]
pub struct Job {
    /// What to compute.
    pub task: Task,
    /// The number that its events carry.
    pub index: usize,
    /// Where they go.
    pub events: Events,
    /// What pays for it.
    pub charge: Option<Charge>,
}

/// A job in the queue.
#[derive(Debug)]
struct Queued {
    job: Job,
    arrived: Instant,
}

/// Places in the queue that nobody else can take; given back when dropped.
#[derive(Debug)]
pub struct Places(Vec<mpsc::OwnedPermit<Queued>>);

impl Places {
    /// Puts a job into the next place.
    ///
    /// # Panics
    /// If more jobs are sent than places were reserved.
    pub fn send(&mut self, job: Job) {
        let place = self.0.pop().expect("a place was reserved for each job");
        place.send(Queued { job, arrived: Instant::now() });
    }
}

/// Why a job is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full; later there will be room.
    Full,
    /// More jobs at once than the queue has places.
    TooMany {
        /// Places of the queue.
        places: usize,
    },
    /// The server is shutting down, or its engine has come to an end.
    Closed,
}

/// The way to the engine's thread.
#[derive(Debug)]
pub struct Worker {
    /// Taken away when the server shuts down.
    queue: Mutex<Option<mpsc::Sender<Queued>>>,
    places: usize,
    stop: Arc<AtomicBool>,
    settings: Arc<Current>,
}

impl Worker {
    /// Starts the thread. `settings`: as the engine was made; `places`: jobs that may wait besides those that are computed.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        engine: Engine,
        settings: Settings,
        tokenizer: Arc<Tokenizer>,
        metrics: Arc<Metrics>,
        places: usize,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (queue, jobs) = mpsc::channel(places);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        metrics.watch(&engine);
        let settings = Arc::new(Current::new(settings));
        let current = Arc::clone(&settings);
        // Grammars may call themselves as deep as they are nested.
        let builder = std::thread::Builder::new().name("engine".to_owned()).stack_size(16 << 20);
        let thread = builder.spawn(move || {
            let model = Arc::clone(engine.model());
            let running = Running {
                engine,
                model: &model,
                tokenizer: &tokenizer,
                marks: MARKERS.iter().filter_map(|mark| Some((tokenizer.piece_to_id(mark)?, *mark))).collect(),
                metrics: &metrics,
                settings: current.get(),
                current: &current,
                open: true,
                active: HashMap::new(),
                whole: VecDeque::new(),
                ended: Vec::new(),
            };
            running.run(jobs, &stopped);
        })?;
        Ok((Worker { queue: Mutex::new(Some(queue)), places, stop, settings }, thread))
    }

    /// Places for `count` jobs, all or none.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn reserve(&self, count: usize) -> Result<Places, Refused> {
        let queue = self.queue().clone().ok_or(Refused::Closed)?;
        if count > self.places {
            return Err(Refused::TooMany { places: self.places });
        }
        let place = |_| match queue.clone().try_reserve_owned() {
            Ok(place) => Ok(place),
            Err(TrySendError::Full(_)) => Err(Refused::Full),
            Err(TrySendError::Closed(_)) => Err(Refused::Closed),
        };
        (0..count).map(place).collect::<Result<Vec<_>, _>>().map(Places)
    }

    /// The settings in force from the next step on.
    pub fn settings(&self) -> Settings {
        self.settings.get()
    }

    /// Changes settings from the next step on; returns what is then. A batch of none is taken for one of one.
    pub fn change_settings(&self, patch: SettingsPatch) -> Settings {
        self.settings.change(patch)
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.queue().as_ref().map_or(0, |queue| self.places - queue.capacity())
    }

    /// Whether jobs are taken.
    pub fn is_open(&self) -> bool {
        self.queue().as_ref().is_some_and(|queue| !queue.is_closed())
    }

    /// No more jobs: the thread ends when it has finished those it has.
    pub fn close(&self) {
        self.queue().take();
    }

    /// The thread ends before its next step, whatever is unfinished.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.close();
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Option<mpsc::Sender<Queued>>> {
        // What is behind the lock is never half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's own state.
struct Running<'a> {
    engine: Engine,
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    /// Special tokens that mark the parts of a turn: text that a reader looks for.
    marks: HashMap<u32, &'static str>,
    metrics: &'a Metrics,
    /// As the engine has them.
    settings: Settings,
    current: &'a Current,
    /// Jobs may still come.
    open: bool,
    active: HashMap<RequestId, Active<'a>>,
    /// Jobs over whole texts, one at a time, a piece between any two steps of the engine.
    whole: VecDeque<Whole<'a>>,
    /// Requests of the last step that must not go on.
    ended: Vec<RequestId>,
}

/// A continuation on its way.
struct Active<'a> {
    index: usize,
    events: Events,
    decoder: DecodeStream<'a>,
    stops: StopMatcher,
    stop_ids: Vec<u32>,
    ignore_eos: bool,
    arrived: Instant,
    last_token: Option<Instant>,
    tokens: usize,
    charge: Option<Charge>,
}

impl<'a> Running<'a> {
    fn run(mut self, mut jobs: mpsc::Receiver<Queued>, stop: &AtomicBool) {
        loop {
            self.admit(&mut jobs);
            if stop.load(Ordering::SeqCst) || (!self.open && self.is_idle()) {
                return;
            }
            self.drop_gone();
            self.settle();
            self.step();
            self.step_whole();
            self.metrics.observe_engine(&self.engine, self.whole.len());
        }
    }

    /// Tells the engine of settings that have changed.
    fn settle(&mut self) {
        let settings = self.current.get();
        if settings != self.settings {
            // The only size that is refused, 0, does not get here.
            if let Err(error) = self.engine.set_batching(settings.max_batch_size, settings.dynamic_batching) {
                tracing::error!(%error, "settings not taken");
            }
            self.settings = settings;
        }
    }

    fn is_idle(&self) -> bool {
        self.active.is_empty() && self.whole.is_empty()
    }

    /// Takes jobs while there is room in the batch; waits for one if there is nothing else to do.
    fn admit(&mut self, jobs: &mut mpsc::Receiver<Queued>) {
        while self.open && self.active.len() + self.whole.len() < self.current.get().max_batch_size {
            let next = if self.is_idle() { jobs.blocking_recv().ok_or(TryRecvError::Disconnected) } else { jobs.try_recv() };
            match next {
                Ok(queued) if queued.job.events.is_closed() => self.metrics.cancelled(),
                Ok(queued) => self.take(queued),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.open = false,
            }
        }
    }

    fn take(&mut self, queued: Queued) {
        let Queued { job: Job { task, index, events, charge }, arrived } = queued;
        let (request, constraint) = match task {
            Task::Generate(request) => (request, None),
            Task::Constrained(request, constraint) => (request, Some(constraint)),
            Task::Score { prompt, top } => return self.whole.push_back(Whole::score(prompt, top, index, events, charge)),
            Task::Embed { prompt } => return self.whole.push_back(Whole::embed(prompt, index, events, charge)),
        };
        let SamplingParams { stop, stop_ids, ignore_eos, .. } = request.params.clone();
        let prompt_tokens = request.prompt.len();
        let submitted = match constraint {
            None => self.engine.submit(request),
            Some(constraint) => self.engine.submit_constrained(request, constraint),
        };
        match submitted {
            Ok(id) => {
                self.metrics.prompt_tokens(prompt_tokens);
                charge.iter().for_each(|charge| charge.prompt(prompt_tokens));
                let decoder = self.tokenizer.decode_stream(true);
                let stops = StopMatcher::new(&stop);
                let active = Active { index, events, decoder, stops, stop_ids, ignore_eos, arrived, last_token: None, tokens: 0, charge };
                self.active.insert(id, active);
            }
            // A reader that is gone needs no answer.
            Err(error) => drop(events.try_send((index, Event::Failed(error)))),
        }
    }

    /// Cancels what nobody waits for.
    fn drop_gone(&mut self) {
        let Running { engine, active, metrics, whole, .. } = self;
        active.retain(|id, active| {
            let gone = active.events.is_closed();
            if gone {
                engine.cancel(*id);
                metrics.cancelled();
            }
            !gone
        });
        whole.retain(|whole| {
            let gone = whole.is_gone();
            if gone {
                metrics.cancelled();
            }
            !gone
        });
    }

    /// One step of the engine, and what it brought to those who wait for it.
    fn step(&mut self) {
        let Running { engine, active, metrics, ended, model, marks, .. } = self;
        let began = Instant::now();
        let events = engine.step();
        // Shared equally: what is computed together reads the same weights, which is most of the time.
        let share = began.elapsed() / u32::try_from(active.len()).unwrap_or(u32::MAX).max(1);
        active.values().filter_map(|active| active.charge.as_ref()).for_each(|charge| charge.spent(share));
        for event in events {
            match event {
                EngineEvent::Token { id, token, logprob, top } => {
                    let Some(request) = active.get_mut(id) else { continue };
                    request.observe(metrics);
                    let ends = request.stop_ids.contains(token) || (!request.ignore_eos && model.config().eos_token_id.contains(token));
                    let text = match marks.get(token) {
                        _ if ends => String::new(),
                        None => request.stops.push(&request.decoder.push(*token)),
                        Some(mark) => request.stops.push(&(request.decoder.finish() + mark)),
                    };
                    let token = Token { id: (!ends).then_some(*token), text, logprob: *logprob, top: top.clone() };
                    let mut delivered = request.send(Event::Token(token));
                    if delivered && request.stops.found() {
                        let tokens = request.tokens;
                        delivered = request.send(Event::Finished { text: String::new(), reason: FinishReason::StopString, tokens });
                        metrics.finished(FinishReason::StopString, request.arrived);
                    } else if delivered {
                        continue;
                    }
                    if !delivered {
                        metrics.cancelled();
                    }
                    active.remove(id);
                    ended.push(*id);
                }
                EngineEvent::Finished { id, reason, .. } => {
                    let Some(mut request) = active.remove(id) else { continue };
                    // A character cut off by the end may complete a stop string only now.
                    let mut text = request.stops.push(&request.decoder.finish());
                    let reason = if request.stops.found() { FinishReason::StopString } else { *reason };
                    if !request.stops.found() {
                        text.push_str(&request.stops.finish());
                    }
                    let tokens = request.tokens;
                    if request.send(Event::Finished { text, reason, tokens }) {
                        metrics.finished(reason, request.arrived);
                    } else {
                        metrics.cancelled();
                    }
                }
                EngineEvent::Failed { id, token, value } => {
                    let Some(mut request) = active.remove(id) else { continue };
                    request.send(Event::Failed(ernie_engine::Error::BadLogit { id: *token, value: *value }));
                    metrics.failed();
                }
                EngineEvent::Stuck { id, reason } => {
                    let Some(mut request) = active.remove(id) else { continue };
                    request.send(Event::Failed(ernie_engine::Error::Constraint { reason: reason.clone() }));
                    metrics.failed();
                }
            }
        }
        for id in ended.drain(..) {
            engine.cancel(id);
        }
    }

    /// A piece of the first job over a whole text.
    fn step_whole(&mut self) {
        let Some(whole) = self.whole.front_mut() else { return };
        if let Some(outcome) = whole.step(self.model) {
            match &outcome {
                Event::Failed(_) => self.metrics.failed(),
                _ => self.metrics.prompt_tokens(whole.tokens()),
            }
            whole.answer(outcome);
            self.whole.pop_front();
        }
    }
}

impl Active<'_> {
    /// Whether it was delivered.
    fn send(&mut self, event: Event) -> bool {
        self.events.try_send((self.index, event)).is_ok()
    }

    /// A token has come: how long that took.
    fn observe(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        metrics.token(self.arrived, self.last_token, now);
        self.last_token = Some(now);
        self.tokens += 1;
        self.charge.iter().for_each(Charge::token);
    }
}
