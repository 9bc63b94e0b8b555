//! The network against its oracles: plain operators, transformers' goldens, documents run alone.
mod allocations;
mod goldens;
mod ops;
mod plain;
