//! Products whose operands are quantised to 8 bits in blocks along k and whose result is of single precision: about four times as fast as those of
//! single precision, where the processor has an instruction for it. Scales per block as in Jetfire (arXiv 2403.12422).

use rayon::prelude::*;

use super::gemm::{Threads, Update, task_shape};
use super::matrix::MatMut;
use super::quantised::Packed8;
use super::tile::{COLS, ROWS};
use super::tile_i8::tile;

/// A left operand of an 8-bit product, `[m, k]`.
pub type Left8 = Packed8<ROWS, false>;
/// A right operand, transposed, `[n, k]`.
pub type Right8 = Packed8<COLS, true>;

/// c = a·b or c += a·b, for a `[m, k]` and b transposed, `[n, k]`. Both must have been stacked from parts of the same lengths along k.
pub fn product_packed8(c: MatMut<'_>, a: &Left8, b: &Right8, update: Update, threads: Threads) {
    let (m, n, _) = c.layout();
    let k = a.k();
    assert!(a.rows() == m && b.k() == k && b.rows() == n, "[{m}, {n}] = [{}, {k}] x [{}, {}]", a.rows(), b.k(), b.rows());
    assert!(a.starts() == b.starts(), "operands of an 8-bit product stacked from unlike parts");
    let (task_rows, task_cols) = task_shape(m, n);
    let tasks = c.cut(task_rows, task_cols);
    let run = |(row, col, mut c): (usize, usize, MatMut<'_>)| {
        let (rows, cols, _) = c.layout();
        if k == 0 && update == Update::Set {
            c.fill(0.0);
        }
        for block in 0..a.starts().len() - 1 {
            let update = if block == 0 { update } else { Update::Add };
            for j in (0..cols).step_by(COLS) {
                let b = b.panel((col + j) / COLS, block);
                for i in (0..rows).step_by(ROWS) {
                    let a = a.panel((row + i) / ROWS, block);
                    tile(&mut c.block(i..(i + ROWS).min(rows), j..(j + COLS).min(cols)), a, b, update);
                }
            }
        }
    };
    match threads {
        Threads::One => tasks.into_iter().for_each(run),
        Threads::All => tasks.into_par_iter().for_each(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::matrix::Mat;
    use crate::arch::quantised::Rounding;
    use crate::matmul::scalar::matmul;
    use crate::testing::{Random, assert_close};

    /// The product of the dequantised operands, by plain loops, is the same product: nothing is lost beyond the rounding of the operands.
    #[test]
    fn equals_the_plain_loops_over_the_rounded_operands() {
        let mut random = Random::new(32);
        for (m, n, k) in [(1, 1, 1), (12, 32, 4), (13, 33, 5), (30, 70, 256), (25, 65, 515), (64, 200, 1030), (3, 4, 0)] {
            let (a, b, start) = (random.vec(m * k, 1.0), random.vec(n * k, 1.0), random.vec(m * n, 1.0));
            for rounding in [Rounding::Nearest, Rounding::Stochastic] {
                let left = Left8::new(Mat::new(&a, m, k), rounding, Threads::One);
                let right = Right8::new(Mat::new(&b, n, k), rounding, Threads::One);
                let (x, y) = (left.dequantised(), right.dequantised());
                let expected = matmul(|i, l| x[i * k + l], |l, j| y[j * k + l], m, n, k);
                for update in [Update::Set, Update::Add] {
                    let mut c = start.clone();
                    product_packed8(MatMut::new(&mut c, m, n), &left, &right, update, Threads::All);
                    let expected: Vec<f32> =
                        expected.iter().zip(&start).map(|(e, s)| if update == Update::Add { e + s } else { *e }).collect();
                    assert_close("c", &c, &expected, 2e-6);
                }
            }
        }
    }
}
