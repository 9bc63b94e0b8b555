//! API keys: what one may do, and how its secret is made and checked.
//!
//! A key as its owner has it is `ernie_ID_SECRET`. The id finds the row and may be shown; the secret is 256 random bits, of which only the SHA-256 is stored.
//! A password would need a slow hash; 256 bits that nobody chose cannot be guessed, however fast the hash.
use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use utoipa::ToSchema;

/// What a key as its owner has it begins with, so that scanners of leaked secrets can know it.
const PREFIX: &str = "ernie_";
/// Most characters of a name.
const MAX_NAME: usize = 100;
/// Most models that a key may list.
const MAX_MODELS: usize = 100;
/// Largest limit: far from where sums would overflow.
const MAX_LIMIT: u64 = 1_000_000_000_000;
/// Largest budget of money: in billionths it fits in 63 bits.
const MAX_MONEY: f64 = 1e9;
/// Parts of the unit in which money is counted.
pub const NANOS: f64 = 1e9;

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Answers to conversations.
    Chat,
    /// Continuations and scores of texts.
    Completions,
    /// Vectors of texts.
    Embeddings,
    /// Text to tokens and back.
    Tokenize,
    /// Which models there are.
    Models,
    /// Counters, and what goes on now.
    Metrics,
    /// Keys, usage, settings; includes `metrics` and `models`.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 7] =
        [Scope::Chat, Scope::Completions, Scope::Embeddings, Scope::Tokenize, Scope::Models, Scope::Metrics, Scope::Admin];
    /// What a key may do of which nothing was said: everything that clients of the model need.
    pub const INFERENCE: [Scope; 5] = [Scope::Chat, Scope::Completions, Scope::Embeddings, Scope::Tokenize, Scope::Models];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Chat => "chat",
            Scope::Completions => "completions",
            Scope::Embeddings => "embeddings",
            Scope::Tokenize => "tokenize",
            Scope::Models => "models",
            Scope::Metrics => "metrics",
            Scope::Admin => "admin",
        }
    }

    /// Whether who has it may do what needs `wanted`.
    pub fn allows(self, wanted: Scope) -> bool {
        self == wanted || (self == Scope::Admin && matches!(wanted, Scope::Metrics | Scope::Models))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Scope::ALL.map(Scope::as_str).join(", ");
        Scope::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or_else(|| format!("expected one of {}, got {text:?}", known()))
    }
}

/// What a key may use up; `None` is without a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Limits {
    /// Requests in any minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens in any minute, those of prompts and those that were or may be generated.
    pub tokens_per_minute: Option<u64>,
    /// Tokens in a month of UTC.
    pub tokens_per_month: Option<u64>,
    /// Money in a month of UTC, in the configured currency.
    pub money_per_month: Option<f64>,
}

/// What somebody decides about a key.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grant {
    /// For people.
    pub name: String,
    /// What it may be used for.
    pub scopes: Vec<Scope>,
    /// Which models; all if there is no list.
    pub models: Option<Vec<String>>,
    /// Unix seconds from which on it is refused.
    pub expires: Option<u64>,
    /// What it may use up.
    #[serde(flatten)]
    pub limits: Limits,
}

/// A key without its secret.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Key {
    /// What finds it.
    pub id: String,
    /// What was decided about it.
    #[serde(flatten)]
    pub grant: Grant,
    /// Unix seconds.
    pub created: u64,
    /// Unix seconds since when it is refused for good.
    pub revoked: Option<u64>,
    /// Unix seconds of a use, at most a minute before the last.
    pub last_used: Option<u64>,
}

impl Key {
    /// Whether it is taken at a time.
    pub fn is_valid(&self, now: u64) -> bool {
        self.revoked.is_none() && self.grant.expires.is_none_or(|expires| now < expires)
    }

    /// Whether it may be used for something.
    pub fn allows(&self, wanted: Scope) -> bool {
        self.grant.scopes.iter().any(|scope| scope.allows(wanted))
    }

    /// Whether it may use a model.
    pub fn allows_model(&self, model: &str) -> bool {
        self.grant.models.as_ref().is_none_or(|models| models.iter().any(|name| name == model))
    }
}

impl Grant {
    /// A key for all that clients need, without limits.
    pub fn new(name: impl Into<String>) -> Self {
        Grant { name: name.into(), scopes: Scope::INFERENCE.to_vec(), models: None, expires: None, limits: Limits::default() }
    }

    /// In the one form in which it is stored, if nothing is wrong with it.
    ///
    /// # Errors
    /// The field at fault, and what was expected and came.
    pub fn checked(mut self) -> Result<Self, (&'static str, String)> {
        plain("name", &self.name)?;
        self.scopes.sort_unstable();
        self.scopes.dedup();
        if self.scopes.is_empty() {
            return Err(("scopes", "expected at least one scope".to_owned()));
        }
        if let Some(models) = &self.models {
            if !(1..=MAX_MODELS).contains(&models.len()) {
                return Err(("models", format!("expected 1 to {MAX_MODELS} names, or nothing for all models; got {}", models.len())));
            }
            models.iter().try_for_each(|name| plain("models", name))?;
        }
        if let Some(expires) = self.expires.filter(|expires| *expires > LAST_SECOND) {
            return Err(("expires", format!("expected Unix seconds before the year 10000, got {expires}")));
        }
        let Limits { requests_per_minute, tokens_per_minute, tokens_per_month, money_per_month } = self.limits;
        let rates = [("requests_per_minute", requests_per_minute, 1), ("tokens_per_minute", tokens_per_minute, 1)];
        for (field, limit, least) in rates.into_iter().chain([("tokens_per_month", tokens_per_month, 0)]) {
            if limit.is_some_and(|limit| !(least..=MAX_LIMIT).contains(&limit)) {
                return Err((field, format!("expected a number from {least} to {MAX_LIMIT}, got {}", limit.unwrap_or_default())));
            }
        }
        if let Some(money) = money_per_month {
            if !(0.0..=MAX_MONEY).contains(&money) {
                return Err(("money_per_month", format!("expected an amount from 0 to {MAX_MONEY}, got {money}")));
            }
            // As it will be read back.
            self.limits.money_per_month = Some((money * NANOS).round() / NANOS);
        }
        Ok(self)
    }
}

/// The end of the year 9999, which calendars still know.
const LAST_SECOND: u64 = 253_402_300_799;

/// Whether a name can stand in a table, a log and a header: no line breaks, no other control characters, neither empty nor endless.
fn plain(field: &'static str, name: &str) -> Result<(), (&'static str, String)> {
    if name.trim().is_empty() || name.chars().count() > MAX_NAME || name.chars().any(|c| c.is_control() || is_direction(c)) {
        let got: String = name.escape_debug().take(MAX_NAME).collect();
        return Err((field, format!("expected 1 to {MAX_NAME} characters without control characters, got \"{got}\"")));
    }
    Ok(())
}

/// Line separators and what turns the direction of text around: they make a table say something else.
fn is_direction(c: char) -> bool {
    matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
}

/// A new key's id and secret.
pub struct NewSecret {
    /// What finds it.
    pub id: String,
    /// What is stored of the secret.
    pub hash: String,
    /// What its owner gets, once.
    pub presented: String,
}

impl NewSecret {
    /// From the system's random numbers.
    ///
    /// # Errors
    /// The system has none.
    pub fn generate() -> std::io::Result<Self> {
        let (id, secret) = (random_hex::<8>()?, random_hex::<32>()?);
        Ok(NewSecret { hash: hash(&secret), presented: format!("{PREFIX}{id}_{secret}"), id })
    }
}

/// Random bytes of the system, in hexadecimal.
pub fn random_hex<const N: usize>() -> std::io::Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What is stored of a secret.
fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes()))
}

/// Id and secret of a key as it was presented. What is none has an id that nobody has.
pub fn split(presented: &str) -> (&str, &str) {
    presented.strip_prefix(PREFIX).and_then(|rest| rest.split_once('_')).unwrap_or(("", presented))
}

/// Whether a secret is the one whose hash is stored; the same work when nothing is.
pub fn matches(secret: &str, stored: Option<&str>) -> bool {
    const NOBODYS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
    let same = hash(secret).as_bytes().ct_eq(stored.unwrap_or(NOBODYS).as_bytes());
    bool::from(same) & stored.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_match_their_own_hash_and_no_other() {
        let (one, two) = (NewSecret::generate().unwrap(), NewSecret::generate().unwrap());
        let (id, secret) = split(&one.presented);
        assert_eq!((id, id.len(), secret.len()), (&*one.id, 16, 64));
        assert!(matches(secret, Some(&one.hash)));
        assert!(!matches(secret, Some(&two.hash)) && !matches(secret, None) && !matches("", Some(&one.hash)));
        assert!(!one.hash.contains(secret));
        for text in ["", "ernie_", "ernie_x", "sk-12345", "_", "ernie"] {
            assert_eq!(split(text).0, "", "{text}");
        }
    }

    #[test]
    fn scopes_and_what_they_include() {
        for scope in Scope::ALL {
            assert_eq!(scope.as_str().parse(), Ok(scope));
            assert_eq!(serde_json::to_string(&scope).unwrap(), format!("\"{scope}\""));
            for wanted in Scope::ALL {
                let included = matches!((scope, wanted), (Scope::Admin, Scope::Metrics | Scope::Models));
                assert_eq!(scope.allows(wanted), scope == wanted || included);
            }
        }
        assert!("everything".parse::<Scope>().is_err());
    }

    #[test]
    fn what_is_wrong_with_a_grant_is_named() {
        let good = Grant::new("a key, 钥匙");
        assert_eq!(good.clone().checked(), Ok(good.clone()));
        let limits = |limits: Limits| Grant { limits, ..Grant::new("x") };
        let cases = [
            ("name", Grant::new("")),
            ("name", Grant::new(" ")),
            ("name", Grant::new("a\r\nset-cookie: b")),
            ("name", Grant::new("a\u{202e}b")),
            ("name", Grant::new("x".repeat(101))),
            ("scopes", Grant { scopes: vec![], ..good.clone() }),
            ("models", Grant { models: Some(vec![]), ..good.clone() }),
            ("models", Grant { models: Some(vec!["a\n".into()]), ..good.clone() }),
            ("expires", Grant { expires: Some(u64::MAX), ..good.clone() }),
            ("requests_per_minute", limits(Limits { requests_per_minute: Some(0), ..Limits::default() })),
            ("tokens_per_minute", limits(Limits { tokens_per_minute: Some(u64::MAX), ..Limits::default() })),
            ("tokens_per_month", limits(Limits { tokens_per_month: Some(MAX_LIMIT + 1), ..Limits::default() })),
            ("money_per_month", limits(Limits { money_per_month: Some(-1.0), ..Limits::default() })),
            ("money_per_month", limits(Limits { money_per_month: Some(f64::NAN), ..Limits::default() })),
        ];
        for (field, grant) in cases {
            assert_eq!(grant.clone().checked().unwrap_err().0, field, "{grant:?}");
        }
    }
}
