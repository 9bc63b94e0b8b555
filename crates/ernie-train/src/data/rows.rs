//! All training text cut into rows of one length, each from one source: the samples that priority sampling draws.
use std::ops::Range;
use std::sync::Arc;

use super::Corpus;
use super::packing::{Batch, append_segment, order};

/// The rows of a corpus, numbered source by source. What is left of a source after its last whole row is a row with padding, unless it is one token: that is
/// the target of the row before, and nothing follows it.
#[derive(Debug)]
pub struct Rows {
    corpus: Arc<Corpus>,
    length: usize,
    sources: Vec<SourceRows>,
}

#[derive(Debug)]
struct SourceRows {
    rows: Range<usize>,
    /// The training documents in the order in which they are laid side by side, and where each ends.
    documents: Vec<u32>,
    ends: Vec<usize>,
}

impl Rows {
    /// Rows of `length` tokens; the same seed gives the same rows.
    pub fn new(corpus: Arc<Corpus>, seed: u64, length: usize) -> Self {
        let mut first = 0;
        let sources = (0..corpus.sources.len()).map(|source| {
            let documents = order(&corpus, seed, source, 0);
            let mut end = 0;
            let ends: Vec<usize> = documents
                .iter()
                .map(|&document| {
                    end += corpus.sources[source].shard.document_len(document);
                    end
                })
                .collect();
            let rows = first..first + end.saturating_sub(1).div_ceil(length).max(1);
            first = rows.end;
            SourceRows { rows, documents, ends }
        });
        let sources = sources.collect();
        Self { corpus, length, sources }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.sources.last().map_or(0, |source| source.rows.end)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows of a source.
    pub fn of_source(&self, source: usize) -> Range<usize> {
        self.sources[source].rows.clone()
    }

    /// The source of a row.
    pub fn source_of(&self, row: usize) -> usize {
        self.sources.partition_point(|source| source.rows.end <= row)
    }

    /// The documents of a row and how many of its tokens are of each.
    pub fn documents(&self, row: usize) -> Vec<(u32, usize)> {
        let source = &self.sources[self.source_of(row)];
        let mut position = (row - source.rows.start) * self.length;
        let end = (position + self.length).min(source.ends.last().copied().unwrap_or(0));
        let first = source.ends.partition_point(|&end| end <= position);
        let mut found = Vec::new();
        for (&document, &ends) in source.documents[first..].iter().zip(&source.ends[first..]) {
            if position >= end {
                break;
            }
            found.push((document, ends.min(end) - position));
            position = ends.min(end);
        }
        found
    }

    /// Appends a row to a batch.
    pub(crate) fn append(&self, row: usize, batch: &mut Batch) {
        let index = self.source_of(row);
        let (source, tokens) = (&self.sources[index], &self.corpus.sources[index]);
        let mut position = (row - source.rows.start) * self.length;
        let end = (position + self.length).min(source.ends.last().copied().unwrap_or(0));
        let mut place = source.ends.partition_point(|&end| end <= position);
        while position < end {
            let document = source.documents[place];
            let start = source.ends[place] - tokens.shard.document_len(document);
            let to = end.min(source.ends[place]);
            if to > position {
                append_segment(batch, tokens, document, position - start, to - start);
            }
            position = to;
            place += 1;
        }
        batch.pad();
    }
}
