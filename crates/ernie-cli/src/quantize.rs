//! `ernie quantize`: a model in 8 bits, its experts perhaps in 4.
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write as _};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::builder::TypedValueParser;
use ernie_checkpoint::{Checkpoint, QuantizeOptions, QuantizeProgress, QuantizeScheme, QuantizeSummary, quantize};
use serde::Serialize;

use crate::interrupt::Interrupt;
use crate::outcome::Outcome;

/// Round a model's weights to 8 bits: a quarter of the size, and faster
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Round a model's weights to 8 bits: a quarter of the size of 32-bit weights, half of 16-bit ones, and faster by about as much. Every \
        projection, the embedding and the head become symmetric integers with one scale per output channel; when the model is run, activations \
        too are rounded, per token. Norms, biases and routers stay 32-bit. With --scheme w4a8 the routed experts, most of a mixture's weights, \
        become 4-bit integers with one scale for each 32 inputs of an output (--group-size): half of the size again, at some loss.\n\n\
        The result is a model directory like any other, in the compressed-tensors convention. Weights are read, rounded and written piece by \
        piece, so memory is no matter. OUT becomes a model only when everything is written: Ctrl-C, a kill or a full disk leave nothing in it.",
    after_long_help = "Examples:\n  \
        ernie quantize path/to/model path/to/model-int8\n  \
        ernie quantize path/to/model path/to/model-int4 --scheme w4a8\n  \
        ernie quantize path/to/model path/to/model-int8 --json\n  \
        ernie generate --model path/to/model-int8 \"Once upon a time\"\n\n\
        --json prints one object: out, elements, source_bytes, bytes, seconds, relative_errors (by kind of matrix, the root mean square of what \
        rounding changed over that of the weights)."
)]
pub struct QuantizeArguments {
    /// Directory of the model
    dir: PathBuf,
    /// Directory to write, made if missing
    out: PathBuf,
    /// How weights and activations are rounded
    #[arg(long, value_enum, default_value_t = Scheme::W8a8)]
    scheme: Scheme,
    /// Weights of a row that share a scale, for w4a8: 32, 64 or 128
    #[arg(long, value_name = "N", value_parser = clap::builder::PossibleValuesParser::new(["32", "64", "128"]).map(|n| n.parse::<usize>().expect("a number of the list")))]
    group_size: Option<usize>,
    /// Replace a model that is in OUT already
    #[arg(long)]
    force: bool,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Ways of rounding.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Scheme {
    /// 8-bit weights with a scale per output channel, 8-bit activations with a scale per token
    W8a8,
    /// Routed experts of 4-bit weights with a scale for each few inputs of an output channel; everything else as in w8a8
    W4a8,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    elements: u64,
    source_bytes: u64,
    bytes: u64,
    seconds: f64,
    relative_errors: &'a BTreeMap<&'static str, f64>,
}

/// Runs the command.
pub fn run(arguments: &QuantizeArguments) -> anyhow::Result<()> {
    let QuantizeArguments { dir, out, scheme, group_size, force, quiet, json } = arguments;
    let scheme = match (scheme, group_size) {
        (Scheme::W8a8, None) => QuantizeScheme::W8a8,
        (Scheme::W8a8, Some(_)) => anyhow::bail!("--group-size is for --scheme w4a8; 8-bit weights have one scale for each output channel"),
        (Scheme::W4a8, group) => QuantizeScheme::W4a8 { group: group.unwrap_or(32) },
    };
    let interrupt = Interrupt::install()?;
    crate::model::is_model_directory(dir)?;
    if !force && out.join("config.json").exists() {
        anyhow::bail!("{} holds a model already; choose another directory, or replace it with --force", out.display());
    }
    let source = Checkpoint::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
    let began = Instant::now();
    let mut progress = Progress { began, shown: None, on: !quiet && std::io::stderr().is_terminal() };
    let working = interrupt.begin();
    let result = quantize(&source, Some(dir), out, QuantizeOptions { scheme, ..QuantizeOptions::default() }, &mut |at| {
        progress.show(at);
        if interrupt.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    drop(working);
    progress.end();
    let summary = result.with_context(|| format!("cannot quantize {}", dir.display()))?.ok_or(Outcome::Interrupted)?;
    let seconds = began.elapsed().as_secs_f64();
    let text = if *json {
        let QuantizeSummary { elements, source_bytes, bytes, ref relative_errors } = summary;
        serde_json::to_string(&Output { out, elements, source_bytes, bytes, seconds, relative_errors })? + "\n"
    } else {
        table(&summary, out, seconds)
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

fn table(summary: &QuantizeSummary, out: &Path, seconds: f64) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let share = summary.bytes as f64 / (summary.elements * 4) as f64;
    let mut text = format!(
        "{}: {:.1} MiB instead of {:.1} ({share:.3} of 32-bit weights), in {seconds:.1} s\n\nwhat rounding changed (relative)\n",
        out.display(),
        mib(summary.bytes),
        mib(summary.source_bytes)
    );
    for (kind, error) in &summary.relative_errors {
        text += &format!("{kind:<18} {:>7.3} %\n", error * 100.0);
    }
    text
}

/// A line on standard error that is written over.
struct Progress {
    began: Instant,
    shown: Option<Instant>,
    on: bool,
}

impl Progress {
    fn show(&mut self, at: QuantizeProgress<'_>) {
        if !self.on || self.shown.is_some_and(|shown| shown.elapsed() < Duration::from_millis(100)) {
            return;
        }
        self.shown = Some(Instant::now());
        let (done, seconds) = (at.done as f64 / at.total as f64, self.began.elapsed().as_secs_f64());
        let left = if done > 0.0 { seconds / done - seconds } else { 0.0 };
        let bar = "#".repeat((done * 30.0) as usize);
        let rate = at.done as f64 / seconds / 1e6;
        // Best effort: progress must not fail what it reports on.
        let _ = write!(std::io::stderr(), "\r[{bar:<30}] {:3.0} %  {rate:.0} M weights/s, {left:.0} s left  \x1b[K", done * 100.0);
    }

    fn end(&self) {
        if self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
