//! Running text: books, picture books, stories, plays, articles.
use std::path::Path;

use super::{Document, malformed};
use crate::data::Error;

/// Trailing spaces cut, runs of spaces and tabs made one space, more than one blank line made one, no-break spaces made spaces.
pub(super) fn tidy_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut blank = 0;
    for line in text.lines() {
        let words = line.split([' ', '\t', '\u{a0}']).filter(|word| !word.is_empty());
        let before = out.len();
        for (index, word) in words.enumerate() {
            if index == 0 {
                if before > 0 {
                    out.push_str(if blank > 0 { "\n\n" } else { "\n" });
                }
            } else {
                out.push(' ');
            }
            out.push_str(word);
        }
        blank = if out.len() == before { blank + 1 } else { 0 };
    }
    out
}

/// Lines that were broken for print joined again: every paragraph (between blank lines) becomes one line.
fn unwrap_paragraphs(text: &str) -> String {
    let mut paragraphs: Vec<String> = Vec::new();
    let mut open = false;
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() {
            open = false;
        } else if open && let Some(last) = paragraphs.last_mut() {
            last.push(' ');
            last.push_str(line);
        } else {
            paragraphs.push(line.to_owned());
            open = true;
        }
    }
    tidy_lines(&paragraphs.join("\n"))
}

/// A Markdown heading's text: `## Chapter 1 ##` gives "Chapter 1".
fn heading(line: &str) -> Option<&str> {
    let text = line.strip_prefix('#')?.trim_start_matches('#');
    Some(text.trim().trim_end_matches('#').trim())
}

/// Emphasis marks removed: `*`, and `_` where it opens or closes a word.
fn plain(line: &str) -> String {
    let chars: Vec<char> = line.chars().collect();
    let is_word = |index: Option<usize>| index.and_then(|i| chars.get(i)).is_some_and(|c| c.is_alphanumeric());
    let keep = |(index, c): (usize, &char)| match c {
        '*' => None,
        '_' if !(is_word(index.checked_sub(1)) && is_word(Some(index + 1))) => None,
        c => Some(*c),
    };
    chars.iter().enumerate().filter_map(keep).collect()
}

/// A book: one document per chapter, "heading, then text", without the title page (`# Title:`, `## Author:`, `## Year:`)
/// and rules. Paragraphs stay whole, a line each.
pub(super) fn markdown_book(text: &str) -> Vec<Document> {
    let mut chapters: Vec<(String, String)> = vec![(String::new(), String::new())];
    for line in text.lines() {
        let is_rule = line.len() >= 3 && line.chars().all(|c| matches!(c, '-' | '*' | '_' | ' '));
        if let Some(title) = heading(line) {
            let on_title_page = ["Title:", "Author:", "Year:"].iter().any(|field| title.starts_with(field));
            if !on_title_page {
                chapters.push((plain(title), String::new()));
            }
        } else if !is_rule && let Some((_, body)) = chapters.last_mut() {
            body.push_str(&plain(line));
            body.push('\n');
        }
    }
    let document = |(title, body): (String, String)| {
        let body = unwrap_paragraphs(&body);
        if body.is_empty() {
            return None; // a part's heading, directly followed by its first chapter's
        }
        Some(Document::text(if title.is_empty() { body } else { format!("{title}\n{body}") }))
    };
    chapters.into_iter().filter_map(document).collect()
}

/// A picture book: `# Title`, pages between `##` lines, and a last page of `* License:` lines, which is required and cut.
pub(super) fn storybook(text: &str, path: &Path) -> Result<Vec<Document>, Error> {
    let first = text.lines().position(|line| !line.trim().is_empty()).unwrap_or(0);
    let title = text.lines().nth(first).and_then(|line| line.strip_prefix("# ")).map(str::trim);
    let Some(title) = title else {
        return Err(malformed(path, first + 1, "expected `# Title`"));
    };
    let mut pages = vec![String::new()];
    let mut licence_seen = false;
    for line in text.lines().skip(first + 1) {
        if line.trim() == "##" {
            pages.push(String::new());
        } else if line.starts_with("* License:") {
            licence_seen = true;
            break;
        } else if let Some(page) = pages.last_mut() {
            page.push_str(&plain(heading(line).unwrap_or(line)));
            page.push('\n');
        }
    }
    if !licence_seen {
        return Err(malformed(path, 0, "expected a last page with a `* License:` line, which tells the text from its credits"));
    }
    let pages: Vec<String> = pages.iter().map(|page| unwrap_paragraphs(page)).filter(|page| !page.is_empty()).collect();
    Ok(vec![Document::text(if pages.is_empty() { String::new() } else { format!("{title}\n{}", pages.join("\n")) })])
}

/// Stories between `<|endoftext|>` marks. The last one counts only when a mark follows it: excerpts end mid-sentence.
pub(super) fn separated(text: &str) -> Vec<Document> {
    const MARK: &str = "<|endoftext|>";
    let complete = text.rfind(MARK).map_or(text, |end| &text[..end]);
    complete.split(MARK).map(|story| Document::text(tidy_lines(story))).collect()
}

/// A play as documents of about 2 KiB, cut only between speeches.
pub(super) fn play(text: &str) -> Vec<Document> {
    const SIZE: usize = 2048;
    let mut documents = Vec::new();
    let mut current = String::new();
    for speech in text.split("\n\n") {
        if current.len() >= SIZE {
            documents.push(Document::text(tidy_lines(&current)));
            current.clear();
        }
        current.push_str(speech);
        current.push_str("\n\n");
    }
    documents.push(Document::text(tidy_lines(&current)));
    documents
}

/// Articles of WikiText, punctuation joined to its words again. Sentences with an `<unk>` are left out: the model
/// would learn to say it.
pub(super) fn wikitext(text: &str) -> Vec<Document> {
    let mut articles: Vec<String> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let level = line.split(' ').take_while(|word| *word == "=").count();
        if level > 0 && line.ends_with('=') {
            let title = line.trim_matches(|c| c == '=' || c == ' ');
            if level == 1 {
                articles.push(String::new());
            }
            if let Some(article) = articles.last_mut()
                && !title.contains("<unk>")
            {
                article.push_str(&join_punctuation(title));
                article.push('\n');
            }
        } else if let Some(article) = articles.last_mut() {
            let sentences: Vec<&str> =
                line.split_inclusive(" . ").map(str::trim).filter(|s| !s.is_empty() && !s.contains("<unk>")).collect();
            if !sentences.is_empty() {
                article.push_str(&join_punctuation(&sentences.join(" ")));
                article.push('\n');
            }
        }
    }
    articles.into_iter().map(|article| Document::text(tidy_lines(&article))).collect()
}

/// WikiText's spaced tokens as they were written: `1 @,@ 500` → `1,500`, `( a )` → `(a)`, `" a "` → `"a"`.
fn join_punctuation(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut glue = true; // no space before the next word
    let mut quote_open = false;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let joins_both = match word {
            "@-@" => Some("-"),
            "@,@" => Some(","),
            "@.@" => Some("."),
            _ => None,
        };
        if let Some(mark) = joins_both {
            out.push_str(mark);
            glue = true;
            continue;
        }
        let closes =
            matches!(word, "," | "." | ";" | ":" | "!" | "?" | ")" | "]" | "'s" | "'" | "%" | "n't") || (word == "\"" && quote_open);
        if !glue && !closes {
            out.push(' ');
        }
        out.push_str(word);
        glue = matches!(word, "(" | "[" | "$" | "£") || (word == "\"" && !quote_open);
        if word == "\"" {
            quote_open = !quote_open;
        }
    }
    out
}

/// One article; `Name-ele.txt`, `Name-int.txt` and `Name-adv.txt` share a split key.
pub(super) fn onestopenglish(text: &str, path: &Path) -> Vec<Document> {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default();
    let article = stem.rsplit_once('-').map_or(stem.as_str(), |(article, _)| article).trim().to_owned();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !["elementary", "intermediate", "advanced"].contains(&line.to_lowercase().as_str()))
        .collect();
    vec![Document { split_key: Some(article), ..Document::text(tidy_lines(&lines.join("\n"))) }]
}
