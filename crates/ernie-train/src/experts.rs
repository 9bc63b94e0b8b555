//! How experts divide the domains among themselves, on text whose domains no router is told.
use serde::{Deserialize, Serialize};

/// Which experts the tokens of a text went to, by domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertUse {
    /// Names of the domains.
    pub domains: Vec<String>,
    /// The MoE layers in order.
    pub layers: Vec<LayerUse>,
    /// Mean of the layers' overlaps.
    pub overlap: f64,
    /// Least of the layers' `least_used`.
    pub least_used: f64,
}

/// The same of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerUse {
    /// Index of the layer.
    pub layer: usize,
    /// Tokens of each domain (outer) in each expert (inner); a token counts once for each of its experts.
    pub counts: Vec<Vec<u64>>,
    /// [`overlap`] of them.
    pub overlap: f64,
    /// [`least_used`] of them.
    pub least_used: f64,
}

impl ExpertUse {
    /// From the counts of each layer, each by domain and expert; `None` of a model without experts.
    pub fn new(domains: &[String], layers: impl IntoIterator<Item = (usize, Vec<Vec<u64>>)>) -> Option<Self> {
        let layers: Vec<LayerUse> = layers
            .into_iter()
            .map(|(layer, counts)| LayerUse { layer, overlap: overlap(&counts), least_used: least_used(&counts), counts })
            .collect();
        let overlap = layers.iter().map(|layer| layer.overlap).sum::<f64>() / layers.len() as f64;
        let least_used = layers.iter().map(|layer| layer.least_used).fold(f64::INFINITY, f64::min);
        (!layers.is_empty()).then(|| Self { domains: domains.to_vec(), layers, overlap, least_used })
    }
}

/// Mean over pairs of experts of `Σ_domain min(p(domain|e), p(domain|e'))`, from tokens of each domain in each expert: 1 where all experts see the same
/// mixture of domains, 0 where no two share one. An expert without tokens has no mixture and is in no pair ([`least_used`] tells of it); 1 without pairs.
pub fn overlap(counts: &[Vec<u64>]) -> f64 {
    let experts = counts.first().map_or(0, Vec::len);
    let total = |expert: usize| counts.iter().map(|row| row[expert]).sum::<u64>();
    let used: Vec<usize> = (0..experts).filter(|&expert| total(expert) > 0).collect();
    let share = |domain: &[u64], expert: usize| domain[expert] as f64 / total(expert) as f64;
    let pair = |a: usize, b: usize| counts.iter().map(|domain| share(domain, a).min(share(domain, b))).sum::<f64>();
    let pairs: Vec<f64> =
        used.iter().enumerate().flat_map(|(place, &a)| used[..place].iter().map(move |&b| (a, b))).map(|(a, b)| pair(a, b)).collect();
    if pairs.is_empty() { 1.0 } else { pairs.iter().sum::<f64>() / pairs.len() as f64 }
}

/// Share of the tokens of the expert that has least, times the number of experts: 1 where all have the same, 0 where one has none.
pub fn least_used(counts: &[Vec<u64>]) -> f64 {
    let experts = counts.first().map_or(0, Vec::len);
    let totals: Vec<u64> = (0..experts).map(|expert| counts.iter().map(|row| row[expert]).sum()).collect();
    let sum = totals.iter().sum::<u64>().max(1) as f64;
    totals.iter().min().copied().unwrap_or(0) as f64 * experts as f64 / sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_by_hand() {
        assert_eq!(overlap(&[vec![10, 0], vec![0, 3]]), 0.0);
        assert_eq!(overlap(&[vec![10, 20], vec![30, 60]]), 1.0);
        // p(·|e) = (1/2, 1/2), (1/4, 3/4), (1, 0): 3/4, 1/2, 1/4 for the three pairs.
        assert!((overlap(&[vec![2, 1, 5], vec![2, 3, 0]]) - 0.5).abs() < 1e-12);
        // The dead expert is in no pair.
        assert!((overlap(&[vec![2, 1, 0, 5], vec![2, 3, 0, 0]]) - 0.5).abs() < 1e-12);
        assert_eq!(overlap(&[vec![4]]), 1.0);
    }

    #[test]
    fn least_used_by_hand() {
        assert_eq!(least_used(&[vec![2, 2], vec![3, 3]]), 1.0);
        assert_eq!(least_used(&[vec![3, 1, 0], vec![0, 1, 5]]), 0.6);
        assert_eq!(least_used(&[vec![3, 0]]), 0.0);
    }

    #[test]
    fn layers_are_summed_up() {
        let domains = ["a".to_owned(), "b".to_owned()];
        let found = ExpertUse::new(&domains, [(1, vec![vec![1, 0], vec![0, 1]]), (2, vec![vec![3, 1], vec![3, 1]])]).unwrap();
        assert_eq!((found.overlap, found.least_used), (0.5, 0.5));
        assert_eq!(ExpertUse::new(&domains, []), None);
        let text = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<ExpertUse>(&text).unwrap(), found);
    }
}
