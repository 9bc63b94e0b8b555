//! How hard text is: its mean loss under a small reference model that has read such text before.
//!
//! Every training document is scored once, whatever the run's seed; a row's difficulty is the mean over its documents, by their tokens in the row. The losses lie
//! beside the token shards, under a key of the shard, the reference's files and the length of its context: magic `ERNHARD1`, key 32 bytes, documents u64, then per
//! document its mean loss as f32 in nats (NaN where it is not scored: yet, or because it is a validation document), then the BLAKE3 hash of all that precedes.
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ernie_checkpoint::Checkpoint;
use ernie_model::{Ernie, LossWeights, PackedBatch};

use crate::data::encoding::Encoder;
use crate::data::packing::IGNORE;
use crate::data::shards::Shard;
use crate::data::{self, Corpus, Prepared};
use crate::error::TrainError;
use crate::recipe::{self, Precision, Recipe};

const MAGIC: &[u8; 8] = b"ERNHARD1";
/// Tokens that the reference reads at a time, if documents are no longer.
const TOKENS: usize = 4096;
/// Of a document that is longer than so many contexts, the beginning is scored.
const CONTEXTS: usize = 2;
/// Time between two notes of how far it is, and two savings.
const INTERVAL: Duration = Duration::from_secs(15);

/// Mean loss of every training document.
#[derive(Debug, Clone, PartialEq)]
pub struct Difficulty {
    /// Nats per token by source and document; NaN for validation documents.
    pub losses: Vec<Vec<f32>>,
}

impl Difficulty {
    /// Mean loss of a row of a source that has so many tokens of these documents.
    pub fn of_row(&self, source: usize, documents: &[(u32, usize)]) -> f64 {
        let tokens: usize = documents.iter().map(|(_, tokens)| tokens).sum();
        let sum: f64 = documents.iter().map(|&(document, tokens)| f64::from(self.losses[source][document as usize]) * tokens as f64).sum();
        sum / tokens.max(1) as f64
    }
}

/// The difficulty of a recipe's training documents, from the cache or by its reference model. `None` when `stop` was set on the way; what was scored until
/// then is kept. `say` is told how far it is.
///
/// # Errors
/// If the reference cannot be loaded or has another tokenizer, or the disk refuses.
pub fn score(
    recipe: &Recipe,
    reference: &Path,
    prepared: &Prepared,
    stop: &AtomicBool,
    say: &mut dyn FnMut(&str),
) -> Result<Option<Difficulty>, TrainError> {
    let checkpoint = Checkpoint::open(reference)?;
    let encoder = Encoder::from_dir(reference)?;
    let pieces = checkpoint.config().vocab_size;
    if encoder.fingerprint() != Encoder::from_dir(&prepared.tokenizer_dir)?.fingerprint() || pieces < encoder.vocab_size() {
        let problem = format!("{} has another tokenizer than the run", reference.display());
        let fix = "give a model that was trained with this tokenizer, or its directory as tokenizer.path".into();
        return Err(recipe::Error::Invalid { key: "curriculum.reference.model".into(), problem, fix }.into());
    }
    let context = recipe.data.sequence_length.min(checkpoint.config().max_position_embeddings);
    let weights = weights_hash(reference)?;
    let mut files = Vec::new();
    for source in &prepared.corpus.sources {
        let mut hasher = blake3::Hasher::new();
        hasher.update(MAGIC).update(source.shard.key().as_bytes()).update(weights.as_bytes()).update(&(context as u64).to_le_bytes());
        let key = hasher.finalize();
        let path = recipe.cache_dir().join(format!("{}-{}.difficulty", source.name, &key.to_hex()[..16]));
        let documents = source.shard.train().len() + source.shard.validation().len();
        let losses = read(&path, &key).filter(|losses| losses.len() == documents).unwrap_or_else(|| vec![f32::NAN; documents]);
        files.push((path, key, losses));
    }
    let left = |files: &[(PathBuf, blake3::Hash, Vec<f32>)]| {
        let missing = |(source, (_, _, losses)): (&data::TokenSource, &(PathBuf, blake3::Hash, Vec<f32>))| {
            source.shard.train().iter().filter(|&&document| losses[document as usize].is_nan()).count()
        };
        prepared.corpus.sources.iter().zip(files).map(missing).sum::<usize>()
    };
    let total = left(&files);
    if total > 0 {
        let mut model = Ernie::load(&checkpoint, &ernie_model::inference_device())?;
        model.reserve_positions(context);
        // The order of rows is all that is asked for.
        model.set_precision(Precision::Int8Mixed.into());
        let mut scorer = Scorer { model, corpus: &prepared.corpus, context };
        let mut told = Instant::now();
        say(&format!("scoring {total} documents by {}", reference.display()));
        for (source, (path, key, losses)) in files.iter_mut().enumerate() {
            while scorer.next(source, losses) {
                let stopped = stop.load(Ordering::Relaxed);
                if stopped || told.elapsed() >= INTERVAL {
                    write(path, key, losses)?;
                    told = Instant::now();
                    let train = prepared.corpus.sources[source].shard.train();
                    let done = train.iter().filter(|&&document| !losses[document as usize].is_nan()).count();
                    say(&format!("scored {done} of {} documents of {}", train.len(), prepared.corpus.sources[source].name));
                }
                if stopped {
                    return Ok(None);
                }
            }
            write(path, key, losses)?;
        }
    }
    Ok(Some(Difficulty { losses: files.into_iter().map(|(_, _, losses)| losses).collect() }))
}

struct Scorer<'a> {
    model: Ernie,
    corpus: &'a Corpus,
    context: usize,
}

impl Scorer<'_> {
    /// Scores the next documents of a source that are not scored; false when there are none.
    fn next(&mut self, source: usize, losses: &mut [f32]) -> bool {
        let shard = &self.corpus.sources[source].shard;
        let unscored = shard.train().iter().copied().filter(|&document| losses[document as usize].is_nan());
        let (mut batch, mut documents) = (Segments::default(), Vec::new());
        for document in unscored {
            let length = shard.document_len(document).min(CONTEXTS * self.context);
            if !documents.is_empty() && batch.ids.len() + length > TOKENS {
                break;
            }
            let start = batch.ids.len();
            batch.append(shard, document, length, self.context);
            documents.push((document, start..batch.ids.len()));
        }
        if documents.is_empty() {
            return false;
        }
        let batch =
            PackedBatch { ids: batch.ids.into(), targets: batch.targets.into(), cu_seqlens: batch.bounds.into(), ..PackedBatch::default() };
        let token_losses = match batch.scored() {
            0 => vec![0.0; batch.tokens()],
            _ => self.model.loss(&batch, &LossWeights::default()).token_losses,
        };
        for (document, range) in documents {
            let scored = batch.targets[range.clone()].iter().filter(|&&target| target != IGNORE).count();
            let sum: f64 = token_losses[range].iter().map(|&loss| f64::from(loss)).sum();
            losses[document as usize] = (sum / scored.max(1) as f64) as f32;
        }
        true
    }
}

/// Documents in pieces of at most a context.
struct Segments {
    ids: Vec<u32>,
    targets: Vec<i32>,
    bounds: Vec<u32>,
}

impl Default for Segments {
    fn default() -> Self {
        Self { ids: Vec::new(), targets: Vec::new(), bounds: vec![0] }
    }
}

impl Segments {
    fn append(&mut self, shard: &Shard, document: u32, length: usize, context: usize) {
        let start = self.ids.len();
        shard.read(document, 0, length, &mut self.ids);
        self.targets.extend(self.ids[start..].iter().skip(1).map(|&id| id as i32));
        if length > 0 {
            self.targets.push(IGNORE);
        }
        let ends = (start..self.ids.len()).step_by(context).skip(1).chain((length > 0).then_some(self.ids.len()));
        self.bounds.extend(ends.map(|end| end as u32));
    }
}

/// A hash of a model's configuration and weights.
pub(crate) fn weights_hash(dir: &Path) -> Result<blake3::Hash, TrainError> {
    let io = |path: &Path, source| TrainError::Io { path: path.to_path_buf(), source };
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|source| io(dir, source))? {
        let path = entry.map_err(|source| io(dir, source))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors")
            || path.file_name().is_some_and(|name| name == "config.json")
        {
            names.push(path);
        }
    }
    names.sort();
    let mut all = blake3::Hasher::new();
    for path in names {
        all.update(blake3::hash(&std::fs::read(&path).map_err(|source| io(&path, source))?).as_bytes());
    }
    Ok(all.finalize())
}

/// The losses in a file, if it is whole and of this key.
fn read(path: &Path, key: &blake3::Hash) -> Option<Vec<f32>> {
    let bytes = std::fs::read(path).ok()?;
    let (body, checksum) = bytes.split_last_chunk::<32>()?;
    let (head, losses) = body.split_at_checked(MAGIC.len() + 32 + 8)?;
    let count = u64::from_le_bytes(*head.last_chunk::<8>()?);
    let whole = &head[..8] == MAGIC && &head[8..40] == key.as_bytes() && losses.len() as u64 == count.checked_mul(4)?;
    let losses = losses.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    (whole && blake3::hash(body).as_bytes() == checksum).then(|| losses.collect())
}

fn write(path: &Path, key: &blake3::Hash, losses: &[f32]) -> Result<(), TrainError> {
    let mut out = Vec::with_capacity(80 + 4 * losses.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(&(losses.len() as u64).to_le_bytes());
    losses.iter().for_each(|loss| out.extend_from_slice(&loss.to_le_bytes()));
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    Ok(data::write_atomically(path, &out)?)
}
