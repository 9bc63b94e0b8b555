//! The server on the embedded model's files, from its engine's thread to what an HTTP client sees.
mod answers;
mod client;
mod life;
mod nano;
mod refusals;
mod schemas;
mod structured;
mod tools;
mod worker;
