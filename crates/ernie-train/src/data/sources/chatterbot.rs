//! The ChatterBot corpus: YAML files of two keys, `categories` and `conversations`, the latter a list of lists of strings.
//!
//! A reader for exactly this shape (plain, quoted, folded and literal scalars) instead of a YAML library: the
//! common ones are unmaintained, and anchors, tags and typed scalars (`- 1963`, `- No`) would only be in the way.
use std::path::Path;

use super::dialogue::dialogue;
use super::{Document, Role, Turn, malformed};
use crate::data::Error;

/// Every conversation, the first line the user's, then in turn.
pub(super) fn read(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let mut conversations: Vec<Vec<String>> = Vec::new();
    for (_, opens, said) in scalars(text, path)? {
        match conversations.last_mut() {
            Some(conversation) if !opens => conversation.push(said),
            _ => conversations.push(vec![said]),
        }
    }
    let speakers = [Role::User, Role::Assistant];
    let turns = |lines: Vec<String>| {
        let turn = |(index, content): (usize, String)| Turn { role: speakers[index % 2], content };
        lines.into_iter().enumerate().map(turn).collect()
    };
    Ok(conversations.into_iter().map(|lines| dialogue(turns(lines))).collect())
}

/// The strings under `conversations`: (line, whether it opens a conversation, text).
fn scalars(text: &str, path: &Path) -> Result<Vec<(usize, bool, String)>, Error> {
    let mut items: Vec<(usize, bool, Vec<&str>)> = Vec::new();
    let mut section = "";
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let item = match line {
            "categories:" | "conversations:" => {
                section = line;
                continue;
            }
            _ if line.starts_with("- - ") => Some((true, &line[4..])),
            _ if line.starts_with("  - ") => Some((false, &line[4..])),
            "- -" | "  -" => Some((line == "- -", "")),
            // The published trivia.yml lacks the second dash of one conversation.
            _ if section == "conversations:" && line.starts_with("- ") => Some((true, &line[2..])),
            _ => None,
        };
        match (section, item) {
            ("categories:", _) if line.trim().is_empty() || line.starts_with("- ") || line.starts_with("  - ") => {}
            ("conversations:", Some((opens, first))) => items.push((number, opens, vec![first])),
            ("conversations:", None) if line.trim().is_empty() || line.starts_with("    ") => match items.last_mut() {
                Some((_, _, lines)) => lines.push(line.strip_prefix("    ").unwrap_or("")),
                None if line.trim().is_empty() => {}
                None => return Err(malformed(path, number, "text before the first `- - ` item")),
            },
            (_, _) if line.trim().is_empty() || line.starts_with('#') || line == "---" => {}
            _ => {
                return Err(malformed(
                    path,
                    number,
                    format!("expected `categories:`, `conversations:`, `- - text` or `  - text`, found `{line}`"),
                ));
            }
        }
    }
    if section != "conversations:" {
        return Err(malformed(path, 0, "expected a `conversations:` key"));
    }
    items
        .into_iter()
        .map(|(number, opens, lines)| Ok((number, opens, scalar(&lines).map_err(|problem| malformed(path, number, problem))?)))
        .collect()
}

/// One scalar from its lines (the first without its dash, the others without their indent).
fn scalar(lines: &[&str]) -> Result<String, String> {
    let first = lines[0].trim();
    match first {
        "|" | "|-" | "|+" => return Ok(lines[1..].join("\n").trim_end().to_owned()),
        ">" | ">-" | ">+" => return Ok(fold(&lines[1..])),
        _ => {}
    }
    let text = fold(lines);
    match text.chars().next() {
        Some('\'') => {
            let inner = text.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')).ok_or("a single quote is not closed")?;
            Ok(inner.replace("''", "'"))
        }
        Some('"') => {
            let inner = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).ok_or("a double quote is not closed")?;
            let mut out = String::with_capacity(inner.len());
            let mut chars = inner.chars();
            while let Some(c) = chars.next() {
                match (c, if c == '\\' { chars.next() } else { None }) {
                    ('\\', Some('n')) => out.push('\n'),
                    ('\\', Some('t')) => out.push('\t'),
                    ('\\', Some(escaped @ ('"' | '\\' | '/' | ' '))) => out.push(escaped),
                    ('\\', other) => return Err(format!("unknown escape `\\{}`", other.map_or(String::new(), String::from))),
                    (plain, _) => out.push(plain),
                }
            }
            Ok(out)
        }
        Some('&' | '!' | '{' | '[') => {
            Err(format!("`{text}`: anchors, tags and nested collections are not part of this format; quote the text"))
        }
        _ => Ok(text),
    }
}

/// YAML line folding: single line ends become spaces, blank lines become line ends.
fn fold(lines: &[&str]) -> String {
    let mut out = String::new();
    for line in lines.iter().map(|line| line.trim()) {
        if line.is_empty() {
            out.push('\n');
        } else {
            if !out.is_empty() && !out.ends_with('\n') {
                out.push(' ');
            }
            out.push_str(line);
        }
    }
    out.trim().to_owned()
}
