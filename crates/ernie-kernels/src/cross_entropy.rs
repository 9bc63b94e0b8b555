//! The output head and its cross-entropy in one: nll(token) = log Σ_v exp(h·w_v) − h·w_target.
//!
//! The logits of all tokens never exist together: they are made for a chunk of tokens, turned into the gradient in place, multiplied out, and
//! overwritten by the next chunk's. So the gradients are made in the forward pass, and the logits cost neither memory nor a second product.

use rayon::prelude::*;

use crate::arch::gemm::Update;
use crate::linear::{Backward, Forward, Layers};
use crate::matmul::Precision;
use crate::row::{exponentials, log_sum_exp, scale};
use crate::scratch::Scratch;

/// The target of a token that is not trained on: its loss is 0 and its gradient is none.
pub const IGNORE: i32 = -100;

/// Tokens whose logits exist together, at most (each chunk reads and writes all of dw once, so larger is better) …
const MAX_CHUNK: usize = 256;
/// … and so many that there are no more logits than this (64 MiB), though never fewer than [`MIN_CHUNK`] tokens.
const MAX_LOGITS: usize = 1 << 24;
const MIN_CHUNK: usize = 64;

/// The negative log-likelihood of each target, 0 where it is [`IGNORE`].
///
/// `h[t, hidden]`, `w[vocabulary, hidden]`, `targets[t]`; t = `targets.len()`, and the other sizes follow.
pub fn loss(h: &[f32], w: &[f32], targets: &[i32], precision: Precision) -> Vec<f32> {
    let head = Head::new(h, w, targets, precision);
    let mut nll = vec![0.0; targets.len()];
    head.for_each_chunk(|rows, _, logits| {
        let values: Vec<f32> = logits
            .par_chunks(head.vocabulary)
            .zip(rows)
            .map(|(logits, &row)| log_sum_exp(logits) - logits[targets[row] as usize])
            .collect();
        for (&row, value) in rows.iter().zip(values) {
            nll[row] = value;
        }
    });
    nll
}

/// The mean loss over the tokens whose target is not [`IGNORE`], and its gradients `dh[t, hidden]` and `dw[vocabulary, hidden]` (both overwritten).
/// Where every target is ignored the loss and the gradients are 0.
pub fn loss_and_grad(dh: &mut [f32], dw: &mut [f32], h: &[f32], w: &[f32], targets: &[i32], precision: Precision) -> f32 {
    let count = targets.iter().filter(|&&target| target != IGNORE).count().max(1);
    let nll = weighted_loss_and_grad(dh, dw, h, w, targets, &vec![1.0 / count as f32; targets.len()], precision);
    (nll.iter().map(|&nll| f64::from(nll)).sum::<f64>() / count as f64) as f32
}

/// As [`loss`], and the gradients dh and dw (both overwritten) of Σ `weights[i]`·`nll[i]`: for means over several batches, or importance weights.
pub fn weighted_loss_and_grad(
    dh: &mut [f32],
    dw: &mut [f32],
    h: &[f32],
    w: &[f32],
    targets: &[i32],
    weights: &[f32],
    precision: Precision,
) -> Vec<f32> {
    let head = Head::new(h, w, targets, precision);
    let hidden = head.hidden;
    assert!(dh.len() == h.len() && dw.len() == w.len() && weights.len() == targets.len(), "a gradient must be shaped as its operand");
    dh.fill(0.0);
    let mut nll = vec![0.0; targets.len()];
    let mut update = Update::Set;
    let backward = Backward::new(head.layers(), precision);
    head.for_each_chunk(|rows, h, logits| {
        let values: Vec<f32> = logits
            .par_chunks_mut(head.vocabulary)
            .zip(rows)
            .map(|(logits, &row)| gradient_in_place(logits, targets[row] as usize, weights[row]))
            .collect();
        for (&row, value) in rows.iter().zip(values) {
            nll[row] = value;
        }
        backward.weights(&mut [dw], logits, h, update);
        update = Update::Add;
        let mut dh_chunk = Scratch::take(rows.len() * hidden);
        backward.input(&mut dh_chunk, logits);
        for (&row, chunk_row) in rows.iter().zip(dh_chunk.chunks_exact(hidden)) {
            dh[row * hidden..][..hidden].copy_from_slice(chunk_row);
        }
    });
    if update == Update::Set {
        dw.fill(0.0);
    }
    nll
}

/// Replaces one row of logits by weight·(softmax − one-hot); returns the row's loss.
fn gradient_in_place(logits: &mut [f32], target: usize, weight: f32) -> f32 {
    let target_logit = logits[target];
    let (max, sum) = exponentials(logits);
    scale(logits, weight / sum);
    logits[target] -= weight;
    (max - target_logit) + sum.ln()
}

struct Head<'a> {
    h: &'a [f32],
    w: [&'a [f32]; 1],
    precision: Precision,
    hidden: usize,
    vocabulary: usize,
    /// Rows of h whose target is not ignored; the others are left out of every product.
    rows: Vec<usize>,
}

impl<'a> Head<'a> {
    fn new(h: &'a [f32], w: &'a [f32], targets: &[i32], precision: Precision) -> Self {
        let hidden = h.len() / targets.len().max(1);
        assert!(hidden > 0 && h.len() == hidden * targets.len(), "{} hidden values for {} targets", h.len(), targets.len());
        assert!(w.len().is_multiple_of(hidden), "{} weights are no rows of {hidden}", w.len());
        let vocabulary = w.len() / hidden;
        let rows: Vec<usize> = (0..targets.len()).filter(|&i| targets[i] != IGNORE).collect();
        for &row in &rows {
            assert!(
                (0..vocabulary as i64).contains(&i64::from(targets[row])),
                "target {} of token {row}, vocabulary {vocabulary}",
                targets[row]
            );
        }
        Head { h, w: [w], precision, hidden, vocabulary, rows }
    }

    fn layers(&self) -> Layers<'_> {
        Layers { weights: &self.w, k: self.hidden }
    }

    /// Calls `f` with each chunk's rows of h, those rows gathered, and their logits.
    fn for_each_chunk(&self, mut f: impl FnMut(&[usize], &[f32], &mut [f32])) {
        let chunk = (MAX_LOGITS / self.vocabulary.max(1)).clamp(MIN_CHUNK, MAX_CHUNK).min(self.rows.len().max(1));
        let mut gathered = Scratch::take(chunk * self.hidden);
        let mut logits = Scratch::take(chunk * self.vocabulary);
        let forward = Forward::new(self.layers(), self.precision);
        for rows in self.rows.chunks(chunk) {
            for (&row, copy) in rows.iter().zip(gathered.chunks_exact_mut(self.hidden)) {
                copy.copy_from_slice(&self.h[row * self.hidden..][..self.hidden]);
            }
            let (h, logits) = (&gathered[..rows.len() * self.hidden], &mut logits[..rows.len() * self.vocabulary]);
            forward.run(logits, h, Update::Set);
            f(rows, h, logits);
        }
    }
}

/// The same by plain loops in f64.
pub mod scalar {
    use super::IGNORE;

    /// Per-token losses; see [`loss`](super::loss).
    pub fn loss(h: &[f64], w: &[f64], targets: &[i32]) -> Vec<f64> {
        let hidden = h.len() / targets.len();
        let nll = |(h, &target): (&[f64], &i32)| {
            if target == IGNORE {
                return 0.0;
            }
            let logits = logits(h, w);
            logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[target as usize]
        };
        h.chunks_exact(hidden).zip(targets).map(nll).collect()
    }

    /// (dh, dw) of Σ weights·nll; see [`weighted_loss_and_grad`](super::weighted_loss_and_grad).
    pub fn gradients(h: &[f64], w: &[f64], targets: &[i32], weights: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let hidden = h.len() / targets.len();
        let (mut dh, mut dw) = (vec![0.0; h.len()], vec![0.0; w.len()]);
        for (row, &target) in targets.iter().enumerate().filter(|(_, target)| **target != IGNORE) {
            let h = &h[row * hidden..][..hidden];
            let logits = logits(h, w);
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            for (v, logit) in logits.iter().enumerate() {
                let dlogit = weights[row] * (logit.exp() / sum - if v == target as usize { 1.0 } else { 0.0 });
                for i in 0..hidden {
                    dh[row * hidden + i] += dlogit * w[v * hidden + i];
                    dw[v * hidden + i] += dlogit * h[i];
                }
            }
        }
        (dh, dw)
    }

    fn logits(h: &[f64], w: &[f64]) -> Vec<f64> {
        w.chunks_exact(h.len()).map(|w| w.iter().zip(h).map(|(w, h)| w * h).sum()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::Precision::{F32, Int8Mixed};
    use crate::testing::{Random, assert_close, assert_gradient, narrow, wide};

    fn targets(random: &mut Random, t: usize, vocabulary: usize, ignore_every: usize) -> Vec<i32> {
        (0..t).map(|i| if (i + 1) % ignore_every == 0 { IGNORE } else { random.below(vocabulary) as i32 }).collect()
    }

    #[test]
    fn equals_the_plain_loops() {
        let mut random = Random::new(11);
        for (t, hidden, vocabulary, ignore_every) in
            [(1, 1, 1, 9), (1, 6, 7, 9), (5, 3, 33, 2), (70, 16, 100, 5), (MAX_CHUNK + 9, 8, 65, 7), (3, 4, 5, 1)]
        {
            let (h, w) = (random.vec(t * hidden, 2.0), random.vec(vocabulary * hidden, 2.0));
            let (targets, weights) = (targets(&mut random, t, vocabulary, ignore_every), random.vec(t, 1.0));
            let expected = scalar::loss(&wide(&h), &wide(&w), &targets);
            assert_close("loss", &loss(&h, &w, &targets, F32), &narrow(&expected), 2e-6);

            let (mut dh, mut dw) = (vec![f32::NAN; h.len()], vec![f32::NAN; w.len()]);
            let nll = weighted_loss_and_grad(&mut dh, &mut dw, &h, &w, &targets, &weights, F32);
            assert_close("nll", &nll, &narrow(&expected), 2e-6);
            let (dh_expected, dw_expected) = scalar::gradients(&wide(&h), &wide(&w), &targets, &wide(&weights));
            assert_close("dh", &dh, &narrow(&dh_expected), 1e-5);
            assert_close("dw", &dw, &narrow(&dw_expected), 1e-5);

            let kept = targets.iter().filter(|&&target| target != IGNORE).count().max(1) as f64;
            let mean = loss_and_grad(&mut dh, &mut dw, &h, &w, &targets, F32);
            assert_close("mean", &[mean], &[(expected.iter().sum::<f64>() / kept) as f32], 2e-6);
            let (dh_expected, dw_expected) = scalar::gradients(&wide(&h), &wide(&w), &targets, &vec![1.0 / kept; t]);
            assert_close("dh of the mean", &dh, &narrow(&dh_expected), 1e-5);
            assert_close("dw of the mean", &dw, &narrow(&dw_expected), 1e-5);
        }
    }

    #[test]
    fn rounded_products_give_nearly_the_same_loss_and_gradient() {
        let mut random = Random::new(13);
        let (t, hidden, vocabulary) = (300, 64, 500);
        let (h, w, weights) = (random.vec(t * hidden, 1.0), random.vec(vocabulary * hidden, 0.3), vec![1.0 / t as f32; t]);
        let targets = targets(&mut random, t, vocabulary, 9);
        let run = |precision| {
            let (mut dh, mut dw) = (vec![f32::NAN; h.len()], vec![f32::NAN; w.len()]);
            let nll = weighted_loss_and_grad(&mut dh, &mut dw, &h, &w, &targets, &weights, precision);
            [nll, dh, dw]
        };
        for ((name, exact), (rounded, tolerance)) in
            ["nll", "dh", "dw"].iter().zip(run(F32)).zip(run(Int8Mixed).iter().zip([0.01, 0.05, 0.1]))
        {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let error = norm(&mut exact.iter().zip(rounded).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
            assert!(error < tolerance, "{name}: {error}");
        }
    }

    #[test]
    fn gradients_equal_differences() {
        let mut random = Random::new(12);
        let (h, w, targets) = (random.vec(5 * 4, 2.0), random.vec(7 * 4, 2.0), [3, IGNORE, 0, 6, 3]);
        let (mut dh, mut dw) = (vec![0.0; h.len()], vec![0.0; w.len()]);
        loss_and_grad(&mut dh, &mut dw, &h, &w, &targets, F32);
        let mean = |h: &[f64], w: &[f64]| scalar::loss(h, w, &targets).iter().sum::<f64>() / 4.0;
        assert_gradient("dh", &dh, &h, |h| mean(h, &wide(&w)));
        assert_gradient("dw", &dw, &w, |w| mean(&wide(&h), w));
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let (mut dh, mut dw) = ([0.0; 1], [0.0; 2]);
        let mean = loss_and_grad(&mut dh, &mut dw, &[1000.0], &[1.0, -1.0], &[1], F32);
        assert_eq!(mean, 2000.0);
        assert_eq!(loss(&[1000.0], &[1.0, -1.0], &[0], F32), [0.0]);
        assert!(dh[0] == 2.0 && dw == [1000.0, -1000.0]);
    }
}
