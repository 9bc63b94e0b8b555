//! `ernie eval`: what a model or a text is worth.
use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ernie_checkpoint::Tokenizer;
use ernie_eval::{Bleu, Rouge, Score, TextScore, Tokenize, Units};
use ernie_train::{Recipe, data};
use serde::Serialize;

use crate::compute::ComputeArguments;
use crate::encoding;
use crate::interrupt::Interrupt;
use crate::model::ModelArgument;
use crate::outcome::Outcome;
use crate::summarise::{self, SummariseArguments};

/// Measure a model on text, its summaries, or predictions against references
#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:\n  \
        ernie eval perplexity --model path/to/model book.txt news.txt\n  \
        ernie eval perplexity --model path/to/model --recipe recipes/nano.toml --data path/to/data\n  \
        ernie eval score predictions.txt references.txt --json\n  \
        ernie eval summarise --model path/to/model --data path/to/scitldr --format scitldr")]
pub struct EvalArguments {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(Debug, clap::Subcommand)]
enum EvalCommand {
    Perplexity(PerplexityArguments),
    Score(ScoreArguments),
    #[command(alias = "summarize")]
    Summarise(SummariseArguments),
}

/// How well the model foretells texts: loss and perplexity per token, bits per byte
#[derive(Debug, clap::Args)]
struct PerplexityArguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Texts, UTF-8, or gzipped with a name that ends in .gz
    #[arg(required_unless_present = "recipe", conflicts_with = "recipe", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Instead of texts: the validation documents of each source of this recipe, in rows of its length and in 32 bits, as in training
    #[arg(long, value_name = "FILE", conflicts_with_all = ["context", "weights", "kv_cache"])]
    recipe: Option<PathBuf>,
    /// Folder that the recipe's paths start from [default: ERNIE_DATA, else `root` in the recipe]
    #[arg(long, value_name = "DIR", requires = "recipe")]
    data: Option<PathBuf>,
    /// Tokens that are seen together; a text is cut into pieces of so many [default: 512, or the model's longest]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    compute: ComputeArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// ROUGE and BLEU of predictions against references, line by line, as rouge-score and sacrebleu give them
#[derive(Debug, clap::Args)]
struct ScoreArguments {
    /// One prediction a line
    predictions: PathBuf,
    /// One reference a line, for the prediction in the same line
    references: PathBuf,
    /// Count Chinese by characters (ROUGE), and cut it so (BLEU's `zh`)
    #[arg(long)]
    chinese: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct FileScore<'a> {
    file: &'a Path,
    #[serde(flatten)]
    sums: TextScore,
    loss: f64,
    perplexity: f64,
    bits_per_byte: f64,
}

#[derive(Serialize)]
struct Perplexities<'a> {
    context: usize,
    files: Vec<FileScore<'a>>,
    all: FileScore<'a>,
}

#[derive(Serialize)]
struct SourceScore {
    source: String,
    loss: f64,
    perplexity: f64,
}

#[derive(Serialize)]
struct SourcePerplexities<'a> {
    recipe: &'a Path,
    sequence_length: usize,
    sources: Vec<SourceScore>,
}

#[derive(Serialize)]
struct Scores {
    lines: usize,
    #[serde(flatten)]
    rouge: Rouge,
    bleu: Bleu,
}

/// Runs the command.
pub fn run(arguments: &EvalArguments) -> anyhow::Result<()> {
    match &arguments.command {
        EvalCommand::Perplexity(arguments) => perplexity(arguments),
        EvalCommand::Score(arguments) => score(arguments),
        EvalCommand::Summarise(arguments) => summarise::run(arguments),
    }
}

fn perplexity(arguments: &PerplexityArguments) -> anyhow::Result<()> {
    if let Some(recipe) = &arguments.recipe {
        return by_source(arguments, recipe);
    }
    let texts = arguments.files.iter().map(|file| encoding::text_file(file)).collect::<anyhow::Result<Vec<_>>>()?;
    let (tokenizer, model) = (arguments.model.tokenizer()?, arguments.compute.load(&arguments.model)?);
    let context = arguments.context.unwrap_or_else(|| model.config().max_position_embeddings.min(512));
    let interrupt = Interrupt::install()?;
    let working = interrupt.begin();
    let stop = interrupt.flag();
    let mut files = Vec::new();
    for (file, text) in arguments.files.iter().zip(&texts) {
        let mut go_on =
            |_: usize| if stop.load(std::sync::atomic::Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let score = ernie_eval::score_text(&model, &tokenizer, text, context, &mut go_on);
        let Some(score) = score.with_context(|| format!("cannot score {}", file.display()))? else {
            return Err(Outcome::Interrupted.into());
        };
        files.push(file_score(file, score));
    }
    drop(working);
    let mut sums = TextScore::default();
    files.iter().for_each(|file| sums.add(&file.sums));
    let all = file_score(Path::new("all"), sums);
    if arguments.json {
        return write_out(&(serde_json::to_string(&Perplexities { context, files, all })? + "\n"));
    }
    let mut out = format!("{:<40}{:>10}{:>10}{:>12}{:>12}\n", "text", "tokens", "loss", "perplexity", "bits/byte");
    for FileScore { file, sums, loss, perplexity, bits_per_byte } in files.iter().chain([&all]) {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{:<40}{:>10}{loss:>10.4}{perplexity:>12.2}{bits_per_byte:>12.3}", file.display().to_string(), sums.tokens);
    }
    write_out(&out)
}

/// Perplexity in each source of a recipe.
fn by_source(arguments: &PerplexityArguments, file: &Path) -> anyhow::Result<()> {
    let recipe = Recipe::from_file(file)?;
    let (checkpoint, name) = (arguments.model.checkpoint()?, arguments.model.name());
    let (length, limit) = (recipe.data.sequence_length, checkpoint.config().max_position_embeddings);
    if length > limit {
        anyhow::bail!(
            "{name} was made for {limit} tokens, and the rows of {} have {length}; give a shorter data.sequence_length",
            file.display()
        );
    }
    let root = recipe.data_root(arguments.data.as_deref())?;
    let prepared = data::prepare(&recipe, &root, &mut |doing| eprintln!("{doing}"))?;
    if !alike(&arguments.model.tokenizer()?, &Tokenizer::from_dir(&prepared.tokenizer_dir)?) {
        anyhow::bail!("{name} has another tokenizer than {} trains or names; give the model's directory as tokenizer.path", file.display());
    }
    let losses = ernie_train::evaluate(&recipe, &checkpoint, &prepared.corpus)?;
    if losses.is_empty() {
        anyhow::bail!("no source of {} has validation documents; give a larger data.validation_fraction", file.display());
    }
    let sources: Vec<_> = losses.into_iter().map(|(source, loss)| SourceScore { source, loss, perplexity: loss.exp() }).collect();
    if arguments.json {
        return write_out(&(serde_json::to_string(&SourcePerplexities { recipe: file, sequence_length: length, sources })? + "\n"));
    }
    let mut out = format!("{:<40}{:>10}{:>12}\n", "source", "loss", "perplexity");
    for SourceScore { source, loss, perplexity } in &sources {
        let _ = writeln!(out, "{source:<40}{loss:>10.4}{perplexity:>12.2}");
    }
    write_out(&out)
}

/// Whether two tokenizers have the same pieces under the same ids.
fn alike(a: &Tokenizer, b: &Tokenizer) -> bool {
    let size = a.vocab_size();
    size == b.vocab_size() && (0..size as u32).all(|id| a.id_to_piece(id) == b.id_to_piece(id))
}

fn file_score(file: &Path, sums: TextScore) -> FileScore<'_> {
    FileScore { file, sums, loss: sums.loss(), perplexity: sums.perplexity(), bits_per_byte: sums.bits_per_byte() }
}

fn score(arguments: &ScoreArguments) -> anyhow::Result<()> {
    let (predictions, references) = (encoding::text_file(&arguments.predictions)?, encoding::text_file(&arguments.references)?);
    let (predictions, references): (Vec<&str>, Vec<&str>) = (predictions.lines().collect(), references.lines().collect());
    if predictions.len() != references.len() || predictions.is_empty() {
        anyhow::bail!(
            "{} has {} lines and {} has {}; give as many predictions as references, and at least one",
            arguments.predictions.display(),
            predictions.len(),
            arguments.references.display(),
            references.len()
        );
    }
    let (units, tokenize) = if arguments.chinese { (Units::WordsAndHan, Tokenize::Chinese) } else { Default::default() };
    let pairs = || predictions.iter().copied().zip(references.iter().copied());
    let rouge = ernie_eval::mean_rouge(pairs().map(|(prediction, reference)| (reference, prediction)), units);
    let bleu = ernie_eval::bleu(pairs().map(|(prediction, reference)| (prediction, [reference])), tokenize);
    if arguments.json {
        return write_out(&(serde_json::to_string(&Scores { lines: predictions.len(), rouge, bleu })? + "\n"));
    }
    let mut out = format!("{:<12}{:>10}{:>10}{:>10}\n", "", "precision", "recall", "F1");
    for (name, Score { precision, recall, f1 }) in
        [("ROUGE-1", rouge.rouge1), ("ROUGE-2", rouge.rouge2), ("ROUGE-L", rouge.rouge_l), ("ROUGE-Lsum", rouge.rouge_l_sum)]
    {
        let _ = writeln!(out, "{name:<12}{precision:>10.4}{recall:>10.4}{f1:>10.4}");
    }
    let _ = writeln!(out, "{:<12}{:>10.2}   {} words for {}", "BLEU", bleu.score, bleu.predicted, bleu.reference);
    write_out(&out)
}

fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
