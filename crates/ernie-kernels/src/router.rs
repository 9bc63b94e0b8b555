//! Which experts a token goes to. The correction bias picks experts and never weights them (it is in no other formula).

/// indices[t, top_k]: for each token the experts with the largest `probs[t, e]` + `bias[e]`, summed in f32, best first; ties go to the lower index.
pub fn select(probs: &[f32], bias: Option<&[f32]>, experts: usize, top_k: usize) -> Vec<u32> {
    let mut indices = Vec::with_capacity(probs.len() / experts.max(1) * top_k);
    select_into(&mut indices, &mut Vec::new(), probs, bias, experts, top_k);
    indices
}

/// [`select`] into memory that is kept: `indices` is overwritten, `scores` holds what it may.
pub fn select_into(indices: &mut Vec<u32>, scores: &mut Vec<f32>, probs: &[f32], bias: Option<&[f32]>, experts: usize, top_k: usize) {
    assert!(experts > 0 && probs.len().is_multiple_of(experts), "{} probabilities are no rows of {experts}", probs.len());
    assert!(top_k <= experts, "{top_k} of {experts} experts");
    assert!(bias.is_none_or(|bias| bias.len() == experts), "the correction bias is not one number per expert");
    indices.clear();
    scores.resize(experts, 0.0);
    for probs in probs.chunks_exact(experts) {
        scores.copy_from_slice(probs);
        if let Some(bias) = bias {
            for (score, bias) in scores.iter_mut().zip(bias) {
                *score += bias;
            }
        }
        let first = indices.len();
        for _ in 0..top_k {
            let mut best = None;
            for (expert, &score) in scores.iter().enumerate() {
                let taken = indices[first..].contains(&(expert as u32));
                if !taken && best.is_none_or(|(_, best)| score > best) {
                    best = Some((expert, score));
                }
            }
            let (expert, _) = best.expect("top_k is at most the number of experts");
            indices.push(expert as u32);
        }
    }
}

/// The same by sorting all experts.
pub mod scalar {
    /// See [`select`](super::select).
    pub fn select(probs: &[f32], bias: Option<&[f32]>, experts: usize, top_k: usize) -> Vec<u32> {
        let mut indices = Vec::new();
        for probs in probs.chunks_exact(experts) {
            let score = |expert: usize| probs[expert] + bias.map_or(0.0, |bias| bias[expert]);
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| score(b).total_cmp(&score(a))); // A stable sort: equal scores keep the lower index first.
            indices.extend(order[..top_k].iter().map(|&expert| expert as u32));
        }
        indices
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn equals_sorting() {
        let mut random = Random::new(16);
        for (tokens, experts, top_k) in [(1, 1, 1), (9, 8, 2), (5, 64, 6), (3, 5, 5), (0, 4, 2)] {
            // Few distinct values, so that there are ties.
            let probs: Vec<f32> = (0..tokens * experts).map(|_| random.below(6) as f32 / 8.0).collect();
            let bias: Vec<f32> = (0..experts).map(|_| random.below(4) as f32 / 8.0).collect();
            assert_eq!(select(&probs, None, experts, top_k), scalar::select(&probs, None, experts, top_k));
            assert_eq!(select(&probs, Some(&bias), experts, top_k), scalar::select(&probs, Some(&bias), experts, top_k));
        }
    }

    #[test]
    fn the_bias_changes_the_choice_and_ties_go_to_the_lower_index() {
        let probs = [0.4, 0.3, 0.2, 0.1];
        assert_eq!(select(&probs, None, 4, 2), [0, 1]);
        assert_eq!(select(&probs, Some(&[0.0, 0.0, 0.0, 0.5]), 4, 2), [3, 0]);
        assert_eq!(select(&[0.25; 4], None, 4, 3), [0, 1, 2]);
    }

    #[test]
    fn scores_that_are_not_numbers_still_give_distinct_experts() {
        let mut chosen = select(&[f32::NAN; 4], None, 4, 4);
        chosen.sort_unstable();
        assert_eq!(chosen, [0, 1, 2, 3]);
    }
}
