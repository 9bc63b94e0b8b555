//! The operators on Burn's CPU backend: tensors in, `ernie-kernels` on their slices.
use std::{borrow::Cow, sync::Arc};

use super::{
    AttentionContext, ExpertsContext, LossContext, Precision,
    fused::{Fused, FusedKernels},
    profile::{self, Operator},
};
use burn::{
    backend::{Flex, tensor::FloatTensor},
    tensor::{Shape, TensorData},
};
use ernie_kernels::{self as kernels, arch::gemm::Update, scratch::Scratch};

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

/// [`ordered`], of a tensor of one's own.
fn in_order(x: X) -> X {
    if x.as_slice::<f32>().is_some() { x } else { x.to_contiguous() }
}

fn mask(context: &AttentionContext) -> kernels::attention::Mask<'_> {
    kernels::attention::Mask { cu_seqlens: &context.cu_seqlens, window: context.window }
}

fn bounds(context: &AttentionContext) -> kernels::attention::paragraphs::Bounds<'_> {
    kernels::attention::paragraphs::Bounds { cu_seqlens: &context.cu_seqlens, paragraphs: &context.paragraphs }
}

fn swiglu_linear(w: &X, precision: Precision) -> kernels::swiglu_linear::SwigluLinear<'_> {
    kernels::swiglu_linear::SwigluLinear { weights: slice(w), intermediate: dims::<2>(w)[1], precision }
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

/// `n` values that will all be overwritten, in a buffer of an earlier tensor where one is free.
fn buffer(n: usize) -> Vec<f32> {
    kernels::scratch::take_buffer(n)
}

/// Keeps the buffer of a tensor for [`buffer`], if nothing else holds it.
fn recycle(x: X) {
    if x.is_unique()
        && let Ok(values) = x.into_data().try_into_vec::<f32>()
    {
        kernels::scratch::recycle(values);
    }
}

/// The result of an operator that takes its inputs for itself, whose buffers are free then.
fn used_up<const N: usize>(inputs: [X; N], operator: impl FnOnce(&[X; N]) -> X) -> X {
    let y = operator(&inputs);
    inputs.into_iter().for_each(recycle);
    y
}

/// The tensor with its values in order in a buffer that nothing else holds.
fn sole(x: X) -> X {
    let own = x.is_unique() && x.as_slice::<f32>().is_some_and(|values| values.len() == x.storage::<f32>().len());
    if own { x } else { filled(&x, |copy| copy.copy_from_slice(slice(&ordered(&x)))) }
}

/// A tensor of the shape of `like`, filled by `fill`.
fn filled(like: &X, fill: impl FnOnce(&mut [f32])) -> X {
    let mut values = buffer(len(like));
    fill(&mut values);
    tensor(values, shape(like))
}

/// The normed rows, for as long as one operator needs them: computing them twice is cheaper than keeping them.
fn normed(x: &[f32], norm: &[f32], eps: f64) -> Scratch {
    let mut z = Scratch::take(x.len());
    kernels::rms_norm::forward(&mut z, x, norm, eps as f32);
    z
}

fn experts_shape(x: &X, gate: &X, context: &ExpertsContext) -> kernels::experts::Shape {
    let ([tokens, hidden], [experts, intermediate, _]) = (dims(x), dims(gate));
    kernels::experts::Shape { tokens, hidden, intermediate, experts, top_k: context.top_k }
}

/// What a norm with one, two or three layers behind it is, by the number of its inputs: x, norm, and the layers' weights.
fn norm_linear<const N: usize>() -> Operator {
    match N {
        3 => Operator::Linear,
        4 => Operator::GateUp,
        _ => Operator::Qkv,
    }
}

impl Fused for Flex {
    fn fused_linear(x: X, w: X) -> X {
        used_up([x, w], |[x, w]| <Self as FusedKernels>::linear_kernel(x, w))
    }
    fn fused_rms_norm(x: X, w: X, eps: f64) -> X {
        used_up([x, w], |[x, w]| <Self as FusedKernels>::rms_norm_kernel(x, w, eps))
    }
    fn fused_norm_linear1(x: X, norm: X, only: X, eps: f64, precision: Precision) -> X {
        used_up([x, norm, only], |inputs| <Self as FusedKernels>::norm_linear_kernel(inputs, eps, precision))
    }
    fn fused_norm_linear2(x: X, norm: X, first: X, second: X, eps: f64, precision: Precision) -> X {
        used_up([x, norm, first, second], |inputs| <Self as FusedKernels>::norm_linear_kernel(inputs, eps, precision))
    }
    fn fused_norm_linear3(x: X, norm: X, first: X, second: X, third: X, eps: f64, precision: Precision) -> X {
        used_up([x, norm, first, second, third], |inputs| <Self as FusedKernels>::norm_linear_kernel(inputs, eps, precision))
    }
    fn fused_linear_add(residual: X, x: X, w: X, precision: Precision) -> X {
        used_up([x, w], |[x, w]| <Self as FusedKernels>::linear_add_kernel(residual, [x, w], precision))
    }
    fn fused_swiglu_linear_add(residual: X, gate_up: X, w: X, precision: Precision) -> X {
        used_up([gate_up, w], |[gate_up, w]| <Self as FusedKernels>::swiglu_linear_add_kernel(residual, [gate_up, w], precision))
    }
    fn fused_rope_attention(qkv: X, context: AttentionContext) -> X {
        used_up([qkv], |[qkv]| <Self as FusedKernels>::rope_attention_kernel(qkv, &context).0)
    }
    fn fused_paragraph_attention(qkv: X, pool: X, context: AttentionContext) -> X {
        used_up([qkv, pool], |[qkv, pool]| <Self as FusedKernels>::paragraph_attention_kernel(qkv, pool, &context).0)
    }
    fn fused_semantic_density(x: X, decay: X, cu_seqlens: Arc<[u32]>) -> X {
        used_up([x, decay], |[x, decay]| <Self as FusedKernels>::semantic_density_kernel(x, decay, &cu_seqlens))
    }
    fn fused_gate_heads(heads: X, logits: X, threshold: f64) -> X {
        used_up([heads, logits], |[heads, logits]| <Self as FusedKernels>::gate_heads_kernel(heads, logits, threshold))
    }
    fn fused_norm_experts_add(x: X, norm: X, gate: X, up: X, down: X, weights: X, eps: f64, context: ExpertsContext) -> X {
        used_up([x, norm, gate, up, down, weights], |inputs| <Self as FusedKernels>::norm_experts_add_kernel(inputs, eps, &context).0)
    }
    fn fused_head_cross_entropy(states: X, w: X, context: LossContext) -> X {
        used_up([states, w], |[states, w]| <Self as FusedKernels>::head_cross_entropy_kernel(states, w, &context))
    }
    fn fused_with_gradient(y: X, dy: X) -> X {
        used_up([dy], |_| <Self as FusedKernels>::nothing_of(y))
    }
    fn fused_embedding(w: X, ids: Arc<[u32]>) -> X {
        <Self as FusedKernels>::embedding_kernel(&w, &ids)
    }
}

impl FusedKernels for Flex {
    fn linear_kernel(x: &X, w: &X) -> X {
        let _clock = profile::forward(Operator::Linear);
        let (x, w) = (ordered(x), ordered(w));
        let ([m, k], [n, _]) = (dims(&x), dims(&w));
        let mut y = buffer(m * n);
        kernels::linear::forward(&mut y, slice(&x), slice(&w), None, k, Precision::F32);
        tensor(y, [m, n])
    }

    fn linear_gradient(x: X, w: X, dy: X) -> [X; 2] {
        let _clock = profile::backward(Operator::Linear);
        let (x, w, dy) = (in_order(x), ordered(&w), in_order(dy));
        let ([m, k], [n, _]) = (dims(&x), dims(&w));
        let (mut dx, mut dw) = (buffer(m * k), buffer(n * k));
        kernels::linear::backward(Some(&mut dx), &mut dw, None, slice(&x), slice(&w), slice(&dy), k, Precision::F32);
        [x, dy].into_iter().for_each(recycle);
        [tensor(dx, [m, k]), tensor(dw, [n, k])]
    }

    fn rms_norm_kernel(x: &X, w: &X, eps: f64) -> X {
        let _clock = profile::forward(Operator::Norm);
        let (x, w) = (ordered(x), ordered(w));
        filled(&x, |y| kernels::rms_norm::forward(y, slice(&x), slice(&w), eps as f32))
    }

    fn rms_norm_gradient(x: X, w: X, eps: f64, dy: X) -> [X; 2] {
        let _clock = profile::backward(Operator::Norm);
        let (x, w, dy) = (in_order(x), ordered(&w), in_order(dy));
        let mut dw = buffer(len(&w));
        let dx = filled(&x, |dx| kernels::rms_norm::backward(dx, &mut dw, slice(&x), slice(&w), slice(&dy), eps as f32));
        [x, dy].into_iter().for_each(recycle);
        [dx, tensor(dw, shape(&w))]
    }

    fn norm_linear_kernel<const N: usize>(inputs: &[X; N], eps: f64, precision: Precision) -> X {
        let _clock = profile::forward(norm_linear::<N>());
        let inputs = inputs.each_ref().map(ordered);
        let [x, norm, weights @ ..] = &inputs[..] else { unreachable!("x, norm and weights") };
        let outputs = weights.iter().map(|w| dims::<2>(w)[0]).sum::<usize>();
        let [t, _] = dims(x);
        let weights = weights.iter().map(|w| slice(w)).collect::<Vec<_>>();
        let mut y = buffer(t * outputs);
        kernels::norm_linear::NormLinear { norm: slice(norm), eps: eps as f32, weights: &weights, precision }.forward(&mut y, slice(x));
        tensor(y, [t, outputs])
    }

    fn norm_linear_gradient<const N: usize>(inputs: [X; N], eps: f64, precision: Precision, dy: X) -> [X; N] {
        let _clock = profile::backward(norm_linear::<N>());
        let dy = in_order(dy);
        let mut gradients = inputs.each_ref().map(|input| buffer(len(input)));
        {
            let inputs = inputs.each_ref().map(ordered);
            let [x, norm, weights @ ..] = &inputs[..] else { unreachable!("x, norm and weights") };
            let [dx, dnorm, dw @ ..] = &mut gradients[..] else { unreachable!("as many as the inputs") };
            let weights = weights.iter().map(|w| slice(w)).collect::<Vec<_>>();
            let mut dw = dw.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>();
            let layers = kernels::norm_linear::NormLinear { norm: slice(norm), eps: eps as f32, weights: &weights, precision };
            layers.backward(dx, dnorm, &mut dw, slice(x), slice(&dy));
        }
        recycle(dy);
        let shapes = inputs.each_ref().map(shape);
        inputs.into_iter().for_each(recycle);
        let mut shapes = shapes.into_iter();
        gradients.map(|gradient| tensor(gradient, shapes.next().expect("a shape for each")))
    }

    fn linear_add_kernel(residual: X, [x, w]: [&X; 2], precision: Precision) -> X {
        let _clock = profile::forward(Operator::Output);
        let (mut y, x, w) = (sole(residual), ordered(x), ordered(w));
        let [_, k] = dims(&x);
        let layers = kernels::linear::Layers { weights: &[slice(&w)], k };
        kernels::linear::Forward::new(layers, precision).run(y.storage_mut(), slice(&x), Update::Add);
        y
    }

    fn linear_add_gradient([x, w]: [X; 2], precision: Precision, dy: &X) -> [X; 2] {
        let _clock = profile::backward(Operator::Output);
        let (dy, x, w) = (ordered(dy), in_order(x), ordered(&w));
        let [_, k] = dims(&x);
        let mut dw = buffer(len(&w));
        let dx = filled(&x, |dx| {
            kernels::linear::backward(Some(dx), &mut dw, None, slice(&x), slice(&w), slice(&dy), k, precision);
        });
        recycle(x);
        [dx, tensor(dw, shape(&w))]
    }

    fn swiglu_linear_add_kernel(residual: X, [gate_up, w]: [&X; 2], precision: Precision) -> X {
        let _clock = profile::forward(Operator::Down);
        let (mut y, gate_up, w) = (sole(residual), ordered(gate_up), ordered(w));
        swiglu_linear(&w, precision).forward(y.storage_mut(), slice(&gate_up));
        y
    }

    fn swiglu_linear_add_gradient([gate_up, w]: [X; 2], precision: Precision, dy: &X) -> [X; 2] {
        let _clock = profile::backward(Operator::Down);
        let (dy, mut gate_up, w) = (ordered(dy), sole(gate_up), ordered(&w));
        let mut dw = buffer(len(&w));
        swiglu_linear(&w, precision).backward(gate_up.storage_mut::<f32>(), &mut dw, slice(&dy));
        [gate_up, tensor(dw, shape(&w))]
    }

    fn rope_attention_kernel(qkv: &X, context: &AttentionContext) -> (X, Arc<Vec<f32>>) {
        let _clock = profile::forward(Operator::Attention);
        let qkv = ordered(qkv);
        let ([t, _], heads) = (dims(&qkv), context.shape);
        let (mut out, mut lse) = (buffer(t * heads.q_heads * heads.head_dim), buffer(t * heads.q_heads));
        kernels::attention::forward(&mut out, &mut lse, slice(&qkv), mask(context), &context.rope, heads);
        (tensor(out, [t, heads.q_heads * heads.head_dim]), Arc::new(lse))
    }

    fn rope_attention_gradient(qkv: X, out: X, lse: &[f32], context: &AttentionContext, dy: X) -> X {
        let _clock = profile::backward(Operator::Attention);
        let (qkv, dy) = (in_order(qkv), in_order(dy));
        let dqkv = filled(&qkv, |dqkv| {
            let (rope, heads) = (&context.rope, context.shape);
            kernels::attention::backward(dqkv, slice(&qkv), slice(&out), lse, slice(&dy), mask(context), rope, heads);
        });
        [qkv, out, dy].into_iter().for_each(recycle);
        dqkv
    }

    fn paragraph_attention_kernel(qkv: &X, pool: &X, context: &AttentionContext) -> (X, Arc<Vec<f32>>) {
        let _clock = profile::forward(Operator::Attention);
        let (qkv, pool) = (ordered(qkv), ordered(pool));
        let ([t, _], heads) = (dims(&qkv), context.shape);
        let (mut out, mut lse) = (buffer(t * heads.q_heads * heads.head_dim), buffer(t * heads.q_heads));
        kernels::attention::paragraphs::forward(&mut out, &mut lse, slice(&qkv), slice(&pool), bounds(context), &context.rope, heads);
        (tensor(out, [t, heads.q_heads * heads.head_dim]), Arc::new(lse))
    }

    fn paragraph_attention_gradient([qkv, pool]: [X; 2], out: X, lse: &[f32], context: &AttentionContext, dy: X) -> [X; 2] {
        let _clock = profile::backward(Operator::Attention);
        let (qkv, pool, dy) = (in_order(qkv), in_order(pool), in_order(dy));
        let mut dpool = buffer(len(&pool));
        let dqkv = filled(&qkv, |dqkv| {
            let (qkv, pool, out, dy) = (slice(&qkv), slice(&pool), slice(&out), slice(&dy));
            let (rope, heads) = (&context.rope, context.shape);
            kernels::attention::paragraphs::backward(dqkv, &mut dpool, qkv, pool, out, lse, dy, bounds(context), rope, heads);
        });
        [qkv, out, dy].into_iter().for_each(recycle);
        [dqkv, tensor(dpool, shape(&pool))]
    }

    fn semantic_density_kernel(x: &X, decay: &X, cu_seqlens: &[u32]) -> X {
        let _clock = profile::forward(Operator::Density);
        let (x, decay) = (ordered(x), ordered(decay));
        let [t, h] = dims(&x);
        let mut d = buffer(t);
        kernels::density::forward(&mut d, slice(&x), h, slice(&decay)[0], cu_seqlens);
        tensor(d, [t, 1])
    }

    fn semantic_density_gradient(x: X, decay: X, cu_seqlens: &[u32], dd: X) -> [X; 2] {
        let _clock = profile::backward(Operator::Density);
        let (x, decay, dd) = (in_order(x), ordered(&decay), in_order(dd));
        let [_, h] = dims(&x);
        let mut of_decay = 0.0;
        let dx = filled(&x, |dx| of_decay = kernels::density::backward(dx, slice(&x), h, slice(&decay)[0], cu_seqlens, slice(&dd)));
        recycle(x);
        [dx, tensor(vec![of_decay], [1])]
    }

    fn gate_heads_kernel(heads: &X, logits: &X, threshold: f64) -> X {
        let _clock = profile::forward(Operator::HeadGates);
        let (heads, logits) = (ordered(heads), ordered(logits));
        let [_, n] = dims(&logits);
        filled(&heads, |y| kernels::head_gates::forward(y, slice(&heads), slice(&logits), n, threshold as f32))
    }

    fn gate_heads_gradient([heads, logits]: [X; 2], threshold: f64, dy: X) -> [X; 2] {
        let _clock = profile::backward(Operator::HeadGates);
        let (heads, logits, dy) = (in_order(heads), in_order(logits), in_order(dy));
        let [_, n] = dims(&logits);
        let mut dlogits = buffer(len(&logits));
        let dheads = filled(&heads, |dheads| {
            let threshold = threshold as f32;
            kernels::head_gates::backward(dheads, &mut dlogits, slice(&heads), slice(&logits), slice(&dy), n, threshold);
        });
        [heads, dy].into_iter().for_each(recycle);
        [dheads, tensor(dlogits, shape(&logits))]
    }

    fn norm_experts_add_kernel(inputs: &[X; 6], eps: f64, context: &ExpertsContext) -> (X, Arc<kernels::experts::Saved>) {
        let _clock = profile::forward(Operator::Experts);
        let [x, norm, gate, up, down, weights] = inputs.each_ref().map(ordered);
        let stacks = kernels::experts::Weights::new(slice(&gate), slice(&up), slice(&down), context.precision);
        let z = normed(slice(&x), slice(&norm), eps);
        let mut y = buffer(len(&x));
        y.copy_from_slice(slice(&x));
        let saved = kernels::experts::forward(&mut y, &z, &stacks, &context.indices, slice(&weights), experts_shape(&x, &gate, context));
        (tensor(y, shape(&x)), Arc::new(saved))
    }

    fn norm_experts_add_gradient(inputs: [X; 6], saved: &kernels::experts::Saved, eps: f64, precision: Precision, dy: X) -> [X; 6] {
        let _clock = profile::backward(Operator::Experts);
        let (inputs, dy) = (inputs.map(in_order), in_order(dy));
        let mut gradients = inputs.each_ref().map(|input| buffer(len(input)));
        {
            let [x, norm, gate, up, down, weights] = inputs.each_ref().map(slice);
            let [dx, dnorm, dgate, dup, ddown, dweights] = &mut gradients;
            let stacks = kernels::experts::Weights::new(gate, up, down, precision);
            let z = normed(x, norm, eps);
            let mut dz = Scratch::take(z.len());
            let into = kernels::experts::Gradients::new(&mut dz, dgate, dup, ddown, dweights);
            kernels::experts::backward(saved, into, &z, &stacks, weights, slice(&dy));
            kernels::rms_norm::backward(dx, dnorm, x, norm, &dz, eps as f32);
            kernels::adamw::add(dx, slice(&dy));
        }
        let mut shapes = inputs.each_ref().map(shape).into_iter();
        inputs.into_iter().chain([dy]).for_each(recycle);
        gradients.map(|gradient| tensor(gradient, shapes.next().expect("a shape for each")))
    }

    fn head_cross_entropy_kernel(states: &X, w: &X, context: &LossContext) -> X {
        let _clock = profile::forward(Operator::Head);
        let (states, w) = (ordered(states), ordered(w));
        let losses = kernels::cross_entropy::loss(slice(&states), slice(&w), &context.targets, context.precision);
        tensor(vec![context.finish(losses)], [1])
    }

    fn head_cross_entropy_with_gradient(states: X, w: &X, context: &LossContext) -> (X, [X; 2]) {
        let _clock = profile::forward(Operator::Head);
        let (states, w) = (in_order(states), ordered(w));
        let (mut dstates, mut dw) = (buffer(len(&states)), buffer(len(&w)));
        let (targets, precision) = (&context.targets, context.precision);
        let losses = kernels::cross_entropy::weighted_loss_and_grad(
            &mut dstates,
            &mut dw,
            slice(&states),
            slice(&w),
            targets,
            &context.shares(),
            precision,
        );
        let gradients = [tensor(dstates, shape(&states)), tensor(dw, shape(&w))];
        recycle(states);
        (tensor(vec![context.finish(losses)], [1]), gradients)
    }

    fn nothing_of(y: X) -> X {
        recycle(y);
        tensor(vec![0.0], [1])
    }

    fn sum_kernel(x: X, y: X) -> X {
        let (x, y) = if x.is_unique() { (x, y) } else { (y, x) };
        let (mut sum, y) = (sole(x), in_order(y));
        kernels::adamw::add(sum.storage_mut(), slice(&y));
        recycle(y);
        sum
    }

    fn scaled_kernel(mut x: X, s: &X) -> X {
        let _clock = profile::backward(Operator::Head);
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
        let _clock = profile::forward(Operator::Embedding);
        let w = ordered(w);
        let [_, hidden] = dims(&w);
        let mut y = buffer(ids.len() * hidden);
        kernels::embedding::gather(&mut y, slice(&w), ids);
        tensor(y, [ids.len(), hidden])
    }

    fn embedding_gradient(w_shape: [usize; 2], ids: &[u32], dy: X) -> X {
        let _clock = profile::backward(Operator::Embedding);
        let mut dw = buffer(w_shape[0] * w_shape[1]);
        dw.fill(0.0);
        let dy = in_order(dy);
        kernels::embedding::scatter_add(&mut dw, slice(&dy), ids);
        recycle(dy);
        tensor(dw, w_shape)
    }
}
