//! Attention and its gradient by plain loops in f64, the whole row of scores at a time.
#![allow(clippy::needless_range_loop)] // Indices as in the formulas.

use super::paragraphs::Bounds;
use super::{Mask, Shape};
use crate::rope::RopeTable;
use crate::rope::scalar::apply_interleaved;

/// Results of [`forward`].
pub struct Forward {
    /// `[t, qh·d]`.
    pub out: Vec<f64>,
    /// `[t, qh]`.
    pub lse: Vec<f64>,
}

/// See [`forward`](super::forward).
pub fn forward(qkv: &[f64], mask: Mask<'_>, table: &RopeTable, shape: Shape) -> Forward {
    let positions = positions(mask.cu_seqlens);
    let (t, d) = (positions.len(), shape.head_dim);
    let [q, k, v] = split(qkv, shape);
    let mut result = Forward { out: vec![0.0; q.len()], lse: vec![0.0; shape.q_heads * t] };
    let (q, k) = rotated(&q, &k, &positions, table, shape);
    for head in 0..shape.q_heads {
        for row in 0..t {
            let (scores, first) = scores(&q, &k, head, row, mask.first_seen(row - positions[row] as usize, row), shape);
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            result.lse[row * shape.q_heads + head] = sum.ln();
            for (j, score) in scores.iter().enumerate() {
                let v = kv_row(&v, head, first + j, shape);
                for i in 0..d {
                    result.out[row * shape.q_width() + head * d + i] += score.exp() / sum * v[i];
                }
            }
        }
    }
    result
}

/// dqkv; see [`backward`](super::backward).
pub fn backward(qkv: &[f64], dout: &[f64], mask: Mask<'_>, table: &RopeTable, shape: Shape) -> Vec<f64> {
    let positions = positions(mask.cu_seqlens);
    let [q, k, v] = split(qkv, shape);
    let (t, d) = (positions.len(), shape.head_dim);
    let scale = 1.0 / (d as f64).sqrt();
    let (q_rotated, k_rotated) = rotated(&q, &k, &positions, table, shape);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for head in 0..shape.q_heads {
        for row in 0..t {
            let (scores, first) = scores(&q_rotated, &k_rotated, head, row, mask.first_seen(row - positions[row] as usize, row), shape);
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            let p: Vec<f64> = scores.iter().map(|s| s.exp() / sum).collect();
            let q_at = row * shape.q_width() + head * d;
            let dp: Vec<f64> = (0..p.len())
                .map(|j| {
                    let v = kv_row(&v, head, first + j, shape);
                    (0..d).map(|i| dout[q_at + i] * v[i]).sum()
                })
                .collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for j in 0..p.len() {
                let kv_at = (first + j) * shape.kv_width() + head / shape.group() * d;
                let ds = p[j] * (dp[j] - mean) * scale;
                for i in 0..d {
                    dq[q_at + i] += ds * k_rotated[kv_at + i];
                    dk[kv_at + i] += ds * q_rotated[q_at + i];
                    dv[kv_at + i] += p[j] * dout[q_at + i];
                }
            }
        }
    }
    let position = |row: usize| positions[row] as usize;
    let dq = apply_interleaved(&dq, table, shape.q_heads, position, true);
    let dk = apply_interleaved(&dk, table, shape.kv_heads, position, true);
    let rows = |x: &[f64], row: usize| x[row * x.len() / t..(row + 1) * x.len() / t].to_vec();
    (0..t).flat_map(|row| [rows(&dq, row), rows(&dk, row), rows(&dv, row)].concat()).collect()
}

/// See [`paragraphs::forward`](super::paragraphs::forward).
pub fn paragraphs(qkv: &[f64], pool: &[f64], bounds: Bounds<'_>, table: &RopeTable, shape: Shape) -> Forward {
    let positions = positions(bounds.cu_seqlens);
    let d = shape.head_dim;
    let scale = 1.0 / (d as f64).sqrt();
    let [q, k, v] = split(qkv, shape);
    let (q, turned) = rotated(&q, &k, &positions, table, shape);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut result = Forward { out: vec![0.0; q.len()], lse: vec![0.0; shape.q_heads * positions.len()] };
    for head in 0..shape.q_heads {
        let u = &pool[head / shape.group() * d..][..d];
        // Keys and values of the summaries of the document's paragraphs so far.
        let mut seen: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
        for rows in bounds.paragraphs.windows(2).map(|bounds| bounds[0] as usize..bounds[1] as usize) {
            if positions[rows.start] == 0 {
                seen.clear();
            }
            for row in rows.clone() {
                let q = &q[row * shape.q_width() + head * d..][..d];
                let own = (rows.start..=row).map(|j| (kv_row(&turned, head, j, shape), kv_row(&v, head, j, shape)));
                let all: Vec<(&[f64], &[f64])> = seen.iter().map(|(k, v)| (&k[..], &v[..])).chain(own).collect();
                let weights: Vec<f64> = all.iter().map(|(k, _)| (dot(q, k) * scale).exp()).collect();
                let sum: f64 = weights.iter().sum();
                result.lse[row * shape.q_heads + head] = sum.ln();
                for ((_, v), weight) in all.iter().zip(&weights) {
                    for i in 0..d {
                        result.out[row * shape.q_width() + head * d + i] += weight / sum * v[i];
                    }
                }
            }
            let weights: Vec<f64> = rows.clone().map(|row| (dot(u, kv_row(&k, head, row, shape)) * scale).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let pooled = |x: &[f64]| -> Vec<f64> {
                let of = |i: usize| rows.clone().zip(&weights).map(|(row, a)| a / sum * kv_row(x, head, row, shape)[i]).sum();
                (0..d).map(of).collect()
            };
            let last = positions[rows.end - 1] as usize;
            seen.push((apply_interleaved(&pooled(&k), table, 1, |_| last, false), pooled(&v)));
        }
    }
    result
}

/// Queries, keys and values apart.
fn split(qkv: &[f64], shape: Shape) -> [Vec<f64>; 3] {
    let (q, kv) = (shape.q_width(), shape.kv_width());
    [0..q, q..q + kv, q + kv..q + 2 * kv]
        .map(|columns| qkv.chunks_exact(shape.qkv_width()).flat_map(|row| row[columns.clone()].to_vec()).collect())
}

fn positions(cu_seqlens: &[u32]) -> Vec<u32> {
    cu_seqlens.windows(2).flat_map(|bounds| 0..bounds[1] - bounds[0]).collect()
}

fn rotated(q: &[f64], k: &[f64], positions: &[u32], table: &RopeTable, shape: Shape) -> (Vec<f64>, Vec<f64>) {
    let position = |row: usize| positions[row] as usize;
    (apply_interleaved(q, table, shape.q_heads, position, false), apply_interleaved(k, table, shape.kv_heads, position, false))
}

/// The scaled scores of one query against the keys from `first` on, and `first`.
fn scores(q: &[f64], k: &[f64], head: usize, row: usize, first: usize, shape: Shape) -> (Vec<f64>, usize) {
    let d = shape.head_dim;
    let q = &q[row * shape.q_width() + head * d..][..d];
    let score = |j: usize| q.iter().zip(kv_row(k, head, j, shape)).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
    ((first..=row).map(score).collect(), first)
}

fn kv_row(x: &[f64], q_head: usize, row: usize, shape: Shape) -> &[f64] {
    &x[row * shape.kv_width() + q_head / shape.group() * shape.head_dim..][..shape.head_dim]
}
