//! The operators on Burn's CPU backend: tensors in, `ernie-kernels` on their slices.
use std::{borrow::Cow, sync::Arc};

use super::{
    AttentionContext, ExpertsContext,
    fused::{Fused, FusedKernels},
};
use burn::{
    backend::{Flex, tensor::FloatTensor},
    tensor::{Shape, TensorData},
};
use ernie_kernels as kernels;

type X = FloatTensor<Flex>;

/// The tensor itself if its values lie in order, else an ordered copy (a transposed or broadcast view can reach a backward).
fn ordered(x: &X) -> Cow<'_, X> {
    if x.as_slice::<f32>().is_some() { Cow::Borrowed(x) } else { Cow::Owned(x.to_contiguous()) }
}

fn slice(x: &X) -> &[f32] {
    x.as_slice::<f32>().expect("model tensors are contiguous f32")
}

fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> X {
    X::from_data(TensorData::new(values, shape.into()))
}

fn shape(x: &X) -> Shape {
    x.layout().shape().clone()
}

fn dims<const D: usize>(x: &X) -> [usize; D] {
    shape(x).dims()
}

fn len(x: &X) -> usize {
    shape(x).num_elements()
}

fn zeros(n: usize) -> Vec<f32> {
    vec![0.0; n]
}

/// A tensor of the shape of `like`, filled by `fill`.
fn filled(like: &X, fill: impl FnOnce(&mut [f32])) -> X {
    let mut values = zeros(len(like));
    fill(&mut values);
    tensor(values, shape(like))
}

fn experts_shape(x: &X, gate: &X, context: &ExpertsContext) -> kernels::experts::Shape {
    let ([tokens, hidden], [experts, intermediate, _]) = (dims(x), dims(gate));
    kernels::experts::Shape { tokens, hidden, intermediate, experts, top_k: context.top_k }
}

impl Fused for Flex {
    fn fused_linear(x: X, w: X) -> X {
        <Self as FusedKernels>::linear_kernel(&x, &w)
    }
    fn fused_rms_norm(x: X, w: X, eps: f64) -> X {
        <Self as FusedKernels>::rms_norm_kernel(&x, &w, eps)
    }
    fn fused_swiglu(gate: X, up: X) -> X {
        <Self as FusedKernels>::swiglu_kernel(&gate, &up)
    }
    fn fused_rope_attention(q: X, k: X, v: X, context: AttentionContext) -> X {
        <Self as FusedKernels>::rope_attention_kernel(&[q, k, v], &context).0
    }
    fn fused_routed_experts(x: X, gate: X, up: X, down: X, weights: X, context: ExpertsContext) -> X {
        <Self as FusedKernels>::routed_experts_kernel(&[x, gate, up, down, weights], &context).0
    }
    fn fused_head_cross_entropy(states: X, w: X, targets: Arc<[i32]>) -> X {
        <Self as FusedKernels>::head_cross_entropy_kernel(&states, &w, &targets)
    }
    fn fused_embedding(w: X, ids: Arc<[u32]>) -> X {
        <Self as FusedKernels>::embedding_kernel(&w, &ids)
    }
}

impl FusedKernels for Flex {
    fn linear_kernel(x: &X, w: &X) -> X {
        let (x, w) = (ordered(x), ordered(w));
        let ([m, k], [n, _]) = (dims(&x), dims(&w));
        let mut y = zeros(m * n);
        kernels::linear::forward(&mut y, slice(&x), slice(&w), None, m, n, k);
        tensor(y, [m, n])
    }

    fn linear_gradient(x: X, w: X, dy: X) -> [X; 2] {
        let (x, w, dy) = (ordered(&x), ordered(&w), ordered(&dy));
        let ([m, k], [n, _]) = (dims(&x), dims(&w));
        let (mut dx, mut dw) = (zeros(m * k), zeros(n * k));
        kernels::linear::backward(Some(&mut dx), &mut dw, None, slice(&x), slice(&w), slice(&dy), m, n, k);
        [tensor(dx, [m, k]), tensor(dw, [n, k])]
    }

    fn rms_norm_kernel(x: &X, w: &X, eps: f64) -> X {
        let (x, w) = (ordered(x), ordered(w));
        filled(&x, |y| kernels::rms_norm::forward(y, slice(&x), slice(&w), eps as f32))
    }

    fn rms_norm_gradient(x: X, w: X, eps: f64, dy: X) -> [X; 2] {
        let (x, w, dy) = (ordered(&x), ordered(&w), ordered(&dy));
        let mut dw = zeros(len(&w));
        let dx = filled(&x, |dx| kernels::rms_norm::backward(dx, &mut dw, slice(&x), slice(&w), slice(&dy), eps as f32));
        [dx, tensor(dw, shape(&w))]
    }

    fn swiglu_kernel(gate: &X, up: &X) -> X {
        let (gate, up) = (ordered(gate), ordered(up));
        filled(&gate, |y| kernels::swiglu::forward(y, slice(&gate), slice(&up)))
    }

    fn swiglu_gradient(gate: X, up: X, dy: X) -> [X; 2] {
        let (gate, up, dy) = (ordered(&gate), ordered(&up), ordered(&dy));
        let mut dup = zeros(len(&up));
        let dgate = filled(&gate, |dgate| kernels::swiglu::backward(dgate, &mut dup, slice(&gate), slice(&up), slice(&dy)));
        [dgate, tensor(dup, shape(&up))]
    }

    fn rope_attention_kernel([q, k, v]: &[X; 3], context: &AttentionContext) -> (X, Arc<Vec<f32>>) {
        let (q, k, v) = (ordered(q), ordered(k), ordered(v));
        let [tokens, _] = dims(&q);
        let mut lse = zeros(context.shape.q_heads * tokens);
        let out = filled(&q, |out| {
            let (cu_seqlens, rope) = (&context.cu_seqlens, &context.rope);
            kernels::attention::forward(out, &mut lse, slice(&q), slice(&k), slice(&v), cu_seqlens, rope, context.shape);
        });
        (out, Arc::new(lse))
    }

    fn rope_attention_gradient([q, k, v]: [X; 3], out: X, lse: &[f32], context: &AttentionContext, dy: X) -> [X; 3] {
        let (q, k, v, dy) = (ordered(&q), ordered(&k), ordered(&v), ordered(&dy));
        let (mut dk, mut dv) = (zeros(len(&k)), zeros(len(&v)));
        let dq = filled(&q, |dq| {
            kernels::attention::backward(
                dq,
                &mut dk,
                &mut dv,
                slice(&q),
                slice(&k),
                slice(&v),
                slice(&out),
                lse,
                slice(&dy),
                &context.cu_seqlens,
                &context.rope,
                context.shape,
            );
        });
        [dq, tensor(dk, shape(&k)), tensor(dv, shape(&v))]
    }

    fn routed_experts_kernel(inputs: &[X; 5], context: &ExpertsContext) -> (X, Arc<kernels::experts::Saved>) {
        let [x, gate, up, down, weights] = inputs.each_ref().map(ordered);
        let stacks = kernels::experts::Weights::new(slice(&gate), slice(&up), slice(&down));
        let mut y = zeros(len(&x));
        let shape_ = experts_shape(&x, &gate, context);
        let saved = kernels::experts::forward(&mut y, slice(&x), &stacks, &context.indices, slice(&weights), shape_);
        (tensor(y, shape(&x)), Arc::new(saved))
    }

    fn routed_experts_gradient(inputs: [X; 5], saved: &kernels::experts::Saved, dy: X) -> [X; 5] {
        let [x, gate, up, down, weights] = inputs.each_ref().map(ordered);
        let dy = ordered(&dy);
        let stacks = kernels::experts::Weights::new(slice(&gate), slice(&up), slice(&down));
        let mut gradients = inputs.each_ref().map(|input| zeros(len(input)));
        let [dx, dgate, dup, ddown, dweights] = &mut gradients;
        let into = kernels::experts::Gradients::new(dx, dgate, dup, ddown, dweights);
        kernels::experts::backward(saved, into, slice(&x), &stacks, slice(&weights), slice(&dy));
        let [dx, dgate, dup, ddown, dweights] = gradients;
        [
            tensor(dx, shape(&x)),
            tensor(dgate, shape(&gate)),
            tensor(dup, shape(&up)),
            tensor(ddown, shape(&down)),
            tensor(dweights, shape(&weights)),
        ]
    }

    fn head_cross_entropy_kernel(states: &X, w: &X, targets: &[i32]) -> X {
        let (states, w) = (ordered(states), ordered(w));
        let losses = kernels::cross_entropy::loss(slice(&states), slice(&w), targets);
        let scored = targets.iter().filter(|&&target| target != kernels::cross_entropy::IGNORE).count();
        let sum = losses.iter().map(|&loss| loss as f64).sum::<f64>();
        tensor(vec![(sum / scored.max(1) as f64) as f32], [1])
    }

    fn head_cross_entropy_with_gradient(states: &X, w: &X, targets: &[i32]) -> (X, [X; 2]) {
        let (states, w) = (ordered(states), ordered(w));
        let (mut dstates, mut dw) = (zeros(len(&states)), zeros(len(&w)));
        let loss = kernels::cross_entropy::loss_and_grad(&mut dstates, &mut dw, slice(&states), slice(&w), targets);
        (tensor(vec![loss], [1]), [tensor(dstates, shape(&states)), tensor(dw, shape(&w))])
    }

    fn scaled_kernel(mut x: X, s: &X) -> X {
        let factor = slice(&ordered(s))[0];
        // Exactly 1 for the main loss term: nothing to do, and nothing to round.
        if factor != 1.0 {
            kernels::adamw::scale(x.storage_mut::<f32>(), factor);
        }
        x
    }

    fn matrix_shape(x: &X) -> [usize; 2] {
        dims(x)
    }

    fn embedding_kernel(w: &X, ids: &[u32]) -> X {
        let w = ordered(w);
        let [_, hidden] = dims(&w);
        let mut y = zeros(ids.len() * hidden);
        kernels::embedding::gather(&mut y, slice(&w), ids);
        tensor(y, [ids.len(), hidden])
    }

    fn embedding_gradient(w_shape: [usize; 2], ids: &[u32], dy: X) -> X {
        let mut dw = zeros(w_shape[0] * w_shape[1]);
        kernels::embedding::scatter_add(&mut dw, slice(&ordered(&dy)), ids);
        tensor(dw, w_shape)
    }
}
