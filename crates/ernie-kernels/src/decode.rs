//! What the inference engine computes with: linear layers over stored weights (f32, or bf16 widened on the fly) and attention of new tokens
//! against a key/value cache. Forward only.
//!
//! **Batch invariance**: a token's values are the same bits whether it comes alone or among others (see [`crate::arch::dot`]), so a request's tokens
//! depend neither on the batch nor on how its prompt is cut into chunks.
use half::bf16;
use rayon::prelude::*;

use crate::arch::dot::{self, Sizes, Strides, Weight};
use crate::arch::exp::exp;
use crate::arch::isa::{LANES, mul_add, simd_fn};
use crate::scratch::Scratch;

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
    let mut turned = Scratch::take(m * n);
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
        softmax(&mut row[..start + query / group + 1], scale);
    }
    // All rows see positions 0..=start: summed together; what only later rows see follows row by row, in the same ascending order.
    let mut out = vec![0.0f32; queries * d];
    let shared = start + 1;
    weighted_sum(&mut out, &scores, seen, &values[..shared * d], shared, d);
    for row in 1..rows {
        let own = row * group;
        weighted_sum(
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

simd_fn! {
    /// Softmax of `scale · s` in place over one row: the maximum first, then exponentials and their sum, in lanes of fixed number.
    fn softmax<FMA>(s: &mut [f32], scale: f32) {
        let blocks = s.len() / LANES * LANES;
        let mut maxima = [f32::NEG_INFINITY; LANES];
        for block in s[..blocks].chunks_exact(LANES) {
            for lane in 0..LANES {
                maxima[lane] = if block[lane] > maxima[lane] { block[lane] } else { maxima[lane] };
            }
        }
        let max = maxima.iter().chain(&s[blocks..]).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sums = [0.0f32; LANES];
        for block in s[..blocks].chunks_exact_mut(LANES) {
            for lane in 0..LANES {
                block[lane] = exp::<FMA>((block[lane] - max) * scale);
                sums[lane] += block[lane];
            }
        }
        for (lane, value) in s[blocks..].iter_mut().enumerate() {
            *value = exp::<FMA>((*value - max) * scale);
            sums[lane] += *value;
        }
        let inverse = 1.0 / sums.iter().sum::<f32>();
        for value in s {
            *value *= inverse;
        }
    }
}

simd_fn! {
    /// `out[j, :] += Σ_p weights[j, p] · rows[p, :]`, p ascending, one accumulator for each value: `out: [m, d]`, the rows of `weights`
    /// `weight_stride` apart, `rows: [n, d]`.
    fn weighted_sum<FMA>(out: &mut [f32], weights: &[f32], weight_stride: usize, rows: &[f32], n: usize, d: usize) {
        /// Columns that stay in registers while the rows go by.
        const COLUMNS: usize = 64;
        for (j, out) in out.chunks_exact_mut(d).enumerate() {
            let weights = &weights[j * weight_stride..][..n];
            let mut start = 0;
            while start + COLUMNS <= d {
                let out: &mut [f32; COLUMNS] = (&mut out[start..start + COLUMNS]).try_into().expect("COLUMNS of them");
                let mut sums = *out;
                for (&weight, row) in weights.iter().zip(rows.chunks_exact(d)) {
                    let row: &[f32; COLUMNS] = row[start..start + COLUMNS].try_into().expect("COLUMNS of them");
                    for i in 0..COLUMNS {
                        sums[i] = mul_add::<FMA>(weight, row[i], sums[i]);
                    }
                }
                *out = sums;
                start += COLUMNS;
            }
            if start < d {
                for (&weight, row) in weights.iter().zip(rows.chunks_exact(d)) {
                    for (o, &value) in out[start..].iter_mut().zip(&row[start..]) {
                        *o = mul_add::<FMA>(weight, value, *o);
                    }
                }
            }
        }
    }
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
    use crate::testing::Random;

    /// (5, 530, 257) is beyond `PARALLEL_WORK`, and so is (1, 4100, 130).
    #[test]
    fn linear_equals_its_twin_and_never_depends_on_the_batch() {
        for (m, n, k) in [(1, 3, 5), (4, 9, 40), (5, 530, 257), (1, 4100, 130)] {
            let (x, w, bias) = (Random::new(1).vec(m * k, 1.0), Random::new(2).vec(n * k, 1.0), Random::new(3).vec(n, 1.0));
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
            let q = Random::new(1).vec(tokens * q_heads * head_dim, 4.0);
            let (k, v) = (Random::new(2).vec(kv_heads * capacity * head_dim, 1.0), Random::new(3).vec(kv_heads * capacity * head_dim, 1.0));
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

    #[test]
    fn softmax_equals_the_exact_one() {
        for len in [1, 2, 31, 32, 33, 100] {
            let scores = Random::new(4).vec(len, 60.0);
            let mut got = scores.clone();
            softmax(&mut got, 0.7);
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exact: Vec<f64> = scores.iter().map(|&s| (f64::from(s - max) * 0.7).exp()).collect();
            let sum: f64 = exact.iter().sum();
            for (g, e) in got.iter().zip(exact) {
                assert!((f64::from(*g) - e / sum).abs() <= 2e-6, "{len}: {g} for {}", e / sum);
            }
        }
        let mut with_nan = [1.0, f32::NAN, 2.0];
        softmax(&mut with_nan, 1.0);
        assert!(with_nan.iter().all(|v| v.is_nan()), "a NaN must show, not vanish");
    }

    #[test]
    fn weighted_sum_continues_bit_for_bit() {
        for (m, n, d) in [(1, 1, 1), (2, 9, 5), (3, 40, 64), (4, 33, 128), (1, 17, 100)] {
            let (weights, rows) = (Random::new(5).vec(m * n, 1.0), Random::new(6).vec(n * d, 1.0));
            let (mut whole, mut parts) = (vec![0.0; m * d], vec![0.0; m * d]);
            weighted_sum(&mut whole, &weights, n, &rows, n, d);
            let split = n / 2;
            weighted_sum(&mut parts, &weights, n, &rows[..split * d], split, d);
            weighted_sum(&mut parts, &weights[split..], n, &rows[split * d..], n - split, d);
            assert_eq!(whole, parts, "[{m}, {n}, {d}]");
        }
    }
}
