//! Linear layers: y = x·wᵀ, with w stored `[n, k]` (outputs by inputs) as in the released checkpoints; and the layers that read the same input
//! side by side, y = x·[w₁; w₂; …]ᵀ, so that the input is prepared for the product once.

use rayon::prelude::*;

use crate::arch::gemm::{Threads, Update};
use crate::arch::isa::simd_fn;
use crate::arch::matrix::{Mat, MatMut};
use crate::arch::quantised::Rounding;
use crate::matmul::{Left, Precision, Right, multiply};
use crate::scratch::Scratch;

/// Rows summed by one task when a bias gradient is formed: fixed, so that the order of the sum never depends on the number of threads.
const ROWS_PER_TASK: usize = 256;

/// Weights of layers with the same `k` inputs, one per layer, each `[n, k]`.
#[derive(Clone, Copy)]
pub struct Layers<'a> {
    /// The weights.
    pub weights: &'a [&'a [f32]],
    /// Inputs of every layer.
    pub k: usize,
}

impl<'a> Layers<'a> {
    /// The weights as matrices.
    fn matrices(self) -> impl Iterator<Item = Mat<'a>> {
        self.weights.iter().map(move |w| {
            assert!(self.k > 0 && w.len().is_multiple_of(self.k), "{} weights are no rows of {}", w.len(), self.k);
            Mat::new(w, w.len() / self.k, self.k)
        })
    }

    /// Outputs of all layers together.
    pub fn outputs(self) -> usize {
        self.matrices().map(|w| w.rows()).sum()
    }
}

/// The layers' weights, ready for the forward pass of any number of rows.
pub struct Forward {
    weights: Vec<(usize, Right)>,
    k: usize,
    precision: Precision,
}

impl Forward {
    /// Prepares the weights.
    pub fn new(layers: Layers<'_>, precision: Precision) -> Self {
        let weights = layers.matrices().map(|w| (w.rows(), Right::new(&[w], precision, Threads::All))).collect();
        Forward { weights, k: layers.k, precision }
    }

    /// `y[m, Σn]` = or += `x[m, k]`·wᵀ, layer beside layer.
    pub fn run(&self, y: &mut [f32], x: &[f32], update: Update) {
        let m = x.len() / self.k;
        let x = Left::new(&[Mat::new(x, m, self.k)], self.precision, Rounding::Nearest, Threads::All);
        let mut rest = MatMut::new(y, m, self.weights.iter().map(|(n, _)| n).sum());
        for (n, w) in &self.weights {
            let (y, tail) = rest.split_columns(*n);
            multiply(y, &x, w, update, Threads::All);
            rest = tail;
        }
    }
}

/// The layers' weights, ready for the backward pass.
pub struct Backward {
    weights: Right,
    outputs: Vec<usize>,
    k: usize,
    precision: Precision,
}

impl Backward {
    /// Prepares the weights.
    pub fn new(layers: Layers<'_>, precision: Precision) -> Self {
        let transposed: Vec<Mat<'_>> = layers.matrices().map(Mat::t).collect();
        let outputs = transposed.iter().map(Mat::cols).collect();
        Backward { weights: Right::new(&transposed, precision, Threads::All), outputs, k: layers.k, precision }
    }

    /// `dx[m, k]` = Σ over layers of dy·w, from `dy[m, Σn]`.
    pub fn input(&self, dx: &mut [f32], dy: &[f32]) {
        let m = dx.len() / self.k;
        let dy = Left::new(&self.split(dy, m), self.precision, Rounding::Stochastic, Threads::All);
        multiply(MatMut::new(dx, m, self.k), &dy, &self.weights, Update::Set, Threads::All);
    }

    /// `dw[n, k]` of each layer = or += dyᵀ·x, from `dy[m, Σn]` and `x[m, k]`.
    pub fn weights(&self, dw: &mut [&mut [f32]], dy: &[f32], x: &[f32], update: Update) {
        let m = x.len() / self.k;
        assert_eq!(dw.len(), self.outputs.len(), "one gradient for each layer");
        let x = Right::new(&[Mat::new(x, m, self.k).t()], self.precision, Threads::All);
        for ((dw, dy), &n) in dw.iter_mut().zip(self.split(dy, m)).zip(&self.outputs) {
            let dy = Left::new(&[dy.t()], self.precision, Rounding::Stochastic, Threads::All);
            multiply(MatMut::new(dw, n, self.k), &dy, &x, update, Threads::All);
        }
    }

    /// The columns of dy that belong to each layer.
    fn split<'a>(&self, dy: &'a [f32], m: usize) -> Vec<Mat<'a>> {
        let dy = Mat::new(dy, m, self.outputs.iter().sum());
        let mut from = 0;
        let columns = self.outputs.iter().map(|n| {
            from += n;
            from - n..from
        });
        columns.map(|columns| dy.columns(columns)).collect()
    }
}

/// `y[m,n]` = `x[m,k]`·`w[n,k]ᵀ` + `bias[n]`.
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], bias: Option<&[f32]>, k: usize, precision: Precision) {
    Forward::new(Layers { weights: &[w], k }, precision).run(y, x, Update::Set);
    if let Some(bias) = bias {
        let n = w.len() / k;
        assert_eq!(bias.len(), n, "bias of a layer with {n} outputs");
        y.par_chunks_mut(n * ROWS_PER_TASK).for_each(|y| add_to_rows(y, bias));
    }
}

/// Gradients of [`forward`], all overwritten: `dx[m,k]` = dy·w, `dw[n,k]` = dyᵀ·x, `db[n]` = Σ_rows dy.
#[allow(clippy::too_many_arguments)] // Three results, three operands, and how.
pub fn backward(
    dx: Option<&mut [f32]>,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    x: &[f32],
    w: &[f32],
    dy: &[f32],
    k: usize,
    precision: Precision,
) {
    let layer = Backward::new(Layers { weights: &[w], k }, precision);
    if let Some(dx) = dx {
        layer.input(dx, dy);
    }
    layer.weights(&mut [dw], dy, x, Update::Set);
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
    use crate::testing::{Random, assert_close, assert_gradient, weighted_sum, wide};

    /// Largest error against the largest expected value: exact but for the order of sums, or to the rounding of 8 bits over few terms.
    const TOLERANCES: [(Precision, f32); 2] = [(Precision::F32, 1e-5), (Precision::Int8Mixed, 0.06)];

    #[test]
    fn equals_the_plain_loops() {
        let mut random = Random::new(3);
        for (m, n, k) in [(1, 1, 1), (1, 5, 3), (7, 1, 9), (33, 17, 31), (600, 40, 24), (70, 520, 300)] {
            let (x, w, b, dy) = (random.vec(m * k, 1.0), random.vec(n * k, 1.0), random.vec(n, 1.0), random.vec(m * n, 1.0));
            for (precision, tolerance) in TOLERANCES {
                let mut y = vec![f32::NAN; m * n];
                forward(&mut y, &x, &w, None, k, precision);
                assert_close("y", &y, &scalar::forward(&x, &w, None, m, n, k), tolerance);
                forward(&mut y, &x, &w, Some(&b), k, precision);
                assert_close("y with bias", &y, &scalar::forward(&x, &w, Some(&b), m, n, k), tolerance);

                let (mut dx, mut dw, mut db) = (vec![f32::NAN; m * k], vec![f32::NAN; n * k], vec![f32::NAN; n]);
                backward(Some(&mut dx), &mut dw, Some(&mut db), &x, &w, &dy, k, precision);
                let (dx_expected, dw_expected, db_expected) = scalar::backward(&x, &w, &dy, m, n, k);
                assert_close("dx", &dx, &dx_expected, tolerance);
                assert_close("dw", &dw, &dw_expected, tolerance);
                assert_close("db", &db, &db_expected, 1e-5);
            }
        }
    }

    #[test]
    fn layers_side_by_side_equal_each_alone() {
        let (m, k) = (40, 70);
        let mut random = Random::new(5);
        let weights: Vec<Vec<f32>> = [7, 300, 33].iter().map(|n| random.vec(n * k, 1.0)).collect();
        let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        let layers = Layers { weights: &weights, k };
        let (x, dy) = (random.vec(m * k, 1.0), random.vec(m * layers.outputs(), 1.0));
        for (precision, tolerance) in TOLERANCES {
            let mut y = vec![1.0; dy.len()];
            Forward::new(layers, precision).run(&mut y, &x, Update::Add);
            let backward = Backward::new(layers, precision);
            let mut dx = vec![f32::NAN; x.len()];
            backward.input(&mut dx, &dy);
            let mut dw: Vec<Vec<f32>> = weights.iter().map(|w| vec![f32::NAN; w.len()]).collect();
            backward.weights(&mut dw.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(), &dy, &x, Update::Set);

            let (mut from, mut dx_expected) = (0, vec![0.0; x.len()]);
            for (w, dw) in weights.iter().zip(&dw) {
                let n = w.len() / k;
                let columns =
                    |of: &[f32]| -> Vec<f32> { of.chunks(layers.outputs()).flat_map(|row| row[from..from + n].to_vec()).collect() };
                let expected: Vec<f32> = scalar::forward(&x, w, None, m, n, k).iter().map(|y| y + 1.0).collect();
                assert_close("y", &columns(&y), &expected, tolerance);
                let (dx, dw_expected, _) = scalar::backward(&x, w, &columns(&dy), m, n, k);
                assert_close("dw", dw, &dw_expected, tolerance);
                dx_expected.iter_mut().zip(dx).for_each(|(sum, dx)| *sum += dx);
                from += n;
            }
            assert_close("dx", &dx, &dx_expected, tolerance);
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
        backward(Some(&mut dx), &mut dw, Some(&mut db), &x, &w, &dy, k, Precision::F32);
        assert_gradient("dx", &dx, &x, |x| loss(x, &wide(&w), &wide(&b)));
        assert_gradient("dw", &dw, &w, |w| loss(&wide(&x), w, &wide(&b)));
        assert_gradient("db", &db, &b, |b| loss(&wide(&x), &wide(&w), b));
    }
}
