//! The ERNIE-4.5 text decoder on the CPU kernels, dense and mixture of experts. Reads from top to bottom like its equations:
//!
//! ```text
//! x = embed(ids)
//! for each layer:  x += attention(rms_norm(x));  x += mlp(rms_norm(x))
//! logits = head(rms_norm(x))
//! ```
//!
//! Dimensions, which are the suffixes of names: `t` new tokens, `h` hidden_size, `q` = query heads × head_dim, `k` = key heads × head_dim,
//! `i` intermediate size, `e` experts, `s` experts selected for a token, `v` vocabulary.
//!
//! All values are f32; matrices are f32 or bf16 (see [`WeightDtype`]). Every operator is batch-invariant, so a token's values are the same bits
//! however the tokens before it were cut into calls. Oracle: `transformers` `modeling_ernie4_5.py`, `modeling_ernie4_5_moe.py`.
use ernie_checkpoint::{Checkpoint, Config, Family};
use ernie_kernels::decode::{self, CacheShape, WeightsRef};
use ernie_kernels::rope::{self, RopeTable};
use ernie_kernels::{rms_norm, router, swiglu};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::weights::{Linear, Loader, WeightDtype, Weights};

/// Multiply-adds from which experts are computed on several threads.
const PARALLEL_WORK: usize = 1 << 19;

/// A model in memory, read-only: any number of [`Session`](crate::Session)s may use it.
#[derive(Debug)]
pub struct Model {
    config: Config,
    embed_vh: Weights,
    layers: Vec<Layer>,
    norm_h: Vec<f32>,
    /// `None` if tied: then the embedding is the head.
    head_vh: Option<Weights>,
    head_bias_v: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    input_norm_h: Vec<f32>,
    attention: Attention,
    post_norm_h: Vec<f32>,
    mlp: Mlp,
}

#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
}

#[derive(Debug)]
enum Mlp {
    Dense(SwiGlu),
    Moe(Moe),
}

/// down(silu(gate x) · (up x)).
#[derive(Debug)]
struct SwiGlu {
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Moe {
    gate_eh: Vec<f32>,
    /// Added to the probabilities to select experts, and to nothing else.
    correction_bias_e: Option<Vec<f32>>,
    top_k: usize,
    norm_min: f32,
    experts: Vec<SwiGlu>,
    /// All shared experts as one, for every token; none in the 300B model.
    shared: Option<SwiGlu>,
}

/// Keys and values of one layer: `[kv_heads, capacity, head_dim]` each, rotary embedding applied to the keys.
#[derive(Debug, Default)]
pub(crate) struct LayerCache {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

/// Where new tokens stand: the first at position `start` of a cache with room for `capacity`.
#[derive(Clone, Copy)]
pub(crate) struct Positions<'a> {
    pub start: usize,
    pub capacity: usize,
    pub rope: &'a RopeTable,
}

impl Model {
    /// Loads a checkpoint; matrices that are stored as bf16 stay bf16. Multi-token-prediction weights are checked but not kept.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, with its file and tensor; [`Error::Unsupported`] for a vision-language one.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_as(checkpoint, WeightDtype::Auto)
    }

    /// Loads a checkpoint with its matrices in the form `dtype`.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_as(checkpoint: &Checkpoint, dtype: WeightDtype) -> Result<Self> {
        let config = checkpoint.config().clone();
        if config.family == Family::VlMoe {
            return Err(Error::Unsupported {
                what: "generation with a vision-language checkpoint",
                instead: "use a text checkpoint of the family (ernie4_5 or ernie4_5_moe)",
            });
        }
        checkpoint.validate()?;
        let (h, v) = (config.hidden_size, config.vocab_size);
        let load = Loader { checkpoint, dtype };
        let layers = (0..config.num_hidden_layers).map(|layer| Layer::load(&load, &config, layer)).collect::<Result<_>>()?;
        let head_has_bias = config.use_bias && config.family == Family::Moe; // the released dense code gives its head none
        Ok(Model {
            embed_vh: load.matrix("model.embed_tokens.weight", v, h)?,
            layers,
            norm_h: load.f32("model.norm.weight", &[h])?,
            head_vh: (!checkpoint.tied()).then(|| load.matrix("lm_head.weight", v, h)).transpose()?,
            head_bias_v: head_has_bias.then(|| load.f32("lm_head.bias", &[v])).transpose()?,
            config,
        })
    }

    /// The model's sizes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// New tokens through all layers, their keys and values appended to the caches: `[t]` → `[t, h]`, before the final norm.
    pub(crate) fn forward(&self, ids: &[u32], caches: &mut [LayerCache], at: Positions<'_>) -> Vec<f32> {
        let (h, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let mut x_th = vec![0.0; ids.len() * h];
        for (x_h, &id) in x_th.chunks_exact_mut(h).zip(ids) {
            self.embed_vh.copy_row(id as usize, h, x_h);
        }
        for (layer, cache) in self.layers.iter().zip(caches) {
            let a_th = layer.attention.forward(&normalised(&x_th, &layer.input_norm_h, eps), cache, at, &self.config);
            add(&mut x_th, &a_th);
            let m_th = layer.mlp.forward(&normalised(&x_th, &layer.post_norm_h, eps));
            add(&mut x_th, &m_th);
        }
        x_th
    }

    /// Logits of some tokens from their states after the last layer: `[t, h]` → `[t, v]`.
    pub(crate) fn logits(&self, x_th: &[f32]) -> Vec<f32> {
        let (h, v) = (self.config.hidden_size, self.config.vocab_size);
        let x_th = normalised(x_th, &self.norm_h, self.config.rms_norm_eps as f32);
        let mut logits_tv = vec![0.0; x_th.len() / h * v];
        let head_vh = self.head_vh.as_ref().unwrap_or(&self.embed_vh).view();
        decode::linear(&mut logits_tv, &x_th, head_vh, self.head_bias_v.as_deref(), x_th.len() / h, v, h);
        logits_tv
    }
}

impl Layer {
    fn load(load: &Loader<'_>, config: &Config, index: usize) -> Result<Self> {
        let (prefix, h) = (format!("model.layers.{index}"), config.hidden_size);
        let mlp = format!("{prefix}.mlp");
        Ok(Layer {
            input_norm_h: load.f32(&format!("{prefix}.input_layernorm.weight"), &[h])?,
            attention: Attention::load(load, config, &format!("{prefix}.self_attn"))?,
            post_norm_h: load.f32(&format!("{prefix}.post_attention_layernorm.weight"), &[h])?,
            mlp: if config.is_moe_layer(index) {
                Mlp::Moe(Moe::load(load, config, &mlp)?)
            } else {
                Mlp::Dense(SwiGlu::load(load, &mlp, h, config.intermediate_size, config.use_bias)?)
            },
        })
    }
}

impl Attention {
    fn load(load: &Loader<'_>, config: &Config, prefix: &str) -> Result<Self> {
        let (h, bias) = (config.hidden_size, config.use_bias);
        let (q, k) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        Ok(Attention {
            q: load.linear(&format!("{prefix}.q_proj"), q, h, bias)?,
            k: load.linear(&format!("{prefix}.k_proj"), k, h, bias)?,
            v: load.linear(&format!("{prefix}.v_proj"), k, h, bias)?,
            o: load.linear(&format!("{prefix}.o_proj"), h, q, bias)?,
        })
    }

    /// Causal self-attention with grouped query heads; rotary embedding over interleaved pairs. `[t, h]` → `[t, h]`.
    fn forward(&self, x_th: &[f32], cache: &mut LayerCache, at: Positions<'_>, config: &Config) -> Vec<f32> {
        let shape = CacheShape {
            q_heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            capacity: at.capacity,
        };
        let (mut q_tq, mut k_tk, v_tk) = (self.q.forward(x_th), self.k.forward(x_th), self.v.forward(x_th));
        rope::apply_interleaved(&mut q_tq, at.rope, shape.q_heads, |row| at.start + row, false);
        rope::apply_interleaved(&mut k_tk, at.rope, shape.kv_heads, |row| at.start + row, false);
        cache.store(&k_tk, &v_tk, at.start, shape);
        let mut a_tq = vec![0.0; q_tq.len()];
        decode::attention(&mut a_tq, &q_tq, &cache.keys, &cache.values, at.start, shape);
        self.o.forward(&a_tq)
    }
}

impl LayerCache {
    /// New keys and values `[t, kv_heads·head_dim]` to positions `start..`.
    fn store(&mut self, k_tk: &[f32], v_tk: &[f32], start: usize, shape: CacheShape) {
        let d = shape.head_dim;
        for (new, cache) in [(k_tk, &mut self.keys), (v_tk, &mut self.values)] {
            for (row, heads) in new.chunks_exact(shape.kv_heads * d).enumerate() {
                for (head, values) in heads.chunks_exact(d).enumerate() {
                    cache[(head * shape.capacity + start + row) * d..][..d].copy_from_slice(values);
                }
            }
        }
    }
}

impl Mlp {
    fn forward(&self, x_th: &[f32]) -> Vec<f32> {
        match self {
            Mlp::Dense(mlp) => mlp.forward(x_th),
            Mlp::Moe(moe) => moe.forward(x_th),
        }
    }
}

impl SwiGlu {
    fn load(load: &Loader<'_>, prefix: &str, h: usize, i: usize, bias: bool) -> Result<Self> {
        Ok(SwiGlu {
            gate: load.linear(&format!("{prefix}.gate_proj"), i, h, bias)?,
            up: load.linear(&format!("{prefix}.up_proj"), i, h, bias)?,
            down: load.linear(&format!("{prefix}.down_proj"), h, i, bias)?,
        })
    }

    /// `[t, h]` → `[t, h]`.
    fn forward(&self, x_th: &[f32]) -> Vec<f32> {
        let (gate_ti, up_ti) = (self.gate.forward(x_th), self.up.forward(x_th));
        let mut y_ti = vec![0.0; gate_ti.len()];
        swiglu::forward(&mut y_ti, &gate_ti, &up_ti);
        self.down.forward(&y_ti)
    }
}

impl Moe {
    fn load(load: &Loader<'_>, config: &Config, prefix: &str) -> Result<Self> {
        let moe = config.moe.as_ref().expect("a layer is MoE only by `config.moe`");
        let (h, i, e) = (config.hidden_size, moe.intermediate_size, moe.num_experts);
        let bias_name = format!("{prefix}.moe_statics.e_score_correction_bias");
        // Code that writes such models disagrees whether routed experts have biases where the other projections do, so the files decide.
        let expert = |index| {
            let name = format!("{prefix}.experts.{index}");
            SwiGlu::load(load, &name, h, i, load.checkpoint.contains(&format!("{name}.gate_proj.bias")))
        };
        let shared = || SwiGlu::load(load, &format!("{prefix}.shared_experts"), h, i * moe.num_shared_experts, config.use_bias);
        Ok(Moe {
            gate_eh: load.f32(&format!("{prefix}.gate.weight"), &[e, h])?,
            // Present in every released checkpoint, and used whenever it is there, as the released code does: a config may be wrong about it.
            correction_bias_e: load.checkpoint.contains(&bias_name).then(|| load.f32(&bias_name, &[1, e])).transpose()?,
            top_k: moe.top_k,
            norm_min: moe.norm_min as f32,
            experts: (0..e).map(expert).collect::<Result<_>>()?,
            shared: (moe.num_shared_experts > 0).then(shared).transpose()?,
        })
    }

    /// p = softmax(W_g x); S = the s experts of largest p + bias; w = p\[S\] / max(Σ p\[S\], norm_min). Returns `[t, s]` experts and weights.
    fn route(&self, x_th: &[f32], h: usize) -> (Vec<u32>, Vec<f32>) {
        let (e, s) = (self.experts.len(), self.top_k);
        let mut p_te = vec![0.0; x_th.len() / h * e];
        decode::linear(&mut p_te, x_th, WeightsRef::F32(&self.gate_eh), None, x_th.len() / h, e, h);
        p_te.chunks_exact_mut(e).for_each(softmax);
        let selected_ts = router::select(&p_te, self.correction_bias_e.as_deref(), e, s);
        let mut w_ts = Vec::with_capacity(selected_ts.len());
        for (selected_s, p_e) in selected_ts.chunks_exact(s).zip(p_te.chunks_exact(e)) {
            let sum: f32 = selected_s.iter().map(|&expert| p_e[expert as usize]).sum();
            w_ts.extend(selected_s.iter().map(|&expert| p_e[expert as usize] / sum.max(self.norm_min)));
        }
        (selected_ts, w_ts)
    }

    /// y = Σ_s w_s · expert_s(x) (+ shared(x)); the sum runs in the order of selection whatever else is in the batch. `[t, h]` → `[t, h]`.
    fn forward(&self, x_th: &[f32]) -> Vec<f32> {
        let (h, s) = (self.gate_eh.len() / self.experts.len(), self.top_k);
        let (selected_ts, w_ts) = self.route(x_th, h);

        // Each expert takes all its tokens at once, so its weights are read once.
        let mut slots_of_expert: Vec<Vec<usize>> = vec![Vec::new(); self.experts.len()];
        for (slot, &expert) in selected_ts.iter().enumerate() {
            slots_of_expert[expert as usize].push(slot);
        }
        let tasks: Vec<(&SwiGlu, Vec<usize>)> = self.experts.iter().zip(slots_of_expert).filter(|(_, slots)| !slots.is_empty()).collect();
        let run = |(expert, slots): &(&SwiGlu, Vec<usize>)| {
            let x: Vec<f32> = slots.iter().flat_map(|slot| &x_th[slot / s * h..][..h]).copied().collect();
            expert.forward(&x)
        };
        let work = selected_ts.len() * self.experts[0].gate.n * h * 3;
        let outputs: Vec<Vec<f32>> =
            if work < PARALLEL_WORK { tasks.iter().map(run).collect() } else { tasks.par_iter().map(run).collect() };

        let mut place_of_slot = vec![(0, 0); selected_ts.len()];
        for (task, (_, slots)) in tasks.iter().enumerate() {
            slots.iter().enumerate().for_each(|(row, &slot)| place_of_slot[slot] = (task, row));
        }
        let mut y_th = vec![0.0; x_th.len()];
        for (slot, (&(task, row), &w)) in place_of_slot.iter().zip(&w_ts).enumerate() {
            let y_h = &mut y_th[slot / s * h..][..h];
            y_h.iter_mut().zip(&outputs[task][row * h..][..h]).for_each(|(y, o)| *y += w * o);
        }
        if let Some(shared) = &self.shared {
            add(&mut y_th, &shared.forward(x_th));
        }
        y_th
    }
}

fn normalised(x_th: &[f32], w_h: &[f32], eps: f32) -> Vec<f32> {
    let mut y_th = vec![0.0; x_th.len()];
    rms_norm::forward(&mut y_th, x_th, w_h, eps);
    y_th
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// In f32, as the released router; few values, so plain.
fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}
