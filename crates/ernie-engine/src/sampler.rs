//! From logits to a token.
//!
//! The order is that of Hugging Face transformers and vLLM: **penalties → temperature → top-k → top-p → min-p → draw**. (llama.cpp applies the
//! temperature last by default: with a temperature other than 1 the same top-p then keeps other tokens.)
//! - repetition penalty (Keskar et al. 2019, arXiv:1909.05858): the logit of every token in the prompt or the output is divided by it if positive,
//!   multiplied if negative;
//! - frequency and presence penalties (OpenAI's definition): `logit −= count·frequency + (count > 0)·presence`, counting the output only;
//! - top-k keeps the k likeliest tokens; top-p (Holtzman et al. 2020) the fewest likeliest whose probabilities reach p, at least one; min-p
//!   (Nguyen et al. 2024, arXiv:2407.01082) those at least `min_p` times as likely as the likeliest. Each renormalises what is left.
//!
//! Tokens of equal logit rank by their id, the lower first. Temperature 0 takes the first; no random number is drawn then.
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::random::Random;

/// How to choose tokens and when to stop. `Default` draws from the model's own distribution and stops at the end-of-sequence token.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 means greedy. Finite and ≥ 0.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens that together reach this probability, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the likeliest, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Over prompt and output; > 0, 1 changes nothing.
    pub repetition_penalty: f32,
    /// Over the output; finite, 0 changes nothing.
    pub presence_penalty: f32,
    /// Over the output, per occurrence; finite, 0 changes nothing.
    pub frequency_penalty: f32,
    /// The same seed with the same prompt and parameters gives the same tokens.
    pub seed: u64,
    /// Generation ends before the first of these strings; none may be empty.
    pub stop: Vec<String>,
    /// Generation ends with any of these tokens, besides the end-of-sequence tokens of the model.
    pub stop_ids: Vec<u32>,
    /// Do not stop at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Most tokens to generate; ≥ 1.
    pub max_tokens: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            max_tokens: 256,
        }
    }
}

impl SamplingParams {
    /// Temperature 0: the likeliest token each time.
    pub fn greedy() -> Self {
        SamplingParams { temperature: 0.0, ..Self::default() }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Parameter`] for the first field out of range.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field, expected, got: &dyn std::fmt::Display| {
            if ok { Ok(()) } else { Err(Error::Parameter { field, expected, got: got.to_string() }) }
        };
        check(self.temperature.is_finite() && self.temperature >= 0.0, "temperature", "a finite number ≥ 0", &self.temperature)?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "a number in (0, 1]", &self.top_p)?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", "a number in [0, 1]", &self.min_p)?;
        let repetition = self.repetition_penalty;
        check(repetition.is_finite() && repetition > 0.0, "repetition_penalty", "a finite number > 0", &repetition)?;
        check(self.presence_penalty.is_finite(), "presence_penalty", "a finite number", &self.presence_penalty)?;
        check(self.frequency_penalty.is_finite(), "frequency_penalty", "a finite number", &self.frequency_penalty)?;
        check(self.stop.iter().all(|s| !s.is_empty()), "stop", "strings of at least one character", &"an empty string")?;
        check(self.max_tokens > 0, "max_tokens", "a number ≥ 1", &self.max_tokens)
    }
}

/// Chooses the tokens of one request.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    random: Random,
    /// Occurrences of a token in the output; 0 for one that only the prompt has.
    counts: HashMap<u32, u32>,
}

/// A token that may still be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    /// By logit; of equal ones the lower id is the greater, since it comes first.
    fn cmp(&self, other: &Self) -> Ordering {
        // −0 and +0 are one logit, though `total_cmp` would part them.
        let (a, b) = (self.logit + 0.0, other.logit + 0.0);
        a.total_cmp(&b).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Sampler {
    /// A sampler for one request.
    ///
    /// # Errors
    /// [`Error::Parameter`].
    pub fn new(params: &SamplingParams) -> Result<Self> {
        params.validate()?;
        Ok(Sampler { params: params.clone(), random: Random::new(params.seed), counts: HashMap::new() })
    }

    /// Tells the prompt, which the repetition penalty counts.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        for &id in ids {
            self.counts.entry(id).or_insert(0);
        }
    }

    /// Chooses a token and remembers it for the penalties. `logits`: `[vocab]`.
    ///
    /// # Errors
    /// [`Error::BadLogit`] if one is NaN or +∞ or all are −∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let id = if self.params.temperature == 0.0 {
            self.candidates(logits)?.max().map_or(0, |best| best.id)
        } else {
            let distribution = self.distribution(logits)?;
            draw(&distribution, self.random.uniform())
        };
        *self.counts.entry(id).or_insert(0) += 1;
        Ok(id)
    }

    /// The distribution from which [`Sampler::sample`] would draw now: tokens that may be chosen with their probabilities, which sum to 1. From the
    /// likeliest on if any of top-k, top-p or min-p is set, else by id. With temperature 0 it is the one likeliest token.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn distribution(&self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let candidates = self.candidates(logits)?;
        if temperature == 0.0 {
            return Ok(candidates.max().map(|best| (best.id, 1.0)).into_iter().collect());
        }
        let candidates: Vec<Candidate> = candidates.collect();
        let max = candidates.iter().fold(f32::NEG_INFINITY, |a, c| a.max(c.logit));
        // Unnormalised: the likeliest token has 1, so no exponential overflows however small the temperature.
        let weight = |c: Candidate| (f64::from(c.logit - max) / f64::from(temperature)).exp();

        let mut kept: Vec<(u32, f64)>;
        if top_k == 0 && top_p == 1.0 && min_p == 0.0 {
            kept = candidates.iter().map(|&c| (c.id, weight(c))).collect();
        } else {
            let most = if top_k == 0 { candidates.len() } else { top_k.min(candidates.len()) };
            let mut heap: BinaryHeap<Candidate>;
            let total: f64;
            if most < candidates.len() {
                let mut likeliest = candidates;
                likeliest.select_nth_unstable_by(most - 1, |a, b| b.cmp(a));
                likeliest.truncate(most);
                heap = likeliest.into();
                // In rank order, so that the sum does not depend on how the selection left them.
                total = heap.clone().into_sorted_vec().iter().rev().map(|&c| weight(c)).sum();
            } else {
                total = candidates.iter().map(|&c| weight(c)).sum();
                heap = candidates.into();
            }
            // From the likeliest on, until their share reaches top_p or their weight falls below min_p.
            kept = Vec::new();
            let mut sum = 0.0;
            while let Some(candidate) = heap.pop() {
                let w = weight(candidate);
                if !kept.is_empty() && (w < f64::from(min_p) || (top_p < 1.0 && sum >= f64::from(top_p) * total)) {
                    break;
                }
                kept.push((candidate.id, w));
                sum += w;
            }
        }
        let total: f64 = kept.iter().map(|(_, w)| w).sum();
        kept.iter_mut().for_each(|(_, w)| *w /= total);
        Ok(kept)
    }

    /// All tokens with their penalised logits.
    fn candidates(&self, logits: &[f32]) -> Result<impl Iterator<Item = Candidate>> {
        if let Some((id, &value)) = logits.iter().enumerate().find(|(_, l)| l.is_nan() || **l == f32::INFINITY) {
            return Err(Error::BadLogit { id, value });
        }
        if logits.iter().all(|&l| l == f32::NEG_INFINITY) {
            return Err(Error::BadLogit { id: 0, value: f32::NEG_INFINITY });
        }
        let p = &self.params;
        let penalised = p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
        let mut changed: Vec<(u32, f32)> = Vec::new();
        if penalised {
            for (&id, &count) in &self.counts {
                if let Some(&logit) = logits.get(id as usize) {
                    // In f64, where no valid penalty overflows.
                    let [l, repetition, frequency, presence] =
                        [logit, p.repetition_penalty, p.frequency_penalty, p.presence_penalty].map(f64::from);
                    let repeated = if l > 0.0 { l / repetition } else { l * repetition };
                    let value = repeated - f64::from(count) * frequency - if count > 0 { presence } else { 0.0 };
                    let value = value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
                    changed.push((id, if logit == f32::NEG_INFINITY { logit } else { value }));
                }
            }
            changed.sort_unstable_by_key(|&(id, _)| id);
        }
        let mut changed = changed.into_iter().peekable();
        Ok(logits.iter().enumerate().map(move |(id, &logit)| {
            let id = id as u32;
            let logit = changed.next_if(|&(at, _)| at == id).map_or(logit, |(_, value)| value);
            Candidate { logit, id }
        }))
    }
}

/// The token at which the running sum of probabilities passes `u` in [0, 1).
fn draw(distribution: &[(u32, f64)], u: f64) -> u32 {
    let mut left = u;
    for &(id, probability) in distribution {
        left -= probability;
        if left < 0.0 {
            return id;
        }
    }
    // Rounding may leave the sum a little below 1: the last token that has any probability.
    distribution.iter().rev().find(|(_, p)| *p > 0.0).map_or(0, |&(id, _)| id)
}
