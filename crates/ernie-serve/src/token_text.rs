//! Single tokens as text and as bytes, for reports of log-probabilities.
use ernie_checkpoint::Tokenizer;

/// The bytes of one token in the middle of a text: a leading space is part of it, a byte of a longer character stands alone.
pub fn token_bytes(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let Some(piece) = tokenizer.id_to_piece(id) else { return Vec::new() };
    if tokenizer.is_special(id) {
        return piece.into_bytes();
    }
    if let Some(byte) = piece.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>')).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        return vec![byte];
    }
    // Decoders drop the space before a text's first word, so another token comes first.
    let mut stream = tokenizer.decode_stream(true);
    let anchor = tokenizer.encode("a", false).ok().and_then(|ids| ids.last().copied());
    let mut text = String::new();
    if let Some(anchor) = anchor {
        stream.push(anchor);
    }
    text.push_str(&stream.push(id));
    text.push_str(&stream.finish());
    text.into_bytes()
}

/// The same as text; what is no whole character is U+FFFD.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(&token_bytes(tokenizer, id)).into_owned()
}
