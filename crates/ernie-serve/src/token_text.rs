//! Single tokens as text and as bytes, for reports of log-probabilities.
use ernie_checkpoint::{TokenBytes, Tokenizer};

/// The bytes of one token in the middle of a text: a leading space is part of it, a byte of a longer character stands alone.
pub fn token_bytes(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    match tokenizer.token_bytes(id) {
        None => Vec::new(),
        Some(TokenBytes::Text(bytes)) => bytes,
        Some(TokenBytes::Special(name)) => name.into_bytes(),
    }
}

/// The same as text; what is no whole character is U+FFFD.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(&token_bytes(tokenizer, id)).into_owned()
}
