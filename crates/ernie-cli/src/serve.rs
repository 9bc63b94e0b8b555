//! `ernie serve`: the model behind an HTTP interface like OpenAI's.
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use ernie_engine::Model;
use ernie_serve::{ServeConfig, ServedModel};
use serde::Serialize;

use crate::model::ModelArgument;
use crate::outcome::{self, Outcome};

/// Serve a model over HTTP, as OpenAI's API does
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Serve a model over HTTP, as OpenAI's API does: /v1/completions and /v1/chat/completions (streaming and not), /v1/embeddings, \
        /v1/models, /v1/tokenize, /v1/detokenize; /health/live, /health/ready, /metrics for Prometheus, and /openapi.json, which describes \
        them all.\n\n\
        Without keys only this machine itself is served; `ernie keys create NAME` makes the first, and from then on each request needs one, of which the server \
        learns at once. Keys, what they used and who changed them are in a database: a file of this user, or PostgreSQL (--database). Ctrl-C, SIGTERM or SIGHUP finishes the answers under way and takes no new \
        requests; a second Ctrl-C or SIGTERM stops at once.\n\n\
        Every option may also stand in a TOML file (--config), under its name with _ for -, and in the environment, as ERNIE_SERVE_ and that \
        name in capitals. Flags win over the environment, the environment over the file. Limits of time and size stand in those two only; --print-config \
        shows them all, with their defaults.",
    after_long_help = "Examples:\n  \
        ernie serve                                           the built-in model at http://127.0.0.1:8080/v1\n  \
        ernie serve --model path/to/model --weights int8 --port 9000\n  \
        ernie serve --config serve.toml --print-config\n  \
        ernie serve --host 0.0.0.0 --database postgres://ernie@db/accounts\n  \
        curl http://127.0.0.1:8080/v1/completions -H 'content-type: application/json' -d '{\"prompt\": \"Once upon a time\"}'"
)]
pub struct ServeArguments {
    /// A file with options
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the options that all sources give together, as such a file, and end; the password in a database's URL is printed as ***
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    options: Options,
}

/// Flags by the keys of the configuration; those not given are left to the other sources. Ranges are checked there, for all sources alike.
#[derive(Debug, Serialize, clap::Args)]
struct Options {
    /// Address to listen on; without keys one of this machine's own [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8080]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// Directory of a model in Hugging Face form [default: the built-in model]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<PathBuf>,
    /// What clients call the model [default: the name of its directory; nano for the built-in one]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    model_name: Option<String>,
    /// The server's certificate and those above it, PEM: HTTPS is spoken, and nothing else
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_key: Option<PathBuf>,
    /// Form of the weights in memory: stored, f32, bf16, int8 [default: stored]
    #[arg(long, value_name = "FORM")]
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<String>,
    /// Form of the keys and values of past tokens: auto, f32, bf16, int8 [default: auto]
    #[arg(long, value_name = "FORM")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache: Option<String>,
    /// Memory of the key/value cache [default: 1024]
    #[arg(long, value_name = "MIB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_mib: Option<u32>,
    /// Most requests computed together [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_batch_size: Option<u32>,
    /// Most tokens computed in one step [default: 256]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    token_budget: Option<u32>,
    /// Requests join and leave the batch at any step [default: true]
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dynamic_batching: Option<bool>,
    /// Keep the keys and values of finished texts for those that begin alike [default: true]
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix_cache: Option<bool>,
    /// Most tokens of a request, prompt and answer together [default: all that the model was made for]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_len: Option<u32>,
    /// Most tokens guessed ahead; 0 guesses nothing [default: 12]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    draft_tokens: Option<u32>,
    /// What is taken out of a model's turn as its thoughts: none, ernie (<think>…</think>) [default: none]
    #[arg(long, value_name = "FORM")]
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_parser: Option<String>,
    /// Most answers that wait; beyond, requests get 429 [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_queue: Option<u32>,
    /// Most answers streamed at once [default: 256]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_streams: Option<u32>,
    /// Pages of other sites that may use /v1 from a browser: https://HOST,… or * [default: none]
    #[arg(long, value_name = "ORIGINS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    cors_origins: Option<String>,
    /// Where keys and usage are: sqlite:PATH, sqlite::memory:, postgres://… [default: ernie/serve.db in the user's data directory]
    #[arg(long, value_name = "DATABASE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    database: Option<String>,
    /// The least important messages that are logged: error, warn, info, debug [default: info]
    #[arg(long, value_name = "LEVEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_level: Option<String>,
    /// How messages are written: text, json [default: text]
    #[arg(long, value_name = "FORM")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<String>,
    /// Log the prompt and the text of each answer too, which else are never logged
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_prompts: Option<bool>,
    /// OpenTelemetry collector that takes traces over HTTP, http://HOST:4318; needs a program built with the feature otel
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    otlp_endpoint: Option<String>,
}

/// Runs the command.
pub fn run(arguments: &ServeArguments) -> anyhow::Result<()> {
    let flags = toml::Table::try_from(&arguments.options).context("the flags")?;
    // A variable that is not text cannot be one of ours.
    let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let config = ServeConfig::load(arguments.config.as_deref(), environment, flags).map_err(|error| outcome::usage(error.to_string()))?;
    if arguments.print_config {
        std::io::stdout().lock().write_all(config.to_toml().as_bytes())?;
        return Ok(());
    }
    ernie_serve::log::start(&config);
    let has_keys = ernie_serve::check_address(&config).map_err(|error| match error {
        error @ ernie_serve::Error::NotLoopback { .. } => outcome::usage(error.to_string()),
        error => error.into(),
    })?;
    let model = ModelArgument::new(config.model.as_deref());
    // `.` and `..` are called what they are.
    let directory = |path: &PathBuf| {
        let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
        whole.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_else(|| "model".to_owned())
    };
    let options = config.load_options(rayon::current_num_threads());
    let served = ServedModel {
        name: config.model_name.clone().unwrap_or_else(|| config.model.as_ref().map_or_else(|| "nano".to_owned(), directory)),
        tokenizer: model.tokenizer()?,
        template: model.chat_template()?,
        model: Arc::new(Model::load_with(&model.checkpoint()?, options).with_context(|| format!("cannot load {}", model.name()))?),
    };
    let (name, scheme) = (served.name.clone(), config.scheme());
    let listening = |address| {
        let to_whom = if has_keys { "to those who have a key" } else { "for this machine alone: no keys are configured" };
        // Nobody reading it is no reason not to serve.
        let url = ernie_serve::url(scheme, address);
        let _ = writeln!(std::io::stdout().lock(), "{name} is served at {url}/v1 {to_whom}; a page to talk with it is {url}/");
    };
    match ernie_serve::serve_until_signal(config, served, listening) {
        Err(ernie_serve::Error::Stopped) => Err(Outcome::Interrupted.into()),
        ended => Ok(ended?),
    }
}
