//! `ernie logits`: the numbers before sampling.
use ernie_engine::Session;
use serde::Serialize;
use std::io::Write;

use crate::compute::ComputeArguments;
use crate::model::ModelArgument;
use crate::outcome;

/// Print the model's logits for token ids, as JSON
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Print the model's logits for token ids, as JSON: {\"logits\": [[…], …]}, one row of vocabulary size for each of the last \
        K positions, in full 32-bit precision. Row j holds the scores of the token that follows position j.\n\n\
        This is how to compare the engine with another implementation.",
    after_long_help = "Examples:\n  \
        ernie logits --ids 3,5,7\n  \
        ernie logits --model path/to/model --ids 3,5,7 --last 3 --weights f32"
)]
pub struct LogitsArguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Token ids, comma-separated
    #[arg(long, value_name = "ID,…", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// How many positions, counted from the end
    #[arg(long, value_name = "K", default_value_t = 1)]
    last: usize,
    #[command(flatten)]
    compute: ComputeArguments,
}

#[derive(Serialize)]
struct Output<'a> {
    logits: Vec<&'a [f32]>,
}

/// Runs the command.
pub fn run(arguments: &LogitsArguments) -> anyhow::Result<()> {
    let LogitsArguments { model, ids, last, compute } = arguments;
    if *last == 0 || *last > ids.len() {
        return Err(outcome::usage(format!("--last {last}: expected a number from 1 to the {} ids given", ids.len())));
    }
    let model = compute.load(model)?;
    // A context as long as the model allows, so that a longer prompt is refused with its number.
    let mut session = Session::new(&model, model.config().max_position_embeddings)?;
    let logits = session.logits_for(ids, *last)?;
    let output = Output { logits: logits.chunks_exact(model.config().vocab_size).collect() };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    serde_json::to_writer(&mut out, &output).map_err(std::io::Error::from)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}
