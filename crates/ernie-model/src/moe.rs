//! Mixture of experts: router, routed experts, shared experts, and the auxiliary losses of routing.
//!
//! Router, as released (transformers `modeling_ernie4_5_moe.py`), all in f32:
//! `p = softmax(W_g x)`, `S = topk(p + bias)`, `w = p[S] / max(Σ p[S], norm_min)`, `y = Σ_{e∈S} w_e·E_e(x) + shared(x)`.
//! The correction bias chooses experts; it never weights them, and no gradient reaches it.
use std::sync::Arc;

use crate::{
    init::Init,
    linear::Linear,
    mlp::Mlp,
    norm::RmsNorm,
    ops,
    ops::{ExpertsContext, LayerContext},
    steering::LayerSteering,
};
use burn::{module::Param, prelude::*, tensor::TensorData};
use ernie_checkpoint::{Config, MoeConfig};
use ernie_kernels::router;

/// The routed experts, stacked: expert `e` is `x → down_e(silu(gate_e x) ⊙ up_e x)`.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[e, i, h]`; checkpoint name `experts.E.gate_proj.weight`.
    pub gate_proj: Param<Tensor<3>>,
    /// `[e, i, h]`.
    pub up_proj: Param<Tensor<3>>,
    /// `[e, h, i]`.
    pub down_proj: Param<Tensor<3>>,
}

/// State of the router beside its weights.
#[derive(Module, Debug)]
pub struct MoeStatics {
    /// `[1, e]`, added to the probabilities for selection only.
    pub e_score_correction_bias: Param<Tensor<2>>,
}

/// A feed-forward block of routed and shared experts.
#[derive(Module, Debug)]
pub struct Moe {
    /// Router, `[e, h]`, always f32.
    pub gate: Linear,
    /// Correction bias.
    pub moe_statics: MoeStatics,
    /// Routed experts.
    pub experts: Experts,
    /// One SwiGLU of width `n_shared · i`, or none.
    pub shared_experts: Option<Mlp>,
    #[module(skip)]
    top_k: usize,
    #[module(skip)]
    norm_min: f64,
}

/// How one MoE layer routed one batch.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Router logits, `[t, e]`, on the tape.
    pub logits_te: Tensor<2>,
    /// Their softmax, `[t, e]`, on the tape.
    pub probs_te: Tensor<2>,
    /// Chosen experts, `[t, k]` row by row.
    pub indices: Arc<[u32]>,
    /// Their weights, `[t, k]`, on the tape.
    pub weights_tk: Tensor<2>,
    /// 1 for the experts that each token was steered to, 0 for the others, `[t, e]` row by row; none where routing is not steered by domains.
    pub favoured_te: Option<Arc<[f32]>>,
}

impl Moe {
    /// Fresh experts and router, correction bias zero.
    pub fn new(init: &mut Init, config: &Config, moe: &MoeConfig) -> Self {
        let (e, i, h) = (moe.num_experts, moe.intermediate_size, config.hidden_size);
        Self {
            gate: Linear::new(init, [e, h], false, init.std),
            moe_statics: MoeStatics { e_score_correction_bias: init.frozen_zeros([1, e]) },
            experts: Experts {
                gate_proj: init.normal([e, i, h], init.std),
                up_proj: init.normal([e, i, h], init.std),
                down_proj: init.normal([e, h, i], init.residual_std),
            },
            shared_experts: (moe.num_shared_experts > 0).then(|| Mlp::new(init, config, moe.num_shared_experts * i)),
            top_k: moe.top_k,
            norm_min: moe.norm_min,
        }
    }

    /// `x + experts(norm(x))`, `[t, h]`, and how it was routed.
    pub fn forward_add(&self, x_th: Tensor<2>, norm: &RmsNorm, context: &LayerContext) -> (Tensor<2>, Routing) {
        let (precision, steering) = (context.precision, context.layer_steering.as_ref());
        let logits_te = norm.linears(x_th.clone(), [&self.gate], ops::Precision::F32);
        let probs_te = softmax(logits_te.clone());
        let (indices, weights_tk) = self.select(&probs_te, steering);
        let experts = &self.experts;
        let context = ExpertsContext { indices: indices.clone(), top_k: self.top_k, precision };
        let stacks = [experts.gate_proj.val(), experts.up_proj.val(), experts.down_proj.val()];
        let mut y_th = ops::norm_experts_add(x_th.clone(), norm.weight.val(), norm.eps, stacks, weights_tk.clone(), &context);
        if let Some(shared) = &self.shared_experts {
            y_th = shared.forward_add(y_th, x_th, norm, precision);
        }
        let favoured_te = steering.and_then(LayerSteering::favoured).map(Into::into);
        (y_th, Routing { logits_te, probs_te, indices, weights_tk, favoured_te })
    }

    /// Chosen experts `[t, k]` and their normalised weights `[t, k]` (on the tape: the gradient reaches the router through them).
    fn select(&self, probs_te: &Tensor<2>, steering: Option<&LayerSteering>) -> (Arc<[u32]>, Tensor<2>) {
        let [tokens, experts] = probs_te.dims();
        let probs = ops::host_f32(probs_te);
        let bias = ops::host_f32(&self.moe_statics.e_score_correction_bias.val());
        let indices = match steering {
            None => router::select(&probs, Some(&bias), experts, self.top_k),
            Some(steering) => steering.select(&probs, &bias, self.top_k),
        };
        let index_data = TensorData::new(indices.iter().map(|&e| e as i64).collect::<Vec<_>>(), [tokens, self.top_k]);
        let index_tk = Tensor::<2, Int>::from_data(index_data, &probs_te.device());
        let chosen_tk = probs_te.clone().gather(1, index_tk);
        let total_t1 = chosen_tk.clone().sum_dim(1).clamp_min(self.norm_min);
        (indices.into(), chosen_tk / total_t1)
    }
}

/// Over rows, in these very steps: Burn's own has another order on the tape than off it, and layers that are computed again for their gradients
/// (`recompute.rs`) must come to the same bits.
fn softmax(logits_te: Tensor<2>) -> Tensor<2> {
    let max_t1 = logits_te.clone().detach().max_dim(1);
    let exp_te = (logits_te - max_t1).exp();
    exp_te.clone() / exp_te.sum_dim(1)
}

impl Routing {
    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.probs_te.dims()[1]
    }

    /// How many tokens each expert got, `[e]`.
    pub fn usage(&self) -> Vec<u64> {
        let mut usage = vec![0; self.experts()];
        for &expert in self.indices.iter() {
            usage[expert as usize] += 1;
        }
        usage
    }

    /// What each chosen expert's output is multiplied by, `[t, k]` row by row as [`Routing::indices`].
    pub fn weights(&self) -> Vec<f32> {
        ops::host_f32(&self.weights_tk)
    }

    /// Balance loss `E · Σ_e mean_prob_e · frac_e` (ERNIE `topk_gate.py`, after arXiv 2101.03961): 1 when routing is even.
    pub fn balance_loss(&self) -> Tensor<1> {
        let experts = self.experts();
        let routed = self.indices.len() as f32;
        let share = self.usage().into_iter().map(|n| n as f32 / routed).collect::<Vec<_>>();
        let share_1e = Tensor::<2>::from_data(TensorData::new(share, [1, experts]), &self.probs_te.device());
        (self.probs_te.clone().mean_dim(0) * share_1e).sum() * experts as f64
    }

    /// `mean(KL(q ‖ p))`, q even over the experts that a token was steered to: the router learns to choose them itself, and all of them. A token that was not
    /// steered counts 0. None where nothing was steered.
    pub fn pull_loss(&self) -> Option<Tensor<1>> {
        let (steered, [tokens, experts]) = (self.favoured_te.as_ref()?, self.probs_te.dims());
        let (mut even, mut entropy) = (Vec::with_capacity(steered.len()), 0.0);
        for favoured in steered.chunks(experts) {
            let count = favoured.iter().sum::<f32>().max(1.0);
            even.extend(favoured.iter().map(|favoured| favoured / count));
            entropy += f64::from(count.ln()) / tokens as f64;
        }
        let even_te = Tensor::<2>::from_data(TensorData::new(even, [tokens, experts]), &self.probs_te.device());
        // From the logits: a probability that underflows would have no way back.
        let lse_t1 = self.log_sum_exp();
        let cross = (even_te * (lse_t1 - self.logits_te.clone())).sum() / tokens as f64;
        Some(cross - entropy)
    }

    /// Over the experts, `[t, 1]`.
    fn log_sum_exp(&self) -> Tensor<2> {
        let max_t1 = self.logits_te.clone().detach().max_dim(1);
        (self.logits_te.clone() - max_t1.clone()).exp().sum_dim(1).log() + max_t1
    }

    /// z-loss `mean(logsumexp(logits)²)` (arXiv 2202.08906): keeps router logits small.
    pub fn z_loss(&self) -> Tensor<1> {
        self.log_sum_exp().square().mean()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steering::{Favoured, Steering};
    use serde_json::Value;

    /// The numbers of lists of lists, in order.
    fn numbers(value: &Value) -> Vec<f64> {
        value.as_array().map_or_else(|| vec![value.as_f64().expect("a number")], |list| list.iter().flat_map(numbers).collect())
    }

    #[test]
    fn steered_choices_their_weights_and_the_pull_equal_numpys() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/routing/golden.json");
        let golden: Vec<Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(golden.len(), 2);
        let device = crate::training_device();
        for case in &golden {
            let floats = |key: &str| numbers(&case[key]).into_iter().map(|value| value as f32).collect::<Vec<_>>();
            let domains: Arc<[u16]> = numbers(&case["domains"]).into_iter().map(|domain| domain as u16).collect();
            let [experts, top_k] = ["experts", "top_k"].map(|key| case[key].as_u64().unwrap() as usize);
            let of_domain = case["experts_of_domain"].as_array().unwrap().iter().map(numbers);
            let table = of_domain.flat_map(|given| (0..experts).map(move |expert| given.contains(&(expert as f64)))).collect();
            let layers = Arc::new([(3, Favoured { table, experts })].into());
            let steering = Steering::Favoured { domains: domains.clone(), layers, strength: floats("strength")[0] };
            let steering = LayerSteering { steering, layer: 3 };
            let mut init = Init::zeros(&device);
            let bias = Tensor::from_data(TensorData::new(floats("bias"), [1, experts]), &device);
            let moe = Moe {
                gate: Linear::new(&mut init, [experts, 1], false, 0.0),
                moe_statics: MoeStatics { e_score_correction_bias: Param::from_tensor(bias).set_require_grad(false) },
                experts: Experts {
                    gate_proj: init.constant([experts, 1, 1], 0.0),
                    up_proj: init.constant([experts, 1, 1], 0.0),
                    down_proj: init.constant([experts, 1, 1], 0.0),
                },
                shared_experts: None,
                top_k,
                norm_min: case["norm_min"].as_f64().unwrap(),
            };
            let logits = TensorData::new(floats("logits"), [domains.len(), experts]);
            let logits_te = Tensor::<2>::from_data(logits, &device).require_grad();
            let probs_te = softmax(logits_te.clone());
            let (indices, weights_tk) = moe.select(&probs_te, Some(&steering));
            assert_eq!(indices.iter().map(|&expert| f64::from(expert)).collect::<Vec<_>>(), numbers(&case["indices"]));
            let favoured_te = steering.favoured().map(Into::into);
            let routing = Routing { logits_te, probs_te, indices, weights_tk, favoured_te };
            let pull = routing.pull_loss().unwrap();
            let gradient = routing.logits_te.grad(&pull.backward()).unwrap();
            let near = |name: &str, found: Vec<f32>| {
                let expected = numbers(&case[name]);
                assert_eq!(found.len(), expected.len(), "{name}");
                let worst = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                assert!(worst < 5e-7, "{name} is off by {worst:e}");
            };
            near("weights", routing.weights());
            near("pull", ops::host_f32(&pull));
            near("pull_gradient", ops::host_f32(&gradient));
        }
    }

    #[test]
    fn the_pull_is_the_divergence_from_the_steered_experts() {
        let device = crate::inference_device();
        let logits = [1.0f32, 2.0, 0.0, -1.0, 0.5, 0.5, -200.0, 0.5, 3.0, 1.0, 0.0, 0.0];
        let logits_te = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [3, 4]), &device);
        let favoured = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let weights_tk = Tensor::<2>::ones([3, 2], &device);
        let probs_te = softmax(logits_te.clone());
        let routing = Routing { probs_te, logits_te, indices: Arc::from([0; 6]), weights_tk, favoured_te: Some(favoured.into()) };
        let ln_p = |row: usize, expert: usize| {
            let row = &logits[4 * row..4 * row + 4];
            f64::from(row[expert]) - row.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln()
        };
        let expected = (-(ln_p(0, 1) + ln_p(0, 2)) / 2.0 - 2f64.ln() - ln_p(1, 0)) / 3.0;
        let found = f64::from(ops::scalar(&routing.pull_loss().unwrap()));
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        // Routers that choose so already are left alone.
        let even_te = Tensor::<2>::from_data(TensorData::new(vec![5.0, 5.0, -50.0, -50.0], [1, 4]), &device);
        let content =
            Routing { probs_te: softmax(even_te.clone()), logits_te: even_te, favoured_te: Some([1.0, 1.0, 0.0, 0.0].into()), ..routing };
        assert!(ops::scalar(&content.pull_loss().unwrap()).abs() < 1e-6);
        assert!(Routing { favoured_te: None, ..content }.pull_loss().is_none());
    }
}
