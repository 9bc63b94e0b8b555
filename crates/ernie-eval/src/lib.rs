//! What a model is worth: perplexity on text, and how near one text comes to another.
//!
//! Metrics give the numbers of the packages that the field uses, `rouge-score` and `sacrebleu`, on committed goldens; models are run by
//! [`ernie_engine`].
mod bleu;
mod perplexity;
mod rouge;

pub use bleu::{Bleu, Tokenize, bleu};
pub use perplexity::{Error, TextScore, score_text};
pub use rouge::{Rouge, Score, Units, mean_rouge, rouge};
