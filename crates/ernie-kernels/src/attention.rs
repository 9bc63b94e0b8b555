//! Causal attention over packed documents, with rotary positions (interleaved pairs) and grouped key/value heads.
//!
//! Letters: t tokens, d head_dim, qh query heads, kvh key/value heads. Queries are taken in blocks of 128 rows; a block's scores against all
//! keys it may see are a matrix of their own that stays in the cache, and no `[t, t]` matrix ever exists. The backward pass recomputes the
//! probabilities from the saved log-sum-exp of each row (as FlashAttention does, arXiv 2205.14135).

pub mod scalar;

use std::ops::Range;

use rayon::prelude::*;

use crate::arch::exp::exp;
use crate::arch::gemm::{Threads, Update, product};
use crate::arch::isa::{LANES, simd_fn};
use crate::arch::matrix::{Mat, MatMut};
use crate::rope::{RopeTable, apply_interleaved, rotate_into};
use crate::row::{dot, exponentials, scale};
use crate::scratch::Scratch;

/// Query rows that share one block of scores.
const BLOCK_ROWS: usize = 128;

/// Heads of an attention layer. Query head i reads key/value head i / (q_heads / kv_heads).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
}

impl Shape {
    fn q_width(&self) -> usize {
        self.q_heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// `out[t, qh·d]` = softmax(q·kᵀ/√d)·v per head, and `lse[qh, t]`, the log-sum-exp of each row of scores, for [`backward`].
///
/// `q[t, qh·d]`, `k` and `v[t, kvh·d]` come without rotary positions; they are applied here to q and k. `cu_seqlens` = [0, …, t] bounds the
/// documents: a token sees the tokens of its own document up to itself, and its position counts from the document's start.
#[allow(clippy::too_many_arguments)] // Two results and three operands, each with one meaning.
pub fn forward(out: &mut [f32], lse: &mut [f32], q: &[f32], k: &[f32], v: &[f32], cu_seqlens: &[u32], table: &RopeTable, shape: Shape) {
    let t = check(q, k, v, cu_seqlens, table, shape);
    assert!(out.len() == q.len() && lse.len() == shape.q_heads * t, "out must be shaped as q, and lse [q_heads, t]");
    if t == 0 {
        return;
    }
    let (d, q_width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let (q, k) = rotated(q, k, cu_seqlens, table, shape);
    let blocks = query_blocks(cu_seqlens);
    let bounds: Vec<u32> = std::iter::once(0).chain(blocks.iter().map(|block| block.rows.end as u32)).collect();
    let out = MatMut::new(out, t, q_width).tiles(&bounds, d);
    let lse = column_blocks(lse, t, &bounds);
    out.into_par_iter().zip(lse).enumerate().for_each(|(task, (out, lse))| {
        let (block, head) = (&blocks[task / shape.q_heads], task % shape.q_heads);
        let keys = block.document_start..block.rows.end;
        let kv_head = head / shape.group() * d;
        let q = Mat::block(&q, q_width, block.rows.clone(), head * d..(head + 1) * d);
        let k = Mat::block(&k, kv_width, keys.clone(), kv_head..kv_head + d);
        let v = Mat::block(v, kv_width, keys, kv_head..kv_head + d);
        forward_block(out, lse, q, k, v, shape.scale());
    });
}

/// One block of queries of one head against the keys up to the block's last row: the last key belongs to the last query.
fn forward_block(mut out: MatMut<'_>, lse: &mut [f32], q: Mat<'_>, k: Mat<'_>, v: Mat<'_>, softmax_scale: f32) {
    let (rows, keys) = (q.rows(), k.rows());
    let stride = score_stride(keys);
    let mut scores = Scratch::take(rows * stride);
    product(MatMut::corner(&mut scores, stride, rows, keys), q, k.t(), softmax_scale, Update::Set, Threads::One);
    let mut sums = [0.0; BLOCK_ROWS];
    for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
        let seen = keys - rows + i + 1;
        let padded = seen.next_multiple_of(LANES);
        row[seen..padded].fill(f32::NEG_INFINITY);
        let (max, sum) = exponentials(&mut row[..padded]);
        row[seen..padded.max(keys)].fill(0.0);
        sums[i] = sum;
        lse[i] = max + sum.ln();
    }
    let probabilities = Mat::block(&scores, stride, 0..rows, 0..keys);
    product(out.block(0..rows, 0..v.cols()), probabilities, v, 1.0, Update::Set, Threads::One);
    for (i, sum) in sums[..rows].iter().enumerate() {
        scale(out.row_mut(i), 1.0 / sum);
    }
}

/// Gradients of [`forward`], all overwritten: `dq[t, qh·d]`, dk and `dv[t, kvh·d]`, from `dout[t, qh·d]` and what the forward pass was given and gave.
#[allow(clippy::too_many_arguments)] // Three results and six operands, each with one meaning.
pub fn backward(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    cu_seqlens: &[u32],
    table: &RopeTable,
    shape: Shape,
) {
    let t = check(q, k, v, cu_seqlens, table, shape);
    assert!(dq.len() == q.len() && dk.len() == k.len() && dv.len() == v.len(), "a gradient must be shaped as what it belongs to");
    assert!(out.len() == q.len() && dout.len() == q.len() && lse.len() == shape.q_heads * t);
    let (d, group) = (shape.head_dim, shape.group());
    let positions = positions(cu_seqlens);
    let (q, k) = rotated(q, k, cu_seqlens, table, shape);
    let dq_tiles = MatMut::new(dq, t, shape.q_width()).tiles(cu_seqlens, group * d);
    let dk_tiles = MatMut::new(dk, t, shape.kv_width()).tiles(cu_seqlens, d);
    let dv_tiles = MatMut::new(dv, t, shape.kv_width()).tiles(cu_seqlens, d);
    dq_tiles.into_par_iter().zip(dk_tiles).zip(dv_tiles).enumerate().for_each(|(task, ((mut dq, mut dk), mut dv))| {
        let (document, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let rows = cu_seqlens[document] as usize..cu_seqlens[document + 1] as usize;
        dk.fill(0.0);
        dv.fill(0.0);
        for member in 0..group {
            let q_head = kv_head * group + member;
            let (q_cols, kv_cols) = (q_head * d..(q_head + 1) * d, kv_head * d..(kv_head + 1) * d);
            let head = Head {
                q: Mat::block(&q, shape.q_width(), rows.clone(), q_cols.clone()),
                k: Mat::block(&k, shape.kv_width(), rows.clone(), kv_cols.clone()),
                v: Mat::block(v, shape.kv_width(), rows.clone(), kv_cols),
                out: Mat::block(out, shape.q_width(), rows.clone(), q_cols.clone()),
                dout: Mat::block(dout, shape.q_width(), rows.clone(), q_cols),
                lse: &lse[q_head * t..][rows.clone()],
                scale: shape.scale(),
            };
            let mut dq = dq.block(0..rows.len(), member * d..(member + 1) * d);
            for start in (0..rows.len()).step_by(BLOCK_ROWS) {
                head.backward_block(&mut dq, &mut dk, &mut dv, start..(start + BLOCK_ROWS).min(rows.len()));
            }
        }
    });
    // So far these are gradients of the rotated q and k; the gradient of a rotation is the rotation back.
    apply_interleaved(dq, table, shape.q_heads, |row| positions[row] as usize, true);
    apply_interleaved(dk, table, shape.kv_heads, |row| positions[row] as usize, true);
}

/// One query head of one document: rotated q and k, every matrix `[document length, d]`.
struct Head<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    out: Mat<'a>,
    dout: Mat<'a>,
    lse: &'a [f32],
    scale: f32,
}

impl Head<'_> {
    /// Writes dq of the rows `queries`, and adds to dk and dv what those rows contribute:
    /// p = exp(scale·q·kᵀ − lse), dv += pᵀ·dout, ds = p·(dout·vᵀ − Σ out·dout)·scale, dq = ds·k, dk += dsᵀ·q.
    fn backward_block(&self, dq: &mut MatMut<'_>, dk: &mut MatMut<'_>, dv: &mut MatMut<'_>, queries: Range<usize>) {
        let (rows, keys, d) = (queries.len(), queries.end, self.q.cols());
        let stride = score_stride(keys);
        let (mut p, mut ds) = (Scratch::take(rows * stride), Scratch::take(rows * stride));
        let (q, dout) = (self.q.rows_of(queries.clone()), self.dout.rows_of(queries.clone()));
        let (k, v) = (self.k.rows_of(0..keys), self.v.rows_of(0..keys));
        product(MatMut::corner(&mut p, stride, rows, keys), q, k.t(), self.scale, Update::Set, Threads::One);
        product(MatMut::corner(&mut ds, stride, rows, keys), dout, v.t(), 1.0, Update::Set, Threads::One);
        for (i, (p, ds)) in p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).enumerate() {
            let row = queries.start + i;
            let seen = row + 1;
            let padded = seen.next_multiple_of(LANES);
            let delta = dot(self.out.row(row), self.dout.row(row));
            score_gradient(&mut p[..padded], &mut ds[..padded], self.lse[row], delta, self.scale);
            p[seen..padded.max(keys)].fill(0.0);
            ds[seen..padded.max(keys)].fill(0.0);
        }
        let (p, ds) = (Mat::block(&p, stride, 0..rows, 0..keys), Mat::block(&ds, stride, 0..rows, 0..keys));
        product(dv.block(0..keys, 0..d), p.t(), dout, 1.0, Update::Add, Threads::One);
        product(dq.block(queries, 0..d), ds, k, 1.0, Update::Set, Threads::One);
        product(dk.block(0..keys, 0..d), ds.t(), q, 1.0, Update::Add, Threads::One);
    }
}

simd_fn! {
    /// From p = scores and ds = dout·vᵀ to p = probabilities and ds = p·(ds − delta)·scale.
    fn score_gradient<FMA>(p: &mut [f32], ds: &mut [f32], lse: f32, delta: f32, scale: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<FMA>(*p - lse);
            *ds = *p * (*ds - delta) * scale;
        }
    }
}

/// Distance between rows of scores: room to pad a row to whole vectors, and never a multiple of 4 KiB, which would make all rows compete for
/// the same few lines of the cache.
fn score_stride(keys: usize) -> usize {
    keys.next_multiple_of(LANES) + 16
}

/// Consecutive queries of one document.
struct QueryBlock {
    document_start: usize,
    rows: Range<usize>,
}

fn query_blocks(cu_seqlens: &[u32]) -> Vec<QueryBlock> {
    let mut blocks = Vec::new();
    for bounds in cu_seqlens.windows(2) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        for row in (start..end).step_by(BLOCK_ROWS) {
            blocks.push(QueryBlock { document_start: start, rows: row..(row + BLOCK_ROWS).min(end) });
        }
    }
    blocks
}

/// The parts of each row of `x[rows, t]` between the bounds, in the order of [`MatMut::tiles`]: bounds outside, rows inside.
fn column_blocks<'a>(x: &'a mut [f32], t: usize, bounds: &[u32]) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::new();
    for (row, mut rest) in x.chunks_exact_mut(t).enumerate() {
        for (block, ends) in bounds.windows(2).enumerate() {
            let (part, tail) = rest.split_at_mut((ends[1] - ends[0]) as usize);
            parts.push((block, row, part));
            rest = tail;
        }
    }
    parts.sort_by_key(|&(block, row, _)| (block, row));
    parts.into_iter().map(|(_, _, part)| part).collect()
}

fn positions(cu_seqlens: &[u32]) -> Vec<u32> {
    cu_seqlens.windows(2).flat_map(|bounds| 0..bounds[1] - bounds[0]).collect()
}

fn rotated(q: &[f32], k: &[f32], cu_seqlens: &[u32], table: &RopeTable, shape: Shape) -> (Scratch, Scratch) {
    let positions = positions(cu_seqlens);
    let (mut q_rotated, mut k_rotated) = (Scratch::take(q.len()), Scratch::take(k.len()));
    rotate_into(&mut q_rotated, q, table, shape.q_heads, &positions);
    rotate_into(&mut k_rotated, k, table, shape.kv_heads, &positions);
    (q_rotated, k_rotated)
}

/// Asserts that the operands agree; returns t.
fn check(q: &[f32], k: &[f32], v: &[f32], cu_seqlens: &[u32], table: &RopeTable, shape: Shape) -> usize {
    assert!(shape.kv_heads > 0 && shape.q_heads.is_multiple_of(shape.kv_heads) && shape.q_heads > 0, "{shape:?}: heads do not group");
    assert_eq!(table.head_dim(), shape.head_dim, "the rotary table is for another head_dim");
    assert!(cu_seqlens.first() == Some(&0) && cu_seqlens.is_sorted(), "cu_seqlens must ascend from 0");
    let t = cu_seqlens[cu_seqlens.len() - 1] as usize;
    assert_eq!(q.len(), t * shape.q_width(), "q of {t} tokens, {shape:?}");
    assert!(k.len() == t * shape.kv_width() && v.len() == k.len(), "k and v of {t} tokens, {shape:?}");
    let longest = cu_seqlens.windows(2).map(|bounds| (bounds[1] - bounds[0]) as usize).max().unwrap_or(0);
    assert!(longest <= table.positions(), "a document of {longest} tokens, a rotary table of {}", table.positions());
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

    struct Case {
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        dout: Vec<f32>,
        table: RopeTable,
    }

    fn case(cu_seqlens: &[u32], shape: Shape) -> Case {
        let mut random = Random::new(10);
        let t = *cu_seqlens.last().expect("bounds") as usize;
        Case {
            q: random.vec(t * shape.q_width(), 2.0),
            k: random.vec(t * shape.kv_width(), 2.0),
            v: random.vec(t * shape.kv_width(), 1.0),
            dout: random.vec(t * shape.q_width(), 1.0),
            table: RopeTable::new(10_000.0, shape.head_dim, t),
        }
    }

    fn run(case: &Case, cu_seqlens: &[u32], shape: Shape) -> [Vec<f32>; 5] {
        let Case { q, k, v, dout, table } = case;
        let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len() / shape.head_dim]);
        forward(&mut out, &mut lse, q, k, v, cu_seqlens, table, shape);
        let (mut dq, mut dk, mut dv) = (vec![f32::NAN; q.len()], vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]);
        backward(&mut dq, &mut dk, &mut dv, q, k, v, &out, &lse, dout, cu_seqlens, table, shape);
        [out, lse, dq, dk, dv]
    }

    #[test]
    fn equals_the_plain_loops() {
        let shapes = [(1, 1, 2), (2, 1, 6), (4, 2, 10), (3, 3, 16), (2, 1, 80), (6, 2, 32), (2, 2, 128)];
        let documents: [&[u32]; 7] = [&[0], &[0, 1], &[0, 1, 2, 7], &[0, 33], &[0, 128, 129, 131], &[0, 5, 5, 305], &[0, 131, 260]];
        for (q_heads, kv_heads, head_dim) in shapes {
            for cu_seqlens in documents {
                let shape = Shape { q_heads, kv_heads, head_dim };
                let case = case(cu_seqlens, shape);
                let [out, lse, dq, dk, dv] = run(&case, cu_seqlens, shape);
                let (q, k, v) = (wide(&case.q), wide(&case.k), wide(&case.v));
                let expected = scalar::forward(&q, &k, &v, cu_seqlens, &case.table, shape);
                assert_close("out", &out, &narrow(&expected.out), 1e-5);
                assert_close("lse", &lse, &narrow(&expected.lse), 1e-5);
                let expected = scalar::backward(&q, &k, &v, &wide(&case.dout), cu_seqlens, &case.table, shape);
                assert_close("dq", &dq, &narrow(&expected.dq), 3e-5);
                assert_close("dk", &dk, &narrow(&expected.dk), 3e-5);
                assert_close("dv", &dv, &narrow(&expected.dv), 3e-5);
            }
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let (cu_seqlens, shape) = (&[0, 1, 5], Shape { q_heads: 4, kv_heads: 2, head_dim: 6 });
        let case = case(cu_seqlens, shape);
        let [_, _, dq, dk, dv] = run(&case, cu_seqlens, shape);
        let (q, k, v) = (wide(&case.q), wide(&case.k), wide(&case.v));
        let loss =
            |q: &[f64], k: &[f64], v: &[f64]| weighted_sum(&scalar::forward(q, k, v, cu_seqlens, &case.table, shape).out, &case.dout);
        assert_gradient("dq", &dq, &case.q, |q| loss(q, &k, &v));
        assert_gradient("dk", &dk, &case.k, |k| loss(&q, k, &v));
        assert_gradient("dv", &dv, &case.v, |v| loss(&q, &k, v));
    }

    #[test]
    fn a_document_does_not_notice_its_neighbours() {
        let shape = Shape { q_heads: 2, kv_heads: 1, head_dim: 10 };
        let whole = case(&[0, 3, 143], shape);
        let alone = Case {
            q: whole.q[3 * 20..].to_vec(),
            k: whole.k[3 * 10..].to_vec(),
            v: whole.v[3 * 10..].to_vec(),
            dout: whole.dout[3 * 20..].to_vec(),
            table: whole.table.clone(),
        };
        let [out, _, dq, dk, _] = run(&whole, &[0, 3, 143], shape);
        let [out_alone, _, dq_alone, dk_alone, _] = run(&alone, &[0, 140], shape);
        assert_eq!(out[3 * 20..], out_alone);
        assert_eq!(dq[3 * 20..], dq_alone);
        assert_eq!(dk[3 * 10..], dk_alone);
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let (cu_seqlens, shape) = (&[0, 150, 152, 400], Shape { q_heads: 4, kv_heads: 2, head_dim: 16 });
        let case = case(cu_seqlens, shape);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| run(&case, cu_seqlens, shape))
        };
        assert_eq!(on(1), on(4));
    }
}
