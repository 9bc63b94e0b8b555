//! Inference on the CPU: a checkpoint in memory, sessions with a key/value cache, sampling, and generation with stop conditions.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = ernie_checkpoint::Checkpoint::open("models/nano".as_ref())?;
//! let model = ernie_engine::Model::load(&checkpoint)?;
//! let params = ernie_engine::SamplingParams { max_tokens: 32, ..ernie_engine::SamplingParams::greedy() };
//! let generation = ernie_engine::generate(&model, &[1, 5, 7], &params, (), |_| ControlFlow::Continue(()))?;
//! println!("{:?}", generation.tokens);
//! # Ok(())
//! # }
//! ```
//!
//! No async and no tensors with gradients: the maths is [`ernie_kernels`] on slices. One token's values never depend on what is computed
//! beside it, so prompts may be cut into chunks and prefixes kept without changing a bit of the output.
mod cache;
mod constraint;
mod cost;
mod drafts;
mod engine;
mod error;
mod gates;
mod generate;
mod load;
mod logprobs;
mod model;
mod moe;
mod paragraphs;
mod past;
mod profile;
mod random;
mod runner;
mod sampler;
pub mod scheduler;
mod session;
mod stop;
mod weights;

pub use constraint::{Constraint, TokenSet};
pub use cost::Cost;
pub use drafts::DraftOptions;
pub use engine::{DraftStats, Engine, EngineOptions, Event as EngineEvent, Request, RequestId};
pub use ernie_kernels::arch::limits::Limits;
pub use ernie_kernels::arch::pool::Pool;
pub use ernie_kernels::paged::KvDtype;
pub use error::{Error, Result};
pub use generate::{Event, FinishReason, Generation, TextDecoder, Timings, generate, generate_in};
pub use load::{LayerLoad, Load};
pub use logprobs::LogProbs;
pub use model::{LoadOptions, Model};
pub use profile::{Computed, Part, Profile};
pub use sampler::{Sampler, SamplingParams};
pub use session::{PREFILL_CHUNK, Session};
pub use stop::StopMatcher;
pub use weights::WeightDtype;
