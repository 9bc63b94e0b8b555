//! `ernie explain`: what a model does with one text, token by token.
use std::collections::BTreeSet;
use std::io::{IsTerminal, Write as _};
use std::path::PathBuf;

use anyhow::Context;
use ernie_checkpoint::{Config, Tokenizer};
use ernie_eval::explain::{Explanation, Layer, explain, svg, terminal};
use serde::Serialize;

use crate::encoding;
use crate::model::ModelArgument;
use crate::outcome;

/// Columns of the picture where no terminal says how many it has.
const WIDTH: usize = 100;

/// Show what a model does with a text: surprise, active heads, chosen experts
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Show what a model does with a text, token by token: how much each token surprises it (its loss, −ln p after the tokens before \
        it), in a mixture of experts which experts each layer chose with which weights, and in a model with context-gated heads which heads are \
        active and the semantic density that opens them. Below the picture stand the share of active heads of each layer, its correlation with \
        density, and how many tokens each expert got.\n\n\
        The model is computed in 32 bits from the weights as they are stored.",
    after_long_help = "Examples:\n  \
        ernie explain \"Once upon a time\"\n  \
        ernie explain --model path/to/model --file story.txt --svg story.svg\n  \
        ernie explain --layers 0,5 - < story.txt\n  \
        ernie explain \"Once upon a time\" --json\n\n\
        --json prints one object: model, mean_loss, tokens (id, piece, loss) and layers. A layer has heads (density by token, gates and active by \
        token and head, active_share, correlation) and experts (choices by token, best first; tokens by expert), each null where it has none.\n\
        In a terminal the picture has colours unless the environment variable NO_COLOR is set."
)]
pub struct ExplainArguments {
    /// The text; - reads standard input
    #[arg(required_unless_present_any = ["file", "ids"], conflicts_with_all = ["file", "ids"], allow_negative_numbers = true)]
    text: Option<String>,
    #[command(flatten)]
    model: ModelArgument,
    /// A file with the text, UTF-8, or gzipped with a name that ends in .gz
    #[arg(long, value_name = "FILE", conflicts_with = "ids")]
    file: Option<PathBuf>,
    /// Token ids instead of a text, comma-separated; works without a tokenizer
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
    /// Layers to show, comma-separated [default: all that choose something]
    #[arg(long, value_name = "LAYER,…", value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// Write the picture as an SVG file too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Columns of the picture [default: those of the terminal, else 100]
    #[arg(long, value_name = "COLUMNS", value_parser = clap::value_parser!(u16).range(40..))]
    width: Option<u16>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    mean_loss: f64,
    tokens: Vec<Token<'a>>,
    layers: &'a [Layer],
}

#[derive(Serialize)]
struct Token<'a> {
    id: u32,
    /// `None` without a tokenizer.
    piece: Option<&'a str>,
    /// `None` of the first token, which is given.
    loss: Option<f32>,
}

/// Runs the command.
pub fn run(arguments: &ExplainArguments) -> anyhow::Result<()> {
    let (tokenizer, ids) = tokens(arguments)?;
    let checkpoint = arguments.model.checkpoint()?;
    let layers = wanted_layers(arguments, checkpoint.config())?;
    let name = arguments.model.name();
    let mut explanation = explain(&checkpoint, &ids).with_context(|| format!("cannot explain this text with {name}"))?;
    if let Some(layers) = layers {
        explanation.layers.retain(|layer| layers.contains(&layer.layer));
    }
    // What has no piece is shown as its number.
    let pieces: Vec<Option<String>> = ids.iter().map(|&id| tokenizer.as_ref().and_then(|tokenizer| tokenizer.id_to_piece(id))).collect();
    let shown: Vec<String> = pieces.iter().zip(&ids).map(|(piece, id)| piece.clone().unwrap_or_else(|| id.to_string())).collect();
    if let Some(file) = &arguments.svg {
        ernie_checkpoint::atomic_write(file, svg::draw(&explanation, &shown, &name).as_bytes())?;
    }
    let text = if arguments.json {
        json(&name, &explanation, &pieces)? + "\n"
    } else {
        terminal::draw(&explanation, &shown, style(arguments.width))
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// The tokenizer, which a model that is given ids may lack, and the ids.
fn tokens(arguments: &ExplainArguments) -> anyhow::Result<(Option<Tokenizer>, Vec<u32>)> {
    if let Some(ids) = &arguments.ids {
        return Ok((arguments.model.tokenizer_if_any()?, ids.clone()));
    }
    let tokenizer = arguments.model.tokenizer()?;
    let text = match (&arguments.file, &arguments.text) {
        (Some(file), _) => encoding::text_file(file)?,
        (None, Some(text)) => encoding::text_or_stdin(text)?,
        (None, None) => unreachable!("clap asks for one of the three"),
    };
    // A tokenizer may put special tokens around nothing; they are no text.
    let ids = if text.is_empty() { Vec::new() } else { tokenizer.encode(&text, true)? };
    Ok((Some(tokenizer), ids))
}

fn wanted_layers(arguments: &ExplainArguments, config: &Config) -> anyhow::Result<Option<BTreeSet<usize>>> {
    let Some(layers) = &arguments.layers else { return Ok(None) };
    let count = config.num_hidden_layers;
    match layers.iter().find(|&&layer| layer >= count) {
        Some(layer) => Err(outcome::usage(format!("--layers {layer}: {} has the layers 0 to {}", arguments.model.name(), count - 1))),
        None => Ok(Some(layers.iter().copied().collect())),
    }
}

fn style(width: Option<u16>) -> terminal::Style {
    let on_terminal = std::io::stdout().is_terminal();
    let columns = || terminal_size::terminal_size().filter(|_| on_terminal).map(|(columns, _)| usize::from(columns.0));
    let width = width.map(usize::from).or_else(columns).unwrap_or(WIDTH);
    // By https://no-color.org an empty variable counts as none.
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    terminal::Style { width, colour: on_terminal && !no_color }
}

fn json(model: &str, explanation: &Explanation, pieces: &[Option<String>]) -> anyhow::Result<String> {
    let tokens = explanation.ids.iter().zip(&explanation.losses).zip(pieces);
    let tokens = tokens.map(|((&id, &loss), piece)| Token { id, piece: piece.as_deref(), loss }).collect();
    let output = Output { model, mean_loss: explanation.mean_loss(), tokens, layers: &explanation.layers };
    Ok(serde_json::to_string(&output)?)
}
