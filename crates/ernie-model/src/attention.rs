//! Grouped-query causal self-attention with interleaved rotary positions.
use crate::{
    context_gate::{ContextGate, Gating},
    init::Init,
    linear::Linear,
    norm::RmsNorm,
    ops,
    ops::LayerContext,
};
use burn::{module::Param, prelude::*};
use ernie_checkpoint::Config;

/// `o(softmax(rope(q)·rope(k)ᵀ / √d) · v)`; query head `n` reads key-value head `n / (n_q / n_kv)`.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[n_q·d, h]`.
    pub q_proj: Linear,
    /// `[n_kv·d, h]`.
    pub k_proj: Linear,
    /// `[n_kv·d, h]`.
    pub v_proj: Linear,
    /// `[h, n_q·d]`.
    pub o_proj: Linear,
    /// Gates over the heads, in models that have them.
    pub context_gate: Option<ContextGate>,
    /// What sums paragraphs up, in layers that attend to paragraphs.
    pub paragraph_pool: Option<ParagraphPool>,
}

/// Vectors that weigh the tokens of a paragraph for its summary; zeros at first, by which all weigh the same.
#[derive(Module, Debug)]
pub struct ParagraphPool {
    /// `[n_kv, d]`.
    pub weight: Param<Tensor<2>>,
}

impl Attention {
    /// Fresh projections.
    pub fn new(init: &mut Init, config: &Config) -> Self {
        let (h, bias) = (config.hidden_size, config.use_bias);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        Self {
            q_proj: Linear::new(init, [q, h], bias, init.std),
            k_proj: Linear::new(init, [kv, h], bias, init.std),
            v_proj: Linear::new(init, [kv, h], bias, init.std),
            o_proj: Linear::new(init, [h, q], bias, init.residual_std),
            context_gate: None,
            paragraph_pool: None,
        }
    }

    /// The same with the mechanisms that the configuration asks for in layer `layer`, fresh.
    pub fn with_mechanisms(mut self, init: &mut Init, config: &Config, layer: usize) -> Self {
        self.context_gate = config.mechanisms.context_gate.as_ref().map(|gate| ContextGate::new(init, config, gate));
        let shape = [config.num_key_value_heads, config.head_dim];
        self.paragraph_pool = config.paragraphs(layer).map(|_| ParagraphPool { weight: init.constant(shape, 0.0) });
        self
    }

    /// `x + attention(norm(x))`, `[t, h]`, and what the gates did, if there are any.
    pub fn forward_add(&self, x_th: Tensor<2>, norm: &RmsNorm, context: &LayerContext) -> (Tensor<2>, Option<Gating>) {
        let qkv = norm.linears(x_th.clone(), [&self.q_proj, &self.k_proj, &self.v_proj], context.precision);
        let mut heads = match &self.paragraph_pool {
            None => ops::rope_attention(qkv, &context.attention),
            Some(pool) => ops::paragraph_attention(qkv, pool.weight.val(), &context.attention),
        };
        let gating = self.context_gate.as_ref().map(|gate| gate.forward(norm.forward(x_th.clone()), &context.attention.cu_seqlens));
        if let Some(gating) = &gating {
            heads = gating.apply(heads);
        }
        (self.o_proj.forward_add(x_th, heads, context.precision), gating)
    }
}
