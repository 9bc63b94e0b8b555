//! From a checkpoint to the same one in 8 bits, tensor by tensor: the whole is never in memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::atomic::AtomicFile;
use crate::checkpoint::Checkpoint;
use crate::commit::{self, COMPANIONS, Staged};
use crate::config::Quantization;
use crate::config::write::int8_per_channel;
use crate::error::{Error, Result};
use crate::files;
use crate::layout::SCALE_SUFFIX;
use crate::numeric;
use crate::save;
use crate::shards::{INDEX, SINGLE};
use crate::specs::{TensorGroup, TensorRole, TensorSpec};
use crate::tensor::Dtype;

/// Elements that are read and rounded together.
const CHUNK: usize = 1 << 20;

/// Bytes that must be free beside the files themselves.
const SPARE_BYTES: u64 = 16 << 20;

/// How to write.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeOptions {
    /// A shard is closed before it would grow beyond this many data bytes.
    pub max_shard_bytes: u64,
}

impl Default for QuantizeOptions {
    /// Shards of at most 4 GiB.
    fn default() -> Self {
        Self { max_shard_bytes: 4 << 30 }
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeProgress<'a> {
    /// The tensor that is being written.
    pub tensor: &'a str,
    /// Elements written.
    pub done: u64,
    /// Elements in all.
    pub total: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeSummary {
    /// Elements of all tensors.
    pub elements: u64,
    /// Bytes of the weights files that were read.
    pub source_bytes: u64,
    /// Bytes of the weights files that were written.
    pub bytes: u64,
    /// For each kind of matrix, √(Σ (w − q·s)² / Σ w²).
    pub relative_errors: BTreeMap<&'static str, f64>,
}

/// Writes `source` into `out` (made if missing) with every projection, the embedding and the head as symmetric int8 with one scale per output channel,
/// activations to be rounded per token when they come, in the compressed-tensors convention; norms, biases and routers are f32. Tokenizer and template
/// are copied from `dir`, if given. Until everything is durable `out` is as it was, then all files take their places together.
///
/// `on_progress` is called between pieces of tensors and can end it: then nothing is written and the result is `None`.
///
/// # Errors
/// [`Error::AlreadyQuantised`]; [`Error::DiskFull`], before anything is written; what is wrong with the source ([`Checkpoint::validate`]); [`Error::Io`].
pub fn quantize(
    source: &Checkpoint,
    dir: Option<&Path>,
    out: &Path,
    options: QuantizeOptions,
    on_progress: &mut dyn FnMut(QuantizeProgress<'_>) -> ControlFlow<()>,
) -> Result<Option<QuantizeSummary>> {
    if source.config().quantization.is_some() {
        return Err(Error::AlreadyQuantised { file: source.origin().to_owned() });
    }
    source.validate_structure()?;
    let specs: Vec<TensorSpec> = source.config().tensor_specs().into_iter().filter(|spec| source.contains(&spec.name)).collect();
    let shards = plan(&specs, options.max_shard_bytes);
    let bytes: u64 = shards.iter().map(|shard| shard.bytes).sum();
    std::fs::create_dir_all(out).map_err(Error::io(out, "create"))?;
    drop(commit::finish_and_lock(out)?);
    check_space(out, bytes + SPARE_BYTES)?;

    let mut state = State { done: 0, total: specs.iter().map(elements).sum(), on_progress, errors: HashMap::new() };
    let mut staged = Staged::new(out);
    let mut weight_map = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = if shards.len() == 1 { SINGLE.to_owned() } else { format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len()) };
        let mut file = staged.create(&name)?;
        if state.write_shard(source, shard, &mut file, &out.join(&name))?.is_break() {
            return Ok(None);
        }
        staged.add(file, name.clone())?;
        weight_map.extend(shard.entries().map(|entry| (entry.name, name.clone())));
    }
    if shards.len() > 1 {
        stage_json(&mut staged, out, INDEX, &json!({"metadata": {"total_size": bytes}, "weight_map": weight_map}))?;
    }
    if let Some(dir) = dir {
        copy_companions(&mut staged, dir, out)?;
    }
    let mut config = source.config().clone();
    config.quantization = Some(Quantization::Int8PerChannel);
    let mut json = config.to_json();
    if let Value::Object(json) = &mut json {
        json.insert("quantization_config".into(), int8_per_channel(config.tie_word_embeddings));
    }
    save::set_dtype(&mut json, save::SaveDtype::Int8PerChannel);
    stage_json(&mut staged, out, "config.json", &json)?;
    staged.commit()?;
    let relative_errors =
        state.errors.into_iter().map(|(kind, (error, all))| (kind, (error / all.max(f64::MIN_POSITIVE)).sqrt())).collect();
    Ok(Some(QuantizeSummary { elements: state.total, source_bytes: source.file_bytes(), bytes, relative_errors }))
}

fn elements(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|&n| n as u64).product()
}

fn is_large(spec: &TensorSpec) -> bool {
    matches!(spec.role, TensorRole::Projection | TensorRole::Embedding)
}

/// What an error is counted under.
fn kind(spec: &TensorSpec) -> &'static str {
    match spec.group {
        TensorGroup::Embedding => "embedding",
        TensorGroup::Head => "head",
        TensorGroup::RoutedExpert => "routed experts",
        TensorGroup::Mtp => "token prediction",
        TensorGroup::Vision => "vision",
        _ if spec.name.contains(".self_attn.") => "attention",
        _ => "feed-forward",
    }
}

/// One file to be written.
struct Shard<'a> {
    specs: Vec<&'a TensorSpec>,
    bytes: u64,
}

/// One tensor of a file.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: u64,
}

impl Shard<'_> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.specs.iter().flat_map(|spec| entries(spec))
    }
}

/// A tensor as it is written: bytes and scales, or f32.
fn entries(spec: &TensorSpec) -> Vec<Entry> {
    let count = elements(spec);
    if !is_large(spec) {
        return vec![Entry { name: spec.name.clone(), dtype: Dtype::F32, shape: spec.shape.clone(), bytes: count * 4 }];
    }
    let rows = spec.shape[0];
    let scale = format!("{}{SCALE_SUFFIX}", spec.name.strip_suffix(".weight").unwrap_or(&spec.name));
    vec![
        Entry { name: spec.name.clone(), dtype: Dtype::I8, shape: spec.shape.clone(), bytes: count },
        Entry { name: scale, dtype: Dtype::F32, shape: vec![rows, 1], bytes: rows as u64 * 4 },
    ]
}

fn plan(specs: &[TensorSpec], max_bytes: u64) -> Vec<Shard<'_>> {
    let mut shards = vec![Shard { specs: Vec::new(), bytes: 0 }];
    // What stays f32 first: then every f32 tensor of the file is aligned but scales behind rows of odd length, which are read element by element.
    let (large, small): (Vec<_>, Vec<_>) = specs.iter().partition(|spec| is_large(spec));
    for spec in small.into_iter().chain(large) {
        let bytes: u64 = entries(spec).iter().map(|entry| entry.bytes).sum();
        let full = shards.last().is_some_and(|shard| !shard.specs.is_empty() && shard.bytes + bytes > max_bytes);
        if full {
            shards.push(Shard { specs: Vec::new(), bytes: 0 });
        }
        if let Some(shard) = shards.last_mut() {
            shard.specs.push(spec);
            shard.bytes += bytes;
        }
    }
    shards
}

struct State<'a> {
    done: u64,
    total: u64,
    on_progress: &'a mut dyn FnMut(QuantizeProgress<'_>) -> ControlFlow<()>,
    /// Σ (w − q·s)² and Σ w² by kind.
    errors: HashMap<&'static str, (f64, f64)>,
}

impl State<'_> {
    fn write_shard(&mut self, source: &Checkpoint, shard: &Shard<'_>, file: &mut AtomicFile, path: &Path) -> Result<ControlFlow<()>> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut begin = 0;
        for Entry { name, dtype, shape, bytes } in shard.entries() {
            header.insert(name, json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, begin + bytes]}));
            begin += bytes;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io(path, "write"));
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        for spec in &shard.specs {
            if self.write_tensor(source, spec, &mut write)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn write_tensor(
        &mut self,
        source: &Checkpoint,
        spec: &TensorSpec,
        write: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<ControlFlow<()>> {
        let tensor = source.tensor(&spec.name)?;
        let width = spec.shape.last().copied().unwrap_or(1).max(1);
        let rows = tensor.len() / width;
        let mut scales = Vec::new();
        let errors = self.errors.entry(kind(spec)).or_default();
        for first in (0..rows).step_by((CHUNK / width).max(1)) {
            let progress = QuantizeProgress { tensor: &spec.name, done: self.done, total: self.total };
            if (self.on_progress)(progress).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let last = (first + (CHUNK / width).max(1)).min(rows);
            let values = tensor.rows_to_f32(first..last);
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                let (file, tensor, value) = (source.origin().to_owned(), spec.name.clone(), values[at]);
                return Err(Error::NonFinite { file, tensor, at: first * width + at, value });
            }
            if is_large(spec) {
                let (bytes, own) = numeric::quantise_rows(&values, width);
                for ((values, bytes), scale) in values.chunks_exact(width).zip(bytes.chunks_exact(width)).zip(&own) {
                    let rounded = |q: u8| f32::from(q.cast_signed()) * scale;
                    let error: f32 = values.iter().zip(bytes).map(|(w, &q)| (w - rounded(q)).powi(2)).sum();
                    errors.0 += f64::from(error);
                    errors.1 += f64::from(values.iter().map(|w| w * w).sum::<f32>());
                }
                write(&bytes)?;
                scales.extend(own);
            } else {
                write(&numeric::f32_bytes(&values))?;
            }
            self.done += values.len() as u64;
        }
        if !is_large(spec) {
            self.errors.remove(kind(spec));
        }
        write(&numeric::f32_bytes(&scales))?;
        drop(tensor);
        source.release(&spec.name);
        Ok(ControlFlow::Continue(()))
    }
}

/// Refuses a disk without this many free bytes, where the system tells.
fn check_space(out: &Path, needed: u64) -> Result<()> {
    #[cfg(unix)]
    if let Ok(disk) = rustix::fs::statvfs(out) {
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free < needed {
            return Err(Error::DiskFull { dir: out.to_owned(), needed, free });
        }
    }
    #[cfg(not(unix))]
    let _ = (out, needed);
    Ok(())
}

fn copy_companions(staged: &mut Staged, dir: &Path, out: &Path) -> Result<()> {
    for name in COMPANIONS {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let (mut from, _): (File, u64) = files::open_regular(&path).map_err(Error::reading(&path))?;
        let mut file = staged.create(name)?;
        std::io::copy(&mut from, &mut file).map_err(Error::io(out.join(name), "write"))?;
        staged.add(file, name.to_owned())?;
    }
    Ok(())
}

fn stage_json(staged: &mut Staged, out: &Path, name: &str, value: &Value) -> Result<()> {
    let path = out.join(name);
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::Json { file: path.clone(), reason: e.to_string() })?;
    text.push('\n');
    let mut file = staged.create(name)?;
    file.write_all(text.as_bytes()).map_err(Error::io(path, "write"))?;
    staged.add(file, name.to_owned())
}
