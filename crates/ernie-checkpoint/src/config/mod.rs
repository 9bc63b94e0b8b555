//! `config.json`, typed. Field names, other spellings and defaults are those of the released code (transformers'
//! `configuration_ernie4_5*.py` and the remote code it replaced).
//!
//! A *value* that this program does not implement (an activation, a rope type, …) is refused with the field named; a
//! *key* that it does not know is kept in [`Config::extra`] and written back.

mod check;
mod counts;
mod fields;
mod mechanisms;
mod parse;
pub(crate) mod write;

use std::path::Path;

use serde_json::{Map, Value};

pub use counts::ParameterCounts;
pub use mechanisms::{AttentionKind, ContextGate, Mechanisms, Paragraphs};

use crate::error::{Error, Result};
use crate::files;

/// Which network a config describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Text decoder without experts (`ernie4_5`).
    Dense,
    /// Text decoder with routed experts (`ernie4_5_moe`).
    Moe,
    /// Vision-language model with text and vision experts (`ernie4_5_vl_moe`, Baidu's `ernie4_5_moe_vl`).
    VlMoe,
}

/// The gate activation of the SwiGLU blocks; the family has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenAct {
    /// x·sigmoid(x)
    Silu,
}

/// What the feed-forward part of a layer is, as `mlp_layer_types` spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// One SwiGLU of width `intermediate_size`.
    Dense,
    /// Routed experts and shared experts.
    Sparse,
}

/// How weights are quantised in the files, from `quantization_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// compressed-tensors, 8-bit symmetric integers, one scale per output channel.
    Int8PerChannel,
    /// The same, but the routed experts in 4-bit symmetric integers with one scale for each `group` inputs of an output channel.
    Int4Experts {
        /// Inputs that share a scale.
        group: usize,
    },
}

/// A model's sizes and constants. [`Config::defaults`] and the readers fill it; change fields as needed and call
/// [`Config::check`].
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which network this is.
    pub family: Family,
    /// Width h of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense layer's SwiGLU.
    pub intermediate_size: usize,
    /// Decoder layers, the MTP block not counted.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width d of one head; not always hidden_size / heads.
    pub head_dim: usize,
    /// Rows v of the embedding.
    pub vocab_size: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// Whether linear maps (attention, dense and shared SwiGLU) have biases.
    pub use_bias: bool,
    /// Whether the output head is the embedding. For an opened checkpoint this is decided by the presence of
    /// `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Activation of the SwiGLU gates.
    pub hidden_act: HiddenAct,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; generation stops at any of them.
    pub eos_token_id: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Depth of multi-token prediction; 0 = none. The MTP tensors are optional in files even if this is positive.
    pub num_nextn_predict_layers: usize,
    /// The experts; `None` exactly for [`Family::Dense`].
    pub moe: Option<MoeConfig>,
    /// The vision side; `Some` exactly for [`Family::VlMoe`].
    pub vl: Option<VlConfig>,
    /// How the stored weights are quantised; [`crate::save`] sets it by its dtype.
    pub quantization: Option<Quantization>,
    /// What the released family lacks, from the key `ernie_rs`.
    pub mechanisms: Mechanisms,
    /// Top-level keys that this program does not know, in file order, written back as they are.
    pub extra: Map<String, Value>,
    /// The file's object, so that it can be written back in order; empty for a config made in memory.
    source: Map<String, Value>,
}

/// The experts of a mixture-of-experts config.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// Routed (text) experts per layer, `moe_num_experts`.
    pub num_experts: usize,
    /// Experts per token, `moe_k`.
    pub top_k: usize,
    /// Width of one routed (text) expert, `moe_intermediate_size`.
    pub intermediate_size: usize,
    /// Shared experts; together they are one SwiGLU of width `num_shared_experts · intermediate_size`. May be 0.
    pub num_shared_experts: usize,
    /// First layer that may have experts (the smaller one where a list is given).
    pub layer_start: usize,
    /// Last layer that may have experts (the larger one of a list); -1 = the last layer.
    pub layer_end: i64,
    /// Layer l may have experts only if (l + 1) is a multiple of this.
    pub layer_interval: usize,
    /// Explicit kinds per layer (`mlp_layer_types`); overrides start, end and interval.
    pub mlp_layer_types: Option<Vec<MlpKind>>,
    /// Lower bound of the divisor that normalises the selected probabilities.
    pub norm_min: f64,
    /// Whether the router adds the correction bias when it selects (`moe_use_aux_free`; the released code always does).
    pub use_correction_bias: bool,
    /// The experts for image and video tokens; `Some` exactly for [`Family::VlMoe`].
    pub vision: Option<VisionExperts>,
}

/// Routed experts for vision tokens; they follow the text experts in `mlp.experts.K`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VisionExperts {
    /// Experts per layer.
    pub num_experts: usize,
    /// Width of one.
    pub intermediate_size: usize,
}

/// What a vision-language config has beyond text.
#[derive(Debug, Clone, PartialEq)]
pub struct VlConfig {
    /// The vision transformer.
    pub vision: VisionConfig,
    /// Rotary frequencies for height, width and time; they sum to head_dim / 2.
    pub mrope_section: [usize; 3],
    /// Token that opens an image.
    pub image_start_token_id: u32,
    /// Token that closes an image.
    pub image_end_token_id: u32,
    /// Token that stands for a piece of an image.
    pub image_token_id: u32,
    /// Token that opens a video.
    pub video_start_token_id: u32,
    /// Token that closes a video.
    pub video_end_token_id: u32,
    /// Token that stands for a piece of a video.
    pub video_token_id: u32,
}

/// The vision transformer (`vision_config`).
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width (`embed_dim` in the remote code).
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Image channels.
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Patches merged per side by the resampler.
    pub spatial_merge_size: usize,
    /// Frames merged by the resampler.
    pub temporal_merge_size: usize,
    /// ε of its LayerNorms.
    pub rms_norm_eps: f64,
}

impl Config {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// As [`Config::from_json`], and [`Error::Io`], [`Error::NotRegular`] and [`Error::FileTooLarge`].
    pub fn from_dir(dir: &Path) -> Result<Self> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads a config file.
    ///
    /// # Errors
    /// As [`Config::from_json`], and [`Error::Io`], [`Error::NotRegular`] and [`Error::FileTooLarge`].
    pub fn from_file(file: &Path) -> Result<Self> {
        let text = files::read_text(file, files::MAX_CONFIG_BYTES).map_err(Error::reading(file))?;
        Self::from_json(&text, file)
    }

    /// Reads the text of a config; `origin` is the file that errors name.
    ///
    /// # Errors
    /// [`Error::Json`] for what is not a JSON object, [`Error::ConfigField`] for a value that is unknown, contradicts
    /// another one or cannot be right.
    pub fn from_json(text: &str, origin: &Path) -> Result<Self> {
        let source: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| Error::Json { file: origin.into(), reason: e.to_string() })?;
        let config = parse::parse(source, origin)?;
        check::check(&config, origin)?;
        Ok(config)
    }

    /// The released code's defaults for a family (0.3B, 21B-A3B, VL-28B-A3B sizes), to be changed field by field.
    pub fn defaults(family: Family) -> Self {
        parse::defaults(family)
    }

    /// Checks that the fields make a network: nothing is zero that divides, heads and experts fit, no size is absurd.
    /// The readers have done this; call it after changing fields.
    ///
    /// # Errors
    /// [`Error::ConfigField`].
    pub fn check(&self) -> Result<()> {
        check::check(self, Path::new("config.json"))
    }

    /// The JSON object to write: the object that was read, with changed fields replaced in place, unknown keys as they
    /// were, and new ones at the end. For a config made in memory: every field, in the spelling of transformers.
    pub fn to_json(&self) -> Value {
        write::to_json(self)
    }

    /// Whether layer `layer` has routed experts: (l + 1) % interval == 0 and min(start) ≤ l ≤ max(end), or what
    /// `mlp_layer_types` says where it is given.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        let Some(moe) = &self.moe else { return false };
        if let Some(kinds) = &moe.mlp_layer_types {
            return kinds.get(layer) == Some(&MlpKind::Sparse);
        }
        let last = match usize::try_from(moe.layer_end) {
            Ok(end) => end,
            Err(_) => self.num_hidden_layers.saturating_sub(1),
        };
        layer < self.num_hidden_layers && (layer + 1).is_multiple_of(moe.layer_interval.max(1)) && (moe.layer_start..=last).contains(&layer)
    }

    /// Bytes that one token adds to the key/value cache when an element takes `element_bytes` (2 for bf16): in layers that see everything, for
    /// those of a window give it back ([`Config::kv_bytes_of_window`]). The summaries of paragraphs, at most one for 32 tokens, are not counted.
    pub fn kv_bytes_per_token(&self, element_bytes: usize) -> u64 {
        (self.num_hidden_layers - self.local_layers()) as u64 * self.kv_bytes_per_layer(element_bytes)
    }

    /// Bytes of the keys and values of one text's windows and of its last paragraph at its longest, however long the text is.
    pub fn kv_bytes_of_window(&self, element_bytes: usize) -> u64 {
        let tokens: usize = (0..self.num_hidden_layers).filter_map(|layer| self.reach(layer)).sum();
        tokens as u64 * self.kv_bytes_per_layer(element_bytes)
    }

    fn kv_bytes_per_layer(&self, element_bytes: usize) -> u64 {
        2 * (self.num_key_value_heads * self.head_dim * element_bytes) as u64
    }
}
