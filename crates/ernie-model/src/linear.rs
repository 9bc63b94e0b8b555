//! A matrix product with an optional bias, weights `[out, in]` as the checkpoints store them.
use crate::{init::Init, ops, ops::Precision};
use burn::{module::Param, prelude::*};

/// `y = x·Wᵀ + b`, W `[out, in]`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`, only in models with `use_bias`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Normal weights of the given standard deviation, zero bias.
    pub fn new(init: &mut Init, [out_features, in_features]: [usize; 2], bias: bool, std: f64) -> Self {
        Self { weight: init.normal([out_features, in_features], std), bias: bias.then(|| init.constant([out_features], 0.0)) }
    }

    /// `x_ti` → `[t, out]`.
    pub fn forward(&self, x_ti: Tensor<2>) -> Tensor<2> {
        let y_to = ops::linear(x_ti, self.weight.val());
        match &self.bias {
            Some(bias) => y_to + bias.val().unsqueeze::<2>(),
            None => y_to,
        }
    }

    /// `residual + x·Wᵀ + b`, `[t, out]`.
    pub fn forward_add(&self, residual_to: Tensor<2>, x_ti: Tensor<2>, precision: Precision) -> Tensor<2> {
        let y_to = ops::linear_add(residual_to, x_ti, self.weight.val(), precision);
        match &self.bias {
            Some(bias) => y_to + bias.val().unsqueeze::<2>(),
            None => y_to,
        }
    }
}
