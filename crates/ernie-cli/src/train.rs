//! `ernie train`: run a recipe, and release its model.
use anyhow::Context;
use ernie_checkpoint::{Checkpoint, SaveDtype, SaveOptions, Tokenizer};
use ernie_eval::explain::{explain, svg};
use ernie_train::data::{self, SourceReport};
use ernie_train::recipe::{Export, ExportDtype};
use ernie_train::sweep::{Figure, Spread, SweepReport};
use ernie_train::{Precision, Profile, Recipe, Report, Sweep, TrainOptions, memory, snapshot};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::arguments::too_many_threads;
use crate::card::{self, Card};
use crate::inspect;
use crate::interrupt::Interrupt;
use crate::outcome::Outcome;

/// Train a model by a recipe
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Train a model by a recipe: one TOML file that names everything, from the sources of text to the learning rate. The recipe is \
        checked before anything is read; then the tokenizer is trained and the text tokenised (both kept for the next time), and training \
        begins.\n\n\
        Ctrl-C writes a checkpoint and stops; the same command goes on from there, as it does after a crash, with the same result to the \
        last bit. A second Ctrl-C stops at once, with the loss of the work since the last checkpoint.\n\n\
        In the recipe's output folder: checkpoints/, metrics.jsonl, tensorboard/, loss.svg, and at the end model/. If the recipe has an \
        [export] section, the finished model is then written there in the form it asks for, with a model card.",
    after_long_help = "Examples:\n  \
        ernie train recipes/nano.toml --data path/to/data\n  \
        ernie train recipes/nano.toml --data path/to/data --dry-run        check, and show what the data come to\n  \
        ernie train recipes/nano.toml --steps 50 --out runs/trial          a short trial in a folder of its own\n  \
        ernie train recipes/sweeps/priority.toml --sweep                   variants with several seeds each, compared\n  \
        ernie chat --model runs/nano/model                                 talk to the result\n\n\
        The data folder is --data, else the environment variable ERNIE_DATA, else `root` in the recipe."
)]
pub struct TrainArguments {
    /// The recipe; with --sweep, the experiment
    recipe: PathBuf,
    /// RECIPE is an experiment: one recipe in several variants, each with several seeds, trained in turn and compared in report.json and report.html
    #[arg(long, conflicts_with_all = ["steps", "out", "precision", "dry_run"])]
    sweep: bool,
    /// Folder that the recipe's paths start from
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Train for N steps instead of the recipe's length; without the recipe's [export]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Write to this folder instead of the recipe's
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Compute the large products in this precision instead of the recipe's
    #[arg(long, value_enum, value_name = "PRECISION")]
    precision: Option<PrecisionName>,
    /// Check the recipe and show what the data and the memory come to; trains nothing
    #[arg(long)]
    dry_run: bool,
    /// Measure where the time goes, operator by operator, and show it at the end
    #[arg(long, conflicts_with_all = ["sweep", "dry_run"])]
    profile: bool,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// `run.precision` of a recipe, as a flag.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PrecisionName {
    /// Single precision
    F32,
    /// Rounded to 8 bits with scales, gradients stochastically; faster
    Int8Mixed,
}

impl From<PrecisionName> for Precision {
    fn from(name: PrecisionName) -> Self {
        match name {
            PrecisionName::F32 => Self::F32,
            PrecisionName::Int8Mixed => Self::Int8Mixed,
        }
    }
}

/// What `--dry-run` finds.
#[derive(Serialize)]
struct Plan {
    parameters: u64,
    active_parameters: u64,
    steps: u64,
    tokens: u64,
    predicted_peak_bytes: u64,
    memory: memory::Account,
    sources: Vec<SourceReport>,
}

/// What a run came to.
#[derive(Serialize)]
struct Outcomes<'a> {
    #[serde(flatten)]
    report: &'a Report,
    tokens_per_second: f64,
    exported: Option<&'a Path>,
}

/// Makes the thread pool that all kernels share: of the threads given, else of the recipe's, else one per core.
///
/// Training divides thousands of products a step, all from this thread, which is therefore one of the pool: else it would wake another for each, and sleep until
/// that is done.
fn use_threads(given: Option<u16>, of_recipe: Option<usize>) -> anyhow::Result<()> {
    let threads = given.map(usize::from).or(of_recipe).unwrap_or(0);
    let made = rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build_global();
    made.map_err(|error| match given {
        Some(threads) => too_many_threads(threads, &error),
        None => anyhow::anyhow!("no threads to train with: {error}; ask for fewer by --threads or `run.threads` of the recipe"),
    })
}

/// Runs the command, on that many threads if a number is given.
pub fn run(arguments: &TrainArguments, threads: Option<u16>) -> anyhow::Result<()> {
    memory::without_huge_pages();
    if arguments.sweep {
        return sweep(arguments, threads);
    }
    let mut recipe = Recipe::from_file(&arguments.recipe)?;
    if let Some(steps) = arguments.steps {
        recipe.set_steps(steps);
        recipe.export = None;
    }
    if let Some(out) = &arguments.out {
        recipe.run.out = out.clone();
    }
    if let Some(precision) = arguments.precision {
        recipe.run.precision = precision.into();
    }
    use_threads(threads, recipe.run.threads)?;
    if arguments.dry_run {
        return dry_run(arguments, &recipe);
    }
    let interrupt = Interrupt::install()?;
    let working = interrupt.begin();
    let options =
        TrainOptions { data_root: arguments.data.clone(), quiet: arguments.quiet, profile: arguments.profile, stop: interrupt.flag() };
    let report = ernie_train::train(&recipe, &options)?;
    drop(working);
    if !report.finished {
        print_report(arguments, &report, None)?;
        eprintln!("stopped after step {} of {}; the same command goes on from there", report.steps, recipe.total_steps());
        return Err(Outcome::Interrupted.into());
    }
    if let Some(section) = &recipe.export {
        export(arguments, &recipe, section, &report)?;
    }
    print_report(arguments, &report, recipe.export.as_ref().map(|section| section.dir.as_path()))
}

/// Trains what is left of an experiment and shows how its arms compare.
fn sweep(arguments: &TrainArguments, threads: Option<u16>) -> anyhow::Result<()> {
    let sweep = Sweep::from_file(&arguments.recipe)?;
    // A process has one pool: that of the first run.
    use_threads(threads, sweep.runs()?.first().and_then(|first| first.recipe.run.threads))?;
    let interrupt = Interrupt::install()?;
    let working = interrupt.begin();
    let options =
        TrainOptions { data_root: arguments.data.clone(), quiet: arguments.quiet, stop: interrupt.flag(), ..TrainOptions::default() };
    let report = sweep.run(&options, &mut |doing| {
        if !arguments.quiet {
            eprintln!("{doing}");
        }
    })?;
    drop(working);
    if report.finished() {
        sweep.illustrate(&report, &figures(&sweep, &report)?)?;
    }
    if arguments.json {
        write_out(&(serde_json::to_string(&report)? + "\n"))?;
    } else {
        write_out(&sweep_table(&report, &sweep.out))?;
    }
    if !report.finished() {
        eprintln!("stopped after {} of {} runs; the same command goes on from there", report.runs.len(), report.planned);
        return Err(Outcome::Interrupted.into());
    }
    Ok(())
}

/// What the first seed's models with gates or experts chose on the sweep's text.
fn figures(sweep: &Sweep, report: &SweepReport) -> anyhow::Result<Vec<Figure>> {
    let (Some(text), Some(&seed)) = (&sweep.text, sweep.seeds.first()) else { return Ok(Vec::new()) };
    let mut figures = Vec::new();
    for run in report.runs.iter().filter(|run| run.seed == seed) {
        let checkpoint = Checkpoint::open(&run.report.model_dir)?;
        let config = checkpoint.config();
        if config.moe.is_none() && config.mechanisms.context_gate.is_none() {
            continue;
        }
        let tokenizer = Tokenizer::from_dir(&run.report.model_dir)?;
        let ids = tokenizer.encode(text, true)?;
        let arm = &sweep.arms[run.arm].name;
        let explanation = explain(&checkpoint, &ids).with_context(|| format!("cannot show the sweep's text with arm `{arm}`"))?;
        let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.id_to_piece(id).unwrap_or_else(|| id.to_string())).collect();
        figures.push(Figure { caption: format!("{arm}, seed {seed}, token by token"), svg: svg::draw(&explanation, &pieces, arm) });
    }
    Ok(figures)
}

fn sweep_table(report: &SweepReport, out: &Path) -> String {
    let with_error = |spread: Option<Spread>, decimals: usize| match spread {
        None => "-".to_owned(),
        Some(Spread { mean, standard_error: None, .. }) => format!("{mean:.decimals$}"),
        Some(Spread { mean, standard_error: Some(error), .. }) => format!("{mean:.decimals$} ± {error:.decimals$}"),
    };
    let experts = report.arms.iter().any(|arm| arm.overlap.is_some());
    let mut text = format!("{:<24}{:>18}{:>20}{:>16}{:>16}{:>16}", "arm", "loss", "difference", "steps to same", "time to same", "tok/s");
    text += if experts { "           overlap        least used\n" } else { "\n" };
    for arm in &report.arms {
        let against = arm.against_first.as_ref();
        let _ = write!(
            text,
            "{:<24}{:>18}{:>20}{:>16}{:>16}{:>16}",
            arm.name,
            with_error(arm.loss, 4),
            with_error(against.map(|a| a.loss_difference), 4),
            with_error(against.and_then(|a| a.steps_to_same_loss), 2),
            with_error(against.and_then(|a| a.seconds_to_same_loss), 2),
            with_error(arm.tokens_per_second, 0),
        );
        if experts {
            let _ = write!(text, "{:>18}{:>18}", with_error(arm.overlap, 3), with_error(arm.least_used, 2));
        }
        text.push('\n');
    }
    let _ = writeln!(text, "\nreport  {}", out.join("report.html").display());
    text
}

fn dry_run(arguments: &TrainArguments, recipe: &Recipe) -> anyhow::Result<()> {
    let config = ernie_train::model_config(recipe)?;
    let counts = config.parameter_counts();
    recipe.validate(&config, memory::available_bytes())?;
    let root = recipe.data_root(arguments.data.as_deref())?;
    let steps = recipe.total_steps();
    let account = memory::Account::of(recipe, &config);
    let plan = Plan {
        parameters: counts.total,
        active_parameters: counts.active,
        steps,
        tokens: steps * recipe.tokens_per_step(),
        predicted_peak_bytes: account.total(),
        memory: account,
        sources: data::describe(recipe, &data::prepare(recipe, &root, &mut |_| {})?.corpus),
    };
    let text = if arguments.json {
        serde_json::to_string(&plan)? + "\n"
    } else {
        format!(
            "parameters  {} total, {} active per token\nlength      {steps} steps of {} tokens, {} tokens in all\n\
             memory      {} MiB at the peak: {} parameters, {} activations, {} temporaries, {} kept for reuse and base\n\n{}",
            inspect::count(plan.parameters),
            inspect::count(plan.active_parameters),
            recipe.tokens_per_step(),
            inspect::count(plan.tokens),
            plan.predicted_peak_bytes >> 20,
            account.parameters >> 20,
            account.activations >> 20,
            account.temporaries >> 20,
            (account.kept + account.base) >> 20,
            data::report_table(&plan.sources)
        )
    };
    write_out(&text)
}

fn print_report(arguments: &TrainArguments, report: &Report, exported: Option<&Path>) -> anyhow::Result<()> {
    let tokens_per_second = report.tokens as f64 / report.seconds.max(f64::MIN_POSITIVE);
    if arguments.json {
        return write_out(&(serde_json::to_string(&Outcomes { report, tokens_per_second, exported })? + "\n"));
    }
    let mut out = format!(
        "steps     {}\ntokens    {}\ntime      {}, {tokens_per_second:.0} tok/s\nmodel     {}\n",
        report.steps,
        report.tokens,
        card::duration(report.seconds),
        report.model_dir.display()
    );
    if let Some(bytes) = report.peak_rss_bytes {
        let _ = writeln!(out, "memory    {} MiB at most", bytes >> 20);
    }
    if let Some(dir) = exported {
        let _ = writeln!(out, "exported  {}", dir.display());
    }
    if !report.validation.is_empty() {
        let _ = writeln!(out, "\n{:<24}{:>10}{:>14}", "validation", "loss", "perplexity");
        for (source, loss) in &report.validation {
            let _ = writeln!(out, "{source:<24}{loss:>10.4}{:>14.2}", loss.exp());
        }
    }
    if let Some(profile) = &report.profile {
        out += &profile_table(profile);
    }
    write_out(&out)
}

/// Seconds and shares; the rows make up the last line.
fn profile_table(profile: &Profile) -> String {
    let whole = profile.seconds();
    let share = |seconds: f64| 100.0 * seconds / whole.max(f64::MIN_POSITIVE);
    let mut text = format!("\n{:<20}{:>10}{:>10}{:>10}{:>9}\n", "time, s", "forward", "backward", "both", "share");
    for (name, passes, seconds) in profile.rows() {
        let [forward, backward] = passes.map_or([const { String::new() }; 2], |passes| passes.map(|seconds| format!("{seconds:.2}")));
        let _ = writeln!(text, "{:<20}{forward:>10}{backward:>10}{seconds:>10.2}{:>8.1}%", name.replace('_', " "), share(seconds));
    }
    let steps = format!("{} steps and all", profile.steps);
    let _ = writeln!(text, "{steps:<40}{whole:>10.2}{:>8.1}%", share(whole));
    text
}

fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes the finished model where the recipe's `[export]` says, in its dtype, with a card that describes these very weights.
fn export(arguments: &TrainArguments, recipe: &Recipe, section: &Export, report: &Report) -> anyhow::Result<()> {
    let say = |what: &str| {
        if !arguments.quiet {
            eprintln!("{what}");
        }
    };
    let dir = &section.dir;
    say(&format!("exporting to {}", dir.display()));
    save_as(&report.model_dir, dir, section.dtype).with_context(|| format!("cannot export to {}", dir.display()))?;
    let curve = recipe.run.out.join("loss.svg");
    let svg = std::fs::read(&curve).with_context(|| format!("cannot read the loss curve {}", curve.display()))?;
    ernie_checkpoint::atomic_write(&dir.join("loss.svg"), &svg)?;

    say("scoring the exported weights");
    let exported = Checkpoint::open(dir)?;
    let corpus = data::prepare(recipe, &recipe.data_root(arguments.data.as_deref())?, &mut |_| {})?.corpus;
    let card = Card {
        recipe,
        recipe_file: &arguments.recipe,
        report,
        dir,
        dtype: dtype_name(section.dtype),
        sources: data::describe(recipe, &corpus),
        validation: ernie_train::evaluate(recipe, &exported, &corpus)?,
        samples: card::samples(dir)?,
        config: exported.config(),
        weight_bytes: exported.file_bytes(),
    };
    ernie_checkpoint::atomic_write(&dir.join("MODEL_CARD.md"), card.markdown().as_bytes())?;
    Ok(())
}

/// Copies a model directory into another dtype: weights, configuration, tokenizer.
fn save_as(from: &Path, to: &Path, dtype: ExportDtype) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(from)?;
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name)?;
        tensors.push((name.to_owned(), tensor.shape.clone(), tensor.to_f32()?.into()));
    }
    let dtype = match dtype {
        ExportDtype::F32 => SaveDtype::F32,
        ExportDtype::Bf16 => SaveDtype::Bf16,
        ExportDtype::Int8 => SaveDtype::Int8PerChannel,
    };
    ernie_checkpoint::save(to, checkpoint.config(), tensors, &SaveOptions { dtype, ..SaveOptions::default() })?;
    snapshot::copy_tokenizer(from, to)?;
    Ok(())
}

fn dtype_name(dtype: ExportDtype) -> &'static str {
    match dtype {
        ExportDtype::F32 => "f32",
        ExportDtype::Bf16 => "bf16",
        ExportDtype::Int8 => "int8, one scale per output channel (norms, biases and routers in f32)",
    }
}
