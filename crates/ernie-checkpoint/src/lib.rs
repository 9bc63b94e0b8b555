//! What a model directory is: typed `config.json`, safetensors in and out, tokenizer files, chat template.
mod atomic;
mod chat_template;
mod checkpoint;
mod config;
mod error;
mod layout;
mod save;
mod sentencepiece;
mod tokenizer;

pub use chat_template::{ChatTemplate, ChatTemplateError, ChatTemplateOptions, Message};
pub use sentencepiece::SentencePieceError;
pub use tokenizer::{DecodeStream, SpecialTokens, Tokenizer, TokenizerError};
