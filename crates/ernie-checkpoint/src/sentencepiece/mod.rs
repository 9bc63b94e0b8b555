//! SentencePiece models (`tokenizer.model`), BPE and unigram: the same ids and the same text as the `sentencepiece`
//! package 0.2.3 (algorithms: Kudo and Richardson 2018, arXiv 1808.06226; Kudo 2018, arXiv 1804.10959).

mod bpe;
mod decode;
mod normalizer;
mod proto;
pub(crate) mod trie;
mod unigram;

use std::collections::HashMap;

pub(crate) use decode::RunDecoder;
use normalizer::{Normalizer, PrefixMatcher, char_length};
pub use proto::PieceKind;
use proto::{ModelProto, ModelType, Piece};
use unigram::Unigram;

/// Why a SentencePiece model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SentencePieceError {
    /// Not a protobuf message, or a field of the wrong type.
    #[error("byte {offset}: {reason}; the file is damaged or not a SentencePiece model")]
    Malformed {
        /// Offset in the file.
        offset: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A vocabulary entry that no model may have.
    #[error("piece {index}: {reason}")]
    Piece {
        /// Position in the vocabulary.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// `trainer_spec.model_type` names an algorithm that is not implemented.
    #[error("trainer_spec.model_type is {0}, expected 1 (unigram) or 2 (BPE)")]
    ModelType(u64),
    /// The vocabulary as a whole lacks something.
    #[error("the vocabulary {0}")]
    Vocabulary(&'static str),
    /// `normalizer_spec.precompiled_charsmap` cannot be read.
    #[error("normalizer_spec.precompiled_charsmap is unusable: {0}")]
    CharsMap(&'static str),
}

/// A piece of the normalised text: its length in bytes and its id, `None` for unknown.
struct Segment {
    length: usize,
    id: Option<u32>,
}

/// The pieces and how to find them.
#[derive(Clone, Debug)]
struct Vocabulary {
    pieces: Vec<Piece>,
    ids: HashMap<Box<[u8]>, u32>,
    /// Unigram models may have a control and a normal piece of the same text; these are the former.
    reserved_ids: HashMap<Box<[u8]>, u32>,
    user_defined: PrefixMatcher,
    unknown: Option<u32>,
    /// Id of each byte's piece, when the model has byte fallback.
    bytes: Option<Box<[u32; 256]>>,
}

impl Vocabulary {
    fn new(mut pieces: Vec<Piece>, model_type: ModelType, byte_fallback: bool) -> Result<Self, SentencePieceError> {
        // SentencePiece refuses longer ones.
        const MAX_PIECE_BYTES: usize = 8000;
        let refuse = |index, reason: String| Err(SentencePieceError::Piece { index, reason });
        let (mut ids, mut reserved_ids) = (HashMap::with_capacity(pieces.len()), HashMap::new());
        let mut unknown = None;
        let mut bytes = [None; 256];
        if u32::try_from(pieces.len()).is_err() {
            return Err(SentencePieceError::Vocabulary("has more than 2^32 pieces"));
        }
        for (index, piece) in pieces.iter_mut().enumerate() {
            let id = index as u32;
            if piece.text.is_empty() {
                return refuse(index, "its text is empty".into());
            }
            if piece.text.len() >= MAX_PIECE_BYTES {
                return refuse(index, format!("its text has {} bytes, expected less than {MAX_PIECE_BYTES}", piece.text.len()));
            }
            if !piece.score.is_finite() {
                return refuse(index, format!("its score is {}, expected a finite number", piece.score));
            }
            // Some converters write a NUL piece beside the byte piece <0x00>; SentencePiece ignores it.
            if &*piece.text == "\0" && (byte_fallback || piece.kind == PieceKind::Unused) {
                piece.kind = PieceKind::Unused;
                continue;
            }
            if piece.text.contains('\0') {
                return refuse(index, "its text contains a NUL character".into());
            }
            let reserved = model_type == ModelType::Unigram && is_reserved(piece.kind);
            let map = if reserved { &mut reserved_ids } else { &mut ids };
            if let Some(first) = map.insert(piece.text.as_bytes().into(), id) {
                return refuse(index, format!("{:?} is already piece {first}", piece.text));
            }
            match piece.kind {
                PieceKind::Unknown => {
                    if let Some(first) = unknown.replace(id) {
                        return refuse(index, format!("is of type unknown, but so is piece {first}"));
                    }
                }
                PieceKind::Byte => {
                    if !byte_fallback {
                        return refuse(index, "is a byte piece, but trainer_spec.byte_fallback is false".into());
                    }
                    match byte_of(&piece.text) {
                        Some(byte) => bytes[usize::from(byte)] = Some(id),
                        None => return refuse(index, format!("{:?} is of type byte, expected <0x00> to <0xFF>", piece.text)),
                    }
                }
                _ => {}
            }
        }
        if unknown.is_none() && !byte_fallback {
            return Err(SentencePieceError::Vocabulary("has no unknown piece"));
        }
        let mut byte_ids = Box::new([0; 256]);
        if byte_fallback {
            for (slot, id) in byte_ids.iter_mut().zip(bytes) {
                *slot = id.ok_or(SentencePieceError::Vocabulary("lacks some of the 256 byte pieces that byte_fallback needs"))?;
            }
        }
        let of_kind = |kind| pieces.iter().filter(move |piece| piece.kind == kind).map(|piece| &*piece.text);
        let user_defined = PrefixMatcher::new(of_kind(PieceKind::UserDefined));
        Ok(Self { ids, reserved_ids, user_defined, unknown, bytes: byte_fallback.then_some(byte_ids), pieces })
    }

    fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    fn kind(&self, id: u32) -> PieceKind {
        self.pieces[id as usize].kind
    }

    fn score(&self, id: u32) -> f32 {
        self.pieces[id as usize].score
    }

    /// The id of a piece that text can be segmented into: normal, user-defined or unused.
    fn id_of_text_piece(&self, piece: &[u8]) -> Option<u32> {
        self.ids.get(piece).copied().filter(|id| !is_reserved(self.kind(*id)))
    }

    /// Every piece that text can be segmented into.
    fn text_pieces(&self) -> impl Iterator<Item = (&str, u32)> {
        let all = self.pieces.iter().zip(0..);
        all.filter(|(piece, _)| !is_reserved(piece.kind) && &*piece.text != "\0").map(|(piece, id)| (&*piece.text, id))
    }
}

fn is_reserved(kind: PieceKind) -> bool {
    matches!(kind, PieceKind::Unknown | PieceKind::Control | PieceKind::Byte)
}

/// The byte that `<0x00>` … `<0xFF>` stands for.
pub(crate) fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let upper = digits.len() == 2 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'A'..=b'F'));
    upper.then(|| u8::from_str_radix(digits, 16).ok())?
}

#[derive(Clone, Debug)]
enum Algorithm {
    Bpe,
    Unigram(Unigram),
}

/// A SentencePiece model, ready to encode and decode.
#[derive(Clone, Debug)]
pub(crate) struct SentencePiece {
    vocabulary: Vocabulary,
    algorithm: Algorithm,
    normalizer: Normalizer,
    denormalizer: Option<Normalizer>,
    unk_surface: String,
    /// Whether decoding drops a space at the start, and whether it drops all of them there.
    strips_leading_space: bool,
    strips_all_leading_spaces: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
}

impl SentencePiece {
    /// Reads a `.model` file's bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, SentencePieceError> {
        let ModelProto { pieces, trainer, normalizer, denormalizer } = ModelProto::parse(bytes)?;
        let vocabulary = Vocabulary::new(pieces, trainer.model_type, trainer.byte_fallback)?;
        let algorithm = match trainer.model_type {
            ModelType::Bpe => Algorithm::Bpe,
            ModelType::Unigram => Algorithm::Unigram(Unigram::new(&vocabulary)),
        };
        let denormalizer = match &denormalizer {
            Some(spec) if !spec.precompiled_charsmap.is_empty() => Some(Normalizer::new(spec, PrefixMatcher::default(), false)?),
            _ => None,
        };
        let control = |name: &str| {
            let id = vocabulary.reserved_ids.get(name.as_bytes()).or_else(|| vocabulary.ids.get(name.as_bytes()));
            id.copied().filter(|id| vocabulary.kind(*id) == PieceKind::Control)
        };
        Ok(Self {
            bos: control(&trainer.bos_piece),
            eos: control(&trainer.eos_piece),
            pad: control(&trainer.pad_piece),
            normalizer: Normalizer::new(&normalizer, vocabulary.user_defined.clone(), trainer.treat_whitespace_as_suffix)?,
            denormalizer,
            unk_surface: trainer.unk_surface,
            strips_leading_space: normalizer.add_dummy_prefix || normalizer.remove_extra_whitespaces,
            strips_all_leading_spaces: normalizer.remove_extra_whitespaces,
            algorithm,
            vocabulary,
        })
    }

    /// Appends the ids of `text`; bytes that are not UTF-8 count as one U+FFFD each.
    pub fn encode(&self, text: &[u8], ids: &mut Vec<u32>) {
        let normalized = self.normalizer.normalize(text);
        let segments = match &self.algorithm {
            Algorithm::Bpe => bpe::segment(&self.vocabulary, &normalized),
            Algorithm::Unigram(unigram) => unigram.segment(&self.vocabulary, &normalized),
        };
        let mut start = 0;
        let mut after_unknown = false;
        for Segment { length, id } in segments {
            match (id, &self.vocabulary.bytes, self.vocabulary.unknown) {
                (Some(id), _, _) => ids.push(id),
                (None, Some(bytes), _) => {
                    let covered = &normalized[start..start + length];
                    ids.extend(covered.iter().map(|byte| bytes[usize::from(*byte)]));
                }
                // A run of unknown characters is one unknown token.
                (None, None, Some(unknown)) if !after_unknown => ids.push(unknown),
                (None, None, _) => {}
            }
            after_unknown = id.is_none();
            start += length;
        }
    }

    /// Number of pieces; ids are below it.
    pub fn len(&self) -> usize {
        self.vocabulary.pieces.len()
    }

    /// The text of a piece.
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.vocabulary.pieces.get(id as usize).map(|piece| &*piece.text)
    }

    /// What a piece is.
    pub fn kind(&self, id: u32) -> Option<PieceKind> {
        self.vocabulary.pieces.get(id as usize).map(|piece| piece.kind)
    }

    /// The id of a piece, reserved ones included.
    pub fn id(&self, piece: &str) -> Option<u32> {
        let piece = piece.as_bytes();
        self.vocabulary.reserved_ids.get(piece).or_else(|| self.vocabulary.ids.get(piece)).copied()
    }

    /// The unknown piece.
    pub fn unknown(&self) -> Option<u32> {
        self.vocabulary.unknown
    }

    /// `trainer_spec.bos_piece`, if it is a control piece.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// `trainer_spec.eos_piece`, if it is a control piece.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// `trainer_spec.pad_piece`, if it is a control piece.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }
}

/// `bytes` as text, each byte that is not part of valid UTF-8 as one U+FFFD (SentencePiece's rule, not `from_utf8_lossy`'s).
pub(crate) fn text_with_replacements(mut bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    while !bytes.is_empty() {
        let length = char_length(bytes);
        match std::str::from_utf8(&bytes[..length]) {
            Ok(character) => {
                text.push_str(character);
                bytes = &bytes[length..];
            }
            Err(_) => {
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &bytes[1..];
            }
        }
    }
    text
}
