//! The training loop: batches, loss, gradients, clipping, AdamW, the routers' own updates, validation, checkpoints.
//!
//! Same recipe, same data, same machine: same bits, whether or not the run was interrupted. Everything a step depends on is in the
//! [`Snapshot`]: weights, moments, and the position in the data.
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use crate::{
    data::{self, Corpus, Prepared, Stream, packing::Batch, priority::Draw},
    memory,
    optimizer::{self, AdamW, AdamWConfig},
    recipe::{self, Recipe},
    routing,
    schedule::{Schedule, ScheduleError},
    snapshot::{self, Position, Snapshot, SnapshotError, Unlogged},
    telemetry::{StepMetrics, Telemetry, TelemetryError, TelemetryOptions},
};
use ernie_checkpoint::{Checkpoint, Config, SaveDtype, SaveOptions};
use ernie_model::{
    Ernie, LoadError, LossWeights, Losses, NamedParameters, PackedBatch,
    parameters::{self, Parameter},
};

/// A run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// The schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The data.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// A checkpoint of the run.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The model, on its way in or out.
    #[error(transparent)]
    Checkpoint(#[from] ernie_checkpoint::Error),
    /// The model of a checkpoint.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Metrics, events, curve.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The folder holds a run of another recipe.
    #[error(
        "{} holds a run of another recipe (or of an earlier version of this one); give `run.out` another folder, or delete that one to \
         start again",
        out.display()
    )]
    OtherRun {
        /// `run.out`.
        out: PathBuf,
    },
    /// Another process trains into the folder.
    #[error("another ernie is training into {}; wait for it, stop it, or give `run.out` another folder", out.display())]
    Busy {
        /// `run.out`.
        out: PathBuf,
    },
    /// The loss or the gradient is no longer a number.
    #[error(
        "step {step}: {what} is {value}; the weights before this step are in the last checkpoint; lower optimizer.lr, lengthen \
         schedule.warmup_steps or lower optimizer.clip_norm"
    )]
    NotFinite {
        /// Step that failed.
        step: u64,
        /// "the loss" or "the gradient norm".
        what: &'static str,
        /// What it came to.
        value: f64,
    },
    /// A folder could not be made.
    #[error("{}: {source}; check the folder's permissions and the disk's free space", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
}

/// What the caller decides beside the recipe.
#[derive(Debug, Clone, Default)]
pub struct TrainOptions {
    /// Data root; else ERNIE_DATA, else the recipe's.
    pub data_root: Option<PathBuf>,
    /// No progress on standard error.
    pub quiet: bool,
    /// Set from elsewhere (Ctrl-C): the run finishes its step, writes a checkpoint and returns.
    pub stop: Arc<AtomicBool>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// False if it was stopped before its last step.
    pub finished: bool,
    /// Optimizer steps taken, over all runs.
    pub steps: u64,
    /// Tokens trained on, over all runs.
    pub tokens: u64,
    /// Seconds spent in steps, over all runs.
    pub seconds: f64,
    /// Validation loss per source in nats per token, if finished.
    pub validation: Vec<(String, f64)>,
    /// The model directory: the finished model, or the last checkpoint.
    pub model_dir: PathBuf,
    /// The most memory that this process has had, in bytes, where the system tells (Linux: VmHWM).
    pub peak_rss_bytes: Option<u64>,
}

/// Trains the recipe's model, from its last checkpoint if there is one, to its end or until `options.stop`.
///
/// In `run.out`: `checkpoints/step-…/` (complete model directories), `metrics.jsonl`, `tensorboard/`, `loss.svg`, and at the end `model/`.
///
/// # Errors
/// See [`TrainError`]. The last checkpoint is whole whatever happens.
pub fn train(recipe: &Recipe, options: &TrainOptions) -> Result<Report, TrainError> {
    let mut trainer = Trainer::open(recipe, options)?;
    while trainer.position.step < trainer.total_steps {
        if options.stop.load(Ordering::Relaxed) {
            return trainer.interrupted();
        }
        trainer.step()?;
        let step = trainer.position.step;
        let last = step == trainer.total_steps;
        if step.is_multiple_of(recipe.run.validate_every) || last {
            let losses = trainer.validate();
            trainer.telemetry.validation(step, &losses)?;
        }
        if step.is_multiple_of(recipe.run.checkpoint_every) || last {
            trainer.checkpoint()?;
        }
    }
    trainer.finish()
}

/// Mean loss per source of a model on the recipe's validation documents, in nats per token.
///
/// # Errors
/// If the data cannot be prepared.
pub fn evaluate(recipe: &Recipe, checkpoint: &Checkpoint, data_root: Option<&Path>) -> Result<Vec<(String, f64)>, TrainError> {
    let root = recipe.data_root(data_root)?;
    let prepared = data::prepare(recipe, &root, &mut |_| {})?;
    let mut model = Ernie::load(checkpoint, &ernie_model::training_device())?;
    model.reserve_positions(recipe.data.sequence_length);
    Ok(validation_losses(&model, &prepared.corpus, recipe))
}

/// The typed configuration of a recipe's `[model]`.
///
/// # Errors
/// If a key or value is not one that the family has.
pub fn model_config(recipe: &Recipe) -> Result<Config, TrainError> {
    let config = Config::from_json(&recipe.model.to_string(), Path::new("[model]"))?;
    let refused = |key: String, problem: &str, fix: &str| recipe::Error::Invalid { key, problem: problem.into(), fix: fix.into() };
    // In a released config.json an unknown key is somebody else's; in a recipe it is a misspelt one.
    if let Some(key) = config.extra.keys().find(|key| !key.starts_with('_')) {
        return Err(refused(format!("model.{key}"), "the family has no such key", "correct its spelling or remove it").into());
    }
    let ids = [("bos_token_id", config.bos_token_id), ("pad_token_id", config.pad_token_id)].into_iter();
    let ids = ids.filter_map(|(key, id)| Some((key, id?))).chain(config.eos_token_id.iter().map(|&id| ("eos_token_id", id)));
    for (key, id) in ids {
        if id as usize >= config.vocab_size {
            return Err(refused(format!("model.{key}"), &format!("{id} is not below vocab_size"), "give an id of the vocabulary").into());
        }
    }
    if config.num_nextn_predict_layers > 1 {
        let problem = "more than one prediction block cannot be trained yet";
        return Err(refused("model.num_nextn_predict_layers".into(), problem, "give 0 or 1").into());
    }
    Ok(config)
}

struct Trainer<'a> {
    recipe: &'a Recipe,
    config: Config,
    prepared: Prepared,
    stream: Stream,
    schedule: Schedule,
    total_steps: u64,
    /// None only while a step moves it through the optimizer.
    model: Option<Ernie>,
    optimizer: AdamW,
    position: Position,
    telemetry: Telemetry,
    /// Held for as long as the run goes, so that no other process trains into the same folder.
    _lock: std::fs::File,
}

/// What one optimizer step saw, over all its micro-batches.
#[derive(Default)]
struct StepOutcome {
    gradients: NamedParameters,
    cross_entropy: f64,
    extra: BTreeMap<String, f64>,
    /// Tokens per expert, by MoE layer.
    usage: BTreeMap<usize, Vec<u64>>,
    /// Of each micro-batch.
    token_losses: Vec<Vec<f32>>,
}

impl<'a> Trainer<'a> {
    fn open(recipe: &'a Recipe, options: &TrainOptions) -> Result<Self, TrainError> {
        let config = model_config(recipe)?;
        recipe.validate(&config, memory::available_bytes())?;
        let total_steps = recipe.total_steps();
        let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.lr, total_steps)?;
        let root = recipe.data_root(options.data_root.as_deref())?;
        if let Some(threads) = recipe.run.threads {
            // The pool can be made once per process; a second run in it keeps the first one's threads.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        }
        std::fs::create_dir_all(&recipe.run.out).map_err(|source| TrainError::Io { path: recipe.run.out.clone(), source })?;
        let lock = lock(&recipe.run.out)?;
        let quiet = options.quiet;
        let prepared = data::prepare(recipe, &root, &mut |doing| {
            if !quiet {
                eprintln!("{doing}");
            }
        })?;
        let fingerprint = recipe_fingerprint(recipe);
        let (length, seed) = (recipe.data.sequence_length, recipe.run.seed);
        let adamw = AdamWConfig {
            beta1: recipe.optimizer.beta1,
            beta2: recipe.optimizer.beta2,
            eps: recipe.optimizer.eps,
            weight_decay: recipe.optimizer.weight_decay,
        };
        let mut optimizer = AdamW::new(adamw);
        let device = ernie_model::training_device();
        let (mut model, stream, position) = match snapshot::read_latest(&checkpoints(recipe))? {
            Some(Snapshot { position, .. }) if position.recipe != fingerprint => {
                return Err(TrainError::OtherRun { out: recipe.run.out.clone() });
            }
            Some(Snapshot { model, position, moments, .. }) => {
                let stream = Stream::open(recipe, prepared.corpus.clone(), config.vocab_size, Some(position.data.clone()))?;
                optimizer.step = position.step;
                optimizer.moments = moments;
                (Ernie::load(&model, &device)?, stream, position)
            }
            None => {
                let stream = Stream::open(recipe, prepared.corpus.clone(), config.vocab_size, None)?;
                let position = Position {
                    step: 0,
                    tokens: 0,
                    seconds: 0.0,
                    data: stream.state().clone(),
                    unlogged: Unlogged::default(),
                    recipe: fingerprint,
                };
                (Ernie::init(&config, &device, seed), stream, position)
            }
        };
        model.reserve_positions(length);
        model.set_precision(recipe.run.precision.into());
        let telemetry = Telemetry::open(
            &recipe.run.out,
            &TelemetryOptions { title: recipe.run.name.clone(), total_steps, resume_step: position.step, quiet },
        )?;
        Ok(Self {
            recipe,
            config,
            prepared,
            stream,
            schedule,
            total_steps,
            model: Some(model),
            optimizer,
            position,
            telemetry,
            _lock: lock,
        })
    }

    fn model(&self) -> &Ernie {
        self.model.as_ref().expect("the model is only away inside `step`")
    }

    /// One optimizer step over `gradient_accumulation` micro-batches.
    fn step(&mut self) -> Result<(), TrainError> {
        let start = Instant::now();
        let step = self.position.step + 1;
        let next = |_| self.stream.next_batch(step, self.total_steps).map(|(batch, draws)| (packed(batch, &draws), draws));
        let batches = (0..self.recipe.data.gradient_accumulation).map(next).collect::<Result<Vec<_>, _>>()?;
        let gain = self.stream.gain();
        let (batches, draws): (Vec<PackedBatch>, Vec<Vec<Draw>>) = batches.into_iter().unzip();
        let mut outcome = self.gradients(&batches);
        outcome.extra.extend(gain.map(|gain| ("sampling_gain".to_string(), gain)));
        finite(step, "the loss", outcome.cross_entropy)?;
        let norm = optimizer::global_norm(&outcome.gradients);
        finite(step, "the gradient norm", norm)?;
        let lr = self.schedule.lr(step);
        let StepOutcome { gradients, cross_entropy, extra, usage, token_losses } = outcome;
        self.update(lr, gradients, optimizer::clip_scale(norm, self.recipe.optimizer.clip_norm), &usage);

        for ((batch, draws), losses) in batches.iter().zip(&draws).zip(&token_losses) {
            self.stream.observe(step, draws, &batch.targets, losses);
        }
        let tokens = batches.iter().map(|batch| batch.tokens() as u64).sum::<u64>();
        let seconds = start.elapsed().as_secs_f64();
        self.position.step = step;
        self.position.tokens += tokens;
        self.position.seconds += seconds;
        self.position.data = self.stream.state().clone();
        let unlogged = &mut self.position.unlogged;
        unlogged.loss += cross_entropy;
        unlogged.tokens += tokens;
        unlogged.seconds += seconds;
        unlogged.steps += 1;
        if step.is_multiple_of(self.recipe.run.log_every) || step == self.total_steps || step == 1 {
            let logged = std::mem::take(&mut self.position.unlogged);
            self.telemetry.step(&StepMetrics {
                step,
                tokens: self.position.tokens,
                loss: logged.loss / logged.steps as f64,
                lr,
                grad_norm: norm,
                tok_s: logged.tokens as f64 / logged.seconds,
                extra,
            })?;
        }
        Ok(())
    }

    /// Gradients of the mean loss over the scored tokens of all batches together: each batch counts by its share of them.
    fn gradients(&self, batches: &[PackedBatch]) -> StepOutcome {
        let loss = &self.recipe.loss;
        let weights =
            LossWeights { balance: loss.balance, z: loss.z_loss, mtp: loss.mtp_weight, gate: loss.gate, gate_target: loss.gate_target };
        let scored = batches.iter().map(PackedBatch::scored).sum::<usize>().max(1) as f64;
        let mut outcome = StepOutcome::default();
        for batch in batches {
            let share = batch.scored() as f64 / scored;
            let (losses, gradients) = self.model().loss_and_gradients(batch, &weights, share, self.recipe.run.recompute);
            let Losses { cross_entropy, mtp, balance, z, usage, token_losses, active_heads, .. } = losses;
            let layers = active_heads.len() as f64;
            let active = (layers > 0.0).then(|| (active_heads.iter().map(|(_, share)| share).sum::<f64>() / layers) as f32);
            outcome.cross_entropy += share * cross_entropy as f64;
            outcome.token_losses.push(token_losses);
            for (name, value) in [("mtp", mtp), ("balance", balance), ("z", z), ("active_heads", active)] {
                if let Some(value) = value {
                    *outcome.extra.entry(name.to_string()).or_default() += share * value as f64;
                }
            }
            for (layer, used) in usage {
                let sum = outcome.usage.entry(layer).or_insert_with(|| vec![0; used.len()]);
                sum.iter_mut().zip(used).for_each(|(sum, used)| *sum += used);
            }
            parameters::accumulate(&mut outcome.gradients, gradients);
        }
        // The busiest expert's load over the mean load, averaged over layers: 1 is even.
        let peak = |used: &Vec<u64>| {
            let sum = used.iter().sum::<u64>().max(1) as f64;
            used.iter().copied().max().unwrap_or(0) as f64 * used.len() as f64 / sum
        };
        if !outcome.usage.is_empty() {
            let mean = outcome.usage.values().map(peak).sum::<f64>() / outcome.usage.len() as f64;
            outcome.extra.insert("expert_peak_load".to_string(), mean);
        }
        outcome
    }

    /// AdamW on everything; then, per router, the orthogonality step and the bias update.
    fn update(&mut self, lr: f64, gradients: NamedParameters, gradient_scale: f32, usage: &BTreeMap<usize, Vec<u64>>) {
        let loss = self.recipe.loss.clone();
        let model = self.model.take().expect("the model is only away inside `step`");
        let updated = self.optimizer.update(model, lr, gradients, gradient_scale, |parameter, values| {
            if parameter.name.ends_with("mlp.gate.weight") && loss.orthogonality > 0.0 {
                routing::orthogonality_step(values, parameter.shape[0], lr * loss.orthogonality);
            }
            if let Some(usage) = router_layer(parameter).and_then(|layer| usage.get(&layer)) {
                routing::update_bias(values, usage, loss.bias_update_rate);
            }
        });
        self.model = Some(updated);
    }

    fn validate(&self) -> Vec<(String, f64)> {
        validation_losses(self.model(), &self.prepared.corpus, self.recipe)
    }

    fn checkpoint(&mut self) -> Result<PathBuf, TrainError> {
        let directory = snapshot::Directory { root: &checkpoints(self.recipe), tokenizer: &self.prepared.tokenizer_dir };
        let model = self.model.as_ref().expect("the model is only away inside `step`");
        Ok(snapshot::write(&directory, &self.config, model, &self.optimizer, &self.position, self.recipe.run.keep_last)?)
    }

    fn interrupted(mut self) -> Result<Report, TrainError> {
        let model_dir = self.checkpoint()?;
        let report = self.report(false, Vec::new(), model_dir);
        self.telemetry.finish()?;
        Ok(report)
    }

    fn finish(self) -> Result<Report, TrainError> {
        let model_dir = self.recipe.run.out.join("model");
        let validation = self.validate();
        export(&model_dir, &self.config, self.model(), &self.prepared.tokenizer_dir, SaveDtype::F32)?;
        let report = self.report(true, validation, model_dir);
        self.telemetry.finish()?;
        Ok(report)
    }

    fn report(&self, finished: bool, validation: Vec<(String, f64)>, model_dir: PathBuf) -> Report {
        let Position { step, tokens, seconds, .. } = self.position;
        Report { finished, steps: step, tokens, seconds, validation, model_dir, peak_rss_bytes: memory::peak_rss_bytes() }
    }
}

/// Writes a model directory: weights, configuration, tokenizer files.
///
/// # Errors
/// If the disk refuses; a model that was there before is still there then.
pub fn export(dir: &Path, config: &Config, model: &Ernie, tokenizer_dir: &Path, dtype: SaveDtype) -> Result<(), TrainError> {
    let tensors = model.export().into_iter().map(|(name, shape, values)| (name, shape, values.into()));
    ernie_checkpoint::save(dir, config, tensors, &SaveOptions { dtype, ..SaveOptions::default() })?;
    Ok(snapshot::copy_tokenizer(tokenizer_dir, dir)?)
}

/// Takes the run's folder for this process. The operating system gives it back when the process ends, however it ends.
fn lock(out: &Path) -> Result<std::fs::File, TrainError> {
    let path = out.join(".lock");
    let io = |source| TrainError::Io { path: path.clone(), source };
    let file = std::fs::File::create(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(TrainError::Busy { out: out.to_path_buf() }),
        Err(std::fs::TryLockError::Error(source)) => Err(io(source)),
    }
}

fn checkpoints(recipe: &Recipe) -> PathBuf {
    recipe.run.out.join("checkpoints")
}

/// With each row's weight for its tokens, if rows were drawn.
fn packed(batch: Batch, draws: &[Draw]) -> PackedBatch {
    let of_row = |draw: &Draw| std::iter::repeat_n(draw.weight, batch.sequence_length);
    let weights = (!draws.is_empty()).then(|| draws.iter().flat_map(of_row).collect());
    PackedBatch { ids: batch.ids.into(), targets: batch.targets.into(), cu_seqlens: batch.cu_seqlens.into(), weights }
}

/// The layer whose router's correction bias this parameter is.
fn router_layer(parameter: &Parameter) -> Option<usize> {
    let layer = parameter.name.strip_prefix("model.layers.")?.strip_suffix(".mlp.moe_statics.e_score_correction_bias")?;
    layer.parse().ok()
}

fn finite(step: u64, what: &'static str, value: f64) -> Result<(), TrainError> {
    if value.is_finite() { Ok(()) } else { Err(TrainError::NotFinite { step, what, value }) }
}

/// In f32 whatever the training's precision, so that the figures of runs compare.
fn validation_losses(model: &Ernie, corpus: &Corpus, recipe: &Recipe) -> Vec<(String, f64)> {
    let mut model = model.without_tape();
    model.set_precision(recipe::Precision::F32.into());
    let (rows, length) = (recipe.data.batch_size, recipe.data.sequence_length);
    let per_source = recipe.run.validate_tokens as usize / corpus.sources.len();
    let mut losses = Vec::new();
    for (index, source) in corpus.sources.iter().enumerate() {
        let (mut sum, mut scored) = (0.0, 0);
        for batch in corpus.validation_batches(index, rows, length, per_source) {
            let batch = packed(batch, &[]);
            let targets = batch.scored();
            if targets > 0 {
                let states_th = model.forward(&batch).states_th;
                sum += ernie_model::ops::scalar(&model.cross_entropy(states_th, &batch.targets)) as f64 * targets as f64;
                scored += targets;
            }
        }
        if scored > 0 {
            losses.push((source.name.clone(), sum / scored as f64));
        }
    }
    losses
}

/// A hash of everything in the recipe that decides the weights: not names, folders, thread counts or how often things are written.
fn recipe_fingerprint(recipe: &Recipe) -> String {
    let decisive = (&recipe.model, &recipe.optimizer, &recipe.schedule, &recipe.loss, recipe.run.seed, recipe.total_steps());
    let shape = (recipe.data.sequence_length, recipe.data.batch_size, recipe.data.gradient_accumulation);
    let arithmetic = (recipe.run.precision, recipe.run.recompute);
    // As before there was a choice, where there was none: runs of then go on.
    let json = match (&recipe.data.priority, arithmetic == Default::default()) {
        (None, true) => serde_json::to_string(&(decisive, shape)),
        (None, false) => serde_json::to_string(&(decisive, shape, arithmetic)),
        (Some(priority), _) => serde_json::to_string(&(decisive, shape, arithmetic, priority)),
    };
    blake3::hash(json.expect("a recipe is plain data").as_bytes()).to_hex()[..32].to_string()
}
