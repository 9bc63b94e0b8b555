//! `ernie keys`: API keys of `ernie serve`, made, listed, revoked.
use std::io::Write;
use std::path::PathBuf;

use clap::Subcommand;
use ernie_serve::ServeConfig;
use ernie_serve::accounts::calendar::Day;
use ernie_serve::accounts::keys::{Grant, Key, Limits, Scope};
use ernie_serve::accounts::usage::Actor;
use ernie_serve::accounts::{self, create_key};
use serde::Serialize;

use crate::outcome;

/// API keys of `ernie serve`: make, list, revoke
#[derive(Debug, clap::Args)]
#[command(
    long_about = "API keys of `ernie serve`: make, list, revoke.\n\n\
        As soon as there is a key, every request to the server needs one, in the header `Authorization: Bearer KEY`; a server that runs notices at once. \
        A key is shown when it is made and never again: of its secret only a hash is stored. A key that is revoked is refused from the next \
        request on, and stays in the list.\n\n\
        The database is the server's: --database, or the configuration of `ernie serve` (--config, ERNIE_SERVE_DATABASE). What is changed is in the \
        audit log there, with the name of the system's user.",
    after_long_help = "Examples:\n  \
        ernie keys create team-a                              for everything that clients need, without limits\n  \
        ernie keys create me --scopes admin                   for the server's administration\n  \
        ernie keys create trial --expires 30d --tokens-per-month 1000000 --requests-per-minute 20\n  \
        ernie keys list\n  \
        ernie keys revoke 6f1d0c2b9a8e7d4c"
)]
pub struct KeysArguments {
    #[command(flatten)]
    database: DatabaseArguments,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    action: Action,
}

/// Where the accounts are; `ernie usage` takes the same.
#[derive(Debug, Serialize, clap::Args)]
pub struct DatabaseArguments {
    /// A file with options of `ernie serve`
    #[arg(long, global = true, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// The server's database: sqlite:PATH or postgres://… [default: ernie/serve.db in the user's data directory]
    #[arg(long, global = true, value_name = "DATABASE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    database: Option<String>,
}

impl DatabaseArguments {
    /// The configuration of the server.
    pub fn config(&self) -> anyhow::Result<ServeConfig> {
        let flags = toml::Table::try_from(self)?;
        let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        ServeConfig::load(self.config.as_deref(), environment, flags).map_err(|error| outcome::usage(error.to_string()))
    }
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key and show it, once
    Create(CreateArguments),
    /// List the keys, without their secrets
    List,
    /// Refuse a key from now on
    Revoke {
        /// Its id, as `ernie keys list` shows it
        #[arg(value_name = "ID")]
        id: String,
    },
}

#[derive(Debug, clap::Args)]
struct CreateArguments {
    /// What to call it, for people
    #[arg(value_name = "NAME")]
    name: String,
    /// What it may be used for, with commas: chat, completions, embeddings, tokenize, models, metrics, admin [default: the first five]
    #[arg(long, value_name = "SCOPES", value_delimiter = ',')]
    scopes: Vec<Scope>,
    /// Models it may use, with commas [default: all]
    #[arg(long, value_name = "MODELS", value_delimiter = ',')]
    models: Option<Vec<String>>,
    /// From when on it is refused: a day (YYYY-MM-DD, UTC), or a number of days from now (30d)
    #[arg(long, value_name = "DAY", value_parser = expiry)]
    expires: Option<u64>,
    /// Most requests in any minute
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u64>,
    /// Most tokens in any minute, of prompts and answers
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u64>,
    /// Most tokens in a month
    #[arg(long, value_name = "N")]
    tokens_per_month: Option<u64>,
    /// Most money in a month, in the configured currency
    #[arg(long, value_name = "AMOUNT")]
    money_per_month: Option<f64>,
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn expiry(text: &str) -> Result<u64, String> {
    if let Some(days) = text.strip_suffix('d').and_then(|days| days.parse::<u64>().ok()) {
        return days.checked_mul(86_400).and_then(|time| time.checked_add(now())).ok_or_else(|| format!("{days} days are too many"));
    }
    text.parse::<Day>().map(Day::start).map_err(|reason| format!("{reason}; or a number of days, as 30d"))
}

/// Runs the command.
pub fn run(arguments: &KeysArguments) -> anyhow::Result<()> {
    let config = arguments.database.config()?;
    let mut out = std::io::stdout().lock();
    match &arguments.action {
        Action::Create(create) => {
            let grant = create.grant()?;
            let (key, presented) = accounts::with_store(&config, async |store| create_key(store, grant, Actor::of_process()).await)?;
            if arguments.json {
                let mut json = serde_json::json!(key);
                json["key"] = presented.into();
                writeln!(out, "{json}")?;
            } else {
                writeln!(out, "{presented}")?;
                eprintln!("Key {} ({}) is made. It is shown this once: only a hash of it is stored.", key.id, key.grant.name);
                if key.grant.expires.is_some_and(|end| end <= now()) {
                    eprintln!("Its end has passed: it is never taken.");
                }
            }
        }
        Action::List => {
            let keys = accounts::with_store(&config, async |store| store.keys().await)?;
            if arguments.json {
                writeln!(out, "{}", serde_json::json!({"data": keys}))?;
            } else if keys.is_empty() {
                writeln!(out, "There are no keys: the server answers this machine only, and everybody on it.")?;
            } else {
                let head = ["ID", "NAME", "SCOPES", "MODELS", "CREATED", "LAST USED", "STATE", "LIMITS"].map(str::to_owned).to_vec();
                table(&mut out, std::iter::once(head).chain(keys.iter().map(row)).collect(), 0)?;
            }
        }
        Action::Revoke { id } => {
            let key = accounts::with_store(&config, async |store| accounts::revoke_key(store, id, Actor::of_process()).await)?;
            let key = key.ok_or_else(|| anyhow::anyhow!("there is no key {id}; `ernie keys list` shows them"))?;
            if arguments.json {
                writeln!(out, "{}", serde_json::json!(key))?;
            } else {
                writeln!(out, "Key {} ({}) is revoked.", key.id, key.grant.name)?;
            }
        }
    }
    Ok(())
}

impl CreateArguments {
    fn grant(&self) -> anyhow::Result<Grant> {
        let base = Grant::new(&self.name);
        let grant = Grant {
            scopes: if self.scopes.is_empty() { base.scopes.clone() } else { self.scopes.clone() },
            models: self.models.clone(),
            expires: self.expires,
            limits: Limits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                tokens_per_month: self.tokens_per_month,
                money_per_month: self.money_per_month,
            },
            ..base
        };
        grant.checked().map_err(|(field, reason)| outcome::usage(format!("{field}: {reason}")))
    }
}

/// A key as a row of the table.
fn row(key: &Key) -> Vec<String> {
    let day = |time: u64| Day::of(time).to_string();
    let Limits { requests_per_minute, tokens_per_minute, tokens_per_month, money_per_month } = key.grant.limits;
    let state = match (key.revoked, key.grant.expires) {
        (Some(at), _) => format!("revoked {}", day(at)),
        (None, Some(at)) if at <= now() => format!("expired {}", day(at)),
        (None, Some(at)) => format!("until {}", day(at)),
        (None, None) => "valid".to_owned(),
    };
    let limits = [
        requests_per_minute.map(|limit| format!("{limit} requests/min")),
        tokens_per_minute.map(|limit| format!("{limit} tokens/min")),
        tokens_per_month.map(|limit| format!("{limit} tokens/month")),
        money_per_month.map(|limit| format!("{limit}/month")),
    ];
    let limits = limits.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let scopes = key.grant.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",");
    let or = |text: String, none: &str| if text.is_empty() { none.to_owned() } else { text };
    vec![
        key.id.clone(),
        key.grant.name.clone(),
        scopes,
        key.grant.models.as_ref().map_or_else(|| "all".to_owned(), |models| models.join(",")),
        day(key.created),
        key.last_used.map_or_else(|| "-".to_owned(), day),
        state,
        or(limits, "-"),
    ]
}

/// Columns as wide as they need to be; the last `right` of them are numbers.
pub fn table(out: &mut impl Write, rows: Vec<Vec<String>>, right: usize) -> std::io::Result<()> {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in &rows {
        let cell = |(column, text): (usize, &String)| {
            let space = " ".repeat(widths[column] - text.chars().count());
            if column + right < columns { format!("{text}{space}") } else { format!("{space}{text}") }
        };
        let line = row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
