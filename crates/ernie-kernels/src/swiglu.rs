//! SwiGLU (arXiv 2002.05202): y = silu(gate)·up, silu(g) = g·σ(g), element by element.

use rayon::prelude::*;

use crate::arch::exp::exp;
use crate::arch::isa::simd_fn;

/// Elements of one task: 128 KiB of each operand.
const BLOCK: usize = 1 << 15;

/// y = silu(gate)·up.
pub fn forward(y: &mut [f32], gate: &[f32], up: &[f32]) {
    assert!(y.len() == gate.len() && y.len() == up.len(), "{} = {} x {}", y.len(), gate.len(), up.len());
    y.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(|((y, gate), up)| forward_block(y, gate, up));
}

/// dgate and dup (both overwritten) from dy: dup = dy·silu(gate), dgate = dy·up·σ·(1 + gate·(1 − σ)), σ = σ(gate).
pub fn backward(dgate: &mut [f32], dup: &mut [f32], gate: &[f32], up: &[f32], dy: &[f32]) {
    let n = gate.len();
    assert!(dgate.len() == n && dup.len() == n && up.len() == n && dy.len() == n, "operands of different lengths");
    dgate
        .par_chunks_mut(BLOCK)
        .zip(dup.par_chunks_mut(BLOCK))
        .zip(gate.par_chunks(BLOCK))
        .zip(up.par_chunks(BLOCK))
        .zip(dy.par_chunks(BLOCK))
        .for_each(|((((dgate, dup), gate), up), dy)| backward_block(dgate, dup, gate, up, dy));
}

simd_fn! {
    /// [`forward`] on the calling thread alone.
    pub fn forward_block<FMA>(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate * up / (1.0 + exp::<FMA>(-gate));
        }
    }
}

simd_fn! {
    /// [`backward`] on the calling thread alone.
    pub(crate) fn backward_block<FMA>(dgate: &mut [f32], dup: &mut [f32], gate: &[f32], up: &[f32], dy: &[f32]) {
        for ((((dgate, dup), &gate), &up), &dy) in dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dy) {
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-gate));
            *dup = dy * gate * sigmoid;
            *dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
        }
    }
}

simd_fn! {
    /// [`backward`] on the calling thread alone, the gradients in the place of gate and up.
    pub(crate) fn backward_in_place<FMA>(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((g, u), &dy) in gate.iter_mut().zip(up).zip(dy) {
            let (gate, up) = (*g, *u);
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-gate));
            *u = dy * gate * sigmoid;
            *g = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
        }
    }
}

/// The same by plain loops in f64.
pub mod scalar {
    /// y; see [`forward`](super::forward).
    pub fn forward(gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(g, u)| g * u / (1.0 + (-g).exp())).collect()
    }

    /// (dgate, dup); see [`backward`](super::backward).
    pub fn backward(gate: &[f64], up: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let sigmoid = |g: f64| 1.0 / (1.0 + (-g).exp());
        let dgate = (0..gate.len()).map(|i| dy[i] * up[i] * sigmoid(gate[i]) * (1.0 + gate[i] * (1.0 - sigmoid(gate[i])))).collect();
        let dup = (0..gate.len()).map(|i| dy[i] * gate[i] * sigmoid(gate[i])).collect();
        (dgate, dup)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum, wide};

    #[test]
    fn equals_the_plain_loops() {
        let mut random = Random::new(7);
        for (n, scale) in [(0, 1.0), (1, 1.0), (5, 3.0), (33, 200.0), (BLOCK + 77, 10.0)] {
            let (gate, up, dy) = (random.vec(n, scale), random.vec(n, 1.0), random.vec(n, 1.0));
            let mut y = vec![f32::NAN; n];
            forward(&mut y, &gate, &up);
            assert_close("y", &y, &narrow(&scalar::forward(&wide(&gate), &wide(&up))), 1e-6);
            let (mut dgate, mut dup) = (vec![f32::NAN; n], vec![f32::NAN; n]);
            backward(&mut dgate, &mut dup, &gate, &up, &dy);
            let (dgate_expected, dup_expected) = scalar::backward(&wide(&gate), &wide(&up), &wide(&dy));
            assert_close("dgate", &dgate, &narrow(&dgate_expected), 1e-6);
            assert_close("dup", &dup, &narrow(&dup_expected), 1e-6);
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let mut random = Random::new(8);
        let (gate, up, dy) = (random.vec(19, 4.0), random.vec(19, 1.0), random.vec(19, 1.0));
        let (mut dgate, mut dup) = (vec![0.0; 19], vec![0.0; 19]);
        backward(&mut dgate, &mut dup, &gate, &up, &dy);
        assert_gradient("dgate", &dgate, &gate, |gate| weighted_sum(&scalar::forward(gate, &wide(&up)), &dy));
        assert_gradient("dup", &dup, &up, |up| weighted_sum(&scalar::forward(&wide(&gate), up), &dy));
    }

    #[test]
    fn a_fault_upstream_stays_visible() {
        let mut y = [0.0];
        forward(&mut y, &[f32::NAN], &[1.0]);
        assert!(y[0].is_nan());
    }
}
