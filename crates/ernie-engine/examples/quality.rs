//! What rounding costs on held-out text: perplexity of several forms of a model, and how far their distributions are from the exact one.
//!
//! cargo run --release -p ernie-engine --example quality -- MODEL TEXT [tokens] [OTHER…]
//!
//! MODEL is computed in f32 (the reference), in 8 bits, and in 8 bits with an 8-bit cache; each OTHER, a directory, as it is stored. TEXT is cut into
//! pieces of 256 tokens. KL is the mean of Σ p ln(p/q) over positions, p being the reference.
use std::error::Error;
use std::path::Path;

use ernie_checkpoint::{Checkpoint, Tokenizer};
use ernie_engine::{KvDtype, LoadOptions, Model, Session, WeightDtype};

/// Tokens that are read together.
const PIECE: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, text, rest @ ..] = arguments.as_slice() else { return Err("usage: quality MODEL TEXT [tokens] [OTHER…]".into()) };
    let (most, others) = match rest.split_first() {
        Some((tokens, others)) => (tokens.parse()?, others),
        None => (8192, &[][..]),
    };
    let ids = Tokenizer::from_dir(Path::new(dir))?.encode(&std::fs::read_to_string(text)?, false)?;
    let pieces: Vec<&[u32]> = ids[..ids.len().min(most)].chunks_exact(PIECE).collect();
    let load = |dir: &str, dtype, kv_dtype| {
        Ok::<_, Box<dyn Error>>(Model::load_with(&Checkpoint::open(Path::new(dir))?, LoadOptions { dtype, threads: 0, kv_dtype })?)
    };
    let reference = load(dir, WeightDtype::F32, Some(KvDtype::F32))?;
    let mut forms = vec![
        ("8-bit weights and activations".to_owned(), load(dir, WeightDtype::Int8, Some(KvDtype::F32))?),
        ("the same, cache in bf16".to_owned(), load(dir, WeightDtype::Int8, Some(KvDtype::Bf16))?),
        ("the same, cache in 8 bits".to_owned(), load(dir, WeightDtype::Int8, Some(KvDtype::Int8))?),
    ];
    for other in others {
        forms.push((other.clone(), load(other, WeightDtype::Auto, None)?));
    }
    let (mut exact_loss, mut count) = (0.0, 0.0);
    let mut sums = vec![(0.0, 0.0, 0.0); forms.len()];
    for piece in &pieces {
        let exact = log_probabilities(&reference, piece)?;
        let others = forms.iter().map(|(_, model)| log_probabilities(model, piece)).collect::<Result<Vec<_>, _>>()?;
        let vocab = reference.config().vocab_size;
        for (position, &next) in piece.iter().enumerate().skip(1) {
            let p = &exact[(position - 1) * vocab..position * vocab];
            exact_loss -= p[next as usize];
            count += 1.0;
            for (other, (loss, kl, same)) in others.iter().zip(&mut sums) {
                let q = &other[(position - 1) * vocab..position * vocab];
                *loss -= q[next as usize];
                *kl += p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                let first = |x: &[f64]| x.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(id, _)| id);
                *same += f64::from(u8::from(first(p) == first(q)));
            }
        }
    }
    println!("{} tokens; f32: loss {:.4}, perplexity {:.3}", count, exact_loss / count, (exact_loss / count).exp());
    println!("{:<34} {:>8} {:>11} {:>9} {:>10} {:>12}", "", "loss", "perplexity", "ratio", "KL", "same choice");
    for ((name, _), (loss, kl, same)) in forms.iter().zip(sums) {
        let perplexity = (loss / count).exp();
        let ratio = perplexity / (exact_loss / count).exp();
        println!("{name:<34} {:>8.4} {perplexity:>11.3} {ratio:>9.4} {:>10.6} {:>10.2} %", loss / count, kl / count, same / count * 100.0);
    }
    Ok(())
}

/// ln softmax of the logits after each token, `[tokens, vocab]`.
fn log_probabilities(model: &Model, ids: &[u32]) -> Result<Vec<f64>, Box<dyn Error>> {
    let logits = Session::new(model, ids.len())?.logits_for(ids, ids.len())?;
    let mut out = Vec::with_capacity(logits.len());
    for row in logits.chunks_exact(model.config().vocab_size) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|logit| f64::from(logit - max).exp()).sum();
        out.extend(row.iter().map(|logit| f64::from(logit - max) - sum.ln()));
    }
    Ok(out)
}
