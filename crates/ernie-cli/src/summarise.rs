//! `ernie eval summarise`: how near a model's summaries are to those that people wrote.
use std::fmt::Write as _;
use std::io::{BufRead, Write as _};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use ernie_eval::{
    Estimate, Example, ExampleFormat, Prompt, PromptTemplate, Rouge, SummariseError, SummariseOptions, Summary, SummaryScores, Units,
};
use serde::Serialize;

use crate::compute::ComputeArguments;
use crate::interrupt::Interrupt;
use crate::model::ModelArgument;
use crate::outcome::{self, Outcome};
use crate::progress::Progress;

/// Context where none is given: documents are long, and their beginning says most.
const CONTEXT: usize = 4096;

/// ROUGE of a model's summaries of documents
#[derive(Debug, clap::Args)]
#[command(
    long_about = "ROUGE of a model's summaries of documents. Each document is put into a prompt, which the model continues with the likeliest tokens \
        until it ends the text or --max-tokens is reached; the continuation is compared with what people wrote.\n\n\
        A document that does not fit in the context with its prompt and --max-tokens is cut at its end; its question, if it has one, is kept.\n\n\
        ROUGE-1, ROUGE-2 and ROUGE-L are F1 as rouge-score gives them, without stemming. Of several references the one with the best ROUGE-1 counts, \
        as in SciTLDR's own script. The interval is where the mean would lie in 95% of the cases with other examples of the same kind \
        (bootstrap, 1000 draws, the same each time).",
    after_long_help = "Formats, one JSON object a line, gzipped if the name ends in .gz:\n  \
        qmsum    QMSum: meeting_transcripts, general_query_list, specific_query_list; each question is an example\n  \
        scitldr  SciTLDR: source (sentences), target (summaries)\n  \
        craft    papers: title, body; abstract is the summary\n  \
        jsonl    {\"document\": \"…\", \"summary\": [\"…\", …]}\n\
        In a folder test.jsonl is read (craft: craft_articles.jsonl), or the same with .gz.\n\n\
        Examples:\n  \
        ernie eval summarise --model path/to/model --data path/to/scitldr --format scitldr\n  \
        ernie eval summarise --model path/to/model --data test.jsonl.gz --format qmsum --limit 50 --predictions summaries.jsonl\n  \
        ernie eval summarise --data news.jsonl --format jsonl --chinese --prompt '{document}\\n摘要：'\n\n\
        --json prints one object: examples, of, cut (documents), rouge1, rouge2, rouge_l (each mean, low, high), context, max_tokens, \
        prompt_tokens, output_tokens, seconds, tokens_per_second (of both; what prompts begin with alike is computed once and counted for each). \
        --predictions writes an object a line: id, prediction, \
        references, rouge1, rouge2, rouge_l, cut, prompt_tokens, output_tokens, finish_reason."
)]
pub struct SummariseArguments {
    #[command(flatten)]
    model: ModelArgument,
    /// File with documents and summaries, or a folder with one
    #[arg(long, value_name = "FILE_OR_DIR")]
    data: PathBuf,
    /// Its layout
    #[arg(long, value_enum)]
    format: Format,
    /// Take the first N examples only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Most tokens of a summary
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Text of the prompt with {document} in it, for qmsum also {query}; \n stands for a line break [default: {document}\nTL;DR:, for qmsum
    /// {document}\n\nQuestion: {query}\nTL;DR:]
    #[arg(long, value_name = "TEMPLATE")]
    prompt: Option<String>,
    /// Most tokens of a prompt and its summary together [default: 4096, or the model's longest]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Summaries made together; it changes none of them
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Write the summaries with their references and scores, one JSON object a line
    #[arg(long, value_name = "FILE")]
    predictions: Option<PathBuf>,
    /// Count Chinese by characters
    #[arg(long)]
    chinese: bool,
    #[command(flatten)]
    compute: ComputeArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    Qmsum,
    Scitldr,
    Craft,
    Jsonl,
}

impl From<Format> for ExampleFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Qmsum => ExampleFormat::Qmsum,
            Format::Scitldr => ExampleFormat::Scitldr,
            Format::Craft => ExampleFormat::Craft,
            Format::Jsonl => ExampleFormat::Jsonl,
        }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    scores: SummaryScores,
    /// Examples there were; more than were scored if the work was ended.
    of: usize,
    cut: usize,
    context: usize,
    max_tokens: usize,
    prompt_tokens: usize,
    output_tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
}

/// A line of `--predictions`.
#[derive(Serialize)]
struct Prediction<'a> {
    id: &'a str,
    prediction: &'a str,
    references: &'a [String],
    rouge1: f64,
    rouge2: f64,
    rouge_l: f64,
    cut: bool,
    prompt_tokens: usize,
    output_tokens: usize,
    finish_reason: &'static str,
}

/// Runs the command.
pub fn run(arguments: &SummariseArguments) -> anyhow::Result<()> {
    let format = ExampleFormat::from(arguments.format);
    let template = arguments.prompt.as_ref().map(|text| text.replace("\\n", "\n"));
    let template = template.as_deref().unwrap_or_else(|| PromptTemplate::default_text(format.has_queries()));
    let template = PromptTemplate::new(template, format.has_queries()).map_err(|error| outcome::usage(format!("--prompt: {error}")))?;
    let predictions = arguments.predictions.as_deref().map(replaceable).transpose()?;
    let limit = arguments.limit.map_or(usize::MAX, |limit| limit as usize);
    let examples = ernie_eval::read_examples(&arguments.data, format, limit)?;
    let (tokenizer, model) = (arguments.model.tokenizer()?, Arc::new(arguments.compute.load(&arguments.model)?));
    let context = arguments.context.unwrap_or_else(|| model.config().max_position_embeddings.min(CONTEXT));
    let options = SummariseOptions { context, max_tokens: arguments.max_tokens as usize, batch: arguments.batch as usize };
    let interrupt = Interrupt::install()?;
    let prompts = ernie_eval::prompts(&model, &tokenizer, &template, &examples, options).map_err(of_context)?;

    let working = interrupt.begin();
    let mut progress = Progress::new("summaries", examples.len());
    let began = Instant::now();
    let summaries = ernie_eval::summarise(&model, &tokenizer, &prompts, options, &mut |finished| {
        progress.set(finished);
        if interrupt.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let seconds = began.elapsed().as_secs_f64();
    drop(progress);
    let summaries = summaries.map_err(of_context)?;

    let units = if arguments.chinese { Units::WordsAndHan } else { Units::Words };
    let done: Vec<Done<'_>> =
        examples.iter().zip(&prompts).zip(&summaries).filter_map(|(of, summary)| Done::new(of, summary, units)).collect();
    if let Some(file) = predictions {
        write_predictions(&file, &done)?;
    }
    // Until here Ctrl-C must not end the program: the summaries would be lost.
    drop(working);
    if !done.is_empty() {
        let output = Output::new(&done, examples.len(), options, seconds);
        let text = if arguments.json { serde_json::to_string(&output)? + "\n" } else { output.table() };
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    if done.len() < examples.len() { Err(Outcome::Interrupted.into()) } else { Ok(()) }
}

/// A context that makes no sense is a fault of the command line.
fn of_context(error: SummariseError) -> anyhow::Error {
    match error {
        SummariseError::Context { .. } => outcome::usage(format!("--context, --max-tokens: {error}")),
        error => error.into(),
    }
}

/// An example that was summarised.
struct Done<'a> {
    example: &'a Example,
    prompt: &'a Prompt,
    summary: &'a Summary,
    rouge: Rouge,
}

impl<'a> Done<'a> {
    fn new((example, prompt): (&'a Example, &'a Prompt), summary: &'a Option<Summary>, units: Units) -> Option<Self> {
        let summary = summary.as_ref()?;
        Some(Done { example, prompt, summary, rouge: ernie_eval::score_summary(example, summary, units) })
    }
}

impl Output {
    fn new(done: &[Done<'_>], of: usize, options: SummariseOptions, seconds: f64) -> Self {
        let rouge: Vec<Rouge> = done.iter().map(|done| done.rouge).collect();
        let prompt_tokens = done.iter().map(|done| done.prompt.ids.len()).sum();
        let output_tokens = done.iter().map(|done| done.summary.tokens).sum();
        Output {
            scores: SummaryScores::of(&rouge),
            of,
            cut: done.iter().filter(|done| done.prompt.cut).count(),
            context: options.context,
            max_tokens: options.max_tokens,
            prompt_tokens,
            output_tokens,
            seconds,
            tokens_per_second: (prompt_tokens + output_tokens) as f64 / seconds,
        }
    }

    fn table(&self) -> String {
        let scores = &self.scores;
        let mut out = format!("{:<12}{:>10}{:>20}\n", "", "F1", "95% interval");
        for (name, Estimate { mean, low, high }) in [("ROUGE-1", scores.rouge1), ("ROUGE-2", scores.rouge2), ("ROUGE-L", scores.rouge_l)] {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{name:<12}{mean:>10.4}{:>20}", format!("{low:.4} - {high:.4}"));
        }
        let examples = if scores.examples < self.of { format!("{} of {}", scores.examples, self.of) } else { self.of.to_string() };
        let _ = writeln!(out, "\n{examples} examples, {} documents cut to fit {} tokens", self.cut, self.context);
        let _ = writeln!(
            out,
            "{} tokens of prompts and {} of summaries in {:.1} s: {:.1} tokens/s",
            self.prompt_tokens, self.output_tokens, self.seconds, self.tokens_per_second
        );
        out
    }
}

fn write_predictions(file: &Path, done: &[Done<'_>]) -> anyhow::Result<()> {
    let mut text = String::new();
    for Done { example, prompt, summary, rouge } in done {
        let prediction = Prediction {
            id: &example.id,
            prediction: &summary.text,
            references: &example.references,
            rouge1: rouge.rouge1.f1,
            rouge2: rouge.rouge2.f1,
            rouge_l: rouge.rouge_l.f1,
            cut: prompt.cut,
            prompt_tokens: prompt.ids.len(),
            output_tokens: summary.tokens,
            finish_reason: summary.finish_reason.as_str(),
        };
        text += &serde_json::to_string(&prediction)?;
        text.push('\n');
    }
    ernie_checkpoint::atomic_write(file, text.as_bytes()).context("the summaries are not written")
}

/// The file that may be written under this name: a new one, or summaries written earlier. Anything else is refused before hours of work, for writing
/// replaces it; a link is followed, so that it stays a link.
fn replaceable(file: &Path) -> anyhow::Result<PathBuf> {
    let Ok(metadata) = std::fs::metadata(file) else {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        anyhow::ensure!(folder.is_dir(), "{} is no folder; --predictions needs one that is there", folder.display());
        return Ok(file.to_path_buf());
    };
    let written_by_us = || {
        let mut line = String::new();
        std::io::BufReader::new(std::fs::File::open(file).ok()?).read_line(&mut line).ok()?;
        line.is_empty().then_some(()).or_else(|| serde_json::from_str::<serde_json::Value>(&line).ok()?.get("prediction").map(|_| ()))
    };
    if !metadata.is_file() || written_by_us().is_none() {
        anyhow::bail!("{} is there already and is not a file of summaries; choose another name", file.display());
    }
    file.canonicalize().with_context(|| format!("cannot follow {}", file.display()))
}
