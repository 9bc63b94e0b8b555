//! A call of a function, read while it is written: `{"name": …, "arguments": {…}}` and the mark that ends it.

/// Ends a call.
const MARK: &str = "</tool_call>";

/// How far a call has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It goes on.
    More,
    /// It is over; the text that follows.
    Done {
        /// Not part of it.
        rest: String,
    },
    /// It is no call, and nothing of it has been told; all of its text.
    NoCall {
        /// What came behind the opening mark.
        raw: String,
    },
}

/// Reads one call, byte by byte, so that its arguments can be passed on as they come.
#[derive(Clone, Debug, Default)]
pub struct CallReader {
    raw: String,
    at: usize,
    state: State,
    /// Where the current key or value began.
    start: usize,
    key: String,
    depth: usize,
    in_string: bool,
    escaped: bool,
    name: Option<String>,
    /// Where the arguments begin and, once known, end.
    arguments: Option<(usize, Option<usize>)>,
    /// It is a call, whatever comes.
    certain: bool,
    told: bool,
    /// Up to where the arguments have been passed on.
    sent: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before `{`.
    #[default]
    Before,
    /// A key, or `}` where there is none.
    Key {
        first: bool,
    },
    InKey,
    Colon,
    BeforeValue,
    Value,
    /// `,` or `}`.
    AfterValue,
    /// Before the mark.
    Close,
    /// Not what was expected, but the call has been told already: all up to the mark is passed over.
    Broken,
}

/// Why reading stops.
enum Stop {
    Wait,
    Done,
    Fault,
}

impl CallReader {
    /// Takes the next piece; returns how far the call has come, the function's name when it is certain, and the next piece of the arguments. A call is
    /// told when one of `functions` is named and its arguments have begun, or are left out.
    pub fn push(&mut self, text: &str, functions: &[String]) -> (Progress, Option<String>, String) {
        self.raw.push_str(text);
        let stop = self.read(functions);
        let mut name = None;
        if self.certain && !self.told {
            name.clone_from(&self.name);
            self.told = true;
        }
        let mut arguments = String::new();
        if self.told {
            match self.arguments {
                Some((start, end)) => {
                    let (from, to) = (self.sent.max(start), end.unwrap_or(self.at));
                    arguments.push_str(self.raw.get(from..to).unwrap_or_default());
                    self.sent = to;
                }
                // A function without arguments; nothing else is passed on for it.
                None if name.is_some() => arguments.push_str("{}"),
                None => {}
            }
        }
        let progress = match stop {
            Stop::Wait => Progress::More,
            Stop::Done => Progress::Done { rest: self.raw.split_off(self.at) },
            Stop::Fault => Progress::NoCall { raw: std::mem::take(&mut self.raw) },
        };
        (progress, name, arguments)
    }

    /// At the end of the turn: its text, if it has not been told.
    pub fn finish(self) -> Option<String> {
        (!self.told).then_some(self.raw)
    }

    fn read(&mut self, functions: &[String]) -> Stop {
        while let Some(&byte) = self.raw.as_bytes().get(self.at) {
            match self.state {
                State::Close => return self.close(),
                State::Broken => break,
                _ => {}
            }
            if self.step(byte, functions).is_none() {
                if !self.certain {
                    return Stop::Fault;
                }
                self.state = State::Broken;
            }
            self.certain |= self.name.is_some() && (self.arguments.is_some() || self.state == State::Close);
        }
        if self.state == State::Broken
            && let Some(length) = self.raw[self.at..].find(MARK)
        {
            self.at += length + MARK.len();
            return Stop::Done;
        }
        Stop::Wait
    }

    /// Blanks and the mark; a model may forget the mark, then what follows is text.
    fn close(&mut self) -> Stop {
        let rest = self.raw[self.at..].trim_start();
        if rest.starts_with(MARK) {
            self.at = self.raw.len() - rest.len() + MARK.len();
            return Stop::Done;
        }
        if MARK.starts_with(rest) { Stop::Wait } else { Stop::Done }
    }

    /// One byte; `None` if it cannot stand here.
    fn step(&mut self, byte: u8, functions: &[String]) -> Option<()> {
        let blank = matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        match (self.state, byte) {
            (State::InKey, _) => {
                if self.string_ends(byte) {
                    self.key = serde_json::from_str(&self.raw[self.start..=self.at]).ok()?;
                    self.state = State::Colon;
                }
            }
            (State::Value, _) => return self.value(byte, functions),
            (State::Before | State::Key { .. } | State::Colon | State::BeforeValue | State::AfterValue, _) if blank => {}
            (State::Before, b'{') => self.state = State::Key { first: true },
            (State::Key { .. }, b'"') => {
                self.start = self.at;
                (self.state, self.in_string) = (State::InKey, true);
            }
            (State::Key { first: true } | State::AfterValue, b'}') => {
                self.name.as_ref()?;
                self.state = State::Close;
            }
            (State::Colon, b':') => self.state = State::BeforeValue,
            (State::AfterValue, b',') => self.state = State::Key { first: false },
            (State::BeforeValue, _) if !matches!(byte, b',' | b'}' | b']') => {
                self.start = self.at;
                (self.state, self.depth, self.in_string) = (State::Value, 0, false);
                if self.is_arguments() {
                    if byte != b'{' || self.arguments.is_some() {
                        return None;
                    }
                    self.arguments = Some((self.at, None));
                }
                return self.value(byte, functions);
            }
            _ => return None,
        }
        self.at += 1;
        Some(())
    }

    /// Llama's models say `parameters`.
    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    /// One byte of a string; whether it ends it.
    fn string_ends(&mut self, byte: u8) -> bool {
        // The first is the quote that opens it.
        if self.at == self.start {
            return false;
        }
        let escaped = std::mem::take(&mut self.escaped);
        match byte {
            b'\\' if !escaped => self.escaped = true,
            b'"' if !escaped => self.in_string = false,
            _ => {}
        }
        !self.in_string
    }

    /// One byte of a value.
    fn value(&mut self, byte: u8, functions: &[String]) -> Option<()> {
        let mut end = None;
        if self.in_string {
            let escaped = std::mem::take(&mut self.escaped);
            match byte {
                b'\\' if !escaped => self.escaped = true,
                b'"' if !escaped => {
                    self.in_string = false;
                    end = (self.depth == 0).then_some(self.at + 1);
                }
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                // A number or a word ends where something else begins.
                b',' | b'}' | b']' if self.depth == 0 => end = Some(self.at),
                b'}' | b']' => {
                    self.depth -= 1;
                    end = (self.depth == 0).then_some(self.at + 1);
                }
                _ => {}
            }
        }
        match end {
            Some(end) => {
                self.at = end;
                self.state = State::AfterValue;
                self.ended(functions)
            }
            None => {
                self.at += 1;
                Some(())
            }
        }
    }

    fn ended(&mut self, functions: &[String]) -> Option<()> {
        if self.key == "name" {
            let name: String = serde_json::from_str(&self.raw[self.start..self.at]).ok()?;
            if self.name.is_some() || !functions.contains(&name) {
                return None;
            }
            self.name = Some(name);
        } else if let Some((start, end)) = &mut self.arguments
            && *start == self.start
        {
            *end = Some(self.at);
        }
        Some(())
    }
}
