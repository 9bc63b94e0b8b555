//! ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum as the Python package `rouge-score` computes them (without its stemmer): Lin, *ROUGE: A Package for
//! Automatic Evaluation of Summaries*, 2004.
use std::collections::HashMap;

/// How a text is cut into the units that are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Units {
    /// Runs of the letters a to z and digits, in lower case: `rouge-score`'s own. Other scripts have none.
    #[default]
    Words,
    /// The same, and every character of the Chinese script and its punctuation for itself.
    WordsAndHan,
}

/// Precision, recall and their harmonic mean, from 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Score {
    /// Share of the prediction that is in the target.
    pub precision: f64,
    /// Share of the target that is in the prediction.
    pub recall: f64,
    /// 2·p·r / (p + r).
    pub f1: f64,
}

impl Score {
    fn of(hits: usize, predicted: usize, target: usize) -> Self {
        let (precision, recall) = (hits as f64 / predicted.max(1) as f64, hits as f64 / target.max(1) as f64);
        let f1 = if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
        Score { precision, recall, f1 }
    }
}

/// The scores of a prediction, or their means over many.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Rouge {
    /// Single units.
    pub rouge1: Score,
    /// Pairs of neighbours.
    pub rouge2: Score,
    /// The longest common subsequence of the texts as wholes.
    pub rouge_l: Score,
    /// The union of the longest common subsequences of each line of the target with the lines of the prediction.
    pub rouge_l_sum: Score,
}

/// The scores of one prediction.
pub fn rouge(target: &str, prediction: &str, units: Units) -> Rouge {
    let (t, p) = (tokens(target, units), tokens(prediction, units));
    Rouge {
        rouge1: of_ngrams(&t, &p, 1),
        rouge2: of_ngrams(&t, &p, 2),
        rouge_l: of_whole(&t, &p),
        rouge_l_sum: of_lines(target, prediction, units),
    }
}

/// The scores against the one of several targets whose ROUGE-1 has the highest F1, of equals the first: what the script of SciTLDR calls `multi-max` (Cachola
/// et al., arXiv 2004.15011). All 0 without targets.
pub fn best_rouge<'a>(targets: impl IntoIterator<Item = &'a str>, prediction: &str, units: Units) -> Rouge {
    let scores = targets.into_iter().map(|target| rouge(target, prediction, units));
    scores.reduce(|best, next| if next.rouge1.f1 > best.rouge1.f1 { next } else { best }).unwrap_or_default()
}

/// Means over (target, prediction) pairs; all 0 without any.
pub fn mean_rouge<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>, units: Units) -> Rouge {
    let (mut sum, mut count) = (Rouge::default(), 0.0);
    for (target, prediction) in pairs {
        let one = rouge(target, prediction, units);
        for (sum, one) in sum.scores_mut().into_iter().zip([one.rouge1, one.rouge2, one.rouge_l, one.rouge_l_sum]) {
            sum.precision += one.precision;
            sum.recall += one.recall;
            sum.f1 += one.f1;
        }
        count += 1.0;
    }
    for sum in sum.scores_mut() {
        let mean = |value: f64| if count > 0.0 { value / count } else { 0.0 };
        *sum = Score { precision: mean(sum.precision), recall: mean(sum.recall), f1: mean(sum.f1) };
    }
    sum
}

impl Rouge {
    fn scores_mut(&mut self) -> [&mut Score; 4] {
        [&mut self.rouge1, &mut self.rouge2, &mut self.rouge_l, &mut self.rouge_l_sum]
    }
}

fn tokens(text: &str, units: Units) -> Vec<String> {
    let (mut tokens, mut word) = (Vec::new(), String::new());
    for c in text.to_lowercase().chars() {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            word.push(c);
            continue;
        }
        if !word.is_empty() {
            tokens.push(std::mem::take(&mut word));
        }
        if units == Units::WordsAndHan && crate::bleu::is_han(c) {
            tokens.push(c.to_string());
        }
    }
    if !word.is_empty() {
        tokens.push(word);
    }
    tokens
}

fn of_ngrams(target: &[String], prediction: &[String], n: usize) -> Score {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    for ngram in target.windows(n) {
        *left.entry(ngram).or_default() += 1;
    }
    let mut hits = 0;
    for ngram in prediction.windows(n) {
        if let Some(count) = left.get_mut(ngram).filter(|count| **count > 0) {
            *count -= 1;
            hits += 1;
        }
    }
    Score::of(hits, (prediction.len() + 1).saturating_sub(n), (target.len() + 1).saturating_sub(n))
}

fn of_whole(target: &[String], prediction: &[String]) -> Score {
    let table = Table::new(target, prediction);
    Score::of(table.at(target.len(), prediction.len()), prediction.len(), target.len())
}

fn of_lines(target: &str, prediction: &str, units: Units) -> Score {
    let lines =
        |text: &str| -> Vec<Vec<String>> { text.split('\n').filter(|line| !line.is_empty()).map(|line| tokens(line, units)).collect() };
    let (target, prediction) = (lines(target), lines(prediction));
    let count = |lines: &[Vec<String>]| lines.iter().map(Vec::len).sum::<usize>();
    let (in_target, in_prediction) = (count(&target), count(&prediction));
    if in_target == 0 || in_prediction == 0 {
        return Score::default();
    }
    let counts = |lines: &'_ [Vec<String>]| {
        let mut counts: HashMap<String, usize> = HashMap::new();
        lines.iter().flatten().for_each(|token| *counts.entry(token.clone()).or_default() += 1);
        counts
    };
    // A token is a hit as often as it is in both, however often it is found.
    let (mut left_in_target, mut left_in_prediction) = (counts(&target), counts(&prediction));
    let mut hits = 0;
    for line in &target {
        let mut found = vec![false; line.len()];
        for other in &prediction {
            Table::new(line, other).mark(line, other, &mut found);
        }
        for (token, _) in line.iter().zip(&found).filter(|(_, found)| **found) {
            if let (Some(a), Some(b)) = (left_in_target.get_mut(token), left_in_prediction.get_mut(token))
                && *a > 0
                && *b > 0
            {
                *a -= 1;
                *b -= 1;
                hits += 1;
            }
        }
    }
    Score::of(hits, in_prediction, in_target)
}

/// Lengths of the longest common subsequences of all beginnings of two texts.
struct Table {
    lengths: Vec<u32>,
    width: usize,
}

impl Table {
    fn new(a: &[String], b: &[String]) -> Self {
        let width = b.len() + 1;
        let mut lengths = vec![0; (a.len() + 1) * width];
        for (i, x) in a.iter().enumerate() {
            for (j, y) in b.iter().enumerate() {
                let place = (i + 1) * width + j + 1;
                lengths[place] = if x == y { lengths[place - width - 1] + 1 } else { lengths[place - width].max(lengths[place - 1]) };
            }
        }
        Table { lengths, width }
    }

    fn at(&self, i: usize, j: usize) -> usize {
        self.lengths[i * self.width + j] as usize
    }

    /// Marks the places in `a` of one longest common subsequence, the one that `rouge-score` takes among several.
    fn mark(&self, a: &[String], b: &[String], found: &mut [bool]) {
        let (mut i, mut j) = (a.len(), b.len());
        while i > 0 && j > 0 {
            if a[i - 1] == b[j - 1] {
                found[i - 1] = true;
                (i, j) = (i - 1, j - 1);
            } else if self.at(i, j - 1) > self.at(i - 1, j) {
                j -= 1;
            } else {
                i -= 1;
            }
        }
    }
}
