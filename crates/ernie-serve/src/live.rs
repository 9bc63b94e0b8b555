//! `GET /v1/live`: how things stand, once a second, for the page and for whoever else wants to look on.
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State as Extract;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use ernie_engine::LayerLoad;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior, interval};
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::accounts::in_use::InUse;
use crate::answer::frame;
use crate::api_error::ApiError;
use crate::recent::{Amount, Latency, Quantiles};
use crate::settings::Settings;
use crate::state::{Shared, State, unix_seconds};

/// Most who look on at once.
pub const MAX_WATCHERS: usize = 64;
/// From one event to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// What of the past is left a second later, while there is something new: half of it after half a minute.
const KEPT: f64 = 0.977;
/// As many tokens as the time before somebody looked on counts for.
const PAST_TOKENS: f64 = 100.0;

/// How things stand.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Live {
    /// Unix seconds.
    pub at: u64,
    /// Since the start.
    pub uptime_s: u64,
    /// The model's name.
    pub model: String,
    /// Continuations in the batch, and whole texts that are scored or embedded.
    pub running: usize,
    /// Jobs that wait.
    pub waiting: usize,
    /// Places of the queue.
    pub queue_places: usize,
    /// Answers that are being streamed.
    pub streams: usize,
    /// Requests that came to an end since the start.
    pub requests_total: u64,
    /// Tokens chosen, as all rates over the last five seconds.
    pub tokens_per_s: f64,
    /// Prompt tokens taken in.
    pub prompt_tokens_per_s: f64,
    /// Requests that came to an end.
    pub requests_per_s: f64,
    /// From arrival to the first token, as all latencies over the last minute.
    pub ttft_ms: Quantiles,
    /// Between two tokens.
    pub itl_ms: Quantiles,
    /// From arrival to the end.
    pub e2e_ms: Quantiles,
    /// The cache.
    pub kv: KvUse,
    /// Prompt tokens found in the prefix cache since the start.
    pub prefix_hits: u64,
    /// Prompt tokens looked up there.
    pub prefix_lookups: u64,
    /// The layers with routed experts; null without.
    pub experts: Option<Vec<ExpertShares>>,
    /// The layers with gates; null without.
    pub gates: Option<Vec<OpenShares>>,
    /// The settings in force.
    pub settings: Settings,
}

/// Blocks of the key/value cache.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct KvUse {
    /// Of requests that run.
    pub used_blocks: usize,
    /// That nobody has but that hold known texts.
    pub cached_blocks: usize,
    /// In all.
    pub blocks: usize,
}

/// The experts of a layer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ExpertShares {
    /// Its number.
    pub layer: usize,
    /// Which part of its choices each expert got lately.
    pub share: Vec<f64>,
}

/// The heads of a layer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct OpenShares {
    /// Its number.
    pub layer: usize,
    /// For which part of the tokens each head was open lately.
    pub open: Vec<f64>,
}

/// How things stand, once a second
#[utoipa::path(get, path = "/v1/live", tag = "operation", responses(
    (status = 200, description = "Server-sent events, each a Live", body = String, content_type = "text/event-stream"),
))]
pub async fn events(Extract(state): Extract<Shared>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    if state.draining.load(Ordering::SeqCst) {
        return Err(ApiError::unavailable("The server is shutting down."));
    }
    let permit = Arc::clone(&state.watchers)
        .try_acquire_owned()
        .map_err(|_| ApiError::busy(format!("{MAX_WATCHERS} clients look on; try again later.")))?;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let key = caller.0.map(|key| state.accounts.in_use.hold(&key.id));
    let watcher = Watcher { state, ticks, key, ended: false, experts: Vec::new(), heads: Vec::new(), _permit: permit };
    let frames = futures_util::stream::unfold(watcher, |mut watcher| async move {
        watcher.ticks.tick().await;
        // A shutdown waits for no one who only looks on.
        let ends = watcher.ended || watcher.state.draining.load(Ordering::SeqCst);
        watcher.ended = watcher.key.as_ref().is_some_and(InUse::has_ended);
        (!ends).then(|| {
            let frame = if watcher.ended { frame(&ApiError::key_ended().body()) } else { frame(&watcher.look()) };
            (Ok::<_, Infallible>(frame), watcher)
        })
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    Ok((headers, Body::from_stream(frames)).into_response())
}

/// Somebody who looks on.
struct Watcher {
    state: Shared,
    ticks: Interval,
    /// The key that may look on.
    key: Option<InUse>,
    /// Whether it was told that the key may not any more.
    ended: bool,
    experts: Vec<Fading>,
    heads: Vec<Fading>,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    fn look(&mut self) -> Live {
        let State { metrics, worker, config, name, started, .. } = &*self.state;
        if let Some(load) = metrics.load() {
            follow(&mut self.experts, load.experts());
            follow(&mut self.heads, load.heads());
        }
        let some = |layers: &[Fading]| !layers.is_empty();
        let experts = |layer: &Fading| ExpertShares { layer: layer.last.layer, share: layer.shares(layer.each.iter().sum()) };
        let gates = |layer: &Fading| OpenShares { layer: layer.last.layer, open: layer.shares(layer.tokens) };
        let (now, gauges) = (unix_seconds(), metrics.now());
        Live {
            at: now,
            uptime_s: now.saturating_sub(*started),
            model: name.clone(),
            running: gauges.running,
            waiting: worker.waiting() + gauges.waiting,
            queue_places: config.max_queue,
            streams: gauges.streams,
            requests_total: gauges.requests,
            tokens_per_s: metrics.recent.per_second(Amount::OutputTokens),
            prompt_tokens_per_s: metrics.recent.per_second(Amount::PromptTokens),
            requests_per_s: metrics.recent.per_second(Amount::Requests),
            ttft_ms: metrics.recent.quantiles(Latency::FirstToken),
            itl_ms: metrics.recent.quantiles(Latency::BetweenTokens),
            e2e_ms: metrics.recent.quantiles(Latency::Whole),
            kv: gauges.kv,
            prefix_hits: gauges.prefix_hits,
            prefix_lookups: gauges.prefix_lookups,
            experts: some(&self.experts).then(|| self.experts.iter().map(experts).collect()),
            gates: some(&self.heads).then(|| self.heads.iter().map(gates).collect()),
            settings: worker.settings(),
        }
    }
}

/// Counts of a layer that forget: what is long ago weighs less.
#[derive(Clone, Debug)]
struct Fading {
    last: LayerLoad,
    tokens: f64,
    each: Vec<f64>,
}

impl Fading {
    /// What was before weighs as much as a few tokens.
    fn new(load: LayerLoad) -> Self {
        let scale = PAST_TOKENS.min(load.tokens as f64) / (load.tokens as f64).max(1.0);
        Fading { tokens: load.tokens as f64 * scale, each: load.each.iter().map(|count| *count as f64 * scale).collect(), last: load }
    }

    fn follow(&mut self, load: LayerLoad) {
        if load.tokens > self.last.tokens {
            self.tokens = self.tokens * KEPT + (load.tokens - self.last.tokens) as f64;
            for ((fading, now), before) in self.each.iter_mut().zip(&load.each).zip(&self.last.each) {
                *fading = *fading * KEPT + now.saturating_sub(*before) as f64;
            }
        }
        self.last = load;
    }

    fn shares(&self, of: f64) -> Vec<f64> {
        // Four digits: a page shows no more, and a layer has up to hundreds of experts.
        let share = |part: &f64| if of > 0.0 { (part / of * 1e4).round() / 1e4 } else { 0.0 };
        self.each.iter().map(share).collect()
    }
}

fn follow(layers: &mut Vec<Fading>, loads: impl Iterator<Item = LayerLoad>) {
    if layers.is_empty() {
        layers.extend(loads.map(Fading::new));
    } else {
        layers.iter_mut().zip(loads).for_each(|(layer, load)| layer.follow(load));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(tokens: u64, each: &[u64]) -> LayerLoad {
        LayerLoad { layer: 3, tokens, each: each.to_vec() }
    }

    #[test]
    fn shares_are_those_of_late() {
        let mut layer = Fading::new(load(0, &[0, 0]));
        assert_eq!(layer.shares(layer.tokens), [0.0, 0.0]);
        layer.follow(load(4, &[1, 3]));
        assert_eq!(layer.shares(layer.tokens), [0.25, 0.75]);
        // Nothing new: nothing fades.
        layer.follow(load(4, &[1, 3]));
        assert_eq!(layer.tokens, 4.0);
        // A long past is soon outweighed.
        let mut layer = Fading::new(load(1_000_000, &[1_000_000, 0]));
        assert_eq!(layer.shares(layer.tokens), [1.0, 0.0]);
        layer.follow(load(1_000_900, &[1_000_000, 900]));
        assert!(layer.shares(layer.tokens)[1] > 0.9);
    }
}
