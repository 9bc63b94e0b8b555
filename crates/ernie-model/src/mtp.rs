//! Multi-token prediction, depth 1 (arXiv 2412.19437, as released in ERNIE-4.5): predicts the token after the next one.
//!
//! `x_t = W·[norm_e(embed(id_{t+1})) ; norm_h(h_t)]`, h after the model's final norm; one dense decoder block; then the *shared* final norm
//! and the *shared* head. Checkpoint names: `model.mtp_{emb_norm,hidden_norm,linear_proj,block}.0.…`.
use crate::{init::Init, linear::Linear, norm::RmsNorm, ops::LayerContext, text::DecoderLayer};
use burn::prelude::*;
use ernie_checkpoint::Config;

/// The part of the network that only multi-token prediction uses.
#[derive(Module, Debug)]
pub struct Mtp {
    /// Norm of the next token's embedding.
    pub mtp_emb_norm: RmsNorm,
    /// Norm of the hidden state.
    pub mtp_hidden_norm: RmsNorm,
    /// `[h, 2h]`: embedding half first.
    pub mtp_linear_proj: Linear,
    /// A dense block, whatever the MoE rule says of the other layers.
    pub mtp_block: DecoderLayer,
}

impl Mtp {
    /// A fresh block.
    pub fn new(init: &mut Init, config: &Config) -> Self {
        let h = config.hidden_size;
        Self {
            mtp_emb_norm: RmsNorm::new(init, h, config.rms_norm_eps),
            mtp_hidden_norm: RmsNorm::new(init, h, config.rms_norm_eps),
            mtp_linear_proj: Linear::new(init, [h, 2 * h], config.use_bias, init.std),
            mtp_block: DecoderLayer::dense(init, config),
        }
    }

    /// Embeddings of the next tokens and the model's normed hidden states, both `[t, h]`, to `[t, h]` before the shared norm.
    pub fn forward(&self, next_embedding_th: Tensor<2>, hidden_th: Tensor<2>, context: &LayerContext) -> Tensor<2> {
        let both_t2h = Tensor::cat(vec![self.mtp_emb_norm.forward(next_embedding_th), self.mtp_hidden_norm.forward(hidden_th)], 1);
        self.mtp_block.forward(self.mtp_linear_proj.forward(both_t2h), context).0
    }
}
