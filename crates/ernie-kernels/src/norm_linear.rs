//! Linear layers that read a normalised input: y = rms_norm(x)·[w₁; w₂; …]ᵀ. The normalised rows exist for a chunk of tokens at a time, forwards and
//! again backwards, so training keeps x alone.

use crate::arch::gemm::Update;
use crate::linear::{Backward, Forward, Layers};
use crate::matmul::Precision;
use crate::rms_norm;
use crate::scratch::Scratch;

/// Tokens whose normalised rows exist together.
const CHUNK: usize = 512;

/// What is applied: the norm's weights `[h]`, its ε, and the layers that follow.
#[derive(Clone, Copy)]
pub struct NormLinear<'a> {
    /// `[h]`.
    pub norm: &'a [f32],
    /// ε of the norm.
    pub eps: f32,
    /// Weights `[n, h]`.
    pub weights: &'a [&'a [f32]],
    /// Of the products.
    pub precision: Precision,
}

impl<'a> NormLinear<'a> {
    fn layers(&self) -> Layers<'a> {
        Layers { weights: self.weights, k: self.norm.len() }
    }

    /// `y[t, Σn]` from `x[t, h]`.
    pub fn forward(&self, y: &mut [f32], x: &[f32]) {
        let (h, n) = (self.norm.len(), self.layers().outputs());
        assert!(x.len().is_multiple_of(h) && y.len() == x.len() / h * n, "{} values from rows of {h} to {n}", y.len());
        let layers = Forward::new(self.layers(), self.precision);
        for (y, x) in y.chunks_mut(CHUNK * n).zip(x.chunks(CHUNK * h)) {
            let mut z = Scratch::take(x.len());
            rms_norm::forward(&mut z, x, self.norm, self.eps);
            layers.run(y, &z, Update::Set);
        }
    }

    /// Gradients of [`NormLinear::forward`], all overwritten: `dx[t, h]`, that of the norm's weights `[h]`, and `dw[n, h]` of each layer, from `dy[t, Σn]`.
    pub fn backward(&self, dx: &mut [f32], dnorm: &mut [f32], dw: &mut [&mut [f32]], x: &[f32], dy: &[f32]) {
        let (h, n) = (self.norm.len(), self.layers().outputs());
        assert!(dx.len() == x.len() && dy.len() == x.len() / h * n && dnorm.len() == h);
        let layers = Backward::new(self.layers(), self.precision);
        dnorm.fill(0.0);
        let mut update = Update::Set;
        for ((dx, x), dy) in dx.chunks_mut(CHUNK * h).zip(x.chunks(CHUNK * h)).zip(dy.chunks(CHUNK * n)) {
            let (mut z, mut dz, mut part) = (Scratch::take(x.len()), Scratch::take(x.len()), vec![0.0; h]);
            rms_norm::forward(&mut z, x, self.norm, self.eps);
            layers.weights(dw, dy, &z, update);
            layers.input(&mut dz, dy);
            rms_norm::backward(dx, &mut part, x, self.norm, &dz, self.eps);
            dnorm.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            update = Update::Add;
        }
        if update == Update::Set {
            dw.iter_mut().for_each(|dw| dw.fill(0.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::scalar as linear;
    use crate::testing::{Random, assert_close, narrow, wide};

    #[test]
    fn equals_its_two_parts() {
        let mut random = Random::new(40);
        let eps = 1e-5;
        for (t, h, sizes) in [(1, 4, vec![3]), (37, 20, vec![8, 30, 8]), (CHUNK + 70, 12, vec![16, 16])] {
            let (x, norm) = (random.vec(t * h, 1.0), random.vec(h, 1.0));
            let weights: Vec<Vec<f32>> = sizes.iter().map(|n| random.vec(n * h, 1.0)).collect();
            let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
            let all: usize = sizes.iter().sum();
            let dy = random.vec(t * all, 1.0);
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Int8Mixed, 0.05)] {
                let op = NormLinear { norm: &norm, eps, weights: &weights, precision };
                let mut y = vec![f32::NAN; t * all];
                op.forward(&mut y, &x);
                let (mut dx, mut dnorm) = (vec![f32::NAN; t * h], vec![f32::NAN; h]);
                let mut dw: Vec<Vec<f32>> = weights.iter().map(|w| vec![f32::NAN; w.len()]).collect();
                op.backward(&mut dx, &mut dnorm, &mut dw.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(), &x, &dy);

                let z = narrow(&rms_norm::scalar::forward(&wide(&x), &wide(&norm), f64::from(eps)));
                let (mut from, mut dz) = (0, vec![0.0f64; t * h]);
                for ((w, dw), n) in weights.iter().zip(&dw).zip(&sizes) {
                    let columns = |of: &[f32]| -> Vec<f32> { of.chunks(all).flat_map(|row| row[from..from + n].to_vec()).collect() };
                    assert_close("y", &columns(&y), &linear::forward(&z, w, None, t, *n, h), tolerance);
                    let (part, dw_expected, _) = linear::backward(&z, w, &columns(&dy), t, *n, h);
                    assert_close("dw", dw, &dw_expected, tolerance);
                    dz.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(part));
                    from += n;
                }
                let (dx_expected, dnorm_expected) = rms_norm::scalar::backward(&wide(&x), &wide(&norm), &dz, f64::from(eps));
                assert_close("dx", &dx, &narrow(&dx_expected), tolerance);
                assert_close("dnorm", &dnorm, &narrow(&dnorm_expected), tolerance);
            }
        }
    }
}
