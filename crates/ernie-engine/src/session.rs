//! One conversation with a model: its tokens and their keys and values.
use ernie_kernels::rope::RopeTable;

use crate::error::{Error, Result};
use crate::model::{LayerCache, Model, Positions};

/// Positions for which a new cache has room; it doubles when full, up to the session's limit.
const FIRST_CAPACITY: usize = 256;

/// Prompt tokens that go through the layers together: enough that reading the weights is not what takes the time.
const PREFILL_CHUNK: usize = 256;

/// Tokens so far and the key/value cache for them. Logits are the same bits whether tokens come one by one, in chunks or all at once.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    max_len: usize,
    ids: Vec<u32>,
    capacity: usize,
    caches: Vec<LayerCache>,
    rope: RopeTable,
    logits: Vec<f32>,
}

impl<'m> Session<'m> {
    /// An empty session for at most `max_len` tokens. Memory for the cache is taken as the session grows.
    ///
    /// # Errors
    /// [`Error::Parameter`] if `max_len` is 0, [`Error::ContextLength`] if the model was not made for as many.
    pub fn new(model: &'m Model, max_len: usize) -> Result<Self> {
        let config = model.config();
        if max_len == 0 {
            return Err(Error::Parameter { field: "max_len", expected: "a number ≥ 1", got: "0".to_owned() });
        }
        if max_len > config.max_position_embeddings {
            return Err(Error::ContextLength { needed: max_len, limit: config.max_position_embeddings });
        }
        let caches = (0..config.num_hidden_layers).map(|_| LayerCache::default()).collect();
        let rope = RopeTable::new(config.rope_theta, config.head_dim, 0);
        Ok(Session { model, max_len, ids: Vec::new(), capacity: 0, caches, rope, logits: Vec::new() })
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Tokens so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Number of tokens so far.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Most tokens this session can hold.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
    }

    /// Forgets what differs from `prompt`, and its last token if all of it is known, so that its logits can be computed by a
    /// [`Session::prefill`] of the rest. Returns how many tokens of `prompt` remain known.
    pub fn keep_common_prefix(&mut self, prompt: &[u32]) -> usize {
        let common = self.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        self.truncate(common.min(prompt.len().saturating_sub(1)));
        self.len()
    }

    /// Checks that there are ids and that the model knows them.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::UnknownToken`].
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab_size = self.model.config().vocab_size;
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            Some(position) => Err(Error::UnknownToken { position, id: ids[position], vocab_size }),
            None => Ok(()),
        }
    }

    /// Appends tokens; returns the logits `[vocab]` after the last one.
    ///
    /// # Errors
    /// No or unknown tokens, more than fit, no memory; the session is then as it was.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<&[f32]> {
        self.logits = self.logits_for(ids, 1)?;
        Ok(&self.logits)
    }

    /// Appends one token; returns the logits `[vocab]` after it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, id: u32) -> Result<&[f32]> {
        self.prefill(&[id])
    }

    /// Appends tokens; returns the logits `[last, vocab]` after each of the last `last` of them.
    ///
    /// # Errors
    /// As [`Session::prefill`]; [`Error::Parameter`] unless 1 ≤ `last` ≤ the number of tokens.
    pub fn logits_for(&mut self, ids: &[u32], last: usize) -> Result<Vec<f32>> {
        self.check_ids(ids)?;
        if last == 0 || last > ids.len() {
            return Err(Error::Parameter {
                field: "last",
                expected: "a number from 1 to the number of tokens given",
                got: last.to_string(),
            });
        }
        let needed = self.len() + ids.len();
        if needed > self.max_len {
            return Err(Error::ContextLength { needed, limit: self.max_len });
        }
        self.reserve(needed)?;
        // On one of the pool's own threads, so that each operator splits its work without waking a thread only to hand over.
        let logits = rayon::scope(|_| {
            let h = self.model.config().hidden_size;
            let mut logits = Vec::new();
            let mut first = 0;
            for chunk in ids.chunks(PREFILL_CHUNK) {
                let at = Positions { start: self.ids.len() + first, capacity: self.capacity, rope: &self.rope };
                let x_th = self.model.forward(chunk, &mut self.caches, at);
                let wanted = (first + chunk.len()).saturating_sub(ids.len() - last).min(chunk.len());
                if wanted > 0 {
                    logits.extend(self.model.logits(&x_th[(chunk.len() - wanted) * h..]));
                }
                first += chunk.len();
            }
            logits
        });
        self.ids.extend_from_slice(ids);
        Ok(logits)
    }

    /// Room for `positions` in every layer's cache.
    fn reserve(&mut self, positions: usize) -> Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        let config = self.model.config();
        let (heads, d) = (config.num_key_value_heads, config.head_dim);
        let capacity = positions.max(self.capacity * 2).max(FIRST_CAPACITY).min(self.max_len);
        let grown = |old: &[f32]| -> Result<Vec<f32>> {
            let mut new = Vec::new();
            let elements = heads * capacity * d;
            new.try_reserve_exact(elements).map_err(|_| Error::OutOfMemory { positions: capacity, bytes: elements * 4 })?;
            new.resize(elements, 0.0f32);
            for head in 0..heads {
                new[head * capacity * d..][..self.ids.len() * d].copy_from_slice(&old[head * self.capacity * d..][..self.ids.len() * d]);
            }
            Ok(new)
        };
        let caches = self.caches.iter().map(|cache| Ok(LayerCache { keys: grown(&cache.keys)?, values: grown(&cache.values)? }));
        self.caches = caches.collect::<Result<_>>()?;
        self.rope = RopeTable::new(config.rope_theta, d, capacity);
        self.capacity = capacity;
        Ok(())
    }
}
