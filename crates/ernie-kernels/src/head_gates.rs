//! Gates over attention heads: a head's output times its gate g = σ(l), and nothing where the gate is below a threshold.
//!
//! For its gradient an inactive head is taken to be multiplied by its gate all the same (a straight-through estimator, arXiv 1308.3432): or no head
//! would ever come back.
use rayon::prelude::*;

use crate::arch::isa::simd_fn;

/// Rows of one task.
const ROWS_PER_TASK: usize = 64;

/// `y[t, n·d]` from head outputs `x[t, n·d]` and gate logits `l[t, n]`.
pub fn forward(y: &mut [f32], x: &[f32], logits: &[f32], heads: usize, threshold: f32) {
    let d = check(x, logits, heads);
    assert_eq!(y.len(), x.len(), "outputs are shaped as inputs");
    let (wide, narrow) = (ROWS_PER_TASK * heads * d, ROWS_PER_TASK * heads);
    y.par_chunks_mut(wide).zip(x.par_chunks(wide)).zip(logits.par_chunks(narrow)).for_each(|((y, x), l)| {
        for ((y, x), &l) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(l) {
            times(y, x, open(gate(l), threshold));
        }
    });
}

/// dx `[t, n·d]` and dl `[t, n]` (both overwritten) from dy `[t, n·d]`.
pub fn backward(dx: &mut [f32], dlogits: &mut [f32], x: &[f32], logits: &[f32], dy: &[f32], heads: usize, threshold: f32) {
    let d = check(x, logits, heads);
    assert!(dx.len() == x.len() && dy.len() == x.len() && dlogits.len() == logits.len(), "gradients are shaped as what they belong to");
    let (wide, narrow) = (ROWS_PER_TASK * heads * d, ROWS_PER_TASK * heads);
    let rows = dx.par_chunks_mut(wide).zip(dlogits.par_chunks_mut(narrow)).zip(x.par_chunks(wide)).zip(logits.par_chunks(narrow));
    rows.zip(dy.par_chunks(wide)).for_each(|((((dx, dl), x), l), dy)| {
        let heads = dx.chunks_exact_mut(d).zip(dl).zip(x.chunks_exact(d)).zip(l).zip(dy.chunks_exact(d));
        for ((((dx, dl), x), &l), dy) in heads {
            let g = gate(l);
            times(dx, dy, open(g, threshold));
            *dl = crate::row::dot(dy, x) * g * (1.0 - g);
        }
    });
}

/// σ(l).
pub fn gate(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

/// A gate as it is applied.
fn open(gate: f32, threshold: f32) -> f32 {
    if gate >= threshold { gate } else { 0.0 }
}

simd_fn! {
    fn times<FMA>(y: &mut [f32], x: &[f32], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x * factor;
        }
    }
}

fn check(x: &[f32], logits: &[f32], heads: usize) -> usize {
    assert!(heads > 0 && logits.len().is_multiple_of(heads), "{} logits are no rows of {heads}", logits.len());
    let d = x.len() / logits.len().max(1);
    assert!(x.len() == d * logits.len() && (d > 0 || x.is_empty()), "{} values for {} heads", x.len(), logits.len());
    d.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_gradient, narrow, weighted_sum};

    /// Plain loops in f64; without a threshold every head is multiplied by its gate.
    fn scalar(x: &[f64], l: &[f64], threshold: f64) -> Vec<f64> {
        let d = x.len() / l.len();
        let gate = |l: f64| 1.0 / (1.0 + (-l).exp());
        x.iter().enumerate().map(|(i, x)| if gate(l[i / d]) >= threshold { x * gate(l[i / d]) } else { 0.0 }).collect()
    }

    #[test]
    fn equals_the_plain_loops_and_its_gradient_knows_no_threshold() {
        let (t, heads) = (150, 3);
        for d in [1, 8, 21] {
            let mut random = Random::new(9);
            let (x, l, dy) = (random.vec(t * heads * d, 1.0), random.vec(t * heads, 2.0), random.vec(t * heads * d, 1.0));
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let mut y = vec![f32::NAN; x.len()];
            forward(&mut y, &x, &l, heads, 0.5);
            assert_close("y", &y, &narrow(&scalar(&wide(&x), &wide(&l), 0.5)), 1e-6);
            assert!(y.chunks(d).zip(&l).all(|(y, l)| (*l >= 0.0) == y.iter().any(|y| *y != 0.0)));
            let (mut dx, mut dl) = (vec![f32::NAN; x.len()], vec![f32::NAN; l.len()]);
            backward(&mut dx, &mut dl, &x, &l, &dy, heads, 0.5);
            assert_close("dx", &dx, &narrow(&scalar(&wide(&dy), &wide(&l), 0.5)), 1e-6);
            if d == 8 {
                // Of the first rows: a difference for each logit is enough.
                let (x, l, dy, dl) = (&x[..4 * heads * d], &l[..4 * heads], &dy[..4 * heads * d], &dl[..4 * heads]);
                assert_gradient("dl", dl, l, |l| weighted_sum(&scalar(&wide(x), l, 0.0), dy));
            }
        }
    }
}
