//! Log-probabilities of tokens under the model itself, before temperature, penalties and biases.
use ernie_kernels::logits as kernels;

/// The distribution that some logits stand for.
#[derive(Clone, Copy, Debug)]
pub struct LogProbs<'a> {
    logits: &'a [f32],
    max: f32,
    /// ln Σ exp(logit − max).
    log_sum: f64,
}

impl<'a> LogProbs<'a> {
    /// Of `logits`, `[vocab]`, all of them numbers.
    pub fn of(logits: &'a [f32]) -> Self {
        let (max, _) = kernels::largest(logits);
        LogProbs { logits, max, log_sum: kernels::sum_of_exponentials(logits, max).ln() }
    }

    /// ln softmax(logits)\[token\].
    ///
    /// # Panics
    /// If there is no such token.
    pub fn of_token(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize] - self.max) - self.log_sum) as f32
    }

    /// The `count` likeliest tokens with their log-probabilities, the likeliest first; of equal ones the lower id.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        let count = count.min(self.logits.len());
        if count == 0 {
            return Vec::new();
        }
        let logits = self.logits;
        let rank = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if count < ids.len() {
            ids.select_nth_unstable_by(count - 1, rank);
            ids.truncate(count);
        }
        ids.sort_unstable_by(rank);
        ids.into_iter().map(|id| (id, self.of_token(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::LogProbs;

    #[test]
    fn they_are_the_softmax_and_come_in_order() {
        let logits: Vec<f32> = [0.5, 2.0, f32::NEG_INFINITY, 2.0, -1.0].to_vec();
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let scores = LogProbs::of(&logits);
        for (id, &logit) in logits.iter().enumerate() {
            let expected = (f64::from(logit).exp() / total).ln();
            let got = f64::from(scores.of_token(id as u32));
            assert!(got == expected || (got - expected).abs() < 1e-6, "token {id}: {got}, expected {expected}");
        }
        let ids = |count| scores.top(count).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert!(ids(0).is_empty());
        assert_eq!(ids(3), [1, 3, 0]);
        assert_eq!(ids(9), [1, 3, 0, 4, 2]);
        assert!(scores.top(9).iter().all(|&(id, logprob)| logprob == scores.of_token(id)));
    }
}
