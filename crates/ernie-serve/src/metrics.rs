//! What the server counts, as Prometheus reads it (OpenMetrics text).
use std::time::{Duration, Instant};

use ernie_engine::{Engine, FinishReason};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Why a continuation ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ending {
    reason: &'static str,
}

/// An answered HTTP request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    route: String,
    status: u16,
}

/// All counters, by name in [`Metrics::new`].
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    answers: Family<Answer, Counter>,
    endings: Family<Ending, Counter>,
    queue: Gauge,
    running: Gauge,
    whole: Gauge,
    streams: Gauge,
    kv_bytes: Gauge,
    blocks: Gauge,
    free_blocks: Gauge,
    cached_blocks: Gauge,
    prompt_tokens: Counter,
    output_tokens: Counter,
    admitted_tokens: Counter,
    cached_tokens: Counter,
    preemptions: Counter,
    batch_size: Histogram,
    first_token: Histogram,
    between_tokens: Histogram,
    whole_time: Histogram,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        // From a tenth of a millisecond to a minute and a half.
        let seconds = || Histogram::new(exponential_buckets(1e-4, 2.0, 20));
        let metrics = Metrics {
            registry: Registry::with_prefix("ernie"),
            answers: Family::default(),
            endings: Family::default(),
            queue: Gauge::default(),
            running: Gauge::default(),
            whole: Gauge::default(),
            streams: Gauge::default(),
            kv_bytes: Gauge::default(),
            blocks: Gauge::default(),
            free_blocks: Gauge::default(),
            cached_blocks: Gauge::default(),
            prompt_tokens: Counter::default(),
            output_tokens: Counter::default(),
            admitted_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            preemptions: Counter::default(),
            batch_size: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            first_token: seconds(),
            between_tokens: seconds(),
            whole_time: seconds(),
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register("http_requests", "Answered HTTP requests", self.answers.clone());
        r.register("requests_finished", "Continuations by how they ended", self.endings.clone());
        r.register("queue_length", "Jobs that wait for the engine", self.queue.clone());
        r.register("requests_running", "Continuations in the batch", self.running.clone());
        r.register("whole_texts", "Texts that are scored or embedded, or wait for that", self.whole.clone());
        r.register("streams", "Answers that are being streamed", self.streams.clone());
        r.register_with_unit("kv_cache_used", "Keys and values of running requests", Unit::Bytes, self.kv_bytes.clone());
        r.register("kv_blocks", "Blocks of the key/value cache", self.blocks.clone());
        r.register("kv_blocks_free", "Blocks that hold nothing", self.free_blocks.clone());
        r.register("kv_blocks_cached", "Blocks that nobody has but that hold known texts", self.cached_blocks.clone());
        r.register("prompt_tokens", "Prompt tokens taken in", self.prompt_tokens.clone());
        r.register("output_tokens", "Tokens chosen", self.output_tokens.clone());
        r.register("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", self.admitted_tokens.clone());
        r.register("prefix_cache_hits", "Prompt tokens found there", self.cached_tokens.clone());
        r.register("preemptions", "Times that a request gave back its blocks", self.preemptions.clone());
        r.register("batch_size", "Requests computed together, by step", self.batch_size.clone());
        r.register_with_unit("time_to_first_token", "From arrival to the first token", Unit::Seconds, self.first_token.clone());
        r.register_with_unit("inter_token_latency", "Between two tokens of a request", Unit::Seconds, self.between_tokens.clone());
        r.register_with_unit("request_duration", "From arrival to the end", Unit::Seconds, self.whole_time.clone());
        self
    }

    /// The page, with the queue as long as it is now.
    pub fn page(&self, queue: usize) -> String {
        self.queue.set(queue as i64);
        let mut page = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut page, &self.registry);
        page
    }

    /// An HTTP request was answered. `route`: its pattern.
    pub fn answered(&self, route: &str, status: u16) {
        self.answers.get_or_create(&Answer { route: route.to_owned(), status }).inc();
    }

    /// A stream begins; it ends when the guard is dropped.
    pub fn stream(&self) -> StreamGuard {
        self.streams.inc();
        StreamGuard(self.streams.clone())
    }

    /// After a step.
    pub(crate) fn observe_engine(&self, engine: &Engine, whole: usize) {
        let stats = engine.stats();
        self.running.set(stats.running as i64);
        self.whole.set(whole as i64);
        self.kv_bytes.set(engine.kv_bytes_in_use() as i64);
        self.blocks.set(stats.blocks as i64);
        self.free_blocks.set(stats.free_blocks as i64);
        self.cached_blocks.set(stats.cached_blocks as i64);
        let counts = [
            (&self.admitted_tokens, stats.prompt_tokens),
            (&self.cached_tokens, stats.cached_tokens),
            (&self.preemptions, stats.preemptions),
        ];
        for (counter, total) in counts {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
        if stats.running > 0 {
            self.batch_size.observe(stats.running as f64);
        }
    }

    pub(crate) fn prompt_tokens(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
    }

    pub(crate) fn token(&self, arrived: Instant, last: Option<Instant>, now: Instant) {
        self.output_tokens.inc();
        let seconds = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
        match last {
            None => self.first_token.observe(seconds(arrived)),
            Some(last) => self.between_tokens.observe(seconds(last)),
        }
    }

    pub(crate) fn finished(&self, reason: FinishReason, arrived: Instant) {
        self.ended(reason.as_str());
        self.whole_time.observe(Duration::as_secs_f64(&arrived.elapsed()));
    }

    pub(crate) fn cancelled(&self) {
        self.ended("cancelled");
    }

    pub(crate) fn failed(&self) {
        self.ended("failed");
    }

    fn ended(&self, reason: &'static str) {
        self.endings.get_or_create(&Ending { reason }).inc();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// While this lives, a stream is counted.
#[derive(Debug)]
pub struct StreamGuard(Gauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}
