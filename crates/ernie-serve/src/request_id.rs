//! The name of a request in answers and in the log: the client's own (`x-request-id`) if it is plain, else a new one.
use axum::http::HeaderMap;

use crate::state::State;

/// The header's name.
pub const HEADER: &str = "x-request-id";

/// The name of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(pub String);

impl RequestId {
    /// Of a request with these headers.
    pub fn of(headers: &HeaderMap, state: &State) -> Self {
        let plain = |id: &&str| (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let own = headers.get(HEADER).and_then(|id| id.to_str().ok()).filter(plain);
        RequestId(own.map_or_else(|| format!("{:016x}{:016x}", state.random(), state.random()), str::to_owned))
    }
}
