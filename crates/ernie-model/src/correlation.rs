//! Pearson's correlation of two numbers that come pair by pair.

/// Variance over mean square below which a number counts as one that never changes: sums of equal numbers differ by rounding.
const CONSTANT: f64 = 1e-12;

/// Sums over pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Correlation {
    pairs: f64,
    a: f64,
    b: f64,
    aa: f64,
    bb: f64,
    ab: f64,
}

impl Correlation {
    /// Takes in a pair.
    pub fn add(&mut self, a: f64, b: f64) {
        self.pairs += 1.0;
        self.a += a;
        self.b += b;
        self.aa += a * a;
        self.bb += b * b;
        self.ab += a * b;
    }

    /// The correlation of what came, −1 to 1; `None` where one of the two never changes.
    pub fn coefficient(&self) -> Option<f64> {
        let mean = |sum: f64| sum / self.pairs;
        let (of_a, of_b) = (mean(self.aa) - mean(self.a).powi(2), mean(self.bb) - mean(self.b).powi(2));
        let changes = of_a > CONSTANT * mean(self.aa) && of_b > CONSTANT * mean(self.bb);
        changes.then(|| ((mean(self.ab) - mean(self.a) * mean(self.b)) / (of_a * of_b).sqrt()).clamp(-1.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn correlation(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<f64> {
        let mut sums = Correlation::default();
        pairs.into_iter().for_each(|(a, b)| sums.add(a, b));
        sums.coefficient()
    }

    #[test]
    fn it_is_pearsons() {
        assert!((correlation([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]).unwrap() - 1.0).abs() < 1e-12);
        assert!((correlation([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]).unwrap() - 0.8).abs() < 1e-12);
        assert!((correlation([(1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (4.0, 1.0)]).unwrap() + 0.8).abs() < 1e-12);
    }

    #[test]
    fn what_never_changes_correlates_with_nothing() {
        assert_eq!(correlation([(1.0, 3.0), (2.0, 3.0)]), None);
        // Equal numbers whose sums are rounded.
        assert_eq!(correlation([(0.3, 1.0), (0.3, 2.0), (0.3, 0.0), (0.3, 1.0)]), None);
        assert_eq!(correlation([]), None);
    }
}
