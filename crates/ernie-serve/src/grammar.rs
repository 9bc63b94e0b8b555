//! Grammars over the tokenizer's tokens: JSON schemas, regular expressions, choices and Lark grammars become constraints for the engine.
//!
//! The grammars and their automata are those of the `llguidance` crate; here it learns what each token's bytes are. Special tokens are no text, so no
//! grammar can produce them except one that names them.
use std::sync::Arc;

use ernie_checkpoint::{TokenBytes, Tokenizer};
use ernie_engine::{Constraint, TokenSet};
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie, TokenId};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Longer tokens are never produced under a grammar: the trie of the tokens has no room for them.
const MAX_TOKEN_BYTES: usize = 500;
/// Longer grammars are refused before they are parsed.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Longer regular expressions too: preparing one can take time by the square of its length.
const MAX_REGEX_BYTES: usize = 8 << 10;
/// Lines of a grammar, each at most one rule: a chain of rules is followed by calls within calls.
const MAX_LINES: usize = 4000;
/// For those calls. Only what is used of it takes memory.
const STACK_BYTES: usize = 128 << 20;
/// Brackets within brackets: parsers of grammars call themselves for each.
const MAX_NESTING: usize = 100;
/// Between the parts of a JSON text, if the schema does not say: nothing, one space or one line break. A model that has nothing to say writes as many as
/// it may, and has no tokens left for the rest.
const WHITESPACE: &str = r"[\x20\x0A]";

/// What a text must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// A JSON value that obeys a schema.
    Json(Value),
    /// A text that a regular expression describes as a whole.
    Regex(String),
    /// One of some texts.
    Choice(Vec<String>),
    /// What a grammar in Lark's notation, as llguidance has it, derives from `start`.
    Lark(String),
}

/// Calls of functions, in the form that the family's models write them.
#[derive(Clone, Debug, PartialEq)]
pub struct Calls {
    /// Names, each with the schema of its arguments.
    pub functions: Vec<(String, Value)>,
    /// More than one call.
    pub several: bool,
}

/// What an answer must look like.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Form {
    /// Its text.
    pub rule: Option<Rule>,
    /// Calls: instead of the text if there is a rule for that, else in any case.
    pub calls: Option<Calls>,
    /// Thoughts come first, up to `</think>`.
    pub thinks: bool,
}

/// Makes constraints. One for each server: it knows the tokens.
pub struct Grammars {
    factory: ParserFactory,
    /// Of the markers in [`crate::turn`], those that are single special tokens.
    special: Vec<&'static str>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// For a tokenizer, of whose ids the first `vocab` are the model's. `ends`: the tokens that end a text.
    ///
    /// # Errors
    /// The tokens cannot be arranged.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, ends: &[u32]) -> Result<Self> {
        let words = words(tokenizer, vocab.min(tokenizer.vocab_size()));
        let ends: Vec<TokenId> = ends.iter().copied().filter(|id| (*id as usize) < words.len()).collect();
        let end = ends.first().copied().unwrap_or(llguidance::toktrie::INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        let special = crate::turn::MARKERS.into_iter().filter(|marker| trie.get_special_token(marker).is_some()).collect();
        let environment: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| Error::Grammars { reason: error.to_string() })?;
        factory.quiet();
        // Errors would repeat the grammar and the answer.
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(Grammars { factory, special })
    }

    /// The constraint for a form; `None` if anything will do.
    ///
    /// # Errors
    /// What is wrong with the rule, for people.
    pub fn compile(&self, form: &Form) -> std::result::Result<Option<GrammarConstraint>, String> {
        let Some(grammar) = self.grammar(form)? else { return Ok(None) };
        let compile = || {
            let parser = self.factory.create_parser(grammar).map_err(|error| shortened(&error.to_string()))?;
            let mut matcher = Matcher::new(Ok(parser));
            // What can never begin is found out now, not when the answer is due.
            matcher.compute_mask_or_eos().map_err(|_| "nothing matches it".to_owned())?;
            Ok(Some(GrammarConstraint { matcher }))
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES).spawn_scoped(scope, compile);
            match thread.map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok(constraint)) => constraint,
                Ok(Err(_)) => Err("it is more than can be prepared".to_owned()),
                Err(error) => Err(format!("it cannot be prepared now: {error}")),
            }
        })
    }

    fn grammar(&self, form: &Form) -> std::result::Result<Option<TopLevelGrammar>, String> {
        let mut grammars = Vec::new();
        let mut add = |name: String, grammar: GrammarWithLexer| grammars.push(GrammarWithLexer { name: Some(name), ..grammar });
        let mut alternatives = Vec::new();
        if let Some(rule) = &form.rule {
            add("answer".to_owned(), rule.grammar()?);
            alternatives.push("@answer".to_owned());
        }
        if let Some(Calls { functions, several }) = &form.calls {
            let [open, close] = ["<tool_call>", "</tool_call>"].map(|marker| self.marker(marker));
            let mut bodies = Vec::new();
            for (index, (name, schema)) in functions.iter().enumerate() {
                let head = Value::String(format!("{{\"name\": {}, \"arguments\": ", Value::String(name.clone())));
                bodies.push(format!("{head} @arguments_{index} \"}}\""));
                add(format!("arguments_{index}"), Rule::Json(schema.clone()).grammar()?);
            }
            let call = format!("{open} \"\\n\" ({}) \"\\n\" {close}", bodies.join(" | "));
            alternatives.push(if *several { format!("{call} (\"\\n\" {call})*") } else { call });
        }
        if alternatives.is_empty() {
            return Ok(None);
        }
        let mut top = format!("start: {} ({})\n", if form.thinks { "thoughts" } else { "" }, alternatives.join(" | "));
        if form.thinks {
            top += &match self.special.contains(&"</think>") {
                true => "thoughts: /(?s:.*)/ </think> /\\n{0,3}/\n".to_owned(),
                false => "thoughts: thinking /\\n{0,3}/\nthinking[suffix=\"</think>\"]: /(?s:.*)/\n".to_owned(),
            };
        }
        grammars.insert(0, GrammarWithLexer { name: Some("top".to_owned()), ..GrammarWithLexer::from_lark(top) });
        Ok(Some(TopLevelGrammar { grammars, max_tokens: None }))
    }

    /// A marker as a grammar names it: a special token, or text.
    fn marker(&self, marker: &str) -> String {
        if self.special.contains(&marker) { marker.to_owned() } else { Value::from(marker).to_string() }
    }
}

impl Rule {
    fn grammar(&self) -> std::result::Result<GrammarWithLexer, String> {
        let bounded = |source: &str, most: usize| {
            if source.len() > most {
                return Err(format!("expected at most {most} bytes, got {}", source.len()));
            }
            match nesting(source) {
                depth if depth > MAX_NESTING => Err(format!("expected brackets at most {MAX_NESTING} deep, got {depth}")),
                _ => Ok(()),
            }
        };
        match self {
            Rule::Json(schema) => {
                let mut schema = schema.clone();
                let Some(fields) = schema.as_object_mut() else { return Err(format!("expected a schema, an object, got {schema}")) };
                fields.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": WHITESPACE }));
                let length = schema.to_string().len();
                if length > MAX_SOURCE_BYTES {
                    return Err(format!("expected at most {MAX_SOURCE_BYTES} bytes, got {length}"));
                }
                Ok(GrammarWithLexer::from_json_schema(schema))
            }
            Rule::Regex(regex) => bounded(regex, MAX_REGEX_BYTES).map(|()| GrammarWithLexer::from_regex(regex)),
            Rule::Choice(texts) => {
                let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                // One terminal: an automaton that they share.
                let source = format!("start: CHOICE\nCHOICE: {}", quoted.join(" | "));
                match source.len() > MAX_SOURCE_BYTES {
                    true => Err(format!("expected at most {MAX_SOURCE_BYTES} bytes, got {}", source.len())),
                    false => Ok(GrammarWithLexer::from_lark(source)),
                }
            }
            Rule::Lark(source) if source.lines().count() > MAX_LINES => {
                Err(format!("expected at most {MAX_LINES} lines, got {}", source.lines().count()))
            }
            Rule::Lark(source) => bounded(source, MAX_SOURCE_BYTES).map(|()| GrammarWithLexer::from_lark(source.clone())),
        }
    }
}

/// How deep brackets stand within brackets, those that are text included.
fn nesting(source: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// The bytes of each token: none for what no text is made of. Of tokens with the same bytes one is left, a piece of text rather than a single byte: it
/// is what the tokenizer makes of that text, and so what the model has learned.
fn words(tokenizer: &Tokenizer, vocab: usize) -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = Vec::with_capacity(vocab);
    let mut first = std::collections::HashMap::new();
    let is_byte = |id: u32| tokenizer.id_to_piece(id).is_some_and(|piece| piece.starts_with("<0x"));
    for id in 0..vocab as u32 {
        let bytes = match tokenizer.token_bytes(id) {
            Some(TokenBytes::Text(bytes)) => bytes,
            Some(TokenBytes::Special(name)) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
            None => Vec::new(),
        };
        // No text begins with the byte that marks special tokens.
        let unusable = bytes.len() > MAX_TOKEN_BYTES || bytes == [TokTrie::SPECIAL_TOKEN_MARKER];
        let mut bytes = if unusable { Vec::new() } else { bytes };
        if let Some(&other) = first.get(&bytes).filter(|_| !bytes.is_empty()) {
            match is_byte(other) {
                true => words[other as usize].clear(),
                false => bytes.clear(),
            }
        }
        if !bytes.is_empty() {
            first.insert(bytes.clone(), id);
        }
        words.push(bytes);
    }
    words
}

/// The first lines of an error that may quote a whole grammar.
fn shortened(error: &str) -> String {
    const MOST: usize = 600;
    match error.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &error[..end]),
        None => error.to_owned(),
    }
}

/// A grammar and how far a text has come in it. Copies share what is computed on demand and go on on their own.
#[derive(Clone)]
pub struct GrammarConstraint {
    matcher: Matcher,
}

impl std::fmt::Debug for GrammarConstraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarConstraint").finish_non_exhaustive()
    }
}

impl Constraint for GrammarConstraint {
    fn allow(&mut self, allowed: &mut TokenSet) -> std::result::Result<(), String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| shortened(&error.to_string()))?;
        allowed.insert_words(mask.as_slice());
        Ok(())
    }

    fn accept(&mut self, token: u32) -> std::result::Result<(), String> {
        self.matcher.consume_token(token).map_err(|error| shortened(&error.to_string()))
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}
