//! Ids to text, one id at a time: SentencePiece's `Decode` as a state machine, so that streamed and whole decoding are the same code.

use super::normalizer::{SPACE_SYMBOL, char_length, valid_char_length};
use super::{PieceKind, SentencePiece, byte_of, text_with_replacements};

/// Decodes one run of pieces. Text that later ids could still change is held back until they come or [`RunDecoder::finish`].
#[derive(Clone, Debug)]
pub(crate) struct RunDecoder {
    /// Byte pieces not yet known to form (or not to form) a character.
    bytes: Vec<u8>,
    /// Whether a leading space may still be dropped.
    at_start: bool,
    /// Everything so far, for models with a denormaliser: it sees the whole text.
    undenormalized: Vec<u8>,
    any_text: bool,
}

impl RunDecoder {
    pub fn new() -> Self {
        Self { bytes: Vec::new(), at_start: true, undenormalized: Vec::new(), any_text: false }
    }

    /// Takes the next id and appends the text that is now certain. Ids outside the vocabulary add nothing.
    pub fn push(&mut self, model: &SentencePiece, id: u32, out: &mut String) {
        let (Some(piece), Some(kind)) = (model.piece(id), model.kind(id)) else { return };
        if let (PieceKind::Byte, Some(byte)) = (kind, byte_of(piece)) {
            self.bytes.push(byte);
            let certain = self.certain_bytes();
            self.release(model, certain, out);
            return;
        }
        self.release(model, self.bytes.len(), out);
        self.at_start &= !self.any_text;
        match kind {
            PieceKind::Control => {}
            PieceKind::Unknown => self.emit(model, &model.unk_surface, out),
            _ => {
                let mut rest = piece;
                if self.at_start
                    && model.strips_leading_space
                    && let Some(stripped) = piece.strip_prefix(SPACE_SYMBOL)
                {
                    rest = stripped;
                    self.at_start = model.strips_all_leading_spaces;
                }
                self.emit(model, &rest.replace(SPACE_SYMBOL, " "), out);
            }
        }
    }

    /// Ends the run: appends what was held back.
    pub fn finish(&mut self, model: &SentencePiece, out: &mut String) {
        self.release(model, self.bytes.len(), out);
        if let Some(denormalizer) = &model.denormalizer {
            out.push_str(&text_with_replacements(&denormalizer.normalize(&self.undenormalized)));
        }
        *self = Self::new();
    }

    /// How many of the waiting bytes no later byte can change: all but a last, incomplete but so far well-formed character.
    fn certain_bytes(&self) -> usize {
        let mut at = 0;
        while at < self.bytes.len() {
            let rest = &self.bytes[at..];
            if let Some(length) = valid_char_length(rest) {
                at += length;
                continue;
            }
            let first = rest[0];
            let needed = char_length(&[first, 0, 0, 0]);
            let incomplete = rest.len() < needed && rest[1..].iter().all(|byte| byte & 0xc0 == 0x80);
            if incomplete {
                break;
            }
            at += 1;
        }
        at
    }

    fn release(&mut self, model: &SentencePiece, count: usize, out: &mut String) {
        if count > 0 {
            let text = text_with_replacements(&self.bytes[..count]);
            self.bytes.drain(..count);
            self.emit(model, &text, out);
        }
    }

    fn emit(&mut self, model: &SentencePiece, text: &str, out: &mut String) {
        self.any_text |= !text.is_empty();
        match model.denormalizer {
            None => out.push_str(text),
            Some(_) => self.undenormalized.extend_from_slice(text.as_bytes()),
        }
    }
}
