//! Text to token ids and back, from `tokenizer.json` or a SentencePiece `tokenizer.model`.

mod bytes;
mod error;
mod library;
mod special;
mod stream;

use std::path::{Path, PathBuf};

pub use bytes::TokenBytes;
pub use error::TokenizerError;
pub use special::SpecialTokens;
use special::{AddedToken, AddedTokens, SideFile};
pub use stream::DecodeStream;
use stream::{JsonStreaming, SentencePieceStream, decode_json};

use crate::files;
use crate::sentencepiece::{PieceKind, SentencePiece, text_with_replacements};

/// The names under which the family's releases keep the SentencePiece model, in the order tried.
const SENTENCEPIECE_NAMES: [&str; 3] = ["tokenizer.model", "spm.model", "ernie_token_100k.model"];

/// A model's tokenizer.
///
/// Ids and text equal those of the `tokenizers` package (for `tokenizer.json`) and of the `sentencepiece` package (for
/// `tokenizer.model`; added tokens around it as `transformers`' SentencePiece tokenizers treat them: found first, leftmost
/// and longest, and each stretch of text between them encoded and decoded on its own).
pub struct Tokenizer {
    backend: Backend,
    /// File the tokenizer came from, for messages.
    origin: PathBuf,
    special: SpecialTokens,
}

enum Backend {
    Json { tokenizer: Box<tokenizers::Tokenizer>, streaming: JsonStreaming, vocab_size: usize },
    SentencePiece(Box<SentencePieceBackend>),
}

struct SentencePieceBackend {
    model: SentencePiece,
    added: AddedTokens,
    add_bos: bool,
    add_eos: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("origin", &self.origin).field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads the tokenizer of a model directory: `tokenizer.json` if there, else `tokenizer.model`, `spm.model` or
    /// `ernie_token_100k.model` with the added and special tokens of `tokenizer_config.json`, `added_tokens.json` and
    /// `special_tokens_map.json`. Declared special tokens that are not in the vocabulary are ignored.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let dir = dir.as_ref();
        let special = SpecialTokens::from_dir(dir)?;
        if let Some((path, bytes)) = read_if_there(dir.join("tokenizer.json"))? {
            let mut tokenizer = Self::from_tokenizer_json(&bytes, path)?;
            tokenizer.special = special;
            return Ok(tokenizer);
        }
        for name in SENTENCEPIECE_NAMES {
            let Some((path, bytes)) = read_if_there(dir.join(name))? else { continue };
            let model = parse_sentencepiece(&bytes, &path)?;
            let added = AddedTokens::from_dir(dir, &special, &model)?;
            let (mut add_bos, mut add_eos) = (false, false);
            if let Some(config) = SideFile::read(dir.join("tokenizer_config.json"))? {
                add_bos = config.flag("add_bos_token")?;
                add_eos = config.flag("add_eos_token")?;
            }
            let backend = SentencePieceBackend { model, added, add_bos, add_eos };
            return Ok(Self { backend: Backend::SentencePiece(Box::new(backend)), origin: path, special });
        }
        Err(TokenizerError::Missing { dir: dir.into(), expected: SENTENCEPIECE_NAMES.join(", ") })
    }

    /// Reads a `tokenizer.json`; `origin` is the name that errors give. Truncation and padding settings in the file are
    /// switched off: they belong to a training run, not to the model.
    pub fn from_tokenizer_json(bytes: &[u8], origin: impl Into<PathBuf>) -> Result<Self, TokenizerError> {
        let origin = origin.into();
        let refuse = |reason: String| TokenizerError::TokenizerJson { path: origin.clone(), reason };
        let mut tokenizer = library::read(bytes).map_err(refuse)?;
        tokenizer.with_truncation(None).map_err(|error| refuse(error.to_string()))?;
        tokenizer.with_padding(None);
        let streaming = JsonStreaming::of(&tokenizer);
        let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let backend = Backend::Json { tokenizer: Box::new(tokenizer), streaming, vocab_size };
        Ok(Self { backend, origin, special: SpecialTokens::default() })
    }

    /// Reads a SentencePiece model without added tokens; `origin` is the name that errors give.
    pub fn from_sentencepiece(bytes: &[u8], origin: impl Into<PathBuf>) -> Result<Self, TokenizerError> {
        let origin = origin.into();
        let model = parse_sentencepiece(bytes, &origin)?;
        let backend = SentencePieceBackend { model, added: AddedTokens::default(), add_bos: false, add_eos: false };
        Ok(Self { backend: Backend::SentencePiece(Box::new(backend)), origin, special: SpecialTokens::default() })
    }

    /// Token ids of `text`. Special tokens written out in the text become their single ids. With `add_special` the tokens
    /// that the tokenizer's own rules put around a text are added (`post_processor`; `add_bos_token`, `add_eos_token`).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.backend {
            Backend::Json { tokenizer, .. } => {
                library::encode(tokenizer, text, add_special).map_err(|reason| TokenizerError::Encode { path: self.origin.clone(), reason })
            }
            Backend::SentencePiece(backend) => Ok(self.encode_sentencepiece(backend, text.as_bytes(), add_special)),
        }
    }

    /// [`Self::encode`] for bytes that may not be UTF-8: each byte that is not part of a valid character counts as one U+FFFD.
    pub fn encode_bytes(&self, text: &[u8], add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.backend {
            Backend::Json { .. } => self.encode(&text_with_replacements(text), add_special),
            Backend::SentencePiece(backend) => Ok(self.encode_sentencepiece(backend, text, add_special)),
        }
    }

    fn encode_sentencepiece(&self, backend: &SentencePieceBackend, text: &[u8], add_special: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if add_special && backend.add_bos {
            ids.extend(self.bos_id());
        }
        let run = |ids: &mut Vec<u32>, run: &[u8]| backend.model.encode(run, ids);
        backend.added.split(&mut ids, text, run, |ids, token| ids.push(token.id));
        if add_special && backend.add_eos {
            ids.extend(self.eos_id());
        }
        ids
    }

    /// The text of `ids`; special tokens are left out with `skip_special`. Ids outside the vocabulary add nothing.
    /// Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        match &self.backend {
            Backend::Json { tokenizer, .. } => decode_json(tokenizer, ids, skip_special),
            Backend::SentencePiece(_) => {
                let mut stream = self.decode_stream(skip_special);
                let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
                text.push_str(&stream.finish());
                text
            }
        }
    }

    /// Decodes ids as they are generated.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        match &self.backend {
            Backend::Json { tokenizer, streaming, .. } => DecodeStream::json(tokenizer, *streaming, skip_special),
            Backend::SentencePiece(backend) => DecodeStream::sentencepiece(SentencePieceStream::new(backend, skip_special)),
        }
    }

    /// The text that the vocabulary gives for an id (`▁` for a space and `<0x0A>` for a byte in SentencePiece models).
    pub fn id_to_piece(&self, id: u32) -> Option<String> {
        match &self.backend {
            Backend::Json { tokenizer, .. } => tokenizer.id_to_token(id),
            Backend::SentencePiece(backend) => {
                let added = backend.added.by_id(id).map(|token| token.content.as_str());
                added.or_else(|| backend.model.piece(id)).map(str::to_owned)
            }
        }
    }

    /// The id of a vocabulary entry or added token, `None` if there is none.
    pub fn piece_to_id(&self, piece: &str) -> Option<u32> {
        match &self.backend {
            Backend::Json { tokenizer, .. } => tokenizer.token_to_id(piece),
            Backend::SentencePiece(backend) => backend.added.by_content(piece).map(|token| token.id).or_else(|| backend.model.id(piece)),
        }
    }

    /// Number of ids: one more than the highest.
    pub fn vocab_size(&self) -> usize {
        match &self.backend {
            Backend::Json { vocab_size, .. } => *vocab_size,
            Backend::SentencePiece(backend) => backend.model.len().max(backend.added.end_of_ids()),
        }
    }

    /// Whether `decode(…, skip_special: true)` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        match &self.backend {
            Backend::Json { tokenizer, .. } => {
                tokenizer.id_to_token(id).is_some_and(|token| tokenizer.get_added_vocabulary().is_special_token(&token))
            }
            Backend::SentencePiece(backend) => backend.is_special(id),
        }
    }

    /// The special tokens by role, as the directory declares them (empty for a tokenizer made from bytes).
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Id of the token that begins a text: `bos_token` as declared, else the SentencePiece model's own.
    pub fn bos_id(&self) -> Option<u32> {
        self.declared(&self.special.bos, SentencePiece::bos)
    }

    /// Id of the token that ends a text: `eos_token` as declared, else the SentencePiece model's own.
    pub fn eos_id(&self) -> Option<u32> {
        self.declared(&self.special.eos, SentencePiece::eos)
    }

    /// Id of the padding token: `pad_token` as declared, else the SentencePiece model's own.
    pub fn pad_id(&self) -> Option<u32> {
        self.declared(&self.special.pad, SentencePiece::pad)
    }

    /// Id of the unknown token: `unk_token` as declared, else the SentencePiece model's own.
    pub fn unk_id(&self) -> Option<u32> {
        self.declared(&self.special.unk, SentencePiece::unknown)
    }

    fn declared(&self, token: &Option<String>, of_model: impl Fn(&SentencePiece) -> Option<u32>) -> Option<u32> {
        let declared = token.as_deref().and_then(|token| self.piece_to_id(token));
        declared.or_else(|| match &self.backend {
            Backend::Json { .. } => None,
            Backend::SentencePiece(backend) => of_model(&backend.model),
        })
    }
}

impl SentencePieceBackend {
    fn is_special(&self, id: u32) -> bool {
        match self.added.by_id(id) {
            Some(token) => token.special,
            None => self.model.kind(id) == Some(PieceKind::Control),
        }
    }
}

fn parse_sentencepiece(bytes: &[u8], origin: &Path) -> Result<SentencePiece, TokenizerError> {
    SentencePiece::parse(bytes).map_err(|source| TokenizerError::SentencePiece { path: origin.into(), source })
}

fn read_if_there(path: PathBuf) -> Result<Option<(PathBuf, Vec<u8>)>, TokenizerError> {
    let bytes = TokenizerError::if_there(&path, files::read(&path, files::MAX_TEXT_BYTES))?;
    Ok(bytes.map(|bytes| (path, bytes)))
}
