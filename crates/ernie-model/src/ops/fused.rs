//! The operators as Burn's dispatcher sees them.
use std::sync::Arc;

use super::{AttentionContext, ExpertsContext, LossContext, Precision};
use burn::backend::{Backend, backend_extension, tensor::FloatTensor};

/// Fused operators with a gradient; see the functions of the same names in [`super`].
#[backend_extension(Flex, Autodiff)]
pub(super) trait Fused: Backend {
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;
    fn fused_norm_linear1(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        only: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;
    fn fused_norm_linear2(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;
    fn fused_norm_linear3(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        third: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;
    fn fused_linear_add(residual: FloatTensor<Self>, x: FloatTensor<Self>, w: FloatTensor<Self>, precision: Precision)
    -> FloatTensor<Self>;
    fn fused_swiglu_linear_add(
        residual: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        w: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;
    fn fused_rope_attention(qkv: FloatTensor<Self>, context: AttentionContext) -> FloatTensor<Self>;
    fn fused_paragraph_attention(qkv: FloatTensor<Self>, pool: FloatTensor<Self>, context: AttentionContext) -> FloatTensor<Self>;
    fn fused_semantic_density(x: FloatTensor<Self>, decay: FloatTensor<Self>, cu_seqlens: Arc<[u32]>) -> FloatTensor<Self>;
    fn fused_gate_heads(heads: FloatTensor<Self>, logits: FloatTensor<Self>, threshold: f64) -> FloatTensor<Self>;
    #[allow(clippy::too_many_arguments)] // The dispatcher takes no arrays of tensors.
    fn fused_norm_experts_add(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        eps: f64,
        context: ExpertsContext,
    ) -> FloatTensor<Self>;
    fn fused_head_cross_entropy(states: FloatTensor<Self>, w: FloatTensor<Self>, context: LossContext) -> FloatTensor<Self>;
    fn fused_with_gradient(y: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_embedding(w: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self>;
}

/// What a backend must compute for [`Fused`] to be differentiable on it: forward passes that keep what the backward needs, and the backwards.
///
/// Gradients come in the order of the inputs.
pub(super) trait FusedKernels: Backend {
    fn linear_kernel(x: &FloatTensor<Self>, w: &FloatTensor<Self>) -> FloatTensor<Self>;
    fn linear_gradient(x: FloatTensor<Self>, w: FloatTensor<Self>, dy: FloatTensor<Self>) -> [FloatTensor<Self>; 2];
    fn rms_norm_kernel(x: &FloatTensor<Self>, w: &FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;
    fn rms_norm_gradient(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f64, dy: FloatTensor<Self>) -> [FloatTensor<Self>; 2];
    /// Inputs x, norm, then the layers' weights.
    fn norm_linear_kernel<const N: usize>(inputs: &[FloatTensor<Self>; N], eps: f64, precision: Precision) -> FloatTensor<Self>;
    fn norm_linear_gradient<const N: usize>(
        inputs: [FloatTensor<Self>; N],
        eps: f64,
        precision: Precision,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; N];
    /// Adds to the residual, in place where it is not shared.
    fn linear_add_kernel(residual: FloatTensor<Self>, xw: [&FloatTensor<Self>; 2], precision: Precision) -> FloatTensor<Self>;
    /// Of x and w; that of the residual is dy.
    fn linear_add_gradient(xw: [FloatTensor<Self>; 2], precision: Precision, dy: &FloatTensor<Self>) -> [FloatTensor<Self>; 2];
    /// Adds to the residual, in place where it is not shared.
    fn swiglu_linear_add_kernel(residual: FloatTensor<Self>, gate_up_w: [&FloatTensor<Self>; 2], precision: Precision)
    -> FloatTensor<Self>;
    /// Of gate and up, and of w; that of the residual is dy.
    fn swiglu_linear_add_gradient(
        gate_up_w: [FloatTensor<Self>; 2],
        precision: Precision,
        dy: &FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];
    /// Also the log-sum-exp of each query's scores, `[t, n_q]`.
    fn rope_attention_kernel(qkv: &FloatTensor<Self>, context: &AttentionContext) -> (FloatTensor<Self>, Arc<Vec<f32>>);
    fn rope_attention_gradient(
        qkv: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: &[f32],
        context: &AttentionContext,
        dy: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    fn paragraph_attention_kernel(
        qkv: &FloatTensor<Self>,
        pool: &FloatTensor<Self>,
        context: &AttentionContext,
    ) -> (FloatTensor<Self>, Arc<Vec<f32>>);
    fn paragraph_attention_gradient(
        inputs: [FloatTensor<Self>; 2],
        out: FloatTensor<Self>,
        lse: &[f32],
        context: &AttentionContext,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];
    fn semantic_density_kernel(x: &FloatTensor<Self>, decay: &FloatTensor<Self>, cu_seqlens: &[u32]) -> FloatTensor<Self>;
    fn semantic_density_gradient(
        x: FloatTensor<Self>,
        decay: FloatTensor<Self>,
        cu_seqlens: &[u32],
        dd: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];
    fn gate_heads_kernel(heads: &FloatTensor<Self>, logits: &FloatTensor<Self>, threshold: f64) -> FloatTensor<Self>;
    fn gate_heads_gradient(inputs: [FloatTensor<Self>; 2], threshold: f64, dy: FloatTensor<Self>) -> [FloatTensor<Self>; 2];
    /// Inputs x, norm, gate, up, down, weights.
    fn norm_experts_add_kernel(
        inputs: &[FloatTensor<Self>; 6],
        eps: f64,
        context: &ExpertsContext,
    ) -> (FloatTensor<Self>, Arc<ernie_kernels::experts::Saved>);
    fn norm_experts_add_gradient(
        inputs: [FloatTensor<Self>; 6],
        saved: &ernie_kernels::experts::Saved,
        eps: f64,
        precision: Precision,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 6];
    fn head_cross_entropy_kernel(states: &FloatTensor<Self>, w: &FloatTensor<Self>, context: &LossContext) -> FloatTensor<Self>;
    /// The loss and its gradients with respect to states and weights, made in one pass.
    fn head_cross_entropy_with_gradient(
        states: FloatTensor<Self>,
        w: &FloatTensor<Self>,
        context: &LossContext,
    ) -> (FloatTensor<Self>, [FloatTensor<Self>; 2]);
    /// Takes y for itself; a one-element 0.
    fn nothing_of(y: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `x + y` of one shape, in place of one that is not shared.
    fn sum_kernel(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>;
    /// `x · s` for a one-element s, in place where the tensor is not shared.
    fn scaled_kernel(x: FloatTensor<Self>, s: &FloatTensor<Self>) -> FloatTensor<Self>;
    /// Rows and columns.
    fn matrix_shape(x: &FloatTensor<Self>) -> [usize; 2];
    fn embedding_kernel(w: &FloatTensor<Self>, ids: &[u32]) -> FloatTensor<Self>;
    fn embedding_gradient(w_shape: [usize; 2], ids: &[u32], dy: FloatTensor<Self>) -> FloatTensor<Self>;
}
