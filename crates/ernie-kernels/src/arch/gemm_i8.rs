//! Products whose operands are quantised to 8 bits in blocks along k and whose result is of single precision: about four times as fast as those of
//! single precision, where the processor has an instruction for it. Scales per block as in Jetfire (arXiv 2403.12422).

use super::gemm::{Threads, Update, for_each_tile};
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
    for_each_tile(c, a.starts().len() - 1, update, threads, |c, row, col, block, update| {
        tile(c, a.panel(row, block), b.panel(col, block), update);
    });
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
