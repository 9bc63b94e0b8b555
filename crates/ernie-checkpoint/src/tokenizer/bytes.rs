//! What single tokens add to a text, as bytes: a token may end within a character.
use std::collections::HashMap;
use std::sync::LazyLock;

use tokenizers::{Decoder, DecoderWrapper};

use super::stream::flatten;
use super::{Backend, Tokenizer};
use crate::sentencepiece::{PieceKind, byte_of};

/// What a token stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenBytes {
    /// A piece of text, as it is in the middle of one: a leading space is part of it.
    Text(Vec<u8>),
    /// A special token, with its name. It is no text, even if a text spells it out.
    Special(String),
}

impl Tokenizer {
    /// What a token stands for; `None` for ids that are no token. The bytes of several text tokens, put together, are the text that decoding gives (up to
    /// a space that decoders take off a text's beginning, and for bytes that are no UTF-8).
    pub fn token_bytes(&self, id: u32) -> Option<TokenBytes> {
        let piece = self.id_to_piece(id)?;
        if self.is_special(id) || Some(id) == self.unk_id() {
            return Some(TokenBytes::Special(piece));
        }
        Some(TokenBytes::Text(match &self.backend {
            Backend::SentencePiece(backend) if backend.added.by_id(id).is_some() => piece.into_bytes(),
            Backend::SentencePiece(backend) => match (backend.model.kind(id), byte_of(&piece)) {
                (Some(PieceKind::Byte), Some(byte)) => vec![byte],
                (Some(PieceKind::Unknown), _) => return Some(TokenBytes::Special(piece)),
                _ => piece.replace('▁', " ").into_bytes(),
            },
            Backend::Json { tokenizer, .. } => bytes_of(tokenizer, piece),
        }))
    }
}

/// A token through the steps of a decoder, behind another token: some steps treat a text's first apart.
fn bytes_of(tokenizer: &tokenizers::Tokenizer, token: String) -> Vec<u8> {
    let mut steps = Vec::new();
    if let Some(decoder) = tokenizer.get_decoder() {
        flatten(decoder, &mut steps);
    }
    let mut text = token;
    for step in steps {
        match step {
            DecoderWrapper::ByteLevel(_) => return of_byte_level(&text),
            DecoderWrapper::ByteFallback(_) => {
                if let Some(byte) = byte_of(&text) {
                    return vec![byte];
                }
            }
            // They see the whole text.
            DecoderWrapper::Fuse(_) | DecoderWrapper::Strip(_) => {}
            step => {
                let decoded = step.decode_chain(vec!["a".to_owned(), text.clone()]);
                text = decoded.ok().and_then(|pieces| pieces.into_iter().nth(1)).unwrap_or(text);
            }
        }
    }
    text.into_bytes()
}

/// GPT-2's alphabet: each byte has a visible character, its own where it is one. A token with another character stands for itself.
fn of_byte_level(token: &str) -> Vec<u8> {
    static BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
        let visible = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let others = (0..=u8::MAX).filter(|byte| !visible(byte)).zip('\u{100}'..);
        (0..=u8::MAX).filter(visible).map(|byte| (char::from(byte), byte)).chain(others.map(|(byte, stand_in)| (stand_in, byte))).collect()
    });
    let bytes: Option<Vec<u8>> = token.chars().map(|character| BYTES.get(&character).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}
