//! What the inference engine computes with: linear layers over stored weights (f32, or bf16 widened on the fly) and attention of new tokens
//! against a key/value cache. Forward only.
//!
//! **Batch invariance**: a token's values are the same bits whether it comes alone or among others (see [`crate::arch::dot`]), so a request's tokens
//! depend neither on the batch nor on how its prompt is cut into chunks.
use crate::arch::dot::{self, Sizes, Strides, Weight};
use half::bf16;
use rayon::prelude::*;

/// Below this many multiply-adds a second thread costs more than it saves (waking one takes some microseconds).
const PARALLEL_WORK: usize = 1 << 19;

/// Weights that a core reads repeatedly during a prefill, in bytes: half a usual second-level cache.
const PANEL_BYTES: usize = 256 << 10;

/// Query rows whose scores are computed together in [`attention`].
const QUERY_BLOCK: usize = 8;

/// Weights of a linear layer, `[n, k]` row-major, as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum WeightsRef<'a> {
    /// 32-bit weights.
    F32(&'a [f32]),
    /// bfloat16 weights, widened to f32 as they are read; sums are f32.
    Bf16(&'a [bf16]),
}

impl WeightsRef<'_> {
    /// Number of weights.
    pub fn len(&self) -> usize {
        match self {
            WeightsRef::F32(w) => w.len(),
            WeightsRef::Bf16(w) => w.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])`. Parallel over `n` when the work is worth it; the bits of a token's row depend on neither `m` nor threads.
///
/// # Panics
/// If a slice does not fit the sizes.
pub fn linear(y: &mut [f32], x: &[f32], w: WeightsRef<'_>, bias: Option<&[f32]>, m: usize, n: usize, k: usize) {
    assert_eq!(y.len(), m * n, "linear: y is [{m}, {n}]");
    assert_eq!(x.len(), m * k, "linear: x is [{m}, {k}]");
    assert_eq!(w.len(), n * k, "linear: w is [{n}, {k}]");
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "linear: bias is [{n}]");
    }
    match w {
        WeightsRef::F32(w) => products(y, x, w, Sizes { m, n, k }),
        WeightsRef::Bf16(w) => products(y, x, w, Sizes { m, n, k }),
    }
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(n) {
            for (value, b) in row.iter_mut().zip(bias) {
                *value += b;
            }
        }
    }
}

fn products<W: Weight>(y: &mut [f32], x: &[f32], w: &[W], sizes: Sizes) {
    let Sizes { m, n, k } = sizes;
    let threads = rayon::current_num_threads();
    if threads == 1 || m * n * k < PARALLEL_WORK {
        return dot::panel(y, Strides { token: n, row: 1 }, x, w, sizes);
    }
    // A few pieces per thread, so that one that is held up leaves work to the others; whole register tiles in each.
    let rows = n.div_ceil(threads * 4).next_multiple_of(8);
    if m == 1 {
        y.par_chunks_mut(rows).zip(w.par_chunks(rows * k)).for_each(|(y, w)| {
            dot::panel(y, Strides { token: y.len(), row: 1 }, x, w, Sizes { m, n: y.len(), k });
        });
        return;
    }
    // With several tokens a piece of rows is read again for each few of them: keep it within the second-level cache.
    let rows = rows.min((PANEL_BYTES / (k * size_of::<W>()).max(1)).next_multiple_of(8));
    // Each piece of rows fills its own part of yᵀ: [n, m]; then y is that, turned.
    let mut turned = vec![0.0f32; m * n];
    turned.par_chunks_mut(rows * m).zip(w.par_chunks(rows * k)).for_each(|(piece, w)| {
        dot::panel(piece, Strides { token: 1, row: m }, x, w, Sizes { m, n: piece.len() / m, k });
    });
    for (row, values) in turned.chunks_exact(m).enumerate() {
        for (token, &value) in values.iter().enumerate() {
            y[token * n + row] = value;
        }
    }
}

/// Shape of [`attention`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads; query head h reads head `h / (q_heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions for which the cache has room.
    pub capacity: usize,
}

/// Causal attention of new tokens against the cache: `out`, `q`: `[t, q_heads·head_dim]`, the new token of row r standing at position `start + r`;
/// `k_cache`, `v_cache`: `[kv_heads, capacity, head_dim]`, filled up to and including position `start + t − 1`, rotary embedding already applied.
/// Scores are scaled by `1/√head_dim`; softmax in two passes, sums over positions in ascending order.
///
/// # Panics
/// If a slice does not fit the shape.
pub fn attention(out: &mut [f32], q: &[f32], k_cache: &[f32], v_cache: &[f32], start: usize, shape: CacheShape) {
    let CacheShape { q_heads, kv_heads, head_dim: d, capacity } = shape;
    assert!(kv_heads > 0 && q_heads.is_multiple_of(kv_heads), "attention: {q_heads} query heads over {kv_heads} key heads");
    let (width, group) = (q_heads * d, q_heads / kv_heads);
    assert!(width > 0 && q.len().is_multiple_of(width), "attention: q is [t, {width}]");
    assert_eq!(out.len(), q.len(), "attention: out is shaped like q");
    let tokens = q.len() / width;
    assert!(start + tokens <= capacity, "attention: position {} is beyond the cache's {capacity}", start + tokens);
    assert_eq!(k_cache.len(), kv_heads * capacity * d, "attention: keys are [{kv_heads}, {capacity}, {d}]");
    assert_eq!(v_cache.len(), k_cache.len(), "attention: values are shaped like keys");

    // One task = one key head and one block of query rows; its result is [rows, group, d].
    let blocks = tokens.div_ceil(QUERY_BLOCK);
    let task = |index: usize| {
        let (head, block) = (index / blocks, index % blocks);
        let first = block * QUERY_BLOCK;
        let rows = QUERY_BLOCK.min(tokens - first);
        let head_cache = head * capacity * d..(head + 1) * capacity * d;
        let mut q_block = Vec::with_capacity(rows * group * d);
        for row in first..first + rows {
            q_block.extend_from_slice(&q[row * width + head * group * d..][..group * d]);
        }
        attend_block(&q_block, &k_cache[head_cache.clone()], &v_cache[head_cache], start + first, rows, d)
    };
    let mut put = |index: usize, values: Vec<f32>| {
        let (head, first) = (index / blocks, index % blocks * QUERY_BLOCK);
        for (row, values) in values.chunks_exact(group * d).enumerate() {
            out[(first + row) * width + head * group * d..][..group * d].copy_from_slice(values);
        }
    };
    let work = q.len() * 2 * (start + tokens);
    if rayon::current_num_threads() == 1 || work < PARALLEL_WORK {
        (0..kv_heads * blocks).for_each(|index| put(index, task(index)));
    } else {
        let results: Vec<Vec<f32>> = (0..kv_heads * blocks).into_par_iter().map(task).collect();
        results.into_iter().enumerate().for_each(|(index, values)| put(index, values));
    }
}

/// One key head: `q: [rows·group, d]`, row r at position `start + r`, `keys` and `values`: `[≥ start + rows, d]`. Returns `[rows·group, d]`.
fn attend_block(q: &[f32], keys: &[f32], values: &[f32], start: usize, rows: usize, d: usize) -> Vec<f32> {
    let queries = q.len() / d;
    let group = queries / rows;
    let seen = start + rows;
    let mut scores = vec![0.0f32; queries * seen];
    dot::panel(&mut scores, Strides { token: seen, row: 1 }, q, &keys[..seen * d], Sizes { m: queries, n: seen, k: d });
    let scale = 1.0 / (d as f32).sqrt();
    for (query, row) in scores.chunks_exact_mut(seen).enumerate() {
        dot::softmax(&mut row[..start + query / group + 1], scale);
    }
    // All rows see positions 0..=start: summed together; what only later rows see follows row by row, in the same ascending order.
    let mut out = vec![0.0f32; queries * d];
    let shared = start + 1;
    dot::weighted_sum(&mut out, &scores, seen, &values[..shared * d], shared, d);
    for row in 1..rows {
        let own = row * group;
        dot::weighted_sum(
            &mut out[own * d..(own + group) * d],
            &scores[own * seen + shared..(own + group - 1) * seen + shared + row],
            seen,
            &values[shared * d..(shared + row) * d],
            row,
            d,
        );
    }
    out
}

/// The same operators as plain loops, with sums in f64: what the fast ones are tested against.
pub mod scalar {
    use super::{CacheShape, WeightsRef};

    /// Twin of [`super::linear`].
    pub fn linear(y: &mut [f32], x: &[f32], w: WeightsRef<'_>, bias: Option<&[f32]>, m: usize, n: usize, k: usize) {
        let weight = |i: usize| match w {
            WeightsRef::F32(w) => f64::from(w[i]),
            WeightsRef::Bf16(w) => w[i].to_f64(),
        };
        for token in 0..m {
            for row in 0..n {
                let sum: f64 = (0..k).map(|i| f64::from(x[token * k + i]) * weight(row * k + i)).sum();
                y[token * n + row] = (sum + bias.map_or(0.0, |b| f64::from(b[row]))) as f32;
            }
        }
    }

    /// Twin of [`super::attention`].
    pub fn attention(out: &mut [f32], q: &[f32], k_cache: &[f32], v_cache: &[f32], start: usize, shape: CacheShape) {
        let CacheShape { q_heads, kv_heads, head_dim: d, capacity } = shape;
        for token in 0..q.len() / (q_heads * d) {
            for q_head in 0..q_heads {
                let at = (token * q_heads + q_head) * d;
                let cache = |position: usize| (q_head / (q_heads / kv_heads) * capacity + position) * d;
                let scores: Vec<f64> = (0..=start + token)
                    .map(|p| (0..d).map(|i| f64::from(q[at + i]) * f64::from(k_cache[cache(p) + i])).sum::<f64>() / (d as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for i in 0..d {
                    let value: f64 = scores.iter().enumerate().map(|(p, s)| (s - max).exp() / sum * f64::from(v_cache[cache(p) + i])).sum();
                    out[at + i] = value as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// (5, 530, 257) is beyond `PARALLEL_WORK`, and so is (1, 4100, 130).
    #[test]
    fn linear_equals_its_twin_and_never_depends_on_the_batch() {
        for (m, n, k) in [(1, 3, 5), (4, 9, 40), (5, 530, 257), (1, 4100, 130)] {
            let (x, w, bias) = (values(m * k, 1), values(n * k, 2), values(n, 3));
            let half: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            for weights in [WeightsRef::F32(&w), WeightsRef::Bf16(&half)] {
                for bias in [None, Some(bias.as_slice())] {
                    let (mut fast, mut slow) = (vec![0.0; m * n], vec![0.0; m * n]);
                    linear(&mut fast, &x, weights, bias, m, n, k);
                    scalar::linear(&mut slow, &x, weights, bias, m, n, k);
                    for (f, s) in fast.iter().zip(&slow) {
                        assert!((f - s).abs() < 2e-5, "[{m}, {n}, {k}]: {f} for {s}");
                    }
                    for token in 0..m {
                        let mut alone = vec![0.0; n];
                        linear(&mut alone, &x[token * k..(token + 1) * k], weights, bias, 1, n, k);
                        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(&alone), bits(&fast[token * n..(token + 1) * n]), "[{m}, {n}, {k}] token {token}");
                    }
                }
            }
        }
    }

    #[test]
    fn attention_equals_its_twin_and_never_depends_on_the_chunking() {
        for (q_heads, kv_heads, head_dim, tokens, capacity) in
            [(1, 1, 4, 3, 3), (4, 2, 16, 21, 32), (3, 1, 6, 9, 12), (6, 6, 64, 17, 20), (8, 2, 96, 60, 64)]
        {
            let shape = CacheShape { q_heads, kv_heads, head_dim, capacity };
            let q: Vec<f32> = values(tokens * q_heads * head_dim, 1).iter().map(|v| v * 4.0).collect();
            let (k, v) = (values(kv_heads * capacity * head_dim, 2), values(kv_heads * capacity * head_dim, 3));
            let (mut fast, mut slow) = (vec![0.0; q.len()], vec![0.0; q.len()]);
            attention(&mut fast, &q, &k, &v, 0, shape);
            scalar::attention(&mut slow, &q, &k, &v, 0, shape);
            for (f, s) in fast.iter().zip(&slow) {
                assert!((f - s).abs() < 3e-6, "{shape:?}: {f} for {s}");
            }
            let width = q_heads * head_dim;
            for chunk in [1, 2, 5, 8, 13] {
                let mut chunked = vec![0.0; q.len()];
                for first in (0..tokens).step_by(chunk) {
                    let range = first * width..(first + chunk).min(tokens) * width;
                    attention(&mut chunked[range.clone()], &q[range], &k, &v, first, shape);
                }
                assert_eq!(chunked, fast, "{shape:?} in chunks of {chunk}");
            }
        }
    }
}
