//! How often rows are drawn compared with drawing them alike.
use serde::{Deserialize, Serialize};

/// Bins to a factor of two.
const PER_OCTAVE: f64 = 4.0;
/// The first and the last bin begin at 2 to this power; what is beyond is counted in them.
const OCTAVES: [f64; 2] = [-4.0, 4.0];

/// Rows by their probability over that of uniform sampling, in bins of equal width of the logarithm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RatioHistogram {
    /// Rows in each bin; bin i holds ratios from 2^(i/4 − 4) to 2^((i+1)/4 − 4), the first and the last also all beyond.
    pub rows: Vec<u64>,
}

impl RatioHistogram {
    /// Of these ratios, all above 0.
    pub fn of(ratios: impl IntoIterator<Item = f64>) -> Self {
        let bins = ((OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE) as usize;
        let mut rows = vec![0; bins];
        for ratio in ratios {
            // A cast of what is below 0 gives 0.
            let bin = ((ratio.log2() - OCTAVES[0]) * PER_OCTAVE).floor() as usize;
            rows[bin.min(bins - 1)] += 1;
        }
        Self { rows }
    }

    /// The ratio at which a bin begins.
    pub fn begins(bin: usize) -> f64 {
        (OCTAVES[0] + bin as f64 / PER_OCTAVE).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_fall_into_their_bins() {
        let histogram = RatioHistogram::of([1.0, 1.1, 2.0, 0.5, 1e-9, 1e9]);
        assert_eq!(histogram.rows.len(), 32);
        let filled: Vec<(usize, u64)> = (0..).zip(histogram.rows).filter(|(_, rows)| *rows > 0).collect();
        assert_eq!(filled, [(0, 1), (12, 1), (16, 2), (20, 1), (31, 1)]);
        assert_eq!((RatioHistogram::begins(12), RatioHistogram::begins(16), RatioHistogram::begins(20)), (0.5, 1.0, 2.0));
    }
}
