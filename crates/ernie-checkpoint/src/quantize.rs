//! From a checkpoint to the same one in 8 bits, its experts perhaps in 4, tensor by tensor: the whole is never in memory.

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
use crate::config::write::compressed_tensors;
use crate::error::{Error, Result};
use crate::files;
use crate::layout::{PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX};
use crate::numeric;
use crate::packed::PER_WORD;
use crate::save;
use crate::shards::{INDEX, SINGLE};
use crate::specs::{TensorGroup, TensorRole, TensorSpec};
use crate::tensor::Dtype;

/// Elements that are read and rounded together.
const CHUNK: usize = 1 << 20;

/// Bytes that must be free beside the files themselves.
const SPARE_BYTES: u64 = 16 << 20;

/// How weights are rounded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QuantizeScheme {
    /// Every projection, the embedding and the head: symmetric int8 with one scale per output channel.
    #[default]
    W8a8,
    /// The same, but routed experts: symmetric 4-bit integers with one bf16 scale for each `group` inputs of an output channel.
    W4a8 {
        /// Inputs that share a scale: 32, 64 or 128.
        group: usize,
    },
}

/// How to write.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeOptions {
    /// How weights are rounded.
    pub scheme: QuantizeScheme,
    /// A shard is closed before it would grow beyond this many data bytes.
    pub max_shard_bytes: u64,
}

impl Default for QuantizeOptions {
    /// 8 bits, shards of at most 4 GiB.
    fn default() -> Self {
        Self { scheme: QuantizeScheme::default(), max_shard_bytes: 4 << 30 }
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

/// Writes `source` into `out` (made if missing) with its matrices rounded as `options.scheme` says, activations to be rounded to 8 bits per token when they
/// come, in the compressed-tensors convention; norms, biases and routers are f32. Tokenizer and template are copied from `dir`, if given. Until everything is durable `out` is as it was, then all files take their places together.
///
/// `on_progress` is called between pieces of tensors and can end it: then nothing is written and the result is `None`.
///
/// # Errors
/// [`Error::AlreadyQuantised`]; [`Error::GroupSize`] where rows of experts cannot be cut so; [`Error::DiskFull`], before anything is written; what is wrong with the source ([`Checkpoint::validate`]); [`Error::Io`].
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
    let scheme = options.scheme;
    let form = |spec: &TensorSpec| Form::of(spec, scheme);
    if let QuantizeScheme::W4a8 { group } = scheme {
        let unfit = |spec: &&TensorSpec| form(spec) == Form::Int4 { group } && !columns(spec).is_multiple_of(group);
        let expected = ![32, 64, 128].contains(&group);
        if let Some(spec) = specs.iter().find(|spec| expected || unfit(spec)) {
            let file = source.origin().to_owned();
            return Err(Error::GroupSize { file, tensor: spec.name.clone(), columns: columns(spec), group });
        }
        if !specs.iter().any(|spec| form(spec) == Form::Int4 { group }) {
            return Err(Error::NoExperts { file: source.origin().to_owned() });
        }
    }
    let shards = plan(&specs, scheme, options.max_shard_bytes);
    let bytes: u64 = shards.iter().map(|shard| shard.bytes).sum();
    std::fs::create_dir_all(out).map_err(Error::io(out, "create"))?;
    drop(commit::finish_and_lock(out)?);
    check_space(out, bytes + SPARE_BYTES)?;

    let mut state = State { scheme, done: 0, total: specs.iter().map(elements).sum(), on_progress, errors: HashMap::new() };
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
    let quantization = match scheme {
        QuantizeScheme::W8a8 => Quantization::Int8PerChannel,
        QuantizeScheme::W4a8 { group } => Quantization::Int4Experts { group },
    };
    config.quantization = Some(quantization);
    let mut json = config.to_json();
    if let Value::Object(json) = &mut json {
        json.insert("quantization_config".into(), compressed_tensors(quantization, config.tie_word_embeddings));
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

/// Length of a row.
fn columns(spec: &TensorSpec) -> usize {
    spec.shape.last().copied().unwrap_or(1).max(1)
}

/// What a tensor becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    F32,
    Int8,
    Int4 { group: usize },
}

impl Form {
    fn of(spec: &TensorSpec, scheme: QuantizeScheme) -> Self {
        match (spec.role, scheme) {
            (TensorRole::Projection, QuantizeScheme::W4a8 { group }) if spec.group == TensorGroup::RoutedExpert => Form::Int4 { group },
            (TensorRole::Projection | TensorRole::Embedding, _) => Form::Int8,
            _ => Form::F32,
        }
    }
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
    specs: Vec<(&'a TensorSpec, Form)>,
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
        self.specs.iter().flat_map(|&(spec, form)| entries(spec, form))
    }
}

/// A tensor as it is written: f32, bytes and scales, or packed integers, scales and a shape.
fn entries(spec: &TensorSpec, form: Form) -> Vec<Entry> {
    let count = elements(spec);
    let (rows, columns) = (spec.shape[0], columns(spec));
    let stem = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
    let entry = |name: String, dtype: Dtype, shape: Vec<usize>| {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Entry { name, dtype, shape, bytes: bytes as u64 }
    };
    match form {
        Form::F32 => vec![Entry { name: spec.name.clone(), dtype: Dtype::F32, shape: spec.shape.clone(), bytes: count * 4 }],
        Form::Int8 => vec![
            Entry { name: spec.name.clone(), dtype: Dtype::I8, shape: spec.shape.clone(), bytes: count },
            entry(format!("{stem}{SCALE_SUFFIX}"), Dtype::F32, vec![rows, 1]),
        ],
        Form::Int4 { group } => vec![
            entry(format!("{stem}{PACKED_SUFFIX}"), Dtype::I32, vec![rows, columns / PER_WORD]),
            entry(format!("{stem}{SCALE_SUFFIX}"), Dtype::Bf16, vec![rows, columns / group]),
            entry(format!("{stem}{SHAPE_SUFFIX}"), Dtype::I64, vec![2]),
        ],
    }
}

fn plan(specs: &[TensorSpec], scheme: QuantizeScheme, max_bytes: u64) -> Vec<Shard<'_>> {
    let mut shards = vec![Shard { specs: Vec::new(), bytes: 0 }];
    // What stays f32 first: then every f32 tensor of the file is aligned but scales behind rows of odd length, which are read element by element.
    let (small, large): (Vec<_>, Vec<_>) =
        specs.iter().map(|spec| (spec, Form::of(spec, scheme))).partition(|(_, form)| *form == Form::F32);
    for (spec, form) in small.into_iter().chain(large) {
        let bytes: u64 = entries(spec, form).iter().map(|entry| entry.bytes).sum();
        let full = shards.last().is_some_and(|shard| !shard.specs.is_empty() && shard.bytes + bytes > max_bytes);
        if full {
            shards.push(Shard { specs: Vec::new(), bytes: 0 });
        }
        if let Some(shard) = shards.last_mut() {
            shard.specs.push((spec, form));
            shard.bytes += bytes;
        }
    }
    shards
}

struct State<'a> {
    scheme: QuantizeScheme,
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
        for &(spec, _) in &shard.specs {
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
        let (width, form) = (columns(spec), Form::of(spec, self.scheme));
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
            match form {
                Form::F32 => write(&numeric::f32_bytes(&values))?,
                Form::Int8 => {
                    let (bytes, own) = numeric::quantise_rows(&values, width);
                    count_errors(errors, &values, &bytes, &own, width);
                    write(&bytes)?;
                    scales.extend(own);
                }
                Form::Int4 { group } => {
                    let (bytes, own) = numeric::quantise_groups(&values, group);
                    count_errors(errors, &values, &bytes, &own, group);
                    write(&numeric::pack_halves(&bytes))?;
                    scales.extend(own);
                }
            }
            self.done += values.len() as u64;
        }
        match form {
            Form::F32 => drop(self.errors.remove(kind(spec))),
            Form::Int8 => write(&numeric::f32_bytes(&scales))?,
            Form::Int4 { .. } => {
                // Exact: they were rounded to bf16 before the weights were divided by them.
                write(&numeric::bf16_bytes(&scales))?;
                write(&[rows as i64, width as i64].map(i64::to_le_bytes).concat())?;
            }
        }
        drop(tensor);
        source.release(&spec.name);
        Ok(ControlFlow::Continue(()))
    }
}

/// Adds Σ (w − q·s)² and Σ w², each scale for `group` values.
fn count_errors(errors: &mut (f64, f64), values: &[f32], quantised: &[u8], scales: &[f32], group: usize) {
    for ((values, quantised), scale) in values.chunks_exact(group).zip(quantised.chunks_exact(group)).zip(scales) {
        let rounded = |q: u8| f32::from(q.cast_signed()) * scale;
        let error: f32 = values.iter().zip(quantised).map(|(w, &q)| (w - rounded(q)).powi(2)).sum();
        errors.0 += f64::from(error);
        errors.1 += f64::from(values.iter().map(|w| w * w).sum::<f32>());
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
