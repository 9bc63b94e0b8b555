//! The dense feed-forward block: SwiGLU (arXiv 2002.05202).
use crate::{init::Init, linear::Linear, norm::RmsNorm, ops, ops::Precision};
use burn::prelude::*;
use ernie_checkpoint::Config;

/// `down(silu(gate(x)) ⊙ up(x))`. Also the shared experts: one block of width `n_shared · i`, ungated.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[i, h]`.
    pub gate_proj: Linear,
    /// `[i, h]`.
    pub up_proj: Linear,
    /// `[h, i]`.
    pub down_proj: Linear,
}

impl Mlp {
    /// A block of width `intermediate`.
    pub fn new(init: &mut Init, config: &Config, intermediate: usize) -> Self {
        let (h, bias) = (config.hidden_size, config.use_bias);
        Self {
            gate_proj: Linear::new(init, [intermediate, h], bias, init.std),
            up_proj: Linear::new(init, [intermediate, h], bias, init.std),
            down_proj: Linear::new(init, [h, intermediate], bias, init.residual_std),
        }
    }

    /// `residual + mlp(norm(x))`, `[t, h]`.
    pub fn forward_add(&self, residual_th: Tensor<2>, x_th: Tensor<2>, norm: &RmsNorm, precision: Precision) -> Tensor<2> {
        let gate_up = norm.linears(x_th, [&self.gate_proj, &self.up_proj], precision);
        let y_th = ops::swiglu_linear_add(residual_th, gate_up, self.down_proj.weight.val(), precision);
        match &self.down_proj.bias {
            Some(bias) => y_th + bias.val().unsqueeze::<2>(),
            None => y_th,
        }
    }
}
