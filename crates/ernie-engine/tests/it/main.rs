//! Integration tests: one binary, one file per subject.
mod allocations;
mod batching;
mod constraints;
mod generating;
mod golden;
mod load;
mod memory;
mod models;
mod sampling;
mod scheduler;
mod stopping;
