//! The log: one line a message, on standard error. What clients write and what the model answers is in none but the one at the end of each answer,
//! and there only with `log_prompts`.
use tracing::Level;

use crate::config::{LogFormat, LogLevel, ServeConfig};

/// Starts it for the whole program; a second time changes nothing.
pub fn start(config: &ServeConfig) {
    let level = match config.log_level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    // Where nobody reads standard error any more (its terminal was closed), telling it so would end the thread that logs.
    let builder = builder.log_internal_errors(false);
    // A log that is there already is the caller's own.
    let _ = match config.log_format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
