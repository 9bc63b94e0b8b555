//! What the parts of a model had to do: how many tokens each expert got, and how often the gate of each head was open.
//!
//! One thread counts and others look on, so the counts are atomic: nobody waits, and nothing is allocated after the beginning. Who looks may see a layer's
//! last step and not yet the next layer's.
use std::sync::atomic::{AtomicU64, Ordering};

use ernie_checkpoint::Config;

/// Counts since the engine began, over everything computed: prompts, answers, and guesses that were wrong.
#[derive(Debug, Default)]
pub struct Load {
    /// By layer; those without experts count none.
    experts: Vec<Counts>,
    /// By layer; those without gates count none.
    heads: Vec<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    tokens: AtomicU64,
    each: Vec<AtomicU64>,
}

/// The counts of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerLoad {
    /// Its number in the network.
    pub layer: usize,
    /// Tokens that it computed.
    pub tokens: u64,
    /// Of these, those that chose each expert, or had each head open.
    pub each: Vec<u64>,
}

impl Load {
    /// All at zero, with room for the experts and gates of a model.
    pub(crate) fn new(config: &Config) -> Self {
        let of = |count: &dyn Fn(usize) -> usize| -> Vec<Counts> {
            let counts = |layer| Counts { each: (0..count(layer)).map(|_| AtomicU64::new(0)).collect(), ..Counts::default() };
            (0..config.num_hidden_layers).map(counts).collect()
        };
        let experts = |layer| config.moe.as_ref().filter(|_| config.is_moe_layer(layer)).map_or(0, |moe| moe.num_experts);
        let heads = |_| if config.mechanisms.context_gate.is_some() { config.num_attention_heads } else { 0 };
        Load { experts: of(&experts), heads: of(&heads) }
    }

    /// The layers with routed experts: tokens that chose each.
    pub fn experts(&self) -> impl Iterator<Item = LayerLoad> + '_ {
        read(&self.experts)
    }

    /// The layers with gates: tokens for which each head was open.
    pub fn heads(&self) -> impl Iterator<Item = LayerLoad> + '_ {
        read(&self.heads)
    }

    /// `tokens` tokens went through a routed layer; the choices of expert e are numbered `starts_e[e]..starts_e[e + 1]`.
    pub(crate) fn count_experts(&self, layer: usize, tokens: usize, starts_e: &[usize]) {
        let Some(counts) = self.experts.get(layer) else { return };
        add(&counts.tokens, tokens);
        for (count, bounds) in counts.each.iter().zip(starts_e.windows(2)) {
            add(count, bounds[1] - bounds[0]);
        }
    }

    /// The gates of a layer, `[t, n]`: 0 where a head is shut.
    pub(crate) fn count_heads(&self, layer: usize, gates_tn: &[f32]) {
        let Some(counts) = self.heads.get(layer).filter(|counts| !counts.each.is_empty()) else { return };
        let n = counts.each.len();
        add(&counts.tokens, gates_tn.len() / n);
        for (head, count) in counts.each.iter().enumerate() {
            add(count, gates_tn.iter().skip(head).step_by(n).filter(|gate| **gate > 0.0).count());
        }
    }
}

/// The engine's thread alone writes, so reading and writing need not be one operation.
fn add(count: &AtomicU64, more: usize) {
    count.store(count.load(Ordering::Relaxed) + more as u64, Ordering::Relaxed);
}

fn read(layers: &[Counts]) -> impl Iterator<Item = LayerLoad> + '_ {
    let some = layers.iter().enumerate().filter(|(_, counts)| !counts.each.is_empty());
    some.map(|(layer, counts)| LayerLoad {
        layer,
        tokens: counts.tokens.load(Ordering::Relaxed),
        each: counts.each.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
    })
}
