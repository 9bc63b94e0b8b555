//! A model directory, opened: its config and its tensors under their Hugging Face names.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::commit;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::{self, Layout, SCALE_SUFFIX, Table};
use crate::mapping::FileBytes;
use crate::numeric;
use crate::shards::Weights;
use crate::tensor::Tensor;

/// A model compiled into the program.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedFiles<'a> {
    /// The text of config.json.
    pub config: &'a str,
    /// The content of model.safetensors.
    pub safetensors: &'static [u8],
}

/// An opened checkpoint. Its files stay mapped as long as it lives; tensors are read when asked for.
#[derive(Debug)]
pub struct Checkpoint {
    config: Config,
    pub(crate) weights: Weights,
    pub(crate) table: Table,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and safetensors, in the Hugging Face or the `-Paddle` layout. Headers,
    /// index and offsets are checked here; that the tensors are those of the config, and finite, is for
    /// [`Checkpoint::validate`].
    ///
    /// The files are memory-mapped: they may be replaced or deleted meanwhile (as [`crate::save`] does), but must not
    /// be written in place or truncated. If a save was killed after its commit, it is finished first.
    ///
    /// # Errors
    /// Any of [`Error`] for a config, header, index or layout that is wrong.
    pub fn open(dir: &Path) -> Result<Self> {
        let _reading = commit::finish_and_lock(dir)?;
        let config = Config::from_dir(dir)?;
        Self::new(config, Weights::open(dir)?)
    }

    /// Opens a model that is compiled into the program, with the same checks. Nothing is copied.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; the files are named `<embedded>/…`.
    pub fn from_static(files: EmbeddedFiles<'_>) -> Result<Self> {
        let origin = |name: &str| PathBuf::from("<embedded>").join(name);
        let config = Config::from_json(files.config, &origin("config.json"))?;
        let weights = Weights::from_file(FileBytes::from_static(origin("model.safetensors"), files.safetensors))?;
        Self::new(config, weights)
    }

    fn new(mut config: Config, weights: Weights) -> Result<Self> {
        let table = layout::table(&weights, &config)?;
        // Configs of the family are wrong about tying; the tensors are not.
        config.tie_word_embeddings = !table.sources.contains_key("lm_head.weight");
        Ok(Self { config, weights, table })
    }

    /// The config, with `tie_word_embeddings` as the tensors have it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the output head is the embedding: there is no `lm_head.weight`.
    pub fn tied(&self) -> bool {
        !self.contains("lm_head.weight")
    }

    /// How the files are laid out; names and shapes given out are Hugging Face's in any case.
    pub fn layout(&self) -> Layout {
        self.table.layout
    }

    /// The file that lists the tensors: model.safetensors or the index.
    pub fn origin(&self) -> &Path {
        &self.weights.origin
    }

    /// Bytes of all weights files together.
    pub fn file_bytes(&self) -> u64 {
        self.weights.files.iter().map(|file| file.len() as u64).sum()
    }

    /// Hugging Face names of the tensors, sorted. What belongs to quantised weights, scales and shapes, has no name of its own.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.table.sources.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.table.sources.contains_key(name)
    }

    /// A tensor's shape in Hugging Face orientation, without reading it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.table.sources.get(name).map(|source| source.shape.as_slice())
    }

    /// A tensor's element type as stored, without reading it.
    pub fn dtype(&self, name: &str) -> Option<crate::Dtype> {
        self.table.sources.get(name).map(|source| source.dtype)
    }

    /// A tensor by its Hugging Face name. Borrowed from the file where it is stored so; split and transposed here, one
    /// copy, where the `-Paddle` layout stores it otherwise.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; [`Error::Scale`] for scales that are not positive and finite.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let Some(source) = self.table.sources.get(name) else {
            return Err(Error::NoSuchTensor { file: self.weights.origin.clone(), tensor: name.into() });
        };
        let stored = &self.weights.stored[source.stored];
        let bytes = self.weights.bytes(stored);
        let dtype = source.dtype;
        let bytes = match source.transform.apply(bytes, dtype, &stored.entry.shape) {
            None => Cow::Borrowed(bytes),
            Some(copy) => Cow::Owned(copy),
        };
        let scales = match source.scale {
            None => Vec::new(),
            Some(scale) => self.scales(name, scale)?,
        };
        Ok(Tensor { name: name.to_owned(), dtype, shape: source.shape.clone(), bytes, scales })
    }

    /// Gives back the memory of a tensor that has been read for the last time, while the file stays mapped: it can still be read, from the file again.
    /// Without this a program that copies a checkpoint holds it twice. A name that does not exist is ignored.
    pub fn release(&self, name: &str) {
        if let Some(source) = self.table.sources.get(name) {
            let stored = &self.weights.stored[source.stored];
            self.weights.files[stored.file].release(stored.entry.bytes.clone());
        }
    }

    /// The scales of quantised tensor `name`, checked to be positive and finite.
    pub(crate) fn scales(&self, name: &str, scale: usize) -> Result<Vec<f32>> {
        let stored = &self.weights.stored[scale];
        let scales = numeric::widen(stored.entry.dtype, self.weights.bytes(stored));
        match scales.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
            None => Ok(scales),
            Some(at) if self.dtype(name) == Some(crate::Dtype::I4) => Err(Error::Packed {
                file: self.weights.path(stored).to_owned(),
                tensor: name.to_owned(),
                problem: format!("expected positive finite scales, got {} at {at}", scales[at]),
            }),
            Some(row) => Err(Error::Scale {
                file: self.weights.path(stored).to_owned(),
                tensor: name.to_owned(),
                scale: format!("{}{SCALE_SUFFIX}", name.strip_suffix(".weight").unwrap_or(name)),
                rows: scales.len(),
                got: format!("expected a positive finite number in row {row}, got {}", scales[row]),
            }),
        }
    }
}
