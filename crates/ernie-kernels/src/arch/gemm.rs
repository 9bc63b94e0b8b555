//! Products of single precision: operands are packed once, then tiles of the result are computed from the packed panels.

use rayon::prelude::*;

use super::matrix::{Mat, MatMut};
use super::pack::Packed;
use super::tile::{COLS, ROWS, tile};

pub use super::tile::Update;

/// The part of k that one pass over a block of c sums: a panel of b (32 KiB) then stays in the first-level cache.
const DEPTH: usize = 256;
/// Rows of c of one task: its panels of a (192 KiB) stay in the second-level cache.
const TASK_ROWS: usize = 16 * ROWS;
/// Columns of c of one task.
const TASK_COLS: usize = 16 * COLS;

/// How many threads share a product. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone (inside a parallel loop).
    One,
    /// The Rayon pool, where the product is large enough to gain.
    All,
}

impl Threads {
    /// `One` where a product of so many multiplications is not worth waking another thread.
    fn for_work(self, multiplications: usize) -> Self {
        if multiplications < 1 << 16 { Threads::One } else { self }
    }
}

/// c = scale · a·b, or c += scale · a·b.
pub fn product(c: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, update: Update, threads: Threads) {
    let (m, n, _) = c.layout();
    let k = a.cols();
    assert!(a.rows() == m && b.rows() == k && b.cols() == n, "[{m}, {n}] = [{}, {k}] x [{}, {}]", a.rows(), b.rows(), b.cols());
    let threads = threads.for_work(m * n * k);
    if m > 0 && n > 0 {
        product_packed(c, &Packed::new(a, threads), &Packed::new(b.t(), threads), scale, update, threads);
    }
}

/// [`product`] of operands that are packed already: a `[m, k]`, and b transposed, `[n, k]`.
pub fn product_packed(c: MatMut<'_>, a: &Packed<ROWS>, b: &Packed<COLS>, scale: f32, update: Update, threads: Threads) {
    let (m, n, _) = c.layout();
    let k = a.k();
    assert!(a.rows() == m && b.k() == k && b.rows() == n, "[{m}, {n}] = [{}, {k}] x [{}, {}]", a.rows(), b.k(), b.rows());
    let (task_rows, task_cols) = task_shape(m, n);
    let tasks = c.cut(task_rows, task_cols);
    let run = |(row, col, mut c): (usize, usize, MatMut<'_>)| {
        let (rows, cols, _) = c.layout();
        if k == 0 && update == Update::Set {
            c.fill(0.0);
        }
        for from in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - from);
            let update = if from == 0 { update } else { Update::Add };
            for j in (0..cols).step_by(COLS) {
                let b = b.panel((col + j) / COLS, from);
                for i in (0..rows).step_by(ROWS) {
                    let a = a.panel((row + i) / ROWS, from);
                    let mut c = c.block(i..(i + ROWS).min(rows), j..(j + COLS).min(cols));
                    tile::<ROWS, 1, ROWS>(&mut c, a, b, depth, scale, update);
                }
            }
        }
    };
    match threads {
        Threads::One => tasks.into_iter().for_each(run),
        Threads::All => tasks.into_par_iter().for_each(run),
    }
}

/// Rows and columns of a task: large, but with some tasks for each thread of a small machine.
pub(super) fn task_shape(m: usize, n: usize) -> (usize, usize) {
    let (mut rows, mut cols) = (TASK_ROWS, TASK_COLS);
    while rows > 4 * ROWS && m.div_ceil(rows) * n.div_ceil(cols) < 12 {
        rows /= 2;
    }
    while cols > 4 * COLS && m.div_ceil(rows) * n.div_ceil(cols) < 12 {
        cols /= 2;
    }
    (rows, cols)
}
