//! AdamW (arXiv 1711.05101) as `torch.optim.AdamW` computes it, in place; and the sums that clip gradients.

use rayon::prelude::*;

use crate::arch::isa::{LANES, mul_add, simd_fn};

/// Elements of one task: 128 KiB of each operand.
const BLOCK: usize = 1 << 15;

/// What one step of the optimizer is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Decoupled weight decay: p loses lr·weight_decay·p.
    pub weight_decay: f64,
    /// The number of this step, 1 for the first.
    pub step: u64,
    /// What every gradient is multiplied by as it is read, for clipping; 1 leaves them as they are.
    pub gradient_scale: f32,
}

/// One step, with g the scaled gradient: m += (1−β1)(g−m), v = β2·v + (1−β2)·g², p = p·(1 − lr·decay) − lr/(1−β1ˢ) · m / (√v/√(1−β2ˢ) + eps).
pub fn step(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &Step) {
    assert!(p.len() == g.len() && m.len() == p.len() && v.len() == p.len(), "operands of different lengths");
    assert!(step.step >= 1, "steps count from 1");
    let factors = Factors::new(step);
    p.par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK))
        .zip(v.par_chunks_mut(BLOCK))
        .for_each(|(((p, g), m), v)| step_block(p, g, m, v, factors));
}

/// The constants of one step, in f32.
#[derive(Clone, Copy)]
struct Factors {
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_correction: f32,
    eps: f32,
    rate: f32,
    gradient_scale: f32,
}

impl Factors {
    fn new(step: &Step) -> Self {
        let exponent = step.step.min(i32::MAX as u64) as i32; // The corrections are 1 long before that.
        Factors {
            keep: (1.0 - step.lr * step.weight_decay) as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            root_correction: (1.0 / (1.0 - step.beta2.powi(exponent)).sqrt()) as f32,
            eps: step.eps as f32,
            rate: (step.lr / (1.0 - step.beta1.powi(exponent))) as f32,
            gradient_scale: step.gradient_scale,
        }
    }
}

simd_fn! {
    fn step_block<FMA>(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: Factors) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * f.gradient_scale;
            *m = mul_add::<FMA>(f.one_minus_beta1, g - *m, *m);
            *v = mul_add::<FMA>(f.beta2, *v, f.one_minus_beta2 * g * g);
            *p = *p * f.keep - f.rate * *m / mul_add::<FMA>(v.sqrt(), f.root_correction, f.eps);
        }
    }
}

/// Σ x², in f64 and in a fixed order.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let sums: Vec<f64> = x.par_chunks(BLOCK).map(sum_of_squares_block).collect();
    sums.iter().sum()
}

simd_fn! {
    fn sum_of_squares_block<FMA>(x: &[f32]) -> f64 {
        let mut sums = [0.0f64; LANES];
        let blocks = x.chunks_exact(LANES);
        let rest: f64 = blocks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        for block in blocks {
            for lane in 0..LANES {
                sums[lane] += f64::from(block[lane]) * f64::from(block[lane]);
            }
        }
        sums.iter().sum::<f64>() + rest
    }
}

/// x *= factor.
pub fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(BLOCK).for_each(|x| crate::row::scale(x, factor));
}

/// x += y.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "a sum of two of the same shape");
    x.par_chunks_mut(BLOCK).zip(y.par_chunks(BLOCK)).for_each(|(x, y)| crate::linear::add_rows(x, y));
}

/// The same by plain loops in f64.
pub mod scalar {
    use super::Step;

    /// See [`step`](super::step).
    pub fn step(p: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64], step: &Step) {
        let correction1 = 1.0 - step.beta1.powf(step.step as f64);
        let correction2 = 1.0 - step.beta2.powf(step.step as f64);
        for i in 0..p.len() {
            let g = g[i] * f64::from(step.gradient_scale);
            m[i] = step.beta1 * m[i] + (1.0 - step.beta1) * g;
            v[i] = step.beta2 * v[i] + (1.0 - step.beta2) * g * g;
            p[i] -= step.lr * step.weight_decay * p[i];
            p[i] -= step.lr * (m[i] / correction1) / ((v[i] / correction2).sqrt() + step.eps);
        }
    }

    /// See [`sum_of_squares`](super::sum_of_squares).
    pub fn sum_of_squares(x: &[f32]) -> f64 {
        x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, narrow, wide};

    #[test]
    fn ten_steps_equal_the_plain_loops() {
        for n in [1, 37, BLOCK + 5] {
            let mut random = Random::new(14);
            let start = random.vec(n, 1.0);
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
            let (mut p_expected, mut m_expected, mut v_expected) = (wide(&start), vec![0.0; n], vec![0.0; n]);
            for count in 1..=10 {
                let g = random.vec(n, 0.1);
                let now = Step { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: count, gradient_scale: 0.75 };
                step(&mut p, &g, &mut m, &mut v, &now);
                scalar::step(&mut p_expected, &wide(&g), &mut m_expected, &mut v_expected, &now);
            }
            assert_close("p", &p, &narrow(&p_expected), 2e-6);
            assert_close("m", &m, &narrow(&m_expected), 1e-5);
            assert_close("v", &v, &narrow(&v_expected), 1e-5);
        }
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate() {
        let (mut p, mut m, mut v) = ([1.0, 1.0], [0.0; 2], [0.0; 2]);
        let now = Step { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 0.0, weight_decay: 0.0, step: 1, gradient_scale: 1.0 };
        step(&mut p, &[3.0, -0.5], &mut m, &mut v, &now);
        assert_close("p", &p, &[0.99, 1.01], 1e-6);
    }

    #[test]
    fn squares_are_summed_alike_on_any_number_of_threads() {
        let mut random = Random::new(15);
        let x = random.vec(3 * BLOCK + 11, 1e3);
        let sum = sum_of_squares(&x);
        assert!((sum / scalar::sum_of_squares(&x) - 1.0).abs() < 1e-12);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().expect("a thread pool");
        assert_eq!(pool.install(|| sum_of_squares(&x)), sum);
        assert_eq!(sum_of_squares(&[1e30, 2.0]), f64::from(1e30f32).powi(2));
    }

    #[test]
    fn scale_multiplies_every_element() {
        let mut x = vec![2.0; BLOCK + 3];
        scale(&mut x, 0.25);
        assert!(x.iter().all(|&x| x == 0.5));
    }
}
