//! What a model is asked for a summary with: a template around a document, the document cut to what the context has room for.
use ernie_checkpoint::Tokenizer;

use crate::bleu::is_han;
use crate::examples::Example;
use crate::summarise::SummariseError;

const DOCUMENT: &str = "{document}";
const QUERY: &str = "{query}";

/// A template that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The document has no place, or more than one.
    #[error("the template has {{document}} {count} times; write it once, where the document is to stand")]
    Document {
        /// How often it stands there.
        count: usize,
    },
    /// Examples have questions, and the template no place for them, or the other way round.
    #[error("{}", match expected {
        true => "the template has no {query}; write it where the question about the document is to stand",
        false => "the template has {query}, and these examples have no questions; leave it out",
    })]
    Query {
        /// Whether the examples have questions.
        expected: bool,
    },
}

/// Text with the places `{document}` and, for examples with questions, `{query}`. What a document says in braces stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTemplate {
    before: String,
    after: String,
}

/// A prompt that leaves room for its summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Whether the end of the document had to be left out.
    pub cut: bool,
}

impl PromptTemplate {
    /// The template where none is given: the document, the question if there is one, and `TL;DR:`, after which models that were trained on the web
    /// summarise (Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019, section 3.6).
    pub fn default_text(queries: bool) -> &'static str {
        if queries { "{document}\n\nQuestion: {query}\nTL;DR:" } else { "{document}\nTL;DR:" }
    }

    /// Reads a template for examples with or without questions.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn new(text: &str, queries: bool) -> Result<Self, TemplateError> {
        let count = text.matches(DOCUMENT).count();
        let (before, after) = match text.split_once(DOCUMENT) {
            Some((before, after)) if count == 1 => (before.to_owned(), after.to_owned()),
            _ => return Err(TemplateError::Document { count }),
        };
        if text.contains(QUERY) != queries {
            return Err(TemplateError::Query { expected: queries });
        }
        Ok(PromptTemplate { before, after })
    }

    /// The prompt of at most `room` tokens with as much of the document as fits, from its beginning, in whole words. The whole text is tokenised together,
    /// as `ernie generate` does, with the tokens that the tokenizer puts around a text.
    ///
    /// # Errors
    /// [`SummariseError::NoRoom`] if nothing of the document fits; a text that cannot be tokenised.
    pub fn prompt(&self, tokenizer: &Tokenizer, example: &Example, room: usize) -> Result<Prompt, SummariseError> {
        let around = |part: &str| part.replace(QUERY, example.query.as_deref().unwrap_or_default());
        let (before, after) = (around(&self.before), around(&self.after));
        let document = &*example.document;
        let with = |end: usize| -> Result<Prompt, SummariseError> {
            let text = format!("{before}{}{after}", beginning(document, end));
            Ok(Prompt { ids: tokenizer.encode(&text, true)?, text, cut: end < document.len() })
        };
        let mut best = with(0)?;
        if best.ids.len() >= room {
            return Err(SummariseError::NoRoom { id: example.id.clone(), room, needed: best.ids.len() + 1 });
        }
        // Long documents are tokenised only as far as they may fit.
        let (mut low, mut high) = (0, document.floor_char_boundary(room.saturating_mul(8)));
        loop {
            let prompt = with(high)?;
            if prompt.ids.len() > room {
                break;
            }
            if high == document.len() {
                return Ok(prompt);
            }
            (best, low, high) = (prompt, high, document.floor_char_boundary(high.saturating_mul(2)));
        }
        // `low` fits and `high` does not, until nothing is between them.
        loop {
            let middle = document.floor_char_boundary(usize::midpoint(low, high));
            // Inside a character of several bytes the middle may fall back on `low`.
            let middle = if middle > low { middle } else { document.ceil_char_boundary(low + 1) };
            if middle >= high {
                break;
            }
            let prompt = with(middle)?;
            if prompt.ids.len() > room {
                high = middle;
            } else {
                (best, low) = (prompt, middle);
            }
        }
        if beginning(document, low).trim().is_empty() {
            return Err(SummariseError::NoRoom { id: example.id.clone(), room, needed: room + 1 });
        }
        Ok(best)
    }
}

/// The document up to `end`, a character's boundary, without the word that the cut goes through, unless that is all there is.
fn beginning(document: &str, end: usize) -> &str {
    let letter = |c: char| c.is_alphanumeric() && !is_han(c);
    let (text, rest) = document.split_at(end);
    if !rest.starts_with(letter) {
        return text;
    }
    match text.trim_end_matches(letter) {
        "" => text,
        whole => whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_its_places_once() {
        for text in [PromptTemplate::default_text(true), "{query}? {query}! {document}"] {
            PromptTemplate::new(text, true).unwrap();
            assert_eq!(PromptTemplate::new(text, false), Err(TemplateError::Query { expected: false }));
        }
        assert_eq!(PromptTemplate::new(PromptTemplate::default_text(false), true), Err(TemplateError::Query { expected: true }));
        assert_eq!(PromptTemplate::new("TL;DR:", false), Err(TemplateError::Document { count: 0 }));
        assert_eq!(PromptTemplate::new("{document}{document}", false), Err(TemplateError::Document { count: 2 }));
    }

    #[test]
    fn words_are_kept_whole_and_chinese_is_cut_between_characters() {
        assert_eq!(beginning("one two", 5), "one ");
        assert_eq!(beginning("one two", 3), "one");
        assert_eq!(beginning("one two", 7), "one two");
        assert_eq!(beginning("one", 2), "on");
        assert_eq!(beginning("今天天气", 6), "今天");
        assert_eq!(beginning("今天été", 8), "今天");
    }
}
