//! The dense feed-forward block: SwiGLU (arXiv 2002.05202).
use crate::{init::Init, linear::Linear, ops};
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

    /// `[t, h]` → `[t, h]`.
    pub fn forward(&self, x_th: Tensor<2>) -> Tensor<2> {
        let gate_ti = self.gate_proj.forward(x_th.clone());
        let up_ti = self.up_proj.forward(x_th);
        self.down_proj.forward(ops::swiglu(gate_ti, up_ti))
    }
}
