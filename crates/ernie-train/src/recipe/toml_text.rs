//! From TOML text to a typed value, with errors that name the line and the nearest valid key.
use std::path::Path;

use super::Error;

/// Reads TOML; `origin` names it in errors. Unknown keys are refused with the nearest valid one.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(text: &str, origin: &Path) -> Result<T, Error> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text.as_bytes()[..start].iter().filter(|&&b| b == b'\n').count() + 1;
        let message = error.message().to_owned();
        let hint = nearest_key(&message).map_or(String::new(), |key| format!(" (did you mean `{key}`?)"));
        Error::Parse { path: origin.into(), line, message, hint }
    })
}

/// The valid key nearest to the one that serde names in "unknown field `x`, expected one of `a`, `b`" (or "unknown variant").
fn nearest_key(message: &str) -> Option<&str> {
    if !message.starts_with("unknown ") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let wrong = quoted.next()?;
    let (distance, key) = quoted.map(|key| (edit_distance(wrong, key), key)).min_by_key(|(distance, _)| *distance)?;
    (distance <= wrong.chars().count().max(3) / 2 + 1).then_some(key)
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
