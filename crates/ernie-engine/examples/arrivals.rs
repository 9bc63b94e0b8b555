//! Dynamic against static batching: requests arrive at random (Poisson), are computed as they come or batch by batch, and their latencies are compared.
//!
//! cargo run --release -p ernie-engine --example arrivals -- MODEL [requests] [max_batch_size] [share of saturation]
//!
//! Saturation is what static batching reaches when all requests are there at once: beyond it its queue would grow for ever. Both see the same
//! requests at the same times. Latency is from arrival to the last token.
use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ernie_engine::{DraftOptions, Engine, EngineEvent, EngineOptions, Model, Request, SamplingParams};

/// Reproducible numbers.
struct Random(u64);

impl Random {
    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, least: usize, most: usize) -> usize {
        least + (self.uniform() * (most - least) as f64) as usize
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: arrivals MODEL [requests] [max_batch_size] [share of saturation]")?;
    let mut number = |default: f64| arguments.next().map_or(Ok(default), |text| text.parse::<f64>());
    let (count, max_batch_size, share) = (number(120.0)? as usize, number(8.0)? as usize, number(0.7)?);
    let model = Arc::new(Model::load(&ernie_checkpoint::Checkpoint::open(Path::new(&dir))?)?);
    let vocab = model.config().vocab_size;
    let random = &mut Random(7);
    let requests: Vec<Request> = (0..count)
        .map(|_| {
            let prompt = (0..random.between(8, 128)).map(|_| random.between(0, vocab) as u32).collect();
            let params = SamplingParams { max_tokens: random.between(8, 128), ignore_eos: true, ..SamplingParams::greedy() };
            Request { prompt, params, logprobs: None }
        })
        .collect();
    let options = EngineOptions { max_batch_size, drafts: DraftOptions { max_tokens: 0 }, prefix_cache: false, ..EngineOptions::default() };
    let fixed = EngineOptions { dynamic_batching: false, ..options };
    let at_once = vec![0.0; count];
    let (_, seconds) = run(&model, fixed, &requests, &at_once)?;
    let (_, dynamic_seconds) = run(&model, options, &requests, &at_once)?;
    let saturation = count as f64 / seconds;
    println!(
        "all at once: static {saturation:.2} requests/s, dynamic {:.2} ({:.2}x)",
        count as f64 / dynamic_seconds,
        seconds / dynamic_seconds
    );
    let mut now = 0.0;
    let arrivals: Vec<f64> = (0..count)
        .map(|_| {
            now -= random.uniform().ln() / (share * saturation);
            now
        })
        .collect();
    let (waiting, _) = run(&model, fixed, &requests, &arrivals)?;
    let (joining, _) = run(&model, options, &requests, &arrivals)?;
    println!("at {:.0} % of static saturation, latency in s:      mean      p50      p99", share * 100.0);
    for (name, latencies) in [("static", &waiting), ("dynamic", &joining)] {
        let (mean, p50, p99) = summary(latencies);
        println!("{name:<42} {mean:>12.3} {p50:>8.3} {p99:>8.3}");
    }
    let (fixed, joined) = (summary(&waiting), summary(&joining));
    println!("dynamic / static{:>39.3} {:>8.3} {:>8.3}", joined.0 / fixed.0, joined.1 / fixed.1, joined.2 / fixed.2);
    Ok(())
}

/// Latency of each request, and seconds until the last was done.
fn run(model: &Arc<Model>, options: EngineOptions, requests: &[Request], arrivals: &[f64]) -> Result<(Vec<f64>, f64), Box<dyn Error>> {
    let mut engine = Engine::new(Arc::clone(model), options)?;
    let (mut next, mut of) = (0, HashMap::new());
    let mut latencies = vec![0.0; requests.len()];
    let began = Instant::now();
    while next < requests.len() || !engine.is_idle() {
        while next < requests.len() && arrivals[next] <= began.elapsed().as_secs_f64() {
            of.insert(engine.submit(requests[next].clone())?, next);
            next += 1;
        }
        if engine.is_idle() {
            std::thread::sleep(std::time::Duration::from_micros(200));
            continue;
        }
        for event in engine.step() {
            if let EngineEvent::Finished { id, .. } = event {
                latencies[of[id]] = began.elapsed().as_secs_f64() - arrivals[of[id]];
            }
        }
    }
    Ok((latencies, began.elapsed().as_secs_f64()))
}

/// Mean, median and 99th percentile.
fn summary(latencies: &[f64]) -> (f64, f64, f64) {
    let mut sorted = latencies.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    (sorted.iter().sum::<f64>() / sorted.len() as f64, at(0.5), at(0.99))
}
