//! What a step must at least take: operations and bytes, from a model's sizes, and with a machine's limits the time for them.
//!
//! Only what cannot be avoided is counted: each weight that a step uses is read once, each multiply-add done once. Attention is counted in f32.
use ernie_kernels::arch::limits::Limits;
use ernie_kernels::paged::BLOCK;

use crate::model::Model;

/// Sizes that decide how fast a model can be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Multiply-adds of the linear layers for a token, its experts among them, without the head.
    pub linear_macs: f64,
    /// Multiply-adds of the head for a position whose logits are wanted.
    pub head_macs: f64,
    /// Multiply-adds of attention for a token and a position it sees, all layers that see everything.
    pub attention_macs: f64,
    /// The same of all layers that see a window.
    pub window_macs: f64,
    /// Positions of that window; 0 without such layers.
    pub window: f64,
    /// Bytes of all matrices that every token uses, the head among them.
    pub shared_bytes: f64,
    /// Bytes of the routed experts of all layers.
    pub expert_bytes: f64,
    /// Share of the routed experts that one token uses; 0 without experts.
    pub expert_share: f64,
    /// Bytes of keys and values of one position, all layers that see everything.
    pub kv_bytes: f64,
    /// The same of all layers that see a window.
    pub window_kv_bytes: f64,
    /// Whether the matrices are bytes.
    pub int8: bool,
}

impl Cost {
    /// Of a model as it is kept in memory.
    pub fn of(model: &Model) -> Self {
        let config = model.config();
        let bytes_per_weight = model.bytes_per_weight();
        let (h, d) = (config.hidden_size as f64, config.head_dim as f64);
        let (q, k) = (config.num_attention_heads as f64 * d, config.num_key_value_heads as f64 * d);
        let attention = h * (q + 2.0 * k) + q * h;
        let (mut shared, mut active_experts, mut all_experts) = (0.0, 0.0, 0.0);
        for layer in 0..config.num_hidden_layers {
            shared += attention;
            match &config.moe {
                Some(moe) if config.is_moe_layer(layer) => {
                    let expert = 3.0 * h * moe.intermediate_size as f64;
                    shared += expert * moe.num_shared_experts as f64;
                    active_experts += expert * moe.top_k as f64;
                    all_experts += expert * moe.num_experts as f64;
                }
                _ => shared += 3.0 * h * config.intermediate_size as f64,
            }
        }
        let head = h * config.vocab_size as f64;
        let (cache, windowed) = (model.cache_layout(), config.local_layers());
        Cost {
            linear_macs: shared + active_experts,
            head_macs: head,
            attention_macs: 2.0 * q * (config.num_hidden_layers - windowed) as f64,
            window_macs: 2.0 * q * windowed as f64,
            window: cache.window.unwrap_or(0) as f64,
            shared_bytes: (shared + head) * bytes_per_weight,
            expert_bytes: model.expert_bytes(),
            expert_share: if all_experts > 0.0 { active_experts / all_experts } else { 0.0 },
            kv_bytes: cache.block_bytes() as f64 / BLOCK as f64,
            window_kv_bytes: cache.window_block_bytes() as f64 / BLOCK as f64,
            int8: model.is_int8(),
        }
    }

    /// Least seconds for a prompt of `tokens` tokens, logits for the last.
    pub fn prefill_seconds(&self, limits: &Limits, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let linear = 2.0 * (self.linear_macs * tokens + self.head_macs);
        let triangle = |n: f64| n * (n + 1.0) / 2.0;
        // A token sees at most the window, the first ones fewer.
        let in_windows = triangle(tokens.min(self.window)) + (tokens - self.window).max(0.0) * self.window;
        let attention = 2.0 * (self.attention_macs * triangle(tokens) + self.window_macs * in_windows);
        let arithmetic = self.seconds(limits, linear) + attention / (limits.f32_gflop_s * 1e9);
        arithmetic.max((self.shared_bytes + self.expert_bytes * self.used(tokens)) / (limits.bandwidth_gb_s * 1e9))
    }

    /// Least seconds for a step that gives one token to each of `batch` sequences of `context` tokens.
    pub fn decode_seconds(&self, limits: &Limits, batch: usize, context: f64) -> f64 {
        let batch = batch as f64;
        let linear = 2.0 * batch * (self.linear_macs + self.head_macs);
        let seen = context.min(self.window);
        let attention = 2.0 * batch * (self.attention_macs * context + self.window_macs * seen);
        let kv = context * self.kv_bytes + seen * self.window_kv_bytes;
        let bytes = self.shared_bytes + self.expert_bytes * self.used(batch) + batch * kv;
        let arithmetic = self.seconds(limits, linear) + attention / (limits.f32_gflop_s * 1e9);
        arithmetic.max(bytes / (limits.bandwidth_gb_s * 1e9))
    }

    pub(crate) fn seconds(&self, limits: &Limits, operations: f64) -> f64 {
        operations / (1e9 * if self.int8 { limits.int8_gop_s } else { limits.f32_gflop_s })
    }

    /// Share of the experts that some of `tokens` tokens use, if each chooses at random.
    pub(crate) fn used(&self, tokens: f64) -> f64 {
        1.0 - (1.0 - self.expert_share).powf(tokens)
    }
}
