//! Why a server does not start, or ends.
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong before the first request or after the last.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A source of the configuration is at fault.
    #[error("{origin}: {reason}")]
    Config {
        /// File, variable or flags.
        origin: String,
        /// What was expected and found.
        reason: String,
    },
    /// Others could reach a server that knows no keys.
    #[error(
        "host {host}: without keys only this machine itself may be served; make one with `ernie keys create NAME`, or use 127.0.0.1 or ::1"
    )]
    NotLoopback {
        /// The address asked for.
        host: IpAddr,
    },
    /// No certificate to speak HTTPS with.
    #[error("{}: {reason}", file.display())]
    Certificate {
        /// The file at fault.
        file: PathBuf,
        /// What was expected and found.
        reason: String,
    },
    /// The accounts cannot be had.
    #[error(transparent)]
    Accounts(#[from] crate::accounts::store::StoreError),
    /// The address is taken or is not this machine's.
    #[error("cannot listen on {address}: {error}; another server may be there, so stop it or choose with --host and --port")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The system gives no thread, no signal or no runtime.
    #[error("cannot start the server: {0}")]
    Start(std::io::Error),
    /// The tokenizer's tokens are nothing that grammars can be made of.
    #[error("cannot prepare the tokens for structured answers: {reason}")]
    Grammars {
        /// Why.
        reason: String,
    },
    /// The engine does not take the model with these options.
    #[error(transparent)]
    Engine(#[from] ernie_engine::Error),
    /// The server was told to stop at once.
    #[error("stopped before all answers were finished")]
    Stopped,
}
