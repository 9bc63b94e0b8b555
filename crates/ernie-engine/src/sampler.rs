//! From logits to a token.
//!
//! The order is that of Hugging Face transformers and vLLM: **penalties and biases → temperature → top-k → top-p → min-p → draw**. (llama.cpp applies the
//! temperature last by default: with a temperature other than 1 the same top-p then keeps other tokens.)
//! - repetition penalty (Keskar et al. 2019, arXiv:1909.05858): the logit of every token in the prompt or the output is divided by it if positive,
//!   multiplied if negative;
//! - frequency and presence penalties (OpenAI's definition): `logit −= count·frequency + (count > 0)·presence`, counting the output only;
//! - a bias is added to its token's logit after that: −100 as good as forbids a token, 100 as good as commands it (OpenAI's definition);
//! - top-k keeps the k likeliest tokens; top-p (Holtzman et al. 2020) the fewest likeliest whose probabilities reach p, at least one; min-p
//!   (Nguyen et al. 2024, arXiv:2407.01082) those at least `min_p` times as likely as the likeliest. Each renormalises what is left.
//!
//! Tokens of equal logit rank by their id, the lower first. Temperature 0 takes the first; no random number is drawn then.
use std::cmp::Ordering;
use std::collections::HashMap;

use ernie_kernels::logits as kernels;

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
    /// Added to the logits of these tokens; finite. Of a token that is named more than once all count.
    pub logit_bias: Vec<(u32, f32)>,
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
            logit_bias: Vec::new(),
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
        let bias = self.logit_bias.iter().map(|(_, bias)| bias).find(|bias| !bias.is_finite());
        check(bias.is_none(), "logit_bias", "finite numbers", bias.unwrap_or(&0.0))?;
        check(self.stop.iter().all(|s| !s.is_empty()), "stop", "strings of at least one character", &"an empty string")?;
        check(self.max_tokens > 0, "max_tokens", "a number ≥ 1", &self.max_tokens)
    }
}

/// Chooses the tokens of one request. Its working memory is kept from token to token.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    random: Random,
    /// Occurrences of a token in the output; 0 for one that only the prompt has.
    counts: HashMap<u32, u32>,
    penalised: Vec<f32>,
    weights: Vec<f32>,
    sums: Vec<f64>,
    kept: Vec<Candidate>,
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    /// exp((logit − largest) / temperature): the likeliest token has 1, so no exponential overflows however small the temperature.
    weight: f64,
}

impl Candidate {
    /// The likelier first; of equal logits the lower id. −0 and +0 are one logit, though `total_cmp` would part them.
    fn rank(&self, other: &Self) -> Ordering {
        (other.logit + 0.0).total_cmp(&(self.logit + 0.0)).then(self.id.cmp(&other.id))
    }
}

impl Sampler {
    /// A sampler for one request.
    ///
    /// # Errors
    /// [`Error::Parameter`].
    pub fn new(params: &SamplingParams) -> Result<Self> {
        params.validate()?;
        Ok(Sampler {
            params: params.clone(),
            random: Random::new(params.seed),
            counts: HashMap::new(),
            penalised: Vec::new(),
            weights: Vec::new(),
            sums: Vec::new(),
            kept: Vec::new(),
        })
    }

    /// Tells the prompt, which the repetition penalty counts.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        if self.penalises() {
            for &id in ids {
                self.counts.entry(id).or_insert(0);
            }
        }
    }

    /// Chooses a token and remembers it for the penalties. `logits`: `[vocab]`.
    ///
    /// # Errors
    /// [`Error::BadLogit`] if one is NaN or +∞ or all are −∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let max = self.penalise(logits)?;
        let logits = if self.penalises() { &self.penalised } else { logits };
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let id = if temperature == 0.0 {
            kernels::first_equal(logits, max).map_or(0, |id| id as u32)
        } else if top_k == 0 && top_p == 1.0 && min_p == 0.0 {
            kernels::weights(&mut self.weights, &mut self.sums, logits, max, temperature);
            draw_block(&self.weights, &self.sums, self.random.uniform())
        } else {
            Self::keep(&self.params, &mut self.kept, &mut self.weights, &mut self.sums, logits, max);
            draw(&self.kept, self.random.uniform())
        };
        if self.penalises() {
            *self.counts.entry(id).or_insert(0) += 1;
        }
        Ok(id)
    }

    /// The distribution from which [`Sampler::sample`] would draw now: tokens that may be chosen with their probabilities, which sum to 1. From the
    /// likeliest on if any of top-k, top-p or min-p is set, else by id. With temperature 0 it is the one likeliest token.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn distribution(&mut self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        let max = self.penalise(logits)?;
        let logits = if self.penalises() { &self.penalised } else { logits };
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        if temperature == 0.0 {
            return Ok(kernels::first_equal(logits, max).map(|id| (id as u32, 1.0)).into_iter().collect());
        }
        let kept: Vec<(u32, f64)> = if top_k == 0 && top_p == 1.0 && min_p == 0.0 {
            kernels::weights(&mut self.weights, &mut self.sums, logits, max, temperature);
            self.weights.iter().enumerate().map(|(id, &w)| (id as u32, f64::from(w))).collect()
        } else {
            Self::keep(&self.params, &mut self.kept, &mut self.weights, &mut self.sums, logits, max);
            self.kept.iter().map(|c| (c.id, c.weight)).collect()
        };
        let total: f64 = kept.iter().map(|(_, w)| w).sum();
        Ok(kept.into_iter().map(|(id, w)| (id, w / total)).collect())
    }

    fn penalises(&self) -> bool {
        let p = &self.params;
        p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 || !p.logit_bias.is_empty()
    }

    /// Checks the logits and, if there are penalties, puts the penalised ones aside. Returns the largest.
    fn penalise(&mut self, logits: &[f32]) -> Result<f32> {
        let (max, bad) = kernels::largest(logits);
        if bad && let Some((id, &value)) = logits.iter().enumerate().find(|(_, l)| l.is_nan() || **l == f32::INFINITY) {
            return Err(Error::BadLogit { id, value });
        }
        if max == f32::NEG_INFINITY {
            return Err(Error::BadLogit { id: 0, value: max });
        }
        if !self.penalises() {
            return Ok(max);
        }
        self.penalised.clear();
        self.penalised.extend_from_slice(logits);
        let p = &self.params;
        for (&id, &count) in &self.counts {
            let Some(logit) = self.penalised.get_mut(id as usize) else { continue };
            // In f64, where no valid penalty overflows.
            let [l, repetition, frequency, presence] =
                [*logit, p.repetition_penalty, p.frequency_penalty, p.presence_penalty].map(f64::from);
            let repeated = if l > 0.0 { l / repetition } else { l * repetition };
            let value = repeated - f64::from(count) * frequency - if count > 0 { presence } else { 0.0 };
            if *logit != f32::NEG_INFINITY {
                *logit = value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
            }
        }
        for &(id, bias) in &self.params.logit_bias {
            if let Some(logit) = self.penalised.get_mut(id as usize)
                && *logit != f32::NEG_INFINITY
            {
                *logit = (f64::from(*logit) + f64::from(bias)).clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
            }
        }
        Ok(kernels::largest(&self.penalised).0)
    }

    /// Fills `kept` with the tokens that top-k, top-p and min-p leave, from the likeliest on. Only tokens within some distance of the likeliest are
    /// gathered and sorted; the distance grows until what was asked for is among them, which it mostly is at once.
    fn keep(params: &SamplingParams, kept: &mut Vec<Candidate>, weights: &mut Vec<f32>, sums: &mut Vec<f64>, logits: &[f32], max: f32) {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = *params;
        let (top_p, min_p) = (f64::from(top_p), f64::from(min_p));
        let weight = |logit: f32| (f64::from(logit - max) / f64::from(temperature)).exp();
        let limited = top_k > 0 && top_k < logits.len();
        let everything = if limited || top_p == 1.0 {
            0.0
        } else {
            kernels::weights(weights, sums, logits, max, temperature);
            sums.iter().sum()
        };
        for distance in [4.0, 8.0, 16.0, 32.0, f32::INFINITY] {
            let least = max - distance * temperature;
            kept.clear();
            let near = logits.iter().enumerate().filter(|(_, logit)| **logit >= least);
            kept.extend(near.map(|(id, &logit)| Candidate { id: id as u32, logit, weight: weight(logit) }));
            let total = if limited {
                if kept.len() < top_k && distance.is_finite() {
                    continue;
                }
                if kept.len() > top_k {
                    kept.select_nth_unstable_by(top_k - 1, Candidate::rank);
                    kept.truncate(top_k);
                }
                kept.sort_unstable_by(Candidate::rank);
                kept.iter().rev().map(|c| c.weight).sum()
            } else {
                let sum: f64 = kept.iter().map(|c| c.weight).sum();
                // The two sums round differently; a margin keeps the question open rather than answering it wrongly.
                let enough = (top_p < 1.0 && sum >= (top_p + 1e-4) * everything) || weight(least) < min_p;
                if !enough && distance.is_finite() {
                    continue;
                }
                kept.sort_unstable_by(Candidate::rank);
                everything
            };
            let mut sum = 0.0;
            let end = kept.iter().position(|c| {
                let ends = sum > 0.0 && (c.weight < min_p || (top_p < 1.0 && sum >= top_p * total));
                sum += c.weight;
                ends
            });
            kept.truncate(end.unwrap_or(kept.len()));
            return;
        }
    }
}

/// The token at which the running sum of weights passes `u` in [0, 1) of their total.
fn draw(kept: &[Candidate], u: f64) -> u32 {
    let mut left = u * kept.iter().map(|c| c.weight).sum::<f64>();
    for candidate in kept {
        left -= candidate.weight;
        if left < 0.0 {
            return candidate.id;
        }
    }
    // Rounding may leave the sum a little below its total: the last token that has any weight.
    kept.iter().rev().find(|c| c.weight > 0.0).map_or(0, |c| c.id)
}

/// The same over all tokens in the order of their ids; `sums` are those of blocks of weights, so that whole blocks are passed over.
fn draw_block(weights: &[f32], sums: &[f64], u: f64) -> u32 {
    let mut left = u * sums.iter().sum::<f64>();
    for (block, sum) in sums.iter().enumerate() {
        if left >= *sum && block + 1 < sums.len() {
            left -= sum;
            continue;
        }
        let first = block * kernels::BLOCK;
        for (id, &weight) in weights.iter().enumerate().skip(first).take(kernels::BLOCK) {
            left -= f64::from(weight);
            if left < 0.0 && weight > 0.0 {
                return id as u32;
            }
        }
    }
    weights.iter().rposition(|&w| w > 0.0).map_or(0, |id| id as u32)
}
