//! Priority sampling: rows with a higher loss are drawn more often, and count less in the loss for it.
//!
//! A row i of base probability b_i (its source's share over its source's rows) is drawn with
//! P(i) = φ·b_i + (1 − φ)·b_i·r_i / Σ b·r,  r_i = (loss_i + ε)^α, and its loss weighted by (b_i / P(i))^β over the largest such weight of any row (Schaul et
//! al., *Prioritized Experience Replay*, arXiv 1511.05952, with b_i for 1/N). At β = 1 the weighted gradient is in expectation that of uniform sampling over the
//! largest weight: one number for all rows of a batch, which changes the length of the step and not its direction. The floor φ keeps every row alive. A row's
//! loss is the one of its last visit while that is no more than `staleness` steps ago, else its source's running mean, which is also what rows never visited have:
//! whole domains are weighed against each other long before every row has been seen. With a reference model a row's loss is what it is above the reference's on the
//! source's validation text: not what is hard for every model but what can still be learned is drawn (after Mindermann et al., *RHO-LOSS*, arXiv 2206.07137, and
//! DoReMi, arXiv 2305.10429, domain by domain). Sampling is by priority while √(E r²) / E r, what it could gain over uniform sampling (Katharopoulos and Fleuret,
//! arXiv 1803.00942), is at least `least_gain`.
mod histogram;
mod tree;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::packing::{Batch, DataState};
use super::random::{key, mix};
use super::rows::Rows;
use super::{Corpus, Error};
pub use histogram::RatioHistogram;
pub use tree::{MinTree, SumTree};

/// How fast a source's running mean follows its rows' losses.
const MEAN_RATE: f64 = 0.05;

/// `[data.priority]`: how rows are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PriorityConfig {
    /// Power of the loss; 0 draws all rows alike.
    pub alpha: f64,
    /// Power of the importance weights at the beginning and at the end of the run, on a straight line between them; at 1 no bias is left but in the length of the step.
    pub beta: [f64; 2],
    /// Added to a loss in nats, so that what is known by heart is still drawn.
    pub epsilon: f64,
    /// Share of the draws that know no priorities.
    pub floor: f64,
    /// Steps after which a row's loss is forgotten.
    pub staleness: u64,
    /// Least gain for which priorities are used.
    pub least_gain: f64,
    /// Directory of a model with the run's tokenizer, whose losses are taken off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
}

impl Default for PriorityConfig {
    fn default() -> Self {
        Self { alpha: 1.0, beta: [0.4, 1.0], epsilon: 0.05, floor: 0.1, staleness: 2000, least_gain: 1.02, reference: None }
    }
}

/// What is known of the rows; saved with a checkpoint. Numbers are kept as their bits, so that they come back exactly.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriorityState {
    /// Step of each row's last visit, 0 for none.
    pub visited: Vec<u32>,
    /// Its loss then, as the bits of an f32.
    pub loss_bits: Vec<u32>,
    /// Running mean of each source, as the bits of an f64.
    pub mean_bits: Vec<u64>,
}

/// Rows of a batch and tokens of a row.
#[derive(Debug, Clone, Copy)]
pub struct RowShape {
    /// Rows.
    pub rows: usize,
    /// Tokens of each.
    pub length: usize,
}

/// A row that was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// The row.
    pub row: u32,
    /// Factor of its loss, above 0 and at most 1.
    pub weight: f32,
}

/// An endless stream of batches of drawn rows.
#[derive(Debug)]
pub struct PrioritySampler {
    rows: Rows,
    config: PriorityConfig,
    batch_rows: usize,
    length: usize,
    sources: Vec<SourcePriorities>,
    /// Loss of the reference in each source, 0 without one.
    reached: Vec<f64>,
    /// Visits in order, the oldest first.
    visits: VecDeque<(u32, u32)>,
    state: DataState,
}

#[derive(Debug)]
struct SourcePriorities {
    share: f64,
    /// Number of the first row.
    first: usize,
    count: usize,
    /// r of the rows whose loss is known, 0 of the others; and its square.
    known: SumTree,
    squares: SumTree,
    /// r of the rows whose loss is known, infinity of the others.
    least: MinTree,
    /// 1 for every row whose loss is not known.
    unknown: SumTree,
    mean: f64,
    /// Whether any of the rows was ever visited: the first loss is the mean, the others move it.
    begun: bool,
}

impl SourcePriorities {
    /// Base probability of one row.
    fn base(&self) -> f64 {
        self.share / self.count as f64
    }
}

impl PrioritySampler {
    /// A stream from the beginning. `first_loss` is what rows are taken to have before anything is known: ln of the vocabulary's size; `reached` is the
    /// reference's loss in each source, 0 without one.
    pub fn new(corpus: Arc<Corpus>, config: PriorityConfig, seed: u64, shape: RowShape, first_loss: f64, reached: Vec<f64>) -> Self {
        let RowShape { rows: batch_rows, length } = shape;
        let rows = Rows::new(corpus.clone(), seed, length);
        let state = PriorityState {
            visited: vec![0; rows.len()],
            loss_bits: vec![0; rows.len()],
            mean_bits: reached.iter().map(|reached| (first_loss - reached).max(0.0).to_bits()).collect(),
        };
        let state = DataState {
            fingerprint: corpus.fingerprint.clone(),
            seed,
            batches: 0,
            cursors: Vec::new(),
            priority: Some(state),
            curriculum: None,
        };
        Self::at(&corpus, rows, config, state, RowShape { rows: batch_rows, length }, reached)
    }

    /// A stream from a saved position; refused when the position belongs to other data.
    pub fn resume(
        corpus: Arc<Corpus>,
        config: PriorityConfig,
        state: DataState,
        shape: RowShape,
        reached: Vec<f64>,
    ) -> Result<Self, Error> {
        let problem = |problem: String| Err(Error::State { problem });
        if state.fingerprint != corpus.fingerprint {
            return problem(format!("fingerprint {} is saved and the data have {}", state.fingerprint, corpus.fingerprint));
        }
        let rows = Rows::new(corpus.clone(), state.seed, shape.length);
        let Some(saved) = &state.priority else {
            return problem("no priorities are saved".to_owned());
        };
        let (known, means) = ((saved.visited.len(), saved.loss_bits.len()), saved.mean_bits.len());
        if known != (rows.len(), rows.len()) || means != corpus.sources.len() {
            return problem(format!("priorities of {} rows are saved and the data have {}", known.0, rows.len()));
        }
        let numbers =
            saved.loss_bits.iter().all(|&bits| f32::from_bits(bits) >= 0.0) && saved.mean_bits.iter().all(|&b| f64::from_bits(b) >= 0.0);
        if !numbers {
            return problem("a saved loss is no number".to_owned());
        }
        Ok(Self::at(&corpus, rows, config, state, shape, reached))
    }

    fn at(corpus: &Corpus, rows: Rows, config: PriorityConfig, state: DataState, shape: RowShape, reached: Vec<f64>) -> Self {
        let RowShape { rows: batch_rows, length } = shape;
        assert_eq!(reached.len(), corpus.sources.len(), "a loss for each source");
        let saved = state.priority.as_ref().expect("priorities were made or checked");
        let total: f64 = corpus.sources.iter().map(|source| source.weight).sum();
        let relative =
            |row: usize| if saved.visited[row] == 0 { 0.0 } else { relative(&config, f64::from(f32::from_bits(saved.loss_bits[row]))) };
        let sources = corpus.sources.iter().enumerate().map(|(index, source)| {
            let range = rows.of_source(index);
            SourcePriorities {
                share: source.weight / total,
                first: range.start,
                count: range.len(),
                known: SumTree::new(range.clone().map(relative)),
                squares: SumTree::new(range.clone().map(|row| relative(row).powi(2))),
                least: MinTree::new(range.clone().map(|row| if saved.visited[row] == 0 { f64::INFINITY } else { relative(row) })),
                begun: saved.visited[range.clone()].iter().any(|&step| step > 0),
                unknown: SumTree::new(range.map(|row| f64::from(u8::from(saved.visited[row] == 0)))),
                mean: f64::from_bits(saved.mean_bits[index]),
            }
        });
        let sources = sources.collect();
        let mut visits: Vec<(u32, u32)> =
            saved.visited.iter().zip(0..).filter(|(step, _)| **step > 0).map(|(&step, row)| (step, row)).collect();
        visits.sort_unstable();
        Self { rows, config, batch_rows, length, sources, reached, visits: visits.into(), state }
    }

    /// The position after the batches given so far.
    pub fn state(&self) -> &DataState {
        &self.state
    }

    /// The rows.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// What sampling by priority could gain now over sampling without: √(E r²) / E r, at least 1.
    pub fn gain(&self) -> f64 {
        let second: f64 =
            self.sources.iter().map(|s| s.base() * (s.squares.total() + s.unknown.total() * relative(&self.config, s.mean).powi(2))).sum();
        second.sqrt() / self.mass()
    }

    /// Σ b·r.
    fn mass(&self) -> f64 {
        self.sources.iter().map(|s| s.base() * (s.known.total() + s.unknown.total() * relative(&self.config, s.mean))).sum()
    }

    /// The next batch, for step `step` (from 1) of a run of `steps`.
    pub fn next_batch(&mut self, step: u64, steps: u64) -> (Batch, Vec<Draw>) {
        let draws = self.draw(step, steps);
        let mut batch = Batch::with_capacity(self.batch_rows, self.length);
        for draw in &draws {
            self.rows.append(draw.row as usize, &mut batch);
        }
        self.state.batches += 1;
        (batch, draws)
    }

    /// Draws the rows of a batch, one from each of so many equal parts of the probability: fewer accidents than independent draws, the same expectation.
    fn draw(&mut self, step: u64, steps: u64) -> Vec<Draw> {
        self.forget(step);
        let progress = (step.saturating_sub(1)) as f64 / steps.saturating_sub(1).max(1) as f64;
        let beta = self.config.beta[0] + (self.config.beta[1] - self.config.beta[0]) * progress;
        let floor = if self.gain() < self.config.least_gain { 1.0 } else { self.config.floor };
        let mass = self.mass();
        // b / P of a row by its r.
        let ratio = |r: f64| 1.0 / (floor + (1.0 - floor) * r / mass);
        let least = self.least_relative();
        let largest = ratio(least);
        let stream = key(self.state.seed, "priority", self.state.batches);
        let draws = (0..self.batch_rows).map(|part| {
            let random = |salt: u64| (mix(stream ^ mix(part as u64 * 2 + salt)) >> 11) as f64 / (1u64 << 53) as f64;
            let place = (part as f64 + random(0)) / self.batch_rows as f64;
            let row = if place < floor { self.by_share(place / floor) } else { self.by_mass((place - floor) / (1.0 - floor) * mass) };
            let weight = (ratio(self.relative_of(row)) / largest).powf(beta);
            Draw { row: row as u32, weight: weight as f32 }
        });
        draws.collect()
    }

    /// A row by its base probability, from a number from 0 to less than 1.
    fn by_share(&self, mut place: f64) -> usize {
        for source in &self.sources {
            if place < source.share {
                return source.first + ((place / source.share * source.count as f64) as usize).min(source.count - 1);
            }
            place -= source.share;
        }
        let last = self.sources.last().expect("a corpus has sources");
        last.first + last.count - 1
    }

    /// A row by its priority, from a number from 0 to less than Σ b·r.
    fn by_mass(&self, mut place: f64) -> usize {
        let mut last = 0;
        for source in &self.sources {
            let (base, of_unknown) = (source.base(), relative(&self.config, source.mean));
            let (known, unknown) = (base * source.known.total(), base * source.unknown.total() * of_unknown);
            if known > 0.0 {
                if place < known {
                    return source.first + source.known.find(place / base);
                }
                last = source.first + source.known.find(source.known.total());
            }
            place -= known;
            if unknown > 0.0 {
                if place < unknown {
                    return source.first + source.unknown.find(place / (base * of_unknown));
                }
                last = source.first + source.unknown.find(source.unknown.total());
            }
            place -= unknown;
        }
        // Rounding carried the number beyond the sum.
        last
    }

    /// P(i) / b_i of all rows, counted in bins.
    pub fn spread(&self) -> RatioHistogram {
        let floor = if self.gain() < self.config.least_gain { 1.0 } else { self.config.floor };
        let mass = self.mass();
        RatioHistogram::of((0..self.rows.len()).map(|row| floor + (1.0 - floor) * self.relative_of(row) / mass))
    }

    /// r of a row.
    fn relative_of(&self, row: usize) -> f64 {
        let source = &self.sources[self.rows.source_of(row)];
        let known = source.known.get(row - source.first);
        if known > 0.0 { known } else { relative(&self.config, source.mean) }
    }

    /// The least r of any row.
    fn least_relative(&self) -> f64 {
        let of_source = |source: &SourcePriorities| {
            let unknown = if source.unknown.total() > 0.0 { relative(&self.config, source.mean) } else { f64::INFINITY };
            source.least.least().min(unknown)
        };
        self.sources.iter().map(of_source).fold(f64::INFINITY, f64::min)
    }

    /// Takes note of the losses of drawn rows, each a mean over its tokens in nats.
    pub fn observe(&mut self, step: u64, losses: impl IntoIterator<Item = (Draw, f64)>) {
        let saved = self.state.priority.as_mut().expect("a sampler has priorities");
        for (draw, loss) in losses {
            // To the precision that is saved, so that a resumed run goes on with the same numbers.
            let row = draw.row as usize;
            let index = self.rows.source_of(row);
            let loss = (loss - self.reached[index]).max(0.0) as f32;
            let (source, r) = (&mut self.sources[index], relative(&self.config, f64::from(loss)));
            let place = row - source.first;
            source.known.set(place, r);
            source.squares.set(place, r * r);
            source.least.set(place, r);
            source.unknown.set(place, 0.0);
            let rate = if std::mem::replace(&mut source.begun, true) { MEAN_RATE } else { 1.0 };
            source.mean += rate * (f64::from(loss) - source.mean);
            saved.visited[row] = step as u32;
            saved.loss_bits[row] = loss.to_bits();
            saved.mean_bits[index] = source.mean.to_bits();
            self.visits.push_back((step as u32, draw.row));
        }
    }

    /// Forgets the losses of rows that were last visited more than `staleness` steps before `step`.
    fn forget(&mut self, step: u64) {
        let saved = self.state.priority.as_ref().expect("a sampler has priorities");
        while let Some(&(visited, row)) = self.visits.front()
            && u64::from(visited) + self.config.staleness < step
        {
            self.visits.pop_front();
            if saved.visited[row as usize] == visited {
                let source = &mut self.sources[self.rows.source_of(row as usize)];
                let place = row as usize - source.first;
                source.known.set(place, 0.0);
                source.squares.set(place, 0.0);
                source.least.set(place, f64::INFINITY);
                source.unknown.set(place, 1.0);
            }
        }
    }
}

/// r = (loss + ε)^α.
fn relative(config: &PriorityConfig, loss: f64) -> f64 {
    (loss + config.epsilon).powf(config.alpha)
}

#[cfg(test)]
mod tests;
