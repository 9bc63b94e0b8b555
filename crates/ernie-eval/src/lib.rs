//! What a model is worth: perplexity on text, summaries of documents, how near one text comes to another, and what a model chose on its way through one.
//!
//! Metrics give the numbers of the packages that the field uses, `rouge-score` and `sacrebleu`, on committed goldens; models are run by
//! [`ernie_engine`], and by [`ernie_model`] where it is asked what happens inside them.
mod bleu;
mod bootstrap;
mod examples;
pub mod explain;
mod perplexity;
mod prompt;
mod rouge;
mod summarise;

pub use bleu::{Bleu, Tokenize, bleu};
pub use bootstrap::Estimate;
pub use examples::{Example, ExampleFormat, ExamplesError, read_examples};
pub use perplexity::{Error, TextScore, score_text};
pub use prompt::{Prompt, PromptTemplate, TemplateError};
pub use rouge::{Rouge, Score, Units, best_rouge, mean_rouge, rouge};
pub use summarise::{SummariseError, SummariseOptions, Summary, SummaryScores, prompts, score_summary, summarise};
