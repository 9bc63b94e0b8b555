//! Root-mean-square normalisation (arXiv 1910.07467), in f32.
use crate::{init::Init, linear::Linear, ops, ops::Precision};
use burn::{module::Param, prelude::*};

/// `y = x / √(mean(x²) + ε) · w`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[h]`.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    pub(crate) eps: f64,
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

    /// The normalised input through layers side by side, `[t, Σout]`.
    pub fn linears<const N: usize>(&self, x_th: Tensor<2>, layers: [&Linear; N], precision: Precision) -> Tensor<2> {
        let y_to = ops::norm_linear(x_th, self.weight.val(), self.eps, layers.map(|layer| layer.weight.val()), precision);
        // A model has all biases or none.
        match layers.iter().filter_map(|layer| layer.bias.as_ref()).map(Param::val).collect::<Vec<Tensor<1>>>() {
            biases if biases.is_empty() => y_to,
            biases => y_to + Tensor::cat(biases, 0).unsqueeze::<2>(),
        }
    }
}
