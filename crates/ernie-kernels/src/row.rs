//! Inner loops over single rows that several operators share: the parts of a softmax, scaling and the dot product.

use crate::arch::exp::exp;
use crate::arch::isa::{LANES, mul_add, simd_fn};

simd_fn! {
    /// Replaces x by exp(x − max x); returns the maximum and the sum of the exponentials. Fastest where the length is a multiple of [`LANES`].
    pub(crate) fn exponentials<FMA>(x: &mut [f32]) -> (f32, f32) {
        let max = max::<FMA>(x);
        let mut sums = [0.0f32; LANES];
        let mut blocks = x.chunks_exact_mut(LANES);
        for block in &mut blocks {
            for lane in 0..LANES {
                block[lane] = exp::<FMA>(block[lane] - max);
                sums[lane] += block[lane];
            }
        }
        let mut sum: f32 = sums.iter().sum();
        for x in blocks.into_remainder() {
            *x = exp::<FMA>(*x - max);
            sum += *x;
        }
        (max, sum)
    }
}

simd_fn! {
    /// ln Σ exp(x), leaving x as it is.
    pub(crate) fn log_sum_exp<FMA>(x: &[f32]) -> f32 {
        let max = max::<FMA>(x);
        let mut sums = [0.0f32; LANES];
        let blocks = x.chunks_exact(LANES);
        let rest: f32 = blocks.remainder().iter().map(|&x| exp::<FMA>(x - max)).sum();
        for block in blocks {
            for lane in 0..LANES {
                sums[lane] += exp::<FMA>(block[lane] - max);
            }
        }
        max + (sums.iter().sum::<f32>() + rest).ln()
    }
}

simd_fn! {
    /// x *= factor.
    pub(crate) fn scale<FMA>(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

simd_fn! {
    /// x += factor·y.
    pub(crate) fn add_scaled<FMA>(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = mul_add::<FMA>(factor, *y, *x);
        }
    }
}

simd_fn! {
    /// Σ a·b.
    pub(crate) fn dot<FMA>(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [0.0f32; LANES];
        let (blocks_a, blocks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest: f32 = blocks_a.remainder().iter().zip(blocks_b.remainder()).map(|(a, b)| a * b).sum();
        for (a, b) in blocks_a.zip(blocks_b) {
            for lane in 0..LANES {
                sums[lane] = mul_add::<FMA>(a[lane], b[lane], sums[lane]);
            }
        }
        sums.iter().sum::<f32>() + rest
    }
}

/// The largest element; NaN elements are passed over (their exponentials show them again).
#[inline(always)]
fn max<const FMA: bool>(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let blocks = x.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for lane in 0..LANES {
            maxima[lane] = larger(maxima[lane], block[lane]);
        }
    }
    maxima.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}
