//! Special and added tokens: what `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` declare,
//! and finding them in text.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::TokenizerError;
use crate::files;
use crate::sentencepiece::trie::Trie;
use crate::sentencepiece::{PieceKind, SentencePiece};

/// The special tokens that a model directory declares by role, as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
    /// `unk_token`.
    pub unk: Option<String>,
    /// `pad_token`.
    pub pad: Option<String>,
    /// `cls_token`: begins a conversation in the ERNIE family.
    pub cls: Option<String>,
    /// `sep_token`: ends an assistant's turn in the ERNIE family.
    pub sep: Option<String>,
    /// `mask_token`.
    pub mask: Option<String>,
    /// `additional_special_tokens`.
    pub additional: Vec<String>,
}

impl SpecialTokens {
    /// Reads `special_tokens_map.json`, then `tokenizer_config.json` (which wins); a missing file declares nothing.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let mut tokens = Self::default();
        for name in ["special_tokens_map.json", "tokenizer_config.json"] {
            if let Some(file) = SideFile::read(dir.join(name))? {
                tokens.update(&file)?;
            }
        }
        Ok(tokens)
    }

    fn update(&mut self, file: &SideFile) -> Result<(), TokenizerError> {
        let roles = [
            ("bos_token", &mut self.bos),
            ("eos_token", &mut self.eos),
            ("unk_token", &mut self.unk),
            ("pad_token", &mut self.pad),
            ("cls_token", &mut self.cls),
            ("sep_token", &mut self.sep),
            ("mask_token", &mut self.mask),
        ];
        for (field, token) in roles {
            if let Some(value) = file.fields.get(field).filter(|value| !value.is_null()) {
                *token = Some(file.token_text(field, value)?);
            }
        }
        for field in ["additional_special_tokens", "extra_special_tokens"] {
            match file.fields.get(field) {
                None | Some(Value::Null) => {}
                Some(Value::Array(list)) => {
                    self.additional = list.iter().map(|value| file.token_text(field, value)).collect::<Result<_, _>>()?;
                }
                Some(Value::Object(named)) => {
                    self.additional = named.values().map(|value| file.token_text(field, value)).collect::<Result<_, _>>()?;
                }
                Some(other) => return Err(file.wrong(field, "a list of tokens", other)),
            }
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        let roles = [&self.bos, &self.eos, &self.unk, &self.pad, &self.cls, &self.sep, &self.mask];
        roles.into_iter().flatten().chain(&self.additional)
    }
}

/// A JSON object beside the model.
pub(super) struct SideFile {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl SideFile {
    /// `None` where there is no such file.
    pub fn read(path: PathBuf) -> Result<Option<Self>, TokenizerError> {
        let bytes = TokenizerError::if_there(&path, files::read(&path, files::MAX_TEXT_BYTES))?;
        let Some(bytes) = bytes else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Some(Self { path, fields })),
            Ok(_) => Err(TokenizerError::Json { path, reason: "expected a JSON object".into() }),
            Err(error) => Err(TokenizerError::Json { path, reason: error.to_string() }),
        }
    }

    /// A field that holds true or false; `false` where absent.
    pub fn flag(&self, field: &str) -> Result<bool, TokenizerError> {
        flag_of(&self.fields, field).map_err(|found| self.wrong(field, "true or false", &found))
    }

    /// A token written as a string or as an object with `content`.
    fn token_text(&self, field: &str, value: &Value) -> Result<String, TokenizerError> {
        let content = value.as_str().or_else(|| value.get("content")?.as_str());
        content.map(str::to_owned).ok_or_else(|| self.wrong(field, "a token (text, or an object with `content`)", value))
    }

    fn wrong(&self, field: &str, expected: &'static str, found: &Value) -> TokenizerError {
        TokenizerError::Field { path: self.path.clone(), field: field.into(), expected, found: found.to_string() }
    }
}

fn flag_of(fields: &Map<String, Value>, field: &str) -> Result<bool, Value> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(other.clone()),
    }
}

/// A token that is found in text before SentencePiece sees it.
#[derive(Clone, Debug)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Left out by `decode(…, skip_special: true)`.
    pub special: bool,
    strip_left: bool,
    strip_right: bool,
    single_word: bool,
}

/// The added tokens of a SentencePiece directory.
#[derive(Clone, Debug, Default)]
pub(super) struct AddedTokens {
    tokens: Vec<AddedToken>,
    by_id: HashMap<u32, usize>,
    by_content: HashMap<String, usize>,
    trie: Trie,
}

impl AddedTokens {
    /// Collects `added_tokens_decoder` of `tokenizer_config.json`, `added_tokens.json`, and the declared special tokens that
    /// the vocabulary has. Digits that are user-defined symbols stay with SentencePiece: they are text, not special.
    pub fn from_dir(dir: &Path, special: &SpecialTokens, model: &SentencePiece) -> Result<Self, TokenizerError> {
        let mut tokens = BTreeMap::new();
        if let Some(file) = SideFile::read(dir.join("added_tokens.json"))? {
            for (content, id) in &file.fields {
                let id = token_id(id).ok_or_else(|| file.wrong(content, "a token id", id))?;
                let token =
                    AddedToken { id, content: content.clone(), special: false, strip_left: false, strip_right: false, single_word: false };
                tokens.insert(content.clone(), token);
            }
        }
        if let Some(file) = SideFile::read(dir.join("tokenizer_config.json"))? {
            match file.fields.get("added_tokens_decoder") {
                None | Some(Value::Null) => {}
                Some(Value::Object(entries)) => {
                    for (id, entry) in entries {
                        let token = file.added_token(id, entry)?;
                        tokens.insert(token.content.clone(), token);
                    }
                }
                Some(other) => return Err(file.wrong("added_tokens_decoder", "an object", other)),
            }
        }
        for content in special.all() {
            if let Some(token) = tokens.get_mut(content) {
                token.special = true;
            } else if let Some(id) = model.id(content) {
                let (strip_left, strip_right, single_word) = (false, false, false);
                let token = AddedToken { id, content: content.clone(), special: true, strip_left, strip_right, single_word };
                tokens.insert(content.clone(), token);
            }
        }
        let is_digit = |content: &str| {
            matches!(content.as_bytes(), [b'0'..=b'9']) && model.id(content).and_then(|id| model.kind(id)) == Some(PieceKind::UserDefined)
        };
        let kept = tokens.into_values().filter(|token| !token.content.is_empty() && !is_digit(&token.content));
        Ok(Self::new(kept.collect()))
    }

    fn new(tokens: Vec<AddedToken>) -> Self {
        let trie = Trie::new(tokens.iter().zip(0..).map(|(token, index)| (token.content.as_bytes(), index)));
        let by_id = tokens.iter().enumerate().map(|(index, token)| (token.id, index)).collect();
        let by_content = tokens.iter().enumerate().map(|(index, token)| (token.content.clone(), index)).collect();
        Self { tokens, by_id, by_content, trie }
    }

    /// The added token with this id.
    pub fn by_id(&self, id: u32) -> Option<&AddedToken> {
        self.by_id.get(&id).map(|index| &self.tokens[*index])
    }

    /// The added token with this text.
    pub fn by_content(&self, content: &str) -> Option<&AddedToken> {
        self.by_content.get(content).map(|index| &self.tokens[*index])
    }

    /// One more than the highest added id, 0 without added tokens.
    pub fn end_of_ids(&self) -> usize {
        self.tokens.iter().map(|token| token.id as usize + 1).max().unwrap_or(0)
    }

    /// Cuts `text` at added tokens, leftmost first and longest among those: calls `text_run` for what lies between and
    /// `token` for each token.
    pub fn split<S>(&self, state: &mut S, text: &[u8], text_run: impl Fn(&mut S, &[u8]), token: impl Fn(&mut S, &AddedToken)) {
        let (mut run_start, mut at) = (0, 0);
        while at < text.len() && !self.trie.is_empty() {
            let found = self.trie.longest(&text[at..]).map(|(length, index)| (length, &self.tokens[index as usize]));
            let Some((length, added)) = found.filter(|(length, added)| !added.single_word || is_word_alone(text, at, at + length)) else {
                at += 1;
                continue;
            };
            let mut run = &text[run_start..at];
            if added.strip_left {
                run = run.trim_ascii_end();
            }
            if !run.is_empty() {
                text_run(state, run);
            }
            token(state, added);
            at += length;
            if added.strip_right {
                at = text.len() - text[at..].trim_ascii_start().len();
            }
            run_start = at;
        }
        if run_start < text.len() {
            text_run(state, &text[run_start..]);
        }
    }
}

impl SideFile {
    fn added_token(&self, id: &str, entry: &Value) -> Result<AddedToken, TokenizerError> {
        let field = format!("added_tokens_decoder.{id}");
        let number = id.parse().map_err(|_| self.wrong(&field, "a token id as key", entry))?;
        let fields = entry.as_object().ok_or_else(|| self.wrong(&field, "an object", entry))?;
        let flag = |name: &str| flag_of(fields, name).map_err(|found| self.wrong(&format!("{field}.{name}"), "true or false", &found));
        Ok(AddedToken {
            id: number,
            content: self.token_text(&field, entry)?,
            special: flag("special")?,
            strip_left: flag("lstrip")?,
            strip_right: flag("rstrip")?,
            single_word: flag("single_word")?,
        })
    }
}

fn token_id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

/// Whether neither neighbour of `text[start..end]` is a letter, digit or underscore (bytes of other scripts count as letters).
fn is_word_alone(text: &[u8], start: usize, end: usize) -> bool {
    let in_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || !byte.is_ascii();
    !text[..start].last().is_some_and(in_word) && !text[end..].first().is_some_and(in_word)
}
