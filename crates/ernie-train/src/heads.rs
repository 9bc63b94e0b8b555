//! What gated heads did on a text: how many were open, and whether more of them where a token brings more.
use ernie_model::correlation::Correlation;
use serde::{Deserialize, Serialize};

/// The gates of one layer on a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "Saved")]
pub struct HeadUse {
    /// Index of the layer.
    pub layer: usize,
    /// Share of the heads that are active, over all tokens.
    pub share: f64,
    /// Pearson correlation of a token's semantic density with the number of its active heads; none where one of them never changes.
    pub correlation: Option<f64>,
}

/// As reports have it; those of earlier programs only the layer and the share.
#[derive(Deserialize)]
#[serde(untagged)]
enum Saved {
    Share(usize, f64),
    Whole { layer: usize, share: f64, correlation: Option<f64> },
}

impl From<Saved> for HeadUse {
    fn from(saved: Saved) -> Self {
        match saved {
            Saved::Share(layer, share) => Self { layer, share, correlation: None },
            Saved::Whole { layer, share, correlation } => Self { layer, share, correlation },
        }
    }
}

/// Sums over the tokens of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct HeadSums {
    heads: usize,
    tokens: f64,
    /// Active heads of all tokens.
    active: f64,
    /// A token's density and the number of its active heads.
    together: Correlation,
}

impl HeadSums {
    /// Takes in the tokens that are text: density `[t]`, active heads `[t, heads]` row by row, and which tokens are text, `[t]`.
    pub(crate) fn add(&mut self, density: &[f32], active: &[bool], text: impl Iterator<Item = bool>) {
        self.heads = active.len() / density.len().max(1);
        let tokens = density.iter().zip(active.chunks(self.heads.max(1))).zip(text);
        for ((&density, active), _) in tokens.filter(|(_, text)| *text) {
            let open = active.iter().filter(|active| **active).count() as f64;
            self.tokens += 1.0;
            self.active += open;
            self.together.add(f64::from(density), open);
        }
    }

    /// What they come to; none without a token.
    pub(crate) fn of_layer(&self, layer: usize) -> Option<HeadUse> {
        let share = self.active / (self.tokens * self.heads as f64);
        (self.tokens > 0.0 && self.heads > 0).then(|| HeadUse { layer, share, correlation: self.together.coefficient() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two heads; the last token is padding.
    fn sums(density: [f32; 5], open: [usize; 5]) -> HeadSums {
        let active: Vec<bool> = open.iter().flat_map(|&open| [open > 0, open > 1]).collect();
        let mut sums = HeadSums::default();
        // In two pieces, as batches come.
        sums.add(&density[..2], &active[..4], [true, true].into_iter());
        sums.add(&density[2..], &active[4..], [true, true, false].into_iter());
        sums
    }

    #[test]
    fn shares_and_correlations_are_those_of_the_text() {
        let found = sums([0.5, 1.0, 0.25, 0.75, 9.0], [1, 2, 0, 1, 2]).of_layer(3).unwrap();
        assert_eq!((found.layer, found.share), (3, 0.5));
        // Deviations −1/8, 3/8, −3/8, 1/8 and 0, 1, −1, 0: (6/8) / √(20/64 · 2).
        assert!((found.correlation.unwrap() - 0.75 / 0.625f64.sqrt()).abs() < 1e-12, "{found:?}");
        let against = sums([0.5, 1.0, 0.25, 0.75, 9.0], [1, 0, 2, 1, 2]).of_layer(0).unwrap();
        assert!((against.correlation.unwrap() + 0.75 / 0.625f64.sqrt()).abs() < 1e-12, "{against:?}");
        assert_eq!(HeadSums::default().of_layer(0), None);
    }

    #[test]
    fn reports_of_before_are_read() {
        let found: Vec<HeadUse> = serde_json::from_str(r#"[[0, 0.5], {"layer": 1, "share": 0.25, "correlation": null}]"#).unwrap();
        let expected = [(0, 0.5), (1, 0.25)].map(|(layer, share)| HeadUse { layer, share, correlation: None });
        assert_eq!(found, expected);
        let whole = HeadUse { correlation: Some(0.125), ..expected[0] };
        assert_eq!(serde_json::from_str::<HeadUse>(&serde_json::to_string(&whole).unwrap()).unwrap(), whole);
    }
}
