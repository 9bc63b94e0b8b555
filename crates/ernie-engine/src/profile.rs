//! Where the time of a step goes, by kernel, and the least time that each could take.
use std::time::Instant;

use ernie_kernels::arch::limits::Limits;

use crate::cost::Cost;
use crate::model::Model;

/// A kernel, or a few small ones that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Part {
    /// Reading rows of the embedding.
    Embedding,
    /// RMS norms and rounding activations to 8 bits; gates of heads.
    Norm,
    /// Queries, keys and values.
    Qkv,
    /// Rotation of keys, storing them and values in the cache; summaries of paragraphs.
    Append,
    /// Attention with the rotation of queries.
    Attention,
    /// The projection after attention, with rounding its input.
    Output,
    /// Probabilities of experts, choice, and putting tokens in their order.
    Router,
    /// Both inner products of chosen experts with SwiGLU.
    ExpertsUp,
    /// The outer product of chosen experts, with rounding its input, and the weighted sum.
    ExpertsDown,
    /// Both inner products of dense and shared layers with SwiGLU.
    Up,
    /// Their outer product, with rounding its input.
    Down,
    /// Logits, with the last norm.
    Head,
}

impl Part {
    /// In the order of a layer.
    pub const ALL: [Part; 12] = [
        Part::Embedding,
        Part::Norm,
        Part::Qkv,
        Part::Append,
        Part::Attention,
        Part::Output,
        Part::Router,
        Part::ExpertsUp,
        Part::ExpertsDown,
        Part::Up,
        Part::Down,
        Part::Head,
    ];

    /// Lower-case name, as it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Part::Embedding => "embedding",
            Part::Norm => "norm",
            Part::Qkv => "qkv",
            Part::Append => "append",
            Part::Attention => "attention",
            Part::Output => "output",
            Part::Router => "router",
            Part::ExpertsUp => "experts_up",
            Part::ExpertsDown => "experts_down",
            Part::Up => "up",
            Part::Down => "down",
            Part::Head => "head",
        }
    }
}

/// Seconds of wall-clock time by part. Reading the clock takes some tens of nanoseconds for each kernel; nothing is read unless it is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Profile {
    on: bool,
    last: Option<Instant>,
    seconds: [f64; Part::ALL.len()],
}

impl Profile {
    /// Begins anew, or measures no more.
    pub(crate) fn set(&mut self, on: bool) {
        *self = Profile { on, ..Profile::default() };
    }

    /// A step begins.
    pub(crate) fn begin(&mut self) {
        if self.on {
            self.last = Some(Instant::now());
        }
    }

    /// What happened since the last call was `part`.
    pub(crate) fn lap(&mut self, part: Part) {
        let Some(last) = self.last else { return };
        let now = Instant::now();
        self.seconds[part as usize] += (now - last).as_secs_f64();
        self.last = Some(now);
    }

    /// Seconds of a part.
    pub fn seconds(&self, part: Part) -> f64 {
        self.seconds[part as usize]
    }

    /// Seconds of all parts.
    pub fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }
}

/// What some steps computed: enough to say what each part must at least take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Computed {
    /// Steps of the model.
    pub steps: f64,
    /// Tokens of a step.
    pub tokens: f64,
    /// Positions whose logits were wanted, of a step.
    pub wanted: f64,
    /// Pairs of a token and a position that it sees in a layer that sees everything, of a step.
    pub pairs: f64,
    /// Positions whose keys and values are read in such a layer, of a step.
    pub positions: f64,
}

impl Computed {
    /// Least seconds for `part` on a machine with these limits: weights in use read once at the bandwidth, or multiply-adds at the peak, whichever takes longer. `None` for
    /// parts that are small by their nature, and for attention where layers see less than everything.
    pub fn least_seconds(&self, model: &Model, limits: &Limits, part: Part) -> Option<f64> {
        let (config, cost) = (model.config(), Cost::of(model));
        let h = config.hidden_size as f64;
        let layers = config.num_hidden_layers as f64;
        let (q, k) = ((config.num_attention_heads * config.head_dim) as f64, (config.num_key_value_heads * config.head_dim) as f64);
        let product = |macs: f64, bytes: f64| cost.seconds(limits, 2.0 * macs).max(bytes / (limits.bandwidth_gb_s * 1e9));
        let matrix = |weights: f64, rows: f64| product(weights * rows, weights * model.bytes_per_weight());
        // Weights of one inner matrix of all dense and shared layers, and of the experts that a token uses.
        let (mut dense, mut routed) = (0.0, 0.0);
        for layer in 0..config.num_hidden_layers {
            match config.moe.as_ref().filter(|_| config.is_moe_layer(layer)) {
                Some(moe) => {
                    dense += h * (moe.intermediate_size * moe.num_shared_experts) as f64;
                    routed += h * (moe.intermediate_size * moe.top_k) as f64;
                }
                None => dense += h * config.intermediate_size as f64,
            }
        }
        // So many of the three matrices of all experts.
        let experts = |matrices: f64| product(matrices * routed * self.tokens, cost.expert_bytes * matrices / 3.0 * cost.used(self.tokens));
        let sees_everything =
            config.local_layers() == 0 && config.mechanisms.paragraphs.is_none() && config.mechanisms.context_gate.is_none();
        let attention = || {
            let arithmetic = 2.0 * cost.attention_macs * self.pairs / (limits.f32_gflop_s * 1e9);
            arithmetic.max(self.positions * cost.kv_bytes / (limits.bandwidth_gb_s * 1e9))
        };
        let of_step = match part {
            Part::Embedding | Part::Norm | Part::Append | Part::Router => None,
            Part::Qkv => Some(matrix(layers * h * (q + 2.0 * k), self.tokens)),
            Part::Attention => sees_everything.then(attention),
            Part::Output => Some(matrix(layers * q * h, self.tokens)),
            Part::ExpertsUp => Some(experts(2.0)),
            Part::ExpertsDown => Some(experts(1.0)),
            Part::Up => Some(matrix(2.0 * dense, self.tokens)),
            Part::Down => Some(matrix(dense, self.tokens)),
            // Of several steps for one prompt only the last wants any.
            Part::Head => Some(matrix(cost.head_macs, self.wanted.max(1.0)) * self.wanted.min(1.0)),
        };
        of_step.filter(|least| *least > 0.0).map(|least| least * self.steps)
    }
}
