//! An OpenAI-compatible HTTP server around [`ernie_engine`].
mod metrics;
mod whole;
mod worker;

pub use metrics::{Metrics, StreamGuard};
pub use whole::Score;
pub use worker::{Event, Events, Job, Places, Refused, Task, Token, Worker};
