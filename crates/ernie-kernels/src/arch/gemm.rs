//! Products of single precision: operands are packed once, then tiles of the result are computed from the packed panels.

use rayon::prelude::*;

use super::ahead::{Ahead, LINE};
use super::matrix::MatMut;
use super::pack::Packed;
use super::tile::{COLS, ROWS, tile_ahead};

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
    for_each_tile(c, &Single { a, b }, update, threads);
}

/// The two operands.
struct Single<'a> {
    a: &'a Packed<ROWS>,
    b: &'a Packed<COLS>,
}

impl Single<'_> {
    /// How long a part of k is.
    fn depth(&self, part: usize) -> usize {
        DEPTH.min(self.a.k() - part * DEPTH)
    }
}

impl Product for Single<'_> {
    type Task = ();

    fn parts(&self) -> usize {
        self.a.k().div_ceil(DEPTH)
    }

    fn begin(&self) {}

    fn left(&self, panel: usize, part: usize) -> &[u8] {
        bytemuck::cast_slice(&self.a.panel(panel, part * DEPTH)[..ROWS * self.depth(part)])
    }

    fn right(&self, panel: usize, part: usize) -> &[u8] {
        bytemuck::cast_slice(&self.b.panel(panel, part * DEPTH)[..COLS * self.depth(part)])
    }

    fn tile(&self, (): &(), c: &mut MatMut<'_>, (row, col): (usize, usize), part: usize, update: Update, ahead: Ahead) {
        let (a, b) = (self.a.panel(row, part * DEPTH), self.b.panel(col, part * DEPTH));
        tile_ahead::<ROWS, 1, ROWS>(c, a, b, self.depth(part), update, Some(ahead));
    }
}

/// A product of packed operands, whose k is cut into parts.
pub(super) trait Product: Sync {
    /// What a thread needs for its tiles.
    type Task;

    /// Into how many parts k is cut.
    fn parts(&self) -> usize;

    /// Called once for each task, on its thread.
    fn begin(&self) -> Self::Task;

    /// What to fetch before tiles of panel `panel` of a and one part of k are computed.
    fn left(&self, panel: usize, part: usize) -> &[u8];

    /// The same of b.
    fn right(&self, panel: usize, part: usize) -> &[u8];

    /// Sets c to the product of one part of two panels (of a, of b), or adds it, and fetches what will be needed next.
    fn tile(&self, task: &Self::Task, c: &mut MatMut<'_>, panels: (usize, usize), part: usize, update: Update, ahead: Ahead);
}

/// Computes all tiles of c. For a tile the parts come in order; without parts c is a sum of nothing.
pub(super) fn for_each_tile<P: Product>(c: MatMut<'_>, product: &P, update: Update, threads: Threads) {
    let (m, n, _) = c.layout();
    let (task_rows, task_cols) = task_shape(m, n);
    let tasks = c.cut(task_rows, task_cols);
    let run = |task| run_task(task, product, update);
    match threads {
        Threads::One => tasks.into_iter().for_each(run),
        Threads::All => tasks.into_par_iter().for_each(run),
    }
}

/// Computes the tiles of a block of c, which begins at row `row` and column `col`.
fn run_task<P: Product>((row, col, mut c): (usize, usize, MatMut<'_>), product: &P, update: Update) {
    let (rows, cols, _) = c.layout();
    let walk = Walk { down: rows.div_ceil(ROWS), across: cols.div_ceil(COLS), parts: product.parts() };
    if walk.parts == 0 && update == Update::Set {
        c.fill(0.0);
    }
    let (first_left, first_right) = (row / ROWS, col / COLS);
    let task = product.begin();
    for part in 0..walk.parts {
        let update = if part == 0 { update } else { Update::Add };
        for j in 0..walk.across {
            let right = walk.right_after(j, part).map_or(&[][..], |(j, part)| product.right(first_right + j, part));
            // A share of it with each tile of the column, in whole lines.
            let mut shares = right.chunks(right.len().div_ceil(walk.down).next_multiple_of(LINE).max(LINE));
            for i in 0..walk.down {
                let left = walk.left_after(i, j, part).map_or(&[][..], |(i, part)| product.left(first_left + i, part));
                let next = walk.tile_after(i, j, part).map(|next| tile_at(&mut c, next));
                let ahead = Ahead::new(next.as_ref(), [left, shares.next().unwrap_or(&[])]);
                product.tile(&task, &mut tile_at(&mut c, (i, j)), (first_left + i, first_right + j), part, update, ahead);
            }
        }
    }
}

/// The order of a task's tiles, and what is to be fetched while one is computed: for each part of k down one column of tiles after the other, so that a panel of b
/// stays in the first-level cache while all of a, in the second, passes by.
struct Walk {
    /// Tiles below each other.
    down: usize,
    /// Tiles beside each other.
    across: usize,
    parts: usize,
}

impl Walk {
    /// The tile after (i, j).
    fn tile_after(&self, i: usize, j: usize, part: usize) -> Option<(usize, usize)> {
        if i + 1 < self.down { Some((i + 1, j)) } else { self.right_after(j, part).map(|(j, _)| (0, j)) }
    }

    /// The panel of b after that of column j, and the part of k.
    fn right_after(&self, j: usize, part: usize) -> Option<(usize, usize)> {
        if j + 1 < self.across { Some((j + 1, part)) } else { (part + 1 < self.parts).then_some((0, part + 1)) }
    }

    /// A panel of a that has not been needed yet, and the part of k: the next one below, while the first column needs each for the first time, and in the last
    /// column the same one of the next part. A column that is both does the latter, and leaves the first part of a.
    fn left_after(&self, i: usize, j: usize, part: usize) -> Option<(usize, usize)> {
        if j + 1 == self.across && part + 1 < self.parts {
            Some((i, part + 1))
        } else {
            (part == 0 && j == 0 && i + 1 < self.down).then_some((i + 1, 0))
        }
    }
}

/// Tile (i, j) of c.
fn tile_at<'a>(c: &'a mut MatMut<'_>, (i, j): (usize, usize)) -> MatMut<'a> {
    let (rows, cols, _) = c.layout();
    let (row, col) = (i * ROWS, j * COLS);
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Nothing is fetched twice, nor after it was needed; and all is fetched but what the first tile needs and, of a single column whose k is in parts, the first
    /// part of a.
    #[test]
    fn all_that_a_task_needs_is_fetched_once_before() {
        for (down, across, parts) in [(1, 1, 1), (1, 1, 3), (1, 4, 1), (1, 2, 3), (5, 1, 1), (5, 1, 3), (16, 16, 1), (3, 2, 4)] {
            let walk = Walk { down, across, parts };
            let (mut tiles, mut lefts, mut rights) = (HashSet::from([(0, 0, 0)]), HashSet::from([(0, 0)]), HashSet::from([(0, 0)]));
            let first_part_unfetched = across == 1 && parts > 1;
            for part in 0..parts {
                for j in 0..across {
                    assert!(rights.contains(&(j, part)));
                    rights.extend(walk.right_after(j, part).inspect(|right| assert!(!rights.contains(right))));
                    for i in 0..down {
                        assert!(tiles.contains(&(i, j, part)));
                        assert!(lefts.contains(&(i, part)) || first_part_unfetched && part == 0);
                        if let Some((next_i, next_j)) = walk.tile_after(i, j, part) {
                            let next_part = part + usize::from((next_i, next_j) == (0, 0));
                            assert!(tiles.insert((next_i, next_j, next_part)));
                        }
                        if let Some(left) = walk.left_after(i, j, part) {
                            assert!(lefts.insert(left));
                        }
                    }
                }
            }
            assert_eq!(tiles.len(), down * across * parts);
            assert_eq!(rights.len(), across * parts);
            assert_eq!(lefts.len(), if first_part_unfetched { 1 + down * (parts - 1) } else { down * parts });
        }
    }
}
