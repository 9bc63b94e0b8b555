//! How long the engine's thread is held up by a grammar, for each token of an answer: `cargo run --release -p ernie-serve --example mask_speed`.
//!
//! Answers are random walks through what is allowed, with the embedded model's vocabulary, and with one of the size that the released models have, made of
//! pairs of its pieces.
use std::path::Path;
use std::time::Instant;

use ernie_checkpoint::{Tokenizer, TokenizerError};
use ernie_engine::{Constraint, TokenSet};
use ernie_serve::{Form, Grammars, Rule};
use serde_json::{Value, json};

/// Answers to each form, and most tokens of one.
const ANSWERS: usize = 20;
const MOST: usize = 300;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano/tokenizer.json"))?;
    let small: Value = serde_json::from_str(&text)?;
    for (name, tokenizer) in [("nano", tokenizer(&small)?), ("as large as the released", tokenizer(&enlarged(small.clone(), 100_000))?)] {
        let began = Instant::now();
        let vocab = tokenizer.vocab_size();
        let grammars = Grammars::new(&tokenizer, vocab, &[2, 4])?;
        println!("{name}: {vocab} tokens, prepared in {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
        println!("{:32} {:>10} {:>8} {:>9} {:>9} {:>9} {:>9}", "microseconds", "compile", "tokens", "mean", "median", "99%", "most");
        for (name, rule) in rules() {
            measure(&grammars, name, rule, vocab as u32)?;
        }
    }
    Ok(())
}

fn tokenizer(json: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_tokenizer_json(json.to_string().as_bytes(), "tokenizer.json")
}

/// The same with pairs of its pieces as further ones.
fn enlarged(mut json: Value, size: usize) -> Value {
    if let Some(vocab) = json["model"]["vocab"].as_object_mut() {
        let pieces: Vec<String> = vocab.keys().filter(|piece| !piece.starts_with('<') && piece.len() < 8).cloned().collect();
        let mut random = Random(7);
        while vocab.len() < size {
            let pair = [0, 1].map(|_| pieces[random.below(pieces.len())].as_str()).concat();
            let id = vocab.len();
            vocab.entry(pair).or_insert_with(|| json!(id));
        }
    }
    json
}

fn rules() -> Vec<(&'static str, Rule)> {
    let word = json!({"type": "string", "maxLength": 40});
    let person = json!({"type": "object", "properties": {"name": word, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": word, "maxItems": 5}}, "required": ["name", "age", "tags"], "additionalProperties": false});
    vec![
        ("JSON schema", Rule::Json(json!({"type": "array", "items": person, "maxItems": 5}))),
        ("any JSON object", Rule::Json(json!({"type": "object"}))),
        ("regex of digits", Rule::Regex("[0-9]{1,200}".to_owned())),
        ("any text", Rule::Regex("(?s:.*)".to_owned())),
        ("grammar of sums", Rule::Lark("start: sum\nsum: term (\"+\" term)*\nterm: /[0-9]+/ | \"(\" sum \")\"".to_owned())),
        ("ambiguous grammar", Rule::Lark("start: a\na: a a | \"x\" | \"xx\" | \"(\" a \")\"".to_owned())),
        ("hard regex", Rule::Regex("(.{1,60},){1,60}([a-z]|[a-f]+x){1,99}end".to_owned())),
    ]
}

fn measure(grammars: &Grammars, name: &str, rule: Rule, vocab: u32) -> Result<(), Box<dyn std::error::Error>> {
    let began = Instant::now();
    let form = Form { rule: Some(rule), ..Form::default() };
    let Some(first) = grammars.compile(&form)? else { return Ok(()) };
    let compile = began.elapsed();
    let (mut times, mut random, mut allowed) = (Vec::new(), Random(3), TokenSet::default());
    let mut ended = String::new();
    'answers: for _ in 0..ANSWERS {
        // As each answer of a request: what was computed for one serves all.
        let mut constraint = first.clone();
        for _ in 0..MOST {
            allowed.clear();
            let began = Instant::now();
            let asked = constraint.allow(&mut allowed);
            let asking = began.elapsed();
            let choices: Vec<u32> = (0..vocab).filter(|token| allowed.contains(*token) && ![2, 4].contains(token)).collect();
            if asked.is_err() || choices.is_empty() {
                ended = asked.err().unwrap_or_default();
                break;
            }
            let token = choices[random.below(choices.len())];
            let began = Instant::now();
            let accepted = constraint.accept(token);
            times.push((asking + began.elapsed()).as_secs_f64() * 1e6);
            if let Err(error) = accepted {
                ended = error;
                break 'answers;
            }
            if constraint.is_complete() {
                break;
            }
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get(((times.len() - 1) as f64 * share) as usize).copied().unwrap_or(f64::NAN);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    println!(
        "{name:32} {:10.0} {:8} {mean:9.1} {:9.1} {:9.1} {:9.1} {ended}",
        compile.as_secs_f64() * 1e6,
        times.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
    Ok(())
}

/// Reproducible numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}
