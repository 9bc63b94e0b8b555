//! What requests used up, added up by day, key and model.
//!
//! All figures are whole numbers of small units, so that sums are the same in any order and in every database.
use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use utoipa::ToSchema;

use super::calendar::Day;
use super::keys::NANOS;

/// What usage is added up by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsageKey {
    /// UTC, `YYYY-MM-DD`.
    pub day: String,
    /// Whose; empty without a key.
    pub key_id: String,
    /// Which model.
    pub model: String,
}

/// Sums over requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many.
    pub requests: i64,
    /// Tokens of prompts.
    pub prompt_tokens: i64,
    /// Tokens chosen.
    pub completion_tokens: i64,
    /// Of the engine.
    pub microseconds: i64,
    /// Of the processor, as [`super::energy`] has them.
    pub microjoules: i64,
    /// Billionths of the currency.
    pub money: i64,
}

impl Totals {
    /// Adds another sum. It stops at the largest number instead of starting over.
    pub fn add(&mut self, other: &Totals) {
        let Totals { requests, prompt_tokens, completion_tokens, microseconds, microjoules, money } = self;
        let pairs = [
            (requests, other.requests),
            (prompt_tokens, other.prompt_tokens),
            (completion_tokens, other.completion_tokens),
            (microseconds, other.microseconds),
            (microjoules, other.microjoules),
            (money, other.money),
        ];
        for (sum, more) in pairs {
            *sum = sum.saturating_add(more);
        }
    }

    /// Tokens of prompts and answers.
    pub fn tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens).max(0) as u64
    }
}

/// What rows of a report are for; each further one splits them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupBy {
    /// A row for each day.
    pub day: bool,
    /// A row for each key.
    pub key: bool,
    /// A row for each model.
    pub model: bool,
}

impl FromStr for GroupBy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut by = GroupBy::default();
        for part in text.split(',') {
            match part {
                "day" => by.day = true,
                "key" => by.key = true,
                "model" => by.model = true,
                other => return Err(format!("expected day, key, model, or several with commas, got {other:?}")),
            }
        }
        Ok(by)
    }
}

/// The days of a report, the last included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    /// The first.
    pub from: Day,
    /// The last.
    pub to: Day,
}

impl Period {
    /// From the days that were named; the last is today if not said, the first 29 days before the last.
    ///
    /// # Errors
    /// The field at fault: no day, or the first after the last.
    pub fn named(from: Option<&str>, to: Option<&str>, today: Day) -> Result<Self, (&'static str, String)> {
        let to = to.map_or(Ok(today), |text| text.parse().map_err(|reason| ("to", reason)))?;
        let from = from.map_or(Ok(to.before(29)), |text| text.parse().map_err(|reason| ("from", reason)))?;
        if from > to {
            return Err(("from", format!("expected a day up to {to}, got {from}")));
        }
        Ok(Period { from, to })
    }
}

/// A row of a report.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct UsageRow {
    /// UTC; null if rows are not for days.
    #[schema(format = Date)]
    pub day: Option<String>,
    /// The key's id; null if rows are not for keys, or without a key.
    pub key_id: Option<String>,
    /// Its name.
    pub key_name: Option<String>,
    /// Null if rows are not for models.
    pub model: Option<String>,
    /// Requests.
    pub requests: i64,
    /// Tokens of prompts.
    pub prompt_tokens: i64,
    /// Tokens chosen.
    pub completion_tokens: i64,
    /// Of the engine, shared among those that are computed together.
    pub seconds: f64,
    /// Measured or modelled.
    pub joules: f64,
    /// In the configured currency.
    pub money: f64,
}

impl UsageRow {
    /// From sums.
    pub fn new(day: Option<String>, key: (Option<String>, Option<String>), model: Option<String>, totals: Totals) -> Self {
        let (key_id, key_name) = key;
        let Totals { requests, prompt_tokens, completion_tokens, microseconds, microjoules, money } = totals;
        UsageRow {
            day,
            key_id: key_id.filter(|id| !id.is_empty()),
            key_name,
            model,
            requests,
            prompt_tokens,
            completion_tokens,
            seconds: microseconds as f64 / 1e6,
            joules: microjoules as f64 / 1e6,
            money: money as f64 / NANOS,
        }
    }
}

/// What tokens cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prices {
    /// Of a million tokens of prompts.
    pub per_million_prompt_tokens: f64,
    /// Of a million tokens chosen.
    pub per_million_completion_tokens: f64,
}

impl Prices {
    /// Billionths of the currency.
    pub fn money(&self, prompt_tokens: u64, completion_tokens: u64) -> i64 {
        let of = |tokens: u64, price: f64| (tokens as f64 * price * (NANOS / 1e6)).round() as i64;
        of(prompt_tokens, self.per_million_prompt_tokens).saturating_add(of(completion_tokens, self.per_million_completion_tokens))
    }
}

/// A line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct AuditEntry {
    /// Later ones have greater ids.
    pub id: i64,
    /// Unix seconds.
    pub at: u64,
    /// Who: `key:ID`, `cli:USER`, or `local` for a request without a key.
    pub actor: String,
    /// What was done.
    pub action: String,
    /// To what.
    pub target: String,
    /// How.
    pub detail: String,
}

/// What is written into the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Unix seconds.
    pub at: u64,
    /// See [`AuditEntry::actor`].
    pub actor: Actor,
    /// What was done, as `keys.create`.
    pub action: &'static str,
    /// To what.
    pub target: String,
    /// How.
    pub detail: String,
}

/// Who does something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A request with this key.
    Key(String),
    /// A user of the system, by the command line.
    CommandLine(String),
    /// A request without a key, from this machine.
    Local,
}

impl Actor {
    /// Whoever runs this process, as the system knows them: the name of its user in `/etc/passwd`, else the number. What the environment says anybody can set.
    #[cfg(unix)]
    pub fn of_process() -> Self {
        let id = rustix::process::getuid().as_raw();
        let users = std::fs::read("/etc/passwd").unwrap_or_default();
        Actor::CommandLine(user(&String::from_utf8_lossy(&users), id).unwrap_or_else(|| format!("uid {id}")))
    }

    /// Whoever runs this process: the system is not asked.
    #[cfg(not(unix))]
    pub fn of_process() -> Self {
        Actor::CommandLine("unknown".to_owned())
    }
}

/// The name of a user by its number: the first and the third field of a line of `/etc/passwd`.
#[cfg(unix)]
fn user(users: &str, id: u32) -> Option<String> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::Key(id) => write!(f, "key:{id}"),
            // A line of the log stays one line whatever the system calls its users.
            Actor::CommandLine(user) => write!(f, "cli:{}", user.escape_debug()),
            Actor::Local => f.write_str("local"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_in_billionths() {
        let prices = Prices { per_million_prompt_tokens: 0.15, per_million_completion_tokens: 0.6 };
        assert_eq!((prices.money(1, 0), prices.money(0, 1), prices.money(1_000_000, 1_000_000)), (150, 600, 750_000_000));
        assert_eq!(Prices::default().money(u64::MAX, u64::MAX), 0);
        assert_eq!(Prices { per_million_prompt_tokens: 1e6, ..prices }.money(u64::MAX, 5), i64::MAX);
    }

    #[test]
    #[cfg(unix)]
    fn users_by_their_numbers() {
        let users = "root:x:0:0:root:/:/bin/sh\n+\n:x:7:7::/:\n# ann:x:5\nann:x:1000:1000:Ann,,,:/ann:/bin/sh\nbob:x:10001:1::/:\nanne:x:1000:0::/:\n";
        let names = [0, 1000, 10001, 7, 100].map(|id| user(users, id));
        assert_eq!(names, [Some("root".to_owned()), Some("ann".to_owned()), Some("bob".to_owned()), None, None]);
    }

    #[test]
    fn periods_and_groups() {
        let today: Day = "2024-03-01".parse().unwrap();
        let period = Period::named(None, None, today).unwrap();
        assert_eq!((period.from.to_string(), period.to.to_string()), ("2024-02-01".to_owned(), "2024-03-01".to_owned()));
        assert_eq!(Period::named(Some("x"), None, today).unwrap_err().0, "from");
        assert_eq!(Period::named(Some("2024-03-02"), None, today).unwrap_err().0, "from");
        assert_eq!(Period::named(None, Some("2024-02-30"), today).unwrap_err().0, "to");
        assert_eq!("day,model".parse(), Ok(GroupBy { day: true, key: false, model: true }));
        assert!("week".parse::<GroupBy>().is_err() && "".parse::<GroupBy>().is_err());
    }
}
