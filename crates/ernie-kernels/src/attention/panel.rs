//! One panel of queries of one head against the keys it sees, forwards and backwards.
//!
//! Letters: n keys of a block, 32 queries; matrices whose columns are queries are `[·, 32]`.

#![allow(clippy::needless_range_loop)] // indices name lanes side by side; iterators would hide which

use std::ops::Range;

use super::{Layer, Shape};
use crate::arch::exp::exp;
use crate::arch::isa::simd_fn;
use crate::arch::matrix::{Mat, MatMut};
use crate::arch::pack::{Packed, panel_of, transpose};
use crate::arch::tile::{COLS, ROWS, Update, tile};
use crate::row::dot;
use crate::scratch::Scratch;

/// Queries of a panel.
pub(super) const QUERIES: usize = COLS;
/// Rows of the panels that hold values and keys by their elements: it divides the usual sizes of a head.
const ELEMENTS: usize = 8;
/// Keys whose scores and gradients are at hand together in the backward pass: 24 KiB each.
const BLOCK_KEYS: usize = 16 * ROWS;
/// Keys whose values are multiplied in one go in the forward pass: 32 KiB of probabilities.
const BLOCK_VALUES: usize = 256;

/// Keys and values of one key/value head in the forms the products need; row numbers count from the first of them.
pub(super) struct Keys {
    rows: Range<usize>,
    /// Rotated keys, `[n, d]`.
    k: Packed<ROWS>,
    /// Values by element, `[d, n]`; forward only.
    v_by_element: Option<Packed<ELEMENTS>>,
    backward: Option<BackwardKeys>,
}

struct BackwardKeys {
    /// Values, `[n, d]`.
    v: Packed<ROWS>,
    /// Rotated keys by element, `[d, n]`.
    k_by_element: Packed<ELEMENTS>,
    /// Sums of the gradients, `[n rounded up, d rounded up]`.
    dk: Scratch,
    dv: Scratch,
    width: usize,
}

impl Keys {
    pub(super) fn for_forward(layer: &Layer<'_>, kv_head: usize, rows: Range<usize>) -> Self {
        let rotated = rotated(layer, layer.k(kv_head, rows.clone()), rows.start, 1.0);
        Self::packed_for_forward(rows.clone(), Mat::new(&rotated, rows.len(), layer.shape.head_dim), layer.v(kv_head, rows))
    }

    /// Of rotated keys and of values, both `[n, d]`.
    pub(super) fn packed_for_forward(rows: Range<usize>, k: Mat<'_>, v: Mat<'_>) -> Self {
        Keys { rows, k: Packed::new(k, ONE), v_by_element: Some(Packed::new(v.t(), ONE)), backward: None }
    }

    pub(super) fn for_backward(layer: &Layer<'_>, kv_head: usize, rows: Range<usize>) -> Self {
        let rotated = rotated(layer, layer.k(kv_head, rows.clone()), rows.start, 1.0);
        Self::packed_for_backward(rows.clone(), Mat::new(&rotated, rows.len(), layer.shape.head_dim), layer.v(kv_head, rows))
    }

    /// Of rotated keys and of values, both `[n, d]`.
    pub(super) fn packed_for_backward(rows: Range<usize>, k: Mat<'_>, v: Mat<'_>) -> Self {
        let (n, d) = (k.rows(), k.cols());
        let width = d.next_multiple_of(COLS);
        let zeros = || {
            let mut sums = Scratch::take(n.next_multiple_of(ROWS) * width);
            sums.fill(0.0);
            sums
        };
        let v = Packed::new(v, ONE);
        let backward = BackwardKeys { v, k_by_element: Packed::new(k.t(), ONE), dk: zeros(), dv: zeros(), width };
        Keys { rows, k: Packed::new(k, ONE), v_by_element: None, backward: Some(backward) }
    }

    /// Sums of the gradients of row `row`: of its rotated key, and of its value.
    pub(super) fn gradients_of(&self, row: usize, d: usize) -> (&[f32], &[f32]) {
        let sums = self.backward.as_ref().expect("keys made for the backward pass");
        let place = row * sums.width..row * sums.width + d;
        (&sums.dk[place.clone()], &sums.dv[place])
    }

    /// Writes the sums of the gradients; so far dk is that of the rotated keys, and the gradient of a rotation is the rotation back.
    pub(super) fn write_gradients(&self, layer: &Layer<'_>, dk: &mut MatMut<'_>, dv: &mut MatMut<'_>) {
        for row in 0..self.rows.len() {
            let (of_key, of_value) = self.gradients_of(row, layer.shape.head_dim);
            dv.row_mut(row).copy_from_slice(of_value);
            let dk = dk.row_mut(row);
            dk.copy_from_slice(of_key);
            layer.table.rotate_row(dk, self.rows.start + row - layer.start, true);
        }
    }
}

const ONE: crate::arch::gemm::Threads = crate::arch::gemm::Threads::One;

/// The rows of x, which start at row `first` of the batch, times `scale`, rotated by their positions.
fn rotated(layer: &Layer<'_>, x: Mat<'_>, first: usize, scale: f32) -> Scratch {
    let d = layer.shape.head_dim;
    let mut rotated = Scratch::take(x.rows() * d);
    for (row, rotated) in rotated.chunks_exact_mut(d).enumerate() {
        rotated.copy_from_slice(x.row(row));
        layer.table.rotate_row(rotated, first + row - layer.start, false);
        if scale != 1.0 {
            crate::row::scale(rotated, scale);
        }
    }
    rotated
}

/// Up to 32 queries of one head, rotated and multiplied by 1/√d.
pub(super) struct Panel {
    queries: Range<usize>,
    /// `[32, d]`, zeros below the last query.
    rows: Scratch,
    /// The same by element, `[d, 32]`.
    by_element: Scratch,
}

impl Panel {
    pub(super) fn new(layer: &Layer<'_>, head: usize, queries: Range<usize>) -> Self {
        let rows = rotated(layer, layer.q(head, queries.clone()), queries.start, layer.shape.scale());
        let by_element = by_element(Mat::new(&rows, queries.len(), layer.shape.head_dim));
        Panel { queries, rows, by_element }
    }

    /// Blocks of `size` keys, as rows of `keys`, that cover what the panel sees. `size` is a multiple of [`ROWS`], and so is every start.
    fn blocks(&self, layer: &Layer<'_>, keys: &Keys, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let first = layer.mask.first_seen(layer.start, self.queries.start) - keys.rows.start;
        let (first, end) = (first / ROWS * ROWS, self.queries.end - keys.rows.start);
        (first..end).step_by(size).map(move |start| start..start.saturating_add(size).min(end))
    }

    /// `scores[n, 32]` of the keys `block`, its rows rounded up to whole tiles.
    fn scores(&self, scores: &mut [f32], keys: &Packed<ROWS>, block: Range<usize>) {
        products(scores, keys, block, &self.by_element);
    }

    /// Puts `value` where a query does not see a key.
    fn mask(&self, layer: &Layer<'_>, keys: &Keys, scores: &mut [f32], block: Range<usize>, value: f32) {
        let window = layer.mask.window.unwrap_or(usize::MAX);
        for (key, row) in (keys.rows.start + block.start..).zip(scores.chunks_exact_mut(QUERIES)) {
            let last = self.queries.start + QUERIES - 1;
            if key <= self.queries.start && last - key < window {
                continue;
            }
            for (query, score) in (self.queries.start..).zip(row) {
                if key > query || query - key >= window {
                    *score = value;
                }
            }
        }
    }

    /// Writes the panel's rows of out and lse (one column).
    pub(super) fn forward(&self, layer: &Layer<'_>, keys: &Keys, mut out: MatMut<'_>, mut lse: MatMut<'_>) {
        let d = layer.shape.head_dim;
        let Some(all) = self.blocks(layer, keys, usize::MAX / ROWS * ROWS).next() else { return };
        let mut p = Scratch::take(all.len().next_multiple_of(ROWS) * QUERIES);
        self.scores(&mut p, &keys.k, all.clone());
        self.mask(layer, keys, &mut p, all.clone(), f32::NEG_INFINITY);
        let p_rows = &mut p[..all.len() * QUERIES];
        let (mut maxima, mut sums) = ([f32::NEG_INFINITY; QUERIES], [0.0; QUERIES]);
        column_maxima(&mut maxima, p_rows);
        // A query of the last panel beyond the last token may see nothing; no one reads its column.
        maxima.iter_mut().filter(|max| **max == f32::NEG_INFINITY).for_each(|max| *max = 0.0);
        exponentials(p_rows, &maxima);
        self.mask(layer, keys, p_rows, all.clone(), 0.0);
        column_sums(&mut sums, p_rows);

        let values = keys.v_by_element.as_ref().expect("keys made for the forward pass");
        let mut out_by_element = Scratch::take(d.next_multiple_of(ELEMENTS) * QUERIES);
        for from in (0..all.len()).step_by(BLOCK_VALUES) {
            let n = BLOCK_VALUES.min(all.len() - from);
            let update = if from == 0 { Update::Set } else { Update::Add };
            by_element_product(&mut out_by_element, values, all.start + from, &p[from * QUERIES..], n, update);
        }
        let mut inverse = [0.0; QUERIES];
        for (query, inverse) in inverse.iter_mut().enumerate().take(self.queries.len()) {
            *inverse = 1.0 / sums[query];
            lse.row_mut(query)[0] = maxima[query] + sums[query].ln();
        }
        write_rows(&mut out, &out_by_element, &inverse);
    }

    /// Writes the panel's rows of dq and adds its part of dk and dv to `keys`:
    /// p = exp(scores − lse), dv += pᵀ·dout, ds = p·(dout·vᵀ − Σ out·dout), dq = ds·k/√d, dk += dsᵀ·q/√d.
    pub(super) fn backward(&self, layer: &Layer<'_>, keys: &mut Keys, saved: &Saved, mut dq: MatMut<'_>) {
        let d = layer.shape.head_dim;
        let mut dq_by_element = Scratch::take(d.next_multiple_of(ELEMENTS) * QUERIES);
        let (mut p, mut ds) = (Scratch::take(BLOCK_KEYS * QUERIES), Scratch::take(BLOCK_KEYS * QUERIES));
        let q = right_operand(Mat::new(&self.rows, self.queries.len(), d));
        let mut update = Update::Set;
        for block in self.blocks(layer, keys, BLOCK_KEYS) {
            let rows = block.len().next_multiple_of(ROWS);
            let (p, ds) = (&mut p[..rows * QUERIES], &mut ds[..rows * QUERIES]);
            self.scores(p, &keys.k, block.clone());
            self.mask(layer, keys, p, block.clone(), f32::NEG_INFINITY);
            let sums = keys.backward.as_mut().expect("keys made for the backward pass");
            products(ds, &sums.v, block.clone(), &saved.dout_by_element);
            score_gradients(p, ds, &saved.lse, &saved.delta);
            add_by_key(&mut sums.dv, sums.width, block.start, p, &saved.dout);
            add_by_key(&mut sums.dk, sums.width, block.start, ds, &q);
            by_element_product(&mut dq_by_element, &sums.k_by_element, block.start, ds, block.len(), update);
            update = Update::Add;
        }
        write_rows(&mut dq, &dq_by_element, &[layer.shape.scale(); QUERIES]);
        for (row, query) in self.queries.clone().enumerate() {
            layer.table.rotate_row(dq.row_mut(row), query - layer.start, true);
        }
    }
}

impl Panel {
    /// Takes the first `n` of `keys`, all of which every query sees, into the panel's rows of out and lse.
    pub(super) fn forward_more(&self, keys: &Keys, n: usize, mut out: MatMut<'_>, mut lse: MatMut<'_>) {
        let d = out.row_mut(0).len();
        let mut p = Scratch::take(n.next_multiple_of(ROWS) * QUERIES);
        products(&mut p, &keys.k, 0..n, &self.by_element);
        let p = &mut p[..n * QUERIES];
        // Columns beyond the last query: any numbers, which no one reads.
        let (mut maxima, mut sums) = ([0.0f32; QUERIES], [1.0f32; QUERIES]);
        for query in 0..self.queries.len() {
            maxima[query] = lse.row_mut(query)[0];
        }
        column_maxima(&mut maxima, p);
        for query in 0..self.queries.len() {
            sums[query] = (lse.row_mut(query)[0] - maxima[query]).exp();
        }
        let own = sums;
        exponentials(p, &maxima);
        column_sums(&mut sums, p);
        let values = keys.v_by_element.as_ref().expect("keys made for the forward pass");
        let mut out_by_element = Scratch::take(d.next_multiple_of(ELEMENTS) * QUERIES);
        for from in (0..n).step_by(BLOCK_VALUES) {
            let update = if from == 0 { Update::Set } else { Update::Add };
            by_element_product(&mut out_by_element, values, from, &p[from * QUERIES..], BLOCK_VALUES.min(n - from), update);
        }
        let inverse = sums.map(|sum| 1.0 / sum);
        let mut more = Scratch::take(self.queries.len() * d);
        write_rows(&mut MatMut::new(&mut more, self.queries.len(), d), &out_by_element, &inverse);
        for (query, more) in more.chunks_exact(d).enumerate() {
            lse.row_mut(query)[0] = maxima[query] + sums[query].ln();
            let share = own[query] * inverse[query];
            for (out, more) in out.row_mut(query).iter_mut().zip(more) {
                *out = *out * share + more;
            }
        }
    }

    /// Adds to the panel's rows of dq what reaches them through the first `n` of `keys`, and to `keys` the panel's part of their gradients.
    pub(super) fn backward_more(&self, layer: &Layer<'_>, keys: &mut Keys, n: usize, saved: &Saved, mut dq: MatMut<'_>) {
        let d = layer.shape.head_dim;
        let rows = self.queries.len();
        let mut dq_by_element = Scratch::take(d.next_multiple_of(ELEMENTS) * QUERIES);
        let (mut p, mut ds) = (Scratch::take(BLOCK_KEYS * QUERIES), Scratch::take(BLOCK_KEYS * QUERIES));
        let q = right_operand(Mat::new(&self.rows, rows, d));
        let mut update = Update::Set;
        for block in (0..n).step_by(BLOCK_KEYS).map(|start| start..(start + BLOCK_KEYS).min(n)) {
            let padded = block.len().next_multiple_of(ROWS) * QUERIES;
            let (p, ds) = (&mut p[..padded], &mut ds[..padded]);
            self.scores(p, &keys.k, block.clone());
            p[block.len() * QUERIES..].fill(f32::NEG_INFINITY);
            let sums = keys.backward.as_mut().expect("keys made for the backward pass");
            products(ds, &sums.v, block.clone(), &saved.dout_by_element);
            score_gradients(p, ds, &saved.lse, &saved.delta);
            add_by_key(&mut sums.dv, sums.width, block.start, p, &saved.dout);
            add_by_key(&mut sums.dk, sums.width, block.start, ds, &q);
            by_element_product(&mut dq_by_element, &sums.k_by_element, block.start, ds, block.len(), update);
            update = Update::Add;
        }
        let mut more = Scratch::take(rows * d);
        write_rows(&mut MatMut::new(&mut more, rows, d), &dq_by_element, &[layer.shape.scale(); QUERIES]);
        for (row, more) in more.chunks_exact_mut(d).enumerate() {
            layer.table.rotate_row(more, self.queries.start + row - layer.start, true);
            for (dq, more) in dq.row_mut(row).iter_mut().zip(more.iter()) {
                *dq += more;
            }
        }
    }
}

/// What the backward pass reads of a panel's results.
pub(super) struct Saved {
    /// `[32]`, zero beyond the last query.
    lse: [f32; QUERIES],
    /// Σ out·dout, `[32]`.
    delta: [f32; QUERIES],
    /// dout by element, `[d, 32]`.
    dout_by_element: Scratch,
    /// dout as a right operand.
    dout: Scratch,
}

impl Saved {
    pub(super) fn new(out: Mat<'_>, dout: Mat<'_>, lse: &[f32], shape: &Shape, head: usize, queries: Range<usize>) -> Self {
        let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
        let (out, dout) = (out.rows_of(queries.clone()).columns(columns.clone()), dout.rows_of(queries.clone()).columns(columns));
        let mut saved = Saved { lse: [0.0; QUERIES], delta: [0.0; QUERIES], dout_by_element: by_element(dout), dout: right_operand(dout) };
        for (row, query) in queries.enumerate() {
            saved.lse[row] = lse[query * shape.q_heads + head];
            saved.delta[row] = dot(out.row(row), dout.row(row));
        }
        saved
    }
}

/// x `[≤ 32, d]` as `[d, 32]`.
fn by_element(x: Mat<'_>) -> Scratch {
    let mut packed = Scratch::take(x.cols() * QUERIES);
    panel_of::<QUERIES>(&mut packed, x, 0);
    packed
}

/// x `[≤ 32, d]` as the packed right operand of a product that sums over queries: `[d / 32, 32, 32]`, zeros below and beside it.
fn right_operand(x: Mat<'_>) -> Scratch {
    let mut packed = Scratch::take(x.cols().next_multiple_of(COLS) * QUERIES);
    for (panel, packed) in packed.chunks_exact_mut(QUERIES * COLS).enumerate() {
        let columns = panel * COLS..x.cols().min((panel + 1) * COLS);
        for (query, packed) in packed.chunks_exact_mut(COLS).enumerate() {
            let width = if query < x.rows() { columns.len() } else { 0 };
            if width > 0 {
                packed[..width].copy_from_slice(&x.row(query)[columns.clone()]);
            }
            packed[width..].fill(0.0);
        }
    }
    packed
}

/// `c[n, 32]` = rows `block` of `a[·, d]` · `b[d, 32]`, the rows of c rounded up to whole tiles.
fn products(c: &mut [f32], a: &Packed<ROWS>, block: Range<usize>, b: &[f32]) {
    for (tile_of_c, c) in c.chunks_exact_mut(ROWS * QUERIES).enumerate().take(block.len().div_ceil(ROWS)) {
        let a = a.panel(block.start / ROWS + tile_of_c, 0);
        tile::<ROWS, 1, ROWS>(&mut MatMut::new(c, ROWS, QUERIES), a, b, b.len() / QUERIES, Update::Set);
    }
}

/// `c[d, 32]` = or += `a[d, ·]`, its columns from `from` on, · `b[n, 32]`.
fn by_element_product(c: &mut [f32], a: &Packed<ELEMENTS>, from: usize, b: &[f32], n: usize, update: Update) {
    for (panel, c) in c.chunks_exact_mut(ELEMENTS * QUERIES).enumerate() {
        tile::<ELEMENTS, 1, ELEMENTS>(&mut MatMut::new(c, ELEMENTS, QUERIES), a.panel(panel, from), b, n, update);
    }
}

/// `sums[first.., d]` += `x[n, 32]` · the right operand `y[32, d]`.
fn add_by_key(sums: &mut [f32], width: usize, first: usize, x: &[f32], y: &[f32]) {
    let n = x.len() / QUERIES;
    let mut sums = MatMut::new(&mut sums[first * width..][..n * width], n, width);
    for (panel, y) in y.chunks_exact(QUERIES * COLS).enumerate() {
        for (row, x) in (0..n).step_by(ROWS).zip(x.chunks_exact(ROWS * QUERIES)) {
            let mut c = sums.block(row..row + ROWS, panel * COLS..(panel + 1) * COLS);
            tile::<ROWS, QUERIES, 1>(&mut c, x, y, QUERIES, Update::Add);
        }
    }
}

/// `rows[≤ 32, d]` = the columns of `x[d, 32]`, each times its factor.
fn write_rows(rows: &mut MatMut<'_>, x: &[f32], factors: &[f32; QUERIES]) {
    const PART: usize = 16;
    let d = rows.row_mut(0).len();
    let queries = rows.rows();
    let mut part = [0.0f32; PART * QUERIES];
    for first in (0..d).step_by(PART) {
        let width = PART.min(d - first);
        let elements: [&[f32]; PART] = std::array::from_fn(|i| if i < width { &x[(first + i) * QUERIES..][..QUERIES] } else { &[][..] });
        transpose::<PART>(&mut part, &elements, QUERIES);
        for query in 0..queries {
            let (to, from) = (&mut rows.row_mut(query)[first..first + width], &part[query * PART..][..PART]);
            if width == PART {
                for i in 0..PART {
                    to[i] = from[i] * factors[query];
                }
            } else {
                for i in 0..width {
                    to[i] = from[i] * factors[query];
                }
            }
        }
    }
}

simd_fn! {
    fn column_maxima<FMA>(maxima: &mut [f32; QUERIES], x: &[f32]) {
        let mut largest = *maxima;
        for row in x.chunks_exact(QUERIES) {
            for j in 0..QUERIES {
                // A value that is no number is passed over here; its exponential shows it again.
                largest[j] = if row[j] > largest[j] { row[j] } else { largest[j] };
            }
        }
        *maxima = largest;
    }
}

simd_fn! {
    fn column_sums<FMA>(sums: &mut [f32; QUERIES], x: &[f32]) {
        let mut totals = *sums;
        for row in x.chunks_exact(QUERIES) {
            for j in 0..QUERIES {
                totals[j] += row[j];
            }
        }
        *sums = totals;
    }
}

simd_fn! {
    /// x = exp(x − maximum of its column).
    fn exponentials<FMA>(x: &mut [f32], maxima: &[f32; QUERIES]) {
        for row in x.chunks_exact_mut(QUERIES) {
            for j in 0..QUERIES {
                row[j] = exp::<FMA>(row[j] - maxima[j]);
            }
        }
    }
}

simd_fn! {
    /// From p = scores (−∞ where nothing is seen) and ds = dout·vᵀ to p = probabilities and ds = p·(ds − delta).
    fn score_gradients<FMA>(p: &mut [f32], ds: &mut [f32], lse: &[f32; QUERIES], delta: &[f32; QUERIES]) {
        for (p, ds) in p.chunks_exact_mut(QUERIES).zip(ds.chunks_exact_mut(QUERIES)) {
            for j in 0..QUERIES {
                let seen = if p[j] == f32::NEG_INFINITY { 0.0 } else { 1.0 };
                p[j] = exp::<FMA>(p[j] - lse[j]) * seen;
                ds[j] = p[j] * (ds[j] - delta[j]);
            }
        }
    }
}
