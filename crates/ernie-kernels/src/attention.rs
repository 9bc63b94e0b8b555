//! Causal attention over packed documents, with rotary positions (interleaved pairs), grouped key/value heads and, where asked for, a sliding window.
//!
//! Letters: t tokens, d head_dim, qh query heads, kvh key/value heads. No `[t, t]` matrix ever exists: queries are taken in panels of 32, and
//! scores are kept *transposed*, `[keys, 32]`. In that form the softmax runs down the columns, 32 queries side by side in two vectors, and the
//! scores already are the packed right operand of the product with the values. The backward pass recomputes the probabilities from the saved
//! log-sum-exp of each row (as FlashAttention does, arXiv 2205.14135), a block of keys at a time.

mod panel;
pub mod paragraphs;
pub mod scalar;

use std::ops::Range;

use rayon::prelude::*;

use crate::arch::matrix::{Mat, MatMut};
use crate::rope::RopeTable;
use panel::{Keys, Panel};

/// Queries that share the packed keys of one task of the forward pass.
const TASK_QUERIES: usize = 512;

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

    /// Elements of one token's queries, keys and values: (qh + 2·kvh)·d.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// `[0, …, t]` bounds the documents: a token sees the tokens of its own document up to itself, and its position counts from the document's start.
    pub cu_seqlens: &'a [u32],
    /// Of those, only the last `window` (itself included), if given.
    pub window: Option<usize>,
}

impl Mask<'_> {
    /// The first row that the query in row `query` of a document that starts at `start` sees.
    fn first_seen(&self, start: usize, query: usize) -> usize {
        self.window.map_or(start, |window| start.max((query + 1).saturating_sub(window)))
    }

    fn tokens(&self) -> usize {
        self.cu_seqlens[self.cu_seqlens.len() - 1] as usize
    }
}

/// `out[t, qh·d]` = softmax(q·kᵀ/√d)·v per head, and `lse[t, qh]`, the log-sum-exp of each row of scores, for [`backward`].
///
/// `qkv[t, (qh + 2·kvh)·d]` holds each token's queries, keys and values, without rotary positions; they are applied here to queries and keys.
pub fn forward(out: &mut [f32], lse: &mut [f32], qkv: &[f32], mask: Mask<'_>, table: &RopeTable, shape: Shape) {
    let t = check(qkv, mask, table, shape);
    assert!(out.len() == t * shape.q_width() && lse.len() == t * shape.q_heads, "out must be [t, qh·d], and lse [t, qh]");
    if t == 0 {
        return;
    }
    let tasks = query_ranges(mask.cu_seqlens);
    let bounds: Vec<u32> = std::iter::once(0).chain(tasks.iter().map(|(_, rows)| rows.end as u32)).collect();
    let outs = MatMut::new(out, t, shape.q_width()).tiles(&bounds, shape.group() * shape.head_dim);
    let lses = MatMut::new(lse, t, shape.q_heads).tiles(&bounds, shape.group());
    outs.into_par_iter().zip(lses).enumerate().for_each(|(task, (mut out, mut lse))| {
        let (start, rows) = &tasks[task / shape.kv_heads];
        let kv_head = task % shape.kv_heads;
        let layer = Layer { qkv, table, shape, mask, start: *start };
        let keys = Keys::for_forward(&layer, kv_head, mask.first_seen(*start, rows.start)..rows.end);
        for member in 0..shape.group() {
            for first in rows.clone().step_by(panel::QUERIES) {
                let queries = first..(first + panel::QUERIES).min(rows.end);
                let local = first - rows.start..queries.end - rows.start;
                let out = out.block(local.clone(), member * shape.head_dim..(member + 1) * shape.head_dim);
                let lse = lse.block(local, member..member + 1);
                Panel::new(&layer, kv_head * shape.group() + member, queries).forward(&layer, &keys, out, lse);
            }
        }
    });
}

/// `dqkv[t, (qh + 2·kvh)·d]` (overwritten), the gradient of [`forward`] from `dout[t, qh·d]` and what the forward pass was given and gave.
#[allow(clippy::too_many_arguments)] // One result and seven operands, each with one meaning.
pub fn backward(dqkv: &mut [f32], qkv: &[f32], out: &[f32], lse: &[f32], dout: &[f32], mask: Mask<'_>, table: &RopeTable, shape: Shape) {
    let t = check(qkv, mask, table, shape);
    assert!(dqkv.len() == qkv.len(), "a gradient must be shaped as what it belongs to");
    assert!(out.len() == t * shape.q_width() && dout.len() == out.len() && lse.len() == t * shape.q_heads);
    if t == 0 {
        return;
    }
    let (d, group) = (shape.head_dim, shape.group());
    let (dq, dkv) = MatMut::new(dqkv, t, shape.qkv_width()).split_columns(shape.q_width());
    let (dk, dv) = dkv.split_columns(shape.kv_width());
    let dq = dq.tiles(mask.cu_seqlens, group * d);
    let (dk, dv) = (dk.tiles(mask.cu_seqlens, d), dv.tiles(mask.cu_seqlens, d));
    let (out, dout) = (Mat::new(out, t, shape.q_width()), Mat::new(dout, t, shape.q_width()));
    dq.into_par_iter().zip(dk).zip(dv).enumerate().for_each(|(task, ((mut dq, mut dk), mut dv))| {
        let (document, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let rows = mask.cu_seqlens[document] as usize..mask.cu_seqlens[document + 1] as usize;
        if rows.is_empty() {
            return;
        }
        let layer = Layer { qkv, table, shape, mask, start: rows.start };
        let mut keys = Keys::for_backward(&layer, kv_head, rows.clone());
        for member in 0..group {
            let head = kv_head * group + member;
            for first in rows.clone().step_by(panel::QUERIES) {
                let queries = first..(first + panel::QUERIES).min(rows.end);
                let dq = dq.block(first - rows.start..queries.end - rows.start, member * d..(member + 1) * d);
                let panel = Panel::new(&layer, head, queries.clone());
                let saved = panel::Saved::new(out, dout, lse, &shape, head, queries);
                panel.backward(&layer, &mut keys, &saved, dq);
            }
        }
        keys.write_gradients(&layer, &mut dk, &mut dv);
    });
}

/// What every task of one call reads; `start` is the first row of the task's document.
struct Layer<'a> {
    qkv: &'a [f32],
    table: &'a RopeTable,
    shape: Shape,
    mask: Mask<'a>,
    start: usize,
}

impl<'a> Layer<'a> {
    fn columns(&self, rows: Range<usize>, from: usize) -> Mat<'a> {
        Mat::block(self.qkv, self.shape.qkv_width(), rows, from..from + self.shape.head_dim)
    }

    fn q(&self, head: usize, rows: Range<usize>) -> Mat<'a> {
        self.columns(rows, head * self.shape.head_dim)
    }

    fn k(&self, kv_head: usize, rows: Range<usize>) -> Mat<'a> {
        self.columns(rows, self.shape.q_width() + kv_head * self.shape.head_dim)
    }

    fn v(&self, kv_head: usize, rows: Range<usize>) -> Mat<'a> {
        self.columns(rows, self.shape.q_width() + self.shape.kv_width() + kv_head * self.shape.head_dim)
    }
}

/// Consecutive queries of one document, with the document's first row.
fn query_ranges(cu_seqlens: &[u32]) -> Vec<(usize, Range<usize>)> {
    let mut ranges = Vec::new();
    for bounds in cu_seqlens.windows(2) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        ranges.extend((start..end).step_by(TASK_QUERIES).map(|row| (start, row..(row + TASK_QUERIES).min(end))));
    }
    ranges
}

/// Asserts that the operands agree; returns t.
fn check(qkv: &[f32], mask: Mask<'_>, table: &RopeTable, shape: Shape) -> usize {
    assert!(shape.kv_heads > 0 && shape.q_heads.is_multiple_of(shape.kv_heads) && shape.q_heads > 0, "{shape:?}: heads do not group");
    assert_eq!(table.head_dim(), shape.head_dim, "the rotary table is for another head_dim");
    assert!(mask.cu_seqlens.first() == Some(&0) && mask.cu_seqlens.is_sorted(), "cu_seqlens must ascend from 0");
    assert!(mask.window != Some(0), "a window of no tokens");
    let t = mask.tokens();
    assert_eq!(qkv.len(), t * shape.qkv_width(), "queries, keys and values of {t} tokens, {shape:?}");
    let longest = mask.cu_seqlens.windows(2).map(|bounds| (bounds[1] - bounds[0]) as usize).max().unwrap_or(0);
    assert!(longest <= table.positions(), "a document of {longest} tokens, a rotary table of {}", table.positions());
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

    struct Case {
        qkv: Vec<f32>,
        dout: Vec<f32>,
        table: RopeTable,
    }

    fn case(t: usize, shape: Shape) -> Case {
        let mut random = Random::new(10);
        let table = RopeTable::new(10_000.0, shape.head_dim, t);
        Case { qkv: random.vec(t * shape.qkv_width(), 2.0), dout: random.vec(t * shape.q_width(), 1.0), table }
    }

    fn run(case: &Case, mask: Mask<'_>, shape: Shape) -> [Vec<f32>; 3] {
        let Case { qkv, dout, table } = case;
        let t = qkv.len() / shape.qkv_width();
        let (mut out, mut lse) = (vec![f32::NAN; dout.len()], vec![f32::NAN; t * shape.q_heads]);
        forward(&mut out, &mut lse, qkv, mask, table, shape);
        let mut dqkv = vec![f32::NAN; qkv.len()];
        backward(&mut dqkv, qkv, &out, &lse, dout, mask, table, shape);
        [out, lse, dqkv]
    }

    #[test]
    fn equals_the_plain_loops() {
        let shapes = [(1, 1, 2), (2, 1, 6), (4, 2, 10), (3, 3, 16), (2, 1, 80), (6, 2, 32), (2, 2, 128)];
        let documents: [&[u32]; 7] = [&[0], &[0, 1], &[0, 1, 2, 7], &[0, 33], &[0, 128, 129, 131], &[0, 5, 5, 305], &[0, 131, 260]];
        for (q_heads, kv_heads, head_dim) in shapes {
            for cu_seqlens in documents {
                for window in [None, Some(1), Some(7), Some(40), Some(1000)] {
                    let shape = Shape { q_heads, kv_heads, head_dim };
                    let mask = Mask { cu_seqlens, window };
                    let case = case(mask.tokens(), shape);
                    let [out, lse, dqkv] = run(&case, mask, shape);
                    let qkv = wide(&case.qkv);
                    let expected = scalar::forward(&qkv, mask, &case.table, shape);
                    assert_close("out", &out, &narrow(&expected.out), 1e-5);
                    assert_close("lse", &lse, &narrow(&expected.lse), 1e-5);
                    let expected = scalar::backward(&qkv, &wide(&case.dout), mask, &case.table, shape);
                    assert_close("dqkv", &dqkv, &narrow(&expected), 3e-5);
                }
            }
        }
    }

    /// More queries than one task of the forward pass takes, and more keys than one block of the backward pass.
    #[test]
    fn a_long_document_equals_the_plain_loops() {
        let shape = Shape { q_heads: 2, kv_heads: 1, head_dim: 8 };
        for window in [None, Some(300)] {
            let mask = Mask { cu_seqlens: &[0, 1100], window };
            let case = case(1100, shape);
            let [out, _, dqkv] = run(&case, mask, shape);
            assert_close("out", &out, &narrow(&scalar::forward(&wide(&case.qkv), mask, &case.table, shape).out), 1e-5);
            let expected = scalar::backward(&wide(&case.qkv), &wide(&case.dout), mask, &case.table, shape);
            assert_close("dqkv", &dqkv, &narrow(&expected), 3e-5);
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let (mask, shape) = (Mask { cu_seqlens: &[0, 4, 9], window: Some(3) }, Shape { q_heads: 2, kv_heads: 1, head_dim: 4 });
        let case = case(9, shape);
        let [_, _, dqkv] = run(&case, mask, shape);
        let loss = |qkv: &[f64]| weighted_sum(&scalar::forward(qkv, mask, &case.table, shape).out, &case.dout);
        assert_gradient("dqkv", &dqkv, &case.qkv, loss);
    }

    #[test]
    fn neither_threads_nor_other_documents_change_a_bit() {
        let shape = Shape { q_heads: 4, kv_heads: 2, head_dim: 16 };
        let (mask, alone) = (Mask { cu_seqlens: &[0, 150, 437], window: None }, Mask { cu_seqlens: &[0, 150], window: None });
        let case = case(437, shape);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| run(&case, mask, shape))
        };
        let all = on(1);
        assert_eq!(all, on(3));
        let first = Case {
            qkv: case.qkv[..150 * shape.qkv_width()].to_vec(),
            dout: case.dout[..150 * shape.q_width()].to_vec(),
            table: case.table.clone(),
        };
        for (part, whole) in run(&first, alone, shape).iter().zip(&all) {
            assert_eq!(part[..], whole[..part.len()]);
        }
    }
}
