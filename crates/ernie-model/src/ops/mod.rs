//! The seam between the network and its kernels.
//!
//! Each function here is one coarse operator of the model. On the CPU (Burn's Flex backend, with or without autodiff) it runs the fused kernel
//! of `ernie-kernels` with a hand-written backward, declared to Burn as a *backend extension*: `fused` names the operators, `flex` runs
//! them on slices, `tape` records them. On any other device it runs its twin in [`plain`], made of Burn's own operators, which is also
//! the oracle of the tests.
use std::sync::{Arc, OnceLock};

use crate::{
    batch::IGNORE,
    steering::{LayerSteering, Steering},
};
use burn::{backend::Dispatch, prelude::*, tensor::Gradients};
pub use ernie_kernels::matmul::Precision;
use ernie_kernels::{attention::Shape, rope::RopeTable};

mod flex;
mod fused;
pub mod plain;
pub mod profile;
mod tape;

use fused::Fused;

/// What attention needs to know beside queries, keys and values.
#[derive(Debug, Clone)]
pub struct AttentionContext {
    /// Head counts and size.
    pub shape: Shape,
    /// Document bounds, `[0, …, t]`.
    pub cu_seqlens: Arc<[u32]>,
    /// How many tokens back a token sees (itself included), if not its whole document.
    pub window: Option<usize>,
    /// Bounds of the paragraphs inside the documents, `[0, …, t]`, for layers that attend to paragraphs; without such layers those of the documents.
    pub paragraphs: Arc<[u32]>,
    /// Cosines and sines of the positions.
    pub rope: Arc<RopeTable>,
}

/// What a layer needs to know beside its input.
#[derive(Debug, Clone)]
pub struct LayerContext {
    /// Heads, documents and positions.
    pub attention: AttentionContext,
    /// Of the layer's products; norms, routers and attention itself are in f32.
    pub precision: Precision,
    /// What decides about experts beside the routers, of a batch and of a layer.
    pub steering: Option<Steering>,
    pub(crate) layer_steering: Option<LayerSteering>,
}

impl LayerContext {
    /// The same for layer `layer`, whose tokens see the last `window` tokens, or all.
    pub fn of_layer(&self, layer: usize, window: Option<usize>) -> Self {
        let layer_steering = self.steering.clone().map(|steering| LayerSteering { steering, layer });
        Self { attention: AttentionContext { window, ..self.attention.clone() }, layer_steering, ..self.clone() }
    }
}

/// Which experts each token goes to.
#[derive(Debug, Clone)]
pub struct ExpertsContext {
    /// `[t, k]`.
    pub indices: Arc<[u32]>,
    /// k.
    pub top_k: usize,
    /// Of the experts' products.
    pub precision: Precision,
}

/// What the head's loss is made of beside states and weights.
#[derive(Debug, Clone)]
pub struct LossContext {
    /// `[t]`, `IGNORE` = not scored.
    pub targets: Arc<[i32]>,
    /// Factors of the tokens' losses, `[t]`; all 1 without them.
    pub weights: Option<Arc<[f32]>>,
    /// Of the head's products.
    pub precision: Precision,
    /// Where the operator leaves the tokens' losses in nats, `[t]`, 0 where not scored, without the factors.
    pub token_losses: Arc<OnceLock<Vec<f32>>>,
}

impl LossContext {
    /// For the mean loss of the scored targets.
    pub fn new(targets: &Arc<[i32]>, precision: Precision) -> Self {
        Self { targets: targets.clone(), weights: None, precision, token_losses: Arc::default() }
    }

    fn scored(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count().max(1)
    }

    /// What each token's loss counts in the mean, `[t]`.
    fn shares(&self) -> Vec<f32> {
        let share = 1.0 / self.scored() as f32;
        match &self.weights {
            None => vec![share; self.targets.len()],
            Some(weights) => weights.iter().map(|weight| weight * share).collect(),
        }
    }

    /// The mean of the tokens' losses, which are kept.
    fn finish(&self, losses: Vec<f32>) -> f32 {
        let sum: f64 = match &self.weights {
            None => losses.iter().map(|&loss| f64::from(loss)).sum(),
            Some(weights) => losses.iter().zip(weights.iter()).map(|(&loss, &weight)| f64::from(loss) * f64::from(weight)).sum(),
        };
        // A second use of one context would tell the same.
        let _ = self.token_losses.set(losses);
        (sum / self.scored() as f64) as f32
    }
}

/// `x_ti · w_oiᵀ` → `[t, o]`.
pub fn linear(x_ti: Tensor<2>, w_oi: Tensor<2>) -> Tensor<2> {
    if !runs_kernels(&x_ti.device()) {
        return plain::linear(x_ti, w_oi);
    }
    Tensor::from_dispatch(Dispatch::fused_linear(x_ti.into_dispatch(), w_oi.into_dispatch()))
}

/// `x / √(mean(x²) + eps) · w` over rows.
pub fn rms_norm(x_th: Tensor<2>, w_h: Tensor<1>, eps: f64) -> Tensor<2> {
    if !runs_kernels(&x_th.device()) {
        return plain::rms_norm(x_th, w_h, eps);
    }
    Tensor::from_dispatch(Dispatch::fused_rms_norm(x_th.into_dispatch(), w_h.into_dispatch(), eps))
}

/// `rms_norm(x)·[w₁; w₂; …]ᵀ` for one to three layers side by side: `[t, Σo]`.
pub fn norm_linear<const N: usize>(
    x_th: Tensor<2>,
    norm_h: Tensor<1>,
    eps: f64,
    layers: [Tensor<2>; N],
    precision: Precision,
) -> Tensor<2> {
    if !runs_kernels(&x_th.device()) {
        return plain::norm_linear(x_th, norm_h, eps, layers);
    }
    let (x, norm) = (x_th.into_dispatch(), norm_h.into_dispatch());
    let mut layers = layers.into_iter().map(Tensor::into_dispatch);
    let mut next = || layers.next().expect("as many as were counted");
    Tensor::from_dispatch(match N {
        1 => Dispatch::fused_norm_linear1(x, norm, next(), eps, precision),
        2 => Dispatch::fused_norm_linear2(x, norm, next(), next(), eps, precision),
        3 => Dispatch::fused_norm_linear3(x, norm, next(), next(), next(), eps, precision),
        _ => panic!("{N} layers behind one norm; one to three are there"),
    })
}

/// `residual + x·wᵀ`.
pub fn linear_add(residual_to: Tensor<2>, x_ti: Tensor<2>, w_oi: Tensor<2>, precision: Precision) -> Tensor<2> {
    if !runs_kernels(&x_ti.device()) {
        return plain::linear_add(residual_to, x_ti, w_oi);
    }
    let (residual, x, w) = (residual_to.into_dispatch(), x_ti.into_dispatch(), w_oi.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_linear_add(residual, x, w, precision))
}

/// `residual + (silu(gate) ⊙ up)·wᵀ`, a token's gate and up side by side in `[t, 2·i]`.
pub fn swiglu_linear_add(residual_th: Tensor<2>, gate_up: Tensor<2>, w_hi: Tensor<2>, precision: Precision) -> Tensor<2> {
    if !runs_kernels(&gate_up.device()) {
        return plain::swiglu_linear_add(residual_th, gate_up, w_hi);
    }
    let (residual, gate_up, w) = (residual_th.into_dispatch(), gate_up.into_dispatch(), w_hi.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_swiglu_linear_add(residual, gate_up, w, precision))
}

/// Rotary positions on queries and keys, then causal attention inside each document: `[t, n_q·d]` from `[t, (n_q + 2·n_kv)·d]`.
pub fn rope_attention(qkv: Tensor<2>, context: &AttentionContext) -> Tensor<2> {
    if !runs_kernels(&qkv.device()) {
        return plain::rope_attention(qkv, context);
    }
    Tensor::from_dispatch(Dispatch::fused_rope_attention(qkv.into_dispatch(), context.clone()))
}

/// The same with attention inside each paragraph and to a summary of each earlier one, pooled by `pool` `[n_kv, d]` (`ernie_kernels::attention::paragraphs`).
pub fn paragraph_attention(qkv: Tensor<2>, pool: Tensor<2>, context: &AttentionContext) -> Tensor<2> {
    if !runs_kernels(&qkv.device()) {
        return plain::paragraph_attention(qkv, pool, context);
    }
    Tensor::from_dispatch(Dispatch::fused_paragraph_attention(qkv.into_dispatch(), pool.into_dispatch(), context.clone()))
}

/// `1 − cos(x_t, m_t)`, `[t, 1]`, m the moving sum of a document's rows with this decay, `[1]`.
pub fn semantic_density(x_th: Tensor<2>, decay_1: Tensor<1>, cu_seqlens: &Arc<[u32]>) -> Tensor<2> {
    if !runs_kernels(&x_th.device()) {
        return plain::semantic_density(x_th, decay_1, cu_seqlens);
    }
    Tensor::from_dispatch(Dispatch::fused_semantic_density(x_th.into_dispatch(), decay_1.into_dispatch(), cu_seqlens.clone()))
}

/// Head outputs `[t, n·d]` times σ(logits `[t, n]`), 0 where that is below the threshold; its gradient takes no notice of the threshold.
pub fn gate_heads(heads: Tensor<2>, logits_tn: Tensor<2>, threshold: f64) -> Tensor<2> {
    if !runs_kernels(&heads.device()) {
        return plain::gate_heads(heads, logits_tn, threshold);
    }
    Tensor::from_dispatch(Dispatch::fused_gate_heads(heads.into_dispatch(), logits_tn.into_dispatch(), threshold))
}

/// `x_t + Σ_k weights_tk · down(silu(gate z_t) ⊙ up z_t)` over the experts chosen for each token, `z = rms_norm(x)`; stacks are `[gate, up, down]`.
pub fn norm_experts_add(
    x_th: Tensor<2>,
    norm_h: Tensor<1>,
    eps: f64,
    stacks: [Tensor<3>; 3],
    weights_tk: Tensor<2>,
    context: &ExpertsContext,
) -> Tensor<2> {
    if !runs_kernels(&x_th.device()) {
        return plain::norm_experts_add(x_th, norm_h, eps, stacks, weights_tk, context);
    }
    let [gate, up, down] = stacks.map(Tensor::into_dispatch);
    let (x, norm, weights) = (x_th.into_dispatch(), norm_h.into_dispatch(), weights_tk.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_norm_experts_add(x, norm, gate, up, down, weights, eps, context.clone()))
}

/// Mean cross-entropy `[1]` of `softmax(states · wᵀ)` against the context's targets; no logits are kept.
pub fn head_cross_entropy(states_th: Tensor<2>, w_vh: Tensor<2>, context: &LossContext) -> Tensor<1> {
    if !runs_kernels(&states_th.device()) {
        return plain::cross_entropy(plain::linear(states_th, w_vh), context);
    }
    Tensor::from_dispatch(Dispatch::fused_head_cross_entropy(states_th.into_dispatch(), w_vh.into_dispatch(), context.clone()))
}

/// A number whose gradient with respect to y is dy, to go on with a backward pass from there; the number itself means nothing.
pub fn with_gradient(y_th: Tensor<2>, dy_th: Tensor<2>) -> Tensor<1> {
    if !runs_kernels(&y_th.device()) {
        return plain::with_gradient(y_th, dy_th);
    }
    Tensor::from_dispatch(Dispatch::fused_with_gradient(y_th.into_dispatch(), dy_th.into_dispatch()))
}

/// Rows `ids` of `w_vh`: `[t, h]`.
pub fn embedding(w_vh: Tensor<2>, ids: &Arc<[u32]>) -> Tensor<2> {
    if !runs_kernels(&w_vh.device()) {
        return plain::embedding(w_vh, ids);
    }
    Tensor::from_dispatch(Dispatch::fused_embedding(w_vh.into_dispatch(), ids.clone()))
}

/// `loss.backward()`; where gradients meet they are added in buffers that are used again.
pub fn backward(loss: Tensor<1>) -> Gradients {
    tape::arrivals::watch(|| loss.backward())
}

/// The values of a tensor on the host, off the tape.
pub fn host_f32<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    let data = x.clone().into_data();
    data.try_into_vec::<f32>().expect("model tensors are f32")
}

/// The value of a one-element tensor.
pub fn scalar(x: &Tensor<1>) -> f32 {
    host_f32(x)[0]
}

/// Whether the fused CPU kernels serve this device.
fn runs_kernels(device: &Device) -> bool {
    let device = if device.is_autodiff() { device.clone().inner() } else { device.clone() };
    device == Device::flex()
}
