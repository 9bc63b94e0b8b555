//! Where a run's batches come from: documents by the mixture's shares, rows by their priority, or rows by a curriculum.
use std::sync::Arc;

use super::packing::{Batch, DataState, Packer};
use super::priority::{Draw, PrioritySampler, RatioHistogram, RowShape};
use super::{Corpus, Error};
use crate::curriculum::difficulty::Difficulty;
use crate::curriculum::sampler::{BatchShape, CurriculumSampler};
use crate::recipe::Recipe;

/// An endless stream of batches, whose position can be saved.
#[derive(Debug)]
pub enum Stream {
    /// Every document in turn.
    Mixture(Packer),
    /// Rows by what the model makes of them.
    Priority(Box<PrioritySampler>),
    /// Rows by the stage of the run.
    Curriculum(Box<CurriculumSampler>),
}

impl Stream {
    /// The recipe's stream, from a saved position or the beginning; `vocabulary` pieces are what a model knows nothing of at first.
    /// A curriculum goes by `difficulty`, if it is known; priorities by what losses are above those that a reference `reached` in each source.
    pub fn open(
        recipe: &Recipe,
        corpus: Arc<Corpus>,
        vocabulary: usize,
        difficulty: Option<&Difficulty>,
        reached: Option<&[f64]>,
        state: Option<DataState>,
    ) -> Result<Self, Error> {
        let (seed, rows, length) = (recipe.run.seed, recipe.data.batch_size, recipe.data.sequence_length);
        if let Some(config) = recipe.curriculum.clone() {
            let sampler = CurriculumSampler::open(corpus, config, difficulty, seed, BatchShape { rows, length }, state)?;
            return Ok(Self::Curriculum(Box::new(sampler)));
        }
        let Some(config) = recipe.data.priority.clone() else {
            return Ok(Self::Mixture(match state {
                Some(state) => Packer::resume(corpus, state, rows, length)?,
                None => Packer::new(corpus, seed, rows, length),
            }));
        };
        let reached = reached.map_or_else(|| vec![0.0; corpus.sources.len()], <[f64]>::to_vec);
        let shape = RowShape { rows, length };
        Ok(Self::Priority(Box::new(match state {
            Some(state) => PrioritySampler::resume(corpus, config, state, shape, reached)?,
            None => PrioritySampler::new(corpus, config, seed, shape, (vocabulary as f64).ln(), reached),
        })))
    }

    /// The next batch, for step `step` (from 1) of `steps`; with it the rows that were drawn, if they were.
    pub fn next_batch(&mut self, step: u64, steps: u64) -> Result<(Batch, Vec<Draw>), Error> {
        match self {
            Self::Mixture(packer) => Ok((packer.next_batch()?, Vec::new())),
            Self::Priority(sampler) => Ok(sampler.next_batch(step, steps)),
            Self::Curriculum(sampler) => Ok((sampler.next_batch(step, steps), Vec::new())),
        }
    }

    /// Tells a sampler what became of its rows: losses `[tokens]` of a batch, 0 where not scored.
    pub fn observe(&mut self, step: u64, draws: &[Draw], batch_targets: &[i32], losses: &[f32]) {
        let Self::Priority(sampler) = self else { return };
        let length = losses.len() / draws.len().max(1);
        let means = draws.iter().enumerate().filter_map(|(row, &draw)| {
            let range = row * length..(row + 1) * length;
            let scored = batch_targets[range.clone()].iter().filter(|&&target| target != super::packing::IGNORE).count();
            let sum: f64 = losses[range].iter().map(|&loss| f64::from(loss)).sum();
            (scored > 0).then(|| (draw, sum / scored as f64))
        });
        sampler.observe(step, means);
    }

    /// What sampling by priority could gain now, if rows are sampled so.
    pub fn gain(&self) -> Option<f64> {
        match self {
            Self::Priority(sampler) => Some(sampler.gain()),
            Self::Mixture(_) | Self::Curriculum(_) => None,
        }
    }

    /// How the draws of rows differ from uniform ones now, if rows are sampled by priority.
    pub fn spread(&self) -> Option<RatioHistogram> {
        match self {
            Self::Priority(sampler) => Some(sampler.spread()),
            Self::Mixture(_) | Self::Curriculum(_) => None,
        }
    }

    /// The position after the batches given so far.
    pub fn state(&self) -> &DataState {
        match self {
            Self::Mixture(packer) => packer.state(),
            Self::Priority(sampler) => sampler.state(),
            Self::Curriculum(sampler) => sampler.state(),
        }
    }
}
