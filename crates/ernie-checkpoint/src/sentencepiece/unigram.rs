//! Unigram segmentation: the path with the highest sum of piece scores (Viterbi), in the order and precision of
//! SentencePiece's `EncodeOptimized`, so that ties and rounding fall the same way.

use super::normalizer::char_length;
use super::trie::Trie;
use super::{PieceKind, Segment, Vocabulary};

/// An unknown character scores this much less than the worst piece.
const UNKNOWN_PENALTY: f32 = 10.0;
/// Sums beyond this are moved back to zero, so that long texts keep their precision.
const RESET_THRESHOLD: f32 = 100_000.0;

/// What segmentation needs besides the vocabulary.
#[derive(Clone, Debug)]
pub struct Unigram {
    trie: Trie,
    unknown_score: f32,
}

/// The last segment of the best path that ends at some byte.
#[derive(Clone, Copy)]
struct Best {
    score: f32,
    start: usize,
    id: Option<u32>,
}

const UNREACHED: usize = usize::MAX;

impl Unigram {
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let lowest =
            vocabulary.pieces().iter().filter(|piece| piece.kind == PieceKind::Normal).map(|piece| piece.score).fold(f32::MAX, f32::min);
        let entries = vocabulary.text_pieces().map(|(text, id)| (text.as_bytes(), id));
        Self { trie: Trie::new(entries), unknown_score: lowest - UNKNOWN_PENALTY }
    }

    /// Segments normalised text; the segments' lengths add up to `text.len()`.
    pub fn segment(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Segment> {
        let mut best = vec![Best { score: 0.0, start: UNREACHED, id: None }; text.len() + 1];
        let mut start = 0;
        let mut frontier = 0;
        while start < text.len() {
            let offset = best[start].score;
            if offset.abs() > RESET_THRESHOLD {
                for (i, node) in best[start..=frontier].iter_mut().enumerate() {
                    if i == 0 || node.start != UNREACHED {
                        node.score -= offset;
                    }
                }
            }
            let score_here = best[start].score;
            let character = char_length(&text[start..]);
            let mut single = false;
            let mut improve = |end: usize, score: f32, id: Option<u32>| {
                frontier = frontier.max(end);
                let node = &mut best[end];
                if node.start == UNREACHED || score > node.score {
                    *node = Best { score, start, id };
                }
            };
            self.trie.prefixes(&text[start..], |length, id| {
                let score = match vocabulary.kind(id) {
                    PieceKind::Unused => return,
                    // Long enough a bonus for the symbol to win over its parts.
                    PieceKind::UserDefined => (0.1 * (length as f64 - 1.0)) as f32,
                    _ => vocabulary.score(id),
                };
                improve(start + length, score + score_here, Some(id));
                single |= length == character;
            });
            if !single {
                improve(start + character, self.unknown_score + score_here, None);
            }
            start += character;
        }

        let mut segments = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let Best { start, id, .. } = best[end];
            segments.push(Segment { length: end - start, id });
            end = start;
        }
        segments.reverse();
        segments
    }
}
