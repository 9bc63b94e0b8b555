//! The memory of a training run: what it will take, term by term, and what it has had.
//!
//! The account follows the operators of `ernie-model/src/ops/tape.rs`: what each of them keeps for its backward pass, times tokens and layers. Whoever
//! changes what they keep changes `Layer` with it; `ernie-cli/tests/it/train.rs` measures runs against their accounts.
use ernie_checkpoint::Config;

use crate::recipe::{Precision, Recipe};

const F32: f64 = 4.0;

/// Tokens that operators take at a time. Of the head's there are fewer where the vocabulary is large: no more than [`LOGITS`] exist together, but always
/// those of [`LEAST_CHUNK`] tokens (`ernie-kernels/src/cross_entropy.rs`).
const CHUNK: f64 = 512.0;
const HEAD_CHUNK: f64 = 256.0;
const LOGITS: f64 = (1 << 24) as f64;
const LEAST_CHUNK: f64 = 64.0;

/// What an idle process of this program has: code, allocator, thread stacks, tokenizer.
const BASE: f64 = 25.0 * MIB;

/// What the trainer adds: data, tokenizer, telemetry. Measured on small runs.
const TRAINER: f64 = 8.0 * MIB;

/// Buffers that a thread keeps (`ernie-kernels/src/scratch.rs`). Experts are computed a block of rows on each thread, and as blocks come in all sizes, every thread
/// has as many as it may keep.
const SCRATCH: f64 = 32.0;

/// What pools and allocator keep beyond what lives, as shares of the gradients and of the activations: buffers are reused for anything up to an eighth
/// smaller, freed pages go back late, and the gradient of one layer's input exists beside the buffers of another. Fitted to measured peaks of
/// dense networks and mixtures of experts of 9 to 69 million parameters.
const KEPT_OF_GRADIENTS: f64 = 0.05;
const KEPT_OF_ACTIVATIONS: f64 = 0.05;

const MIB: f64 = 1024.0 * 1024.0;

/// The bytes that training takes at its peak, by what they are for. Tokens are read from mapped files and count nothing; preparing the data (once, before
/// training) is not in it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Account {
    /// Weights, gradients and two moments: 16 bytes per parameter, without the gradients that are in the buffers of activations.
    pub parameters: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations: u64,
    /// The head's logits and packed operands, the temporaries of one layer's backward pass, and the threads' buffers for experts. Validations and checkpoints have less: they
    /// begin by giving back what a step has left.
    pub temporaries: u64,
    /// Kept by pools and allocator.
    pub kept: u64,
    /// The process itself.
    pub base: u64,
}

impl Account {
    /// The account of a recipe whose `[model]` is `config`.
    pub fn of(recipe: &Recipe, config: &Config) -> Self {
        let tokens = recipe.data.sequence_length as f64 * recipe.data.batch_size as f64;
        let mtp = config.num_nextn_predict_layers > 0 && recipe.loss.mtp_weight != 0.0;
        // Asked for only where the recipe does not say: the answer makes the pool of threads.
        let threads = recipe.run.threads.unwrap_or_else(rayon::current_num_threads) as f64;
        let step = Step { config, tokens, precision: recipe.run.precision, recompute: recipe.run.recompute, mtp, threads };
        let mut account = step.account(true);
        if recipe.data.gradient_accumulation > 1 {
            // The sum of gradients so far, beside those of a micro-batch.
            account.parameters += config.parameter_counts().total * F32 as u64;
        }
        account
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let terms = [self.parameters, self.activations, self.temporaries, self.kept, self.base];
        terms.into_iter().fold(0, u64::saturating_add)
    }
}

/// One micro-batch through the network and back.
struct Step<'a> {
    config: &'a Config,
    tokens: f64,
    precision: Precision,
    recompute: bool,
    mtp: bool,
    threads: f64,
}

/// Bytes of one decoder layer for one token.
struct Layer {
    /// Its input.
    input: f64,
    /// All that is kept for its backward pass, the input included.
    kept: f64,
    /// Gradients and rows that exist while it goes backwards.
    backward: f64,
    /// Packed operands of its largest product, not per token.
    packed: f64,
    /// Gradients of experts in the buffers of idle activations of about the same size, of this layer or one before it on the way back; not per token.
    in_place: f64,
    /// Of these the buffers that the layer itself still needs while its gradients come into being.
    too_late: f64,
    /// What each thread keeps of blocks of experts' rows and their packed operands, not per token.
    of_thread: f64,
}

impl Step<'_> {
    fn account(&self, in_trainer: bool) -> Account {
        let config = self.config;
        let parameters = config.parameter_counts().total as f64 * F32;
        let layers = (0..config.num_hidden_layers).map(|layer| self.layer(config.is_moe_layer(layer))).collect::<Vec<_>>();
        let most = |of: fn(&Layer) -> f64| layers.iter().map(of).fold(0.0, f64::max);
        let per_token = if self.recompute {
            layers.iter().map(|layer| layer.input).sum::<f64>() + most(|layer| layer.kept)
        } else {
            layers.iter().map(|layer| layer.kept).sum::<f64>()
        };
        // The prediction block is on the tape either way: its layer, both halves of its input, and what their norms read.
        let prediction = if self.mtp { self.layer(false).kept + 6.0 * config.hidden_size as f64 * F32 } else { 0.0 };
        let activations = self.tokens * (per_token + prediction);
        let on_tape = if self.recompute { self.tokens * (most(|layer| layer.kept) + prediction) } else { activations };
        let of_threads = self.threads * most(|layer| layer.of_thread);
        let step = self.head() + self.tokens * most(|layer| layer.backward) + most(|layer| layer.packed) + of_threads;
        // Recomputation has the activations of one layer, which the next wants again. Of several layers the first on the way back finds no other's buffers.
        let in_place = if self.recompute {
            0.0
        } else {
            let first_back = layers.iter().rfind(|layer| layer.in_place > 0.0);
            layers.iter().map(|layer| layer.in_place).sum::<f64>() - first_back.map_or(0.0, |layer| layer.too_late)
        };
        let kept = KEPT_OF_GRADIENTS * parameters + KEPT_OF_ACTIVATIONS * on_tape;
        Account {
            parameters: (4.0 * parameters - in_place) as u64,
            activations: activations as u64,
            temporaries: step as u64,
            kept: kept as u64,
            base: (BASE + if in_trainer { TRAINER } else { 0.0 }) as u64,
        }
    }

    /// Bytes of an element of a packed operand.
    fn operand(&self) -> f64 {
        match self.precision {
            Precision::F32 => F32,
            Precision::Int8Mixed => 1.0,
        }
    }

    /// Logits of a chunk and, as the gradient goes on from them, their packed copy; the weights packed for both directions; the gradient of the states.
    /// A head with a bias has all logits at once.
    fn head(&self) -> f64 {
        let (v, h) = (self.config.vocab_size as f64, self.config.hidden_size as f64);
        if self.config.use_bias && self.config.moe.is_some() {
            // In Burn's operators: logits, their logarithmic softmax, and the gradients of both.
            return 4.0 * self.tokens * v * F32;
        }
        let logits = HEAD_CHUNK.min((LOGITS / v).max(LEAST_CHUNK)).min(self.tokens) * v;
        let heads = if self.mtp { 2.0 } else { 1.0 };
        logits * (F32 + self.operand()) + 2.0 * v * h * self.operand() + heads * self.tokens * h * F32
    }

    fn layer(&self, moe: bool) -> Layer {
        let config = self.config;
        let h = config.hidden_size as f64;
        let (q, kv) =
            (config.num_attention_heads as f64 * config.head_dim as f64, config.num_key_value_heads as f64 * config.head_dim as f64);
        let qkv = q + 2.0 * kv;
        // Its input, queries with keys and values, attention's output, log-sum-exps; and the input of the feed-forward half.
        let mut attention = h + qkv + q + config.num_attention_heads as f64 + h;
        if config.mechanisms.context_gate.is_some() {
            // The normed input once more, the heads behind their gates, and the gates' logits with what they are summed from.
            attention += h + q + 4.0 * config.num_attention_heads as f64;
        }
        // Gradients of the residual stream, of attention's output, of queries with keys and values.
        let backward = 3.0 * h + q + qkv;
        let (kept, rows, widest, of_thread, in_place) = match &config.moe {
            Some(experts) if moe => {
                let (e, k, i) = (experts.num_experts as f64, experts.top_k as f64, experts.intermediate_size as f64);
                let shared = i * experts.num_shared_experts as f64;
                // The router's logits, their exponentials, sums and probabilities, and its choice; gate and up of the chosen
                // experts; gate and up of the shared ones.
                let kept = 6.0 * e + 4.0 * k + 2.0 * k * i + 2.0 * shared;
                // By place: x, dy and dx; activation, dgate and dup. By token: the normed rows and their gradient; that of the shared gate and up.
                // Half of a thread's buffers are rows, the others packed; either h or i wide.
                let block = CHUNK.min(self.tokens * k / e);
                let of_thread = SCRATCH * block * (h + i) / 2.0 * (F32 + self.operand()) / 2.0;
                let rows = k * (3.0 * h + 3.0 * i) + 2.0 * h + 2.0 * shared;
                // Three stacks of weights; gate and up of the chosen experts, and of the shared ones. A buffer serves what is up to an eighth smaller.
                let stack = e * i * h;
                let alike = |of_token: f64| (stack / 1.125..=stack * 1.125).contains(&(self.tokens * of_token));
                let of_chosen = if alike(k * i) { 2.0 * stack } else { 0.0 };
                let of_shared = if alike(2.0 * shared) { stack } else { 0.0 };
                (kept, rows, i.max(shared), of_thread, [of_chosen + of_shared, of_chosen])
            }
            _ => {
                let i = config.intermediate_size as f64;
                // The gradient of gate and up takes their place.
                (2.0 * i, 0.0, i, 0.0, [0.0; 2])
            }
        };
        // Gate's and up's weights, and a chunk of the gradient of gate and up, each packed for the two products they are in.
        let packed = 2.0 * (2.0 * widest * h + CHUNK.min(self.tokens) * 2.0 * widest) * self.operand();
        let (input, kept, backward) = (h * F32, (attention + kept) * F32, (backward + rows) * F32);
        let [in_place, too_late] = in_place.map(|elements| elements * F32);
        Layer { input, kept, backward, packed, in_place, too_late, of_thread }
    }
}

/// Bytes of memory that are free on this machine now (`MemAvailable` of /proc/meminfo), or 8 GiB where that cannot be read.
pub fn available_bytes() -> u64 {
    kib_of("/proc/meminfo", "MemAvailable:").map_or(8 << 30, |kib| kib << 10)
}

/// Keeps the kernel from backing this process with huge pages. Training asks the allocator for buffers of all sizes, and of a page of 2 MiB that is only partly
/// used all of it counts: without them the peak is lower, at a speed that differs by less than runs do. Where the kernel cannot be asked nothing changes.
pub fn without_huge_pages() {
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

/// The most memory that this process has had, in bytes (`VmHWM` of /proc/self/status); none where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    kib_of("/proc/self/status", "VmHWM:").map(|kib| kib << 10)
}

fn kib_of(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dense network as `benchmarks/training/configs.py` has them; E with its experts.
    fn config(hidden: usize, layers: usize, experts: bool) -> Config {
        let mut json = serde_json::json!({
            "model_type": "ernie4_5", "vocab_size": 8192, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": hidden / 64, "num_key_value_heads": hidden / 64, "head_dim": 64, "max_position_embeddings": 4096,
            "tie_word_embeddings": false, "use_bias": false,
        });
        if experts {
            json["model_type"] = "ernie4_5_moe".into();
            for (key, value) in
                [("num_experts", 8), ("intermediate_size", 512), ("k", 2), ("num_shared_experts", 1), ("layer_start_index", 1)]
            {
                json[format!("moe_{key}")] = value.into();
            }
        }
        Config::from_json(&json.to_string(), std::path::Path::new("test")).unwrap()
    }

    /// Peaks of `examples/training_speed.rs` (which writes no checkpoints) on two threads, in MiB: f32, f32 recomputed, int8-mixed, int8-mixed recomputed.
    #[test]
    fn accounts_are_within_15_percent_of_measured_peaks() {
        let measured = [
            ("S", config(256, 6, false), 2048.0, [359.0, 250.0, 339.0, 230.0]),
            ("M", config(512, 8, false), 2048.0, [1040.0, 728.0, 999.0, 690.0]),
            ("L", config(512, 8, false), 4096.0, [1466.0, 864.0, 1429.0, 823.0]),
            ("E", config(512, 8, true), 2048.0, [1504.0, 1341.0, 1415.0, 1275.0]),
        ];
        let mut worst = 0.0f64;
        for (name, config, tokens, peaks) in measured {
            let ways = [Precision::F32, Precision::Int8Mixed].into_iter().flat_map(|precision| [(precision, false), (precision, true)]);
            for ((precision, recompute), peak) in ways.zip(peaks) {
                let account = Step { config: &config, tokens, precision, recompute, mtp: false, threads: 2.0 }.account(false);
                let predicted = account.total() as f64 / MIB;
                println!(
                    "{name} {precision:?} recompute {recompute}: {predicted:.0} of {peak} MiB, {:+.1}%",
                    (predicted / peak - 1.0) * 100.0
                );
                worst = worst.max((predicted / peak - 1.0).abs());
            }
        }
        assert!(worst < 0.15, "an account is off by {worst}");
    }
}
