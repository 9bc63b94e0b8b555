//! Decoding while tokens are generated: text comes out as soon as no later token can change it, in whole characters.

use tokenizers::DecoderWrapper;

use super::{AddedToken, SentencePieceBackend, library};
use crate::sentencepiece::RunDecoder;

/// Decodes one id at a time. All that [`Self::push`] and [`Self::finish`] return, put together, is exactly what
/// [`Tokenizer::decode`](super::Tokenizer::decode) gives for all the ids.
pub struct DecodeStream<'a>(Stream<'a>);

enum Stream<'a> {
    Json(JsonStream<'a>),
    SentencePiece(SentencePieceStream<'a>),
}

impl<'a> DecodeStream<'a> {
    pub(super) fn json(tokenizer: &'a tokenizers::Tokenizer, streaming: JsonStreaming, skip_special: bool) -> Self {
        Self(Stream::Json(JsonStream { tokenizer, streaming, skip_special, ids: Vec::new(), context: 0 }))
    }

    pub(super) fn sentencepiece(stream: SentencePieceStream<'a>) -> Self {
        Self(Stream::SentencePiece(stream))
    }

    /// Takes the next id; returns the text that is now certain, possibly empty, always whole characters.
    pub fn push(&mut self, id: u32) -> String {
        match &mut self.0 {
            Stream::Json(stream) => stream.push(id),
            Stream::SentencePiece(stream) => stream.push(id),
        }
    }

    /// Returns the text still held back, and starts anew.
    pub fn finish(&mut self) -> String {
        match &mut self.0 {
            Stream::Json(stream) => stream.finish(),
            Stream::SentencePiece(stream) => stream.finish(),
        }
    }
}

/// Runs of pieces between added tokens, each decoded on its own.
pub(super) struct SentencePieceStream<'a> {
    backend: &'a SentencePieceBackend,
    skip_special: bool,
    run: RunDecoder,
}

impl<'a> SentencePieceStream<'a> {
    pub fn new(backend: &'a SentencePieceBackend, skip_special: bool) -> Self {
        Self { backend, skip_special, run: RunDecoder::new() }
    }

    fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        match self.backend.added.by_id(id) {
            Some(AddedToken { special: true, .. }) if self.skip_special => {}
            Some(token) => {
                self.run.finish(&self.backend.model, &mut text);
                text.push_str(&token.content);
            }
            None => self.run.push(&self.backend.model, id, &mut text),
        }
        text
    }

    fn finish(&mut self) -> String {
        let mut text = String::new();
        self.run.finish(&self.backend.model, &mut text);
        text
    }
}

/// The whole text of `ids`. (Some decoders of the library cannot take an empty list of tokens, so it never gets one.)
pub(super) fn decode_json(tokenizer: &tokenizers::Tokenizer, ids: &[u32], skip_special: bool) -> String {
    match ids.iter().any(|id| visible_token(tokenizer, *id, skip_special).is_some()) {
        true => library::decode(tokenizer, ids, skip_special),
        false => String::new(),
    }
}

/// The token that the decoder sees for an id; `None` for ids outside the vocabulary and special tokens left out.
fn visible_token(tokenizer: &tokenizers::Tokenizer, id: u32, skip_special: bool) -> Option<String> {
    let token = tokenizer.id_to_token(id)?;
    let left_out = skip_special && tokenizer.get_added_vocabulary().is_special_token(&token);
    (!left_out).then_some(token)
}

/// How far a `tokenizer.json` decoder looks beyond one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JsonStreaming {
    /// Only neighbouring tokens that share a character or a run of byte tokens depend on each other.
    Local { byte_fallback: bool },
    /// Unknown: all text waits for the end.
    Whole,
}

impl JsonStreaming {
    pub fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let mut steps = Vec::new();
        if let Some(decoder) = tokenizer.get_decoder() {
            flatten(decoder, &mut steps);
        }
        let byte_fallback = steps.iter().any(|step| matches!(step, DecoderWrapper::ByteFallback(_)));
        let mut fused = false;
        for step in steps {
            let local = match step {
                // After `Fuse` a step sees the whole text as one token; removing at most one leading character is harmless.
                DecoderWrapper::Strip(strip) => fused && strip.start <= 1 && strip.stop == 0,
                DecoderWrapper::Fuse(_) => true,
                DecoderWrapper::ByteLevel(_) | DecoderWrapper::ByteFallback(_) => !fused,
                DecoderWrapper::Metaspace(_) | DecoderWrapper::Replace(_) => !fused,
                _ => false,
            };
            if !local {
                return Self::Whole;
            }
            fused |= matches!(step, DecoderWrapper::Fuse(_));
        }
        Self::Local { byte_fallback }
    }
}

pub(super) fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().for_each(|step| flatten(step, steps)),
        step => steps.push(step),
    }
}

/// Decodes the tokens since the last but one piece of text, and gives what is beyond the last one.
struct JsonStream<'a> {
    tokenizer: &'a tokenizers::Tokenizer,
    streaming: JsonStreaming,
    skip_special: bool,
    /// `ids[..context]` gave the last text; they stand before the new ones because decoders treat a text's first token apart.
    ids: Vec<u32>,
    context: usize,
}

impl JsonStream<'_> {
    fn push(&mut self, id: u32) -> String {
        // What the decoder does not see must not look like the end of a run of byte tokens.
        let Some(token) = visible_token(self.tokenizer, id, self.skip_special) else { return String::new() };
        self.ids.push(id);
        match self.streaming {
            JsonStreaming::Whole => return String::new(),
            // A run of byte tokens is valid or not as a whole.
            JsonStreaming::Local { byte_fallback: true } if is_byte_token(&token) => return String::new(),
            JsonStreaming::Local { .. } => {}
        }
        let text = self.beyond_context();
        // U+FFFD at the end may be the first half of a character.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        text
    }

    fn finish(&mut self) -> String {
        let text = self.beyond_context();
        self.ids.clear();
        self.context = 0;
        text
    }

    fn beyond_context(&self) -> String {
        let decode = |ids: &[u32]| decode_json(self.tokenizer, ids, self.skip_special);
        let known = decode(&self.ids[..self.context]);
        let mut text = decode(&self.ids);
        // The decoders admitted by `JsonStreaming::of` only ever append.
        if text.starts_with(&known) { text.split_off(known.len()) } else { String::new() }
    }
}

fn is_byte_token(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}
