//! A real training loop: data, schedules, losses, optimizer, crash-safe checkpoints, telemetry.
pub mod curriculum;
pub mod data;
mod error;
pub mod experts;
pub mod heads;
pub mod memory;
pub mod optimizer;
mod origin;
pub mod profile;
pub mod recipe;
mod report;
pub mod routing;
pub mod schedule;
pub mod snapshot;
pub mod sweep;
pub mod telemetry;
pub mod tokenizer_training;
mod trainer;
mod validation;

pub use error::TrainError;
pub use origin::Origin;
pub use profile::Profile;
pub use recipe::{Precision, Recipe};
pub use report::Report;
pub use sweep::Sweep;
pub use trainer::{TrainOptions, export, model_config, train};
pub use validation::{Validated, evaluate};
