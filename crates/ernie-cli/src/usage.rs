//! `ernie usage`: what was used of `ernie serve`, and by whom.
use std::io::Write;

use ernie_serve::accounts;
use ernie_serve::accounts::calendar::Day;
use ernie_serve::accounts::usage::{GroupBy, Period, UsageRow};

use crate::keys::{DatabaseArguments, table};
use crate::outcome;

/// What was used of `ernie serve`, by day, key or model
#[derive(Debug, clap::Args)]
#[command(
    long_about = "What was used of `ernie serve`, by day, key or model: requests, tokens of prompts and answers, seconds of the engine (shared among requests that are \
        computed together), joules of the processor in that time, and money at the prices of the server's configuration. Days are those of UTC.\n\n\
        Joules are measured where the processor's counters can be read (RAPL), else modelled as `modelled_watts` of the configuration × seconds; the server's \
        /admin/api/session says which.",
    after_long_help = "Examples:\n  \
        ernie usage                                      the last 30 days, day by day\n  \
        ernie usage --by key,model --from 2026-01-01     who used what since then\n  \
        ernie usage --by key --json"
)]
pub struct UsageArguments {
    #[command(flatten)]
    database: DatabaseArguments,
    /// What rows are for: day, key, model, or several with commas
    #[arg(long, default_value = "day", value_name = "WHAT")]
    by: GroupBy,
    /// The first day, YYYY-MM-DD [default: 29 days before the last]
    #[arg(long, value_name = "DAY")]
    from: Option<String>,
    /// The last day [default: today]
    #[arg(long, value_name = "DAY")]
    to: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: &UsageArguments) -> anyhow::Result<()> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let period = Period::named(arguments.from.as_deref(), arguments.to.as_deref(), Day::of(now))
        .map_err(|(field, reason)| outcome::usage(format!("--{field}: {reason}")))?;
    let config = arguments.database.config()?;
    let rows = accounts::with_store(&config, async |store| store.usage(period, arguments.by).await)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::json!({"data": rows, "currency": config.currency}))?;
    } else if rows.is_empty() {
        writeln!(out, "Nothing was used from {} to {}.", period.from, period.to)?;
    } else {
        let by = arguments.by;
        let names = [(by.day, "DAY"), (by.key, "KEY"), (by.model, "MODEL")];
        let mut head: Vec<String> = names.into_iter().filter(|(shown, _)| *shown).map(|(_, name)| name.to_owned()).collect();
        head.extend(["REQUESTS", "PROMPT TOKENS", "ANSWER TOKENS", "SECONDS", "JOULES"].map(str::to_owned));
        head.push(config.currency.clone());
        let row = |row: &UsageRow| {
            let key = match (&row.key_id, &row.key_name) {
                (Some(id), Some(name)) => format!("{name} ({id})"),
                (Some(id), None) => id.clone(),
                (None, _) => "no key".to_owned(),
            };
            let cells = [(by.day, row.day.clone().unwrap_or_default()), (by.key, key), (by.model, row.model.clone().unwrap_or_default())];
            let mut cells: Vec<String> = cells.into_iter().filter(|(shown, _)| *shown).map(|(_, text)| text).collect();
            cells.extend([row.requests, row.prompt_tokens, row.completion_tokens].map(|count| count.to_string()));
            cells.extend([format!("{:.2}", row.seconds), format!("{:.1}", row.joules), format!("{:.6}", row.money)]);
            cells
        };
        table(&mut out, std::iter::once(head).chain(rows.iter().map(row)).collect(), 6)?;
    }
    Ok(())
}
