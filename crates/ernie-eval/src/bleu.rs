//! Corpus BLEU up to four-grams as `sacrebleu` computes it by default: exponential smoothing, the closest reference's length (Papineni et al., *BLEU*,
//! ACL 2002; Post, *A Call for Clarity in Reporting BLEU Scores*, arXiv 1804.08771).
use std::collections::HashMap;

/// How text is cut into words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Tokenize {
    /// `13a`, that of the mteval script: for languages that put spaces between words.
    #[default]
    Mteval13a,
    /// `zh`: every Chinese character for itself, the rest as `13a` cuts it.
    Chinese,
}

/// A corpus score and what it is made of.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Bleu {
    /// The score, 0 to 100.
    pub score: f64,
    /// Share of matching n-grams for n = 1 to 4, in percent, smoothed.
    pub precisions: [f64; 4],
    /// Factor for predictions shorter than the references.
    pub brevity_penalty: f64,
    /// Words of the predictions.
    pub predicted: usize,
    /// Words of the references, for each prediction those of the one closest in length.
    pub reference: usize,
}

/// BLEU of predictions with one or more references each.
pub fn bleu<'a, R: AsRef<[&'a str]>>(pairs: impl IntoIterator<Item = (&'a str, R)>, tokenize: Tokenize) -> Bleu {
    let (mut correct, mut total, mut predicted, mut reference) = ([0usize; 4], [0usize; 4], 0, 0);
    for (prediction, references) in pairs {
        let words = tokens(prediction, tokenize);
        let references: Vec<Vec<String>> = references.as_ref().iter().map(|text| tokens(text, tokenize)).collect();
        predicted += words.len();
        // Of two as close the shorter one.
        reference += references.iter().map(Vec::len).min_by_key(|&len| (len.abs_diff(words.len()), len)).unwrap_or(0);
        for n in 1..=4 {
            let mut most: HashMap<&[String], usize> = HashMap::new();
            for reference in &references {
                for (ngram, count) in counts(reference, n) {
                    let most = most.entry(ngram).or_default();
                    *most = count.max(*most);
                }
            }
            for (ngram, count) in counts(&words, n) {
                correct[n - 1] += count.min(most.get(ngram).copied().unwrap_or(0));
                total[n - 1] += count;
            }
        }
    }
    finish(correct, total, predicted, reference)
}

fn finish(correct: [usize; 4], total: [usize; 4], predicted: usize, reference: usize) -> Bleu {
    let brevity_penalty = match (predicted, reference) {
        (0, _) => 0.0,
        (predicted, reference) if predicted < reference => (1.0 - reference as f64 / predicted as f64).exp(),
        _ => 1.0,
    };
    let (mut precisions, mut smooth) = ([0.0; 4], 1.0);
    let nothing = correct.iter().all(|&count| count == 0);
    for n in 0..4 {
        // Nothing is smoothed where there is nothing at all.
        if total[n] == 0 || nothing {
            break;
        }
        precisions[n] = if correct[n] == 0 {
            smooth *= 2.0;
            100.0 / (smooth * total[n] as f64)
        } else {
            100.0 * correct[n] as f64 / total[n] as f64
        };
    }
    let score =
        if precisions.contains(&0.0) { 0.0 } else { brevity_penalty * (precisions.iter().map(|p| p.ln()).sum::<f64>() / 4.0).exp() };
    Bleu { score, precisions, brevity_penalty, predicted, reference }
}

fn counts(words: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(n) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

fn tokens(text: &str, tokenize: Tokenize) -> Vec<String> {
    let text = text.trim_end();
    let line = match tokenize {
        Tokenize::Mteval13a => {
            let line = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
            let line = line.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
            format!(" {line} ")
        }
        Tokenize::Chinese => {
            let spaced = |c: char| if is_han(c) { format!(" {c} ") } else { c.to_string() };
            text.trim().chars().map(spaced).collect()
        }
    };
    let mut spaced: Vec<char> = Vec::new();
    for c in line.chars() {
        // Punctuation but for apostrophe, comma, hyphen and stop.
        if matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/') {
            spaced.extend([' ', c, ' ']);
        } else {
            spaced.push(c);
        }
    }
    let stop = |c: char| matches!(c, '.' | ',');
    let digit = |c: char| c.is_ascii_digit();
    let spaced = pairs(&spaced, |a, b| !digit(a) && stop(b), |a, b| [a, ' ', b, ' ']);
    let spaced = pairs(&spaced, |a, b| stop(a) && !digit(b), |a, b| [' ', a, ' ', b]);
    let spaced = pairs(&spaced, |a, b| digit(a) && b == '-', |a, b| [a, ' ', b, ' ']);
    spaced.into_iter().collect::<String>().split_whitespace().map(str::to_owned).collect()
}

/// Replaces pairs of neighbours from left to right; a character belongs to one pair at most.
fn pairs(text: &[char], matches: impl Fn(char, char) -> bool, replace: impl Fn(char, char) -> [char; 4]) -> Vec<char> {
    let (mut out, mut i) = (Vec::with_capacity(text.len()), 0);
    while i < text.len() {
        match text.get(i + 1) {
            Some(&next) if matches(text[i], next) => {
                out.extend(replace(text[i], next));
                i += 2;
            }
            _ => {
                out.push(text[i]);
                i += 1;
            }
        }
    }
    out
}

/// Whether `sacrebleu` takes a character for a Chinese one: the script, its punctuation, full-width forms, some symbols. (Its ranges beyond the first
/// plane are written as two characters each, and so reach into general punctuation and symbols.)
pub(crate) fn is_han(c: char) -> bool {
    matches!(c,
        '\u{3400}'..='\u{4db5}' | '\u{4e00}'..='\u{9fbb}' | '\u{f900}'..='\u{fa2d}' | '\u{fa30}'..='\u{fa6a}' | '\u{fa70}'..='\u{fad9}'
        | '\u{2001}'..='\u{2a6d}' | '\u{2f81}'..='\u{2fa1}' | '\u{ff00}'..='\u{ffef}' | '\u{2e80}'..='\u{2eff}' | '\u{3000}'..='\u{303f}'
        | '\u{31c0}'..='\u{31ef}' | '\u{2f00}'..='\u{2fdf}' | '\u{2ff0}'..='\u{2fff}' | '\u{3100}'..='\u{312f}' | '\u{31a0}'..='\u{31bf}'
        | '\u{fe10}'..='\u{fe1f}' | '\u{fe30}'..='\u{fe4f}' | '\u{3200}'..='\u{33ff}')
}
