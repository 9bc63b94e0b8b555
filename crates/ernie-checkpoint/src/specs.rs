//! The tensors that a config asks for, under their Hugging Face names, without allocating any of them.

use crate::config::{Config, Family, MoeConfig, VlConfig};

/// Where a tensor belongs; optional groups are there as a whole or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorGroup {
    /// The input embedding.
    Embedding,
    /// Layers and final norm, apart from routed experts.
    Text,
    /// Weights of routed text experts.
    RoutedExpert,
    /// Biases of routed experts: the remote code has them if `use_bias`, transformers 5 does not. Optional.
    ExpertBias,
    /// `lm_head`; its absence ties the head to the embedding.
    Head,
    /// The multi-token-prediction block. Optional: transformers drops it on saving.
    Mtp,
    /// Vision experts with their router, vision transformer and resampler.
    Vision,
}

/// What a tensor does; decides how it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorRole {
    /// Matrix of a linear map, [out, in]; stored in the chosen dtype.
    Projection,
    /// [vocab, hidden], input embedding or output head; stored in the chosen dtype.
    Embedding,
    /// Matrix that decides, of a router or of gates over heads; always f32.
    Router,
    /// The router's correction bias, always f32: rounding it to bf16 destroys it.
    CorrectionBias,
    /// Norm weights and biases of linear maps, always f32.
    Vector,
}

/// One tensor that a model has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its Hugging Face name.
    pub name: String,
    /// Its shape; projections are [out, in].
    pub shape: Vec<usize>,
    /// Whether a checkpoint without it is incomplete.
    pub required: bool,
    /// Where it belongs.
    pub group: TensorGroup,
    /// What it does.
    pub role: TensorRole,
}

impl Config {
    /// Every tensor of the model: embedding, layers in order, final norm, output head, MTP block, vision side.
    ///
    /// `lm_head.weight` is required exactly if `tie_word_embeddings` is false, which [`crate::Checkpoint`] sets by its presence. MTP tensors are listed where
    /// `num_nextn_predict_layers` > 0, never required; biases of routed experts where `use_bias`, never required.
    /// The vision-language router matrices are [hidden, experts], as released; elsewhere they are [experts, hidden].
    pub fn tensor_specs(&self) -> Vec<TensorSpec> {
        tensor_specs(self)
    }
}

pub(crate) fn tensor_specs(config: &Config) -> Vec<TensorSpec> {
    let mut list = List { specs: Vec::new(), group: TensorGroup::Embedding, required: true, bias: config.use_bias };
    let (h, v) = (config.hidden_size, config.vocab_size);
    list.push("model.embed_tokens.weight".into(), vec![v, h], TensorRole::Embedding);
    list.group = TensorGroup::Text;
    for layer in 0..config.num_hidden_layers {
        let name = format!("model.layers.{layer}");
        match &config.moe {
            Some(moe) if config.is_moe_layer(layer) => {
                list.attention(config, &name);
                list.experts(config, moe, &format!("{name}.mlp"));
            }
            _ => list.dense_layer(config, &name),
        }
        if config.paragraphs(layer).is_some() {
            let shape = vec![config.num_key_value_heads, config.head_dim];
            list.push(format!("{name}.self_attn.paragraph_pool.weight"), shape, TensorRole::Router);
        }
    }
    list.vector("model.norm.weight".into(), h);
    list.group = TensorGroup::Head;
    list.required = !config.tie_word_embeddings;
    list.push("lm_head.weight".into(), vec![v, h], TensorRole::Embedding);
    if config.use_bias && config.family == Family::Moe {
        // Of the released code only the text MoE model gives its head a bias, tied or not.
        list.required = true;
        list.vector("lm_head.bias".into(), v);
    }
    list.group = TensorGroup::Mtp;
    list.required = false;
    for i in 0..config.num_nextn_predict_layers {
        list.vector(format!("model.mtp_emb_norm.{i}.weight"), h);
        list.vector(format!("model.mtp_hidden_norm.{i}.weight"), h);
        list.linear(&format!("model.mtp_linear_proj.{i}"), h, 2 * h);
        list.dense_layer(config, &format!("model.mtp_block.{i}"));
    }
    if let Some(vl) = &config.vl {
        list.group = TensorGroup::Vision;
        list.required = true;
        list.vision_transformer(vl);
        list.resampler(vl, h);
    }
    list.specs
}

/// The list in the making, with the group that is being listed.
struct List {
    specs: Vec<TensorSpec>,
    group: TensorGroup,
    required: bool,
    bias: bool,
}

impl List {
    fn push(&mut self, name: String, shape: Vec<usize>, role: TensorRole) {
        self.specs.push(TensorSpec { name, shape, required: self.required, group: self.group, role });
    }

    fn vector(&mut self, name: String, width: usize) {
        self.push(name, vec![width], TensorRole::Vector);
    }

    fn matrix(&mut self, name: &str, out: usize, input: usize) {
        self.push(format!("{name}.weight"), vec![out, input], TensorRole::Projection);
    }

    /// Weight, and a bias if the config has them.
    fn linear(&mut self, name: &str, out: usize, input: usize) {
        self.matrix(name, out, input);
        if self.bias {
            self.vector(format!("{name}.bias"), out);
        }
    }

    /// Weight and bias, as everywhere in the vision transformer and the resampler.
    fn affine(&mut self, name: &str, out: usize, input: usize) {
        self.matrix(name, out, input);
        self.vector(format!("{name}.bias"), out);
    }

    fn layer_norm(&mut self, name: &str, width: usize) {
        self.vector(format!("{name}.weight"), width);
        self.vector(format!("{name}.bias"), width);
    }

    fn attention(&mut self, config: &Config, layer: &str) {
        let h = config.hidden_size;
        let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        self.vector(format!("{layer}.input_layernorm.weight"), h);
        self.linear(&format!("{layer}.self_attn.q_proj"), q, h);
        self.linear(&format!("{layer}.self_attn.k_proj"), kv, h);
        self.linear(&format!("{layer}.self_attn.v_proj"), kv, h);
        self.linear(&format!("{layer}.self_attn.o_proj"), h, q);
        if config.mechanisms.context_gate.is_some() && self.group != TensorGroup::Mtp {
            let (gate, heads) = (format!("{layer}.self_attn.context_gate"), config.num_attention_heads);
            self.push(format!("{gate}.weight"), vec![heads, h], TensorRole::Router);
            self.vector(format!("{gate}.bias"), heads);
            self.vector(format!("{gate}.density"), heads);
            self.vector(format!("{gate}.decay"), 1);
        }
        self.vector(format!("{layer}.post_attention_layernorm.weight"), h);
    }

    fn swiglu(&mut self, name: &str, h: usize, width: usize) {
        self.linear(&format!("{name}.gate_proj"), width, h);
        self.linear(&format!("{name}.up_proj"), width, h);
        self.linear(&format!("{name}.down_proj"), h, width);
    }

    fn dense_layer(&mut self, config: &Config, layer: &str) {
        self.attention(config, layer);
        self.swiglu(&format!("{layer}.mlp"), config.hidden_size, config.intermediate_size);
    }

    /// Router, correction bias, routed experts (text, then vision) and the shared experts as one SwiGLU.
    fn experts(&mut self, config: &Config, moe: &MoeConfig, mlp: &str) {
        let (h, e) = (config.hidden_size, moe.num_experts);
        let gate = if config.family == Family::VlMoe { vec![h, e] } else { vec![e, h] };
        self.push(format!("{mlp}.gate.weight"), gate, TensorRole::Router);
        if let Some(vision) = moe.vision {
            self.group = TensorGroup::Vision;
            self.push(format!("{mlp}.gate.weight_1"), vec![h, vision.num_experts], TensorRole::Router);
            self.group = TensorGroup::Text;
        }
        let bias_rows = if moe.vision.is_some() { 2 } else { 1 };
        // The released code always has the bias; a config that says it is unused may leave it out.
        self.required = moe.use_correction_bias;
        let bias = format!("{mlp}.moe_statics.e_score_correction_bias");
        self.push(bias, vec![bias_rows, e], TensorRole::CorrectionBias);
        self.required = true;
        for expert in 0..e {
            self.expert(&format!("{mlp}.experts.{expert}"), h, moe.intermediate_size, TensorGroup::RoutedExpert);
        }
        if let Some(vision) = moe.vision {
            for expert in e..e + vision.num_experts {
                self.expert(&format!("{mlp}.experts.{expert}"), h, vision.intermediate_size, TensorGroup::Vision);
            }
        }
        self.group = TensorGroup::Text;
        if moe.num_shared_experts > 0 {
            self.swiglu(&format!("{mlp}.shared_experts"), h, moe.num_shared_experts * moe.intermediate_size);
        }
    }

    fn expert(&mut self, name: &str, h: usize, width: usize, group: TensorGroup) {
        for (part, out, input) in [("gate_proj", width, h), ("up_proj", width, h), ("down_proj", h, width)] {
            self.group = group;
            self.required = true;
            self.matrix(&format!("{name}.{part}"), out, input);
            if self.bias {
                self.group = TensorGroup::ExpertBias;
                self.required = false;
                self.vector(format!("{name}.{part}.bias"), out);
            }
        }
        self.required = true;
    }

    fn vision_transformer(&mut self, vl: &VlConfig) {
        let v = &vl.vision;
        let width = v.hidden_size;
        self.matrix("vision_model.patch_embed.proj", width, v.in_channels * v.patch_size * v.patch_size);
        for block in 0..v.depth {
            let name = format!("vision_model.blocks.{block}");
            self.layer_norm(&format!("{name}.norm1"), width);
            self.layer_norm(&format!("{name}.norm2"), width);
            self.affine(&format!("{name}.attn.qkv"), 3 * width, width);
            self.affine(&format!("{name}.attn.proj"), width, width);
            self.affine(&format!("{name}.mlp.fc1"), v.intermediate_size, width);
            self.affine(&format!("{name}.mlp.fc2"), width, v.intermediate_size);
        }
        self.layer_norm("vision_model.ln", width);
    }

    /// Linear, GELU, linear, LayerNorm in space, the same in time, then into the text width and RMSNorm.
    fn resampler(&mut self, vl: &VlConfig, h: usize) {
        let v = &vl.vision;
        let merged = v.hidden_size * v.spatial_merge_size * v.spatial_merge_size;
        for (name, input) in [("spatial_linear", merged), ("temporal_linear", merged * v.temporal_merge_size)] {
            let name = format!("model.resampler_model.{name}");
            self.affine(&format!("{name}.0"), merged, input);
            self.affine(&format!("{name}.2"), merged, merged);
            self.layer_norm(&format!("{name}.3"), merged);
        }
        self.affine("model.resampler_model.mlp", h, merged);
        self.vector("model.resampler_model.after_norm.weight".into(), h);
    }
}
