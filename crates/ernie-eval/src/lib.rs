//! What a model is worth: perplexity on text, how near one text comes to another, and what a model chose on its way through one.
//!
//! Metrics give the numbers of the packages that the field uses, `rouge-score` and `sacrebleu`, on committed goldens; models are run by
//! [`ernie_engine`], and by [`ernie_model`] where it is asked what happens inside them.
mod bleu;
pub mod explain;
mod perplexity;
mod rouge;

pub use bleu::{Bleu, Tokenize, bleu};
pub use perplexity::{Error, TextScore, score_text};
pub use rouge::{Rouge, Score, Units, mean_rouge, rouge};
