//! Metrics against the packages that the field uses, perplexity against the engine's own logits, explanations against the model's own choices.
mod explain;
mod metrics;
mod perplexity;
