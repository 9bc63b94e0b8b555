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
    curriculum::{Curriculum, difficulty},
    data::{self, Prepared, Stream, packing::Batch, priority::Draw},
    error::TrainError,
    memory,
    optimizer::{self, AdamW, AdamWConfig},
    origin::{Origin, recipe_fingerprint, reference_hash, refuse_another},
    profile::{Clocks, Part},
    recipe::{self, Recipe},
    report::Report,
    routing,
    schedule::Schedule,
    snapshot::{self, Newest, Position, Snapshot, Unlogged},
    telemetry::{StepMetrics, Telemetry, TelemetryOptions},
    validation::{Validated, reached, validate},
};
use ernie_checkpoint::{Config, SaveDtype, SaveOptions};
use ernie_kernels::scratch;
use ernie_model::{
    Ernie, LossWeights, Losses, NamedParameters, PackedBatch,
    parameters::{self, Parameter},
};

/// What the caller decides beside the recipe.
#[derive(Debug, Clone, Default)]
pub struct TrainOptions {
    /// Data root; else ERNIE_DATA, else the recipe's.
    pub data_root: Option<PathBuf>,
    /// No progress on standard error.
    pub quiet: bool,
    /// Measure where the time goes, operator by operator; the report says it.
    pub profile: bool,
    /// Set from elsewhere (Ctrl-C): the run finishes its step, writes a checkpoint and returns.
    pub stop: Arc<AtomicBool>,
}

/// Trains the recipe's model, from its last checkpoint if there is one, to its end or until `options.stop`.
///
/// In `run.out`: `checkpoints/step-…/` (complete model directories), `metrics.jsonl`, `tensorboard/`, `loss.svg`, and at the end `model/`.
///
/// # Errors
/// See [`TrainError`]. The last checkpoint is whole whatever happens.
pub fn train(recipe: &Recipe, options: &TrainOptions) -> Result<Report, TrainError> {
    let Some(mut trainer) = Trainer::open(recipe, options)? else { return Ok(Report::not_begun(recipe)) };
    while trainer.position.step < trainer.total_steps {
        if options.stop.load(Ordering::Relaxed) {
            return trainer.interrupted();
        }
        trainer.step()?;
        let step = trainer.position.step;
        let last = step == trainer.total_steps;
        if step.is_multiple_of(recipe.run.validate_every) || last {
            let validated = trainer.validate();
            trainer.telemetry.validation(step, validated)?;
        }
        if step.is_multiple_of(recipe.run.checkpoint_every) || last {
            trainer.checkpoint()?;
        }
    }
    trainer.finish()
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
    curriculum: Option<Curriculum>,
    schedule: Schedule,
    total_steps: u64,
    /// None only while a step moves it through the optimizer.
    model: Option<Ernie>,
    optimizer: AdamW,
    position: Position,
    telemetry: Telemetry,
    clocks: Clocks,
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
    /// Chosen experts by MoE layer, of each micro-batch.
    experts: Vec<Vec<(usize, Arc<[u32]>)>>,
}

/// How a step's tokens were spread over experts, by MoE layer.
struct Used {
    /// Tokens per expert.
    usage: BTreeMap<usize, Vec<u64>>,
    /// Shares that were wanted, where a curriculum wants other than even ones.
    loads: Option<BTreeMap<usize, Vec<f64>>>,
}

impl<'a> Trainer<'a> {
    /// `None` when it is stopped before training begins.
    fn open(recipe: &'a Recipe, options: &TrainOptions) -> Result<Option<Self>, TrainError> {
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
        let mut say = |doing: &str| {
            if !quiet {
                eprintln!("{doing}");
            }
        };
        let (fingerprint, reference) = (recipe_fingerprint(recipe), reference_hash(recipe)?);
        let newest = snapshot::newest(&checkpoints(recipe))?;
        if let Some(newest) = &newest {
            refuse_another(recipe, &newest.position, &fingerprint, reference.as_deref())?;
        }
        snapshot::remove_partial(&checkpoints(recipe))?;
        let prepared = data::prepare(recipe, &root, &mut say)?;
        let staged = recipe.curriculum.as_ref();
        let difficulty = match staged.filter(|staged| staged.uses_difficulty()).and_then(|staged| staged.reference.as_ref()) {
            None => None,
            Some(reference) => match difficulty::score(recipe, &reference.model, &prepared, &options.stop, &mut say)? {
                None => return Ok(None),
                scored => scored,
            },
        };
        let reached = match recipe.data.priority.as_ref().and_then(|priority| priority.reference.as_ref()) {
            None => None,
            Some(reference) => Some(reached(recipe, reference, &prepared, &mut say)?),
        };
        let (length, seed) = (recipe.data.sequence_length, recipe.run.seed);
        let adamw = AdamWConfig {
            beta1: recipe.optimizer.beta1,
            beta2: recipe.optimizer.beta2,
            eps: recipe.optimizer.eps,
            weight_decay: recipe.optimizer.weight_decay,
        };
        let mut optimizer = AdamW::new(adamw);
        let device = ernie_model::training_device();
        let open = |state| Stream::open(recipe, prepared.corpus.clone(), config.vocab_size, difficulty.as_ref(), reached.as_deref(), state);
        let (mut model, stream, position) = match newest.map(Newest::read).transpose()? {
            Some(Snapshot { model, position, moments, .. }) => {
                let stream = open(Some(position.data.clone()))?;
                optimizer.step = position.step;
                optimizer.moments = moments;
                (Ernie::load(&model, &device)?, stream, Position { reference, ..position })
            }
            None => {
                let stream = open(None)?;
                let position = Position {
                    step: 0,
                    tokens: 0,
                    seconds: 0.0,
                    data: stream.state().clone(),
                    unlogged: Unlogged::default(),
                    curriculum: None,
                    reference,
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
        let state = position.curriculum.clone();
        let curriculum = staged.map(|staged| Curriculum::new(staged.clone(), &config, &prepared.corpus, seed, total_steps, state));
        Ok(Some(Self {
            recipe,
            config,
            prepared,
            stream,
            curriculum,
            schedule,
            total_steps,
            model: Some(model),
            optimizer,
            position,
            telemetry,
            clocks: Clocks::new(options.profile),
            _lock: lock,
        }))
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
        let (mut batches, draws): (Vec<PackedBatch>, Vec<Vec<Draw>>) = batches.into_iter().unzip();
        self.clocks.add(Part::Data, start);
        if let Some(curriculum) = &mut self.curriculum {
            let assigned = curriculum.begin(step);
            if !assigned.is_empty() {
                self.telemetry.assignment(step, assigned)?;
            }
            batches.iter_mut().enumerate().for_each(|(micro, batch)| curriculum.steer(step, micro, batch));
        }
        let (mut outcome, times) = self.clocks.time(|| self.gradients(step, &batches));
        self.clocks.add_operators(times);
        outcome.extra.extend(gain.map(|gain| ("sampling_gain".to_string(), gain)));
        finite(step, "the loss", outcome.cross_entropy)?;
        let updating = Instant::now();
        let norm = optimizer::global_norm(&outcome.gradients);
        finite(step, "the gradient norm", norm)?;
        let lr = self.schedule.lr(step);
        let StepOutcome { gradients, cross_entropy, extra, usage, token_losses, experts } = outcome;
        let loads = self.curriculum.as_ref().and_then(|curriculum| curriculum.loads(step));
        let used = Used { usage, loads };
        self.update(lr, gradients, optimizer::clip_scale(norm, self.recipe.optimizer.clip_norm), &used);
        self.clocks.add(Part::Optimizer, updating);

        for ((batch, draws), losses) in batches.iter().zip(&draws).zip(&token_losses) {
            self.stream.observe(step, draws, &batch.targets, losses);
        }
        if let Some(curriculum) = &mut self.curriculum {
            let seen = batches.iter().zip(&experts).zip(&token_losses);
            curriculum.observe(seen.map(|((batch, experts), losses)| (batch, experts.as_slice(), losses.as_slice())));
            self.position.curriculum = Some(curriculum.state().clone());
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
        self.clocks.add(Part::Step, start);
        Ok(())
    }

    /// Gradients of the mean loss over the scored tokens of all batches together: each batch counts by its share of them.
    fn gradients(&self, step: u64, batches: &[PackedBatch]) -> StepOutcome {
        let loss = &self.recipe.loss;
        let weights = LossWeights {
            balance: loss.balance,
            z: loss.z_loss,
            mtp: loss.mtp_weight,
            pull: 0.0,
            gate: loss.gate,
            gate_target: loss.gate_target_at(step, self.total_steps),
        };
        let weights = self.curriculum.as_ref().map_or(weights, |curriculum| curriculum.weights(step, weights));
        let scored = batches.iter().map(PackedBatch::scored).sum::<usize>().max(1) as f64;
        let mut outcome = StepOutcome::default();
        for batch in batches {
            let share = batch.scored() as f64 / scored;
            let (losses, gradients) = self.model().loss_and_gradients(batch, &weights, share, self.recipe.run.recompute);
            let Losses { cross_entropy, mtp, balance, z, pull, usage, token_losses, experts, active_heads, .. } = losses;
            let layers = active_heads.len() as f64;
            let active = (layers > 0.0).then(|| (active_heads.iter().map(|(_, share)| share).sum::<f64>() / layers) as f32);
            outcome.cross_entropy += share * cross_entropy as f64;
            outcome.token_losses.push(token_losses);
            outcome.experts.push(experts);
            for (name, value) in [("mtp", mtp), ("balance", balance), ("z", z), ("pull", pull), ("active_heads", active)] {
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
    fn update(&mut self, lr: f64, gradients: NamedParameters, gradient_scale: f32, used: &Used) {
        let loss = self.recipe.loss.clone();
        let model = self.model.take().expect("the model is only away inside `step`");
        let updated = self.optimizer.update(model, lr, gradients, gradient_scale, |parameter, values| {
            if parameter.name.ends_with("mlp.gate.weight") && loss.orthogonality > 0.0 {
                routing::orthogonality_step(values, parameter.shape[0], lr * loss.orthogonality);
            }
            if let Some((layer, usage)) = router_layer(parameter).and_then(|layer| Some((layer, used.usage.get(&layer)?))) {
                match &used.loads {
                    None => routing::update_bias(values, usage, loss.bias_update_rate),
                    Some(loads) => loads
                        .get(&layer)
                        .into_iter()
                        .for_each(|shares| routing::update_bias_towards(values, usage, shares, loss.bias_update_rate)),
                }
            }
        });
        self.model = Some(updated);
    }

    fn validate(&mut self) -> Validated {
        let start = Instant::now();
        let expert_losses = self.curriculum.as_ref().map(Curriculum::losses).unwrap_or_default();
        // What a step leaves idle would count beside what validation and checkpoints need, whose sizes are others.
        scratch::free_idle();
        let validated = validate(self.model(), &self.prepared.corpus, self.recipe);
        scratch::free_idle();
        self.clocks.add(Part::Validation, start);
        Validated { expert_losses, ..validated }
    }

    fn checkpoint(&mut self) -> Result<PathBuf, TrainError> {
        let start = Instant::now();
        let directory = snapshot::Directory { root: &checkpoints(self.recipe), tokenizer: &self.prepared.tokenizer_dir };
        let model = self.model.as_ref().expect("the model is only away inside `step`");
        scratch::free_idle();
        let written = snapshot::write(&directory, &self.config, model, &self.optimizer, &self.position, self.recipe.run.keep_last)?;
        self.clocks.add(Part::Checkpoints, start);
        Ok(written)
    }

    fn interrupted(mut self) -> Result<Report, TrainError> {
        let model_dir = self.checkpoint()?;
        self.close(None, model_dir)
    }

    fn finish(mut self) -> Result<Report, TrainError> {
        let model_dir = self.recipe.run.out.join("model");
        let validation = self.validate();
        let start = Instant::now();
        export(&model_dir, &self.config, self.model(), &self.prepared.tokenizer_dir, SaveDtype::F32)?;
        self.clocks.add(Part::Checkpoints, start);
        self.close(Some(validation), model_dir)
    }

    /// Ends the telemetry of a run, which is finished if it was validated, and reports it.
    fn close(mut self, validated: Option<Validated>, model_dir: PathBuf) -> Result<Report, TrainError> {
        let report = self.report(validated, model_dir);
        if let Some(profile) = &report.profile {
            self.telemetry.profile(report.steps, profile.clone())?;
        }
        self.telemetry.finish()?;
        Ok(report)
    }

    fn report(&self, validated: Option<Validated>, model_dir: PathBuf) -> Report {
        let Position { step, tokens, seconds, .. } = self.position;
        let finished = validated.is_some();
        let Validated { losses, experts, active_heads, .. } = validated.unwrap_or_default();
        Report {
            finished,
            steps: step,
            tokens,
            seconds,
            validation: losses,
            experts,
            active_heads,
            sampling: self.stream.spread(),
            model_dir,
            peak_rss_bytes: memory::peak_rss_bytes(),
            profile: self.clocks.profile(),
            origin: finished.then(|| Origin::of(self.recipe, &self.prepared)),
        }
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

pub(crate) fn checkpoints(recipe: &Recipe) -> PathBuf {
    recipe.run.out.join("checkpoints")
}

/// With each row's weight for its tokens, if rows were drawn.
pub(crate) fn packed(batch: Batch, draws: &[Draw]) -> PackedBatch {
    let of_row = |draw: &Draw| std::iter::repeat_n(draw.weight, batch.sequence_length);
    let weights = (!draws.is_empty()).then(|| draws.iter().flat_map(of_row).collect());
    PackedBatch {
        ids: batch.ids.into(),
        targets: batch.targets.into(),
        cu_seqlens: batch.cu_seqlens.into(),
        weights,
        domains: Some(batch.domains.into()),
        steering: None,
    }
}

/// The layer whose router's correction bias this parameter is.
fn router_layer(parameter: &Parameter) -> Option<usize> {
    let layer = parameter.name.strip_prefix("model.layers.")?.strip_suffix(".mlp.moe_statics.e_score_correction_bias")?;
    layer.parse().ok()
}

fn finite(step: u64, what: &'static str, value: f64) -> Result<(), TrainError> {
    if value.is_finite() { Ok(()) } else { Err(TrainError::NotFinite { step, what, value }) }
}
