//! From files to batches: sources are read into documents, split by document hash, tokenised into cached shards, and
//! packed into sequences by the recipe's mixture.
pub mod encoding;
pub mod packing;
pub mod priority;
pub mod random;
pub mod rows;
pub mod shards;
pub mod sources;
mod stream;

use rayon::prelude::*;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::recipe::{Recipe, Source};
use crate::tokenizer_training;
use encoding::Encoder;
use shards::Shard;
pub use stream::Stream;

use sources::{Body, Document, SourceFile, find_files, read_file};

/// What went wrong between the sources' files and the batches.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A recipe that cannot be used.
    #[error(transparent)]
    Recipe(#[from] crate::recipe::Error),
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {reason}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A path of the recipe finds nothing.
    #[error(
        "source `{source_name}`: `{pattern}` finds no file under {root}; correct `paths`, or name another data folder with --data or ERNIE_DATA"
    )]
    NoFiles {
        /// The source's name.
        source_name: String,
        /// The path or pattern.
        pattern: String,
        /// The data root.
        root: PathBuf,
    },
    /// A source without a training document.
    #[error("source `{source_name}` is empty: {reason}; correct `paths` or `exclude`, or remove the source")]
    EmptySource {
        /// The source's name.
        source_name: String,
        /// Why.
        reason: String,
    },
    /// Text that is not UTF-8.
    #[error("{path}: byte {offset} is not UTF-8; convert the file, or leave it out with `exclude`")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first wrong byte.
        offset: usize,
    },
    /// A row that does not fit the source's format.
    #[error("{path}{}: {problem}", line_suffix(*.line))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// One-based line, 0 for the file as a whole.
        line: usize,
        /// What was expected and what came.
        problem: String,
    },
    /// A tokenizer that cannot be used or trained.
    #[error("tokenizer {origin}: {problem}")]
    Tokenizer {
        /// Its file, or the recipe.
        origin: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A cached shard that is not what it should be; it is made again by itself, and an error only on direct opening.
    #[error("token shard {path}: {problem}")]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A data position that belongs to other data.
    #[error("the data position belongs to other data: {problem}; resume with the recipe and files the run began with, or start a new run")]
    State {
        /// The difference.
        problem: String,
    },
    /// Every source has reached its `epochs_max`.
    #[error("every source has reached its epochs_max after {tokens} tokens; raise `epochs_max` or shorten the run")]
    Exhausted {
        /// Training tokens drawn.
        tokens: u64,
    },
}

fn line_suffix(line: usize) -> String {
    if line == 0 { String::new() } else { format!(", line {line}") }
}

/// One source, read: its documents in file order, without exact duplicates.
#[derive(Debug)]
pub struct Documents {
    /// The documents.
    pub all: Vec<Document>,
    /// Which side each is on: true for validation.
    pub validation: Vec<bool>,
    /// Exact duplicates that were left out.
    pub duplicates: usize,
    /// Files read.
    pub files: usize,
}

/// The files of a source and a hash of their names and contents.
pub(crate) struct HashedFiles {
    files: Vec<SourceFile>,
    pub hash: blake3::Hash,
}

pub(crate) fn hash_files(source: &Source, root: &Path) -> Result<HashedFiles, Error> {
    let files = find_files(source, root)?;
    let hashes: Result<Vec<blake3::Hash>, Error> = files
        .par_iter()
        .map(|file| {
            let bytes = std::fs::read(&file.path).map_err(|source| Error::Read { path: file.path.clone(), source })?;
            Ok(blake3::hash(&bytes))
        })
        .collect();
    let mut all = blake3::Hasher::new();
    for (file, hash) in files.iter().zip(hashes?) {
        all.update(&(file.relative.len() as u64).to_le_bytes()).update(file.relative.as_bytes()).update(hash.as_bytes());
    }
    Ok(HashedFiles { hash: all.finalize(), files })
}

/// Reads a source's documents and decides each one's side of the split: by the hash of its split key (or of its text),
/// so that the same document is on the same side in every run.
pub fn read_documents(source: &Source, root: &Path, validation_fraction: f64) -> Result<Documents, Error> {
    read_found(source, &find_files(source, root)?, validation_fraction)
}

fn read_found(source: &Source, files: &[SourceFile], validation_fraction: f64) -> Result<Documents, Error> {
    let per_file: Result<Vec<Vec<Document>>, Error> = files.par_iter().map(|file| read_file(source, file)).collect();
    let mut documents = Documents { all: Vec::new(), validation: Vec::new(), duplicates: 0, files: files.len() };
    let mut seen: HashSet<[u8; 32]> = HashSet::new();
    for document in per_file?.into_iter().flatten() {
        let hash = blake3::hash(encoding::render(&document.body).as_bytes());
        if !seen.insert(*hash.as_bytes()) {
            documents.duplicates += 1;
            continue;
        }
        let side = document.split_key.as_ref().map_or(hash, |key| blake3::hash(key.as_bytes()));
        let mut first = [0; 8];
        first.copy_from_slice(&side.as_bytes()[..8]);
        let share = u64::from_le_bytes(first) as f64 / u64::MAX as f64;
        documents.validation.push(share < validation_fraction);
        documents.all.push(document);
    }
    if documents.validation.iter().all(|&validation| validation) {
        let reason = format!("{} files hold no training document", files.len());
        return Err(Error::EmptySource { source_name: source.name.clone(), reason });
    }
    Ok(documents)
}

/// A source as tokens.
#[derive(Debug)]
pub struct TokenSource {
    /// The source's name.
    pub name: String,
    /// Its weight in the mixture.
    pub weight: f64,
    /// Passes after which it is no longer drawn from.
    pub epochs_max: Option<f64>,
    /// Number of its domain in [`Corpus::domains`].
    pub domain: u16,
    /// Its tokens.
    pub shard: Shard,
}

/// Every source of a recipe as tokens.
#[derive(Debug)]
pub struct Corpus {
    /// The sources in the recipe's order.
    pub sources: Vec<TokenSource>,
    /// Names of the sources' domains, in the order in which they first come.
    pub domains: Vec<String>,
    /// Hash of the tokens, the weights and the limits: a data position is valid for one corpus only.
    pub fingerprint: String,
}

/// The tokenizer of a run and its corpus, ready for packing.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Folder with tokenizer.json and tokenizer_config.json, to be copied beside the model.
    pub tokenizer_dir: PathBuf,
    /// The tokens.
    pub corpus: Arc<Corpus>,
    /// Hash of each source's files, their names and contents, in the recipe's order.
    pub files: Vec<blake3::Hash>,
}

/// Trains or finds the tokenizer, then makes or finds every source's shard. Both are cached under
/// [`Recipe::cache_dir`] by the hash of what they are made from; `progress` is told what is being done.
pub fn prepare(recipe: &Recipe, root: &Path, progress: &mut dyn FnMut(&str)) -> Result<Prepared, Error> {
    let cache = recipe.cache_dir();
    let hashed: Result<Vec<HashedFiles>, Error> = recipe.data.source.iter().map(|source| hash_files(source, root)).collect();
    let hashed = hashed?;
    let tokenizer_dir = match &recipe.tokenizer.path {
        Some(path) => path.clone(),
        None => {
            let key = tokenizer_key(recipe, &hashed);
            let dir = cache.join(format!("tokenizer-{}", &key.to_hex()[..16]));
            if Encoder::from_dir(&dir).is_err() {
                progress("training the tokenizer");
                let mut documents = Vec::with_capacity(hashed.len());
                for (source, found) in recipe.data.source.iter().zip(&hashed) {
                    documents.push(read_found(source, &found.files, recipe.data.validation_fraction)?);
                }
                tokenizer_training::train(recipe, &documents)?.write(&dir)?;
            }
            dir
        }
    };
    let encoder = Encoder::from_dir(&tokenizer_dir)?;
    if encoder.vocab_size() > recipe.tokenizer.vocab_size {
        let problem = format!("it has {} pieces and the recipe's vocab_size is {}", encoder.vocab_size(), recipe.tokenizer.vocab_size);
        return Err(Error::Tokenizer { origin: tokenizer_dir, problem });
    }
    let mut sources = Vec::with_capacity(hashed.len());
    let mut fingerprint = blake3::Hasher::new();
    let mut domains: Vec<String> = Vec::new();
    for (source, found) in recipe.data.source.iter().zip(&hashed) {
        let key = shard_key(source, found, &encoder, recipe.data.validation_fraction);
        let path = cache.join(format!("{}-{}.tokens", source.name, &key.to_hex()[..16]));
        let shard = match Shard::open(&path, &key) {
            Ok(shard) => shard,
            Err(_) => {
                progress(&format!("tokenising {}", source.name));
                let documents = read_found(source, &found.files, recipe.data.validation_fraction)?;
                Shard::write(&path, &key, &encoder, &documents)?;
                Shard::open(&path, &key)?
            }
        };
        fingerprint.update(key.as_bytes()).update(&source.weight.to_le_bytes()).update(&source.epochs_max.unwrap_or(0.0).to_le_bytes());
        let domain = domains.iter().position(|name| name == source.domain()).unwrap_or_else(|| {
            domains.push(source.domain().to_owned());
            domains.len() - 1
        });
        let (name, domain) = (source.name.clone(), domain as u16);
        sources.push(TokenSource { name, weight: source.weight, epochs_max: source.epochs_max, domain, shard });
    }
    let fingerprint = fingerprint.finalize().to_hex()[..32].to_owned();
    let files = hashed.iter().map(|found| found.hash).collect();
    Ok(Prepared { tokenizer_dir, corpus: Arc::new(Corpus { sources, domains, fingerprint }), files })
}

fn shard_key(source: &Source, found: &HashedFiles, encoder: &Encoder, validation_fraction: f64) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"shard").update(&shards::VERSION.to_le_bytes()).update(&sources::READERS_VERSION.to_le_bytes());
    hasher.update(format!("{:?} {}", source.format, source.template).as_bytes());
    hasher.update(found.hash.as_bytes()).update(encoder.fingerprint().as_bytes()).update(&validation_fraction.to_le_bytes());
    hasher.finalize()
}

fn tokenizer_key(recipe: &Recipe, hashed: &[HashedFiles]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"tokenizer").update(&tokenizer_training::VERSION.to_le_bytes()).update(&sources::READERS_VERSION.to_le_bytes());
    hasher.update(format!("{:?} {} {:e}", recipe.tokenizer, recipe.run.seed, recipe.data.validation_fraction).as_bytes());
    for (source, found) in recipe.data.source.iter().zip(hashed) {
        hasher.update(format!("{:?} {} {:e}", source.format, source.template, source.weight).as_bytes()).update(found.hash.as_bytes());
    }
    hasher.finalize()
}

/// One line of the data report.
#[derive(Debug, Clone, serde::Serialize)]
pub struct SourceReport {
    /// The source's name.
    pub name: String,
    /// Licence of the text.
    pub licence: String,
    /// Training documents.
    pub train_documents: usize,
    /// Validation documents.
    pub validation_documents: usize,
    /// Training tokens.
    pub train_tokens: u64,
    /// Validation tokens.
    pub validation_tokens: u64,
    /// Share of the mixture.
    pub share: f64,
    /// Passes over its training documents in the recipe's run, were no source to reach its limit.
    pub epochs: f64,
}

/// What the recipe's data come to, from its corpus: one row per source, in the recipe's order.
pub fn describe(recipe: &Recipe, corpus: &Corpus) -> Vec<SourceReport> {
    let total: f64 = recipe.data.source.iter().map(|source| source.weight).sum();
    let run_tokens = (recipe.total_steps() * recipe.tokens_per_step()) as f64;
    let rows = recipe.data.source.iter().zip(&corpus.sources).map(|(source, tokens)| {
        let share = source.weight / total;
        SourceReport {
            name: source.name.clone(),
            licence: source.licence.clone(),
            train_documents: tokens.shard.train().len(),
            validation_documents: tokens.shard.validation().len(),
            train_tokens: tokens.shard.train_tokens(),
            validation_tokens: tokens.shard.validation_tokens(),
            share,
            epochs: run_tokens * share / tokens.shard.train_tokens().max(1) as f64,
        }
    });
    rows.collect()
}

/// The report as an aligned text table.
pub fn report_table(rows: &[SourceReport]) -> String {
    let mut out = format!(
        "{:<24}{:>10}{:>8}{:>13}{:>12}{:>8}{:>9}  licence\n",
        "source", "train doc", "val doc", "train tokens", "val tokens", "share", "epochs"
    );
    for row in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<24}{:>10}{:>8}{:>13}{:>12}{:>7.1}%{:>9.2}  {}",
            row.name,
            row.train_documents,
            row.validation_documents,
            row.train_tokens,
            row.validation_tokens,
            100.0 * row.share,
            row.epochs,
            row.licence
        );
    }
    let (train, validation) = rows.iter().fold((0, 0), |(t, v), row| (t + row.train_tokens, v + row.validation_tokens));
    let _ = writeln!(out, "{:<24}{:>10}{:>8}{train:>13}{validation:>12}", "total", "", "");
    out
}

/// The document's contents as the text that is tokenised.
pub use encoding::render;

/// Bytes of a document's contents.
pub(crate) fn body_bytes(body: &Body) -> usize {
    match body {
        Body::Text(text) => text.len(),
        Body::Dialogue(turns) => turns.iter().map(|turn| turn.content.len()).sum(),
    }
}

/// Writes a whole file or nothing: temporary file in the same folder, flushed to disk, then renamed.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |reason: String| Error::Write { path: path.to_path_buf(), reason };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|error| failed(error.to_string()))?;
    ernie_checkpoint::atomic_write(path, bytes).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests;
