//! How far a mean over examples can be trusted: the percentile bootstrap (Efron, *Bootstrap Methods: Another Look at the Jackknife*, 1979).

/// Draws of as many examples as there are; `rouge-score` takes as many.
const RESAMPLES: usize = 1000;

/// Seed of the draws: the same values always give the same interval.
const SEED: u64 = 20_040_725;

/// A mean, and where it would lie in 95% of the cases had other examples of the same kind been taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// The mean; 0 without values.
    pub mean: f64,
    /// The 2.5th percentile of the means of the draws.
    pub low: f64,
    /// The 97.5th.
    pub high: f64,
}

impl Estimate {
    /// The mean of values that were got independently.
    pub fn of(values: &[f64]) -> Self {
        if values.is_empty() {
            return Estimate::default();
        }
        let count = values.len();
        let mean = |sum: f64| sum / count as f64;
        let mut state = SEED;
        let mut means: Vec<f64> = (0..RESAMPLES).map(|_| mean((0..count).map(|_| values[below(count, &mut state)]).sum())).collect();
        means.sort_by(f64::total_cmp);
        Estimate { mean: mean(values.iter().sum()), low: percentile(&means, 0.025), high: percentile(&means, 0.975) }
    }
}

/// A number in `0..count`, each as likely: the high half of a product (Lemire, arXiv 1805.10941; its bias is below count / 2⁶⁴) with a number of SplitMix64
/// (Steele, Lea, Flood 2014).
fn below(count: usize, state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((u128::from(z) * count as u128) >> 64) as usize
}

/// Between the two sorted values that are next to it, as numpy does by default.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_normal_distribution_for_many_values() {
        // 400 coins: the mean's standard error is 0.5 / 20.
        let coins: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let Estimate { mean, low, high } = Estimate::of(&coins);
        assert_eq!(mean, 0.5);
        let expected = 1.96 * 0.025;
        assert!((0.5 - low - expected).abs() < 0.006 && (high - 0.5 - expected).abs() < 0.006, "{low} {high}");
        assert_eq!(Estimate::of(&coins), Estimate::of(&coins));
    }

    #[test]
    fn few_values_are_no_trouble() {
        assert_eq!(Estimate::of(&[]), Estimate { mean: 0.0, low: 0.0, high: 0.0 });
        assert_eq!(Estimate::of(&[0.25]), Estimate { mean: 0.25, low: 0.25, high: 0.25 });
        let two = Estimate::of(&[0.0, 1.0]);
        assert_eq!((two.low, two.mean, two.high), (0.0, 0.5, 1.0));
    }

    #[test]
    fn percentiles_lie_between_values() {
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.75), 3.0);
    }
}
