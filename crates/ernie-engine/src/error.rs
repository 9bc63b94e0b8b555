//! Everything the engine can refuse.

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong while loading a model or generating with it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model directory is broken; the inner error names file and tensor.
    #[error(transparent)]
    Checkpoint(#[from] ernie_checkpoint::Error),
    /// A sampling parameter is out of its range.
    #[error("parameter `{field}`: expected {expected}, got {got}")]
    Parameter {
        /// The field of [`SamplingParams`](crate::SamplingParams), or the argument.
        field: &'static str,
        /// What would be accepted.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// There is nothing to continue.
    #[error("the prompt is empty; give at least one token (most models start from the id `bos_token_id` of config.json)")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("token {id} at position {position} is not in the vocabulary of {vocab_size} (ids 0 to {})", vocab_size - 1)]
    UnknownToken {
        /// Index in the ids given.
        position: usize,
        /// The id.
        id: u32,
        /// Size of the model's vocabulary.
        vocab_size: usize,
    },
    /// More positions than the session or the model has.
    #[error("{needed} tokens do not fit in the context of {limit}; shorten the prompt")]
    ContextLength {
        /// Positions needed.
        needed: usize,
        /// Positions there are.
        limit: usize,
    },
    /// The model computed something that is not a number: its weights or its input are damaged.
    #[error("the logit of token {id} is {value}; the model's weights are damaged or too large for 32-bit arithmetic (try `ernie inspect`)")]
    BadLogit {
        /// First such token.
        id: usize,
        /// NaN or +∞, or −∞ if every logit is.
        value: f32,
    },
    /// Something that this version cannot compute.
    #[error("{what} is not supported yet; {instead}")]
    Unsupported {
        /// The missing ability.
        what: &'static str,
        /// What can be done instead.
        instead: &'static str,
    },
    /// A request's [`Constraint`](crate::Constraint) cannot say how the text may go on.
    #[error("the constraint on the answer failed: {reason}")]
    Constraint {
        /// Why.
        reason: String,
    },
    /// The weights do not fit in memory.
    #[error("no memory for weights of {bytes} bytes; use a smaller or quantised model (`ernie quantize`)")]
    NoMemoryForWeights {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The key/value cache does not fit in memory.
    #[error("no memory for the key/value cache of {positions} positions ({bytes} bytes); use a shorter context")]
    OutOfMemory {
        /// Positions asked for.
        positions: usize,
        /// Bytes asked for.
        bytes: usize,
    },
}
