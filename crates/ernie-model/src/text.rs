//! The text decoder: embedding, layers, norm, head, and its losses.
use std::sync::Arc;

use crate::{
    attention::Attention,
    batch::PackedBatch,
    context_gate::Gating,
    init::Init,
    mlp::Mlp,
    moe::Moe,
    moe::Routing,
    mtp::Mtp,
    norm::RmsNorm,
    ops,
    ops::{AttentionContext, LayerContext, LossContext, Precision},
};
use burn::{module::Param, prelude::*};
use ernie_checkpoint::Config;
use ernie_kernels::{attention, rope::RopeTable};

/// The feed-forward half of a layer. Its checkpoint name is `mlp` either way.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "Burn has no `Module` for a box, and there is one of these per layer")]
pub enum FeedForward {
    /// SwiGLU.
    Dense(Mlp),
    /// Routed and shared experts.
    Moe(Moe),
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the feed-forward block.
    pub post_attention_layernorm: RmsNorm,
    /// Dense or MoE.
    pub mlp: FeedForward,
}

impl DecoderLayer {
    /// Layer `layer` of the model: dense or MoE by the configuration's start/end/interval rule.
    pub fn new(init: &mut Init, config: &Config, layer: usize) -> Self {
        let mut made = match &config.moe {
            Some(moe) if config.is_moe_layer(layer) => {
                Self::with_feed_forward(init, config, |init| FeedForward::Moe(Moe::new(init, config, moe)))
            }
            _ => Self::dense(init, config),
        };
        made.self_attn = made.self_attn.with_mechanisms(init, config, layer);
        made
    }

    /// A dense layer.
    pub fn dense(init: &mut Init, config: &Config) -> Self {
        Self::with_feed_forward(init, config, |init| FeedForward::Dense(Mlp::new(init, config, config.intermediate_size)))
    }

    fn with_feed_forward(init: &mut Init, config: &Config, mlp: impl FnOnce(&mut Init) -> FeedForward) -> Self {
        Self {
            input_layernorm: RmsNorm::new(init, config.hidden_size, config.rms_norm_eps),
            self_attn: Attention::new(init, config),
            post_attention_layernorm: RmsNorm::new(init, config.hidden_size, config.rms_norm_eps),
            mlp: mlp(init),
        }
    }

    /// `[t, h]` → `[t, h]`, and what was chosen on the way.
    pub fn forward(&self, x_th: Tensor<2>, context: &LayerContext) -> (Tensor<2>, Choices) {
        let (x_th, gating) = self.self_attn.forward_add(x_th, &self.input_layernorm, context);
        let norm = &self.post_attention_layernorm;
        match &self.mlp {
            FeedForward::Dense(mlp) => (mlp.forward_add(x_th.clone(), x_th, norm, context.precision), Choices { routing: None, gating }),
            FeedForward::Moe(moe) => {
                let (y_th, routing) = moe.forward_add(x_th, norm, context);
                (y_th, Choices { routing: Some(routing), gating })
            }
        }
    }
}

/// What a layer chose for the tokens of a batch.
#[derive(Debug)]
pub struct Choices {
    /// Experts, in a MoE layer.
    pub routing: Option<Routing>,
    /// Heads, in a layer with gates.
    pub gating: Option<Gating>,
}

/// Token embedding.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[v, h]`.
    pub weight: Param<Tensor<2>>,
}

/// Everything under `model.` in a checkpoint.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding; also the head's weight if tied.
    pub embed_tokens: Embedding,
    /// The layers in order.
    pub layers: Vec<DecoderLayer>,
    /// Final norm.
    pub norm: RmsNorm,
    /// Multi-token prediction, if the model has it.
    pub mtp: Option<Mtp>,
}

/// The output head.
#[derive(Module, Debug)]
pub struct Head {
    /// `[v, h]`; none when tied to the embedding.
    pub weight: Option<Param<Tensor<2>>>,
    /// `[v]`: only MoE models with `use_bias` have it, as in the released code.
    pub bias: Option<Param<Tensor<1>>>,
}

/// An ERNIE-4.5 language model, dense or mixture of experts.
#[derive(Module, Debug)]
pub struct Ernie {
    /// Decoder.
    pub model: Decoder,
    /// Output head.
    pub lm_head: Head,
    #[module(skip)]
    config: Arc<Config>,
    #[module(skip)]
    rope: Arc<RopeTable>,
    #[module(skip)]
    precision: Precision,
}

/// Hidden states of a batch and what routing did.
#[derive(Debug)]
pub struct Hidden {
    /// After the final norm, `[t, h]`.
    pub states_th: Tensor<2>,
    /// What each layer chose.
    pub choices: Vec<Choices>,
}

impl Hidden {
    /// Routing of each MoE layer, with its layer index.
    pub fn routing(&self) -> impl Iterator<Item = (usize, &Routing)> {
        routings(&self.choices)
    }

    /// What the gates of each layer that has them did, with its layer index.
    pub fn gating(&self) -> impl Iterator<Item = (usize, &Gating)> {
        gatings(&self.choices)
    }
}

fn routings(choices: &[Choices]) -> impl Iterator<Item = (usize, &Routing)> {
    choices.iter().enumerate().filter_map(|(layer, choices)| Some((layer, choices.routing.as_ref()?)))
}

fn gatings(choices: &[Choices]) -> impl Iterator<Item = (usize, &Gating)> {
    choices.iter().enumerate().filter_map(|(layer, choices)| Some((layer, choices.gating.as_ref()?)))
}

/// Weights of the terms of the training loss; 0 leaves a term out.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossWeights {
    /// Of the balance loss, averaged over MoE layers.
    pub balance: f64,
    /// Of the router's z-loss, averaged over MoE layers.
    pub z: f64,
    /// Of the multi-token-prediction loss.
    pub mtp: f64,
    /// Of the loss that pulls routers to steered experts, averaged over MoE layers.
    pub pull: f64,
    /// Of (share of active heads − target)², averaged over layers with gates.
    pub gate: f64,
    /// That target.
    pub gate_target: f64,
}

/// The training loss of a batch and its parts.
#[derive(Debug)]
pub struct Losses {
    /// Weighted sum, on the tape, `[1]`.
    pub total: Tensor<1>,
    /// Mean cross-entropy in nats, without the batch's weights.
    pub cross_entropy: f32,
    /// Cross-entropy of each token, `[t]`, 0 where it is not scored.
    pub token_losses: Vec<f32>,
    /// Mean cross-entropy of multi-token prediction, if the model has it and its weight is not 0.
    pub mtp: Option<f32>,
    /// Mean balance loss over MoE layers.
    pub balance: Option<f32>,
    /// Mean z-loss over MoE layers.
    pub z: Option<f32>,
    /// Mean pull loss over MoE layers, where routing is steered by domains.
    pub pull: Option<f32>,
    /// Chosen experts of each MoE layer: (layer, `[t, k]` row by row).
    pub experts: Vec<(usize, Arc<[u32]>)>,
    /// Tokens per expert for each MoE layer: (layer, `[e]`).
    pub usage: Vec<(usize, Vec<u64>)>,
    /// Share of active heads of each layer with gates, over all tokens: (layer, share).
    pub active_heads: Vec<(usize, f64)>,
}

impl Ernie {
    /// A model with random weights; the same seed gives the same bits.
    pub fn init(config: &Config, device: &Device, seed: u64) -> Self {
        Self::with_init(config, &mut Init::new(device, seed, config.initializer_range, config.num_hidden_layers))
    }

    /// A model whose parameters are drawn from `init`.
    pub(crate) fn with_init(config: &Config, init: &mut Init) -> Self {
        let (v, h) = (config.vocab_size, config.hidden_size);
        let model = Decoder {
            embed_tokens: Embedding { weight: init.normal([v, h], init.std) },
            layers: (0..config.num_hidden_layers).map(|layer| DecoderLayer::new(init, config, layer)).collect(),
            norm: RmsNorm::new(init, h, config.rms_norm_eps),
            mtp: (config.num_nextn_predict_layers > 0).then(|| Mtp::new(init, config)),
        };
        let lm_head = Head {
            weight: (!config.tie_word_embeddings).then(|| init.normal([v, h], init.std)),
            bias: (config.use_bias && config.moe.is_some()).then(|| init.constant([v], 0.0)),
        };
        let rope = RopeTable::new(config.rope_theta, config.head_dim, 0);
        Self { model, lm_head, config: Arc::new(config.clone()), rope: Arc::new(rope), precision: Precision::F32 }
    }

    /// The configuration the model was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The same network off the tape, sharing its weights: for validation.
    pub fn without_tape(&self) -> Self {
        self.valid()
    }

    /// How the large products are computed from now on, forwards and backwards; f32 at first.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// Makes the rotary table cover documents of up to `positions` tokens. [`Ernie::forward`] asserts that it does.
    pub fn reserve_positions(&mut self, positions: usize) {
        if self.rope.positions() < positions {
            self.rope = Arc::new(RopeTable::new(self.config.rope_theta, self.config.head_dim, positions));
        }
    }

    /// Hidden states of a packed batch.
    ///
    /// # Panics
    /// If a document is longer than [`Ernie::reserve_positions`] allowed, or an id is not below the vocabulary size.
    pub fn forward(&self, batch: &PackedBatch) -> Hidden {
        let context = self.layer_context(batch);
        let mut x_th = ops::embedding(self.model.embed_tokens.weight.val(), &batch.ids);
        let mut choices = Vec::new();
        for (index, layer) in self.model.layers.iter().enumerate() {
            let (y_th, chosen) = layer.forward(x_th, &context.of_layer(index, self.config.window(index)));
            x_th = y_th;
            choices.push(chosen);
        }
        Hidden { states_th: self.model.norm.forward(x_th), choices }
    }

    /// Logits `[t, v]` of hidden states `[t, h]`.
    pub fn logits(&self, states_th: Tensor<2>) -> Tensor<2> {
        let logits_tv = ops::linear(states_th, self.head_weight());
        match &self.lm_head.bias {
            Some(bias) => logits_tv + bias.val().unsqueeze::<2>(),
            None => logits_tv,
        }
    }

    /// Mean cross-entropy of the scored positions, on the tape, `[1]`; the logits are never all in memory unless the head has a bias.
    pub fn cross_entropy(&self, states_th: Tensor<2>, targets: &Arc<[i32]>) -> Tensor<1> {
        self.cross_entropy_of(states_th, &LossContext::new(targets, self.precision))
    }

    /// Cross-entropy of each position in nats, `[t]`, 0 where it is not scored.
    pub fn token_losses(&self, states_th: Tensor<2>, targets: &Arc<[i32]>) -> Vec<f32> {
        let context = LossContext::new(targets, self.precision);
        let _ = self.cross_entropy_of(states_th, &context);
        context.token_losses.get().cloned().unwrap_or_default()
    }

    fn cross_entropy_of(&self, states_th: Tensor<2>, context: &LossContext) -> Tensor<1> {
        match &self.lm_head.bias {
            Some(_) => ops::plain::cross_entropy(self.logits(states_th), context),
            None => ops::head_cross_entropy(states_th, self.head_weight(), context),
        }
    }

    fn head_weight(&self) -> Tensor<2> {
        self.lm_head.weight.as_ref().unwrap_or(&self.model.embed_tokens.weight).val()
    }

    /// The training loss `CE + Σ weight·term` of a batch.
    pub fn loss(&self, batch: &PackedBatch, weights: &LossWeights) -> Losses {
        let hidden = self.forward(batch);
        let losses = self.head_losses(hidden.states_th, batch, weights);
        losses.with_choices(&hidden.choices, weights)
    }

    /// The terms of the loss that normed hidden states decide: cross-entropy and multi-token prediction.
    pub(crate) fn head_losses(&self, states_th: Tensor<2>, batch: &PackedBatch, weights: &LossWeights) -> Losses {
        let context =
            |batch: &PackedBatch| LossContext { weights: batch.weights.clone(), ..LossContext::new(&batch.targets, self.precision) };
        let main = context(batch);
        let mtp_block = self.model.mtp.as_ref().filter(|_| weights.mtp != 0.0);
        let for_mtp = mtp_block.map(|block| (block, states_th.clone()));
        let mut total = self.cross_entropy_of(states_th, &main);
        let token_losses = main.token_losses.get().cloned().unwrap_or_default();
        let cross_entropy = match &batch.weights {
            None => ops::scalar(&total),
            Some(_) => (token_losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / batch.scored().max(1) as f64) as f32,
        };
        let mut mtp = None;
        if let Some((block, states_th)) = for_mtp {
            let next = batch.shifted();
            let embedding_th = ops::embedding(self.model.embed_tokens.weight.val(), &next.ids);
            let states_th = self.model.norm.forward(block.forward(embedding_th, states_th, &self.layer_context(batch)));
            let term = self.cross_entropy_of(states_th, &context(&next));
            mtp = Some(ops::scalar(&term));
            total = total + term * weights.mtp;
        }
        Losses {
            total,
            cross_entropy,
            token_losses,
            mtp,
            balance: None,
            z: None,
            pull: None,
            experts: Vec::new(),
            usage: Vec::new(),
            active_heads: Vec::new(),
        }
    }

    /// Of a batch; [`LayerContext::of_layer`] for each of its layers.
    pub(crate) fn layer_context(&self, batch: &PackedBatch) -> LayerContext {
        let config = &self.config;
        let shape =
            attention::Shape { q_heads: config.num_attention_heads, kv_heads: config.num_key_value_heads, head_dim: config.head_dim };
        let cu_seqlens = batch.cu_seqlens.clone();
        let paragraphs = match &config.mechanisms.paragraphs {
            Some(paragraphs) => paragraphs.bounds(&batch.ids, &cu_seqlens).into(),
            None => cu_seqlens.clone(),
        };
        let attention = AttentionContext { shape, cu_seqlens, window: None, paragraphs, rope: self.rope.clone() };
        LayerContext { attention, precision: self.precision, steering: batch.steering.clone(), layer_steering: None }
    }
}

impl Losses {
    /// With the terms that experts and gates decide, each the mean over the layers that have them times its weight.
    pub(crate) fn with_choices(mut self, choices: &[Choices], weights: &LossWeights) -> Self {
        let gate_layers = gatings(choices).count();
        if let Some(sum) = gatings(choices).map(|(_, gating)| gating.regulariser(weights.gate_target)).reduce(|a, b| a + b)
            && weights.gate != 0.0
        {
            self.total = self.total.clone() + sum / gate_layers as f64 * weights.gate;
        }
        let layers = routings(choices).count();
        let mut add = |weight: f64, term: fn(&Routing) -> Option<Tensor<1>>| {
            let sum = routings(choices).filter_map(|(_, routing)| term(routing)).reduce(|a, b| a + b)?;
            let mean = sum / layers as f64;
            let value = ops::scalar(&mean);
            if weight != 0.0 {
                self.total = self.total.clone() + mean * weight;
            }
            Some(value)
        };
        let balance = add(weights.balance, |routing| Some(routing.balance_loss()));
        let z = add(weights.z, |routing| Some(routing.z_loss()));
        let pull = add(weights.pull, Routing::pull_loss);
        let experts = routings(choices).map(|(layer, routing)| (layer, routing.indices.clone())).collect();
        let usage = routings(choices).map(|(layer, routing)| (layer, routing.usage())).collect();
        let active_heads = gatings(choices).map(|(layer, gating)| (layer, gating.active_share())).collect();
        Self { balance, z, pull, experts, usage, active_heads, ..self }
    }
}
