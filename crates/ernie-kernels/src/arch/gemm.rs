//! Products of single precision: operands are packed once, then tiles of the result are computed from the packed panels.

use rayon::prelude::*;

use super::matrix::MatMut;
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
    /// The Rayon pool.
    All,
}

/// c = a·b, or c += a·b, of packed operands: a `[m, k]`, and b transposed, `[n, k]`.
pub fn product_packed(c: MatMut<'_>, a: &Packed<ROWS>, b: &Packed<COLS>, update: Update, threads: Threads) {
    let (m, n, _) = c.layout();
    let k = a.k();
    assert!(a.rows() == m && b.k() == k && b.rows() == n, "[{m}, {n}] = [{}, {k}] x [{}, {}]", a.rows(), b.k(), b.rows());
    for_each_tile(c, k.div_ceil(DEPTH), update, threads, || {
        |c: &mut MatMut<'_>, row, col, part, update| {
            let from = part * DEPTH;
            tile::<ROWS, 1, ROWS>(c, a.panel(row, from), b.panel(col, from), DEPTH.min(k - from), update);
        }
    });
}

/// Calls `begin` once for each task, on its thread, and what that returns with each tile of c, the panels of a and b it is the product of, each of the parts
/// that k is cut into, and whether that part is added: for a tile the parts come in order. Without parts c is a sum of nothing.
pub(super) fn for_each_tile<F: Fn(&mut MatMut<'_>, usize, usize, usize, Update)>(
    c: MatMut<'_>,
    parts: usize,
    update: Update,
    threads: Threads,
    begin: impl Fn() -> F + Sync,
) {
    let (m, n, _) = c.layout();
    let (task_rows, task_cols) = task_shape(m, n);
    let tasks = c.cut(task_rows, task_cols);
    let run = |(row, col, mut c): (usize, usize, MatMut<'_>)| {
        let (rows, cols, _) = c.layout();
        if parts == 0 && update == Update::Set {
            c.fill(0.0);
        }
        let compute = begin();
        let origins = (0..cols).step_by(COLS).flat_map(|j| (0..rows).step_by(ROWS).map(move |i| (i, j)));
        for part in 0..parts {
            let update = if part == 0 { update } else { Update::Add };
            let mut origins = origins.clone().peekable();
            while let Some(origin) = origins.next() {
                // The elements of a large matrix are not in a cache near by, and to wait for them may take longer than the tile.
                if let Some(&following) = origins.peek() {
                    tile_at(&mut c, following).prefetch();
                }
                let (i, j) = origin;
                compute(&mut tile_at(&mut c, origin), (row + i) / ROWS, (col + j) / COLS, part, update);
            }
        }
    };
    match threads {
        Threads::One => tasks.into_iter().for_each(run),
        Threads::All => tasks.into_par_iter().for_each(run),
    }
}

/// The tile whose first row and column these are.
fn tile_at<'a>(c: &'a mut MatMut<'_>, (row, col): (usize, usize)) -> MatMut<'a> {
    let (rows, cols, _) = c.layout();
    c.block(row..(row + ROWS).min(rows), col..(col + COLS).min(cols))
}

/// Rows and columns of a task: large, but with some tasks for each thread of a small machine.
fn task_shape(m: usize, n: usize) -> (usize, usize) {
    let (mut rows, mut cols) = (TASK_ROWS, TASK_COLS);
    while rows > 4 * ROWS && m.div_ceil(rows) * n.div_ceil(cols) < 12 {
        rows /= 2;
    }
    while cols > 4 * COLS && m.div_ceil(rows) * n.div_ceil(cols) < 12 {
        cols /= 2;
    }
    (rows, cols)
}
