//! `ernie tokenize`: text to ids and back.
use serde::Serialize;
use std::io::Write;

use crate::encoding;
use crate::model::ModelArgument;

/// Show how a model's tokenizer cuts text into tokens
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Show how a model's tokenizer cuts text into tokens: one line per token with its id and its piece as the vocabulary \
        spells it. With --decode, ids become text.",
    after_long_help = "Examples:\n  \
        ernie tokenize \"Once upon a time\"\n  \
        ernie tokenize \"Once upon a time\" --json\n  \
        ernie tokenize - --model path/to/model < story.txt\n  \
        ernie tokenize --decode 3,5,7\n\n\
        --json prints one object: ids, pieces, text."
)]
pub struct TokenizeArguments {
    /// The text; - reads standard input
    #[arg(required_unless_present = "decode", conflicts_with = "decode", allow_negative_numbers = true)]
    text: Option<String>,
    #[command(flatten)]
    model: ModelArgument,
    /// Token ids to turn into text, comma-separated
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    decode: Option<Vec<u32>>,
    /// Add the special tokens that the tokenizer puts around a text
    #[arg(long)]
    special: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    ids: Vec<u32>,
    pieces: Vec<String>,
    text: String,
}

/// Runs the command.
pub fn run(arguments: &TokenizeArguments) -> anyhow::Result<()> {
    let tokenizer = arguments.model.tokenizer()?;
    let ids = match (&arguments.decode, &arguments.text) {
        (Some(ids), _) => ids.clone(),
        (None, Some(text)) => tokenizer.encode(&encoding::text_or_stdin(text)?, arguments.special)?,
        (None, None) => unreachable!("clap asks for one of the two"),
    };
    let mut pieces = Vec::with_capacity(ids.len());
    for &id in &ids {
        let piece = tokenizer.id_to_piece(id);
        pieces.push(piece.ok_or_else(|| {
            anyhow::anyhow!("token id {id} is not in the vocabulary of {} pieces of {}", tokenizer.vocab_size(), arguments.model.name())
        })?);
    }
    let text = tokenizer.decode(&ids, false);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if arguments.json {
        serde_json::to_writer(&mut out, &Output { ids, pieces, text }).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else if arguments.decode.is_some() {
        writeln!(out, "{text}")?;
    } else {
        for (id, piece) in ids.iter().zip(&pieces) {
            // Escaped, so that a line end in a piece does not look like a line of the table.
            writeln!(out, "{id:>8}  {}", piece.escape_debug())?;
        }
        writeln!(out, "{} tokens", ids.len())?;
    }
    out.flush()?;
    Ok(())
}
