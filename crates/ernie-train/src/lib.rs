//! A real training loop: data, schedules, losses, optimizer, crash-safe checkpoints, telemetry.
pub mod data;
pub mod optimizer;
pub mod recipe;
pub mod routing;
pub mod schedule;
pub mod snapshot;
pub mod telemetry;
pub mod tokenizer_training;
mod trainer;

pub use recipe::Recipe;
pub use trainer::{Report, TrainError, TrainOptions, evaluate, export, model_config, train};
