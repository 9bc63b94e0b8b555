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
//! Matrices are f32, bf16 or bytes (see [`WeightDtype`]); all values between them are f32, and rounded to bytes in front of matrices of bytes. Every
//! operator is batch-invariant, so a token's values are the same bits whatever is computed beside it and however its prompt was cut into steps. Oracle: `transformers` `modeling_ernie4_5.py`, `modeling_ernie4_5_moe.py`.
use std::sync::Arc;

use ernie_checkpoint::{Checkpoint, Config, Family, TensorGroup};
use ernie_kernels::arch::matrix::Mat;
use ernie_kernels::arch::pool::Pool;
use ernie_kernels::int8::{self, Rows8};
use ernie_kernels::paged::{self, KvDtype};
use ernie_kernels::rope::RopeTable;

use crate::cache::{Cache, CacheLayout, LayerCache, LayerPast};
use crate::error::{Error, Result};
use crate::gates::Gates;
use crate::moe::Moe;
use crate::profile::{Part, Profile};
use crate::runner::Workspace;
use crate::weights::{GateUp, Input, Linear, Loader, Needs, WeightDtype};

/// How to keep a model in memory and compute with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Form of the matrices.
    pub dtype: WeightDtype,
    /// Threads that compute; 0 takes as many as there are cores.
    pub threads: usize,
    /// Form of keys and values; by default f32, or bf16 where the weights are bytes.
    pub kv_dtype: Option<KvDtype>,
}

/// A model in memory, read-only: any number of [`Session`](crate::Session)s may use it.
#[derive(Debug)]
pub struct Model {
    config: Config,
    pool: Arc<Pool>,
    kv_dtype: KvDtype,
    embed_vh: Linear,
    layers: Vec<Layer>,
    norm_h: Vec<f32>,
    /// `None` if tied: then the embedding is the head.
    head_vh: Option<Linear>,
    /// Present in some checkpoints: guesses the token after the next.
    mtp: Option<Mtp>,
}

/// The multi-token-prediction block: its norms and projection, and a dense layer. Final norm and head are the model's.
#[derive(Debug)]
struct Mtp {
    emb_norm_h: Vec<f32>,
    hidden_norm_h: Vec<f32>,
    /// `[h, 2h]`.
    proj: Linear,
    layer: Layer,
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
    /// Queries, keys and values side by side.
    qkv: Linear,
    o: Linear,
    gates: Option<Gates>,
    /// `[n_kv, d]`: what weighs a paragraph's tokens for its summary, in layers that attend to paragraphs.
    paragraph_pool: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Mlp {
    Dense(Box<SwiGlu>),
    Moe(Box<Moe>),
}

/// down(silu(gate x) · (up x)).
#[derive(Debug)]
pub(crate) struct SwiGlu {
    gate_up: GateUp,
    down: Linear,
}

impl Model {
    /// Loads a checkpoint with its matrices as they are stored.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint, with its file and tensor; [`Error::Unsupported`] for a vision-language one.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_with(checkpoint, LoadOptions::default())
    }

    /// Loads a checkpoint with its matrices in the form `dtype`.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_as(checkpoint: &Checkpoint, dtype: WeightDtype) -> Result<Self> {
        Self::load_with(checkpoint, LoadOptions { dtype, ..LoadOptions::default() })
    }

    /// Loads a checkpoint.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_with(checkpoint: &Checkpoint, options: LoadOptions) -> Result<Self> {
        let config = checkpoint.config().clone();
        if config.family == Family::VlMoe {
            return Err(Error::Unsupported {
                what: "generation with a vision-language checkpoint",
                instead: "use a text checkpoint of the family (ernie4_5 or ernie4_5_moe)",
            });
        }
        checkpoint.validate_structure()?;
        let threads = if options.threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { options.threads };
        let pool = Arc::new(Pool::new(threads));
        let (h, v) = (config.hidden_size, config.vocab_size);
        let load = Loader { checkpoint, dtype: options.dtype, pool: &pool };
        // The released dense code gives its head no bias.
        let head_bias = (config.use_bias && config.family == Family::Moe).then_some("lm_head.bias");
        // A tied head with a bias is a matrix of its own: an embedding has no bias.
        let own_head = !checkpoint.tied() || head_bias.is_some();
        let head = if checkpoint.tied() { "model.embed_tokens.weight" } else { "lm_head.weight" };
        // The largest matrices first: while one is copied its file's pages are in memory too, and later so is everything else.
        let embed_vh = load.matrix("model.embed_tokens.weight", v, h, None)?;
        let head_vh = own_head.then(|| load.matrix(head, v, h, head_bias)).transpose()?;
        let layers: Vec<Layer> = (0..config.num_hidden_layers)
            .map(|layer| {
                let prefix = format!("model.layers.{layer}");
                let mut loaded = Layer::load(&load, &config, &prefix, config.is_moe_layer(layer))?;
                if let Some(settings) = &config.mechanisms.context_gate {
                    let gates = Gates::load(&load, &config, &format!("{prefix}.self_attn.context_gate"), settings, layer)?;
                    loaded.attention.gates = Some(gates);
                }
                if config.paragraphs(layer).is_some() {
                    let shape = [config.num_key_value_heads, config.head_dim];
                    loaded.attention.paragraph_pool = Some(load.f32(&format!("{prefix}.self_attn.paragraph_pool.weight"), &shape)?);
                }
                Ok(loaded)
            })
            .collect::<Result<_>>()?;
        let bytes = layers.first().is_some_and(|layer| layer.attention.qkv.is_int8());
        let mtp = checkpoint.contains("model.mtp_block.0.input_layernorm.weight").then(|| Mtp::load(&load, &config)).transpose()?;
        // What is not kept must be sound all the same: the blocks for tokens further ahead.
        let further = |name: &str| mtp.is_none() || !name.split('.').any(|part| part == "0");
        for spec in config.tensor_specs().iter().filter(|spec| spec.group == TensorGroup::Mtp && checkpoint.contains(&spec.name)) {
            if further(&spec.name) {
                checkpoint.validate_numbers(&spec.name)?;
                checkpoint.release(&spec.name);
            }
        }
        Ok(Model {
            embed_vh,
            layers,
            norm_h: load.f32("model.norm.weight", &[h])?,
            head_vh,
            mtp,
            kv_dtype: options.kv_dtype.unwrap_or(if bytes { KvDtype::Bf16 } else { KvDtype::F32 }),
            config,
            pool,
        })
    }

    /// Where keys and values are: of the layers of the network, and of the multi-token-prediction block.
    pub(crate) fn cache_layout(&self) -> CacheLayout {
        CacheLayout::new(&self.config, usize::from(self.mtp.is_some()), self.kv_dtype)
    }

    /// Whether heads have gates, so that a text can only be gone on from where it ended, or from the end of a block.
    pub(crate) fn has_gates(&self) -> bool {
        self.config.mechanisms.context_gate.is_some()
    }

    /// Whether there are layers that see a window or their paragraph only.
    pub(crate) fn has_windows(&self) -> bool {
        self.config.local_layers() > 0
    }

    /// Whether the checkpoint has a block that guesses the token after the next.
    pub fn predicts(&self) -> bool {
        self.mtp.is_some()
    }

    /// The model's sizes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Form of keys and values.
    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// The threads that compute.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whether the projections are bytes.
    pub fn is_int8(&self) -> bool {
        self.layers.first().is_some_and(|layer| layer.attention.qkv.is_int8())
    }

    /// Memory of the routed experts of all layers.
    pub(crate) fn expert_bytes(&self) -> f64 {
        let bytes = |layer: &Layer| match &layer.mlp {
            Mlp::Moe(moe) => moe.expert_bytes(),
            Mlp::Dense(_) => 0,
        };
        self.layers.iter().map(bytes).sum::<usize>() as f64
    }

    /// Memory of a weight of the projections.
    pub(crate) fn bytes_per_weight(&self) -> f64 {
        self.layers.first().map_or(4.0, |layer| layer.attention.qkv.bytes_per_weight())
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Checks that there are ids and that the model knows them.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::UnknownToken`].
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            Some(position) => Err(Error::UnknownToken { position, id: ids[position], vocab_size }),
            None => Ok(()),
        }
    }

    /// New tokens through all layers, their keys and values stored in the cache: `work.x_th` is then their state before the final norm.
    /// `work.spans` says where each stands.
    pub(crate) fn forward(&self, ids: &[u32], cache: &mut Cache, rope: &RopeTable, work: &mut Workspace) {
        let (h, t) = (self.config.hidden_size, ids.len());
        work.profile.begin();
        work.x_th.resize(t * h, 0.0);
        for (x_h, &id) in work.x_th.chunks_exact_mut(h).zip(ids) {
            self.embed_vh.copy_row(id as usize, x_h);
        }
        work.normed_th.resize(t * h, 0.0);
        work.profile.lap(Part::Embedding);
        for (index, layer) in self.layers.iter().enumerate() {
            self.layer(index, layer, cache, rope, work);
        }
    }

    /// One layer: `work.x_th` before and after; its keys and values are those of layer `index` of the cache.
    fn layer(&self, index: usize, layer: &Layer, cache: &mut Cache, rope: &RopeTable, work: &mut Workspace) {
        let pool = &*self.pool;
        layer.attention.forward(pool, &self.config, index, &layer.input_norm_h, cache, rope, work);
        let Workspace { x_th, normed_th, inner_ti, both, rows, moe, gates, load, profile, .. } = work;
        if layer.attention.gates.is_some() {
            load.count_heads(index, &gates.gates_tn);
        }
        let eps = self.config.rms_norm_eps as f32;
        match &layer.mlp {
            Mlp::Dense(mlp) => {
                normalise(pool, normed_th, rows, x_th, &layer.post_norm_h, eps, mlp.gate_up.needs());
                profile.lap(Part::Norm);
                mlp.add_to(pool, x_th, normed_th, inner_ti, both, rows, profile);
            }
            Mlp::Moe(routed) => {
                normalise(pool, normed_th, rows, x_th, &layer.post_norm_h, eps, routed.needs());
                profile.lap(Part::Norm);
                routed.forward(pool, x_th, Input { values: normed_th, rows }, moe, profile);
                load.count_experts(index, x_th.len() / self.config.hidden_size, &moe.starts_e);
                if let Some(shared) = &routed.shared {
                    shared.add_to(pool, x_th, normed_th, inner_ti, both, rows, profile);
                }
            }
        }
    }

    /// The multi-token-prediction block over some rows of `work.x_th`, as [`Model::forward`] left them, each with the token that follows it:
    /// x = W·\[norm_e(embed(next)), norm_h(norm(x))\], then one layer. `work.x_th` is then the state from which [`Model::logits`] tells the token after
    /// the next. `work.spans` says where the rows stand; their keys and values go to the last layer of the cache.
    pub(crate) fn predict(&self, rows_of: &[u32], next: &[u32], cache: &mut Cache, rope: &RopeTable, work: &mut Workspace) {
        let Some(mtp) = &self.mtp else { return };
        let (h, eps, pool) = (self.config.hidden_size, self.config.rms_norm_eps as f32, &*self.pool);
        work.profile.begin();
        let Workspace { x_th, normed_th, inner_ti, both, rows, profile, .. } = work;
        let t = next.len();
        // Two halves: embeddings of the next tokens, states after the final norm; then each with its own norm, side by side.
        inner_ti.resize(2 * t * h, 0.0);
        let (embedded, states) = inner_ti.split_at_mut(t * h);
        for (((embedded, state), &row), &next) in embedded.chunks_exact_mut(h).zip(states.chunks_exact_mut(h)).zip(rows_of).zip(next) {
            self.embed_vh.copy_row(next as usize, embedded);
            state.copy_from_slice(&x_th[row as usize * h..][..h]);
        }
        normed_th.resize(t * h, 0.0);
        int8::norm(pool, normed_th, states, &self.norm_h, eps);
        both.resize(2 * t * h, 0.0);
        int8::norm(pool, states, normed_th, &mtp.hidden_norm_h, eps);
        int8::norm(pool, normed_th, embedded, &mtp.emb_norm_h, eps);
        for (joined, (embedded, state)) in both.chunks_exact_mut(2 * h).zip(normed_th.chunks_exact(h).zip(states.chunks_exact(h))) {
            joined[..h].copy_from_slice(embedded);
            joined[h..].copy_from_slice(state);
        }
        if mtp.proj.is_int8() {
            rows.quantise(pool, both, 2 * h);
        }
        x_th.resize(t * h, 0.0);
        mtp.proj.forward(pool, x_th, Input { values: both, rows }, false);
        profile.lap(Part::Embedding);
        self.layer(self.layers.len(), &mtp.layer, cache, rope, work);
    }

    /// `work.x_th` as [`Model::forward`] left it, after the last norm: `[t, h]`.
    pub(crate) fn final_states(&self, work: &Workspace, states_th: &mut [f32]) {
        int8::norm(&self.pool, states_th, &work.x_th, &self.norm_h, self.config.rms_norm_eps as f32);
    }

    /// Logits of the rows in `work.wanted` of `work.x_th`: `[wanted, v]` in `work.logits`.
    pub(crate) fn logits(&self, work: &mut Workspace) {
        let Workspace { x_th, normed_th, rows, wanted, logits, inner_ti, profile, .. } = work;
        let (h, v) = (self.config.hidden_size, self.config.vocab_size);
        // The wanted rows together.
        inner_ti.resize(wanted.len() * h, 0.0);
        for (row, &wanted) in inner_ti.chunks_exact_mut(h).zip(wanted.iter()) {
            row.copy_from_slice(&x_th[wanted as usize * h..][..h]);
        }
        let head_vh = self.head_vh.as_ref().unwrap_or(&self.embed_vh);
        normed_th.resize(wanted.len() * h, 0.0);
        normalise(&self.pool, normed_th, rows, inner_ti, &self.norm_h, self.config.rms_norm_eps as f32, head_vh.needs());
        logits.resize(wanted.len() * v, 0.0);
        head_vh.forward(&self.pool, logits, Input { values: normed_th, rows }, false);
        profile.lap(Part::Head);
    }
}

/// normed = rms_norm(x)·w, all `[t, h]`, in the forms that are needed.
fn normalise(pool: &Pool, normed_th: &mut [f32], rows: &mut Rows8, x_th: &[f32], w_h: &[f32], eps: f32, needs: Needs) {
    match needs {
        Needs::Values => int8::norm(pool, normed_th, x_th, w_h, eps),
        Needs::Bytes => rows.quantise_norm(pool, &mut [], x_th, w_h, eps),
        Needs::Both => rows.quantise_norm(pool, normed_th, x_th, w_h, eps),
    }
}

impl Mtp {
    fn load(load: &Loader<'_>, config: &Config) -> Result<Self> {
        let h = config.hidden_size;
        Ok(Mtp {
            emb_norm_h: load.f32("model.mtp_emb_norm.0.weight", &[h])?,
            hidden_norm_h: load.f32("model.mtp_hidden_norm.0.weight", &[h])?,
            proj: load.linear(&[("model.mtp_linear_proj.0".to_owned(), h)], 2 * h, config.use_bias)?,
            layer: Layer::load(load, config, "model.mtp_block.0", false)?,
        })
    }
}

impl Layer {
    fn load(load: &Loader<'_>, config: &Config, prefix: &str, routed: bool) -> Result<Self> {
        let h = config.hidden_size;
        let mlp = format!("{prefix}.mlp");
        Ok(Layer {
            input_norm_h: load.f32(&format!("{prefix}.input_layernorm.weight"), &[h])?,
            attention: Attention::load(load, config, &format!("{prefix}.self_attn"))?,
            post_norm_h: load.f32(&format!("{prefix}.post_attention_layernorm.weight"), &[h])?,
            mlp: if routed {
                Mlp::Moe(Box::new(Moe::load(load, config, &mlp)?))
            } else {
                Mlp::Dense(Box::new(SwiGlu::load(load, &mlp, h, config.intermediate_size, config.use_bias)?))
            },
        })
    }
}

impl Attention {
    fn load(load: &Loader<'_>, config: &Config, prefix: &str) -> Result<Self> {
        let (h, bias) = (config.hidden_size, config.use_bias);
        let (q, k) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let qkv = [("q_proj", q), ("k_proj", k), ("v_proj", k)].map(|(name, n)| (format!("{prefix}.{name}"), n));
        let (qkv, o) = (load.linear(&qkv, h, bias)?, load.linear(&[(format!("{prefix}.o_proj"), h)], q, bias)?);
        Ok(Attention { qkv, o, gates: None, paragraph_pool: None })
    }

    /// x += attention(rms_norm(x)): causal self-attention with grouped query heads; rotary embedding over interleaved pairs.
    #[allow(clippy::too_many_arguments)] // A layer's place in the model, the cache, and working memory.
    fn forward(
        &self,
        pool: &Pool,
        config: &Config,
        layer: usize,
        norm_h: &[f32],
        cache: &mut Cache,
        rope: &RopeTable,
        work: &mut Workspace,
    ) {
        let Workspace { x_th, normed_th, qkv, attended_tq, rows, spans, gates, profile, .. } = work;
        let (t, d) = (x_th.len() / norm_h.len(), config.head_dim);
        let (q, k) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let needs = if self.gates.is_some() && self.qkv.is_int8() { Needs::Both } else { self.qkv.needs() };
        normalise(pool, normed_th, rows, x_th, norm_h, config.rms_norm_eps as f32, needs);
        if let Some(own) = &self.gates {
            own.forward(pool, normed_th, &spans.full, &mut cache.states, gates);
        }
        profile.lap(Part::Norm);
        qkv.resize(t * (q + 2 * k), 0.0);
        self.qkv.forward(pool, qkv, Input { values: normed_th, rows }, false);
        profile.lap(Part::Qkv);
        let qkv = Mat::new(qkv, t, q + 2 * k);
        let LayerCache { kv, spans, layer, mut past } = cache.of_layer(layer, spans);
        paged::append(pool, kv, layer, qkv, q, rope, spans);
        if let (LayerPast::Paragraphs { summaries, layer: index, paragraphs }, Some(vectors)) = (&mut past, &self.paragraph_pool) {
            paged::summarise(pool, summaries, *index, vectors, kv, layer, rope, spans, paragraphs);
        }
        profile.lap(Part::Append);
        attended_tq.resize(t * q, 0.0);
        let gates = self.gates.is_some().then_some(&gates.gates_tn[..]);
        let keys = paged::Layer { kv, layer, q_heads: config.num_attention_heads, past: past.as_past(), gates };
        paged::attention(pool, attended_tq, qkv, Some(rope), keys, spans);
        profile.lap(Part::Attention);
        if self.o.is_int8() {
            rows.quantise(pool, attended_tq, q);
        }
        self.o.forward(pool, x_th, Input { values: attended_tq, rows }, true);
        profile.lap(Part::Output);
    }
}

impl SwiGlu {
    pub fn load(load: &Loader<'_>, prefix: &str, h: usize, i: usize, bias: bool) -> Result<Self> {
        Ok(SwiGlu { gate_up: load.gate_up(prefix, i, h, bias)?, down: load.down(prefix, h, i, bias)? })
    }

    /// Whether it multiplies bytes.
    pub fn is_int8(&self) -> bool {
        self.gate_up.is_int8()
    }

    /// x += mlp(input), `[t, h]`. `rows` holds the bytes of `input`, and afterwards others.
    #[allow(clippy::too_many_arguments)] // Input, output, and working memory.
    fn add_to(
        &self,
        pool: &Pool,
        x_th: &mut [f32],
        input: &[f32],
        inner_ti: &mut Vec<f32>,
        both: &mut Vec<f32>,
        rows: &mut Rows8,
        profile: &mut Profile,
    ) {
        let i = self.gate_up.i;
        inner_ti.resize(input.len() / self.down.n * i, 0.0);
        self.gate_up.forward(pool, inner_ti, both, Input { values: input, rows });
        profile.lap(Part::Up);
        if self.down.is_int8() {
            rows.quantise(pool, inner_ti, i);
        }
        self.down.forward(pool, x_th, Input { values: inner_ti, rows }, true);
        profile.lap(Part::Down);
    }
}
