//! A run's validations as its record has them, with the work done until then.
use std::path::Path;

use serde::Serialize;

use super::TelemetryError;
use super::metrics::{self, Record};
use crate::validation::Validated;

/// One validation of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Validation {
    /// Optimizer steps until then.
    pub step: u64,
    /// Tokens trained on until then.
    pub tokens: u64,
    /// Seconds of training until then, validations not counted.
    pub seconds: f64,
    /// Loss of each source in nats per token.
    pub losses: Vec<(String, f64)>,
    /// Mean overlap of the experts' domains, of a model with experts.
    pub overlap: Option<f64>,
}

impl Validation {
    /// Mean over the sources.
    pub fn mean(&self) -> f64 {
        self.losses.iter().map(|(_, loss)| loss).sum::<f64>() / self.losses.len().max(1) as f64
    }
}

/// All validations in the record of the run in `dir`, in order.
///
/// # Errors
/// [`TelemetryError`] if there is no record, or it holds a line that this program did not write.
pub fn validations(dir: &Path) -> Result<Vec<Validation>, TelemetryError> {
    let (mut tokens, mut seconds, mut found) = (0, 0.0, Vec::new());
    for record in metrics::read(&dir.join("metrics.jsonl"))? {
        match record {
            Record::Train { metrics, .. } => {
                seconds += metrics.tokens.saturating_sub(tokens) as f64 / metrics.tok_s;
                tokens = metrics.tokens;
            }
            Record::Validation { step, found: Validated { losses, experts, .. }, .. } => {
                found.push(Validation { step, tokens, seconds, losses, overlap: experts.map(|experts| experts.overlap) });
            }
            Record::Assignment { .. } | Record::Profile { .. } => {}
        }
    }
    Ok(found)
}
