//! AdamW over the network's named parameters, with clipping by the global norm.
use std::collections::BTreeMap;

use ernie_kernels::{adamw, scratch};
use ernie_model::{Ernie, NamedParameters, parameters::Parameter};

/// Settings of AdamW (arXiv 1711.05101), as in `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay, of matrices only: norms, biases and other vectors have none.
    pub weight_decay: f64,
}

/// The two moments of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Vec<f32>,
    /// Running mean of its square.
    pub second: Vec<f32>,
}

/// AdamW with its state, keyed by the parameters' internal names.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    /// Steps taken.
    pub step: u64,
    /// Moments of every parameter that has had a gradient.
    pub moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// No steps taken.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, step: 0, moments: BTreeMap::new() }
    }

    /// One update of every parameter that has a gradient, by the gradients times `gradient_scale` (see [`clip_scale`]); their buffers are kept for
    /// the next step's. `after` sees each parameter's values after its update, trainable or not, and may change them (router bias, orthogonality).
    pub fn update(
        &mut self,
        model: Ernie,
        lr: f64,
        mut gradients: NamedParameters,
        gradient_scale: f32,
        mut after: impl FnMut(&Parameter, &mut Vec<f32>),
    ) -> Ernie {
        self.step += 1;
        let step = self.step;
        let updated = model.map_parameters(|parameter, mut values| {
            if let Some(gradient) = gradients.remove(&parameter.name).filter(|_| parameter.trainable) {
                let moments = self
                    .moments
                    .entry(parameter.name.clone())
                    .or_insert_with(|| Moments { first: vec![0.0; values.len()], second: vec![0.0; values.len()] });
                let update = adamw::Step {
                    lr,
                    beta1: self.config.beta1,
                    beta2: self.config.beta2,
                    eps: self.config.eps,
                    weight_decay: if decays(parameter) { self.config.weight_decay } else { 0.0 },
                    step,
                    gradient_scale,
                };
                adamw::step(&mut values, &gradient, &mut moments.first, &mut moments.second, &update);
                scratch::recycle(gradient);
            }
            after(parameter, &mut values);
            values
        });
        scratch::end_step();
        updated
    }
}

/// Whether weight decay applies: matrices and stacks of them, not norms or biases.
pub fn decays(parameter: &Parameter) -> bool {
    parameter.shape.len() >= 2
}

/// √Σ g² over all gradients.
pub fn global_norm(gradients: &NamedParameters) -> f64 {
    gradients.values().map(|gradient| adamw::sum_of_squares(gradient)).sum::<f64>().sqrt()
}

/// What gradients whose global norm is `norm` must be multiplied by to have one of at most `max_norm` (0: no limit).
pub fn clip_scale(norm: f64, max_norm: f64) -> f32 {
    // 1e-6 as in torch.nn.utils.clip_grad_norm_.
    if max_norm > 0.0 && norm > max_norm { (max_norm / (norm + 1e-6)) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradients(values: &[(&str, &[f32])]) -> NamedParameters {
        values.iter().map(|(name, g)| (name.to_string(), g.to_vec())).collect()
    }

    #[test]
    fn clipping_bounds_the_norm() {
        let g = gradients(&[("a", &[3.0, 0.0]), ("b", &[4.0])]);
        assert_eq!(global_norm(&g), 5.0);
        assert_eq!([clip_scale(5.0, 10.0), clip_scale(5.0, 0.0), clip_scale(5.0, 5.0)], [1.0; 3]);
        assert!((clip_scale(5.0, 1.0) - 0.2).abs() < 1e-6);
    }
}
