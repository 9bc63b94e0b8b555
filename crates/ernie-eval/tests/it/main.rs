//! Metrics against the packages that the field uses, and perplexity against the engine's own logits.
mod metrics;
mod perplexity;
