//! Documents as token ids: dialogues under the family's chat template, running text ended by `</s>`.
use ernie_checkpoint::Tokenizer;
use std::path::Path;

use super::Error;
use super::sources::{Body, Role, Turn};
use crate::tokenizer_training::{END_OF_SENTENCE, SPECIAL_TOKENS, START_OF_DIALOGUE};

/// The text of a document: a dialogue under the family's template,
/// `<|begin_of_sentence|>User: …\nAssistant: …<|end_of_sentence|>User: …`, system text first on its own line.
pub fn render(body: &Body) -> String {
    match body {
        Body::Text(text) => text.clone(),
        Body::Dialogue(turns) => parts(turns).concat(),
    }
}

/// A dialogue's text, cut after every `Assistant: `: in a chat the prompt up to there is tokenised before the answer
/// exists, and tokenised as one string the space would become part of the answer's first word.
fn parts(turns: &[Turn]) -> Vec<String> {
    let mut parts = vec![String::from(START_OF_DIALOGUE)];
    for turn in turns {
        let open = parts.len() - 1;
        match turn.role {
            Role::System => parts[open].extend([turn.content.as_str(), "\n"]),
            Role::User => parts[open].extend(["User: ", turn.content.as_str(), "\n"]),
            Role::Assistant => {
                parts[open].push_str("Assistant: ");
                parts.push(format!("{}{END_OF_SENTENCE}", turn.content));
                parts.push(String::new());
            }
        }
    }
    parts
}

/// A tokenizer and the hash of its file.
pub struct Encoder {
    tokenizer: Tokenizer,
    end_of_text: u32,
    fingerprint: blake3::Hash,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoder({})", self.fingerprint.to_hex())
    }
}

impl Encoder {
    /// The tokenizer.json (or tokenizer.model) of a folder. It must name an end-of-text token (`eos_token`).
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let refuse = |problem: String| Error::Tokenizer { origin: dir.to_path_buf(), problem };
        let tokenizer = Tokenizer::from_dir(dir).map_err(|error| refuse(error.to_string()))?;
        let end_of_text =
            tokenizer.eos_id().ok_or_else(|| refuse("it has no eos_token to end a text with; name one in tokenizer_config.json".into()))?;
        let name = if dir.join("tokenizer.json").is_file() { "tokenizer.json" } else { "tokenizer.model" };
        let path = dir.join(name);
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path, source })?;
        Ok(Self { tokenizer, end_of_text, fingerprint: blake3::hash(&bytes) })
    }

    /// Hash of the tokenizer's file.
    pub fn fingerprint(&self) -> blake3::Hash {
        self.fingerprint
    }

    /// Ids in use.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// A document's ids. The names of special tokens inside a document's own text are spelled out as text.
    pub fn encode(&self, body: &Body) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        match body {
            Body::Text(text) => {
                self.append_text(text, &mut ids)?;
                ids.push(self.end_of_text);
            }
            Body::Dialogue(turns) => {
                let spelled = |turn: &Turn| Turn { role: turn.role, content: break_specials(&turn.content) };
                let turns: Vec<Turn> = turns.iter().map(spelled).collect();
                for part in parts(&turns) {
                    self.append(&part, &mut ids)?;
                }
            }
        }
        Ok(ids)
    }

    fn append(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        let encoded = self.tokenizer.encode(text, false);
        ids.extend(encoded.map_err(|error| Error::Tokenizer { origin: "in use".into(), problem: error.to_string() })?);
        Ok(())
    }

    /// Running text, cut inside the name of a special token so that it is read as characters.
    fn append_text(&self, mut text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        while let Some(at) = next_special(text) {
            let (head, tail) = text.split_at(at + 1);
            self.append(head, ids)?;
            text = tail;
        }
        self.append(text, ids)
    }
}

/// Byte offset of the first special token's name (each begins with the one-byte `<`).
fn next_special(text: &str) -> Option<usize> {
    SPECIAL_TOKENS.iter().filter_map(|token| text.find(token)).min()
}

/// A space after the `<` of every special token's name: inside a template it cannot be cut apart.
fn break_specials(text: &str) -> String {
    SPECIAL_TOKENS.iter().fold(text.to_owned(), |text, token| text.replace(token, &format!("< {}", &token[1..])))
}
