//! Readers: each turns files of one public format into documents. A row that does not fit its format is an error
//! with file and line, never skipped in silence.
mod chatterbot;
mod chinese;
mod dialogue;
mod fairytaleqa;
mod files;
mod medquad;
mod request;
mod text;

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

pub use files::{find_files, matches_pattern, read_text};

use super::Error;
use crate::recipe::Source;

/// Changes when what is read or how it is rendered and cut changes, so that cached shards are made again.
pub const READERS_VERSION: u32 = 3;

/// How the files of a source are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One document per .txt or .md file.
    Text,
    /// Books in Markdown: a document per chapter, heading marks removed.
    MarkdownBook,
    /// African Storybook and StoryWeaver: pages between `##` lines, licence at the end cut off.
    Storybook,
    /// Stories with `<|endoftext|>` lines between them.
    Separated,
    /// Plays: blank-line separated speeches, grouped into documents of about 2 KiB.
    Play,
    /// WikiText: ` = Title = ` lines, spaced punctuation, `<unk>` for rare words.
    Wikitext,
    /// OneStopEnglish: one article per file; the three reading levels of an article stay on one side of the split.
    Onestopenglish,
    /// FairytaleQA: `section-stories/**.csv` (section,text); with `template` also `questions/**.csv` as dialogues.
    Fairytaleqa,
    /// chinese-poetry JSON, all of its folders' shapes.
    ChinesePoetry,
    /// Two-part sayings: JSON list of {riddle, answer}.
    Xiehouyu,
    /// KdConv: JSON list of {messages: [{message}]}, speakers alternating.
    Kdconv,
    /// JSON lines of {id, turns: [[role, text]]}: CrossWOZ (usr, sys), Taskmaster-4 (user, assistant).
    TurnsJsonl,
    /// ChatterBot corpus: YAML of {categories, conversations}.
    Chatterbot,
    /// MedQuAD: JSON lines of {focus, question, answer}; answers alone, or with `template` as dialogues.
    Medquad,
    /// JSON lines of {text}.
    TextJsonl,
    /// JSON lines of {messages: [{role, content}]}.
    MessagesJsonl,
}

impl Format {
    /// Whether `template` may be set: the format's text can be put as dialogues.
    pub fn has_template(self) -> bool {
        self.has_requests() || matches!(self, Self::Fairytaleqa | Self::Medquad) || self.is_dialogue()
    }

    /// Whether its documents can be put as answers to requests.
    fn has_requests(self) -> bool {
        matches!(self, Self::Separated | Self::Storybook | Self::ChinesePoetry | Self::Xiehouyu)
    }

    fn is_dialogue(self) -> bool {
        matches!(self, Self::Kdconv | Self::TurnsJsonl | Self::Chatterbot | Self::MessagesJsonl)
    }

    /// Extensions (before an optional .gz) looked for when a path is a folder.
    fn extensions(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["txt", "md"],
            Self::MarkdownBook | Self::Storybook => &["md"],
            Self::Separated | Self::Play | Self::Wikitext | Self::Onestopenglish => &["txt"],
            Self::Fairytaleqa => &["csv"],
            Self::ChinesePoetry | Self::Xiehouyu | Self::Kdconv => &["json"],
            Self::TurnsJsonl | Self::Medquad | Self::TextJsonl | Self::MessagesJsonl => &["jsonl"],
            Self::Chatterbot => &["yml", "yaml"],
        }
    }
}

/// Who speaks in a dialogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions before the first turn.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a dialogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// A document's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Running text.
    Text(String),
    /// Turns that alternate and end with the assistant's; see [`alternate`].
    Dialogue(Vec<Turn>),
}

/// One document: the unit of packing, and of the split between training and validation.
#[derive(Debug, Clone)]
pub struct Document {
    /// The contents.
    pub body: Body,
    /// Documents with one key go to the same side of the split (a tale and the questions about it).
    pub split_key: Option<String>,
}

impl Document {
    /// A text document that is split by its own contents.
    pub fn text(text: impl Into<String>) -> Self {
        Self { body: Body::Text(text.into()), split_key: None }
    }
}

/// One file of a source.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its path under the data root, with `/` between parts.
    pub relative: String,
}

/// Reads one file of `source` into documents, in the file's order. Empty documents are left out.
pub fn read_file(source: &Source, file: &SourceFile) -> Result<Vec<Document>, Error> {
    let text = read_text(&file.path)?;
    let path = file.path.as_path();
    let mut documents = match source.format {
        Format::Text => vec![Document::text(text::tidy_lines(&text))],
        Format::MarkdownBook => text::markdown_book(&text),
        Format::Storybook => text::storybook(&text, path)?,
        Format::Separated => text::separated(&text),
        Format::Play => text::play(&text),
        Format::Wikitext => text::wikitext(&text),
        Format::Onestopenglish => text::onestopenglish(&text, path),
        Format::Fairytaleqa => fairytaleqa::read(&text, path, source.template)?,
        Format::ChinesePoetry => chinese::poetry(&text, path)?,
        Format::Xiehouyu => chinese::xiehouyu(&text, path)?,
        Format::Kdconv => dialogue::kdconv(&text, path)?,
        Format::TurnsJsonl => dialogue::turns_jsonl(&text, path)?,
        Format::Chatterbot => chatterbot::read(&text, path)?,
        Format::Medquad => medquad::read(&text, path, source.template)?,
        Format::TextJsonl => dialogue::text_jsonl(&text, path)?,
        Format::MessagesJsonl => dialogue::messages_jsonl(&text, path)?,
    };
    documents.retain(|document| match &document.body {
        Body::Text(text) => !text.trim().is_empty(),
        Body::Dialogue(turns) => turns.len() >= 2,
    });
    if source.template && source.format.has_requests() {
        documents = documents.iter().filter_map(|document| request::request(source.format, document)).collect();
    }
    Ok(documents)
}

/// Makes turns fit the chat template: an optional system turn, then user and assistant in turn, the assistant last.
/// Consecutive turns of one speaker become one turn of several lines; leading assistant turns, trailing user turns and
/// empty turns are dropped.
pub fn alternate(turns: Vec<Turn>) -> Vec<Turn> {
    let mut out: Vec<Turn> = Vec::with_capacity(turns.len());
    for turn in turns {
        let content = turn.content.trim();
        if content.is_empty() || (turn.role == Role::Assistant && out.iter().all(|earlier| earlier.role == Role::System)) {
            continue;
        }
        match out.last_mut() {
            Some(last) if last.role == turn.role => {
                last.content.push('\n');
                last.content.push_str(content);
            }
            _ => out.push(Turn { role: turn.role, content: content.to_owned() }),
        }
    }
    while out.last().is_some_and(|last| last.role != Role::Assistant) {
        out.pop();
    }
    out
}

/// An error about a file's contents; `line` is one-based, 0 when the file as a whole is meant.
pub(crate) fn malformed(path: &Path, line: usize, problem: impl Into<String>) -> Error {
    Error::Malformed { path: path.to_path_buf(), line, problem: problem.into() }
}

#[cfg(test)]
mod tests;
