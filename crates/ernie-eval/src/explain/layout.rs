//! Where tokens stand: columns as wide as their text, in stripes as wide as the picture.
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Longer tokens are cut.
const LONGEST: usize = 16;
/// Columns between tokens.
const GAP: usize = 1;

/// One token's place.
#[derive(Debug, PartialEq)]
pub(super) struct Column {
    /// Index of the token in the text.
    pub token: usize,
    /// Its first column, counted from the beginning of the stripe.
    pub start: usize,
    /// Its width in columns, at least that of `text`.
    pub width: usize,
    /// The token as it is shown.
    pub text: String,
}

/// The tokens of a text in stripes of at most `width` columns (a stripe has one token in any case), each token at least `least` wide.
pub(super) fn stripes(pieces: &[String], least: usize, width: usize) -> Vec<Vec<Column>> {
    let mut stripes: Vec<Vec<Column>> = Vec::new();
    let mut end = 0;
    for (token, piece) in pieces.iter().enumerate() {
        let text = cut(&shown(piece), LONGEST);
        let own = text.width().max(least);
        if stripes.is_empty() || end + GAP + own > width {
            stripes.push(Vec::new());
        }
        let stripe = stripes.last_mut().expect("one was just made");
        let start = if stripe.is_empty() { 0 } else { end + GAP };
        end = start + own;
        stripe.push(Column { token, start, width: own, text });
    }
    stripes
}

/// A piece without what would move the cursor or not be seen: spaces are dots, control characters are escaped.
fn shown(piece: &str) -> String {
    let mut out = String::new();
    for char in piece.chars() {
        match char {
            ' ' => out.push('·'),
            '"' | '\'' | '\\' => out.push(char),
            _ => out.extend(char.escape_debug()),
        }
    }
    out
}

/// The beginning of a text that is wider than `most` columns, and a mark that it is.
fn cut(text: &str, most: usize) -> String {
    if text.width() <= most {
        return text.to_owned();
    }
    let (mut out, mut width) = (String::new(), 0);
    for char in text.chars() {
        width += char.width().unwrap_or(0);
        if width > most - 1 {
            break;
        }
        out.push(char);
    }
    out + "…"
}

/// A text with spaces up to `width` columns.
pub(super) fn padded(text: &str, width: usize) -> String {
    let missing = width.saturating_sub(text.width());
    format!("{text}{:missing$}", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_shown_without_what_would_break_the_picture() {
        assert_eq!(shown(" a\n\u{1b}[31m"), "·a\\n\\u{1b}[31m");
        assert_eq!(shown("it's \"x\" \\ 从"), "it's·\"x\"·\\·从");
        assert_eq!(cut("从前有一只小兔子", 7), "从前有…");
        assert_eq!(cut("abcdefg", 7), "abcdefg");
        assert_eq!(padded("从", 4), "从  ");
    }

    #[test]
    fn stripes_hold_what_fits_and_one_token_in_any_case() {
        let pieces = ["Once", " upon", "从前", "a", "abcdefghijklmnopqrstuvwxyz"].map(str::to_owned);
        let places = |width| -> Vec<Vec<(usize, usize, usize)>> {
            let stripes = stripes(&pieces, 2, width);
            stripes.iter().map(|stripe| stripe.iter().map(|c| (c.token, c.start, c.width)).collect()).collect()
        };
        assert_eq!(places(12), [vec![(0, 0, 4), (1, 5, 5)], vec![(2, 0, 4), (3, 5, 2)], vec![(4, 0, 16)]]);
        assert_eq!(places(100), [vec![(0, 0, 4), (1, 5, 5), (2, 11, 4), (3, 16, 2), (4, 19, 16)]]);
        assert_eq!(places(1).len(), 5);
        assert!(stripes(&[], 2, 12).is_empty());
    }
}
