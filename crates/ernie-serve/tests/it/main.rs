//! The server on the embedded model's files, from its engine's thread to what an HTTP client sees.
mod accounts;
mod answers;
mod client;
mod cors;
mod databases;
mod life;
mod limits;
mod live;
mod nano;
#[cfg(feature = "otel")]
mod otel;
mod page;
mod refusals;
mod schemas;
mod settings;
mod store;
mod structured;
mod tls;
mod tools;
mod worker;
