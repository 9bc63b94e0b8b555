//! The operators in Burn's own tensor operations: slow, differentiable by Burn, and the oracle of the fused ones.
use std::sync::Arc;

use super::{AttentionContext, ExpertsContext, LossContext};
use crate::batch::IGNORE;
use burn::{
    prelude::*,
    tensor::{TensorData, activation},
};
use ernie_kernels::density::LEAST;

/// `x · wᵀ`.
pub fn linear(x_ti: Tensor<2>, w_oi: Tensor<2>) -> Tensor<2> {
    x_ti.matmul(w_oi.transpose())
}

/// `x / √(mean(x²) + eps) · w`.
pub fn rms_norm(x_th: Tensor<2>, w_h: Tensor<1>, eps: f64) -> Tensor<2> {
    let mean_square_t1 = x_th.clone().square().mean_dim(1);
    x_th / (mean_square_t1 + eps).sqrt() * w_h.unsqueeze::<2>()
}

/// `silu(gate) ⊙ up`.
pub fn swiglu(gate_ti: Tensor<2>, up_ti: Tensor<2>) -> Tensor<2> {
    activation::silu(gate_ti) * up_ti
}

/// `rms_norm(x)·wᵀ`, layer beside layer.
pub fn norm_linear<const N: usize>(x_th: Tensor<2>, norm_h: Tensor<1>, eps: f64, layers: [Tensor<2>; N]) -> Tensor<2> {
    let z_th = rms_norm(x_th, norm_h, eps);
    Tensor::cat(layers.into_iter().map(|w| linear(z_th.clone(), w)).collect(), 1)
}

/// `residual + x·wᵀ`.
pub fn linear_add(residual_to: Tensor<2>, x_ti: Tensor<2>, w_oi: Tensor<2>) -> Tensor<2> {
    residual_to + linear(x_ti, w_oi)
}

/// `residual + (silu(gate) ⊙ up)·wᵀ`.
pub fn swiglu_linear_add(residual_th: Tensor<2>, gate_up: Tensor<2>, w_hi: Tensor<2>) -> Tensor<2> {
    let i = w_hi.dims()[1];
    residual_th + linear(swiglu(gate_up.clone().narrow(1, 0, i), gate_up.narrow(1, i, i)), w_hi)
}

/// Rotary positions and causal attention, one document at a time with its full score matrix.
pub fn rope_attention(qkv: Tensor<2>, context: &AttentionContext) -> Tensor<2> {
    let (n_q, n_kv, d) = (context.shape.q_heads, context.shape.kv_heads, context.shape.head_dim);
    let q = qkv.clone().narrow(1, 0, n_q * d);
    let k = qkv.clone().narrow(1, n_q * d, n_kv * d);
    let v = qkv.narrow(1, (n_q + n_kv) * d, n_kv * d);
    let documents = context.cu_seqlens.windows(2).filter(|bounds| bounds[1] > bounds[0]).map(|bounds| {
        let (start, length) = (bounds[0] as usize, (bounds[1] - bounds[0]) as usize);
        let heads = |x: &Tensor<2>, n: usize| -> Tensor<3> { x.clone().narrow(0, start, length).reshape([length, n, d]).swap_dims(0, 1) };
        let q_nld = rope(heads(&q, n_q), context);
        let k_nld = repeat_heads(rope(heads(&k, n_kv), context), n_q / n_kv);
        let v_nld = repeat_heads(heads(&v, n_kv), n_q / n_kv);
        let scores_nll = q_nld.matmul(k_nld.swap_dims(1, 2)) / (d as f64).sqrt();
        let window = context.window.unwrap_or(length);
        let hidden = (0..length * length).map(|i| i % length > i / length || i / length - i % length >= window).collect::<Vec<_>>();
        let hidden = Tensor::<2, Bool>::from_data(TensorData::new(hidden, [length, length]), &q.device());
        let p_nll = activation::softmax(scores_nll.mask_fill(hidden.unsqueeze::<3>(), f32::NEG_INFINITY), 2);
        p_nll.matmul(v_nld).swap_dims(0, 1).reshape([length, n_q * d])
    });
    Tensor::cat(documents.collect(), 0)
}

/// Attention inside paragraphs and to summaries of those before, one document at a time with the full score matrix of its tokens and all its summaries.
pub fn paragraph_attention(qkv: Tensor<2>, pool: Tensor<2>, context: &AttentionContext) -> Tensor<2> {
    let (n_q, n_kv, d) = (context.shape.q_heads, context.shape.kv_heads, context.shape.head_dim);
    let device = qkv.device();
    let scale = 1.0 / (d as f64).sqrt();
    let documents = context.cu_seqlens.windows(2).filter(|bounds| bounds[1] > bounds[0]).map(|document| {
        let (start, length) = (document[0] as usize, (document[1] - document[0]) as usize);
        let inside = |&&bound: &&u32| bound > document[0] && bound <= document[1];
        let ends: Vec<usize> = context.paragraphs.iter().filter(inside).map(|&bound| bound as usize - start).collect();
        let paragraph_of = |row: usize| ends.iter().filter(|&&end| end <= row).count();
        let heads = |first: usize, n: usize| -> Tensor<3> {
            qkv.clone().slice([start..start + length, first * d..(first + n) * d]).reshape([length, n, d]).swap_dims(0, 1)
        };
        let (q_nld, k_nld, v_nld) = (rope(heads(0, n_q), context), heads(n_q, n_kv), heads(n_q + n_kv, n_kv));
        let mask = |hidden: Vec<bool>, columns: usize| -> Tensor<3, Bool> {
            let rows = hidden.len() / columns;
            Tensor::<2, Bool>::from_data(TensorData::new(hidden, [rows, columns]), &device).unsqueeze::<3>()
        };
        // Each paragraph's weights over all tokens of the document, 0 for those of others: `[n_kv, p, length]`.
        let others = (0..ends.len() * length).map(|i| paragraph_of(i % length) != i / length).collect();
        let logits_nl = (k_nld.clone() * pool.clone().reshape([n_kv, 1, d])).sum_dim(2).swap_dims(1, 2) * scale;
        let weights_npl = activation::softmax(logits_nl.repeat_dim(1, ends.len()).mask_fill(mask(others, length), f32::NEG_INFINITY), 2);
        let last: Vec<usize> = ends.iter().map(|end| end - 1).collect();
        let pooled_k = rope_at(weights_npl.clone().matmul(k_nld.clone()), &last, context);
        let k_nsd = Tensor::cat(vec![rope(k_nld, context), pooled_k], 1);
        let v_nsd = Tensor::cat(vec![v_nld.clone(), weights_npl.matmul(v_nld)], 1);
        let (k_nsd, v_nsd) = (repeat_heads(k_nsd, n_q / n_kv), repeat_heads(v_nsd, n_q / n_kv));
        let columns = length + ends.len();
        let hides = |row: usize, column: usize| match column.checked_sub(length) {
            None => column > row || paragraph_of(column) != paragraph_of(row),
            Some(paragraph) => paragraph >= paragraph_of(row),
        };
        let hidden = (0..length * columns).map(|i| hides(i / columns, i % columns)).collect();
        let scores_nls = q_nld.matmul(k_nsd.swap_dims(1, 2)) * scale;
        let p_nls = activation::softmax(scores_nls.mask_fill(mask(hidden, columns), f32::NEG_INFINITY), 2);
        p_nls.matmul(v_nsd).swap_dims(0, 1).reshape([length, n_q * d])
    });
    Tensor::cat(documents.collect(), 0)
}

/// Rotates the pairs (2j, 2j+1) of `x_nld` by its position times θ^(−2j/d).
fn rope(x_nld: Tensor<3>, context: &AttentionContext) -> Tensor<3> {
    let positions: Vec<usize> = (0..x_nld.dims()[1]).collect();
    rope_at(x_nld, &positions, context)
}

/// The same for rows at these positions.
fn rope_at(x_nld: Tensor<3>, positions: &[usize], context: &AttentionContext) -> Tensor<3> {
    let [n, length, d] = x_nld.dims();
    let table = |values: &[f32]| -> Tensor<3> {
        let rows = positions.iter().flat_map(|&position| values[position * d / 2..(position + 1) * d / 2].to_vec()).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(rows, [1, length, d / 2]), &x_nld.device())
    };
    let (cos, sin) = (table(&context.rope.cos), table(&context.rope.sin));
    let pairs: Tensor<4> = x_nld.clone().reshape([n, length, d / 2, 2]);
    let part = |index: usize| -> Tensor<3> { pairs.clone().narrow(3, index, 1).reshape([n, length, d / 2]) };
    let (even, odd) = (part(0), part(1));
    let rotated_even = even.clone() * cos.clone() - odd.clone() * sin.clone();
    let rotated_odd = odd * cos + even * sin;
    Tensor::<3>::stack::<4>(vec![rotated_even, rotated_odd], 3).reshape([n, length, d])
}

/// `1 − cos(x_t, Σ_s decay^(t−s)·x_s)` over the rows s up to t of a document, `[t, 1]`; 1 where either has no length to speak of.
pub fn semantic_density(x_th: Tensor<2>, decay_1: Tensor<1>, cu_seqlens: &Arc<[u32]>) -> Tensor<2> {
    let device = x_th.device();
    let documents = cu_seqlens.windows(2).filter(|bounds| bounds[1] > bounds[0]).map(|bounds| {
        let (start, length) = (bounds[0] as usize, (bounds[1] - bounds[0]) as usize);
        let x_th = x_th.clone().narrow(0, start, length);
        // 0 for the rows after t: a power of the decay that overflowed would leave no gradient, masked or not.
        let back = (0..length * length).map(|i| (i / length).saturating_sub(i % length) as f32).collect::<Vec<_>>();
        let after = (0..length * length).map(|i| i % length > i / length).collect::<Vec<_>>();
        let back_tt = Tensor::<2>::from_data(TensorData::new(back, [length, length]), &device);
        let after_tt = Tensor::<2, Bool>::from_data(TensorData::new(after, [length, length]), &device);
        let weights_tt = (back_tt * decay_1.clone().log().unsqueeze::<2>()).exp().mask_fill(after_tt, 0.0);
        let m_th = weights_tt.matmul(x_th.clone());
        let dot_t1 = (x_th.clone() * m_th.clone()).sum_dim(1);
        let squares_t1 = x_th.square().sum_dim(1) * m_th.square().sum_dim(1);
        let nothing_t1 = squares_t1.clone().lower_equal_elem(LEAST);
        let cosine_t1 = (dot_t1 / squares_t1.mask_fill(nothing_t1.clone(), 1.0).sqrt()).mask_fill(nothing_t1, 0.0);
        cosine_t1.neg() + 1.0
    });
    Tensor::cat(documents.collect(), 0)
}

/// Heads times their gates, or nothing; straight through for the gates' gradient.
pub fn gate_heads(heads: Tensor<2>, logits_tn: Tensor<2>, threshold: f64) -> Tensor<2> {
    let ([t, width], [_, n]) = (heads.dims(), logits_tn.dims());
    let gates_tn = activation::sigmoid(logits_tn);
    let shut_tn = gates_tn.clone().lower_elem(threshold);
    let open_tn = gates_tn.clone().detach().mask_fill(shut_tn, 0.0);
    let straight_tn = gates_tn.clone() - gates_tn.detach() + open_tn;
    let heads: Tensor<3> = heads.reshape([t, n, width / n]);
    (heads * straight_tn.reshape([t, n, 1])).reshape([t, width])
}

/// Each head `times` times, one after another.
fn repeat_heads(x_nld: Tensor<3>, times: usize) -> Tensor<3> {
    let [n, length, d] = x_nld.dims();
    x_nld.unsqueeze_dim::<4>(1).repeat_dim(1, times).reshape([n * times, length, d])
}

/// x and every expert on every token's normed x, weighted by what routing gave it: exact, and wasteful.
pub fn norm_experts_add(
    x_th: Tensor<2>,
    norm_h: Tensor<1>,
    eps: f64,
    [gate, up, down]: [Tensor<3>; 3],
    weights_tk: Tensor<2>,
    context: &ExpertsContext,
) -> Tensor<2> {
    let [experts, intermediate, hidden] = gate.dims();
    let [tokens, _] = x_th.dims();
    let device = x_th.device();
    let (mut y_th, z_th) = (x_th.clone(), rms_norm(x_th, norm_h, eps));
    for expert in 0..experts {
        let chosen = context.indices.iter().map(|&index| f32::from(index as usize == expert)).collect::<Vec<_>>();
        let chosen_tk = Tensor::<2>::from_data(TensorData::new(chosen, [tokens, context.top_k]), &device);
        let weight_t1 = (weights_tk.clone() * chosen_tk).sum_dim(1);
        let matrix =
            |stack: &Tensor<3>, rows: usize, columns: usize| -> Tensor<2> { stack.clone().narrow(0, expert, 1).reshape([rows, columns]) };
        let inner =
            swiglu(linear(z_th.clone(), matrix(&gate, intermediate, hidden)), linear(z_th.clone(), matrix(&up, intermediate, hidden)));
        y_th = y_th + linear(inner, matrix(&down, hidden, intermediate)) * weight_t1;
    }
    y_th
}

/// Mean cross-entropy `[1]` of logits `[t, v]` over the scored targets, each with its factor.
pub fn cross_entropy(logits_tv: Tensor<2>, context: &LossContext) -> Tensor<1> {
    let (device, targets) = (logits_tv.device(), &context.targets);
    let scored = targets.iter().filter(|&&target| target != IGNORE).count().max(1);
    let index = targets.iter().map(|&target| target.max(0) as i64).collect::<Vec<_>>();
    let index_t1 = Tensor::<2, Int>::from_data(TensorData::new(index, [targets.len(), 1]), &device);
    let mask = targets.iter().map(|&target| f32::from(target != IGNORE)).collect::<Vec<_>>();
    let mask_t1 = Tensor::<2>::from_data(TensorData::new(mask, [targets.len(), 1]), &device);
    let log_p_t1 = activation::log_softmax(logits_tv, 1).gather(1, index_t1);
    let losses_t1 = (log_p_t1 * mask_t1).neg();
    let _ = context.token_losses.set(super::host_f32(&losses_t1));
    let weighted_t1 = match &context.weights {
        None => losses_t1,
        Some(weights) => losses_t1 * Tensor::from_data(TensorData::new(weights.to_vec(), [targets.len(), 1]), &device),
    };
    weighted_t1.sum() / scored as f64
}

/// A number whose gradient with respect to y is dy.
pub fn with_gradient(y_th: Tensor<2>, dy_th: Tensor<2>) -> Tensor<1> {
    (y_th * dy_th).sum()
}

/// Rows `ids` of `w_vh`.
pub fn embedding(w_vh: Tensor<2>, ids: &Arc<[u32]>) -> Tensor<2> {
    let index = ids.iter().map(|&id| id as i64).collect::<Vec<_>>();
    let index_t = Tensor::<1, Int>::from_data(TensorData::new(index, [ids.len()]), &w_vh.device());
    w_vh.select(0, index_t)
}
