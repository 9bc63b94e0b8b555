//! An OpenAI-compatible HTTP server around [`ernie_engine`].
//!
//! HTTP checks a request, turns it into token ids and puts it into a bounded queue; one thread owns the engine ([`Worker`]) and sends tokens back through
//! a bounded channel for each request. Neither waits for the other's slowest member: a full queue is answered with 429, and a reader that does not keep up
//! or is gone loses its request before the next step.
//!
//! Who may use it, for how much, and what was used is the matter of [`accounts`]. Without keys only addresses of this machine are listened on.
pub mod accounts;
mod admin;
mod answer;
mod api_error;
mod body;
mod call;
mod chat;
mod completions;
mod config;
mod connection;
mod cors;
mod description;
mod embeddings;
mod error;
mod exchange;
mod fields;
mod grammar;
mod live;
pub mod log;
mod metrics;
mod numbers;
#[cfg(feature = "otel")]
mod otel;
mod page;
mod parameters;
mod prompt;
mod recent;
mod request_id;
mod routes;
mod sampling;
mod server;
mod settings;
mod state;
mod structured;
mod tls;
mod token_text;
mod tokens;
mod tools;
mod turn;
mod whole;
mod worker;

pub use config::{ENVIRONMENT_PREFIX, KvCache, LogFormat, LogLevel, ReasoningParser, ServeConfig, Weights};
pub use error::{Error, Result};
pub use grammar::{Calls, Form, GrammarConstraint, Grammars, Rule};
pub use metrics::{Metrics, StreamGuard};
pub use server::check_address;
pub use server::{Server, serve_until_signal, url};
pub use settings::{Settings, SettingsPatch};
pub use state::ServedModel;
pub use whole::Score;
pub use worker::{Event, Events, Job, Places, Refused, Task, Token, Worker};
