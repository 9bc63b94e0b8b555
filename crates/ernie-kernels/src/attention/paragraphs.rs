//! Attention of a token to the tokens of its own paragraph up to itself, and to one *summary* of each earlier paragraph of its document.
//!
//! A summary is a pooled key and a pooled value: with a = softmax over the paragraph of u·k/√d, u a learned vector of each key head and k without rotary
//! positions, they are Σ a·k, turned by the position of the paragraph's last token, and Σ a·v. All scores of a query share one softmax. A document of t tokens in
//! p paragraphs costs about t²/p + t·p products instead of t².
//!
//! Computed in two parts: attention inside paragraphs as if they were documents (rotary positions are relative), and the summaries taken into its results
//! by their log-sum-exp. The backward pass gives the first part the results of both: its probabilities then are those of the whole softmax.

use std::ops::Range;

use rayon::prelude::*;

use super::panel::{Keys, Panel, QUERIES, Saved};
use super::{Layer, Mask, Shape};
use crate::arch::matrix::{Mat, MatMut};
use crate::rope::RopeTable;
use crate::row;
use crate::scratch::Scratch;

/// Where documents and their paragraphs lie.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// `[0, …, t]`, the documents.
    pub cu_seqlens: &'a [u32],
    /// `[0, …, t]`, the paragraphs: every bound of a document is one of a paragraph, and no paragraph is empty.
    pub paragraphs: &'a [u32],
}

/// The paragraphs of one document that is not empty.
#[derive(Clone, Debug)]
struct Document {
    start: usize,
    /// Numbers of its paragraphs.
    paragraphs: Range<usize>,
}

impl<'a> Bounds<'a> {
    fn rows(&self, paragraph: usize) -> Range<usize> {
        self.paragraphs[paragraph] as usize..self.paragraphs[paragraph + 1] as usize
    }

    /// By `cu_seqlens`, the empty documents with no paragraphs.
    fn documents(&self) -> Vec<Document> {
        let mut paragraph = 0;
        let document = |bounds: &[u32]| {
            let first = paragraph;
            while self.paragraphs[paragraph] < bounds[1] {
                paragraph += 1;
            }
            assert_eq!(self.paragraphs[paragraph], bounds[1], "a document's bound is no paragraph's");
            Document { start: bounds[0] as usize, paragraphs: first..paragraph }
        };
        self.cu_seqlens.windows(2).map(document).collect()
    }

    fn own(&self) -> Mask<'a> {
        Mask { cu_seqlens: self.paragraphs, window: None }
    }

    fn check(&self, pool: &[f32], shape: Shape) {
        assert_eq!(pool.len(), shape.kv_width(), "a vector that pools for each key head");
        assert!(self.paragraphs.first() == Some(&0) && self.paragraphs.is_sorted_by(|a, b| a < b), "paragraphs must ascend from 0");
        assert_eq!(self.paragraphs.last(), self.cu_seqlens.last(), "paragraphs must cover the documents");
    }
}

/// `out[t, qh·d]` and `lse[t, qh]`, as [`attention::forward`](super::forward) gives them, of `qkv[t, (qh + 2·kvh)·d]` and the pooling vectors `pool[kvh, d]`.
pub fn forward(out: &mut [f32], lse: &mut [f32], qkv: &[f32], pool: &[f32], bounds: Bounds<'_>, table: &RopeTable, shape: Shape) {
    bounds.check(pool, shape);
    super::forward(out, lse, qkv, bounds.own(), table, shape);
    let t = bounds.own().tokens();
    if t == 0 {
        return;
    }
    let documents = bounds.documents();
    let layer = |document: &Document| Layer {
        qkv,
        table,
        shape,
        mask: Mask { cu_seqlens: bounds.cu_seqlens, window: None },
        start: document.start,
    };
    let of_document = document_of_paragraph(&documents);
    let summaries: Vec<Option<Keys>> = (0..documents.len() * shape.kv_heads)
        .into_par_iter()
        .map(|task| {
            let (document, kv_head) = (&documents[task / shape.kv_heads], task % shape.kv_heads);
            let summaries = Summaries::new(&layer(document), bounds, document, kv_head, pool)?;
            let (k, v) = summaries.matrices(shape.head_dim);
            Some(Keys::packed_for_forward(0..k.rows(), k, v))
        })
        .collect();
    let outs = MatMut::new(out, t, shape.q_width()).tiles(bounds.paragraphs, shape.group() * shape.head_dim);
    let lses = MatMut::new(lse, t, shape.q_heads).tiles(bounds.paragraphs, shape.group());
    outs.into_par_iter().zip(lses).enumerate().for_each(|(task, (mut out, mut lse))| {
        let (paragraph, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let document = of_document[paragraph];
        let earlier = paragraph - documents[document].paragraphs.start;
        let Some(keys) = summaries[document * shape.kv_heads + kv_head].as_ref().filter(|_| earlier > 0) else { return };
        let layer = layer(&documents[document]);
        for (member, queries, local) in panels(bounds.rows(paragraph), shape) {
            let out = out.block(local.clone(), member * shape.head_dim..(member + 1) * shape.head_dim);
            let lse = lse.block(local, member..member + 1);
            Panel::new(&layer, kv_head * shape.group() + member, queries).forward_more(keys, earlier, out, lse);
        }
    });
}

/// `dqkv` and `dpool` (overwritten), the gradients of [`forward`] from `dout[t, qh·d]` and what the forward pass was given and gave.
#[allow(clippy::too_many_arguments)] // Two results and eight operands, each with one meaning.
pub fn backward(
    dqkv: &mut [f32],
    dpool: &mut [f32],
    qkv: &[f32],
    pool: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    bounds: Bounds<'_>,
    table: &RopeTable,
    shape: Shape,
) {
    bounds.check(pool, shape);
    super::backward(dqkv, qkv, out, lse, dout, bounds.own(), table, shape);
    dpool.fill(0.0);
    let t = bounds.own().tokens();
    if t == 0 {
        return;
    }
    let (d, group) = (shape.head_dim, shape.group());
    let documents = bounds.documents();
    let (dq, dkv) = MatMut::new(dqkv, t, shape.qkv_width()).split_columns(shape.q_width());
    let (dk, dv) = dkv.split_columns(shape.kv_width());
    let dq = dq.tiles(bounds.cu_seqlens, group * d);
    let (dk, dv) = (dk.tiles(bounds.cu_seqlens, d), dv.tiles(bounds.cu_seqlens, d));
    let (out, dout) = (Mat::new(out, t, shape.q_width()), Mat::new(dout, t, shape.q_width()));
    let of_tasks: Vec<Option<Vec<f32>>> = dq
        .into_par_iter()
        .zip(dk)
        .zip(dv)
        .enumerate()
        .map(|(task, ((mut dq, mut dk), mut dv))| {
            let (document, kv_head) = (&documents[task / shape.kv_heads], task % shape.kv_heads);
            let mask = Mask { cu_seqlens: bounds.cu_seqlens, window: None };
            let layer = Layer { qkv, table, shape, mask, start: document.start };
            let summaries = Summaries::new(&layer, bounds, document, kv_head, pool)?;
            let (k, v) = summaries.matrices(d);
            let mut keys = Keys::packed_for_backward(0..k.rows(), k, v);
            for earlier in 1..document.paragraphs.len() {
                let rows = bounds.rows(document.paragraphs.start + earlier);
                let before = rows.start - document.start;
                for (member, queries, local) in panels(rows, shape) {
                    let head = kv_head * group + member;
                    let dq = dq.block(before + local.start..before + local.end, member * d..(member + 1) * d);
                    let saved = Saved::new(out, dout, lse, &shape, head, queries.clone());
                    Panel::new(&layer, head, queries).backward_more(&layer, &mut keys, earlier, &saved, dq);
                }
            }
            Some(summaries.backward(&layer, &keys, &pool[kv_head * d..(kv_head + 1) * d], &mut dk, &mut dv))
        })
        .collect();
    // Document after document, whatever thread was first.
    for (task, of_task) in of_tasks.iter().enumerate() {
        let kv_head = task % shape.kv_heads;
        if let Some(of_task) = of_task {
            dpool[kv_head * d..(kv_head + 1) * d].iter_mut().zip(of_task).for_each(|(sum, part)| *sum += part);
        }
    }
}

/// The document of each paragraph.
fn document_of_paragraph(documents: &[Document]) -> Vec<usize> {
    documents.iter().enumerate().flat_map(|(index, document)| document.paragraphs.clone().map(move |_| index)).collect()
}

/// Up to 32 queries of each head of a group: its number, the queries' rows, and where these are among `rows`.
fn panels(rows: Range<usize>, shape: Shape) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
    (0..shape.group()).flat_map(move |member| {
        let (start, end) = (rows.start, rows.end);
        (start..end).step_by(QUERIES).map(move |first| {
            let queries = first..(first + QUERIES).min(end);
            (member, queries.clone(), queries.start - start..queries.end - start)
        })
    })
}

/// The summaries of all paragraphs of a document but the last, for one key head.
struct Summaries {
    kv_head: usize,
    /// Of each paragraph, its rows.
    rows: Vec<Range<usize>>,
    /// a of each token of theirs.
    weights: Vec<f32>,
    /// `[n, d]`, turned by the position of the paragraph's last token.
    keys: Scratch,
    /// `[n, d]`.
    values: Scratch,
}

impl Summaries {
    /// `None` where there is one paragraph at most.
    fn new(layer: &Layer<'_>, bounds: Bounds<'_>, document: &Document, kv_head: usize, pool: &[f32]) -> Option<Self> {
        let n = document.paragraphs.len().checked_sub(1).filter(|&n| n > 0)?;
        let d = layer.shape.head_dim;
        let u = &pool[kv_head * d..(kv_head + 1) * d];
        let rows: Vec<_> = (document.paragraphs.start..document.paragraphs.start + n).map(|paragraph| bounds.rows(paragraph)).collect();
        let mut weights = Vec::with_capacity(rows[n - 1].end - document.start);
        let (mut keys, mut values) = (Scratch::take(n * d), Scratch::take(n * d));
        for ((rows, key), value) in rows.iter().zip(keys.chunks_exact_mut(d)).zip(values.chunks_exact_mut(d)) {
            let (k, v) = (layer.k(kv_head, rows.clone()), layer.v(kv_head, rows.clone()));
            let first = weights.len();
            weights.extend((0..rows.len()).map(|row| row::dot(u, k.row(row)) * layer.shape.scale()));
            let weights = &mut weights[first..];
            let (_, sum) = row::exponentials(weights);
            row::scale(weights, 1.0 / sum);
            key.fill(0.0);
            value.fill(0.0);
            for (row, &weight) in weights.iter().enumerate() {
                row::add_scaled(key, k.row(row), weight);
                row::add_scaled(value, v.row(row), weight);
            }
            layer.table.rotate_row(key, rows.end - 1 - layer.start, false);
        }
        Some(Summaries { kv_head, rows, weights, keys, values })
    }

    fn matrices(&self, d: usize) -> (Mat<'_>, Mat<'_>) {
        let n = self.rows.len();
        (Mat::new(&self.keys, n, d), Mat::new(&self.values, n, d))
    }

    /// Adds to dk and dv of the document what reaches them through the summaries, whose gradients are in `keys`; returns that of u.
    /// With g = dk̄·k + dv̄·v of each token: ds = a·(g − Σ a·g)/√d, dk += a·dk̄ + ds·u, dv += a·dv̄, du = Σ ds·k.
    fn backward(&self, layer: &Layer<'_>, keys: &Keys, u: &[f32], dk: &mut MatMut<'_>, dv: &mut MatMut<'_>) -> Vec<f32> {
        let d = u.len();
        let (mut du, mut of_key) = (vec![0.0; d], Scratch::take(d));
        let mut weights = &self.weights[..];
        for (summary, rows) in self.rows.iter().enumerate() {
            let (own, rest) = weights.split_at(rows.len());
            weights = rest;
            let (turned, of_value) = keys.gradients_of(summary, d);
            of_key.copy_from_slice(turned);
            layer.table.rotate_row(&mut of_key, rows.end - 1 - layer.start, true);
            let (k, v) = (layer.k(self.kv_head, rows.clone()), layer.v(self.kv_head, rows.clone()));
            let reaches: Vec<f32> = (0..rows.len()).map(|row| row::dot(&of_key, k.row(row)) + row::dot(of_value, v.row(row))).collect();
            let mean: f32 = own.iter().zip(&reaches).map(|(a, g)| a * g).sum();
            for (row, (&a, &g)) in own.iter().zip(&reaches).enumerate() {
                let ds = a * (g - mean) * layer.shape.scale();
                let place = rows.start - layer.start + row;
                row::add_scaled(dk.row_mut(place), &of_key, a);
                row::add_scaled(dk.row_mut(place), u, ds);
                row::add_scaled(dv.row_mut(place), of_value, a);
                row::add_scaled(&mut du, k.row(row), ds);
            }
        }
        du
    }
}

#[cfg(test)]
mod tests {
    use super::super::scalar;
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

    struct Case {
        qkv: Vec<f32>,
        pool: Vec<f32>,
        dout: Vec<f32>,
        table: RopeTable,
    }

    fn case(t: usize, shape: Shape) -> Case {
        let mut random = Random::new(12);
        let table = RopeTable::new(10_000.0, shape.head_dim, t);
        let (qkv, pool) = (random.vec(t * shape.qkv_width(), 2.0), random.vec(shape.kv_width(), 2.0));
        Case { qkv, pool, dout: random.vec(t * shape.q_width(), 1.0), table }
    }

    fn run(case: &Case, bounds: Bounds<'_>, shape: Shape) -> [Vec<f32>; 4] {
        let Case { qkv, pool, dout, table } = case;
        let t = qkv.len() / shape.qkv_width();
        let (mut out, mut lse) = (vec![f32::NAN; dout.len()], vec![f32::NAN; t * shape.q_heads]);
        forward(&mut out, &mut lse, qkv, pool, bounds, table, shape);
        let (mut dqkv, mut dpool) = (vec![f32::NAN; qkv.len()], vec![f32::NAN; pool.len()]);
        backward(&mut dqkv, &mut dpool, qkv, pool, &out, &lse, dout, bounds, table, shape);
        [out, lse, dqkv, dpool]
    }

    /// Documents and their paragraphs.
    const TEXTS: [(&[u32], &[u32]); 6] = [
        (&[0], &[0]),
        (&[0, 7], &[0, 7]),
        (&[0, 9], &[0, 4, 9]),
        (&[0, 5, 5, 130], &[0, 1, 5, 40, 41, 77, 130]),
        (&[0, 300], &[0, 100, 133, 140, 299, 300]),
        (&[0, 60, 61, 90], &[0, 20, 40, 60, 61, 75, 90]),
    ];

    #[test]
    fn equals_the_plain_loops() {
        for (q_heads, kv_heads, head_dim) in [(1, 1, 2), (4, 2, 10), (3, 3, 16), (2, 1, 80), (6, 2, 32)] {
            for (cu_seqlens, paragraphs) in TEXTS {
                let (shape, bounds) = (Shape { q_heads, kv_heads, head_dim }, Bounds { cu_seqlens, paragraphs });
                let case = case(bounds.own().tokens(), shape);
                let [out, lse, ..] = run(&case, bounds, shape);
                let expected = scalar::paragraphs(&wide(&case.qkv), &wide(&case.pool), bounds, &case.table, shape);
                assert_close("out", &out, &narrow(&expected.out), 2e-5);
                assert_close("lse", &lse, &narrow(&expected.lse), 2e-5);
            }
        }
    }

    #[test]
    fn gradients_equal_differences() {
        for (q_heads, kv_heads) in [(2, 1), (2, 2)] {
            let shape = Shape { q_heads, kv_heads, head_dim: 4 };
            for (cu_seqlens, paragraphs) in [(&[0, 9][..], &[0, 3, 4, 9][..]), (&[0, 4, 13], &[0, 2, 4, 7, 8, 13])] {
                let bounds = Bounds { cu_seqlens, paragraphs };
                let case = case(bounds.own().tokens(), shape);
                let [_, _, dqkv, dpool] = run(&case, bounds, shape);
                let loss =
                    |qkv: &[f64], pool: &[f64]| weighted_sum(&scalar::paragraphs(qkv, pool, bounds, &case.table, shape).out, &case.dout);
                assert_gradient("dqkv", &dqkv, &case.qkv, |qkv| loss(qkv, &wide(&case.pool)));
                assert_gradient("dpool", &dpool, &case.pool, |pool| loss(&wide(&case.qkv), pool));
            }
        }
    }

    /// Many more summaries and queries than one block or panel holds.
    #[test]
    fn long_documents_have_the_gradients_of_short_steps() {
        let shape = Shape { q_heads: 1, kv_heads: 1, head_dim: 2 };
        let paragraphs: Vec<u32> = (0..=270).map(|paragraph| paragraph * 2).chain([600]).collect();
        let bounds = Bounds { cu_seqlens: &[0, 600], paragraphs: &paragraphs };
        let case = case(600, shape);
        let [out, _, dqkv, dpool] = run(&case, bounds, shape);
        let of = |qkv: &[f64], pool: &[f64]| scalar::paragraphs(qkv, pool, bounds, &case.table, shape).out;
        assert_close("out", &out, &narrow(&of(&wide(&case.qkv), &wide(&case.pool))), 2e-5);
        let loss = |qkv: &[f64], pool: &[f64]| weighted_sum(&of(qkv, pool), &case.dout);
        assert_gradient("dpool", &dpool, &case.pool, |pool| loss(&wide(&case.qkv), pool));
        // Some of the elements, each a whole pass: of the first paragraph, of the middle and of the end.
        for place in [0, 3, 5, 1200, 1205, 3595, 3599] {
            let moved = |delta: f64| {
                let mut qkv = wide(&case.qkv);
                qkv[place] += delta;
                loss(&qkv, &wide(&case.pool))
            };
            let numerical = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!(
                (numerical - f64::from(dqkv[place])).abs() < 2e-4 * numerical.abs().max(1.0),
                "{place}: {} for {numerical}",
                dqkv[place]
            );
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let shape = Shape { q_heads: 4, kv_heads: 2, head_dim: 16 };
        let (cu_seqlens, paragraphs) = TEXTS[3];
        let bounds = Bounds { cu_seqlens, paragraphs };
        let case = case(bounds.own().tokens(), shape);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| run(&case, bounds, shape))
        };
        assert_eq!(on(1), on(3));
    }
}
