//! Metrics against the packages that the field uses, perplexity against the engine's own logits, summaries against its generation, explanations
//! against the model's own choices.
mod examples;
mod explain;
mod metrics;
mod perplexity;
mod summaries;
