//! `ernie generate`: continue a text.
use ernie_checkpoint::{ChatTemplateOptions, Message};
use ernie_engine::{FinishReason, Generation, SamplingParams, Session};
use serde::Serialize;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::time::Instant;

use crate::compute::{ComputeArguments, DraftArguments};
use crate::encoding::{self, StreamDecoder};
use crate::interrupt::Interrupt;
use crate::model::ModelArgument;
use crate::outcome::{self, Outcome};
use crate::sampling::SamplingArguments;

/// Continue a text
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Continue a text. The continuation is printed as it is generated, until the model ends the text, a --stop text appears \
        or --max-tokens is reached.\n\n\
        The prompt is given as text (- reads it from standard input) or as token ids with --ids; then no tokenizer is needed, and \
        without one the new ids are printed. With --chat the text is put as a user's message and the answer is printed.",
    after_long_help = "Examples:\n  \
        ernie generate \"Once upon a time\"\n  \
        ernie generate \"Once upon a time\" --temperature 0               always the likeliest token\n  \
        ernie generate \"Once upon a time\" --seed 7 --max-tokens 100     reproducible\n  \
        ernie generate --chat \"What do birds eat?\"\n  \
        cat story.txt | ernie generate - --stop \"The end\"\n  \
        ernie generate --model path/to/model --ids 3,5,7 --temperature 0 --json\n\n\
        --json prints one object: prompt_tokens (ids), tokens (ids, the ending one included), text, finish_reason (stop, stop_string, \
        length, cancelled), seed and timings in seconds."
)]
pub struct GenerateArguments {
    /// The text to continue; - reads standard input
    #[arg(required_unless_present = "ids", conflicts_with = "ids", allow_negative_numbers = true)]
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArgument,
    /// Token ids to continue, comma-separated, instead of a text
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
    /// Put the text as a user's message in the model's chat template
    #[arg(long, conflicts_with = "ids")]
    chat: bool,
    /// System message for --chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    drafts: DraftArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    text: Option<&'a str>,
    finish_reason: &'static str,
    seed: u64,
    timings: Timings,
}

/// Seconds of wall-clock time.
#[derive(Serialize)]
struct Timings {
    load_seconds: f64,
    prefill_seconds: f64,
    first_token_seconds: f64,
    decode_seconds: f64,
    decode_tokens_per_second: f64,
}

/// Runs the command.
pub fn run(arguments: &GenerateArguments) -> anyhow::Result<()> {
    let mut params = arguments.sampling.params()?;
    let interrupt = Interrupt::install()?;
    let began = Instant::now();
    let tokenizer = if arguments.ids.is_some() { arguments.model.tokenizer_if_any()? } else { Some(arguments.model.tokenizer()?) };
    let prompt = match (&arguments.ids, &tokenizer) {
        (Some(ids), _) => ids.clone(),
        (None, Some(tokenizer)) => {
            let text = encoding::text_or_stdin(arguments.prompt.as_deref().unwrap_or_default())?;
            if arguments.chat {
                let mut messages = Vec::new();
                messages.extend(arguments.system.as_deref().map(|system| Message::new("system", system)));
                messages.push(Message::new("user", text.trim_end_matches('\n')));
                params.stop_ids.extend(ernie_checkpoint::end_of_turn_ids(tokenizer));
                let template = arguments.model.chat_template()?;
                encoding::encode_conversation(tokenizer, &template, &messages, &ChatTemplateOptions::default())?
            } else {
                tokenizer.encode(&text, true)?
            }
        }
        (None, None) => unreachable!("a text prompt has asked for a tokenizer"),
    };
    if tokenizer.is_none() && !params.stop.is_empty() {
        return Err(outcome::usage(format!("--stop needs a tokenizer, and {} has none; use --stop-id", arguments.model.name())));
    }
    let model = arguments.compute.load(&arguments.model)?;
    let load_seconds = began.elapsed().as_secs_f64();

    let show_text = tokenizer.is_some() && !arguments.json;
    let working = interrupt.begin();
    let mut failure = None;
    let longest = model.config().max_position_embeddings.min(prompt.len().saturating_add(params.max_tokens));
    let mut session = Session::new(&model, longest)?.with_drafts(arguments.drafts.options());
    let decoder = StreamDecoder::new(tokenizer.as_ref());
    let generation = ernie_engine::generate_in(&mut session, &prompt, &params, decoder, |event| {
        if show_text && let Err(error) = show(event.text) {
            failure = Some(error);
            return ControlFlow::Break(());
        }
        if interrupt.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    drop(working);
    if let Some(error) = failure {
        return Err(error.into());
    }
    if arguments.json {
        let text = tokenizer.is_some().then_some(generation.text.as_str());
        print_json(&prompt, &generation, text, load_seconds, &params)?;
    } else if show_text {
        show("\n")?;
    } else {
        show(&format!("{}\n", generation.tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")))?;
    }
    if generation.finish_reason == FinishReason::Cancelled { Err(Outcome::Interrupted.into()) } else { Ok(()) }
}

/// Text as it comes: each piece is to be seen at once.
fn show(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn print_json(
    prompt: &[u32],
    generation: &Generation,
    text: Option<&str>,
    load_seconds: f64,
    params: &SamplingParams,
) -> anyhow::Result<()> {
    let timings = &generation.timings;
    let output = Output {
        prompt_tokens: prompt,
        tokens: &generation.tokens,
        text,
        finish_reason: generation.finish_reason.as_str(),
        seed: params.seed,
        timings: Timings {
            load_seconds,
            prefill_seconds: timings.prefill_seconds,
            first_token_seconds: timings.first_token_seconds,
            decode_seconds: timings.decode_seconds,
            decode_tokens_per_second: timings.decode_tokens_per_second,
        },
    };
    show(&format!("{}\n", serde_json::to_string(&output)?))?;
    Ok(())
}
