//! How many parameters a config describes.

use super::Config;
use crate::specs::{self, TensorGroup};

/// Parameters of a model. Tensors of the vision side and of the MTP block are counted apart, not in `total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParameterCounts {
    /// The text model: embedding, layers with all text experts, final norm and, if untied, the output head.
    pub total: u64,
    /// Those used for one token: of the routed experts only `top_k` per layer. The embedding counts once as a whole,
    /// being also the output head when tied.
    pub active: u64,
    /// The input embedding.
    pub embedding: u64,
    /// The output head; 0 when it is the embedding.
    pub head: u64,
    /// Vision experts, vision transformer and resampler.
    pub vision: u64,
    /// The multi-token-prediction block, where the config has one.
    pub mtp: u64,
}

impl Config {
    /// Counts parameters from the sizes alone; nothing is allocated by them. Optional biases of routed experts are not
    /// counted.
    pub fn parameter_counts(&self) -> ParameterCounts {
        let mut counts = ParameterCounts::default();
        let mut routed = 0_u64;
        for spec in specs::tensor_specs(self) {
            let elements = spec.shape.iter().product::<usize>() as u64;
            match spec.group {
                TensorGroup::Head if self.tie_word_embeddings => continue,
                TensorGroup::ExpertBias => continue,
                TensorGroup::Vision => {
                    counts.vision += elements;
                    continue;
                }
                TensorGroup::Mtp => {
                    counts.mtp += elements;
                    continue;
                }
                TensorGroup::Head => counts.head += elements,
                TensorGroup::Embedding => counts.embedding += elements,
                TensorGroup::RoutedExpert => routed += elements,
                TensorGroup::Text => {}
            }
            counts.total += elements;
        }
        let (experts, top_k) = self.moe.as_ref().map_or((1, 1), |moe| (moe.num_experts as u64, moe.top_k as u64));
        // Experts are alike, so the share is exact.
        counts.active = counts.total - routed + routed / experts * top_k;
        counts
    }
}

/// An upper bound of all parameters, biases not counted, without listing tensors (used before sizes are trusted).
pub(super) fn total(config: &Config) -> u128 {
    let wide = |n: usize| n as u128;
    let h = wide(config.hidden_size);
    let heads = wide(config.num_attention_heads + config.num_key_value_heads) * wide(config.head_dim);
    let mut layer = 2 * h * heads + 3 * h * wide(config.intermediate_size);
    if let Some(moe) = &config.moe {
        let width = wide(moe.intermediate_size);
        layer += 3 * h * width * wide(moe.num_experts + moe.num_shared_experts) + h * wide(moe.num_experts);
        if let Some(vision) = moe.vision {
            layer += (3 * h * wide(vision.intermediate_size) + h) * wide(vision.num_experts);
        }
    }
    let layers = wide(config.num_hidden_layers + config.num_nextn_predict_layers);
    let vision = config.vl.as_ref().map_or(0, |vl| {
        let v = &vl.vision;
        let width = wide(v.hidden_size);
        let merged = width * wide(v.spatial_merge_size).pow(2);
        let blocks = wide(v.depth) * (4 * width * width + 2 * width * wide(v.intermediate_size));
        blocks + merged * merged * (3 + wide(v.temporal_merge_size)) + merged * h
    });
    2 * wide(config.vocab_size) * h + layers * layer + vision
}
