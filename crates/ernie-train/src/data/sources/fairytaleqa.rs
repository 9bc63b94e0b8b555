//! FairytaleQA: tales by section, and questions about them.
use serde::Deserialize;
use std::path::Path;

use super::dialogue::dialogue;
use super::text::tidy_lines;
use super::{Document, Role, Turn, malformed};
use crate::data::Error;

#[derive(Deserialize)]
struct Section {
    text: String,
}

#[derive(Deserialize)]
struct Question {
    question: String,
    answer1: String,
}

/// A `…-story.csv` file's sections joined into one tale, or (with `template`) a `…-questions.csv` file's questions as
/// dialogues of four questions, so that turns follow each other. A tale and its questions share a split key.
pub(super) fn read(text: &str, path: &Path, template: bool) -> Result<Vec<Document>, Error> {
    let stem = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let stem = stem.trim_end_matches(".gz").trim_end_matches(".csv");
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let row_error = |error: csv::Error| {
        let line = error.position().map_or(0, csv::Position::line) as usize;
        malformed(path, line, error.to_string())
    };
    if let Some(tale) = stem.strip_suffix("-questions") {
        if !template {
            return Ok(Vec::new());
        }
        let mut pairs = Vec::new();
        for row in reader.deserialize::<Question>() {
            let row = row.map_err(row_error)?;
            let (question, answer) = (tidy_lines(&row.question), sentence(&row.answer1));
            if !question.is_empty() && !answer.is_empty() {
                pairs.push([Turn { role: Role::User, content: question }, Turn { role: Role::Assistant, content: answer }]);
            }
        }
        let document = |chunk: &[[Turn; 2]]| Document { split_key: Some(tale.to_owned()), ..dialogue(chunk.concat()) };
        return Ok(pairs.chunks(4).map(document).collect());
    }
    let Some(tale) = stem.strip_suffix("-story") else {
        return Err(malformed(path, 0, "expected a file name that ends in -story.csv or -questions.csv"));
    };
    let mut sections = Vec::new();
    for row in reader.deserialize::<Section>() {
        sections.push(unbreak(&row.map_err(row_error)?.text));
    }
    Ok(vec![Document { split_key: Some(tale.to_owned()), ..Document::text(sections.join("\n")) }])
}

/// Lines broken for print joined again: a line that does not end a sentence goes on in the next one.
fn unbreak(section: &str) -> String {
    let mut out = String::with_capacity(section.len());
    for line in section.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if !out.is_empty() {
            out.push(if out.ends_with(['.', '!', '?', '"', '”', '\'', '’', ':', '*']) { '\n' } else { ' ' });
        }
        out.push_str(line);
    }
    tidy_lines(&out)
}

/// An annotator's answer ("a brave warrior") as a sentence ("A brave warrior.").
fn sentence(answer: &str) -> String {
    let answer = tidy_lines(answer);
    let mut chars = answer.chars();
    let Some(first) = chars.next() else { return answer };
    let stop = if answer.ends_with(['.', '!', '?', '"', '”']) { "" } else { "." };
    format!("{}{}{stop}", first.to_uppercase(), chars.as_str())
}
