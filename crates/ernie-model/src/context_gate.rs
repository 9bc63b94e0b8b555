//! Gates over the heads of attention, by what each token brings.
//!
//! `d_t = 1 − cos(x_t, m_t)`, m the exponential moving average of the document's normed states with a learned decay; `g = σ(W·x + u·d + b)`; a head's output is
//! multiplied by its gate, and is nothing where the gate is below the threshold (straight through for the gradient). Related: gated attention (arXiv
//! 2505.06708), mixtures of heads (arXiv 2410.11842).
use std::sync::Arc;

use crate::{correlation::Correlation, init::Init, ops};
use burn::{module::Param, prelude::*, tensor::TensorData};
use ernie_checkpoint::{Config, ContextGate as Settings};
use ernie_kernels::head_gates;

/// Logit of the decay at first: 0.9.
const FIRST_DECAY: f32 = 2.197_224_6;
/// Factor of the density at first: what is new opens heads.
const FIRST_DENSITY: f32 = 1.0;
/// Bias at first: gates of 0.88, so that training starts with all heads.
const FIRST_BIAS: f32 = 2.0;

/// The gates of one layer.
#[derive(Module, Debug)]
pub struct ContextGate {
    /// W, `[n_q, h]`.
    pub weight: Param<Tensor<2>>,
    /// b, `[n_q]`.
    pub bias: Param<Tensor<1>>,
    /// u, `[n_q]`.
    pub density: Param<Tensor<1>>,
    /// Logit of the decay, `[1]`.
    pub decay: Param<Tensor<1>>,
    #[module(skip)]
    threshold: f64,
}

/// What one layer's gates did to one batch.
#[derive(Debug, Clone)]
pub struct Gating {
    /// Gate logits, `[t, n_q]`, on the tape.
    pub logits_tn: Tensor<2>,
    /// Semantic density of each token, `[t, 1]`.
    pub density_t1: Tensor<2>,
    threshold: f64,
}

impl ContextGate {
    /// Fresh gates, nearly open.
    pub fn new(init: &mut Init, config: &Config, settings: &Settings) -> Self {
        let heads = config.num_attention_heads;
        Self {
            weight: init.normal([heads, config.hidden_size], init.std),
            bias: init.constant([heads], FIRST_BIAS),
            density: init.constant([heads], FIRST_DENSITY),
            decay: init.constant([1], FIRST_DECAY),
            threshold: settings.threshold,
        }
    }

    /// Gates from normed states `[t, h]`.
    pub fn forward(&self, z_th: Tensor<2>, cu_seqlens: &Arc<[u32]>) -> Gating {
        let density_t1 = ops::semantic_density(z_th.clone(), sigmoid(self.decay.val()), cu_seqlens);
        let from_density_tn = density_t1.clone() * self.density.val().unsqueeze::<2>();
        let logits_tn = ops::linear(z_th, self.weight.val()) + from_density_tn + self.bias.val().unsqueeze::<2>();
        Gating { logits_tn, density_t1, threshold: self.threshold }
    }
}

impl Gating {
    /// Head outputs `[t, n_q·d]` times their gates.
    pub fn apply(&self, heads: Tensor<2>) -> Tensor<2> {
        ops::gate_heads(heads, self.logits_tn.clone(), self.threshold)
    }

    /// How far each head is open, 0 to 1, before the threshold, `[t, n_q]` row by row.
    pub fn gates(&self) -> Vec<f32> {
        ops::host_f32(&self.logits_tn).into_iter().map(head_gates::gate).collect()
    }

    /// Which heads are active, `[t, n_q]` row by row.
    pub fn active(&self) -> Vec<bool> {
        self.gates().into_iter().map(|gate| gate >= self.threshold as f32).collect()
    }

    /// Semantic density of each token, 0 to 2, `[t]`.
    pub fn density(&self) -> Vec<f32> {
        ops::host_f32(&self.density_t1)
    }

    /// Share of the heads that are active, over all tokens.
    pub fn active_share(&self) -> f64 {
        let active = self.active();
        active.iter().filter(|active| **active).count() as f64 / active.len().max(1) as f64
    }

    /// (share of active heads − target)², `[1]`, on the tape: the gradient takes a head to be as active as its gate is open.
    pub fn regulariser(&self, target: f64) -> Tensor<1> {
        let [tokens, heads] = self.logits_tn.dims();
        let active = self.active().into_iter().map(|active| f32::from(u8::from(active))).collect::<Vec<_>>();
        let active_tn = Tensor::<2>::from_data(TensorData::new(active, [tokens, heads]), &self.logits_tn.device());
        let gates_tn = sigmoid(self.logits_tn.clone());
        let straight_tn = gates_tn.clone() - gates_tn.detach() + active_tn;
        (straight_tn.mean() - target).square()
    }

    /// Pearson correlation of a token's density with the number of its active heads; `None` where one of them never changes.
    pub fn correlation(&self) -> Option<f64> {
        let density = self.density();
        let active = self.active();
        let heads = active.len() / density.len().max(1);
        let counts = active.chunks(heads.max(1)).map(|row| row.iter().filter(|active| **active).count());
        let mut sums = Correlation::default();
        density.iter().zip(counts).for_each(|(&density, count)| sums.add(f64::from(density), count as f64));
        sums.coefficient()
    }
}

/// In these very steps, so that a layer that is computed again for its gradients comes to the same bits on the tape and off it. What is below −80 counts
/// as −80: e⁸⁹ is no f32, and infinity has no gradient.
fn sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    (x.clamp_min(-80.0).neg().exp() + 1.0).recip()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), &crate::training_device()).require_grad()
    }

    fn gating(logits: &[f32], heads: usize, threshold: f64) -> Gating {
        let tokens = logits.len() / heads;
        Gating { logits_tn: leaf(logits.to_vec(), [tokens, heads]), density_t1: leaf(vec![0.0; tokens], [tokens, 1]), threshold }
    }

    fn gradient_of_regulariser(gating: &Gating, target: f64) -> Vec<f32> {
        ops::host_f32(&gating.logits_tn.grad(&gating.regulariser(target).backward()).unwrap())
    }

    #[test]
    fn the_regulariser_takes_active_heads_for_its_value_and_gates_for_its_gradient() {
        let logits = [0.7f32, -0.3, 2.1, -1.9, 0.1, -0.6];
        for (threshold, active) in [(0.5, 3.0), (0.4, 4.0), (0.99, 0.0)] {
            let gating = gating(&logits, 3, threshold);
            for target in [0.2, 0.5, 0.9] {
                let off = active / 6.0 - target;
                let value = f64::from(ops::scalar(&gating.regulariser(target)));
                assert!((value - off * off).abs() < 1e-6, "{value} for {active} of 6 active heads and {target}");
                // Near these logits the share moves as the mean gate does.
                let share = |logits: &[f64]| logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).sum::<f64>() / 6.0;
                for (place, found) in gradient_of_regulariser(&gating, target).into_iter().enumerate() {
                    let at = |step: f64| {
                        let mut moved = logits.map(f64::from);
                        moved[place] += step;
                        (off + share(&moved) - share(&logits.map(f64::from))).powi(2)
                    };
                    let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
                    assert!((f64::from(found) - expected).abs() < 1e-6, "{found} for {expected} at {place}");
                }
            }
        }
    }

    #[test]
    fn gates_that_are_wide_open_or_tightly_shut_have_gradients() {
        let gating = gating(&[-90.0, 90.0, -1e4, 1e4, -79.0, 0.0], 2, 0.5);
        let gradient = gradient_of_regulariser(&gating, 0.1);
        assert!(gradient.iter().all(|g| g.is_finite()) && gradient[5] > 0.0, "{gradient:?}");
        for logit in [-90.0, 90.0] {
            let decay = Param::from_tensor(leaf(vec![logit], [1]));
            let weight = Param::from_tensor(leaf(vec![0.1; 6], [2, 3]));
            let [bias, density] = [1.0, 1.0].map(|value| Param::from_tensor(leaf(vec![value; 2], [2])));
            let gate = ContextGate { weight, bias, density, decay, threshold: 0.5 };
            let x_th = leaf((0..15).map(|i| (i * 7 % 11) as f32 - 4.5).collect(), [5, 3]);
            let gating = gate.forward(x_th.clone(), &Arc::from([0, 2, 5]));
            let tape = gating.logits_tn.sum().backward();
            let found = [ops::host_f32(&gate.decay.val().grad(&tape).unwrap()), ops::host_f32(&x_th.grad(&tape).unwrap())].concat();
            assert!(found.iter().all(|g| g.is_finite()), "decay of {logit}: {found:?}");
        }
    }
}
