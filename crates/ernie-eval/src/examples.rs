//! Documents with summaries that people wrote of them, read from the layouts in which public collections come.
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A collection could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ExamplesError {
    /// The system's reason, or bytes that are not UTF-8 or no gzip.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A folder without the file that its layout has.
    #[error("{}: expected a file {expected} or {expected}.gz in this folder; give the file itself", dir.display())]
    NoFile {
        /// The folder.
        dir: PathBuf,
        /// Name of the file.
        expected: &'static str,
    },
    /// A line that is not of the layout.
    #[error("{}, line {line}: {reason}; is the file of the form `{format}`?", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What was expected.
        reason: String,
        /// The form that was asked for.
        format: &'static str,
    },
    /// Nothing to summarise.
    #[error("{}: the file has no examples", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// The layout of a collection: JSON, one object a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExampleFormat {
    /// QMSum, questions about meetings (Zhong et al., arXiv 2104.05938): a meeting a line with `meeting_transcripts`, `general_query_list` and
    /// `specific_query_list`. Each question is an example, the general ones first. The document is a line `speaker: words` for each turn, without the
    /// marks of the transcription (`{vocalsound}`).
    Qmsum,
    /// SciTLDR, one sentence on a paper (Cachola et al., arXiv 2004.15011): `source`, sentences that make up the document, and `target`, one summary or
    /// more.
    Scitldr,
    /// Papers with their abstracts, from the articles of CRAFT: the document is `title` and `body`, the summary `abstract`.
    Craft,
    /// `{"document": "…", "summary": ["…", …]}`; a single summary may stand without brackets. `id` names the example.
    Jsonl,
}

impl ExampleFormat {
    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            ExampleFormat::Qmsum => "qmsum",
            ExampleFormat::Scitldr => "scitldr",
            ExampleFormat::Craft => "craft",
            ExampleFormat::Jsonl => "jsonl",
        }
    }

    /// Whether each example has a question.
    pub fn has_queries(self) -> bool {
        self == ExampleFormat::Qmsum
    }

    /// The file that is read if a folder is given: of a collection in parts the test part.
    fn file_name(self) -> &'static str {
        match self {
            ExampleFormat::Craft => "craft_articles.jsonl",
            ExampleFormat::Qmsum | ExampleFormat::Scitldr | ExampleFormat::Jsonl => "test.jsonl",
        }
    }
}

/// A document and what people made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Its name in the collection; where that has none, the number of its line.
    pub id: String,
    /// What is to be summarised.
    pub document: Arc<str>,
    /// What the summary is to answer.
    pub query: Option<String>,
    /// Summaries, at least one, none empty.
    pub references: Vec<String>,
}

/// The first `limit` examples of a file, gzipped if its name ends in `.gz`, or of a folder: then of its file `test.jsonl` (`craft_articles.jsonl`) or the same
/// with `.gz`.
///
/// # Errors
/// [`ExamplesError`], with file and line; also for an example whose document or summaries are empty.
pub fn read_examples(path: &Path, format: ExampleFormat, limit: usize) -> Result<Vec<Example>, ExamplesError> {
    let path = if path.is_dir() { file_in(path, format.file_name())? } else { path.to_path_buf() };
    let refuse = |source| ExamplesError::Io { path: path.clone(), source };
    let file = File::open(&path).map_err(refuse)?;
    let gzipped = path.extension().is_some_and(|extension| extension == "gz");
    let bytes: Box<dyn Read> = if gzipped { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut examples = Vec::new();
    for (line, text) in (1..).zip(BufReader::new(bytes).lines()) {
        let text = text.map_err(refuse)?;
        if text.trim().is_empty() {
            continue;
        }
        let refuse = |reason| ExamplesError::Line { path: path.clone(), line, reason, format: format.as_str() };
        let first = examples.len();
        read_line(&text, format, line, &mut examples).map_err(refuse)?;
        for example in &examples[first..] {
            let texts = example.references.iter().chain(&example.query).map(String::as_str).chain([&*example.document]);
            if example.references.is_empty() || texts.into_iter().any(|text| text.trim().is_empty()) {
                return Err(refuse(format!("{}: the document, its question or a summary is empty", example.id)));
            }
        }
        if examples.len() >= limit {
            examples.truncate(limit);
            break;
        }
    }
    if examples.is_empty() { Err(ExamplesError::Empty { path }) } else { Ok(examples) }
}

fn file_in(dir: &Path, name: &'static str) -> Result<PathBuf, ExamplesError> {
    let candidates = [dir.join(name), dir.join(format!("{name}.gz"))];
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| ExamplesError::NoFile { dir: dir.to_path_buf(), expected: name })
}

#[derive(Deserialize)]
struct Meeting {
    meeting_id: Option<String>,
    meeting_transcripts: Vec<Turn>,
    general_query_list: Vec<Question>,
    specific_query_list: Vec<Question>,
}

#[derive(Deserialize)]
struct Turn {
    speaker: String,
    content: String,
}

#[derive(Deserialize)]
struct Question {
    query: String,
    answer: String,
}

#[derive(Deserialize)]
struct Tldr {
    paper_id: Option<String>,
    source: Vec<String>,
    target: Summaries,
}

#[derive(Deserialize)]
struct Article {
    pmc_file: Option<String>,
    title: String,
    #[serde(rename = "abstract")]
    summary: String,
    body: String,
}

#[derive(Deserialize)]
struct Plain {
    id: Option<String>,
    document: String,
    summary: Summaries,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Summaries {
    One(String),
    Several(Vec<String>),
}

impl Summaries {
    fn into_vec(self) -> Vec<String> {
        match self {
            Summaries::One(text) => vec![text],
            Summaries::Several(texts) => texts,
        }
    }
}

/// The examples of one line; the error is the reason.
fn read_line(text: &str, format: ExampleFormat, line: usize, examples: &mut Vec<Example>) -> Result<(), String> {
    let name = |id: Option<String>| id.unwrap_or_else(|| line.to_string());
    let mut add = |id, document: String, references| examples.push(Example { id, document: document.into(), query: None, references });
    match format {
        ExampleFormat::Qmsum => {
            let meeting: Meeting = parse(text)?;
            let (document, id): (Arc<str>, _) = (transcript(&meeting.meeting_transcripts).into(), name(meeting.meeting_id));
            let questions = meeting.general_query_list.into_iter().chain(meeting.specific_query_list);
            examples.extend((1..).zip(questions).map(|(number, Question { query, answer })| Example {
                id: format!("{id}/{number}"),
                document: Arc::clone(&document),
                query: Some(query.trim().to_owned()),
                references: vec![answer],
            }));
        }
        ExampleFormat::Scitldr => {
            let Tldr { paper_id, source, target } = parse(text)?;
            let sentences: Vec<&str> = source.iter().map(|sentence| sentence.trim()).collect();
            add(name(paper_id), sentences.join(" "), target.into_vec());
        }
        ExampleFormat::Craft => {
            let Article { pmc_file, title, summary, body } = parse(text)?;
            // A title alone is no document.
            let document = if body.trim().is_empty() { body } else { format!("{title}\n\n{body}") };
            add(name(pmc_file), document, vec![summary]);
        }
        ExampleFormat::Jsonl => {
            let Plain { id, document, summary } = parse(text)?;
            add(name(id), document, summary.into_vec());
        }
    }
    Ok(())
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| {
        // The parser's line is always the first one; the caller names the line of the file.
        let message = error.to_string();
        let reason = message.rsplit_once(" at line ").map_or(message.as_str(), |(reason, _)| reason);
        format!("{reason} (column {})", error.column())
    })
}

/// A line for each turn in which something is said.
fn transcript(turns: &[Turn]) -> String {
    let mark = |word: &str| {
        let inside = word.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        inside.is_some_and(|inside| !inside.is_empty() && inside.bytes().all(|byte| byte.is_ascii_lowercase()))
    };
    let mut text = String::new();
    for Turn { speaker, content } in turns {
        let words: Vec<&str> = content.split_whitespace().filter(|word| !mark(word)).collect();
        if !words.is_empty() {
            text.push_str(&format!("{speaker}: {}\n", words.join(" ")));
        }
    }
    text
}
