//! Tokenised sources on disk: one file per source, made once, verified on opening, replaced when anything differs.
//!
//! Layout, little-endian: magic `ERNTOKEN`, version u32, bytes per token u32 (2 or 4), key 32 bytes (hash of what the
//! shard is made from), documents u64, tokens u64; then per document its end u64 and its side u8 (1 = validation);
//! then the tokens; then the BLAKE3 hash of all that precedes.
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

use super::encoding::Encoder;
use super::{Documents, Error};

/// Version of the layout.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"ERNTOKEN";
const HEADER: usize = 8 + 4 + 4 + 32 + 8 + 8;
const CHECKSUM: usize = 32;

/// An open shard.
#[derive(Debug)]
pub struct Shard {
    bytes: Vec<u8>,
    key: blake3::Hash,
    tokens_at: usize,
    width: usize,
    ends: Vec<u64>,
    train: Vec<u32>,
    validation: Vec<u32>,
    train_tokens: u64,
    validation_tokens: u64,
}

impl Shard {
    /// Tokenises documents (in parallel) and writes the shard atomically.
    pub fn write(path: &Path, key: &blake3::Hash, encoder: &Encoder, documents: &Documents) -> Result<(), Error> {
        let encoded: Result<Vec<Vec<u32>>, Error> = documents.all.par_iter().map(|document| encoder.encode(&document.body)).collect();
        let encoded = encoded?;
        let width: usize = if encoder.vocab_size() <= 1 << 16 { 2 } else { 4 };
        let tokens: usize = encoded.iter().map(Vec::len).sum();
        let mut out = Vec::with_capacity(HEADER + 9 * encoded.len() + width * tokens + CHECKSUM);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(width as u32).to_le_bytes());
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(&(encoded.len() as u64).to_le_bytes());
        out.extend_from_slice(&(tokens as u64).to_le_bytes());
        let mut end = 0u64;
        for ids in &encoded {
            end += ids.len() as u64;
            out.extend_from_slice(&end.to_le_bytes());
        }
        out.extend(documents.validation.iter().map(|&validation| u8::from(validation)));
        for &id in encoded.iter().flatten() {
            out.extend_from_slice(&id.to_le_bytes()[..width]);
        }
        let checksum = blake3::hash(&out);
        out.extend_from_slice(checksum.as_bytes());
        super::write_atomically(path, &out)
    }

    /// Opens a shard and verifies magic, version, key, lengths, document bounds and checksum.
    pub fn open(path: &Path, key: &blake3::Hash) -> Result<Self, Error> {
        let wrong = |problem: &str| Error::Shard { path: path.to_path_buf(), problem: problem.to_owned() };
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
        if bytes.len() < HEADER + CHECKSUM || &bytes[..8] != MAGIC {
            return Err(wrong("it is not a token shard"));
        }
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(8) != VERSION {
            return Err(wrong("it has another version"));
        }
        let width = u32_at(12) as usize;
        if width != 2 && width != 4 {
            return Err(wrong("a token is neither 2 nor 4 bytes"));
        }
        if &bytes[16..48] != key.as_bytes() {
            return Err(wrong("it was made from other sources or another tokenizer"));
        }
        let (documents, tokens) = (u64_at(48), u64_at(56));
        // In u128 no claimed count can overflow; nothing is allocated before the length agrees.
        let expected = (HEADER + CHECKSUM) as u128 + 9 * u128::from(documents) + width as u128 * u128::from(tokens);
        if expected != bytes.len() as u128 {
            return Err(wrong("its length is not what its header says"));
        }
        let body = bytes.len() - CHECKSUM;
        if blake3::hash(&bytes[..body]).as_bytes() != &bytes[body..] {
            return Err(wrong("its checksum does not match"));
        }
        let documents = documents as usize;
        let ends: Vec<u64> = (0..documents).map(|index| u64_at(HEADER + 8 * index)).collect();
        let sides_at = HEADER + 8 * documents;
        let mut shard = Self {
            key: *key,
            tokens_at: sides_at + documents,
            width,
            ends,
            train: Vec::new(),
            validation: Vec::new(),
            train_tokens: 0,
            validation_tokens: 0,
            bytes,
        };
        let ordered = shard.ends.windows(2).all(|pair| pair[0] <= pair[1]) && shard.ends.last().copied().unwrap_or(0) == tokens;
        if !ordered {
            return Err(wrong("its document bounds are out of order"));
        }
        for index in 0..documents {
            let length = shard.span(index as u32).len() as u64;
            match shard.bytes[sides_at + index] {
                0 => {
                    shard.train.push(index as u32);
                    shard.train_tokens += length;
                }
                1 => {
                    shard.validation.push(index as u32);
                    shard.validation_tokens += length;
                }
                _ => return Err(wrong("a document is on neither side of the split")),
            }
        }
        Ok(shard)
    }

    /// The key it was made under.
    pub fn key(&self) -> blake3::Hash {
        self.key
    }

    /// Training documents.
    pub fn train(&self) -> &[u32] {
        &self.train
    }

    /// Validation documents.
    pub fn validation(&self) -> &[u32] {
        &self.validation
    }

    /// Tokens of the training documents.
    pub fn train_tokens(&self) -> u64 {
        self.train_tokens
    }

    /// Tokens of the validation documents.
    pub fn validation_tokens(&self) -> u64 {
        self.validation_tokens
    }

    /// Tokens of a document.
    pub fn document_len(&self, document: u32) -> usize {
        self.span(document).len()
    }

    fn span(&self, document: u32) -> Range<usize> {
        let index = document as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        start as usize..self.ends[index] as usize
    }

    /// Appends tokens `from..to` of a document to `out`.
    pub fn read(&self, document: u32, from: usize, to: usize, out: &mut Vec<u32>) {
        let span = self.span(document);
        assert!(from <= to && to <= span.len(), "tokens {from}..{to} of a document of {}", span.len());
        let start = self.tokens_at + self.width * (span.start + from);
        let bytes = &self.bytes[start..start + self.width * (to - from)];
        match self.width {
            2 => out.extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        }
    }
}
