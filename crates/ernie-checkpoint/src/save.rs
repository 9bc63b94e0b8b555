//! Writing a model directory: config.json and safetensors in Hugging Face layout, replacing an older model in one step.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::commit::{self, Staged};
use crate::config::{Config, Quantization, write::compressed_tensors};
use crate::error::{Error, Result};
use crate::header::safetensors_header;
use crate::layout::SCALE_SUFFIX;
use crate::numeric;
use crate::shards::{INDEX, SINGLE};
use crate::specs::{TensorGroup, TensorRole, TensorSpec};
use crate::tensor::Dtype;

/// Element type of embedding and projection matrices in the files. Norms, biases, router matrices and the correction
/// bias are f32 with each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveDtype {
    /// f32, exact.
    F32,
    /// bf16, rounded to nearest even.
    Bf16,
    /// Symmetric int8 with one f32 scale per output channel, in the compressed-tensors convention.
    Int8PerChannel,
}

/// How to write.
#[derive(Debug, Clone, Copy)]
pub struct SaveOptions {
    /// Element type of the large matrices.
    pub dtype: SaveDtype,
    /// A shard is closed before it would grow beyond this many data bytes; one larger tensor gets a shard of its own.
    /// A shard is held in memory while it is written.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// bf16 in shards of at most 1 GiB.
    fn default() -> Self {
        Self { dtype: SaveDtype::Bf16, max_shard_bytes: 1 << 30 }
    }
}

/// Writes config.json and the weights into `dir` (made if missing), replacing a model that is there: until all new
/// files are durable nothing changes, then they take their places together, and weights files of the old model go.
/// Other files of the directory, such as the tokenizer's, stay. One file, or shards with an index, by size.
///
/// `tensors` gives (Hugging Face name, shape, row-major values) in any order; it is consumed one by one. The written
/// config has `tie_word_embeddings` by the presence of `lm_head.weight` and `dtype` and `quantization_config` by the
/// options.
///
/// # Errors
/// [`Error::ConfigField`], [`Error::SurplusTensor`], [`Error::Misshapen`], [`Error::ElementCount`],
/// [`Error::DuplicateTensor`], [`Error::NonFinite`] (also for what overflows bf16) and [`Error::MissingTensor`] for
/// tensors that are not a whole model, [`Error::Io`]; the directory's model is then as it was.
pub fn save<'a>(
    dir: &Path,
    config: &Config,
    tensors: impl IntoIterator<Item = (String, Vec<usize>, Cow<'a, [f32]>)>,
    options: &SaveOptions,
) -> Result<()> {
    config.check()?;
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    drop(commit::finish_and_lock(dir)?);
    let specs: HashMap<String, TensorSpec> = config.tensor_specs().into_iter().map(|spec| (spec.name.clone(), spec)).collect();
    let mut writer = Writer { dir, staged: Staged::new(dir), shards: Vec::new(), open: Shard::default(), total_bytes: 0 };
    let mut given = HashSet::new();
    for (name, shape, values) in tensors {
        let spec = expected(dir, &specs, &name, &shape, &values)?;
        if !given.insert(name.clone()) {
            return Err(Error::DuplicateTensor { file: dir.into(), tensor: name, first: dir.into() });
        }
        for part in encode(dir, spec, &values, options.dtype)? {
            writer.push(part, options.max_shard_bytes)?;
        }
    }
    check_complete(dir, &specs, &given)?;

    let mut config = config.clone();
    config.tie_word_embeddings = !given.contains("lm_head.weight");
    config.quantization = match options.dtype {
        SaveDtype::Int8PerChannel => Some(Quantization::Int8PerChannel),
        SaveDtype::F32 | SaveDtype::Bf16 => None,
    };
    let tied = config.tie_word_embeddings;
    let mut config = config.to_json();
    if let (SaveDtype::Int8PerChannel, Value::Object(config)) = (options.dtype, &mut config) {
        // Also where the config was quantised before: another program may have left out other modules.
        config.insert("quantization_config".into(), compressed_tensors(Quantization::Int8PerChannel, tied));
    }
    set_dtype(&mut config, options.dtype);
    writer.finish(&config)
}

/// The spec of a given tensor, if the model has it in this shape.
fn expected<'s>(dir: &Path, specs: &'s HashMap<String, TensorSpec>, name: &str, shape: &[usize], values: &[f32]) -> Result<&'s TensorSpec> {
    let (file, tensor, shape_owned) = (PathBuf::from(dir), name.to_owned(), shape.to_vec());
    let Some(spec) = specs.get(name) else {
        return Err(Error::SurplusTensor { file, tensor, shape: shape_owned });
    };
    if spec.shape != shape {
        return Err(Error::Misshapen { file, tensor, expected: spec.shape.clone(), got: shape_owned });
    }
    // The shape is the spec's, whose sizes were checked.
    let expected = shape.iter().product();
    if values.len() != expected {
        return Err(Error::ElementCount { file, tensor, shape: shape_owned, expected, got: values.len() });
    }
    Ok(spec)
}

fn check_complete(dir: &Path, specs: &HashMap<String, TensorSpec>, given: &HashSet<String>) -> Result<()> {
    let begun = |group| specs.values().any(|spec| spec.group == group && given.contains(&spec.name));
    let whole: Vec<_> = [TensorGroup::Mtp, TensorGroup::ExpertBias].into_iter().filter(|&g| begun(g)).collect();
    let needed = specs.values().filter(|spec| spec.required || whole.contains(&spec.group));
    // By name, so that the message does not depend on a hash map's order.
    match needed.filter(|spec| !given.contains(&spec.name)).min_by_key(|spec| &spec.name) {
        None => Ok(()),
        Some(spec) => Err(Error::MissingTensor { file: dir.into(), tensor: spec.name.clone(), expected: spec.shape.clone() }),
    }
}

/// transformers 5 reads `dtype`, before that it was `torch_dtype`; one that is there is updated.
pub(crate) fn set_dtype(config: &mut Value, dtype: SaveDtype) {
    let Value::Object(config) = config else { return };
    let name = match dtype {
        SaveDtype::F32 => "float32",
        SaveDtype::Bf16 | SaveDtype::Int8PerChannel => "bfloat16",
    };
    let present: Vec<_> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
    let keys = if present.is_empty() { vec!["dtype"] } else { present };
    for key in keys {
        config.insert(key.into(), json!(name));
    }
}

/// A tensor as it goes to the file.
struct Encoded {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn encode(dir: &Path, spec: &TensorSpec, values: &[f32], dtype: SaveDtype) -> Result<Vec<Encoded>> {
    let large = matches!(spec.role, TensorRole::Projection | TensorRole::Embedding);
    let tensor = |dtype, bytes| Encoded { name: spec.name.clone(), dtype, shape: spec.shape.clone(), bytes };
    let non_finite = |(at, value): (usize, f32)| {
        // Of a value that only overflowed in rounding, show the value itself.
        let value = if values[at].is_finite() { value } else { values[at] };
        Error::NonFinite { file: dir.into(), tensor: spec.name.clone(), at, value }
    };
    let encoded = match dtype {
        SaveDtype::Bf16 if large => tensor(Dtype::Bf16, numeric::bf16_bytes(values)),
        SaveDtype::Int8PerChannel if large => {
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                return Err(non_finite((at, values[at])));
            }
            let row = spec.shape.last().copied().unwrap_or(1);
            let (quantised, scales) = numeric::quantise_rows(values, row);
            let scale = Encoded {
                name: format!("{}{SCALE_SUFFIX}", spec.name.strip_suffix(".weight").unwrap_or(&spec.name)),
                dtype: Dtype::F32,
                shape: vec![scales.len(), 1],
                bytes: numeric::f32_bytes(&scales),
            };
            return Ok(vec![tensor(Dtype::I8, quantised), scale]);
        }
        _ => tensor(Dtype::F32, numeric::f32_bytes(values)),
    };
    match numeric::first_non_finite(encoded.dtype, &encoded.bytes) {
        None => Ok(vec![encoded]),
        Some(found) => Err(non_finite(found)),
    }
}

/// Tensors gathered for one file.
#[derive(Default)]
struct Shard {
    tensors: Vec<Encoded>,
    bytes: u64,
}

struct Writer<'a> {
    dir: &'a Path,
    staged: Staged,
    /// Names of the tensors in each closed shard.
    shards: Vec<Vec<String>>,
    open: Shard,
    total_bytes: u64,
}

impl Writer<'_> {
    fn push(&mut self, tensor: Encoded, max_shard_bytes: u64) -> Result<()> {
        let bytes = tensor.bytes.len() as u64;
        if !self.open.tensors.is_empty() && self.open.bytes + bytes > max_shard_bytes {
            self.close()?;
        }
        self.open.bytes += bytes;
        self.total_bytes += bytes;
        self.open.tensors.push(tensor);
        Ok(())
    }

    /// Writes the open shard to a temporary file. Its final name waits for the number of shards; shards are the first
    /// staged files, in order.
    fn close(&mut self) -> Result<()> {
        let mut shard = std::mem::take(&mut self.open);
        // Wide elements first keeps every tensor aligned to its elements; by name, files do not depend on call order.
        shard.tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
        let entries = shard.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, &tensor.shape[..], tensor.bytes.len()));
        let header = safetensors_header(&[("format", "pt")], entries);

        let mut file = self.staged.create(SINGLE)?;
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io(self.dir.join(SINGLE), "write"));
        write(&header)?;
        shard.tensors.iter().try_for_each(|tensor| write(&tensor.bytes))?;
        self.staged.add(file, SINGLE.to_owned())?;
        self.shards.push(shard.tensors.into_iter().map(|tensor| tensor.name).collect());
        Ok(())
    }

    /// Stages the shards under their names, then the index, then the config, and commits.
    fn finish(mut self, config: &Value) -> Result<()> {
        if !self.open.tensors.is_empty() || self.shards.is_empty() {
            self.close()?;
        }
        let count = self.shards.len();
        if count > 1 {
            let mut weight_map = BTreeMap::new();
            for (i, names) in std::mem::take(&mut self.shards).into_iter().enumerate() {
                let shard = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
                weight_map.extend(names.into_iter().map(|name| (name, shard.clone())));
                self.staged.rename(i, shard);
            }
            let index = json!({"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map});
            self.stage_json(INDEX, &index)?;
        }
        self.stage_json("config.json", config)?;
        self.staged.commit()
    }

    fn stage_json(&mut self, name: &str, value: &Value) -> Result<()> {
        let path = self.dir.join(name);
        let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::Json { file: path.clone(), reason: e.to_string() })?;
        text.push('\n');
        let mut file = self.staged.create(name)?;
        file.write_all(text.as_bytes()).map_err(Error::io(path, "write"))?;
        self.staged.add(file, name.to_owned())
    }
}
