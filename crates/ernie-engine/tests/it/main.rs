//! Integration tests: one binary, one file per subject.
mod allocations;
mod batching;
mod generating;
mod golden;
mod load;
mod models;
mod sampling;
mod scheduler;
mod stopping;
