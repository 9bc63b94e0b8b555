//! Rows drawn by a stage's mixture and range of difficulty.
//!
//! The row of each place of a batch comes from a domain, and in it from a source, by their shares: one place from each of as many equal parts of the
//! probability. In the source, rows stand in the order of their difficulties; of those inside the stage's quantiles, one of the rows that were given least often
//! comes next. So nothing is repeated before all that may come has come.
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::CurriculumConfig;
use super::difficulty::Difficulty;
use crate::data::packing::{Batch, DataState};
use crate::data::random::{key, mix};
use crate::data::rows::Rows;
use crate::data::{Corpus, Error};

/// Which rows were given; saved with a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Times that each row was given.
    pub times: Vec<u32>,
}

/// An endless stream of batches of rows.
#[derive(Debug)]
pub struct CurriculumSampler {
    corpus: Arc<Corpus>,
    config: CurriculumConfig,
    rows: Rows,
    batch_rows: usize,
    length: usize,
    /// The rows of each source, the easiest first.
    ranked: Vec<Vec<u32>>,
    state: DataState,
}

/// Rows and tokens of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchShape {
    /// Rows.
    pub rows: usize,
    /// Tokens of a row.
    pub length: usize,
}

impl CurriculumSampler {
    /// A stream from a saved position, which is refused when it belongs to other data, or from the beginning. Without difficulties all rows are alike.
    pub fn open(
        corpus: Arc<Corpus>,
        config: CurriculumConfig,
        difficulty: Option<&Difficulty>,
        seed: u64,
        shape: BatchShape,
        state: Option<DataState>,
    ) -> Result<Self, Error> {
        let seed = state.as_ref().map_or(seed, |state| state.seed);
        let rows = Rows::new(corpus.clone(), seed, shape.length);
        let fresh = || DataState {
            fingerprint: corpus.fingerprint.clone(),
            seed,
            batches: 0,
            cursors: Vec::new(),
            priority: None,
            curriculum: Some(Given { times: vec![0; rows.len()] }),
        };
        let state = state.unwrap_or_else(fresh);
        let problem = |problem: String| Err(Error::State { problem });
        if state.fingerprint != corpus.fingerprint {
            return problem(format!("fingerprint {} is saved and the data have {}", state.fingerprint, corpus.fingerprint));
        }
        let saved = state.curriculum.as_ref().map_or(0, |given| given.times.len());
        if saved != rows.len() {
            return problem(format!("{saved} rows are saved and the data have {}", rows.len()));
        }
        let ranked = (0..corpus.sources.len()).map(|source| {
            let mut ranked: Vec<(f64, u32)> = rows
                .of_source(source)
                .map(|row| (difficulty.map_or(0.0, |difficulty| difficulty.of_row(source, &rows.documents(row))), row as u32))
                .collect();
            ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            ranked.into_iter().map(|(_, row)| row).collect()
        });
        let ranked = ranked.collect();
        Ok(Self { corpus, config, rows, batch_rows: shape.rows, length: shape.length, ranked, state })
    }

    /// The position after the batches given so far.
    pub fn state(&self) -> &DataState {
        &self.state
    }

    /// The next batch, for step `step` (from 1) of a run of `steps`.
    pub fn next_batch(&mut self, step: u64, steps: u64) -> Batch {
        let mut batch = Batch::with_capacity(self.batch_rows, self.length);
        for row in self.draw(step, steps) {
            self.rows.append(row as usize, &mut batch);
        }
        self.state.batches += 1;
        batch
    }

    fn draw(&mut self, step: u64, steps: u64) -> Vec<u32> {
        let (index, part) = self.config.stage(step, steps);
        let stage = &self.config.stage[index];
        let [low, high] = stage.range(part);
        let shares = self.source_shares(&stage.shares(&self.corpus));
        let times = &mut self.state.curriculum.as_mut().expect("a sampler knows what it gave").times;
        let stream = key(self.state.seed, "curriculum", self.state.batches);
        let draw = |place: usize| {
            let random = (mix(stream ^ place as u64) >> 11) as f64 / (1u64 << 53) as f64;
            let ranked = &self.ranked[find(&shares, (place as f64 + random) / self.batch_rows as f64)];
            let rows = ranked.len() as f64;
            let from = ((low * rows) as usize).min(ranked.len() - 1);
            let to = ((high * rows).ceil() as usize).clamp(from + 1, ranked.len());
            let order = |row: &u32| (times[*row as usize], mix(stream ^ mix(u64::from(*row) << 16 | place as u64)));
            let row = *ranked[from..to].iter().min_by_key(|row| order(row)).expect("a source has rows");
            times[row as usize] += 1;
            row
        };
        (0..self.batch_rows).map(draw).collect()
    }

    /// Shares of the sources from those of the domains: inside a domain by their weights.
    fn source_shares(&self, domains: &[f64]) -> Vec<f64> {
        let sources = &self.corpus.sources;
        let of_domain = |domain: u16| sources.iter().filter(|source| source.domain == domain).map(|source| source.weight).sum::<f64>();
        sources.iter().map(|source| domains[usize::from(source.domain)] * source.weight / of_domain(source.domain)).collect()
    }
}

/// The part of a whole of shares in which a number from 0 to less than 1 falls; rounding never leads to a part of nothing.
fn find(shares: &[f64], mut place: f64) -> usize {
    let mut last = 0;
    for (index, &share) in shares.iter().enumerate().filter(|(_, share)| **share > 0.0) {
        if place < share {
            return index;
        }
        place -= share;
        last = index;
    }
    last
}
