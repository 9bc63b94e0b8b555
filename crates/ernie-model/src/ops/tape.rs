//! The operators on the autodiff tape: each records what its hand-written backward needs.
use std::sync::Arc;

use super::{
    AttentionContext, ExpertsContext, LossContext, Precision,
    fused::{Fused, FusedKernels},
};
use burn::backend::{
    autodiff::{
        Autodiff, NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, NodeGuard, Ops, OpsKind},
    },
    tensor::FloatTensor,
};
use ernie_kernels::experts;

/// Which tensors a gradient has arrived at in this thread's backward pass. Burn adds a second gradient with an operator of its own, which frees a buffer instead of
/// giving it back; knowing of the first, the operators here add it themselves.
pub(super) mod arrivals {
    use super::NodeId;
    use std::{cell::RefCell, collections::HashSet};

    thread_local! {
        static NODES: RefCell<Option<HashSet<NodeId>>> = const { RefCell::new(None) };
    }

    /// Watches one backward pass, which must begin and end inside `pass`. In others Burn adds.
    pub fn watch<T>(pass: impl FnOnce() -> T) -> T {
        NODES.set(Some(HashSet::new()));
        let result = pass();
        NODES.set(None);
        result
    }

    /// Notes a gradient of this node; whether one is known to be there.
    pub fn again(node: NodeId) -> bool {
        NODES.with_borrow_mut(|nodes| nodes.as_mut().is_some_and(|nodes| !nodes.insert(node)))
    }

    /// The node's gradients have been consumed.
    pub fn forget(node: NodeId) {
        NODES.with_borrow_mut(|nodes| nodes.as_mut().is_some_and(|nodes| nodes.remove(&node)));
    }
}

/// A node of the tape: `$name` takes `$inputs` tensors, keeps a `$state`, and computes their gradients from the gradient of its output.
macro_rules! backward {
    ($name:ident, $inputs:literal, $state:ty, |$saved:pat_param, $gradient:ident| $gradients:expr) => {
        #[derive(Debug)]
        struct $name;

        impl<B: FusedKernels> Backward<B, $inputs> for $name {
            type State = $state;

            fn backward(self, ops: Ops<Self::State, $inputs>, gradients: &mut Gradients, _: &mut Checkpointer) {
                let $gradient = gradients.consume::<B>(&ops.node);
                arrivals::forget(ops.node.id);
                let $saved = ops.state;
                let of_inputs: [FloatTensor<B>; $inputs] = $gradients;
                for (parent, gradient) in ops.parents.into_iter().zip(of_inputs) {
                    if let Some(parent) = parent {
                        // A leaf's gradient stays with the tape; only what is on its way can be taken out and added to.
                        let on_its_way = !parent.parents.is_empty();
                        let sum = if on_its_way && arrivals::again(parent.id) {
                            B::sum_kernel(gradient, gradients.consume::<B>(&parent))
                        } else {
                            gradient
                        };
                        gradients.register::<B>(parent.id, sum);
                    }
                }
            }
        }
    };
}

type Pair<B> = [FloatTensor<B>; 2];

backward!(Linear, 2, Pair<B>, |[x, w], dy| B::linear_gradient(x, w, dy));
backward!(RmsNorm, 2, (Pair<B>, f64), |([x, w], eps), dy| B::rms_norm_gradient(x, w, eps, dy));
backward!(NormLinear1, 3, ([FloatTensor<B>; 3], f64, Precision), |(inputs, eps, precision), dy| {
    B::norm_linear_gradient(inputs, eps, precision, dy)
});
backward!(NormLinear2, 4, ([FloatTensor<B>; 4], f64, Precision), |(inputs, eps, precision), dy| {
    B::norm_linear_gradient(inputs, eps, precision, dy)
});
backward!(NormLinear3, 5, ([FloatTensor<B>; 5], f64, Precision), |(inputs, eps, precision), dy| {
    B::norm_linear_gradient(inputs, eps, precision, dy)
});
backward!(LinearAdd, 3, (Pair<B>, Precision), |(xw, precision), dy| {
    let [dx, dw] = B::linear_add_gradient(xw, precision, &dy);
    [dy, dx, dw]
});
backward!(SwigluLinearAdd, 3, (Pair<B>, Precision), |(gate_up_w, precision), dy| {
    let [dgate_up, dw] = B::swiglu_linear_add_gradient(gate_up_w, precision, &dy);
    [dy, dgate_up, dw]
});
backward!(RopeAttention, 1, (FloatTensor<B>, FloatTensor<B>, Arc<Vec<f32>>, AttentionContext), |(qkv, out, lse, context), dy| {
    [B::rope_attention_gradient(qkv, out, &lse, &context, dy)]
});
backward!(ParagraphAttention, 2, (Pair<B>, FloatTensor<B>, Arc<Vec<f32>>, AttentionContext), |(inputs, out, lse, context), dy| {
    B::paragraph_attention_gradient(inputs, out, &lse, &context, dy)
});
backward!(SemanticDensity, 2, (Pair<B>, Arc<[u32]>), |([x, decay], cu_seqlens), dd| {
    B::semantic_density_gradient(x, decay, &cu_seqlens, dd)
});
backward!(GateHeads, 2, (Pair<B>, f64), |(inputs, threshold), dy| B::gate_heads_gradient(inputs, threshold, dy));
backward!(NormExpertsAdd, 6, ([FloatTensor<B>; 6], Arc<experts::Saved>, f64, Precision), |(inputs, saved, eps, precision), dy| {
    B::norm_experts_add_gradient(inputs, &saved, eps, precision, dy)
});
backward!(HeadCrossEntropy, 2, Pair<B>, |gradients, dy| gradients.map(|gradient| B::scaled_kernel(gradient, &dy)));
backward!(WithGradient, 1, FloatTensor<B>, |dy, factor| [B::scaled_kernel(dy, &factor)]);
backward!(Embedding, 1, ([usize; 2], Arc<[u32]>), |(shape, ids), dy| [B::embedding_gradient(shape, &ids, dy)]);

/// Puts `output` on the tape; `state` is only made where a gradient will be asked for.
fn record<B: FusedKernels, C: CheckpointStrategy, O: Backward<B, N>, const N: usize>(
    operator: O,
    inputs: [NodeGuard; N],
    output: FloatTensor<B>,
    state: impl FnOnce() -> O::State,
) -> FloatTensor<Autodiff<B, C>> {
    match operator.prepare::<C>(inputs).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(state(), output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    }
}

impl<B: FusedKernels, C: CheckpointStrategy> Fused for Autodiff<B, C> {
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let ((x, x_node), (w, w_node)) = (x.into_parts(), w.into_parts());
        let y = B::linear_kernel(&x, &w);
        record::<B, C, _, 2>(Linear, [x_node, w_node], y, || [x, w])
    }

    fn fused_rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let ((x, x_node), (w, w_node)) = (x.into_parts(), w.into_parts());
        let y = B::rms_norm_kernel(&x, &w, eps);
        record::<B, C, _, 2>(RmsNorm, [x_node, w_node], y, || ([x, w], eps))
    }

    fn fused_norm_linear1(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        only: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (norm, norm_node), (only, only_node)) = (x.into_parts(), norm.into_parts(), only.into_parts());
        let inputs = [x, norm, only];
        let y = B::norm_linear_kernel(&inputs, eps, precision);
        record::<B, C, _, 3>(NormLinear1, [x_node, norm_node, only_node], y, || (inputs, eps, precision))
    }

    fn fused_norm_linear2(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (norm, norm_node)) = (x.into_parts(), norm.into_parts());
        let ((first, first_node), (second, second_node)) = (first.into_parts(), second.into_parts());
        let inputs = [x, norm, first, second];
        let y = B::norm_linear_kernel(&inputs, eps, precision);
        record::<B, C, _, 4>(NormLinear2, [x_node, norm_node, first_node, second_node], y, || (inputs, eps, precision))
    }

    fn fused_norm_linear3(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        third: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (norm, norm_node), (first, first_node)) = (x.into_parts(), norm.into_parts(), first.into_parts());
        let ((second, second_node), (third, third_node)) = (second.into_parts(), third.into_parts());
        let inputs = [x, norm, first, second, third];
        let y = B::norm_linear_kernel(&inputs, eps, precision);
        record::<B, C, _, 5>(NormLinear3, [x_node, norm_node, first_node, second_node, third_node], y, || (inputs, eps, precision))
    }

    fn fused_linear_add(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let ((residual, residual_node), (x, x_node), (w, w_node)) = (residual.into_parts(), x.into_parts(), w.into_parts());
        let y = B::linear_add_kernel(residual, [&x, &w], precision);
        record::<B, C, _, 3>(LinearAdd, [residual_node, x_node, w_node], y, || ([x, w], precision))
    }

    fn fused_swiglu_linear_add(
        residual: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        w: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let ((residual, residual_node), (x, x_node), (w, w_node)) = (residual.into_parts(), gate_up.into_parts(), w.into_parts());
        let y = B::swiglu_linear_add_kernel(residual, [&x, &w], precision);
        record::<B, C, _, 3>(SwigluLinearAdd, [residual_node, x_node, w_node], y, || ([x, w], precision))
    }

    fn fused_rope_attention(qkv: FloatTensor<Self>, context: AttentionContext) -> FloatTensor<Self> {
        let (qkv, node) = qkv.into_parts();
        let (y, lse) = B::rope_attention_kernel(&qkv, &context);
        let out = y.clone();
        record::<B, C, _, 1>(RopeAttention, [node], y, || (qkv, out, lse, context))
    }

    fn fused_paragraph_attention(qkv: FloatTensor<Self>, pool: FloatTensor<Self>, context: AttentionContext) -> FloatTensor<Self> {
        let ((qkv, qkv_node), (pool, pool_node)) = (qkv.into_parts(), pool.into_parts());
        let (y, lse) = B::paragraph_attention_kernel(&qkv, &pool, &context);
        let out = y.clone();
        record::<B, C, _, 2>(ParagraphAttention, [qkv_node, pool_node], y, || ([qkv, pool], out, lse, context))
    }

    fn fused_semantic_density(x: FloatTensor<Self>, decay: FloatTensor<Self>, cu_seqlens: Arc<[u32]>) -> FloatTensor<Self> {
        let ((x, x_node), (decay, decay_node)) = (x.into_parts(), decay.into_parts());
        let d = B::semantic_density_kernel(&x, &decay, &cu_seqlens);
        record::<B, C, _, 2>(SemanticDensity, [x_node, decay_node], d, || ([x, decay], cu_seqlens))
    }

    fn fused_gate_heads(heads: FloatTensor<Self>, logits: FloatTensor<Self>, threshold: f64) -> FloatTensor<Self> {
        let ((heads, heads_node), (logits, logits_node)) = (heads.into_parts(), logits.into_parts());
        let y = B::gate_heads_kernel(&heads, &logits, threshold);
        record::<B, C, _, 2>(GateHeads, [heads_node, logits_node], y, || ([heads, logits], threshold))
    }

    fn fused_norm_experts_add(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        eps: f64,
        context: ExpertsContext,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (norm, norm_node), (gate, gate_node)) = (x.into_parts(), norm.into_parts(), gate.into_parts());
        let ((up, up_node), (down, down_node), (weights, weights_node)) = (up.into_parts(), down.into_parts(), weights.into_parts());
        let inputs = [x, norm, gate, up, down, weights];
        let (y, saved) = B::norm_experts_add_kernel(&inputs, eps, &context);
        let nodes = [x_node, norm_node, gate_node, up_node, down_node, weights_node];
        record::<B, C, _, 6>(NormExpertsAdd, nodes, y, || (inputs, saved, eps, context.precision))
    }

    fn fused_head_cross_entropy(states: FloatTensor<Self>, w: FloatTensor<Self>, context: LossContext) -> FloatTensor<Self> {
        let ((states, states_node), (w, w_node)) = (states.into_parts(), w.into_parts());
        // The gradient is a by-product of the forward pass while the logits of a chunk are at hand; without a tape it is not made.
        match HeadCrossEntropy.prepare::<C>([states_node, w_node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let (loss, gradients) = B::head_cross_entropy_with_gradient(states, &w, &context);
                prepared.finish(gradients, loss)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::head_cross_entropy_kernel(&states, &w, &context)),
        }
    }

    fn fused_with_gradient(y: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        let (y, node) = y.into_parts();
        record::<B, C, _, 1>(WithGradient, [node], B::nothing_of(y), || dy.into_primitive())
    }

    fn fused_embedding(w: FloatTensor<Self>, ids: Arc<[u32]>) -> FloatTensor<Self> {
        let (w, w_node) = w.into_parts();
        let y = B::embedding_kernel(&w, &ids);
        record::<B, C, _, 1>(Embedding, [w_node], y, || (B::matrix_shape(&w), ids))
    }
}
