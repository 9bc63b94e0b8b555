//! The protobuf `ModelProto` of a SentencePiece `.model` file, read without a protobuf library.
//!
//! Only the fields that encoding and decoding need are kept (numbers from `sentencepiece_model.proto`); all others are skipped.
//! Every length is checked against the bytes that are left before anything is allocated.

use super::SentencePieceError as Error;

/// What one vocabulary entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Learnt from text.
    Normal,
    /// The unknown token.
    Unknown,
    /// Never appears in text and decodes to nothing (`<s>`, `</s>`).
    Control,
    /// Always one token, whatever surrounds it.
    UserDefined,
    /// Switched off: segmentation goes through it but never returns it.
    Unused,
    /// One byte of a character that the vocabulary lacks, `<0x00>` … `<0xFF>`.
    Byte,
}

/// One vocabulary entry; its id is its position.
#[derive(Clone, Debug)]
pub struct Piece {
    pub text: Box<str>,
    pub score: f32,
    pub kind: PieceKind,
}

/// The segmentation algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    Unigram,
    Bpe,
}

/// The part of `TrainerSpec` that the finished model still depends on.
#[derive(Clone, Debug)]
pub struct TrainerSpec {
    pub model_type: ModelType,
    pub treat_whitespace_as_suffix: bool,
    pub byte_fallback: bool,
    pub unk_surface: String,
    pub bos_piece: String,
    pub eos_piece: String,
    pub pad_piece: String,
}

impl Default for TrainerSpec {
    fn default() -> Self {
        Self {
            model_type: ModelType::Unigram,
            treat_whitespace_as_suffix: false,
            byte_fallback: false,
            unk_surface: " \u{2047} ".into(),
            bos_piece: "<s>".into(),
            eos_piece: "</s>".into(),
            pad_piece: "<pad>".into(),
        }
    }
}

/// How text is rewritten before segmentation.
#[derive(Clone, Debug)]
pub struct NormalizerSpec {
    pub precompiled_charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub escape_whitespaces: bool,
}

impl Default for NormalizerSpec {
    fn default() -> Self {
        Self { precompiled_charsmap: Vec::new(), add_dummy_prefix: true, remove_extra_whitespaces: true, escape_whitespaces: true }
    }
}

/// A parsed, not yet validated model.
#[derive(Clone, Debug, Default)]
pub struct ModelProto {
    pub pieces: Vec<Piece>,
    pub trainer: TrainerSpec,
    pub normalizer: NormalizerSpec,
    pub denormalizer: Option<NormalizerSpec>,
}

impl ModelProto {
    /// Parses a whole `.model` file.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut model = Self::default();
        let mut reader = Reader { bytes, pos: 0, base: 0 };
        while let Some((number, field)) = reader.next()? {
            match number {
                1 => model.pieces.push(parse_piece(field.message("pieces")?, model.pieces.len())?),
                2 => parse_trainer(field.message("trainer_spec")?, &mut model.trainer)?,
                3 => parse_normalizer(field.message("normalizer_spec")?, &mut model.normalizer)?,
                5 => parse_normalizer(field.message("denormalizer_spec")?, model.denormalizer.get_or_insert_default())?,
                _ => {}
            }
        }
        Ok(model)
    }
}

fn parse_piece(mut reader: Reader<'_>, index: usize) -> Result<Piece, Error> {
    let mut piece = Piece { text: "".into(), score: 0.0, kind: PieceKind::Normal };
    while let Some((number, field)) = reader.next()? {
        match number {
            1 => piece.text = field.text("pieces.piece")?.into(),
            2 => piece.score = field.float("pieces.score")?,
            3 => {
                piece.kind = match field.varint("pieces.type")? {
                    1 => PieceKind::Normal,
                    2 => PieceKind::Unknown,
                    3 => PieceKind::Control,
                    4 => PieceKind::UserDefined,
                    5 => PieceKind::Unused,
                    6 => PieceKind::Byte,
                    other => return Err(Error::Piece { index, reason: format!("type {other} is unknown, expected 1 to 6") }),
                }
            }
            _ => {}
        }
    }
    Ok(piece)
}

fn parse_trainer(mut reader: Reader<'_>, spec: &mut TrainerSpec) -> Result<(), Error> {
    while let Some((number, field)) = reader.next()? {
        match number {
            3 => {
                spec.model_type = match field.varint("trainer_spec.model_type")? {
                    1 => ModelType::Unigram,
                    2 => ModelType::Bpe,
                    other => return Err(Error::ModelType(other)),
                }
            }
            24 => spec.treat_whitespace_as_suffix = field.varint("trainer_spec.treat_whitespace_as_suffix")? != 0,
            35 => spec.byte_fallback = field.varint("trainer_spec.byte_fallback")? != 0,
            44 => spec.unk_surface = field.text("trainer_spec.unk_surface")?.into(),
            // An empty name means the default one.
            46 => replace_unless_empty(&mut spec.bos_piece, field.text("trainer_spec.bos_piece")?),
            47 => replace_unless_empty(&mut spec.eos_piece, field.text("trainer_spec.eos_piece")?),
            48 => replace_unless_empty(&mut spec.pad_piece, field.text("trainer_spec.pad_piece")?),
            _ => {}
        }
    }
    Ok(())
}

fn replace_unless_empty(name: &mut String, found: &str) {
    if !found.is_empty() {
        *name = found.into();
    }
}

fn parse_normalizer(mut reader: Reader<'_>, spec: &mut NormalizerSpec) -> Result<(), Error> {
    while let Some((number, field)) = reader.next()? {
        match number {
            2 => spec.precompiled_charsmap = field.bytes("normalizer_spec.precompiled_charsmap")?.to_vec(),
            3 => spec.add_dummy_prefix = field.varint("normalizer_spec.add_dummy_prefix")? != 0,
            4 => spec.remove_extra_whitespaces = field.varint("normalizer_spec.remove_extra_whitespaces")? != 0,
            5 => spec.escape_whitespaces = field.varint("normalizer_spec.escape_whitespaces")? != 0,
            _ => {}
        }
    }
    Ok(())
}

/// A cursor over one message. `base` is the message's offset in the file, for error messages.
struct Reader<'a> {
    bytes: &'a [u8],
    pos: usize,
    base: usize,
}

/// A field's value and its offset in the file.
struct Field<'a> {
    value: Value<'a>,
    offset: usize,
}

enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

impl<'a> Reader<'a> {
    /// The next field's number and value, `None` at the end of the message.
    fn next(&mut self) -> Result<Option<(u32, Field<'a>)>, Error> {
        if self.pos == self.bytes.len() {
            return Ok(None);
        }
        let start = self.base + self.pos;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| malformed(start, "field number is out of range"))?;
        if number == 0 {
            return Err(malformed(start, "field number is 0"));
        }
        let (value, offset) = match tag & 7 {
            0 => (Value::Varint(self.varint()?), start),
            1 => {
                self.take(8)?;
                (Value::Fixed64, start)
            }
            2 => {
                let length = self.varint()?;
                // `take` compares with what is left, so a lying length costs nothing.
                let length = usize::try_from(length).map_err(|_| malformed(start, "length is out of range"))?;
                let offset = self.base + self.pos;
                (Value::Bytes(self.take(length)?), offset)
            }
            5 => {
                let four = self.take(4)?;
                (Value::Fixed32(u32::from_le_bytes([four[0], four[1], four[2], four[3]])), start)
            }
            _ => return Err(malformed(start, "wire type is neither varint, 64-bit, bytes nor 32-bit")),
        };
        Ok(Some((number, Field { value, offset })))
    }

    fn varint(&mut self) -> Result<u64, Error> {
        let start = self.base + self.pos;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed(start, "varint is longer than 10 bytes"))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let left = &self.bytes[self.pos..];
        let taken = left.get(..length).ok_or_else(|| malformed(self.base + self.pos, "the file ends inside a field"))?;
        self.pos += length;
        Ok(taken)
    }
}

impl<'a> Field<'a> {
    fn varint(&self, name: &'static str) -> Result<u64, Error> {
        match self.value {
            Value::Varint(value) => Ok(value),
            _ => Err(self.wrong_type(name, "a varint")),
        }
    }

    fn float(&self, name: &'static str) -> Result<f32, Error> {
        match self.value {
            Value::Fixed32(bits) => Ok(f32::from_bits(bits)),
            _ => Err(self.wrong_type(name, "a 32-bit float")),
        }
    }

    fn bytes(&self, name: &'static str) -> Result<&'a [u8], Error> {
        match self.value {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(self.wrong_type(name, "bytes")),
        }
    }

    fn text(&self, name: &'static str) -> Result<&'a str, Error> {
        std::str::from_utf8(self.bytes(name)?).map_err(|_| Error::Malformed { offset: self.offset, reason: format!("{name} is not UTF-8") })
    }

    fn message(&self, name: &'static str) -> Result<Reader<'a>, Error> {
        Ok(Reader { bytes: self.bytes(name)?, pos: 0, base: self.offset })
    }

    fn wrong_type(&self, name: &str, expected: &str) -> Error {
        Error::Malformed { offset: self.offset, reason: format!("{name} is not {expected}") }
    }
}

fn malformed(offset: usize, reason: &str) -> Error {
    Error::Malformed { offset, reason: reason.into() }
}
