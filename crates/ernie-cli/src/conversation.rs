//! A conversation: its messages, what of them still fits into the context window, and its file form.
use anyhow::Context;
use ernie_checkpoint::Message;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Messages so far. Old turns that no longer fit are left out of the prompt, but stay in what is saved.
#[derive(Debug, Default)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
    /// Turns before this one are no longer shown to the model.
    first_shown: usize,
}

/// A prompt that fits.
#[derive(Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Messages newly left out to make it fit.
    pub newly_dropped: usize,
}

impl Conversation {
    /// An empty one.
    pub fn new(system: Option<String>) -> Self {
        Self { system: system.filter(|text| !text.is_empty()), ..Self::default() }
    }

    /// The system message.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Replaces the system message; an empty text removes it.
    pub fn set_system(&mut self, text: &str) {
        self.system = Some(text.to_owned()).filter(|text| !text.is_empty());
    }

    /// Forgets all turns, keeping the system message.
    pub fn clear(&mut self) {
        self.turns.clear();
        self.first_shown = 0;
    }

    /// Adds a user's message.
    pub fn push_user(&mut self, text: &str) {
        self.turns.push(Message::new("user", text));
    }

    /// Adds an answer.
    pub fn push_assistant(&mut self, text: &str) {
        self.turns.push(Message::new("assistant", text));
    }

    /// Takes back the last message, which could not be answered.
    pub fn pop(&mut self) {
        self.turns.pop();
        self.first_shown = self.first_shown.min(self.turns.len());
    }

    /// The prompt for the next answer, with at most `room` tokens: the oldest turns are left out until it fits, a question always with its
    /// answer. `encode` gives the ids of messages.
    ///
    /// # Errors
    /// If the last message alone, with the system message, does not fit.
    pub fn prompt(&mut self, room: usize, encode: impl Fn(&[Message]) -> anyhow::Result<Vec<u32>>) -> anyhow::Result<Prompt> {
        let mut first = self.first_shown;
        loop {
            let ids = encode(&self.messages(first))?;
            if ids.len() <= room {
                let newly_dropped = first - self.first_shown;
                self.first_shown = first;
                return Ok(Prompt { ids, newly_dropped });
            }
            match self.turns.iter().skip(first + 1).position(|turn| turn.role == "user") {
                Some(next) => first += next + 1,
                None => anyhow::bail!(
                    "the message takes {} tokens with the system message, and there is room for {room}; shorten it, or lower --max-tokens",
                    ids.len()
                ),
            }
        }
    }

    /// The system message and the turns from `first` on.
    fn messages(&self, first: usize) -> Vec<Message> {
        let system = self.system.as_deref().map(|text| Message::new("system", text));
        system.into_iter().chain(self.turns[first..].iter().cloned()).collect()
    }

    /// Writes `{"model": …, "messages": [{"role": …, "content": …}, …]}`, whole or not at all. Returns the number of messages.
    pub fn save(&self, file: &Path, model: &str) -> anyhow::Result<usize> {
        let messages: Vec<_> = self.messages(0).iter().map(|message| json!({"role": message.role, "content": message.content})).collect();
        let mut text = serde_json::to_string_pretty(&json!({"model": model, "messages": messages}))?;
        text.push('\n');
        let file = replaceable(file).context("the conversation is not saved")?;
        ernie_checkpoint::atomic_write(&file, text.as_bytes()).context("the conversation is not saved")?;
        Ok(messages.len())
    }
}

/// The file that may be written under this name: a new one, or a conversation saved earlier. Anything else (a text, a device, a folder) is
/// refused, for writing replaces it; a link is followed, so that it stays a link.
fn replaceable(file: &Path) -> anyhow::Result<PathBuf> {
    let Ok(metadata) = std::fs::metadata(file) else { return Ok(file.to_path_buf()) };
    let saved_by_us = || {
        let text = std::fs::read_to_string(file).ok()?;
        serde_json::from_str::<serde_json::Value>(&text).ok()?.get("messages")?.as_array().map(|_| ())
    };
    if !metadata.is_file() || saved_by_us().is_none() {
        anyhow::bail!("{} is there already and is not a saved conversation; choose another name", file.display());
    }
    file.canonicalize().with_context(|| format!("cannot follow {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saving_replaces_conversations_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let conversation = Conversation::new(Some("S".into()));
        for _ in 0..2 {
            assert_eq!(conversation.save(&path("talk.json"), "model").unwrap(), 1);
        }
        std::fs::write(path("notes.txt"), "precious").unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        for name in ["notes.txt", "folder"] {
            let error = format!("{:#}", conversation.save(&path(name), "model").unwrap_err());
            assert!(error.contains(name) && error.contains("choose another name"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(path("notes.txt")).unwrap(), "precious");
    }

    /// One id per byte, and one more per message.
    fn encode(messages: &[Message]) -> anyhow::Result<Vec<u32>> {
        Ok(messages.iter().flat_map(|m| m.content.bytes().map(u32::from).chain([0])).collect())
    }

    fn text(prompt: &Prompt) -> String {
        prompt.ids.iter().map(|&id| if id == 0 { '|' } else { char::from_u32(id).unwrap() }).collect()
    }

    #[test]
    fn oldest_turns_go_first_and_in_pairs() {
        let mut conversation = Conversation::new(Some("S".into()));
        conversation.push_user("aaaa");
        conversation.push_assistant("bbbb");
        conversation.push_user("cc");
        conversation.push_assistant("dd");
        conversation.push_user("ee");
        let all = conversation.prompt(100, encode).unwrap();
        assert_eq!((text(&all).as_str(), all.newly_dropped), ("S|aaaa|bbbb|cc|dd|ee|", 0));
        let fitted = conversation.prompt(12, encode).unwrap();
        assert_eq!((text(&fitted).as_str(), fitted.newly_dropped), ("S|cc|dd|ee|", 2));
        // What was left out stays out, so that the prompt grows at its end only.
        let again = conversation.prompt(100, encode).unwrap();
        assert_eq!((text(&again).as_str(), again.newly_dropped), ("S|cc|dd|ee|", 0));
    }

    #[test]
    fn a_message_too_long_alone_is_refused_and_changes_nothing() {
        let mut conversation = Conversation::new(None);
        conversation.push_user("aa");
        conversation.push_assistant("bb");
        conversation.push_user("cccccccccc");
        let error = conversation.prompt(8, encode).unwrap_err().to_string();
        assert!(error.contains("11 tokens") && error.contains("room for 8"), "{error}");
        conversation.pop();
        conversation.push_user("c");
        assert_eq!(text(&conversation.prompt(8, encode).unwrap()), "aa|bb|c|");
    }

    #[test]
    fn clearing_keeps_the_system_message() {
        let mut conversation = Conversation::new(Some("S".into()));
        conversation.push_user("a");
        conversation.clear();
        conversation.push_user("b");
        assert_eq!(text(&conversation.prompt(8, encode).unwrap()), "S|b|");
        conversation.set_system("");
        assert_eq!(conversation.system(), None);
    }
}
