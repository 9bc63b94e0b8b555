//! How well a model foretells a text.
use std::ops::ControlFlow;

use ernie_checkpoint::{Tokenizer, TokenizerError};
use ernie_engine::{Model, Session};

/// Positions whose logits are in memory together.
const PIECE: usize = 64;

/// A text could not be scored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text could not be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model could not be run.
    #[error(transparent)]
    Engine(#[from] ernie_engine::Error),
    /// A context in which nothing can be foretold.
    #[error("a context of {context} tokens; give 2 to {limit}, the model's longest")]
    Context {
        /// What was asked for.
        context: usize,
        /// What the model was made for.
        limit: usize,
    },
    /// The model's numbers are damaged.
    #[error("the loss of token {position} is {value}: the model's weights are damaged")]
    NotFinite {
        /// Position of the token in its text.
        position: usize,
        /// Its loss.
        value: f64,
    },
}

/// Sums over scored texts.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct TextScore {
    /// Tokens that were scored.
    pub tokens: u64,
    /// Bytes of UTF-8 of the texts.
    pub bytes: u64,
    /// Sum of −ln p of the scored tokens.
    pub nats: f64,
}

impl TextScore {
    /// Mean loss in nats per token; 0 without any.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens.max(1) as f64
    }

    /// exp of the mean loss: depends on the tokenizer.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits per byte of text: compares models with different tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes.max(1) as f64
    }

    /// Adds another's sums.
    pub fn add(&mut self, other: &TextScore) {
        self.tokens += other.tokens;
        self.bytes += other.bytes;
        self.nats += other.nats;
    }
}

/// Scores a text in pieces of `context` tokens, each of which knows nothing of the one before: the first token of a piece is given, the others are scored.
/// `progress` is told the tokens done, and may end the work: then the result is `None`.
///
/// # Errors
/// See [`Error`].
pub fn score_text(
    model: &Model,
    tokenizer: &Tokenizer,
    text: &str,
    context: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<TextScore>, Error> {
    let limit = model.config().max_position_embeddings;
    if !(2..=limit).contains(&context) {
        return Err(Error::Context { context, limit });
    }
    let ids = tokenizer.encode(text, true)?;
    let vocab = model.config().vocab_size;
    let mut score = TextScore { bytes: text.len() as u64, ..TextScore::default() };
    let mut session = Session::new(model, context)?;
    let mut first = 0;
    while first + 1 < ids.len() {
        let piece = &ids[first..(first + context).min(ids.len())];
        session.truncate(0);
        // The last token's logits foretell what the next piece begins with, which is given there.
        for (start, inputs) in (0..).step_by(PIECE).zip(piece[..piece.len() - 1].chunks(PIECE)) {
            let logits = session.logits_for(inputs, inputs.len())?;
            for (row, logits) in logits.chunks_exact(vocab).enumerate() {
                let position = start + row + 1;
                let loss = negative_log_likelihood(logits, piece[position]);
                if !loss.is_finite() {
                    return Err(Error::NotFinite { position: first + position, value: loss });
                }
                score.nats += loss;
                score.tokens += 1;
            }
            if progress(first + start + inputs.len()).is_break() {
                return Ok(None);
            }
        }
        first += piece.len();
    }
    Ok(Some(score))
}

/// −ln softmax(logits)\[target\], sums in f64.
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(max - logits[target as usize]) + sum.ln()
}
