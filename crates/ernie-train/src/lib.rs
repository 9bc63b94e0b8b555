//! A real training loop: data, schedules, losses, optimizer, crash-safe checkpoints, telemetry.
pub mod data;
pub mod recipe;
pub mod schedule;
pub mod telemetry;
pub mod tokenizer_training;
