//! Dialogues in JSON, and the two generic JSON-lines formats.
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::Path;

use super::{Body, Document, Role, Turn, alternate, malformed};
use crate::data::Error;

/// Each line with its number.
pub(super) fn rows<T: DeserializeOwned>(text: &str, path: &Path) -> Result<Vec<(usize, T)>, Error> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(index, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(row) => Ok((index + 1, row)),
        Err(error) => Err(malformed(path, index + 1, error.to_string())),
    };
    numbered.map(parse).collect()
}

fn role(name: &str) -> Option<Role> {
    match name {
        "system" => Some(Role::System),
        "user" | "usr" | "human" => Some(Role::User),
        "assistant" | "sys" | "gpt" => Some(Role::Assistant),
        _ => None,
    }
}

pub(super) fn dialogue(turns: Vec<Turn>) -> Document {
    Document { body: Body::Dialogue(alternate(turns)), split_key: None }
}

#[derive(Deserialize)]
struct KdMessage {
    message: String,
}

#[derive(Deserialize)]
struct KdDialogue {
    messages: Vec<KdMessage>,
}

/// KdConv: two speakers alternate, the first is the user.
pub(super) fn kdconv(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let dialogues: Vec<KdDialogue> = serde_json::from_str(text).map_err(|error| malformed(path, error.line(), error.to_string()))?;
    let speakers = [Role::User, Role::Assistant];
    let turns = |dialogue: KdDialogue| {
        let turn = |(index, said): (usize, KdMessage)| Turn { role: speakers[index % 2], content: said.message };
        dialogue.messages.into_iter().enumerate().map(turn).collect()
    };
    Ok(dialogues.into_iter().map(|said| dialogue(turns(said))).collect())
}

#[derive(Deserialize)]
struct TurnsRow {
    turns: Vec<(String, String)>,
}

/// JSON lines of {turns: [[role, text], …]}.
pub(super) fn turns_jsonl(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let mut documents = Vec::new();
    for (line, row) in rows::<TurnsRow>(text, path)? {
        documents.push(dialogue(named_turns(row.turns, path, line)?));
    }
    Ok(documents)
}

fn named_turns(named: Vec<(String, String)>, path: &Path, line: usize) -> Result<Vec<Turn>, Error> {
    let turn = |(name, content): (String, String)| match role(&name) {
        Some(role) => Ok(Turn { role, content }),
        None => Err(malformed(path, line, format!("unknown role `{name}`; expected system, user or assistant"))),
    };
    named.into_iter().map(turn).collect()
}

#[derive(Deserialize)]
struct TextRow {
    text: String,
}

/// JSON lines of {text}; other keys are allowed.
pub(super) fn text_jsonl(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    Ok(rows::<TextRow>(text, path)?.into_iter().map(|(_, row)| Document::text(row.text)).collect())
}

#[derive(Deserialize)]
struct MessageRow {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct MessagesRow {
    messages: Vec<MessageRow>,
}

/// JSON lines of {messages: [{role, content}]}; other keys are allowed.
pub(super) fn messages_jsonl(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let mut documents = Vec::new();
    for (line, row) in rows::<MessagesRow>(text, path)? {
        let named = row.messages.into_iter().map(|message| (message.role, message.content)).collect();
        documents.push(dialogue(named_turns(named, path, line)?));
    }
    Ok(documents)
}
