//! Matrix products whose operands are prepared once and used several times, in either precision.

use crate::arch::gemm::{Threads, Update, product_packed};
use crate::arch::gemm_i8::{Left8, Right8, product_packed8};
use crate::arch::matrix::{Mat, MatMut};
use crate::arch::pack::Packed;
use crate::arch::quantised::Rounding;
use crate::arch::tile::{COLS, ROWS};

/// How the large products of training are computed. Everything else is in f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands, products and sums in f32.
    #[default]
    F32,
    /// Operands rounded to 8 bits with a scale per row and 256 elements, gradients stochastically; products summed exactly, then in f32.
    Int8Mixed,
}

/// The left operand of a product, `[m, k]`, ready for use in several products.
pub enum Left {
    /// As it is.
    F32(Packed<ROWS>),
    /// Rounded.
    Int8(Left8),
}

impl Left {
    /// Matrices of equal height, one beside the other along k.
    pub fn new(parts: &[Mat<'_>], precision: Precision, rounding: Rounding, threads: Threads) -> Self {
        match precision {
            Precision::F32 => Left::F32(Packed::stacked(parts, threads)),
            Precision::Int8Mixed => Left::Int8(Left8::stacked(parts, rounding, threads)),
        }
    }
}

/// The right operand of a product, transposed, `[n, k]`, ready for use in several products.
pub enum Right {
    /// As it is.
    F32(Packed<COLS>),
    /// Rounded to nearest.
    Int8(Right8),
}

impl Right {
    /// Matrices of equal height, one beside the other along k; 8-bit ones are rounded to nearest.
    pub fn new(parts: &[Mat<'_>], precision: Precision, threads: Threads) -> Self {
        match precision {
            Precision::F32 => Right::F32(Packed::stacked(parts, threads)),
            Precision::Int8Mixed => Right::Int8(Right8::stacked(parts, Rounding::Nearest, threads)),
        }
    }
}

/// c = a·b or c += a·b. Operands of 8 bits must have been stacked from parts of the same lengths.
pub fn multiply(c: MatMut<'_>, a: &Left, b: &Right, update: Update, threads: Threads) {
    match (a, b) {
        (Left::F32(a), Right::F32(b)) => product_packed(c, a, b, update, threads),
        (Left::Int8(a), Right::Int8(b)) => product_packed8(c, a, b, update, threads),
        _ => panic!("operands of one product in different precisions"),
    }
}

/// The same products by three plain loops.
pub mod scalar {
    /// `c[m,n]` = Σ_k a(i, l)·b(l, j), summed in f64 in the order of l.
    pub fn matmul(a: impl Fn(usize, usize) -> f32, b: impl Fn(usize, usize) -> f32, m: usize, n: usize, k: usize) -> Vec<f32> {
        let mut c = Vec::with_capacity(m * n);
        for i in 0..m {
            for j in 0..n {
                c.push((0..k).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum::<f64>() as f32);
            }
        }
        c
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};

    fn product(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, update: Update) {
        let (left, right) =
            (Left::new(&[a], Precision::F32, Rounding::Nearest, Threads::All), Right::new(&[b.t()], Precision::F32, Threads::All));
        multiply(MatMut::new(c, a.rows(), b.cols()), &left, &right, update, Threads::All);
    }

    #[test]
    fn each_layout_equals_the_plain_loops() {
        let mut random = Random::new(1);
        for (m, n, k) in [(1, 1, 1), (1, 7, 3), (3, 1, 5), (5, 9, 2), (17, 33, 19), (130, 70, 65), (64, 300, 257), (4, 6, 0)] {
            let (a, b) = (random.vec(m * k, 1.0), random.vec(n * k, 1.0));
            let start = random.vec(m * n, 1.0);
            for update in [Update::Set, Update::Add] {
                let check = |name: &str, left: Mat<'_>, right: Mat<'_>, expected: Vec<f32>| {
                    let mut c = start.clone();
                    product(&mut c, left, right, update);
                    let expected: Vec<f32> =
                        expected.iter().zip(&start).map(|(p, s)| if update == Update::Add { p + s } else { *p }).collect();
                    assert_close(name, &c, &expected, 1e-5);
                };
                let (rows_a, columns_a) = (Mat::new(&a, m, k), Mat::new(&a, k, m).t());
                let (rows_b, columns_b) = (Mat::new(&b, k, n), Mat::new(&b, n, k).t());
                check("nt", rows_a, columns_b, scalar::matmul(|i, l| a[i * k + l], |l, j| b[j * k + l], m, n, k));
                check("nn", rows_a, rows_b, scalar::matmul(|i, l| a[i * k + l], |l, j| b[l * n + j], m, n, k));
                check("tn", columns_a, rows_b, scalar::matmul(|i, l| a[l * m + i], |l, j| b[l * n + j], m, n, k));
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let (m, n, k) = (301, 517, 263);
        let mut random = Random::new(2);
        let (a, b) = (random.vec(m * k, 1.0), random.vec(n * k, 1.0));
        let on = |threads: usize| {
            let mut c = vec![0.0; m * n];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| product(&mut c, Mat::new(&a, m, k), Mat::new(&b, n, k).t(), Update::Set));
            c
        };
        assert_eq!(on(1), on(3));
    }
}
