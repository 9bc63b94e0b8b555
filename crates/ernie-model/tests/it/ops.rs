//! Every fused operator against its twin in Burn's own operations: values and all gradients.
use std::sync::Arc;

use burn::{
    prelude::*,
    tensor::{Distribution, TensorData, activation},
};
use ernie_kernels::{attention::Shape, rope::RopeTable};
use ernie_model::{
    batch::IGNORE,
    ops::{self, AttentionContext, ExpertsContext, LossContext, Precision, plain},
};

fn device() -> Device {
    let device = ernie_model::training_device();
    device.seed(7);
    device
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device()).require_grad()
}

/// ‖a − b‖ / ‖b‖ of two tensors' values.
fn relative(a: Vec<f32>, b: Vec<f32>) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(&b).map(|(a, b)| (a - b) as f64));
    difference / norm(&mut b.iter().map(|&b| b as f64)).max(1e-12)
}

/// Asserts that two ways to compute one tensor agree, in value and in the gradients of `Σ y·c` for a fixed random c.
fn agree<const D: usize>(name: &str, fused: Tensor<D>, plain: Tensor<D>, matrices: &[&Tensor<2>], stacks: &[&Tensor<3>]) {
    let shape = plain.shape();
    assert_eq!(fused.shape(), shape, "{name}");
    assert!(relative(ops::host_f32(&fused), ops::host_f32(&plain)) < 2e-6, "{name}: values");
    let c: Tensor<D> = Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device());
    let (a, b) = (ops::backward((fused * c.clone()).sum()), (plain * c).sum().backward());
    for (index, x) in matrices.iter().enumerate() {
        let error = relative(ops::host_f32(&x.grad(&a).unwrap()), ops::host_f32(&x.grad(&b).unwrap()));
        assert!(error < 5e-6, "{name}: gradient {index} differs by {error:e}");
    }
    for (index, x) in stacks.iter().enumerate() {
        let error = relative(ops::host_f32(&x.grad(&a).unwrap()), ops::host_f32(&x.grad(&b).unwrap()));
        assert!(error < 5e-6, "{name}: gradient of stack {index} differs by {error:e}");
    }
}

#[test]
fn linear_and_norm() {
    let (x, w) = (random([37, 24]), random([19, 24]));
    agree("linear", ops::linear(x.clone(), w.clone()), plain::linear(x.clone(), w.clone()), &[&x, &w], &[]);
    let weight: Tensor<2> = random([1, 24]);
    let norm = |f: fn(Tensor<2>, Tensor<1>, f64) -> Tensor<2>| f(x.clone(), weight.clone().reshape([24]), 1e-5);
    agree("rms_norm", norm(ops::rms_norm), norm(plain::rms_norm), &[&x, &weight], &[]);
}

#[test]
fn attention_over_packed_documents_and_grouped_heads() {
    for (q_heads, kv_heads, head_dim, cu_seqlens) in
        [(4, 4, 8, vec![0, 33]), (6, 2, 6, vec![0, 1, 17, 18, 40]), (3, 1, 10, vec![0, 150, 300])]
    {
        let tokens = *cu_seqlens.last().unwrap() as usize;
        let context = AttentionContext {
            shape: Shape { q_heads, kv_heads, head_dim },
            cu_seqlens: cu_seqlens.into(),
            window: None,
            paragraphs: [0].into(),
            rope: Arc::new(RopeTable::new(500_000.0, head_dim, tokens)),
        };
        let qkv = random([tokens, (q_heads + 2 * kv_heads) * head_dim]);
        for window in [None, Some(20)] {
            let context = AttentionContext { window, ..context.clone() };
            let run = |f: fn(Tensor<2>, &AttentionContext) -> Tensor<2>| f(qkv.clone(), &context);
            agree("attention", run(ops::rope_attention), run(plain::rope_attention), &[&qkv], &[]);
        }
    }
}

#[test]
fn attention_inside_paragraphs_and_to_their_summaries() {
    let texts: [(&[u32], &[u32]); 3] =
        [(&[0, 33], &[0, 33]), (&[0, 1, 17, 18, 70], &[0, 1, 9, 17, 18, 40, 41, 65, 70]), (&[0, 120, 200], &[0, 35, 90, 120, 150, 200])];
    for ((q_heads, kv_heads, head_dim), (cu_seqlens, paragraphs)) in [(4, 4, 8), (6, 2, 6), (3, 1, 10)].into_iter().zip(texts) {
        let tokens = *cu_seqlens.last().unwrap() as usize;
        let context = AttentionContext {
            shape: Shape { q_heads, kv_heads, head_dim },
            cu_seqlens: cu_seqlens.into(),
            window: None,
            paragraphs: paragraphs.into(),
            rope: Arc::new(RopeTable::new(500_000.0, head_dim, tokens)),
        };
        let (qkv, pool) = (random([tokens, (q_heads + 2 * kv_heads) * head_dim]), random([kv_heads, head_dim]));
        // Where no document has a second paragraph nothing reaches the pooling vectors.
        let inputs = if paragraphs == cu_seqlens { vec![&qkv] } else { vec![&qkv, &pool] };
        let run = |f: fn(Tensor<2>, Tensor<2>, &AttentionContext) -> Tensor<2>| f(qkv.clone(), pool.clone(), &context);
        agree("paragraphs", run(ops::paragraph_attention), run(plain::paragraph_attention), &inputs, &[]);
    }
}

#[test]
fn layers_behind_a_norm_and_before_a_residual() {
    let (x, norm, residual) = (random([37, 24]), random([1, 24]), random([37, 19]));
    let (a, b, c) = (random([19, 24]), random([9, 24]), random([30, 24]));
    let norm_h = || norm.clone().reshape([24]);
    let layers = || [a.clone(), b.clone(), c.clone()];
    let fused = ops::norm_linear(x.clone(), norm_h(), 1e-5, layers(), Precision::F32);
    agree("three layers", fused, plain::norm_linear(x.clone(), norm_h(), 1e-5, layers()), &[&x, &norm, &a, &b, &c], &[]);
    let fused = ops::norm_linear(x.clone(), norm_h(), 1e-5, [b.clone()], Precision::F32);
    agree("one layer", fused, plain::norm_linear(x.clone(), norm_h(), 1e-5, [b.clone()]), &[&x, &norm, &b], &[]);
    let layers = || [a.clone(), b.clone()];
    let fused = ops::norm_linear(x.clone(), norm_h(), 1e-5, layers(), Precision::F32);
    agree("two layers", fused, plain::norm_linear(x.clone(), norm_h(), 1e-5, layers()), &[&x, &norm, &a, &b], &[]);
    let fused = ops::linear_add(residual.clone(), x.clone(), a.clone(), Precision::F32);
    agree("linear_add", fused, plain::linear_add(residual.clone(), x.clone(), a.clone()), &[&residual, &x, &a], &[]);
    let (gate_up, w) = (random([37, 28]), random([19, 14]));
    let fused = ops::swiglu_linear_add(residual.clone(), gate_up.clone(), w.clone(), Precision::F32);
    let plain = plain::swiglu_linear_add(residual.clone(), gate_up.clone(), w.clone());
    agree("swiglu_linear_add", fused, plain, &[&residual, &gate_up, &w], &[]);
}

#[test]
fn routed_experts_with_idle_and_busy_ones() {
    let (tokens, hidden, intermediate, experts, top_k) = (29, 12, 10, 5, 2);
    // Expert 4 is never chosen; expert 0 by every token.
    let indices = (0..tokens).flat_map(|t| [0, 1 + (t % 3) as u32]).collect::<Vec<u32>>();
    let context = ExpertsContext { indices: indices.into(), top_k, precision: Precision::F32 };
    let (x, norm, weights) = (random([tokens, hidden]), random([1, hidden]), random([tokens, top_k]));
    let stacks =
        [random([experts, intermediate, hidden]), random([experts, intermediate, hidden]), random([experts, hidden, intermediate])];
    let run = |f: fn(Tensor<2>, Tensor<1>, f64, [Tensor<3>; 3], Tensor<2>, &ExpertsContext) -> Tensor<2>| {
        f(x.clone(), norm.clone().reshape([hidden]), 1e-5, stacks.clone(), weights.clone(), &context)
    };
    let (fused, plain) = (run(ops::norm_experts_add), run(plain::norm_experts_add));
    agree("experts", fused, plain, &[&x, &norm, &weights], &[&stacks[0], &stacks[1], &stacks[2]]);
}

#[test]
fn a_backward_pass_goes_on_from_a_gradient() {
    let (x, dy) = (random([9, 7]), random([9, 7]).detach());
    for factor in [1.0, 0.5] {
        let gradient = |f: fn(Tensor<2>, Tensor<2>) -> Tensor<1>| {
            // Two ways to x, so that gradients meet on the way.
            let y = x.clone() * 3.0;
            let w = ops::linear(y.clone(), Tensor::eye(7, &device()).require_grad());
            let loss = ops::linear_add(y, w, Tensor::eye(7, &device()), Precision::F32);
            ops::host_f32(&x.grad(&ops::backward(f(loss, dy.clone()) * factor)).unwrap())
        };
        let (fused, plain) = (gradient(ops::with_gradient), gradient(plain::with_gradient));
        assert_eq!(fused, plain);
        let expected = ops::host_f32(&(dy.clone() * 6.0 * factor));
        assert!(relative(fused, expected) < 1e-6);
    }
}

#[test]
fn head_and_cross_entropy_with_ignored_targets() {
    let (tokens, hidden, vocab) = (700, 16, 53);
    let targets = (0..tokens).map(|t| if t % 7 == 0 { IGNORE } else { (t * 31 % vocab) as i32 }).collect::<Vec<_>>();
    let targets: Arc<[i32]> = targets.into();
    let (h, w) = (random([tokens, hidden]), random([vocab, hidden]));
    let weights: Arc<[f32]> = (0..tokens).map(|t| 0.5 + (t % 5) as f32).collect();
    for weights in [None, Some(weights)] {
        let context = || LossContext { weights: weights.clone(), ..LossContext::new(&targets, Precision::F32) };
        let [ours, reference, off_tape] = [context(), context(), context()];
        let fused = ops::head_cross_entropy(h.clone(), w.clone(), &ours);
        let plain = plain::cross_entropy(plain::linear(h.clone(), w.clone()), &reference);
        agree("cross entropy", fused.clone(), plain, &[&h, &w], &[]);
        // Off the tape the loss alone is computed, by other code.
        let untracked = ops::head_cross_entropy(h.clone().inner(), w.clone().inner(), &off_tape);
        assert!((ops::scalar(&untracked) - ops::scalar(&fused)).abs() < 1e-6);
        let losses = [&ours, &reference, &off_tape].map(|context| context.token_losses.get().unwrap());
        assert!(losses.iter().all(|losses| losses.len() == tokens && losses[0] == 0.0 && losses[1] > 0.0));
        assert!(losses[0].iter().zip(losses[1]).zip(losses[2]).all(|((a, b), c)| (a - b).abs() < 1e-5 && (a - c).abs() < 1e-5));
    }
}

#[test]
fn density_of_several_documents() {
    let cu_seqlens: Arc<[u32]> = [0, 1, 12, 12, 40].into();
    let (x, logit) = (random([40, 10]), random([1]));
    let decay = || activation::sigmoid(logit.clone());
    let fused = ops::semantic_density(x.clone(), decay(), &cu_seqlens);
    agree("density", fused, plain::semantic_density(x.clone(), decay(), &cu_seqlens), &[&x], &[]);
    let gradient = |y: Tensor<2>| ops::host_f32(&logit.grad(&(y.clone() * y).sum().backward()).unwrap())[0];
    let fused = gradient(ops::semantic_density(x.clone(), decay(), &cu_seqlens));
    let plain = gradient(plain::semantic_density(x.clone(), decay(), &cu_seqlens));
    assert!((fused - plain).abs() < 1e-4 * plain.abs().max(1e-2), "{fused} for {plain}");
}

#[test]
fn density_of_rows_of_zeros() {
    // At the beginning of a document, where the moving sum is nothing too, and inside one.
    let cu_seqlens: Arc<[u32]> = [0, 1, 5, 12].into();
    let zeros = [0, 1, 2, 8, 11];
    let mut values = ops::host_f32(&random([12, 6]));
    zeros.iter().for_each(|row| values[row * 6..][..6].fill(0.0));
    let (x, logit) = (Tensor::<2>::from_data(TensorData::new(values, [12, 6]), &device()).require_grad(), random([1]));
    let run = |f: fn(Tensor<2>, Tensor<1>, &Arc<[u32]>) -> Tensor<2>| f(x.clone(), activation::sigmoid(logit.clone()), &cu_seqlens);
    let density = ops::host_f32(&run(plain::semantic_density));
    assert!(zeros.iter().all(|&row| density[row] == 1.0) && density.iter().all(|d| d.is_finite()), "{density:?}");
    agree("density of zeros", run(ops::semantic_density), run(plain::semantic_density), &[&x], &[]);
    let gradient = |y: Tensor<2>| ops::host_f32(&logit.grad(&y.sum().backward()).unwrap())[0];
    let (fused, plain) = (gradient(run(ops::semantic_density)), gradient(run(plain::semantic_density)));
    assert!((fused - plain).abs() < 1e-5, "{fused} for {plain}");
}

#[test]
fn density_of_a_text_whose_decay_to_the_power_of_its_length_is_beyond_f32() {
    // 0.5⁻¹³⁰, of the tokens that come after.
    let cu_seqlens: Arc<[u32]> = [0, 130].into();
    let (x, decay) = (random([130, 6]), Tensor::<1>::from_data([0.5f32], &device()).require_grad());
    let run = |f: fn(Tensor<2>, Tensor<1>, &Arc<[u32]>) -> Tensor<2>| f(x.clone(), decay.clone(), &cu_seqlens);
    agree("density of a long text", run(ops::semantic_density), run(plain::semantic_density), &[&x], &[]);
    let gradient = |y: Tensor<2>| ops::host_f32(&decay.grad(&y.square().sum().backward()).unwrap())[0];
    let (fused, plain) = (gradient(run(ops::semantic_density)), gradient(run(plain::semantic_density)));
    assert!((fused - plain).abs() < 1e-4 * plain.abs().max(1e-2), "{fused} for {plain}");
}

#[test]
fn gates_over_heads() {
    let (heads, logits) = (random([70, 3 * 8]), random([70, 3]));
    let run = |f: fn(Tensor<2>, Tensor<2>, f64) -> Tensor<2>| f(heads.clone(), logits.clone(), 0.4);
    agree("gates", run(ops::gate_heads), run(plain::gate_heads), &[&heads, &logits], &[]);
}

#[test]
fn embedding_gathers_and_scatters() {
    let w = random([11, 6]);
    let ids: Arc<[u32]> = [3, 3, 0, 10, 3].into();
    agree("embedding", ops::embedding(w.clone(), &ids), plain::embedding(w.clone(), &ids), &[&w], &[]);
}

#[test]
fn a_broadcast_gradient_reaches_the_kernels_in_order() {
    // The gradient of a sum is one value, broadcast: it must not reach a kernel as a strided view.
    let (x, w) = (random([9, 8]), random([5, 8]));
    let gradients = ops::linear(x.clone(), w.clone()).sum().backward();
    let expected = ops::host_f32(&x.clone().inner().sum_dim(0)).repeat(5);
    assert!(relative(ops::host_f32(&w.grad(&gradients).unwrap()), expected) < 1e-6);
}
