//! Trains a model directory on given batches and prints losses, times and memory as one line of JSON: our side of
//! `benchmarks/training/compare.py`, which runs it beside PyTorch.
//!
//! The step is the trainer's (`src/trainer.rs`) without the data pipeline and the telemetry: loss, backward, AdamW, and clipping only if
//! asked for.
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use ernie_checkpoint::Checkpoint;
use ernie_model::{Ernie, LossWeights, PackedBatch, ops::Precision};
use ernie_train::{
    memory,
    optimizer::{self, AdamW, AdamWConfig},
};

// As in the binary: which allocator large buffers come from is part of the speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The peers have the same (`benchmarks/training/peer.py`); the comparison of losses fails when they do not.
const LR: f64 = 3e-4;
const ADAMW: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

const USAGE: &str = "usage: training_speed --model DIR --ids FILE --rows N --length N --warm N --steps N [--threads N] [--clip NORM] \
                     [--precision f32|int8-mixed] [--recompute yes|no]

  --ids FILE      little-endian u32, batch after batch, each of `rows` rows of `length` + 1 tokens
  --warm, --steps steps before the timed ones, and timed steps
  --clip NORM     clip gradients to this global norm; 0, the default, does not even compute it";

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("training_speed: {reason}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug)]
struct Options {
    model: PathBuf,
    ids: PathBuf,
    rows: usize,
    length: usize,
    warm: usize,
    steps: usize,
    threads: usize,
    clip: f64,
    precision: Precision,
    recompute: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut model, mut ids, mut clip, mut precision, mut recompute) = (None, None, 0.0, Precision::F32, false);
        let (mut rows, mut length, mut warm, mut steps, mut threads) = (0, 0, 0, 0, 0);
        while let Some(flag) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{flag} has no value\n{USAGE}"))?;
            let size = || value.parse::<usize>().map_err(|_| format!("{flag}: expected a whole number, got {value}"));
            match flag.as_str() {
                "--model" => model = Some(PathBuf::from(value)),
                "--ids" => ids = Some(PathBuf::from(value)),
                "--rows" => rows = size()?,
                "--length" => length = size()?,
                "--warm" => warm = size()?,
                "--steps" => steps = size()?,
                "--threads" => threads = size()?,
                "--clip" => clip = value.parse().map_err(|_| format!("--clip: expected a number, got {value}"))?,
                "--recompute" => {
                    recompute = match value.as_str() {
                        "yes" => true,
                        "no" => false,
                        _ => return Err(format!("--recompute: expected yes or no, got {value}")),
                    }
                }
                "--precision" => {
                    precision = match value.as_str() {
                        "f32" => Precision::F32,
                        "int8-mixed" => Precision::Int8Mixed,
                        _ => return Err(format!("--precision: expected f32 or int8-mixed, got {value}")),
                    }
                }
                _ => return Err(format!("unknown flag {flag}\n{USAGE}")),
            }
        }
        let (Some(model), Some(ids), 1.., 1.., 1..) = (model, ids, rows, length, steps) else {
            return Err(format!("--model, --ids, --rows, --length and --steps are needed\n{USAGE}"));
        };
        Ok(Self { model, ids, rows, length, warm, steps, threads, clip, precision, recompute })
    }
}

fn run(options: &Options) -> Result<serde_json::Value, String> {
    memory::without_huge_pages();
    // 0 threads: rayon's default, all of the machine's. This one among them, as in `ernie train`.
    rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .use_current_thread()
        .build_global()
        .map_err(|error| format!("--threads: {error}"))?;
    let mut batches = Batches::open(options)?;
    let mut model = load(&options.model)?;
    model.set_precision(options.precision);
    model.reserve_positions(options.length);
    let mut adamw = AdamW::new(ADAMW);

    let (mut losses, mut seconds) = (Vec::new(), Vec::new());
    for _ in 0..options.warm + options.steps {
        let start = Instant::now();
        let batch = batches.next()?;
        let (loss, gradients) = model.loss_and_gradients(&batch, &LossWeights::default(), 1.0, options.recompute);
        let scale = if options.clip > 0.0 { optimizer::clip_scale(optimizer::global_norm(&gradients), options.clip) } else { 1.0 };
        model = adamw.update(model, LR, gradients, scale, |_, _| {});
        losses.push(loss.cross_entropy);
        seconds.push(start.elapsed().as_secs_f64());
    }

    let tokens = (options.rows * options.length) as f64;
    Ok(serde_json::json!({
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": tokens / median(&seconds[options.warm..]),
        "peak_rss_mib": memory::peak_rss_bytes().ok_or("/proc/self/status has no VmHWM")? as f64 / (1 << 20) as f64,
        "threads": rayon::current_num_threads(),
    }))
}

/// The checkpoint is closed again here, so that its mapping does not count as memory of the training.
fn load(dir: &Path) -> Result<Ernie, String> {
    let checkpoint = Checkpoint::open(dir).map_err(|error| error.to_string())?;
    Ernie::load(&checkpoint, &ernie_model::training_device()).map_err(|error| error.to_string())
}

/// The batches of an id file, one at a time.
struct Batches {
    file: File,
    path: PathBuf,
    rows: usize,
    length: usize,
}

impl Batches {
    fn open(options: &Options) -> Result<Self, String> {
        let path = options.ids.clone();
        let mut file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let bytes = file.seek(SeekFrom::End(0)).and_then(|bytes| file.rewind().map(|()| bytes));
        let bytes = bytes.map_err(|error| format!("{}: {error}", path.display()))?;
        let per_batch = (options.rows * (options.length + 1) * 4) as u64;
        let (has, needs) = (bytes / per_batch, (options.warm + options.steps) as u64);
        if has < needs {
            return Err(format!("{}: holds {has} batches, --warm and --steps need {needs}", path.display()));
        }
        Ok(Self { file, path, rows: options.rows, length: options.length })
    }

    /// Each row is one document whose last target is the token after it.
    fn next(&mut self) -> Result<PackedBatch, String> {
        let mut bytes = vec![0; self.rows * (self.length + 1) * 4];
        self.file.read_exact(&mut bytes).map_err(|error| format!("{}: {error}", self.path.display()))?;
        let tokens: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let rows = || tokens.chunks_exact(self.length + 1);
        Ok(PackedBatch {
            ids: rows().flat_map(|row| &row[..self.length]).copied().collect(),
            targets: rows().flat_map(|row| &row[1..]).map(|&id| id as i32).collect(),
            cu_seqlens: (0..=self.rows).map(|row| (row * self.length) as u32).collect(),
            ..PackedBatch::default()
        })
    }
}

/// Of an even count the mean of the two in the middle, as Python's `statistics.median`.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}
