//! Byte-pair encoding as SentencePiece does it: of all adjacent pairs that form a piece, merge the one with the highest
//! score, the leftmost among equals, until none is left.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::normalizer::char_length;
use super::{PieceKind, Segment, Vocabulary};

/// Splitting a merged but unused piece stops at this depth (SentencePiece's limit).
const MAX_SPLIT_DEPTH: usize = 100;
const NONE: usize = usize::MAX;

/// A part of the text, doubly linked; merged into its left neighbour when `length` is 0.
struct Symbol {
    start: usize,
    length: usize,
    previous: usize,
    next: usize,
    /// A user-defined symbol: never merged.
    frozen: bool,
}

/// A candidate merge. Stale when the two symbols no longer have `length` bytes together.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

struct Merger<'a> {
    vocabulary: &'a Vocabulary,
    text: &'a [u8],
    symbols: Vec<Symbol>,
    agenda: BinaryHeap<Merge>,
    /// Length of the left part of each unused piece that was formed, to split it again at the end.
    split_of_unused: HashMap<&'a [u8], usize>,
}

/// Segments normalised text; the segments' lengths add up to `text.len()`.
pub fn segment(vocabulary: &Vocabulary, text: &[u8]) -> Vec<Segment> {
    let mut merger =
        Merger { vocabulary, text, symbols: split_symbols(vocabulary, text), agenda: BinaryHeap::new(), split_of_unused: HashMap::new() };
    for right in 1..merger.symbols.len() {
        merger.consider(right - 1, right);
    }
    while let Some(merge) = merger.agenda.pop() {
        merger.apply(&merge);
    }
    let mut segments = Vec::with_capacity(merger.symbols.len());
    for symbol in merger.symbols.iter().filter(|symbol| symbol.length > 0) {
        merger.emit(&text[symbol.start..symbol.start + symbol.length], 0, &mut segments);
    }
    segments
}

fn split_symbols(vocabulary: &Vocabulary, text: &[u8]) -> Vec<Symbol> {
    let mut symbols = Vec::with_capacity(text.len());
    let mut start = 0;
    while start < text.len() {
        let user_defined = vocabulary.user_defined.longest(&text[start..]);
        let length = user_defined.unwrap_or_else(|| char_length(&text[start..]));
        let index = symbols.len();
        symbols.push(Symbol { start, length, previous: index.wrapping_sub(1), next: index + 1, frozen: user_defined.is_some() });
        start += length;
    }
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
    symbols
}

impl<'a> Merger<'a> {
    /// Puts the pair on the agenda if it forms a piece.
    fn consider(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let (l, r) = (&self.symbols[left], &self.symbols[right]);
        if l.frozen || r.frozen {
            return;
        }
        let length = l.length + r.length;
        let formed = &self.text[l.start..l.start + length];
        let Some(id) = self.vocabulary.id_of_text_piece(formed) else { return };
        if self.vocabulary.kind(id) == PieceKind::Unused {
            self.split_of_unused.insert(formed, l.length);
        }
        self.agenda.push(Merge { score: self.vocabulary.score(id), left, right, length });
    }

    fn apply(&mut self, merge: &Merge) {
        let (left, right) = (&self.symbols[merge.left], &self.symbols[merge.right]);
        if left.length == 0 || right.length == 0 || left.length + right.length != merge.length {
            return;
        }
        let (previous, next) = (left.previous, right.next);
        self.symbols[merge.left].length = merge.length;
        self.symbols[merge.left].next = next;
        self.symbols[merge.right].length = 0;
        if next != NONE {
            self.symbols[next].previous = merge.left;
        }
        self.consider(previous, merge.left);
        self.consider(merge.left, next);
    }

    /// Appends `piece`, or the parts it was merged from when it is unused.
    fn emit(&self, piece: &'a [u8], depth: usize, segments: &mut Vec<Segment>) {
        let id = self.vocabulary.id_of_text_piece(piece);
        let unused = id.is_some_and(|id| self.vocabulary.kind(id) == PieceKind::Unused);
        if unused && depth <= MAX_SPLIT_DEPTH {
            if let Some(&left) = self.split_of_unused.get(piece) {
                self.emit(&piece[..left], depth + 1, segments);
                self.emit(&piece[left..], depth + 1, segments);
            } else {
                segments.push(Segment { length: piece.len(), id: None });
            }
            return;
        }
        segments.push(Segment { length: piece.len(), id });
    }
}
