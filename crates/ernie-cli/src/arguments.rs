//! The command line as clap reads it; what each subcommand takes is declared in its own file.
use clap::{Parser, Subcommand};

use crate::{bench, chat, eval, explain, generate, inspect, keys, logits, outcome, quantize, serve, tokenize, train, usage};

/// Train, inspect and talk to ERNIE-4.5 language models
#[derive(Debug, Parser)]
#[command(
    name = "ernie",
    version,
    long_about = "Train, inspect and talk to ERNIE-4.5 language models.\n\n\
        A model is a directory in Hugging Face form: config.json, *.safetensors and tokenizer files. Released ERNIE-4.5 text models \
        and models that this program trained both work. Without --model every command uses the small model built into this program, so \
        that the first command to try needs nothing else:\n\n  ernie chat",
    after_long_help = "Examples:\n  \
        ernie chat                                        talk to the built-in model\n  \
        ernie generate \"Once upon a time\"                 continue a text\n  \
        ernie generate \"Once upon a time\" --seed 7        the same continuation each time\n  \
        ernie quantize path/to/model path/to/int8         a quarter of the size, and faster\n  \
        ernie bench --model path/to/model                 how fast it is here\n  \
        ernie inspect path/to/model                       sizes, memory, and what is wrong with it\n  \
        ernie explain \"Once upon a time\"                  what surprises the model, which experts it chooses\n  \
        ernie serve                                       an OpenAI-compatible server for this machine\n  \
        ernie keys create team-a                          a key for it; from then on each request needs one\n  \
        ernie usage --by key                              what was used, by whom\n  \
        ernie train recipes/nano.toml --data path/to/data train a model\n\n\
        Exit codes:\n  0    success\n  1    failure; standard error says what happened and what to do\n  \
        2    the command line is wrong\n  130  interrupted (Ctrl-C)\n\n\
        `ernie help COMMAND` explains a command in full.",
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Arguments {
    /// Worker threads [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    Chat(chat::ChatArguments),
    Generate(generate::GenerateArguments),
    Logits(logits::LogitsArguments),
    Inspect(inspect::InspectArguments),
    Tokenize(tokenize::TokenizeArguments),
    Quantize(quantize::QuantizeArguments),
    Bench(bench::BenchArguments),
    Eval(eval::EvalArguments),
    Explain(explain::ExplainArguments),
    Serve(serve::ServeArguments),
    Keys(keys::KeysArguments),
    Usage(usage::UsageArguments),
    Train(train::TrainArguments),
}

impl Arguments {
    /// Makes the thread pool that all kernels share, if a number of threads was given. Training makes its own.
    pub fn use_threads(&self) -> anyhow::Result<()> {
        let Some(threads) = self.threads.filter(|_| !matches!(self.command, Command::Train(_))) else { return Ok(()) };
        rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global().map_err(|error| too_many_threads(threads, &error))
    }
}

/// A pool of as many threads as were asked for could not be made.
pub fn too_many_threads(threads: u16, error: &rayon::ThreadPoolBuildError) -> anyhow::Error {
    outcome::usage(format!("--threads {threads}: {error}; give a smaller number"))
}
