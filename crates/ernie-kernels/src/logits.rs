//! Passes over the logits of one position, a hundred thousand of them, at the speed of the second-level cache.
use crate::arch::exp::exp;
use crate::arch::isa::{LANES, simd_fn};

/// Weights that [`weights`] sums up together.
pub const BLOCK: usize = 1024;

simd_fn! {
    /// The largest logit (−∞ if there are none), and whether any is NaN or +∞.
    pub fn largest<FMA>(logits: &[f32]) -> (f32, bool) {
        let (mut most, mut bad) = ([f32::NEG_INFINITY; LANES], [0.0f32; LANES]);
        let blocks = logits.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for lane in 0..LANES {
                let x = block[lane];
                most[lane] = if x > most[lane] { x } else { most[lane] };
                // NaN stays, +∞ becomes NaN, −∞ is cut off first.
                let above = if x < f32::MIN { f32::MIN } else { x };
                bad[lane] += above * 0.0;
            }
        }
        let bad = bad.iter().sum::<f32>() != 0.0 || bad.iter().any(|x| x.is_nan());
        let max = most.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        (max, bad || rest.iter().any(|x| x.is_nan() || *x == f32::INFINITY))
    }
}

/// The first logit that equals `value`.
pub fn first_equal(logits: &[f32], value: f32) -> Option<usize> {
    let block = logits.chunks(BLOCK).position(|block| has(block, value))?;
    let within = logits[block * BLOCK..].iter().position(|&x| x == value)?;
    Some(block * BLOCK + within)
}

simd_fn! {
    fn has<FMA>(block: &[f32], value: f32) -> bool {
        block.iter().fold(false, |any, &x| any | (x == value))
    }
}

/// `w[i] = exp((logits[i] − max) / temperature)`, unnormalised, 0 where that is below e^−87; the sums of each [`BLOCK`] of them go to `sums`. A weight
/// is right to a few units in the last place of an f32.
pub fn weights(w: &mut Vec<f32>, sums: &mut Vec<f64>, logits: &[f32], max: f32, temperature: f32) {
    w.resize(logits.len(), 0.0);
    sums.clear();
    for (w, logits) in w.chunks_mut(BLOCK).zip(logits.chunks(BLOCK)) {
        sums.push(block_weights(w, logits, max, temperature));
    }
}

/// Σ exp(logits − max): with its logarithm a logit becomes a log-probability.
pub fn sum_of_exponentials(logits: &[f32], max: f32) -> f64 {
    let mut w = [0.0; BLOCK];
    logits.chunks(BLOCK).map(|block| block_weights(&mut w[..block.len()], block, max, 1.0)).sum()
}

simd_fn! {
    fn block_weights<FMA>(w: &mut [f32], logits: &[f32], max: f32, temperature: f32) -> f64 {
        for (w, logit) in w.iter_mut().zip(logits) {
            let x = (logit - max) / temperature;
            let weight = exp::<FMA>(x);
            *w = if x < -87.0 { 0.0 } else { weight };
        }
        let mut sums = [0.0f64; 16];
        let blocks = w.chunks_exact(16);
        let rest: f64 = blocks.remainder().iter().map(|w| f64::from(*w)).sum();
        for block in blocks {
            for lane in 0..16 {
                sums[lane] += f64::from(block[lane]);
            }
        }
        sums.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn the_largest_is_found_and_what_is_no_number_seen() {
        for len in [0, 1, 31, 32, 33, 5000] {
            let mut logits = Random::new(len as u64 + 1).vec(len, 30.0);
            let (max, bad) = largest(&logits);
            assert_eq!(max, logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert!(!bad);
            assert_eq!(first_equal(&logits, max), logits.iter().position(|&x| x == max));
            for place in [0, len / 2, len.saturating_sub(1)] {
                if len == 0 {
                    continue;
                }
                let kept = logits[place];
                for (value, expected) in [(f32::NAN, true), (f32::INFINITY, true), (f32::NEG_INFINITY, false)] {
                    logits[place] = value;
                    assert_eq!(largest(&logits).1, expected, "{value} at {place} of {len}");
                }
                logits[place] = kept;
            }
        }
        assert_eq!(first_equal(&[1.0; 3000], 2.0), None);
    }

    #[test]
    fn weights_are_exponentials_and_sum_up() {
        let (mut w, mut sums) = (Vec::new(), Vec::new());
        for (len, temperature) in [(1, 1.0), (1000, 0.3), (2500, 2.0)] {
            let mut logits = Random::new(3).vec(len, 20.0);
            logits[len / 2] = f32::NEG_INFINITY;
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max).max(0.0);
            weights(&mut w, &mut sums, &logits, max, temperature);
            let mut total = 0.0;
            for (w, logit) in w.iter().zip(&logits) {
                let exact = (f64::from(logit - max) / f64::from(temperature)).exp();
                assert!((f64::from(*w) - exact).abs() <= 2e-5 * exact + 1e-37, "{w} for {exact}");
                total += exact;
            }
            assert!((sums.iter().sum::<f64>() - total).abs() <= 1e-5 * total);
            if temperature == 1.0 {
                assert_eq!(sum_of_exponentials(&logits, max), sums.iter().sum::<f64>());
            }
        }
    }
}
