//! What guessing ahead brings: tokens per second of greedy answers to a prompt, with and without, and whether they are the same.
//!
//! cargo run --release -p ernie-engine --example drafts -- MODEL [TEXT]
//!
//! TEXT is a file whose tokens are the prompt; without one, three times the same random tokens.
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ernie_checkpoint::{Checkpoint, Tokenizer};
use ernie_engine::{DraftOptions, Engine, EngineEvent, EngineOptions, Model, Request, SamplingParams};

/// Tokens of the answer.
const ANSWER: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: drafts MODEL [TEXT]")?;
    let model = Arc::new(Model::load(&Checkpoint::open(Path::new(&dir))?)?);
    let prompt = match arguments.next() {
        Some(text) => Tokenizer::from_dir(Path::new(&dir))?.encode(&std::fs::read_to_string(text)?, true)?,
        None => (0..192).map(|i| (i % 64) * 7919 % model.config().vocab_size as u32).collect(),
    };
    let mut rates = Vec::new();
    let mut answers = Vec::new();
    for max_tokens in [0, 12, 0, 12] {
        let options = EngineOptions { drafts: DraftOptions { max_tokens }, prefix_cache: false, ..EngineOptions::default() };
        let mut engine = Engine::new(Arc::clone(&model), options)?;
        let params = SamplingParams { max_tokens: ANSWER, ignore_eos: true, ..SamplingParams::greedy() };
        engine.submit(Request { prompt: prompt.clone(), params, logprobs: None })?;
        let (mut tokens, mut began) = (Vec::new(), None);
        while !engine.is_idle() {
            for event in engine.step() {
                if let EngineEvent::Token { token, .. } = *event {
                    began.get_or_insert_with(Instant::now);
                    tokens.push(token);
                }
            }
        }
        let rate = (tokens.len() - 1) as f64 / began.map_or(f64::NAN, |began| began.elapsed().as_secs_f64());
        let drafts = engine.draft_stats();
        println!("guesses up to {max_tokens:2}: {rate:7.1} tokens/s, {} of {} guessed tokens were right", drafts.right, drafts.guessed);
        rates.push(rate);
        answers.push(tokens);
    }
    println!(
        "{:.2} times as fast; the answers are {}",
        (rates[1] + rates[3]) / (rates[0] + rates[2]),
        if answers[0] == answers[1] { "the same" } else { "DIFFERENT" }
    );
    Ok(())
}
