//! A run is one full recipe: a typed TOML file in which every key is known, checked once before training starts.
//!
//! [`Recipe::from_file`] refuses unknown keys (naming the line and the nearest valid key), and [`Recipe::validate`]
//! refuses values that could not train, each message saying what to change.
mod drawing;
mod toml_text;

use ernie_checkpoint::Config;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

use crate::curriculum::CurriculumConfig;
use crate::data::priority::PriorityConfig;
use crate::data::sources::Format;
use crate::memory::Account;
use crate::schedule::{Schedule, ScheduleConfig, ScheduleError};
pub(crate) use toml_text::parse;

/// What is wrong with a recipe.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read the recipe {path}: {source}")]
    Read {
        /// The recipe's path.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, a missing key, or a value of the wrong type.
    #[error("{path}, line {line}: {message}{hint}")]
    Parse {
        /// The recipe's path.
        path: PathBuf,
        /// One-based line of the key or value.
        line: usize,
        /// The parser's message.
        message: String,
        /// " (did you mean `x`?)", or empty.
        hint: String,
    },
    /// A value that cannot be trained with.
    #[error("recipe key `{key}`: {problem}; {fix}")]
    Invalid {
        /// The dotted key.
        key: String,
        /// What is wrong, with the numbers.
        problem: String,
        /// What to do.
        fix: String,
    },
}

fn invalid(key: impl Into<String>, problem: impl Into<String>, fix: impl Into<String>) -> Error {
    Error::Invalid { key: key.into(), problem: problem.into(), fix: fix.into() }
}

/// A complete training run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Length, output and rhythm of the run.
    pub run: Run,
    /// The network in the form of `config.json`; read it with `ernie_checkpoint::Config::from_json`.
    pub model: serde_json::Value,
    /// The tokenizer to train, or the one to use.
    pub tokenizer: Tokenizer,
    /// Sources, mixture and batch shape.
    pub data: Data,
    /// AdamW.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Learning rate over the run.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// Auxiliary losses of the router and of multi-token prediction.
    #[serde(default)]
    pub loss: Loss,
    /// Which text comes when, and which experts it goes to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curriculum: Option<CurriculumConfig>,
    /// A second, smaller copy of the finished model, to be shipped.
    pub export: Option<Export>,
}

/// `[export]`: where the finished model goes beside `<run.out>/model`, with a model card.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Its directory.
    pub dir: PathBuf,
    /// Element type of the matrices.
    pub dtype: ExportDtype,
}

/// Element type of an exported model's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportDtype {
    /// Exact.
    F32,
    /// Rounded to nearest even.
    Bf16,
    /// One scale per output channel.
    Int8,
}

/// `[run]`: length, output and rhythm of the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name of the run, shown in logs.
    pub name: String,
    /// Seed of the weights, the data order and the tokenizer's sample.
    #[serde(default)]
    pub seed: u64,
    /// Directory for checkpoints, metrics and the finished model.
    pub out: PathBuf,
    /// Optimizer steps; give this or `tokens`.
    pub steps: Option<u64>,
    /// Training tokens, rounded up to whole steps; give this or `steps`.
    pub tokens: Option<u64>,
    /// Steps between validations.
    #[serde(default = "default_validate_every")]
    pub validate_every: u64,
    /// Tokens scored per validation, shared equally by the sources.
    #[serde(default = "default_validate_tokens")]
    pub validate_tokens: u64,
    /// Steps between checkpoints.
    #[serde(default = "default_checkpoint_every")]
    pub checkpoint_every: u64,
    /// Checkpoints kept; older ones are deleted.
    #[serde(default = "default_keep_last")]
    pub keep_last: usize,
    /// Steps between logged metrics.
    #[serde(default = "default_log_every")]
    pub log_every: u64,
    /// Worker threads; all cores when absent.
    pub threads: Option<usize>,
    /// How the large products of training are computed; validation is always in f32.
    #[serde(default)]
    pub precision: Precision,
    /// Keep only each layer's input for the backward pass and compute the rest of the layer again: slower, in far less memory.
    #[serde(default)]
    pub recompute: bool,
}

/// How the large products of training are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// In single precision.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// Operands rounded to 8 bits with scales per row and block, gradients stochastically; weights and moments stay in single precision.
    #[serde(rename = "int8-mixed")]
    Int8Mixed,
}

impl From<Precision> for ernie_model::ops::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Int8Mixed => Self::Int8Mixed,
        }
    }
}

fn default_validate_every() -> u64 {
    200
}
fn default_validate_tokens() -> u64 {
    65_536
}
fn default_checkpoint_every() -> u64 {
    200
}
fn default_keep_last() -> usize {
    2
}
fn default_log_every() -> u64 {
    10
}

/// `[tokenizer]`: train a byte-fallback BPE on the mixture, or use an existing tokenizer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// Pieces in all, with the 5 special and the 256 byte tokens; must equal the model's `vocab_size`.
    pub vocab_size: usize,
    /// Directory of an existing tokenizer (tokenizer.json); nothing is trained then.
    pub path: Option<PathBuf>,
    /// Bytes of text sampled from the mixture, by weight, to train on.
    #[serde(default = "default_train_bytes")]
    pub train_bytes: u64,
    /// Share of the sampled characters that get a piece of their own; the rest are spelled in bytes.
    #[serde(default = "default_character_coverage")]
    pub character_coverage: f64,
    /// Longest piece in characters.
    #[serde(default = "default_max_piece_chars")]
    pub max_piece_chars: usize,
}

fn default_train_bytes() -> u64 {
    16 << 20
}
fn default_character_coverage() -> f64 {
    0.9995
}
fn default_max_piece_chars() -> usize {
    16
}

/// `[data]`: where text comes from and how batches are shaped.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Folder the sources' paths start from; `--data` and the environment variable ERNIE_DATA come before it.
    pub root: Option<PathBuf>,
    /// Where tokenised shards are kept; `<run.out>/cache` when absent.
    pub cache: Option<PathBuf>,
    /// Tokens per sequence.
    pub sequence_length: usize,
    /// Sequences per micro-batch.
    pub batch_size: usize,
    /// Micro-batches per optimizer step.
    #[serde(default = "default_accumulation")]
    pub gradient_accumulation: usize,
    /// Share of documents kept out of training, chosen by document hash.
    #[serde(default = "default_validation_fraction")]
    pub validation_fraction: f64,
    /// Draw rows by their losses instead of documents by the mixture's shares alone.
    pub priority: Option<PriorityConfig>,
    /// The sources (`[[data.source]]`).
    #[serde(default)]
    pub source: Vec<Source>,
}

fn default_accumulation() -> usize {
    1
}
fn default_validation_fraction() -> f64 {
    0.02
}

/// `[[data.source]]`: one corpus.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Name in reports and metrics, unique in the recipe.
    pub name: String,
    /// How its files are read.
    pub format: Format,
    /// Files, folders or patterns (`*` within a name, `**` across folders), relative to the data root.
    pub paths: Vec<String>,
    /// Patterns of files to leave out.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Share of the training tokens relative to the other sources' weights.
    pub weight: f64,
    /// Stop drawing from this source after so many passes.
    pub epochs_max: Option<f64>,
    /// Licence of the text, for the model card.
    pub licence: String,
    /// Put the text as dialogues under the chat template: FairytaleQA's questions; stories, poems and sayings as
    /// answers to a request for them. Dialogue formats always use the template; other formats refuse it.
    #[serde(default)]
    pub template: bool,
    /// The domain that its text belongs to, for the curriculum and the statistics of experts; its own name when absent.
    pub domain: Option<String>,
}

impl Source {
    /// Name of its domain.
    pub fn domain(&self) -> &str {
        self.domain.as_deref().unwrap_or(&self.name)
    }
}

/// `[optimizer]`: AdamW with decoupled decay, as in `torch.optim.AdamW`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices; norms and biases have none.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip_norm: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { lr: 2e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 1.0 }
    }
}

/// `[loss]`: weights of the auxiliary terms; 0 turns a term off.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Loss {
    /// Load balance, E·Σ mean probability·fraction of tokens.
    pub balance: f64,
    /// Mean of the squared log-sum-exp of the router's logits.
    pub z_loss: f64,
    /// Orthogonality of the router's rows.
    pub orthogonality: f64,
    /// Step of the selection bias after each optimizer step: bias += rate·sign(mean use − use).
    pub bias_update_rate: f64,
    /// Weight of the multi-token-prediction loss.
    pub mtp_weight: f64,
    /// Weight of (share of active heads − `gate_target`)², for models with context-gated heads.
    #[serde(skip_serializing_if = "is_default_gate")]
    pub gate: f64,
    /// Share of the heads that are to be active.
    #[serde(skip_serializing_if = "is_default_gate_target")]
    pub gate_target: f64,
    /// Share of the steps in which the target falls from 1 to `gate_target`: heads learn what they are for before some of them are shut.
    #[serde(skip_serializing_if = "is_zero")]
    pub gate_warmup: f64,
}

const GATE: f64 = 1.0;
const GATE_TARGET: f64 = 0.65;

/// Left out where they are as by default, so that runs from before there were gates go on.
fn is_default_gate(gate: &f64) -> bool {
    *gate == GATE
}

fn is_default_gate_target(target: &f64) -> bool {
    *target == GATE_TARGET
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

impl Loss {
    /// Share of the heads that are to be active in a step of `steps`.
    pub fn gate_target_at(&self, step: u64, steps: u64) -> f64 {
        let warmup = self.gate_warmup * steps as f64;
        let done = if warmup > 0.0 { (step as f64 / warmup).min(1.0) } else { 1.0 };
        1.0 + (self.gate_target - 1.0) * done
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            balance: 1e-2,
            z_loss: 1e-4,
            orthogonality: 1e-3,
            bias_update_rate: 1e-3,
            mtp_weight: 0.1,
            gate: GATE,
            gate_target: GATE_TARGET,
            gate_warmup: 0.0,
        }
    }
}

impl Recipe {
    /// Reads and parses a recipe; see [`Recipe::from_toml`].
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        Self::from_toml(&text, path)
    }

    /// Parses a recipe; `origin` names it in errors. Unknown keys are refused with the nearest valid one.
    pub fn from_toml(text: &str, origin: &Path) -> Result<Self, Error> {
        parse(text, origin)
    }

    /// Tokens per optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        let tokens = (self.data.sequence_length as u64).saturating_mul(self.data.batch_size as u64);
        tokens.saturating_mul(self.data.gradient_accumulation as u64)
    }

    /// Optimizer steps of the run: `run.steps`, or `run.tokens` rounded up to whole steps.
    pub fn total_steps(&self) -> u64 {
        match (self.run.steps, self.run.tokens) {
            (Some(steps), _) => steps,
            (None, Some(tokens)) => tokens.div_ceil(self.tokens_per_step().max(1)),
            (None, None) => 0,
        }
    }

    /// Makes the run `steps` long, keeping its shape: a shorter run warms up for proportionally fewer steps.
    pub fn set_steps(&mut self, steps: u64) {
        let before = self.total_steps().max(1);
        self.schedule.scale_warmup(steps as f64 / before as f64);
        (self.run.steps, self.run.tokens) = (Some(steps), None);
    }

    /// The folder the sources' paths start from: `given` (the `--data` flag), else ERNIE_DATA, else `data.root`.
    pub fn data_root(&self, given: Option<&Path>) -> Result<PathBuf, Error> {
        let root = given
            .map(Path::to_path_buf)
            .or_else(|| std::env::var_os("ERNIE_DATA").map(PathBuf::from))
            .or_else(|| self.data.root.clone())
            .ok_or_else(|| {
                invalid("data.root", "no data folder is named", "pass --data DIR, set ERNIE_DATA, or give `root` under [data]")
            })?;
        if !root.is_dir() {
            let problem = format!("{} is not a folder", root.display());
            return Err(invalid("data.root", problem, "pass --data DIR, set ERNIE_DATA, or correct `root` under [data]"));
        }
        Ok(root)
    }

    /// Where tokenised shards are kept.
    pub fn cache_dir(&self) -> PathBuf {
        self.data.cache.clone().unwrap_or_else(|| self.run.out.join("cache"))
    }

    /// Refuses what could not train, before anything is read or written; the error names the key and the fix.
    /// Missing files and empty sources are refused by [`crate::data::prepare`].
    ///
    /// `config` is its `[model]`, read; `memory_bytes` is what training may take.
    pub fn validate(&self, config: &Config, memory_bytes: u64) -> Result<(), Error> {
        self.validate_run()?;
        self.validate_data()?;
        self.validate_optimization()?;
        drawing::check_curriculum(self, config)?;
        let vocab = config.vocab_size;
        if vocab != self.tokenizer.vocab_size {
            let problem = format!("{} pieces, but model.vocab_size is {vocab}", self.tokenizer.vocab_size);
            return Err(invalid("tokenizer.vocab_size", problem, "make the two equal"));
        }
        let positions = config.max_position_embeddings;
        if self.data.sequence_length > positions {
            let problem = format!("{} is longer than model.max_position_embeddings {positions}", self.data.sequence_length);
            return Err(invalid("data.sequence_length", problem, "shorten the sequence or raise max_position_embeddings"));
        }
        let needed = Account::of(self, config).total();
        if needed > memory_bytes {
            let problem = format!(
                "{} sequences of {} tokens need about {} MiB and {} MiB are free",
                self.data.batch_size,
                self.data.sequence_length,
                needed >> 20,
                memory_bytes >> 20
            );
            return Err(invalid(
                "data.batch_size",
                problem,
                "lower it and raise data.gradient_accumulation by the same factor, or set run.recompute",
            ));
        }
        Ok(())
    }

    fn validate_run(&self) -> Result<(), Error> {
        let run = &self.run;
        match (run.steps, run.tokens) {
            (None, None) => return Err(invalid("run.steps", "neither steps nor tokens is given", "give one of run.steps and run.tokens")),
            (Some(_), Some(_)) => {
                return Err(invalid("run.tokens", "both steps and tokens are given", "remove one of run.steps and run.tokens"));
            }
            (Some(0), None) | (None, Some(0)) => return Err(invalid("run.steps", "the run has no steps", "give a number above 0")),
            _ => {}
        }
        let rhythm = [
            ("run.validate_every", run.validate_every),
            ("run.validate_tokens", run.validate_tokens),
            ("run.checkpoint_every", run.checkpoint_every),
            ("run.keep_last", run.keep_last as u64),
            ("run.log_every", run.log_every),
        ];
        for (key, value) in rhythm {
            if value == 0 {
                return Err(invalid(key, "it is 0", "give a number above 0"));
            }
        }
        if run.threads == Some(0) {
            return Err(invalid("run.threads", "it is 0", "give a number above 0, or leave it out to use all cores"));
        }
        Ok(())
    }

    fn validate_data(&self) -> Result<(), Error> {
        let tokenizer = &self.tokenizer;
        let smallest = crate::tokenizer_training::RESERVED + 64;
        if tokenizer.vocab_size < smallest {
            let problem =
                format!("{} is too small: {} ids are special tokens and bytes", tokenizer.vocab_size, crate::tokenizer_training::RESERVED);
            return Err(invalid("tokenizer.vocab_size", problem, format!("give at least {smallest}")));
        }
        if !(tokenizer.character_coverage > 0.0 && tokenizer.character_coverage <= 1.0) {
            let problem = format!("{} is not a share", tokenizer.character_coverage);
            return Err(invalid("tokenizer.character_coverage", problem, "give a number above 0 and at most 1"));
        }
        let data = &self.data;
        for (key, value) in [
            ("tokenizer.train_bytes", tokenizer.train_bytes as usize),
            ("tokenizer.max_piece_chars", tokenizer.max_piece_chars),
            ("data.batch_size", data.batch_size),
            ("data.gradient_accumulation", data.gradient_accumulation),
        ] {
            if value == 0 {
                return Err(invalid(key, "it is 0", "give a number above 0"));
            }
        }
        if data.sequence_length < 2 {
            return Err(invalid("data.sequence_length", format!("{} tokens hold no prediction", data.sequence_length), "give at least 2"));
        }
        if !(0.0..=0.5).contains(&data.validation_fraction) {
            return Err(invalid("data.validation_fraction", format!("{} is out of range", data.validation_fraction), "give 0 to 0.5"));
        }
        if let Some(priority) = &data.priority {
            drawing::check_priority(priority, &data.source)?;
        }
        if data.source.is_empty() {
            return Err(invalid("data.source", "there is no source", "add a [[data.source]] table"));
        }
        for (index, source) in data.source.iter().enumerate() {
            let key = |field: &str| format!("data.source[{index}] ({}).{field}", source.name);
            if source.name.is_empty() || !source.name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-') {
                return Err(invalid(key("name"), "it is not a plain name", "use letters, digits, `_` and `-`"));
            }
            if data.source[..index].iter().any(|other| other.name == source.name) {
                return Err(invalid(key("name"), "another source has this name", "give each source its own name"));
            }
            if !(source.weight.is_finite() && source.weight > 0.0) {
                return Err(invalid(
                    key("weight"),
                    format!("{} is not above 0", source.weight),
                    "give a weight above 0 or remove the source",
                ));
            }
            if source.epochs_max.is_some_and(|epochs| !(epochs.is_finite() && epochs > 0.0)) {
                return Err(invalid(key("epochs_max"), "it is not above 0", "give a number above 0 or leave it out"));
            }
            if source.template && !source.format.has_template() {
                return Err(invalid(key("template"), "this format's text has no dialogues", "remove `template`"));
            }
            if let Some(path) = source.paths.iter().find(|path| path.starts_with('/') || path.split(['/', '\\']).any(|part| part == "..")) {
                return Err(invalid(
                    key("paths"),
                    format!("`{path}` leaves the data root"),
                    "name files below it, or another root with --data",
                ));
            }
            if source.paths.is_empty() {
                return Err(invalid(key("paths"), "it names no file", "list files, folders or patterns"));
            }
        }
        Ok(())
    }

    fn validate_optimization(&self) -> Result<(), Error> {
        let optimizer = &self.optimizer;
        for (key, value, low, high) in [
            ("optimizer.lr", optimizer.lr, f64::MIN_POSITIVE, 10.0),
            ("optimizer.beta1", optimizer.beta1, 0.0, 1.0 - 1e-9),
            ("optimizer.beta2", optimizer.beta2, 0.0, 1.0 - 1e-9),
            ("optimizer.eps", optimizer.eps, f64::MIN_POSITIVE, 1.0),
            ("optimizer.weight_decay", optimizer.weight_decay, 0.0, 10.0),
            ("optimizer.clip_norm", optimizer.clip_norm, 0.0, f64::MAX),
            ("loss.balance", self.loss.balance, 0.0, f64::MAX),
            ("loss.z_loss", self.loss.z_loss, 0.0, f64::MAX),
            ("loss.orthogonality", self.loss.orthogonality, 0.0, f64::MAX),
            ("loss.bias_update_rate", self.loss.bias_update_rate, 0.0, 1.0),
            ("loss.mtp_weight", self.loss.mtp_weight, 0.0, f64::MAX),
            ("loss.gate", self.loss.gate, 0.0, f64::MAX),
            ("loss.gate_target", self.loss.gate_target, 0.0, 1.0),
            ("loss.gate_warmup", self.loss.gate_warmup, 0.0, 1.0),
        ] {
            if !(low..=high).contains(&value) {
                return Err(invalid(key, format!("{value} is out of range"), format!("give a number from {low:e} to {high:e}")));
            }
        }
        if let Err(error) = Schedule::new(&self.schedule, optimizer.lr, self.total_steps()) {
            let key = match &error {
                ScheduleError::BadPeak { .. } => "optimizer.lr".to_string(),
                ScheduleError::NotAShare { field, .. } => format!("schedule.{field}"),
                ScheduleError::TooLong { .. } => "schedule.warmup_steps".to_string(),
            };
            return Err(invalid(key, error.to_string(), "or leave [schedule] out for the default"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
