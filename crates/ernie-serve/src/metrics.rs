//! What the server counts, as Prometheus reads it (OpenMetrics text).
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use ernie_engine::{Engine, FinishReason, LayerLoad, Load};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::live::KvUse;
use crate::recent::{Amount, Latency, Recent};

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

/// An expert of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExpertLabels {
    layer: u32,
    expert: u32,
}

/// A head of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HeadLabels {
    layer: u32,
    head: u32,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LayerLabels {
    layer: u32,
}

/// How things stand now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Continuations in the batch, and whole texts.
    pub running: usize,
    /// Jobs that the engine has taken and not begun.
    pub waiting: usize,
    pub streams: usize,
    /// Requests that came to an end.
    pub requests: u64,
    pub kv: KvUse,
    pub prefix_hits: u64,
    pub prefix_lookups: u64,
}

/// All counters, by name in [`Metrics::new`].
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// The last minute.
    pub(crate) recent: Recent,
    /// The engine's own counts, once there is one.
    load: OnceLock<Arc<Load>>,
    expert_tokens: Family<ExpertLabels, Counter>,
    open_heads: Family<HeadLabels, Counter>,
    gated_tokens: Family<LayerLabels, Counter>,
    answers: Family<Answer, Counter>,
    endings: Family<Ending, Counter>,
    /// All endings together.
    requests: AtomicU64,
    queue: Gauge,
    running: Gauge,
    admitted: Gauge,
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
            recent: Recent::new(),
            load: OnceLock::new(),
            expert_tokens: Family::default(),
            open_heads: Family::default(),
            gated_tokens: Family::default(),
            answers: Family::default(),
            endings: Family::default(),
            requests: AtomicU64::new(0),
            queue: Gauge::default(),
            running: Gauge::default(),
            admitted: Gauge::default(),
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
        r.register("requests_admitted", "Continuations that the engine has taken and not begun", self.admitted.clone());
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
        r.register("expert_tokens", "Tokens that chose each expert", self.expert_tokens.clone());
        r.register("head_open_tokens", "Tokens for which the gate of each head was open", self.open_heads.clone());
        r.register("gated_tokens", "Tokens of each layer with gates", self.gated_tokens.clone());
        r.register("batch_size", "Requests computed together, by step", self.batch_size.clone());
        r.register_with_unit("time_to_first_token", "From arrival to the first token", Unit::Seconds, self.first_token.clone());
        r.register_with_unit("inter_token_latency", "Between two tokens of a request", Unit::Seconds, self.between_tokens.clone());
        r.register_with_unit("request_duration", "From arrival to the end", Unit::Seconds, self.whole_time.clone());
        self
    }

    /// The page, with the queue as long as it is now.
    pub fn page(&self, queue: usize) -> String {
        self.queue.set(queue as i64);
        self.read_load();
        let mut page = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut page, &self.registry);
        page
    }

    /// Counts of this engine are reported too. The first one counts.
    pub(crate) fn watch(&self, engine: &Engine) {
        let _ = self.load.set(Arc::clone(engine.load()));
    }

    /// What experts and heads had to do, if there is an engine.
    pub(crate) fn load(&self) -> Option<&Load> {
        self.load.get().map(|load| &**load)
    }

    fn read_load(&self) {
        let Some(load) = self.load() else { return };
        for LayerLoad { layer, each, .. } in load.experts() {
            for (expert, count) in each.into_iter().enumerate() {
                let labels = ExpertLabels { layer: layer as u32, expert: expert as u32 };
                raise(&self.expert_tokens.get_or_create(&labels), count);
            }
        }
        for LayerLoad { layer, tokens, each } in load.heads() {
            raise(&self.gated_tokens.get_or_create(&LayerLabels { layer: layer as u32 }), tokens);
            for (head, count) in each.into_iter().enumerate() {
                let labels = HeadLabels { layer: layer as u32, head: head as u32 };
                raise(&self.open_heads.get_or_create(&labels), count);
            }
        }
    }

    /// How things stand.
    pub(crate) fn now(&self) -> Now {
        let of = |gauge: &Gauge| usize::try_from(gauge.get()).unwrap_or(0);
        let (blocks, cached_blocks) = (of(&self.blocks), of(&self.cached_blocks));
        let used_blocks = blocks.saturating_sub(of(&self.free_blocks) + cached_blocks);
        Now {
            running: of(&self.running) + of(&self.whole),
            waiting: of(&self.admitted),
            streams: of(&self.streams),
            requests: self.requests.load(Ordering::Relaxed),
            kv: KvUse { used_blocks, cached_blocks, blocks },
            prefix_hits: self.cached_tokens.get(),
            prefix_lookups: self.admitted_tokens.get(),
        }
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
        self.admitted.set(stats.waiting as i64);
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
            raise(counter, total);
        }
        if stats.running > 0 {
            self.batch_size.observe(stats.running as f64);
        }
    }

    pub(crate) fn prompt_tokens(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.recent.count(Amount::PromptTokens, tokens as u64);
    }

    pub(crate) fn token(&self, arrived: Instant, last: Option<Instant>, now: Instant) {
        self.output_tokens.inc();
        self.recent.count(Amount::OutputTokens, 1);
        let (histogram, latency, since) = match last {
            None => (&self.first_token, Latency::FirstToken, arrived),
            Some(last) => (&self.between_tokens, Latency::BetweenTokens, last),
        };
        let duration = now.saturating_duration_since(since);
        histogram.observe(duration.as_secs_f64());
        self.recent.time(latency, duration, now);
    }

    pub(crate) fn finished(&self, reason: FinishReason, arrived: Instant) {
        self.ended(reason.as_str());
        let (duration, now) = (arrived.elapsed(), Instant::now());
        self.whole_time.observe(duration.as_secs_f64());
        self.recent.time(Latency::Whole, duration, now);
    }

    pub(crate) fn cancelled(&self) {
        self.ended("cancelled");
    }

    pub(crate) fn failed(&self) {
        self.ended("failed");
    }

    fn ended(&self, reason: &'static str) {
        self.endings.get_or_create(&Ending { reason }).inc();
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.recent.count(Amount::Requests, 1);
    }
}

/// Brings a counter up to a total that somebody else keeps.
fn raise(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
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
