//! Root mean square normalisation (arXiv 1910.07467): y = x · w / sqrt(mean(x²) + eps), row by row. The row width is `w.len()`.

use rayon::prelude::*;

use crate::arch::isa::{LANES, mul_add, simd_fn};
use crate::linear::add_rows;
use crate::scratch::Scratch;

/// Rows of one task: fixed, so that the order in which dw is summed never depends on the number of threads.
const ROWS_PER_TASK: usize = 64;

/// `y[m,h]` from `x[m,h]` and `w[h]`.
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let h = width(x, w);
    assert_eq!(y.len(), x.len());
    y.par_chunks_mut(h * ROWS_PER_TASK).zip(x.par_chunks(h * ROWS_PER_TASK)).for_each(|(y, x)| forward_rows(y, x, w, eps));
}

/// `dx[m,h]` and `dw[h]` (both overwritten) from `dy[m,h]`.
///
/// With r = 1/sqrt(mean(x²) + eps): dx = r·(w·dy) − x · r³/h · Σ(w·dy·x), dw = Σ_rows dy·x·r.
pub fn backward(dx: &mut [f32], dw: &mut [f32], x: &[f32], w: &[f32], dy: &[f32], eps: f32) {
    let h = width(x, w);
    assert!(dx.len() == x.len() && dy.len() == x.len() && dw.len() == h);
    let mut partial = Scratch::take(x.len().div_ceil(h * ROWS_PER_TASK) * h);
    dx.par_chunks_mut(h * ROWS_PER_TASK)
        .zip(x.par_chunks(h * ROWS_PER_TASK))
        .zip(dy.par_chunks(h * ROWS_PER_TASK))
        .zip(partial.par_chunks_mut(h))
        .for_each(|(((dx, x), dy), dw)| {
            dw.fill(0.0);
            backward_rows(dx, dw, x, w, dy, eps);
        });
    dw.fill(0.0);
    add_rows(dw, &partial);
}

fn width(x: &[f32], w: &[f32]) -> usize {
    assert!(!w.is_empty() && x.len().is_multiple_of(w.len()), "{} elements are no rows of {}", x.len(), w.len());
    w.len()
}

#[inline(always)]
fn inverse_root<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let blocks = x.chunks_exact(LANES);
    let rest: f32 = blocks.remainder().iter().map(|x| x * x).sum();
    for block in blocks {
        for lane in 0..LANES {
            sums[lane] = mul_add::<FMA>(block[lane], block[lane], sums[lane]);
        }
    }
    1.0 / ((sums.iter().sum::<f32>() + rest) / x.len() as f32 + eps).sqrt()
}

simd_fn! {
    fn forward_rows<FMA>(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let r = inverse_root::<FMA>(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        }
    }
}

simd_fn! {
    fn backward_rows<FMA>(dx: &mut [f32], dw: &mut [f32], x: &[f32], w: &[f32], dy: &[f32], eps: f32) {
        let h = w.len();
        for ((dx, x), dy) in dx.chunks_exact_mut(h).zip(x.chunks_exact(h)).zip(dy.chunks_exact(h)) {
            let r = inverse_root::<FMA>(x, eps);
            let mut sums = [0.0f32; LANES];
            let (blocks_x, blocks_w, blocks_dy) = (x.chunks_exact(LANES), w.chunks_exact(LANES), dy.chunks_exact(LANES));
            let mut dot = 0.0;
            for ((x, w), dy) in blocks_x.remainder().iter().zip(blocks_w.remainder()).zip(blocks_dy.remainder()) {
                dot += x * w * dy;
            }
            for ((x, w), dy) in blocks_x.zip(blocks_w).zip(blocks_dy) {
                for lane in 0..LANES {
                    sums[lane] = mul_add::<FMA>(x[lane] * w[lane], dy[lane], sums[lane]);
                }
            }
            dot += sums.iter().sum::<f32>();
            let c = dot * r * r * r / h as f32;
            for ((((dx, dw), x), w), dy) in dx.iter_mut().zip(dw.iter_mut()).zip(x).zip(w).zip(dy) {
                *dw = mul_add::<FMA>(dy * x, r, *dw);
                *dx = dy * w * r - x * c;
            }
        }
    }
}

/// The same by plain loops in f64.
pub mod scalar {
    /// y; see [`forward`](super::forward).
    pub fn forward(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        x.chunks_exact(w.len())
            .flat_map(|x| {
                let r = inverse_root(x, eps);
                x.iter().zip(w).map(move |(x, w)| x * r * w)
            })
            .collect()
    }

    /// (dx, dw); see [`backward`](super::backward).
    pub fn backward(x: &[f64], w: &[f64], dy: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
        let h = w.len();
        let (mut dx, mut dw) = (Vec::with_capacity(x.len()), vec![0.0; h]);
        for (x, dy) in x.chunks_exact(h).zip(dy.chunks_exact(h)) {
            let r = inverse_root(x, eps);
            let dot: f64 = (0..h).map(|i| x[i] * w[i] * dy[i]).sum();
            for i in 0..h {
                dw[i] += dy[i] * x[i] * r;
                dx.push(dy[i] * w[i] * r - x[i] * dot * r.powi(3) / h as f64);
            }
        }
        (dx, dw)
    }

    fn inverse_root(x: &[f64], eps: f64) -> f64 {
        1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

    #[test]
    fn equals_the_plain_loops() {
        let mut random = Random::new(5);
        for (rows, h) in [(1, 2), (1, 6), (3, 37), (130, 64), (65, 256), (200, 100)] {
            let (x, w, dy) = (random.vec(rows * h, 2.0), random.vec(h, 1.0), random.vec(rows * h, 1.0));
            let mut y = vec![f32::NAN; rows * h];
            forward(&mut y, &x, &w, 1e-5);
            assert_close("y", &y, &narrow(&scalar::forward(&wide(&x), &wide(&w), 1e-5)), 1e-6);
            let (mut dx, mut dw) = (vec![f32::NAN; rows * h], vec![f32::NAN; h]);
            backward(&mut dx, &mut dw, &x, &w, &dy, 1e-5);
            let (dx_expected, dw_expected) = scalar::backward(&wide(&x), &wide(&w), &wide(&dy), 1e-5);
            assert_close("dx", &dx, &narrow(&dx_expected), 2e-6);
            assert_close("dw", &dw, &narrow(&dw_expected), 2e-6);
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let mut random = Random::new(6);
        let (x, w, dy) = (random.vec(3 * 7, 2.0), random.vec(7, 1.0), random.vec(3 * 7, 1.0));
        let (mut dx, mut dw) = (vec![0.0; 21], vec![0.0; 7]);
        backward(&mut dx, &mut dw, &x, &w, &dy, 1e-5);
        assert_gradient("dx", &dx, &x, |x| weighted_sum(&scalar::forward(x, &wide(&w), 1e-5), &dy));
        assert_gradient("dw", &dw, &w, |w| weighted_sum(&scalar::forward(&wide(&x), w, 1e-5), &dy));
    }
}
