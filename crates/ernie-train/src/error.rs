//! Why a run cannot start or go on.
use std::path::PathBuf;

use ernie_model::LoadError;

use crate::data;
use crate::recipe;
use crate::schedule::ScheduleError;
use crate::snapshot::SnapshotError;
use crate::telemetry::TelemetryError;

/// A run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// The schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The data.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// A checkpoint of the run.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The model, on its way in or out.
    #[error(transparent)]
    Checkpoint(#[from] ernie_checkpoint::Error),
    /// The model of a checkpoint.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Metrics, events, curve.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The folder holds a run of another recipe.
    #[error(
        "{} holds a run of another recipe (or of an earlier version of this one): its recipe's hash is {saved}, this one's {given}; give \
         `run.out` (of a sweep: `out`) another folder, or delete that one to start again",
        out.display()
    )]
    OtherRun {
        /// `run.out`.
        out: PathBuf,
        /// Hash of the recipe that the run there was begun with, or "unknown".
        saved: String,
        /// Hash of the recipe that came.
        given: String,
    },
    /// The folder holds a finished run of the same recipe on other text.
    #[error(
        "{} holds a run of this recipe on other text: the hash of the files of source `{source_name}` was {saved} and is {given}; put those \
         files back, give `run.out` (of a sweep: `out`) another folder, or delete that one to start again",
        out.display()
    )]
    OtherText {
        /// `run.out`.
        out: PathBuf,
        /// The first source whose files have changed.
        source_name: String,
        /// Hash of its files as the run found them.
        saved: String,
        /// Hash of its files as they are.
        given: String,
    },
    /// The reference model that the run was begun with has been replaced.
    #[error(
        "the run was begun with another model in {}: the hash of its weights was {saved} and is {given}; put that model back, or give \
         `run.out` another folder to start a run with this one",
        model.display()
    )]
    OtherReference {
        /// Directory of the reference.
        model: PathBuf,
        /// Hash of the weights that the run was begun with.
        saved: String,
        /// Hash of the weights that are there.
        given: String,
    },
    /// Another process trains into the folder.
    #[error("another ernie is training into {}; wait for it, stop it, or give `run.out` another folder", out.display())]
    Busy {
        /// `run.out`.
        out: PathBuf,
    },
    /// The loss or the gradient is no longer a number.
    #[error(
        "step {step}: {what} is {value}; the weights before this step are in the last checkpoint; lower optimizer.lr, lengthen \
         schedule.warmup_steps or lower optimizer.clip_norm"
    )]
    NotFinite {
        /// Step that failed.
        step: u64,
        /// "the loss" or "the gradient norm".
        what: &'static str,
        /// What it came to.
        value: f64,
    },
    /// A folder could not be made.
    #[error("{}: {source}; check the folder's permissions and the disk's free space", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
}
