//! What can be wrong with a tokenizer's files.

use std::path::{Path, PathBuf};

use crate::files::ReadError;
use crate::sentencepiece::SentencePieceError;

/// A tokenizer that cannot be loaded or used. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file exists but cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something that is not a file stands under a file's name.
    #[error("{}: expected a regular file, got {got}; put the file itself there", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is: a directory, a named pipe, ….
        got: &'static str,
    },
    /// A file larger than any tokenizer's.
    #[error("{}: expected at most {limit} bytes, got at least {size}; this is not the file its name says", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that it has at least.
        size: u64,
        /// Bytes that it may have.
        limit: u64,
    },
    /// The directory has no tokenizer.
    #[error("{}: no tokenizer found; expected tokenizer.json or one of {expected}", dir.display())]
    Missing {
        /// The model directory.
        dir: PathBuf,
        /// The SentencePiece file names that were tried.
        expected: String,
    },
    /// A side file is not the JSON it should be.
    #[error("{}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A field of a side file has the wrong type or value.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dotted.
        field: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
    /// `tokenizer.json` is refused by the `tokenizers` library.
    #[error("{}: not a usable tokenizer.json: {reason}", path.display())]
    TokenizerJson {
        /// The file.
        path: PathBuf,
        /// The library's message.
        reason: String,
    },
    /// The SentencePiece model is damaged or of an unsupported kind.
    #[error("{}: {source}", path.display())]
    SentencePiece {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SentencePieceError,
    },
    /// The `tokenizers` library failed on a text.
    #[error("{}: cannot encode the text: {reason}", path.display())]
    Encode {
        /// The tokenizer's file.
        path: PathBuf,
        /// The library's message.
        reason: String,
    },
}

impl TokenizerError {
    /// `None` where there is no such file; otherwise names the file that was not read.
    pub(crate) fn if_there<T>(path: &Path, read: Result<T, ReadError>) -> Result<Option<T>, Self> {
        let path = || path.to_owned();
        match read {
            Ok(content) => Ok(Some(content)),
            Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(ReadError::Io(source)) => Err(Self::Io { path: path(), source }),
            Err(ReadError::NotRegular(got)) => Err(Self::NotRegular { path: path(), got }),
            Err(ReadError::TooLarge { size, limit }) => Err(Self::TooLarge { path: path(), size, limit }),
        }
    }
}
