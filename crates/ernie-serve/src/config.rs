//! What a server is told, and by whom: a TOML file, then the environment, then flags; the later wins.
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ernie_engine::{DraftOptions, EngineOptions, KvDtype, LoadOptions, WeightDtype};
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use crate::accounts::database::{Database, without_passwords};
use crate::cors;
use crate::error::{Error, Result};

/// What the names of environment variables begin with; the key of the configuration in capitals follows.
pub const ENVIRONMENT_PREFIX: &str = "ERNIE_SERVE_";

/// The configuration of a server. Every key may stand in the file, in the environment and on the command line.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeConfig {
    /// Address to listen on; without keys only one of this machine's own.
    #[serde(deserialize_with = "address")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Directory of the model; the built-in one if there is none.
    pub model: Option<PathBuf>,
    /// What clients call the model; its directory's name if there is none.
    pub model_name: Option<String>,
    /// The server's certificate and those above it, PEM; with `tls_key` HTTPS is spoken, and nothing else. Read again when it changes.
    pub tls_certificate: Option<PathBuf>,
    /// The certificate's private key, PEM.
    pub tls_key: Option<PathBuf>,
    /// Form of the weights in memory.
    pub weights: Weights,
    /// Form of the keys and values of past tokens.
    pub kv_cache: KvCache,
    /// Memory of the key/value cache, MiB.
    pub cache_mib: usize,
    /// Most requests computed together.
    pub max_batch_size: usize,
    /// Most tokens computed in one step.
    pub token_budget: usize,
    /// Requests join and leave the batch at any step.
    pub dynamic_batching: bool,
    /// Keep the keys and values of finished texts.
    pub prefix_cache: bool,
    /// Most tokens of a request, prompt and answer together; 0 takes what the model was made for.
    pub max_len: usize,
    /// Most tokens guessed ahead; 0 guesses nothing.
    pub draft_tokens: usize,
    /// What is taken out of a model's turn as its thoughts.
    pub reasoning_parser: ReasoningParser,
    /// Most answers that may wait; beyond, requests get 429.
    pub max_queue: usize,
    /// Most answers streamed at once.
    pub max_streams: usize,
    /// Most connections; others wait to be accepted.
    pub max_connections: usize,
    /// Events of a request that may wait for its reader, for each of its answers; a reader that is further behind is cut off.
    pub stream_buffer: usize,
    /// Largest body of a request, bytes.
    pub max_body_bytes: usize,
    /// Seconds for the head of a request.
    pub header_timeout_s: u64,
    /// Seconds for the body of a request.
    pub body_timeout_s: u64,
    /// Seconds without a byte taken after which a reader is cut off.
    pub write_timeout_s: u64,
    /// Seconds that an answer may take, with the time that it waits for its turn.
    pub answer_timeout_s: u64,
    /// Seconds that a shutdown waits for answers under way.
    pub drain_timeout_s: u64,
    /// Pages that may use `/v1` from a browser, `https://HOST`, or `*` for all; none besides the server's own if there are none.
    #[serde(deserialize_with = "list")]
    pub cors_origins: Vec<String>,
    /// Where keys, usage and the audit log are: `sqlite:PATH`, `sqlite::memory:` or `postgres://…`; a file under the user's data directory if there is none.
    pub database: Option<String>,
    /// What money is counted in; a name for people.
    pub currency: String,
    /// What a million tokens of prompts cost.
    pub price_per_million_prompt_tokens: f64,
    /// What a million tokens of answers cost.
    pub price_per_million_completion_tokens: f64,
    /// Power that is put down to requests where the processor's own counters cannot be read, watts.
    pub modelled_watts: f64,
    /// The least important messages that are logged.
    pub log_level: LogLevel,
    /// How messages are written.
    pub log_format: LogFormat,
    /// Whether the log's line about an answer has the prompt and the text too; else neither is ever in it.
    pub log_prompts: bool,
    /// The OpenTelemetry collector that takes traces, `http://HOST:PORT`; needs the feature `otel`.
    pub otlp_endpoint: Option<String>,
}

/// An address, or `localhost`.
fn address<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<IpAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "localhost" {
        return Ok(IpAddr::from([127, 0, 0, 1]));
    }
    text.parse().map_err(|_| serde::de::Error::custom(format!("expected an IP address as 127.0.0.1 or ::1, or localhost, got {text:?}")))
}

/// Form of the weights in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// As the files have them.
    Stored,
    /// 32-bit.
    F32,
    /// 16-bit brain float.
    Bf16,
    /// 8-bit, rounded while loading.
    Int8,
}

/// Form of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvCache {
    /// bf16 with 8-bit weights, else 32-bit.
    Auto,
    /// 32-bit.
    F32,
    /// 16-bit brain float.
    Bf16,
    /// 8-bit.
    Int8,
}

/// What is taken out of a model's turn as its thoughts: `reasoning_content` of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningParser {
    /// Nothing: the text stays as the model wrote it.
    None,
    /// `<think>…</think>`, as the family's Thinking models write it, and what they wrap the text in, `<response>…</response>`.
    Ernie,
}

/// The least important messages that are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// How messages are written, one a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Default for ServeConfig {
    fn default() -> Self {
        let engine = EngineOptions::default();
        ServeConfig {
            host: IpAddr::from([127, 0, 0, 1]),
            port: 8080,
            model: None,
            model_name: None,
            tls_certificate: None,
            tls_key: None,
            weights: Weights::Stored,
            kv_cache: KvCache::Auto,
            cache_mib: engine.cache_bytes >> 20,
            max_batch_size: engine.max_batch_size,
            token_budget: engine.token_budget,
            dynamic_batching: engine.dynamic_batching,
            prefix_cache: engine.prefix_cache,
            max_len: engine.max_len,
            draft_tokens: engine.drafts.max_tokens,
            reasoning_parser: ReasoningParser::None,
            max_queue: 128,
            max_streams: 256,
            // Idle ones cost some kilobytes each, and must not keep others out.
            max_connections: 12_000,
            stream_buffer: 1024,
            max_body_bytes: 4 << 20,
            header_timeout_s: 10,
            body_timeout_s: 30,
            write_timeout_s: 30,
            answer_timeout_s: 3600,
            drain_timeout_s: 30,
            cors_origins: Vec::new(),
            database: None,
            currency: "USD".to_owned(),
            price_per_million_prompt_tokens: 0.0,
            price_per_million_completion_tokens: 0.0,
            modelled_watts: 65.0,
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
            log_prompts: false,
            otlp_endpoint: None,
        }
    }
}

impl ServeConfig {
    /// From a file, if one is named, the variables of the environment and the flags that were given, by key.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML, unknown keys or variables, values of the wrong kind or out of range; the error names the source.
    pub fn load(file: Option<&Path>, environment: impl IntoIterator<Item = (String, String)>, flags: Table) -> Result<Self> {
        let mut table = Table::new();
        if let Some(path) = file {
            let refuse = |reason: String| Error::Config { origin: path.display().to_string(), reason };
            let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
            // The message shows the line.
            table = text.parse::<Table>().map_err(|error| refuse(without_passwords(&error.to_string())))?;
            checked(&table).map_err(refuse)?;
        }
        let defaults =
            Table::try_from(Self::default()).map_err(|error| Error::Config { origin: "defaults".into(), reason: error.to_string() })?;
        for (name, text) in environment {
            let Some(key) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
            let key = key.to_ascii_lowercase();
            // What Kubernetes and Docker tell of a service that is called ernie-serve.
            if key.starts_with("service_") || key.starts_with("port_") || (key == "port" && text.contains("://")) {
                continue;
            }
            // Text, unless the default says that it is something else.
            let value = match defaults.get(&key) {
                None | Some(Value::String(_)) => Value::String(text),
                Some(_) => {
                    let parsed = format!("value = {text}").parse::<Table>().ok().and_then(|mut line| line.remove("value"));
                    parsed.unwrap_or(Value::String(text))
                }
            };
            checked(&Table::from_iter([(key.clone(), value.clone())])).map_err(|reason| Error::Config { origin: name, reason })?;
            table.insert(key, value);
        }
        table.extend(flags);
        let config = checked(&table).map_err(|reason| Error::Config { origin: "configuration".to_owned(), reason })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what types do not.
    ///
    /// # Errors
    /// A value out of range; a certificate without its key.
    pub fn validate(&self) -> Result<()> {
        let refuse = |reason: String| Error::Config { origin: "configuration".to_owned(), reason };
        if self.tls_certificate.is_some() != self.tls_key.is_some() {
            return Err(refuse("tls_certificate and tls_key: expected both or neither".to_owned()));
        }
        let amounts = [
            ("price_per_million_prompt_tokens", self.price_per_million_prompt_tokens),
            ("price_per_million_completion_tokens", self.price_per_million_completion_tokens),
            ("modelled_watts", self.modelled_watts),
        ];
        if let Some((key, value)) = amounts.iter().find(|(_, value)| !(0.0..=1e6).contains(value)) {
            return Err(refuse(format!("{key}: expected an amount from 0 to 1000000, got {value}")));
        }
        if let Some(name) = &self.database {
            Database::named(Some(name)).map_err(|error| refuse(error.to_string()))?;
        }
        for origin in &self.cors_origins {
            cors::check(origin).map_err(|reason| refuse(format!("cors_origins: {reason}")))?;
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            check_collector(endpoint).map_err(|reason| refuse(format!("otlp_endpoint: {reason}")))?;
        }
        if !(1..=16).contains(&self.currency.chars().count()) || self.currency.chars().any(char::is_control) {
            return Err(refuse(format!("currency: expected a name of 1 to 16 characters, got {:?}", self.currency)));
        }
        let times = [
            ("header_timeout_s", self.header_timeout_s),
            ("body_timeout_s", self.body_timeout_s),
            ("write_timeout_s", self.write_timeout_s),
            ("answer_timeout_s", self.answer_timeout_s),
            ("drain_timeout_s", self.drain_timeout_s),
        ];
        // Times beyond would be later than any clock shows.
        if let Some((key, value)) = times.iter().find(|(_, value)| *value > u32::MAX.into()) {
            return Err(refuse(format!("{key}: expected at most {} seconds, got {value}", u32::MAX)));
        }
        let positive = [
            ("cache_mib", self.cache_mib),
            ("max_batch_size", self.max_batch_size),
            ("token_budget", self.token_budget),
            ("max_queue", self.max_queue),
            ("max_streams", self.max_streams),
            ("max_connections", self.max_connections),
            ("stream_buffer", self.stream_buffer),
            ("max_body_bytes", self.max_body_bytes),
        ];
        // Above, sizes of channels and of memory in bytes would overflow.
        match positive.iter().find(|(_, value)| !(1..=u32::MAX as usize).contains(value)) {
            None => Ok(()),
            Some((key, value)) => Err(refuse(format!("{key}: expected a number from 1 to {}, got {value}", u32::MAX))),
        }
    }

    /// For the engine.
    pub fn engine_options(&self) -> EngineOptions {
        EngineOptions {
            cache_bytes: self.cache_mib << 20,
            max_batch_size: self.max_batch_size,
            token_budget: self.token_budget,
            dynamic_batching: self.dynamic_batching,
            prefix_cache: self.prefix_cache,
            max_len: self.max_len,
            drafts: DraftOptions { max_tokens: self.draft_tokens },
            ..EngineOptions::default()
        }
    }

    /// What URLs of this server begin with.
    pub fn scheme(&self) -> &'static str {
        if self.tls_certificate.is_some() { "https" } else { "http" }
    }

    /// For loading the model.
    pub fn load_options(&self, threads: usize) -> LoadOptions {
        let dtype = match self.weights {
            Weights::Stored => WeightDtype::Auto,
            Weights::F32 => WeightDtype::F32,
            Weights::Bf16 => WeightDtype::Bf16,
            Weights::Int8 => WeightDtype::Int8,
        };
        let kv_dtype = match self.kv_cache {
            KvCache::Auto => None,
            KvCache::F32 => Some(KvDtype::F32),
            KvCache::Bf16 => Some(KvDtype::Bf16),
            KvCache::Int8 => Some(KvDtype::Int8),
        };
        LoadOptions { dtype, threads, kv_dtype }
    }

    /// As a TOML file that gives the same configuration, but for the password of the database: `***` stands in its place.
    pub fn to_toml(&self) -> String {
        let shown = ServeConfig { database: self.database.as_deref().map(without_passwords), ..self.clone() };
        toml::to_string(&shown).unwrap_or_else(|error| unreachable!("plain values are TOML: {error}"))
    }
}

/// A list, or one text with commas, as a flag or a variable has it.
fn list<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a list of texts, or one with commas")]
    enum Either {
        Text(String),
        List(Vec<String>),
    }
    Ok(match Either::deserialize(deserializer)? {
        Either::Text(text) => text.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect(),
        Either::List(list) => list,
    })
}

/// Whether traces can go there, and from this program at all.
fn check_collector(endpoint: &str) -> std::result::Result<(), String> {
    if !cfg!(feature = "otel") {
        let how = "cargo build --release -p ernie-cli --features otel";
        return Err(format!("this program was built without OpenTelemetry; build it with: {how}"));
    }
    if endpoint.contains('@') {
        return Err("expected a URL without credentials; headers for the collector go into OTEL_EXPORTER_OTLP_HEADERS".to_owned());
    }
    let url = endpoint.parse::<axum::http::Uri>().ok();
    let plain =
        url.is_some_and(|url| url.scheme_str() == Some("http") && url.host().is_some_and(|host| !host.is_empty()) && url.query().is_none());
    if plain { Ok(()) } else { Err("expected http://HOST:PORT, a collector on this machine or in a network of your own".to_owned()) }
}

/// The configuration of a table, with the key named if it is at fault.
fn checked(table: &Table) -> std::result::Result<ServeConfig, String> {
    serde_path_to_error::deserialize(table.clone()).map_err(|error| {
        let message = without_passwords(error.inner().message());
        match error.path().to_string().as_str() {
            "." => message,
            path => format!("{path}: {message}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: Option<&Path>, environment: &[(&str, &str)], flags: &str) -> Result<ServeConfig> {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        ServeConfig::load(file, environment, flags.parse().unwrap())
    }

    #[test]
    fn the_later_source_wins_and_what_is_printed_gives_the_same_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        std::fs::write(&path, "port = 1\nmax_queue = 2\nmodel_name = \"file\"\nweights = \"int8\"\n").unwrap();
        let environment =
            [("ERNIE_SERVE_PORT", "3"), ("ERNIE_SERVE_MODEL_NAME", "4"), ("ERNIE_SERVE_PREFIX_CACHE", "false"), ("HOME", "/")];
        let of_kubernetes = [
            ("ERNIE_SERVE_PORT", "tcp://10.0.0.1:80"),
            ("ERNIE_SERVE_SERVICE_HOST", "10.0.0.1"),
            ("ERNIE_SERVE_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ];
        assert_eq!(load(None, &of_kubernetes, "").unwrap(), ServeConfig::default());
        let config = load(Some(&path), &environment, "port = 5\nhost = \"::1\"").unwrap();
        let expected = ServeConfig {
            port: 5,
            host: "::1".parse().unwrap(),
            max_queue: 2,
            model_name: Some("4".to_owned()),
            prefix_cache: false,
            weights: Weights::Int8,
            ..ServeConfig::default()
        };
        assert_eq!(config, expected);
        std::fs::write(&path, config.to_toml()).unwrap();
        assert_eq!(load(Some(&path), &[], "").unwrap(), config);
    }

    #[test]
    fn a_list_may_be_a_text_with_commas() {
        let two = ["http://localhost:3000", "https://chat.example"];
        for text in ["http://localhost:3000,https://chat.example", "[\"http://localhost:3000\", \"https://chat.example\"]"] {
            assert_eq!(load(None, &[("ERNIE_SERVE_CORS_ORIGINS", text)], "").unwrap().cors_origins, two);
        }
        assert_eq!(load(None, &[], &format!("cors_origins = \"{}\"", two.join(", "))).unwrap().cors_origins, two);
        assert_eq!(load(None, &[], "cors_origins = \"*\"").unwrap().cors_origins, ["*"]);
    }

    #[test]
    fn a_collector_needs_the_feature_and_a_plain_url() {
        let load = |url: &str| load(None, &[("ERNIE_SERVE_OTLP_ENDPOINT", url)], "");
        if cfg!(feature = "otel") {
            for url in ["http://localhost:4318", "http://[::1]:4318/", "http://collector/some/v1/traces"] {
                assert_eq!(load(url).unwrap().otlp_endpoint.as_deref(), Some(url));
            }
            for url in ["https://collector:4318", "localhost:4318", "http://", "http:///v1/traces", "grpc://collector:4317", ""] {
                let error = load(url).unwrap_err().to_string();
                assert!(error.contains("otlp_endpoint") && error.contains("http://HOST:PORT"), "{url}: {error}");
            }
            let error = load("http://me:hidden@collector:4318").unwrap_err().to_string();
            assert!(error.contains("without credentials") && !error.contains("hidden"), "{error}");
        } else {
            let error = load("http://localhost:4318").unwrap_err().to_string();
            assert!(error.contains("otlp_endpoint") && error.contains("--features otel"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_source() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        for (text, part) in [("port = 70000", "port"), ("prot = 1", "prot"), ("port = ", "serve.toml"), ("weights = \"int9\"", "int9")] {
            std::fs::write(&path, text).unwrap();
            let error = load(Some(&path), &[], "").unwrap_err().to_string();
            assert!(error.contains("serve.toml") && error.contains(part), "{text}: {error}");
        }
        for (name, value) in [("ERNIE_SERVE_PORT", "eighty"), ("ERNIE_SERVE_PROT", "1"), ("ERNIE_SERVE_PREFIX_CACHE", "yes")] {
            let error = load(None, &[(name, value)], "").unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        for (flags, part) in [
            ("currency = \"\"", "currency"),
            ("database = \"mysql://x\"", "sqlite:PATH"),
            ("modelled_watts = -1.0", "modelled_watts"),
            ("max_queue = 0", "max_queue"),
            ("cache_mib = 10000000000", "cache_mib"),
            ("answer_timeout_s = 10000000000", "answer_timeout_s"),
            ("host = \"example.com\"", "expected an IP address"),
            ("tls_key = \"k\"", "tls_certificate"),
            ("cors_origins = [\"chat.example\"]", "cors_origins"),
            ("cors_origins = 5", "cors_origins"),
        ] {
            let error = load(None, &[], flags).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
