//! What beside the router decides which experts a token goes to, in training only.
//!
//! `S = topk(p + bias + steer·f_d)` for the tokens of domain d, f_d the experts that d is given to in this layer; or S at random. The weights of the chosen are
//! those of the router either way: `w = p[S] / Σ p[S]`. That ratio tells the router nothing about experts that were not chosen, so where steering is to be
//! learned the loss has `KL(q_d ‖ p)` as well, q_d even over f_d ([`Routing::pull_loss`](crate::moe::Routing::pull_loss)).
use std::{collections::BTreeMap, sync::Arc};

use ernie_kernels::router;

/// Domain of a token that belongs to none: padding.
pub const NO_DOMAIN: u16 = u16::MAX;

/// How the choice of experts is steered in one batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Steering {
    /// Every token's experts are drawn at random, all alike, so that each expert sees a fair sample of the batch.
    Uniform {
        /// Decides the draws; a batch that is computed again has the same.
        key: u64,
    },
    /// Every domain's tokens lean to the domain's experts.
    Favoured {
        /// Domain of each token, `[t]`.
        domains: Arc<[u16]>,
        /// The domains' experts, for each MoE layer by its index.
        layers: Arc<BTreeMap<usize, Favoured>>,
        /// Added to the scores of a domain's experts.
        strength: f32,
    },
}

/// The experts of each domain in one layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Favoured {
    /// `[domains, experts]` row by row.
    pub table: Vec<bool>,
    /// Experts.
    pub experts: usize,
}

impl Favoured {
    /// Whether a domain's tokens lean to an expert; those of a domain that the table does not know lean to none.
    fn has(&self, domain: u16, expert: usize) -> bool {
        self.table.get(usize::from(domain) * self.experts + expert).copied().unwrap_or(false)
    }

    /// 1 for the experts that each token leans to, 0 for the others, `[t, experts]` row by row.
    pub(crate) fn mask(&self, domains: &[u16]) -> Vec<f32> {
        let row = |&domain: &u16| (0..self.experts).map(move |expert| f32::from(u8::from(self.has(domain, expert))));
        domains.iter().flat_map(row).collect()
    }
}

/// Steering of one layer.
#[derive(Debug, Clone)]
pub struct LayerSteering {
    /// Of the batch.
    pub steering: Steering,
    /// Index of the layer.
    pub layer: usize,
}

impl LayerSteering {
    /// The experts that each token leans to, `[t, e]` row by row as [`Favoured::mask`] has them; none where nothing is to be learned.
    pub(crate) fn favoured(&self) -> Option<Vec<f32>> {
        match &self.steering {
            Steering::Uniform { .. } => None,
            Steering::Favoured { domains, layers, .. } => Some(layers.get(&self.layer)?.mask(domains)),
        }
    }

    /// The chosen experts `[t, top_k]` of tokens with router probabilities `probs` `[t, e]`; `bias` `[e]` is the router's own.
    pub(crate) fn select(&self, probs: &[f32], bias: &[f32], top_k: usize) -> Vec<u32> {
        let experts = bias.len();
        match &self.steering {
            Steering::Uniform { key } => {
                let stream = mix(key ^ mix(self.layer as u64 + 1));
                let scores: Vec<f32> = (0..probs.len() as u64).map(|place| (mix(stream ^ place) >> 40) as f32).collect();
                router::select(&scores, None, experts, top_k)
            }
            Steering::Favoured { strength, .. } => {
                let Some(mask) = self.favoured() else { return router::select(probs, Some(bias), experts, top_k) };
                assert_eq!(mask.len(), probs.len(), "steering of another batch");
                let scores: Vec<f32> = probs.iter().zip(mask).map(|(prob, favoured)| prob + strength * favoured).collect();
                router::select(&scores, Some(bias), experts, top_k)
            }
        }
    }
}

/// SplitMix64's finaliser over a counter (Steele, Lea, Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn favoured(strength: f32) -> LayerSteering {
        // Domain 0 is given to experts 2 and 3, domain 1 to expert 0.
        let table = vec![false, false, true, true, true, false, false, false];
        let layers = Arc::new(BTreeMap::from([(1, Favoured { table, experts: 4 })]));
        let steering = Steering::Favoured { domains: [0, 1, NO_DOMAIN].into(), layers, strength };
        LayerSteering { steering, layer: 1 }
    }

    #[test]
    fn a_domain_leans_to_its_experts_and_the_rest_goes_where_it_went() {
        let probs = [0.4, 0.3, 0.2, 0.1].repeat(3);
        let bias = [0.0; 4];
        assert_eq!(favoured(0.5).select(&probs, &bias, 2), [2, 3, 0, 1, 0, 1]);
        assert_eq!(favoured(0.15).select(&probs, &bias, 2), [0, 2, 0, 1, 0, 1]);
        assert_eq!(favoured(0.0).select(&probs, &bias, 2), [0, 1].repeat(3));
        // The correction bias still counts: it brings expert 1 above the favoured 3.
        assert_eq!(favoured(0.5).select(&probs, &[0.0, 0.6, 0.0, 0.0], 2)[..2], [1, 2]);
        assert_eq!(favoured(0.5).favoured().unwrap(), [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        // A layer without a table goes by its router.
        let other = LayerSteering { layer: 2, ..favoured(0.5) };
        assert_eq!((other.select(&probs, &bias, 2), other.favoured()), ([0, 1].repeat(3), None));
    }

    #[test]
    fn uniform_routing_is_even_and_forgets_the_router() {
        let of = |key: u64, layer: usize| LayerSteering { steering: Steering::Uniform { key }, layer };
        let probs = [0.9, 0.05, 0.03, 0.02].repeat(4000);
        let chosen = of(7, 1).select(&probs, &[0.0; 4], 2);
        let mut counts = [0; 4];
        chosen.iter().for_each(|&expert| counts[expert as usize] += 1);
        assert!(counts.iter().all(|&n| (1900..2100).contains(&n)), "{counts:?}");
        assert!(chosen.chunks(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(chosen, of(7, 1).select(&probs, &[0.0; 4], 2));
        assert_ne!(chosen, of(8, 1).select(&probs, &[0.0; 4], 2));
        assert_ne!(chosen, of(7, 2).select(&probs, &[0.0; 4], 2));
    }
}
