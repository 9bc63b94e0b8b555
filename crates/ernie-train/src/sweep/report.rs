//! What a sweep came to: every run, every arm over its seeds, and each arm against the first.
use std::path::Path;

use serde::Serialize;

use super::{Arm, Sweep};
use crate::error::TrainError;
use crate::recipe;
use crate::report::Report;
use crate::telemetry::{Validation, validations};

/// A mean over runs and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard error of the mean; none for a single run.
    pub standard_error: Option<f64>,
    /// Runs.
    pub runs: usize,
}

impl Spread {
    /// Of one number for each run; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Some(Spread { mean, standard_error: (values.len() > 1).then(|| (variance / n).sqrt()), runs: values.len() })
    }

    /// How many standard errors the mean is away from 0.
    pub fn significance(&self) -> Option<f64> {
        self.standard_error.filter(|&error| error > 0.0).map(|error| self.mean / error)
    }
}

/// One finished run.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// Number of its arm.
    pub arm: usize,
    /// Its seed.
    pub seed: u64,
    /// How it ended.
    #[serde(flatten)]
    pub report: Report,
    /// Mean over the sources of the last validation.
    pub loss: f64,
    /// Its validations.
    pub curve: Vec<Validation>,
}

/// One arm over its seeds.
#[derive(Debug, Clone, Serialize)]
pub struct ArmReport {
    /// Its name.
    pub name: String,
    /// What it sets, by dotted keys of the recipe.
    pub set: toml::Table,
    /// Mean validation loss of the sources.
    pub loss: Option<Spread>,
    /// Validation loss of each source.
    pub sources: Vec<(String, Spread)>,
    /// Tokens trained on.
    pub tokens: Option<Spread>,
    /// Seconds of training.
    pub seconds: Option<Spread>,
    /// Tokens per second.
    pub tokens_per_second: Option<Spread>,
    /// Mean overlap of the experts' domains at the end, where models have experts.
    pub overlap: Option<Spread>,
    /// Share of the least used expert of any layer, times the number of experts.
    pub least_used: Option<Spread>,
    /// What the gates of each layer that has them did on validation documents.
    pub active_heads: Vec<ArmHeads>,
    /// Against the first arm; none for that itself.
    pub against_first: Option<Comparison>,
}

/// The gates of one layer over the seeds.
#[derive(Debug, Clone, Serialize)]
pub struct ArmHeads {
    /// Index of the layer.
    pub layer: usize,
    /// Share of active heads.
    pub share: Spread,
    /// Correlation of a token's density with the number of its active heads, over the seeds in which both change.
    pub correlation: Option<Spread>,
}

/// An arm against the first one, seed by seed.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Loss less the first arm's.
    pub loss_difference: Spread,
    /// The same of each source.
    pub sources: Vec<(String, Spread)>,
    /// Steps to the first arm's last loss over that arm's steps; counted where the arm gets there in all seeds.
    pub steps_to_same_loss: Option<Spread>,
    /// The same in seconds of training.
    pub seconds_to_same_loss: Option<Spread>,
    /// Tokens per second over the first arm's.
    pub speed: Spread,
    /// Overlap of the experts' domains over the first arm's.
    pub overlap: Option<Spread>,
}

/// All that is known of a sweep.
#[derive(Debug, Clone, Serialize)]
pub struct SweepReport {
    /// Its name.
    pub name: String,
    /// Runs there will be.
    pub planned: usize,
    /// The recipe that all arms start from. With which program and on what machine each run was made is in its own `origin`.
    pub recipe: toml::Table,
    /// The arms, in the sweep's order.
    pub arms: Vec<ArmReport>,
    /// The finished runs.
    pub runs: Vec<RunReport>,
}

/// The report of a finished run, if it is there and whole.
pub(super) fn read_run(path: &Path) -> Option<Report> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

pub(super) fn write_run(path: &Path, report: &Report) -> Result<(), TrainError> {
    let json = serde_json::to_vec_pretty(report).expect("a report is plain data");
    Ok(ernie_checkpoint::atomic_write(path, &json)?)
}

impl RunReport {
    pub(super) fn new(arm: usize, seed: u64, report: Report, dir: &Path) -> Result<Self, TrainError> {
        let curve = validations(dir)?;
        let losses = &report.validation;
        if losses.is_empty() {
            let problem = format!("the run in {} has no validation documents, so that there is nothing to compare", dir.display());
            let fix = "raise it, or give more text".into();
            return Err(recipe::Error::Invalid { key: "data.validation_fraction".into(), problem, fix }.into());
        }
        let loss = losses.iter().map(|(_, loss)| loss).sum::<f64>() / losses.len() as f64;
        Ok(Self { arm, seed, report, loss, curve })
    }

    fn speed(&self) -> f64 {
        self.report.tokens as f64 / self.report.seconds.max(f64::MIN_POSITIVE)
    }

    fn overlap(&self) -> Option<f64> {
        Some(self.report.experts.as_ref()?.overlap)
    }

    /// Steps and seconds at which the loss first was `target` or lower, on straight lines between validations.
    fn reaches(&self, target: f64) -> Option<(f64, f64)> {
        let index = self.curve.iter().position(|point| point.mean() <= target)?;
        let point = &self.curve[index];
        let Some(before) = index.checked_sub(1).map(|before| &self.curve[before]) else {
            return Some((point.step as f64, point.seconds));
        };
        let part = (before.mean() - target) / (before.mean() - point.mean());
        let between = |a: f64, b: f64| a + part * (b - a);
        Some((between(before.step as f64, point.step as f64), between(before.seconds, point.seconds)))
    }
}

impl SweepReport {
    pub(super) fn new(sweep: &Sweep, runs: &[RunReport], planned: usize) -> Self {
        let arms = sweep.arms.iter().enumerate().map(|(index, arm)| ArmReport::new(index, arm, runs));
        Self { name: sweep.name.clone(), planned, recipe: sweep.base.clone(), arms: arms.collect(), runs: runs.to_vec() }
    }

    /// Whether every run is finished.
    pub fn finished(&self) -> bool {
        self.runs.len() == self.planned
    }
}

impl ArmReport {
    fn new(index: usize, arm: &Arm, all: &[RunReport]) -> Self {
        let runs: Vec<&RunReport> = all.iter().filter(|run| run.arm == index).collect();
        let spread = |value: &dyn Fn(&RunReport) -> f64| Spread::of(&runs.iter().map(|run| value(run)).collect::<Vec<_>>());
        let pairs: Vec<(&RunReport, &RunReport)> =
            runs.iter().filter_map(|run| Some((*run, all.iter().find(|first| first.arm == 0 && first.seed == run.seed)?))).collect();
        Self {
            name: arm.name.clone(),
            set: arm.set.clone(),
            loss: spread(&|run| run.loss),
            sources: by_source(&runs, loss_of),
            tokens: spread(&|run| run.report.tokens as f64),
            seconds: spread(&|run| run.report.seconds),
            tokens_per_second: spread(&RunReport::speed),
            overlap: Spread::of(&runs.iter().filter_map(|run| run.overlap()).collect::<Vec<_>>()),
            least_used: Spread::of(&runs.iter().filter_map(|run| Some(run.report.experts.as_ref()?.least_used)).collect::<Vec<_>>()),
            active_heads: active_heads(&runs),
            against_first: if index == 0 { None } else { Comparison::new(&pairs) },
        }
    }
}

impl Comparison {
    fn new(pairs: &[(&RunReport, &RunReport)]) -> Option<Self> {
        let spread = |value: &dyn Fn(&RunReport, &RunReport) -> f64| {
            Spread::of(&pairs.iter().map(|(run, first)| value(run, first)).collect::<Vec<_>>())
        };
        let reached: Option<Vec<(f64, f64)>> = pairs
            .iter()
            .map(|(run, first)| {
                let (steps, seconds) = run.reaches(first.curve.last()?.mean())?;
                Some((steps / first.report.steps as f64, seconds / first.report.seconds))
            })
            .collect();
        let reached = reached.unwrap_or_default();
        let runs: Vec<&RunReport> = pairs.iter().map(|(run, _)| *run).collect();
        let first_of = |run: &RunReport| pairs.iter().find(|(other, _)| other.seed == run.seed).map(|(_, first)| *first);
        Some(Self {
            loss_difference: spread(&|run, first| run.loss - first.loss)?,
            sources: by_source(&runs, |run, source| Some(loss_of(run, source)? - loss_of(first_of(run)?, source)?)),
            steps_to_same_loss: Spread::of(&reached.iter().map(|(steps, _)| *steps).collect::<Vec<_>>()),
            seconds_to_same_loss: Spread::of(&reached.iter().map(|(_, seconds)| *seconds).collect::<Vec<_>>()),
            speed: spread(&|run, first| run.speed() / first.speed())?,
            overlap: Spread::of(&pairs.iter().filter_map(|(run, first)| Some(run.overlap()? / first.overlap()?)).collect::<Vec<_>>()),
        })
    }
}

/// Of the layers that the first run has gates in.
fn active_heads(runs: &[&RunReport]) -> Vec<ArmHeads> {
    let Some(first) = runs.first() else { return Vec::new() };
    let of_layer = |layer: usize| {
        let heads = || runs.iter().filter_map(move |run| run.report.active_heads.iter().find(|heads| heads.layer == layer));
        let share = Spread::of(&heads().map(|heads| heads.share).collect::<Vec<_>>())?;
        Some(ArmHeads { layer, share, correlation: Spread::of(&heads().filter_map(|heads| heads.correlation).collect::<Vec<_>>()) })
    };
    first.report.active_heads.iter().filter_map(|heads| of_layer(heads.layer)).collect()
}

fn loss_of(run: &RunReport, source: &str) -> Option<f64> {
    run.report.validation.iter().find(|(name, _)| name == source).map(|(_, loss)| *loss)
}

/// A spread for each source of the first run, over the runs that have a value for it.
fn by_source(runs: &[&RunReport], value: impl Fn(&RunReport, &str) -> Option<f64>) -> Vec<(String, Spread)> {
    let Some(first) = runs.first() else { return Vec::new() };
    let spread = |name: &String| {
        let values: Vec<f64> = runs.iter().filter_map(|run| value(run, name)).collect();
        Some((name.clone(), Spread::of(&values)?))
    };
    first.report.validation.iter().filter_map(|(name, _)| spread(name)).collect()
}
