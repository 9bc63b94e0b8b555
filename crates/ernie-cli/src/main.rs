//! The `ernie` command: parse the arguments, run one subcommand, turn its outcome into an exit code.
//!
//! One file per subcommand; each takes its raw arguments, checks them, and calls the libraries. The exit code is decided in [`outcome`] alone.
mod arguments;
mod bench;
mod card;
mod chat;
mod compute;
mod conversation;
mod embedded;
mod encoding;
mod eval;
mod explain;
mod generate;
mod inspect;
mod interrupt;
mod keys;
mod logits;
mod model;
mod outcome;
mod progress;
mod quantize;
mod sampling;
mod serve;
mod summarise;
mod tokenize;
mod train;
mod usage;

use clap::Parser;
use std::process::ExitCode;

use arguments::{Arguments, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    outcome::exit_code(run(&arguments))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.use_threads()?;
    match &arguments.command {
        Command::Chat(chat) => chat::run(chat),
        Command::Generate(generate) => generate::run(generate),
        Command::Logits(logits) => logits::run(logits),
        Command::Inspect(inspect) => inspect::run(inspect),
        Command::Tokenize(tokenize) => tokenize::run(tokenize),
        Command::Quantize(quantize) => quantize::run(quantize),
        Command::Bench(bench) => bench::run(bench),
        Command::Eval(eval) => eval::run(eval),
        Command::Explain(explain) => explain::run(explain),
        Command::Serve(serve) => serve::run(serve),
        Command::Keys(keys) => keys::run(keys),
        Command::Usage(usage) => usage::run(usage),
        Command::Train(train) => train::run(train, arguments.threads),
    }
}
