//! The server on the embedded model's files, from its engine's thread to what an HTTP client sees.
mod answers;
mod client;
mod life;
mod live;
mod nano;
mod page;
mod refusals;
mod settings;
mod worker;
