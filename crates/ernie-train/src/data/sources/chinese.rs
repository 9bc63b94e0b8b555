//! Chinese classics and verse (chinese-poetry's JSON) and two-part sayings.
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

use super::{Document, malformed};
use crate::data::Error;

pub(super) fn json(text: &str, path: &Path) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|error| malformed(path, error.line(), error.to_string()))
}

/// Every poem, chapter or essay of a chinese-poetry file: a document of "title, author, lines". The folders name things
/// differently (`paragraphs`, `para`, `content`, `comment`, `desc`; `title`, `rhythmic`, `chapter`, `section`, `type`),
/// and nest up to three levels. Notes, abstracts and ids are left out.
pub(super) fn poetry(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let value = json(text, path)?;
    let mut documents = Vec::new();
    let items = match &value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(_) => vec![&value],
        _ => return Err(malformed(path, 1, "expected a JSON list or object")),
    };
    for (index, item) in items.into_iter().enumerate() {
        walk(item, &mut documents).map_err(|problem| malformed(path, 0, format!("item {}: {problem}", index + 1)))?;
    }
    Ok(documents)
}

fn walk(item: &Value, documents: &mut Vec<Document>) -> Result<(), String> {
    let object = item.as_object().ok_or("expected an object")?;
    let field = |names: &[&str]| names.iter().find_map(|name| object.get(*name)?.as_str()).map(str::trim).filter(|s| !s.is_empty());
    let body = ["paragraphs", "para", "content", "desc"]
        .iter()
        .find_map(|name| object.get(*name))
        .ok_or("expected one of `paragraphs`, `para`, `content`, `desc`")?;
    let lines = match body {
        Value::String(text) => vec![text.as_str()],
        Value::Array(parts) if parts.iter().all(Value::is_string) => parts.iter().filter_map(Value::as_str).collect(),
        Value::Array(parts) => {
            for part in parts {
                walk(part, documents)?;
            }
            return Ok(());
        }
        _ => return Err("expected text or a list under the body's key".into()),
    };
    let mut out: Vec<String> = Vec::new();
    let rhythm = field(&["rhythmic"]);
    match (field(&["title", "chapter", "name"]), rhythm) {
        (Some(title), _) if object.contains_key("section") => out.push(format!("{}·{title}", field(&["section"]).unwrap_or_default())),
        (Some(title), _) => out.push(title.to_owned()),
        (None, Some(rhythm)) => out.push(rhythm.to_owned()),
        (None, None) => out.extend(field(&["subchapter", "type"]).map(str::to_owned)),
    }
    if let Some(author) = field(&["author"])
        && author.chars().count() <= 12
    {
        out.push(author.to_owned());
    }
    out.extend(lines.iter().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()));
    match object.get("comment") {
        Some(Value::String(comment)) => out.push(comment.clone()),
        Some(Value::Array(comments)) => out.extend(comments.iter().filter_map(Value::as_str).map(str::to_owned)),
        _ => {}
    }
    documents.push(Document::text(out.join("\n")));
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saying {
    riddle: String,
    answer: String,
}

/// Two-part sayings, "riddle——answer" a line, twelve lines a document: alone they are too short to pack.
pub(super) fn xiehouyu(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let sayings: Vec<Saying> = serde_json::from_str(text).map_err(|error| malformed(path, error.line(), error.to_string()))?;
    let lines: Vec<String> = sayings.iter().map(|saying| format!("{}——{}", saying.riddle.trim(), saying.answer.trim())).collect();
    Ok(lines.chunks(12).map(|chunk| Document::text(chunk.join("\n"))).collect())
}
