//! SwiGLU and the linear layer behind it, added to the residual stream: y = residual + (silu(gate)·up)·wᵀ. The activations exist for a chunk of tokens at
//! a time, forwards and again backwards, so training keeps gate and up alone.

use rayon::prelude::*;

use crate::arch::gemm::Update;
use crate::linear::{Backward, Forward, Layers};
use crate::matmul::Precision;
use crate::scratch::Scratch;
use crate::swiglu;

/// Tokens whose activations exist together.
const CHUNK: usize = 512;

/// What is applied.
#[derive(Clone, Copy)]
pub struct SwigluLinear<'a> {
    /// Weights of the layer, `[h, i]`.
    pub weights: &'a [f32],
    /// Elements of gate and of up, i.
    pub intermediate: usize,
    /// Of the products.
    pub precision: Precision,
}

impl SwigluLinear<'_> {
    /// h, having asserted that the operands agree.
    fn hidden(&self, rows: &[f32], gate_up: &[f32]) -> usize {
        let i = self.intermediate;
        assert!(i > 0 && self.weights.len().is_multiple_of(i) && gate_up.len().is_multiple_of(2 * i), "an intermediate size of {i}");
        let h = self.weights.len() / i;
        assert_eq!(rows.len(), gate_up.len() / (2 * i) * h, "rows of {h} for {} tokens", gate_up.len() / (2 * i));
        h
    }

    /// Adds to the residual stream `y[t, h]` from `gate_up[t, 2·i]`, a token's gate before its up.
    pub fn forward(&self, y: &mut [f32], gate_up: &[f32]) {
        let (h, i) = (self.hidden(y, gate_up), self.intermediate);
        let layer = Forward::new(Layers { weights: &[self.weights], k: i }, self.precision);
        for (y, gate_up) in y.chunks_mut(CHUNK * h).zip(gate_up.chunks(CHUNK * 2 * i)) {
            layer.run(y, &activations(gate_up, i), Update::Add);
        }
    }

    /// Puts the gradient of `gate_up[t, 2·i]` in its place, and writes `dw[h, i]`, from `dy[t, h]`; the gradient of the residual is dy itself.
    pub fn backward(&self, gate_up: &mut [f32], dw: &mut [f32], dy: &[f32]) {
        let (h, i) = (self.hidden(dy, gate_up), self.intermediate);
        assert_eq!(dw.len(), self.weights.len(), "a gradient must be shaped as its operand");
        let layer = Backward::new(Layers { weights: &[self.weights], k: i }, self.precision);
        let mut update = Update::Set;
        for (gate_up, dy) in gate_up.chunks_mut(CHUNK * 2 * i).zip(dy.chunks(CHUNK * h)) {
            let activations = activations(gate_up, i);
            layer.weights(&mut [dw], dy, &activations, update);
            let mut dactivations = activations; // Its buffer: the activations are of no more use.
            layer.input(&mut dactivations, dy);
            let rows = gate_up.par_chunks_exact_mut(2 * i).zip(dactivations.par_chunks_exact(i));
            rows.with_min_len(16).for_each(|(gate_up, dactivation)| {
                let (gate, up) = gate_up.split_at_mut(i);
                swiglu::backward_in_place(gate, up, dactivation);
            });
            update = Update::Add;
        }
        if update == Update::Set {
            dw.fill(0.0);
        }
    }
}

/// silu(gate)·up, `[t, i]`.
fn activations(gate_up: &[f32], i: usize) -> Scratch {
    let mut activations = Scratch::take(gate_up.len() / 2);
    activations.par_chunks_exact_mut(i).zip(gate_up.par_chunks_exact(2 * i)).with_min_len(16).for_each(|(activation, gate_up)| {
        let (gate, up) = gate_up.split_at(i);
        swiglu::forward_block(activation, gate, up);
    });
    activations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::scalar as linear;
    use crate::testing::{Random, assert_close, narrow, wide};

    #[test]
    fn equals_its_two_parts() {
        let mut random = Random::new(41);
        for (t, h, i) in [(1, 1, 1), (37, 8, 21), (CHUNK + 45, 20, 12)] {
            let (residual, gate_up, w, dy) =
                (random.vec(t * h, 1.0), random.vec(t * 2 * i, 2.0), random.vec(h * i, 1.0), random.vec(t * h, 1.0));
            let half = |second: usize| -> Vec<f32> { gate_up.chunks(i).skip(second).step_by(2).flatten().copied().collect() };
            let (gate, up) = (half(0), half(1));
            let activations = narrow(&swiglu::scalar::forward(&wide(&gate), &wide(&up)));
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Int8Mixed, 0.05)] {
                let mut y = residual.clone();
                let op = SwigluLinear { weights: &w, intermediate: i, precision };
                op.forward(&mut y, &gate_up);
                let expected: Vec<f32> =
                    linear::forward(&activations, &w, None, t, h, i).iter().zip(&residual).map(|(a, b)| a + b).collect();
                assert_close("y", &y, &expected, tolerance);

                let (mut dgate_up, mut dw) = (gate_up.clone(), vec![f32::NAN; w.len()]);
                op.backward(&mut dgate_up, &mut dw, &dy);
                let (dactivations, dw_expected, _) = linear::backward(&activations, &w, &dy, t, h, i);
                assert_close("dw", &dw, &dw_expected, tolerance);
                let (dgate, dup) = swiglu::scalar::backward(&wide(&gate), &wide(&up), &wide(&dactivations));
                let of = |second: usize| -> Vec<f32> { dgate_up.chunks(i).skip(second).step_by(2).flatten().copied().collect() };
                assert_close("dgate", &of(0), &narrow(&dgate), tolerance);
                assert_close("dup", &of(1), &narrow(&dup), tolerance);
            }
        }
    }
}
