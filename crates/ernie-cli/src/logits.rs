//! `ernie logits`: the numbers before sampling.
use anyhow::Context;
use ernie_engine::{Model, Session, WeightDtype};
use serde::Serialize;
use std::io::Write;

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
        ernie logits --model path/to/model --ids 3,5,7 --last 3 --dtype f32"
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
    /// Form of the weights in memory: as stored, or converted (sums are 32-bit in any case)
    #[arg(long, value_enum, default_value_t = Dtype::Stored)]
    dtype: Dtype,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Dtype {
    /// bf16 where the file has bf16, else f32
    Stored,
    /// 32-bit
    F32,
    /// 16-bit brain float
    Bf16,
}

#[derive(Serialize)]
struct Output<'a> {
    logits: Vec<&'a [f32]>,
}

/// Runs the command.
pub fn run(arguments: &LogitsArguments) -> anyhow::Result<()> {
    let LogitsArguments { model, ids, last, dtype } = arguments;
    if *last == 0 || *last > ids.len() {
        return Err(outcome::usage(format!("--last {last}: expected a number from 1 to the {} ids given", ids.len())));
    }
    let dtype = match dtype {
        Dtype::Stored => WeightDtype::Auto,
        Dtype::F32 => WeightDtype::F32,
        Dtype::Bf16 => WeightDtype::Bf16,
    };
    let name = model.name();
    let model = Model::load_as(&model.checkpoint()?, dtype).with_context(|| format!("cannot load {name}"))?;
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
