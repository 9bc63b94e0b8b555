//! Root-mean-square normalisation (arXiv 1910.07467), in f32.
use crate::{init::Init, ops};
use burn::{module::Param, prelude::*};

/// `y = x / √(mean(x²) + ε) · w`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[h]`.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl RmsNorm {
    /// Unit weights.
    pub fn new(init: &mut Init, hidden: usize, eps: f64) -> Self {
        Self { weight: init.constant([hidden], 1.0), eps }
    }

    /// `[t, h]` → `[t, h]`.
    pub fn forward(&self, x_th: Tensor<2>) -> Tensor<2> {
        ops::rms_norm(x_th, self.weight.val(), self.eps)
    }
}
