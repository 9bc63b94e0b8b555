//! `ernie bench`: how fast a model is on this machine, and how much of the machine that is.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Instant;

use ernie_engine::{Cost, DraftOptions, Engine, EngineEvent, EngineOptions, Limits, Model, Request, SamplingParams, Session};
use serde::Serialize;

mod kernels;

use self::kernels::Kernels;
use crate::compute::ComputeArguments;
use crate::interrupt::Interrupt;
use crate::model::ModelArgument;
use crate::outcome::{self, Outcome};

/// Measure a model's speed and the share of this machine that it uses
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Measure a model's speed and the share of this machine that it uses. First the machine's own limits are measured: reading memory, \
        8-bit and 32-bit arithmetic. Then prompts are computed and tokens generated, alone and for several requests together, without guessing \
        ahead. Tokens are random: speed does not depend on them.\n\n\
        The limit that a share refers to is the least time for what cannot be avoided: every weight in use read once, every multiplication done \
        once. Limits are measured before and after, and their mean counts, for a shared machine is not the same twice.",
    after_long_help = "Examples:\n  \
        ernie bench                                        the built-in model\n  \
        ernie bench --model path/to/model --batch 1,4,16\n  \
        ernie bench --model path/to/model --weights int8   rounded to 8 bits while loading\n  \
        ernie bench --model path/to/model --kernels        where the time goes\n  \
        ernie bench --model path/to/model --json\n\n\
        --json prints one object: limits {bandwidth_gb_s, int8_gop_s, f32_gflop_s}, prefill {tokens_per_s, min, max, share_of_limit}, decode \
        (the same by batch size), kernels (with --kernels: for prefill and each batch size {part: {seconds, share_of_time, share_of_limit}}), kv_cache_mib (keys and values of the largest batch at the end), first_token_s, load_s, peak_rss_mib."
)]
pub struct BenchArguments {
    #[command(flatten)]
    model: ModelArgument,
    #[command(flatten)]
    compute: ComputeArguments,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pp: u32,
    /// Tokens generated for each request
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    tg: u32,
    /// Tokens of the prompts that are continued: short, so that it is generation that is measured, or long, to measure it far into a text
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    context: u32,
    /// Requests generated together, a run for each number
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 16], value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: Vec<u32>,
    /// Times that each run is repeated; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Also show where the time goes, by kernel, with the share of the limit that binds each
    #[arg(long)]
    kernels: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    model: String,
    threads: usize,
    limits: LimitsOutput,
    prefill: Rate,
    decode: BTreeMap<u32, Rate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<Kernels>,
    kv_cache_mib: f64,
    first_token_s: f64,
    load_s: f64,
    peak_rss_mib: Option<f64>,
}

#[derive(Serialize)]
struct LimitsOutput {
    bandwidth_gb_s: f64,
    int8_gop_s: f64,
    f32_gflop_s: f64,
}

/// Tokens per second: the median, the slowest and the fastest run, and the median as a share of what the machine could do.
#[derive(Serialize)]
struct Rate {
    tokens_per_s: f64,
    min: f64,
    max: f64,
    share_of_limit: f64,
}

/// Runs the command.
pub fn run(arguments: &BenchArguments) -> anyhow::Result<()> {
    let interrupt = Interrupt::install()?;
    let working = interrupt.begin();
    let stop = || if interrupt.stopped() { Err(anyhow::Error::from(Outcome::Interrupted)) } else { Ok(()) };
    let name = arguments.model.name();
    let (pp, tg, context) = (arguments.pp as usize, arguments.tg as usize, arguments.context as usize);
    let most = arguments.model.config()?.max_position_embeddings;
    if pp > most || tg + context > most {
        return Err(outcome::usage(format!("--pp {pp}, --tg {tg}, --context {context}: {name} was made for at most {most} tokens")));
    }
    let pool = ernie_engine::Pool::new(rayon::current_num_threads());
    let before = Limits::measure(&pool)?;
    drop(pool);
    // What measuring the limits took is not the model's.
    let counted_anew = std::fs::write("/proc/self/clear_refs", "5").is_ok();

    let began = Instant::now();
    let model = Arc::new(arguments.compute.load(&arguments.model)?);
    let load_s = began.elapsed().as_secs_f64();
    prefill(&mut Session::new(&model, 16.min(most))?, 16.min(most))?;
    let first_token_s = began.elapsed().as_secs_f64();

    // Each first run is without the clock: the system gives a cache its memory when it is written for the first time.
    let mut session = Session::new(&model, pp)?;
    prefill(&mut session, pp)?;
    let mut prefills = Vec::new();
    for _ in 0..arguments.repeat {
        stop()?;
        prefills.push(pp as f64 / prefill(&mut session, pp)?);
    }
    let mut profiles = kernels::Profiles::default();
    if arguments.kernels {
        session.set_profile(true);
        prefill(&mut session, pp)?;
        profiles.prefill(pp, *session.profile());
    }
    drop(session);
    let (mut decodes, mut kv_bytes) = (BTreeMap::new(), 0);
    for &batch in &arguments.batch {
        let mut rates = Vec::new();
        let mut engine = engine(&model, batch as usize, context, tg)?;
        kv_bytes = kv_bytes.max(decode(&mut engine, batch as usize, context, tg, false)?.kv_bytes);
        for _ in 0..arguments.repeat {
            stop()?;
            rates.push((tg * batch as usize) as f64 / decode(&mut engine, batch as usize, context, tg, false)?.seconds);
        }
        if arguments.kernels {
            decode(&mut engine, batch as usize, context, tg, true)?;
            profiles.decode(batch, context as f64 + tg as f64 / 2.0, tg, *engine.profile());
        }
        decodes.insert(batch, rates);
    }
    let peak_rss_mib = ernie_train::memory::peak_rss_bytes().filter(|_| counted_anew).map(|bytes| bytes as f64 / f64::from(1 << 20));
    let after = Limits::measure(model.pool())?;
    drop(working);
    let limits = Limits {
        bandwidth_gb_s: f64::midpoint(before.bandwidth_gb_s, after.bandwidth_gb_s),
        int8_gop_s: f64::midpoint(before.int8_gop_s, after.int8_gop_s),
        f32_gflop_s: f64::midpoint(before.f32_gflop_s, after.f32_gflop_s),
    };
    let cost = Cost::of(&model);
    let decode = decodes.into_iter().map(|(batch, rates)| {
        let limit = f64::from(batch) / cost.decode_seconds(&limits, batch as usize, context as f64 + tg as f64 / 2.0);
        (batch, Rate::of(rates, limit))
    });
    let output = Output {
        model: name,
        threads: model.threads(),
        prefill: Rate::of(prefills, pp as f64 / cost.prefill_seconds(&limits, pp)),
        decode: decode.collect(),
        kernels: arguments.kernels.then(|| profiles.against(&model, &limits)),
        kv_cache_mib: kv_bytes as f64 / f64::from(1 << 20),
        limits: LimitsOutput { bandwidth_gb_s: limits.bandwidth_gb_s, int8_gop_s: limits.int8_gop_s, f32_gflop_s: limits.f32_gflop_s },
        first_token_s,
        load_s,
        peak_rss_mib,
    };
    let text = if arguments.json { serde_json::to_string(&output)? + "\n" } else { output.table(pp, tg, context) };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

/// Random tokens, the same each time.
fn tokens(model: &Model, count: usize, seed: usize) -> Vec<u32> {
    let vocab = model.config().vocab_size;
    (0..count).map(|i| ((i + 1) * 7919 + seed * 104_729) % vocab).map(|id| id as u32).collect()
}

/// Seconds for a prompt of `count` tokens.
fn prefill(session: &mut Session<'_>, count: usize) -> anyhow::Result<f64> {
    let tokens = tokens(session.model(), count, 0);
    session.truncate(0);
    let began = Instant::now();
    session.prefill(&tokens)?;
    Ok(began.elapsed().as_secs_f64())
}

/// An engine for `batch` requests of `count` tokens after a prompt of `context`.
fn engine(model: &Arc<Model>, batch: usize, context: usize, count: usize) -> anyhow::Result<Engine> {
    let options = EngineOptions {
        max_batch_size: batch,
        token_budget: batch * context,
        drafts: DraftOptions { max_tokens: 0 },
        prefix_cache: false,
        // Room for all of them, so that nobody is put off.
        cache_bytes: usize::MAX,
        max_len: count + context,
        ..EngineOptions::default()
    };
    Ok(Engine::new(Arc::clone(model), options)?)
}

/// What generating came to.
struct Decoded {
    seconds: f64,
    /// Keys and values in use, at most.
    kv_bytes: usize,
}

/// `count` tokens for each of `batch` requests, from the second token on; with `profile` the engine's profile is then theirs.
fn decode(engine: &mut Engine, batch: usize, context: usize, count: usize, profile: bool) -> anyhow::Result<Decoded> {
    for seed in 0..batch {
        let params = SamplingParams { max_tokens: count + 1, ignore_eos: true, ..SamplingParams::greedy() };
        let prompt = tokens(engine.model(), context, seed);
        engine.submit(Request { prompt, params, logprobs: None })?;
    }
    engine.step();
    engine.set_profile(profile);
    let mut kv_bytes = engine.kv_bytes_in_use();
    let began = Instant::now();
    while !engine.is_idle() {
        kv_bytes = kv_bytes.max(engine.kv_bytes_in_use());
        if let Some(EngineEvent::Failed { token, value, .. }) = engine.step().iter().find(|e| matches!(e, EngineEvent::Failed { .. })) {
            anyhow::bail!("the logit of token {token} is {value}: the model's weights are damaged (try `ernie inspect`)");
        }
    }
    Ok(Decoded { seconds: began.elapsed().as_secs_f64(), kv_bytes })
}

impl Rate {
    fn of(mut rates: Vec<f64>, limit: f64) -> Self {
        rates.sort_by(f64::total_cmp);
        let tokens_per_s = rates[rates.len() / 2];
        Rate { tokens_per_s, min: rates[0], max: rates[rates.len() - 1], share_of_limit: tokens_per_s / limit }
    }
}

impl Output {
    fn table(&self, pp: usize, tg: usize, context: usize) -> String {
        let mut out = String::new();
        let limits = &self.limits;
        let _ = writeln!(out, "{}, {} threads", self.model, self.threads);
        let _ = writeln!(
            out,
            "this machine: {:.1} GB/s from memory, {:.0} Gop/s in 8 bits, {:.0} GFLOP/s in 32 bits\n",
            limits.bandwidth_gb_s, limits.int8_gop_s, limits.f32_gflop_s
        );
        let _ = writeln!(out, "{:<28} {:>10} {:>19} {:>15}", "", "tokens/s", "slowest - fastest", "share of limit");
        let mut line = |what: String, rate: &Rate| {
            let spread = format!("{:.1} - {:.1}", rate.min, rate.max);
            let share = format!("{:.0} %", rate.share_of_limit * 100.0);
            let _ = writeln!(out, "{what:<28} {:>10.1} {spread:>19} {share:>15}", rate.tokens_per_s);
        };
        line(format!("prompt of {pp}"), &self.prefill);
        for (batch, rate) in &self.decode {
            let requests = if *batch == 1 { "1 request".to_owned() } else { format!("{batch} requests together") };
            line(format!("{tg} tokens, {requests}"), rate);
        }
        let batch = self.decode.keys().max().copied().unwrap_or(0);
        let _ = writeln!(out, "\nkeys and values of {} tokens for each of {batch}: {:.1} MiB", context + tg, self.kv_cache_mib);
        let _ = writeln!(out, "loaded in {:.2} s, first token of a short prompt after {:.2} s", self.load_s, self.first_token_s);
        if let Some(mib) = self.peak_rss_mib {
            let _ = writeln!(out, "peak memory {mib:.0} MiB");
        }
        if let Some(kernels) = &self.kernels {
            kernels.write(&mut out, pp, tg);
        }
        out
    }
}
