//! Metrics against the packages that the field uses, perplexity against the engine's own logits, and summaries against its generation.
mod examples;
mod metrics;
mod perplexity;
mod summaries;
