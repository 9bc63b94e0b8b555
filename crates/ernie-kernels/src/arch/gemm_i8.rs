//! Products whose operands are quantised to 8 bits in blocks along k and whose result is of single precision: about four times as fast as those of
//! single precision where the processor has an instruction for it, faster still where it has tiles. Scales per block as in Jetfire (arXiv 2403.12422).

use super::ahead::Ahead;
use super::amx::Tiles;
use super::gemm::{Product, Threads, Update, for_each_tile};
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
    for_each_tile(c, &Bytes { a, b }, update, threads);
}

/// The two operands.
struct Bytes<'a> {
    a: &'a Left8,
    b: &'a Right8,
}

impl Product for Bytes<'_> {
    type Task = Option<Tiles>;

    fn parts(&self) -> usize {
        self.a.starts().len() - 1
    }

    fn begin(&self) -> Option<Tiles> {
        Tiles::shaped()
    }

    /// Nothing: it was measured to be slower (LOG.md).
    fn left(&self, _: usize, _: usize) -> &[u8] {
        &[]
    }

    fn right(&self, _: usize, _: usize) -> &[u8] {
        &[]
    }

    #[inline(always)]
    fn tile(&self, tiles: &Option<Tiles>, c: &mut MatMut<'_>, (row, col): (usize, usize), part: usize, update: Update, ahead: Ahead) {
        ahead.tile_at_once();
        tile(c, self.a.panel(row, part), self.b.panel(col, part), update, tiles.as_ref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::matrix::Mat;
    use crate::arch::quantised::{BLOCK, Rounding};
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

    /// Several values that are no numbers, or infinite, in one block of a row of either operand make its products no numbers, and no others.
    #[test]
    fn what_is_not_a_number_stays_none_in_products() {
        let (m, n, k) = (14, 35, 70);
        for rounding in [Rounding::Nearest, Rounding::Stochastic] {
            for by_columns in [false, true] {
                let packed = |rows: usize, bad: usize| {
                    let mut x = vec![0.5f32; rows * k];
                    for (l, value) in [(3, f32::NAN), (4, f32::NAN), (17, f32::INFINITY), (68, -f32::NAN)] {
                        x[if by_columns { l * rows + bad } else { bad * k + l }] = value;
                    }
                    x
                };
                let (a, b) = (packed(m, 13), packed(n, 5));
                let view = |x, rows| if by_columns { Mat::new(x, k, rows).t() } else { Mat::new(x, rows, k) };
                let left = Left8::new(view(&a, m), rounding, Threads::One);
                let right = Right8::new(view(&b, n), rounding, Threads::One);
                let mut c = vec![0.0; m * n];
                product_packed8(MatMut::new(&mut c, m, n), &left, &right, Update::Set, Threads::One);
                for (place, c) in c.iter().enumerate() {
                    assert_eq!(c.is_nan(), place / n == 13 || place % n == 5, "element {place}, {rounding:?}, by columns: {by_columns}");
                }
            }
        }
    }

    /// Integers times a power of two for each row, which 8 bits hold without rounding: each block of a row has a ±127, so that its scale is that power. Returns
    /// the values, the integers and the powers.
    fn exact(random: &mut Random, rows: usize, k: usize) -> (Vec<f32>, Vec<i32>, Vec<f32>) {
        let powers: Vec<f32> = (0..rows).map(|_| 2f32.powi(random.below(5) as i32 - 2)).collect();
        let mut integers: Vec<i32> = (0..rows * k).map(|_| random.below(255) as i32 - 127).collect();
        for block in integers.chunks_exact_mut(k).flat_map(|row| row.chunks_mut(BLOCK)) {
            block[random.below(block.len())] = if random.below(2) == 0 { 127 } else { -127 };
        }
        let values = integers.iter().enumerate().map(|(place, &q)| q as f32 * powers[place / k]).collect();
        (values, integers, powers)
    }

    /// Sums below 2²⁴ times powers of two are f32 to the last bit, so every instruction set gives these very numbers (`testing.rs` runs the tests on the lesser
    /// ones): all heights of a tile and one more, columns at and around its halves and its end.
    #[test]
    fn sums_of_whole_numbers_are_exact_at_every_edge_of_a_tile() {
        let mut random = Random::new(33);
        for k in [1, 4, 7, 61, 65, 252, 256, 300] {
            for n in [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64] {
                let (b, whole_b, powers_b) = exact(&mut random, n, k);
                let right = Right8::new(Mat::new(&b, n, k), Rounding::Nearest, Threads::One);
                for m in 1..=13 {
                    let (a, whole_a, powers_a) = exact(&mut random, m, k);
                    let left = Left8::new(Mat::new(&a, m, k), Rounding::Nearest, Threads::One);
                    let mut expected = vec![0.0; m * n];
                    for (place, expected) in expected.iter_mut().enumerate() {
                        let (i, j) = (place / n, place % n);
                        let sum: i32 = (0..k).map(|l| whole_a[i * k + l] * whole_b[j * k + l]).sum();
                        *expected = sum as f32 * (powers_a[i] * powers_b[j]);
                    }
                    let mut c = vec![f32::NAN; m * n];
                    product_packed8(MatMut::new(&mut c, m, n), &left, &right, Update::Set, Threads::One);
                    assert_eq!(c, expected, "[{m}, {n}, {k}]");
                    // Its negative is added to it, which leaves nothing.
                    let negative: Vec<f32> = a.iter().map(|a| -a).collect();
                    let left = Left8::new(Mat::new(&negative, m, k), Rounding::Nearest, Threads::One);
                    product_packed8(MatMut::new(&mut c, m, n), &left, &right, Update::Add, Threads::One);
                    assert!(c.iter().all(|&c| c == 0.0), "[{m}, {n}, {k}] and its negative");
                }
            }
        }
    }
}
