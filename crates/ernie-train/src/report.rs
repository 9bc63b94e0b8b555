//! How a run ended.
use std::path::PathBuf;

use crate::{data::priority::RatioHistogram, experts::ExpertUse, heads::HeadUse, memory, origin::Origin, profile::Profile, recipe::Recipe};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// False if it was stopped before its last step.
    pub finished: bool,
    /// Optimizer steps taken, over all runs.
    pub steps: u64,
    /// Tokens trained on, over all runs.
    pub tokens: u64,
    /// Seconds spent in steps, over all runs.
    pub seconds: f64,
    /// Validation loss per source in nats per token, if finished.
    pub validation: Vec<(String, f64)>,
    /// Where the experts' tokens came from at the end, on validation documents; of a finished model with experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertUse>,
    /// What the gates of each layer that has them did on validation documents, if finished.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub active_heads: Vec<HeadUse>,
    /// How rows were drawn at the end, where they are drawn by priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<RatioHistogram>,
    /// The model directory: the finished model, or the last checkpoint.
    pub model_dir: PathBuf,
    /// The most memory that this process has had, in bytes, where the system tells (Linux: VmHWM).
    pub peak_rss_bytes: Option<u64>,
    /// Where the time of this process went, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// What it was made with, if finished; reports of earlier programs do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

impl Report {
    /// Of a run that was stopped before its first step.
    pub(crate) fn not_begun(recipe: &Recipe) -> Self {
        Self {
            finished: false,
            steps: 0,
            tokens: 0,
            seconds: 0.0,
            validation: Vec::new(),
            experts: None,
            active_heads: Vec::new(),
            sampling: None,
            model_dir: recipe.run.out.clone(),
            peak_rss_bytes: memory::peak_rss_bytes(),
            profile: None,
            origin: None,
        }
    }
}
