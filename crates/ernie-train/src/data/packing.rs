//! Documents packed into sequences of one length, drawn from the sources by weight.
//!
//! Mixture: the next document comes from the source whose (tokens given / weight) is least (stride scheduling), so that
//! the shares are exact to within a document at every moment, not only on average. Each source runs through a seeded
//! permutation of its training documents per epoch. All state is a few integers per source ([`DataState`]).
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::priority::PriorityState;
use super::random::{key, permutation};
use super::{Corpus, Error, TokenSource};
use crate::curriculum::sampler::Given;
use ernie_model::steering::NO_DOMAIN;

/// Target of a position that is not scored: a document's last token, and padding.
pub const IGNORE: i32 = -100;
/// Id in padded positions (`<unk>`, which is also the padding token).
const PAD_ID: u32 = 0;

/// Rows of packed documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids `[rows · sequence_length]`, row-major.
    pub ids: Vec<u32>,
    /// The next token inside the same document, or [`IGNORE`]; same shape as `ids`.
    pub targets: Vec<i32>,
    /// Segment bounds over the flattened tokens, `[0, …, rows · sequence_length]`: documents and rows never share one.
    pub cu_seqlens: Vec<u32>,
    /// Number of each token's domain in [`Corpus::domains`], [`NO_DOMAIN`] in padded positions; same shape as `ids`.
    pub domains: Vec<u16>,
    /// Rows.
    pub rows: usize,
    /// Tokens per row.
    pub sequence_length: usize,
}

impl Batch {
    pub(crate) fn with_capacity(rows: usize, sequence_length: usize) -> Self {
        let tokens = rows * sequence_length;
        let (ids, targets, domains) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        Self { ids, targets, cu_seqlens: vec![0], domains, rows, sequence_length }
    }

    /// Positions that are scored.
    pub fn scored(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// Room left in the row being filled.
    fn room(&self) -> usize {
        self.sequence_length - self.ids.len() % self.sequence_length
    }

    /// Closes the segment whose ids have been appended since the last bound; `after` is the document's next token when
    /// the segment was cut off by the end of a row.
    fn close_segment(&mut self, after: Option<u32>) {
        let start = self.targets.len();
        self.targets.extend(self.ids[start + 1..].iter().map(|&id| id as i32));
        self.targets.push(after.map_or(IGNORE, |id| id as i32));
        self.cu_seqlens.push(self.ids.len() as u32);
    }

    /// Fills the row up.
    pub(super) fn pad(&mut self) {
        let room = self.room();
        if room < self.sequence_length {
            self.ids.resize(self.ids.len() + room, PAD_ID);
            self.targets.resize(self.ids.len(), IGNORE);
            self.domains.resize(self.ids.len(), NO_DOMAIN);
            self.cu_seqlens.push(self.ids.len() as u32);
        }
    }
}

/// Where training is in one source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes finished.
    pub epoch: u64,
    /// Documents of this pass that are finished.
    pub finished: u64,
    /// Tokens already given of the document in progress.
    pub offset: u64,
    /// Tokens given in all.
    pub tokens: u64,
}

/// The position in the data: saved with a checkpoint, it makes the batches after a resume the same as without one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataState {
    /// [`Corpus::fingerprint`] of the data.
    pub fingerprint: String,
    /// Seed of the permutations.
    pub seed: u64,
    /// Batches given.
    pub batches: u64,
    /// One per source; none where rows are drawn by priority.
    pub cursors: Vec<Cursor>,
    /// What is known of the rows, where they are drawn by priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<PriorityState>,
    /// Which rows were given, where a curriculum chooses them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curriculum: Option<Given>,
}

/// An endless (up to `epochs_max`) stream of training batches.
#[derive(Debug)]
pub struct Packer {
    corpus: Arc<Corpus>,
    rows: usize,
    sequence_length: usize,
    state: DataState,
    orders: Vec<Vec<u32>>,
}

impl Packer {
    /// A stream from the beginning.
    pub fn new(corpus: Arc<Corpus>, seed: u64, rows: usize, sequence_length: usize) -> Self {
        let cursors = vec![Cursor::default(); corpus.sources.len()];
        let state = DataState { fingerprint: corpus.fingerprint.clone(), seed, batches: 0, cursors, priority: None, curriculum: None };
        Self::at(corpus, state, rows, sequence_length)
    }

    /// A stream from a saved position; refused when the position belongs to other data.
    pub fn resume(corpus: Arc<Corpus>, state: DataState, rows: usize, sequence_length: usize) -> Result<Self, Error> {
        let problem = |problem: String| Err(Error::State { problem });
        if state.fingerprint != corpus.fingerprint {
            return problem(format!("fingerprint {} is saved and the data have {}", state.fingerprint, corpus.fingerprint));
        }
        if state.cursors.len() != corpus.sources.len() {
            return problem(format!("{} sources are saved and the data have {}", state.cursors.len(), corpus.sources.len()));
        }
        for (cursor, source) in state.cursors.iter().zip(&corpus.sources) {
            if cursor.finished >= source.shard.train().len() as u64 {
                return problem(format!(
                    "source `{}` has {} documents and {} are finished",
                    source.name,
                    source.shard.train().len(),
                    cursor.finished
                ));
            }
        }
        let packer = Self::at(corpus, state, rows, sequence_length);
        for (index, cursor) in packer.state.cursors.iter().enumerate() {
            let length = packer.corpus.sources[index].shard.document_len(packer.document(index));
            if cursor.offset >= length as u64 && cursor.offset > 0 {
                return problem(format!("offset {} in a document of {length} tokens", cursor.offset));
            }
        }
        Ok(packer)
    }

    fn at(corpus: Arc<Corpus>, state: DataState, rows: usize, sequence_length: usize) -> Self {
        assert!(rows > 0 && sequence_length > 1, "a batch of {rows} rows of {sequence_length} tokens");
        let orders = (0..corpus.sources.len()).map(|index| order(&corpus, state.seed, index, state.cursors[index].epoch)).collect();
        Self { corpus, rows, sequence_length, state, orders }
    }

    /// The position after the batches given so far.
    pub fn state(&self) -> &DataState {
        &self.state
    }

    /// The document in progress, or next, of a source.
    fn document(&self, source: usize) -> u32 {
        self.orders[source][self.state.cursors[source].finished as usize]
    }

    /// The source that is furthest behind its share, among those that have not reached their limit.
    fn next_source(&self) -> Result<usize, Error> {
        let behind = |index: &usize| self.state.cursors[*index].tokens as f64 / self.corpus.sources[*index].weight;
        let open = (0..self.corpus.sources.len()).filter(|&index| {
            let source = &self.corpus.sources[index];
            let limit = source.epochs_max.map_or(f64::INFINITY, |epochs| epochs * source.shard.train_tokens() as f64);
            (self.state.cursors[index].tokens as f64) < limit
        });
        let tokens = self.state.cursors.iter().map(|cursor| cursor.tokens).sum();
        open.min_by(|a, b| behind(a).total_cmp(&behind(b))).ok_or(Error::Exhausted { tokens })
    }

    /// The next batch. After an error the position is that of the last whole batch.
    pub fn next_batch(&mut self) -> Result<Batch, Error> {
        let before = self.state.clone();
        let mut batch = Batch::with_capacity(self.rows, self.sequence_length);
        while batch.ids.len() < self.rows * self.sequence_length {
            match self.next_source() {
                Ok(source) => self.append(&mut batch, source),
                Err(error) => {
                    *self = Self::at(self.corpus.clone(), before, self.rows, self.sequence_length);
                    return Err(error);
                }
            }
        }
        self.state.batches += 1;
        Ok(batch)
    }

    /// Appends what fits the row of the source's document in progress.
    fn append(&mut self, batch: &mut Batch, source: usize) {
        let document = self.document(source);
        let from_source = &self.corpus.sources[source];
        let cursor = &mut self.state.cursors[source];
        let (length, from) = (from_source.shard.document_len(document), cursor.offset as usize);
        let to = length.min(from + batch.room());
        if to > from {
            append_segment(batch, from_source, document, from, to);
        }
        cursor.tokens += (to - from) as u64;
        cursor.offset = to as u64;
        if to == length {
            cursor.offset = 0;
            cursor.finished += 1;
            if cursor.finished as usize == self.orders[source].len() {
                cursor.finished = 0;
                cursor.epoch += 1;
                self.orders[source] = order(&self.corpus, self.state.seed, source, cursor.epoch);
            }
        }
    }
}

pub(super) fn append_segment(batch: &mut Batch, source: &TokenSource, document: u32, from: usize, to: usize) {
    let shard = &source.shard;
    shard.read(document, from, to, &mut batch.ids);
    let mut after = Vec::new();
    if to < shard.document_len(document) {
        shard.read(document, to, to + 1, &mut after);
    }
    batch.close_segment(after.first().copied());
    batch.domains.resize(batch.ids.len(), source.domain);
}

/// The training documents of a source in one epoch's order.
pub(super) fn order(corpus: &Corpus, seed: u64, source: usize, epoch: u64) -> Vec<u32> {
    let source = &corpus.sources[source];
    let train = source.shard.train();
    permutation(key(seed, &source.name, epoch), train.len()).into_iter().map(|index| train[index as usize]).collect()
}

impl Corpus {
    /// A source's validation set as batches of at most `rows` rows, up to `max_tokens` tokens (at least one row): the same documents
    /// in the same order in every run. Empty when no document fell on the validation side.
    pub fn validation_batches(&self, source: usize, rows: usize, sequence_length: usize, max_tokens: usize) -> Vec<Batch> {
        let source = &self.sources[source];
        let documents = source.shard.validation();
        let rows_wanted = (max_tokens / sequence_length).max(1);
        // One batch of all rows is filled first and then cut: bounds fall on row ends, so that cutting keeps every segment whole.
        let mut all = Batch::with_capacity(0, sequence_length);
        'documents: for index in permutation(key(0, &source.name, u64::MAX), documents.len()) {
            let document = documents[index as usize];
            let (mut from, length) = (0, source.shard.document_len(document));
            while from < length {
                if all.ids.len() >= rows_wanted * sequence_length {
                    break 'documents;
                }
                let to = length.min(from + all.room());
                append_segment(&mut all, source, document, from, to);
                from = to;
            }
        }
        all.pad();
        let per_batch = rows * sequence_length;
        let cut = |start: usize| {
            let end = (start + per_batch).min(all.ids.len());
            let bounds = all.cu_seqlens.iter().filter(|&&bound| (start..=end).contains(&(bound as usize)));
            Batch {
                ids: all.ids[start..end].to_vec(),
                targets: all.targets[start..end].to_vec(),
                domains: all.domains[start..end].to_vec(),
                cu_seqlens: bounds.map(|&bound| bound - start as u32).collect(),
                rows: (end - start) / sequence_length,
                sequence_length,
            }
        };
        (0..all.ids.len()).step_by(per_batch).map(cut).collect()
    }
}
