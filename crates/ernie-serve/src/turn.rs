//! What an assistant's turn consists of: its thoughts, its text, its calls of functions. Models write all of it as one text with marks; here it is taken
//! apart as it comes, the same way however it is cut.
use crate::call::{CallReader, Progress};

/// The marks that models set, in text or as single tokens.
pub const MARKERS: [&str; 6] = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"];

/// Begins a call.
const OPEN: &str = "<tool_call>";

/// A piece of a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The next piece of the thoughts.
    Reasoning(String),
    /// The next piece of the text.
    Content(String),
    /// A call begins.
    Call {
        /// Its number in the turn.
        index: usize,
        /// What is called.
        name: String,
    },
    /// The next piece of a call's arguments, JSON.
    Arguments {
        /// The call's number.
        index: usize,
        /// The piece.
        text: String,
    },
}

/// What is looked for in a turn.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Thoughts; whether the prompt has them begun already.
    pub thoughts: Option<bool>,
    /// Calls of these functions.
    pub functions: Option<Vec<String>>,
    /// Nothing but calls can come: a mark that is cut off at the end is no text.
    pub only_calls: bool,
}

/// Takes a turn apart.
#[derive(Clone, Debug)]
pub struct TurnReader {
    thoughts: Thoughts,
    calls: Option<Calls>,
}

impl TurnReader {
    /// For a turn that begins.
    pub fn new(reading: &Reading) -> Self {
        let state = reading.thoughts.map_or(State::Content, |open| State::Start { open });
        let calls = reading.functions.clone().map(|functions| Calls::new(functions, reading.only_calls));
        TurnReader { thoughts: Thoughts { state, held: String::new() }, calls }
    }

    /// The pieces that are certain now that more text has come.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for piece in self.thoughts.push(text) {
            self.sort(piece, &mut pieces);
        }
        joined(pieces)
    }

    /// The pieces that were held back.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for piece in self.thoughts.finish() {
            self.sort(piece, &mut pieces);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut pieces);
        }
        joined(pieces)
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.calls.as_ref().map_or(0, |calls| calls.count)
    }

    fn sort(&mut self, piece: Piece, pieces: &mut Vec<Piece>) {
        match (piece, &mut self.calls) {
            (Piece::Content(text), Some(calls)) => calls.push(&text, pieces),
            (piece, _) => pieces.push(piece),
        }
    }
}

/// Without empty pieces, and neighbours of a kind as one.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (&piece, out.last_mut()) {
            (Piece::Reasoning(text) | Piece::Content(text) | Piece::Arguments { text, .. }, _) if text.is_empty() => {}
            (Piece::Reasoning(more), Some(Piece::Reasoning(text))) | (Piece::Content(more), Some(Piece::Content(text))) => {
                text.push_str(more)
            }
            (Piece::Arguments { index, text: more }, Some(Piece::Arguments { index: same, text })) if index == same => text.push_str(more),
            _ => out.push(piece),
        }
    }
    out
}

/// Where in `held` to look for `mark`: its place, or how much of the end to keep back because the mark, or blanks before it, may have begun.
enum Found {
    At(usize),
    Keep(usize),
}

fn find(held: &str, mark: &str, blank: fn(char) -> bool) -> Found {
    if let Some(at) = held.find(mark) {
        return Found::At(at);
    }
    let begun = (1..mark.len()).rev().find(|length| held.ends_with(&mark[..*length])).unwrap_or(0);
    let before = held[..held.len() - begun].trim_end_matches(blank).len();
    Found::Keep(held.len() - before)
}

fn is_newline(character: char) -> bool {
    character == '\n'
}

/// The family's thoughts: `<think>…</think>`, where the prompt may have written the first mark; then the text, which some models wrap in
/// `<response>…</response>`. Line breaks around the marks belong to them.
#[derive(Clone, Debug)]
struct Thoughts {
    state: State,
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing has come that says whether there are thoughts.
    Start { open: bool },
    /// Before the first word of the thoughts, or within them.
    Thinking { begun: bool },
    /// Between the thoughts and the text.
    Between,
    /// In `<response>`.
    Response { begun: bool },
    /// Everything is text.
    Content,
}

impl Thoughts {
    fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while !self.held.is_empty() {
            let (state, length) = (self.state, self.held.len());
            self.step(&mut pieces);
            if (state, length) == (self.state, self.held.len()) {
                break;
            }
        }
        pieces
    }

    /// One change of state, or as much text as is certain.
    fn step(&mut self, pieces: &mut Vec<Piece>) {
        let trimmed = |held: &str| held.trim_start_matches(is_newline).to_owned();
        match self.state {
            State::Start { open } => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix("<think>") {
                    (self.held, self.state) = (rest.to_owned(), State::Thinking { begun: false });
                } else if !"<think>".starts_with(begun) {
                    self.state = if open { State::Thinking { begun: false } } else { State::Content };
                }
            }
            State::Thinking { begun: false } | State::Response { begun: false } => {
                self.held = trimmed(&self.held);
                if !self.held.is_empty() {
                    self.state = if matches!(self.state, State::Thinking { .. }) {
                        State::Thinking { begun: true }
                    } else {
                        State::Response { begun: true }
                    };
                }
            }
            State::Thinking { begun: true } => self.until("</think>", Piece::Reasoning, pieces),
            State::Response { begun: true } => self.until("</response>", Piece::Content, pieces),
            State::Between => {
                let rest = trimmed(&self.held);
                if let Some(rest) = rest.strip_prefix("<response>") {
                    (self.held, self.state) = (rest.to_owned(), State::Response { begun: false });
                } else if !"<response>".starts_with(&rest) {
                    (self.held, self.state) = (rest, State::Content);
                }
            }
            State::Content => pieces.push(Piece::Content(std::mem::take(&mut self.held))),
        }
    }

    fn until(&mut self, mark: &str, kind: fn(String) -> Piece, pieces: &mut Vec<Piece>) {
        match find(&self.held, mark, is_newline) {
            Found::At(at) => {
                pieces.push(kind(self.held[..at].trim_end_matches(is_newline).to_owned()));
                (self.held, self.state) = (self.held[at + mark.len()..].to_owned(), State::Between);
            }
            Found::Keep(length) => {
                let rest = self.held.split_off(self.held.len() - length);
                pieces.push(kind(std::mem::replace(&mut self.held, rest)));
            }
        }
    }

    fn finish(&mut self) -> Vec<Piece> {
        let held = std::mem::take(&mut self.held);
        let kind = match self.state {
            State::Start { open: true } | State::Thinking { .. } => Piece::Reasoning,
            _ => Piece::Content,
        };
        let rest = match self.state {
            State::Between => held.trim_start_matches(is_newline),
            State::Thinking { .. } | State::Response { .. } => held.trim_end_matches(is_newline),
            _ => &held,
        };
        vec![kind(rest.to_owned())]
    }
}

/// Text with calls in it: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Blanks around calls belong to them. What has the marks but is no call of
/// one of the functions is text.
#[derive(Clone, Debug)]
struct Calls {
    functions: Vec<String>,
    only_calls: bool,
    held: String,
    /// Blanks before the call that is being read.
    gap: String,
    /// Nothing but blanks has come since the last call.
    after: bool,
    count: usize,
    call: Option<CallReader>,
}

impl Calls {
    fn new(functions: Vec<String>, only_calls: bool) -> Self {
        Calls { functions, only_calls, held: String::new(), gap: String::new(), after: false, count: 0, call: None }
    }

    fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let mut text = text.to_owned();
        loop {
            let Some(call) = &mut self.call else {
                self.held.push_str(&text);
                let Some(rest) = self.text(pieces) else { return };
                (text, self.call) = (rest, Some(CallReader::default()));
                continue;
            };
            let (progress, started, arguments) = call.push(&text, &self.functions);
            if let Some(name) = started {
                pieces.push(Piece::Call { index: self.count, name });
                self.count += 1;
            }
            pieces.push(Piece::Arguments { index: self.count.saturating_sub(1), text: arguments });
            match progress {
                Progress::More => return,
                Progress::Done { rest } => (text, self.call, self.after) = (rest, None, true),
                Progress::NoCall { raw } => {
                    pieces.push(Piece::Content(std::mem::take(&mut self.gap) + OPEN));
                    (text, self.call, self.after) = (raw, None, false);
                }
            }
        }
    }

    /// Text up to the next call; what follows its mark.
    fn text(&mut self, pieces: &mut Vec<Piece>) -> Option<String> {
        if self.after {
            self.held = self.held.trim_start().to_owned();
        }
        let (certain, rest) = match find(&self.held, OPEN, char::is_whitespace) {
            Found::At(at) => {
                let text = self.held[..at].trim_end();
                self.gap = self.held[text.len()..at].to_owned();
                (text.to_owned(), Some(self.held[at + OPEN.len()..].to_owned()))
            }
            Found::Keep(length) => (self.held[..self.held.len() - length].to_owned(), None),
        };
        self.held = if rest.is_some() { String::new() } else { self.held.split_off(certain.len()) };
        self.after &= certain.is_empty();
        pieces.push(Piece::Content(certain));
        rest
    }

    fn finish(&mut self, pieces: &mut Vec<Piece>) {
        if self.only_calls {
            return;
        }
        let held = std::mem::take(&mut self.held);
        pieces.push(Piece::Content(if self.after { held.trim_start().to_owned() } else { held }));
        if let Some(raw) = self.call.take().and_then(CallReader::finish) {
            pieces.push(Piece::Content(std::mem::take(&mut self.gap) + OPEN + &raw));
        }
    }
}

#[cfg(test)]
mod tests;
