//! Linear layer: y = x·wᵀ + b, with w stored `[n, k]` (outputs by inputs) as in the released checkpoints.

use rayon::prelude::*;

use crate::arch::isa::simd_fn;
use crate::matmul::{matmul_nn, matmul_nt, matmul_tn};
use crate::scratch::Scratch;

/// Rows summed by one task when a bias gradient is formed: fixed, so that the order of the sum never depends on the number of threads.
const ROWS_PER_TASK: usize = 256;

/// `y[m,n]` = `x[m,k]`·`w[n,k]ᵀ` + `bias[n]`.
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], bias: Option<&[f32]>, m: usize, n: usize, k: usize) {
    matmul_nt(y, x, w, m, n, k, false);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "bias of a layer with {n} outputs");
        y.par_chunks_mut(n * ROWS_PER_TASK).for_each(|y| add_to_rows(y, bias));
    }
}

/// Gradients of [`forward`], all overwritten: `dx[m,k]` = dy·w, `dw[n,k]` = dyᵀ·x, `db[n]` = Σ_rows dy.
#[allow(clippy::too_many_arguments)] // Three results, three operands and their shape.
pub fn backward(
    dx: Option<&mut [f32]>,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    x: &[f32],
    w: &[f32],
    dy: &[f32],
    m: usize,
    n: usize,
    k: usize,
) {
    if let Some(dx) = dx {
        matmul_nn(dx, dy, w, m, k, n, false);
    }
    matmul_tn(dw, dy, x, n, k, m, false);
    if let Some(db) = db {
        sum_rows(db, dy);
    }
}

/// `sum[n]` = Σ over the rows of `x[m,n]`.
pub fn sum_rows(sum: &mut [f32], x: &[f32]) {
    let n = sum.len();
    assert!(n > 0 && x.len().is_multiple_of(n), "{} elements are no rows of {n}", x.len());
    let mut partial = Scratch::take(x.len().div_ceil(n * ROWS_PER_TASK) * n);
    partial.par_chunks_mut(n).zip(x.par_chunks(n * ROWS_PER_TASK)).for_each(|(partial, x)| {
        partial.fill(0.0);
        add_rows(partial, x);
    });
    sum.fill(0.0);
    add_rows(sum, &partial);
}

simd_fn! {
    /// Each row of y += bias.
    pub(crate) fn add_to_rows<FMA>(y: &mut [f32], bias: &[f32]) {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
}

simd_fn! {
    /// sum += each row of x in turn.
    pub(crate) fn add_rows<FMA>(sum: &mut [f32], x: &[f32]) {
        for row in x.chunks_exact(sum.len()) {
            for (sum, x) in sum.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
}

/// The same layer by plain loops.
pub mod scalar {
    use crate::matmul::scalar::matmul;

    /// See [`forward`](super::forward).
    pub fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, m: usize, n: usize, k: usize) -> Vec<f32> {
        let mut y = matmul(|i, l| x[i * k + l], |l, j| w[j * k + l], m, n, k);
        if let Some(bias) = bias {
            for (i, y) in y.iter_mut().enumerate() {
                *y += bias[i % n];
            }
        }
        y
    }

    /// (dx, dw, db); see [`backward`](super::backward).
    pub fn backward(x: &[f32], w: &[f32], dy: &[f32], m: usize, n: usize, k: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let dx = matmul(|i, l| dy[i * n + l], |l, j| w[l * k + j], m, k, n);
        let dw = matmul(|i, l| dy[l * n + i], |l, j| x[l * k + j], n, k, m);
        let db = (0..n).map(|j| (0..m).map(|i| f64::from(dy[i * n + j])).sum::<f64>() as f32).collect();
        (dx, dw, db)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, weighted_sum};

    #[test]
    fn equals_the_plain_loops() {
        let mut random = Random::new(3);
        for (m, n, k) in [(1, 1, 1), (1, 5, 3), (7, 1, 9), (33, 17, 31), (600, 40, 24)] {
            let (x, w, b, dy) = (random.vec(m * k, 1.0), random.vec(n * k, 1.0), random.vec(n, 1.0), random.vec(m * n, 1.0));
            let mut y = vec![f32::NAN; m * n];
            forward(&mut y, &x, &w, None, m, n, k);
            assert_close("y", &y, &scalar::forward(&x, &w, None, m, n, k), 1e-5);
            forward(&mut y, &x, &w, Some(&b), m, n, k);
            assert_close("y with bias", &y, &scalar::forward(&x, &w, Some(&b), m, n, k), 1e-5);

            let (mut dx, mut dw, mut db) = (vec![f32::NAN; m * k], vec![f32::NAN; n * k], vec![f32::NAN; n]);
            backward(Some(&mut dx), &mut dw, Some(&mut db), &x, &w, &dy, m, n, k);
            let (dx_expected, dw_expected, db_expected) = scalar::backward(&x, &w, &dy, m, n, k);
            assert_close("dx", &dx, &dx_expected, 1e-5);
            assert_close("dw", &dw, &dw_expected, 1e-5);
            assert_close("db", &db, &db_expected, 1e-5);
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let (m, n, k) = (3, 4, 5);
        let mut random = Random::new(4);
        let (x, w, b, dy) = (random.vec(m * k, 1.0), random.vec(n * k, 1.0), random.vec(n, 1.0), random.vec(m * n, 1.0));
        let loss = |x: &[f64], w: &[f64], b: &[f64]| {
            let dot = |i: usize| (0..k).map(|l| x[i / n * k + l] * w[i % n * k + l]).sum::<f64>() + b[i % n];
            weighted_sum(&(0..m * n).map(dot).collect::<Vec<_>>(), &dy)
        };
        let (mut dx, mut dw, mut db) = (vec![0.0; m * k], vec![0.0; n * k], vec![0.0; n]);
        backward(Some(&mut dx), &mut dw, Some(&mut db), &x, &w, &dy, m, n, k);
        let wide = crate::testing::wide;
        assert_gradient("dx", &dx, &x, |x| loss(x, &wide(&w), &wide(&b)));
        assert_gradient("dw", &dw, &w, |w| loss(&wide(&x), w, &wide(&b)));
        assert_gradient("db", &db, &b, |b| loss(&wide(&x), &wide(&w), b));
    }
}
