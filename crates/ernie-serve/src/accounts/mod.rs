//! Who may use the server, for how much, and what was used.
//!
//! Keys, usage and the audit log are in a database ([`store`]). Every request reads its key there, so a key that was revoked, by whichever process, is refused from
//! the next request on. The minute's limits and what is set aside for requests under way are in this process ([`limits`]). Usage is committed before an
//! answer ends ([`charge`], and the task in `writer`).
pub mod access;
pub mod calendar;
pub mod charge;
pub mod database;
pub mod energy;
pub mod in_use;
pub mod keys;
pub mod limits;
pub mod store;
pub mod usage;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::api_error::ApiError;
use crate::config::ServeConfig;
use crate::state::unix_seconds;
use calendar::Day;
use charge::Charge;
use database::Database;
use energy::Power;
use in_use::KeysInUse;
use keys::{Grant, Key, NewSecret};
use limits::{Amount, Limiter, Rate};
use store::{Store, StoreError};
use usage::{Actor, Audit, Prices};
use writer::{Message, Record};

/// A key's last use is written down at most this often, seconds.
const TOUCH_EVERY: u64 = 60;

/// A key is refused that long after it came, however soon it is known to be wrong: to read a row for an id that somebody has takes microseconds more.
const REFUSAL: Duration = Duration::from_millis(10);

/// The accounts of a running server.
#[derive(Debug)]
pub struct Accounts {
    /// The database.
    pub store: Store,
    /// Those of answers under way.
    pub in_use: KeysInUse,
    limiter: Arc<Limiter>,
    prices: Prices,
    power: Arc<Power>,
    writer: mpsc::UnboundedSender<Message>,
    healthy: Arc<AtomicBool>,
    /// Whether a request without a key may ever be let in: only those of this machine.
    loopback: bool,
    /// Set once a key was seen: from then on keys are needed, whatever becomes of the database.
    closed: AtomicBool,
    /// Held while a key or the settings are read, changed and written down: of two changes at once none is lost, nor told wrongly in the audit log.
    pub changes: tokio::sync::Mutex<()>,
}

/// Who sent a request.
#[derive(Clone, Debug)]
pub struct Caller(pub Option<Arc<Key>>);

impl Caller {
    /// As the audit log names it.
    pub fn actor(&self) -> Actor {
        self.0.as_ref().map_or(Actor::Local, |key| Actor::Key(key.id.clone()))
    }

    /// Whether it may use a model.
    pub fn allows_model(&self, model: &str) -> bool {
        self.0.as_ref().is_none_or(|key| key.allows_model(model))
    }
}

impl Accounts {
    /// Opens the database of a configuration and starts writing. Needs a runtime.
    ///
    /// # Errors
    /// As [`Database::open`].
    pub async fn open(config: &ServeConfig) -> Result<Arc<Self>, StoreError> {
        let store = Database::named(config.database.as_deref())?.open().await?;
        let (writer, messages) = mpsc::unbounded_channel();
        let (power, counters) = Power::new(config.modelled_watts);
        let (limiter, power, healthy) = (Arc::new(Limiter::default()), Arc::new(power), Arc::new(AtomicBool::new(true)));
        tokio::spawn(writer::write(store.clone(), Arc::clone(&healthy), messages));
        if let Some(mut counters) = counters {
            let power = Arc::downgrade(&power);
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(energy::INTERVAL).await;
                    let Some(power) = power.upgrade() else { return };
                    counters.watch(&power);
                }
            });
        }
        let prices = Prices {
            per_million_prompt_tokens: config.price_per_million_prompt_tokens,
            per_million_completion_tokens: config.price_per_million_completion_tokens,
        };
        let closed = AtomicBool::new(store.has_keys().await?);
        let accounts = Arc::new(Accounts {
            store,
            in_use: KeysInUse::default(),
            limiter,
            prices,
            power,
            writer,
            healthy,
            loopback: config.host.is_loopback(),
            closed,
            changes: Default::default(),
        });
        let looking = Arc::downgrade(&accounts);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(in_use::LOOK_EVERY).await;
                let Some(accounts) = looking.upgrade() else { return };
                accounts.look_at_keys_in_use().await;
            }
        });
        Ok(accounts)
    }

    /// Whether requests without a key are let in: there is no key, and only this machine is listened to. Keys that expired or were revoked count: the last one that is
    /// revoked must not open the door.
    pub async fn is_open(&self) -> bool {
        if self.closed.load(Ordering::SeqCst) || !self.loopback {
            return false;
        }
        match self.store.has_keys().await {
            Ok(true) => {
                self.closed.store(true, Ordering::SeqCst);
                false
            }
            Ok(false) => true,
            // There may be keys in what is there instead.
            Err(error @ StoreError::Gone { .. }) => {
                tracing::error!(%error, "cannot see whether there are keys; nobody is let in");
                false
            }
            // It could be read when the server started, and there was none.
            Err(error) => {
                tracing::error!(%error, "cannot see whether there are keys; there were none");
                true
            }
        }
    }

    /// Whether requests can be answered: with keys the database must answer and take what is used.
    pub async fn is_at_hand(&self) -> bool {
        self.is_open().await || (self.is_healthy() && self.store.has_keys().await.is_ok())
    }

    /// Whether any key was seen.
    pub fn has_seen_keys(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Where joules come from.
    pub fn energy(&self) -> energy::Source {
        self.power.source
    }

    fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::SeqCst)
    }

    /// The key that was presented. Nothing tells apart an id that nobody has, a wrong secret, and a key that expired or was revoked: neither the answer nor the time until it comes.
    ///
    /// # Errors
    /// 401; 503 if the database is away.
    pub async fn authenticate(&self, presented: &str) -> Result<Arc<Key>, ApiError> {
        let began = Instant::now();
        let (id, secret) = keys::split(presented);
        let found = self.store.key(id).await.map_err(|error| away(&error))?;
        let now = unix_seconds();
        let matches = keys::matches(secret, found.as_ref().map(|(_, hash)| hash.as_str()));
        match found {
            Some((key, _)) if matches & key.is_valid(now) => {
                if key.last_used.is_none_or(|last| last.saturating_add(TOUCH_EVERY) <= now) {
                    self.tell(Message::Touched { key_id: key.id.clone(), at: now });
                }
                Ok(Arc::new(key))
            }
            _ => {
                sleep_until(began + REFUSAL).await;
                Err(ApiError::no_valid_key())
            }
        }
    }

    /// Tells those who use a key that is not valid any more.
    async fn look_at_keys_in_use(&self) {
        for id in self.in_use.ids() {
            match self.store.key(&id).await {
                Ok(Some((key, _))) if key.is_valid(unix_seconds()) => {}
                Ok(_) => self.in_use.end(&id),
                // Nobody knows; requests are refused meanwhile, but what was let in goes on.
                Err(error) => return tracing::error!(%error, "cannot see whether keys in use are still valid"),
            }
        }
    }

    /// Counts a request of a key in its minute.
    ///
    /// # Errors
    /// 429.
    pub fn count_request(&self, key: &Key) -> Result<(), ApiError> {
        let Some(limit) = key.grant.limits.requests_per_minute else { return Ok(()) };
        self.limiter
            .request(&key.id, limit)
            .map_err(|wait| ApiError::rate_limited(format!("This key may send {limit} requests a minute; try again in {wait} s."), wait))
    }

    /// How far a key's limits of a minute are used, that of requests and that of tokens.
    pub fn rates(&self, key: &Key) -> [Option<Rate>; 2] {
        let limits = key.grant.limits;
        if limits.requests_per_minute.is_none() && limits.tokens_per_minute.is_none() {
            return [None; 2];
        }
        self.limiter.rates(&key.id, limits.requests_per_minute, limits.tokens_per_minute)
    }

    /// An account for a request that may use so many tokens at most. What it may use is set aside before its budget is looked at, so that requests at the same
    /// time cannot slip under it together.
    ///
    /// # Errors
    /// 429 or 402 for what is used up; 400 for more than a minute may ever have; 503 if the database is away.
    pub async fn admit(self: &Arc<Self>, caller: &Caller, model: &str, prompt_tokens: usize, most: usize) -> Result<Charge, ApiError> {
        let open = |id, reservation| Charge::new(Arc::clone(self), id, model.to_owned(), reservation);
        let Some(key) = &caller.0 else { return Ok(open(String::new(), None)) };
        if !self.is_healthy() {
            return Err(ApiError::accounts_away("Usage cannot be written down at present"));
        }
        let (prompt_tokens, most) = (prompt_tokens as u64, most as u64);
        let tokens = prompt_tokens.saturating_add(most);
        let amount = Amount { tokens, money: self.prices.money(prompt_tokens, most) };
        let limits = key.grant.limits;
        let (reservation, others) = self.limiter.reserve(&key.id, amount, limits.tokens_per_minute).map_err(|wait| {
            let limit = limits.tokens_per_minute.unwrap_or_default();
            let what = format!("This key may use {limit} tokens a minute, and this request up to {tokens}");
            match wait {
                Some(wait) => ApiError::rate_limited(format!("{what}; try again in {wait} s."), wait),
                // Waiting would not help.
                None => ApiError::too_large_for_limit(format!("{what}: no minute has room for it; ask for fewer tokens.")),
            }
        })?;
        self.fits_budgets(key, amount, others).await?;
        Ok(open(key.id.clone(), Some(reservation)))
    }

    async fn fits_budgets(&self, key: &Key, amount: Amount, others: Amount) -> Result<(), ApiError> {
        let limits = key.grant.limits;
        if limits.tokens_per_month.is_none() && limits.money_per_month.is_none() {
            return Ok(());
        }
        let today = Day::of(unix_seconds());
        let used = self.store.usage_since(&key.id, today.month_start()).await.map_err(|error| away(&error))?;
        let next = today.next_month();
        let wait = next.start().saturating_sub(unix_seconds());
        if let Some(limit) = limits.tokens_per_month {
            let taken = used.tokens().saturating_add(others.tokens);
            if taken.saturating_add(amount.tokens) > limit {
                let (used, others, more) = (used.tokens(), others.tokens, amount.tokens);
                let message = format!(
                    "This key may use {limit} tokens a month; {used} are used, {others} set aside for requests under way, and this request may use {more}. \
                     The next month begins on {next} (UTC)."
                );
                return Err(ApiError::quota(message, wait));
            }
        }
        if let Some(limit) = limits.money_per_month {
            let nanos = (limit * keys::NANOS).round() as i64;
            let taken = used.money.saturating_add(others.money);
            if taken.saturating_add(amount.money) > nanos {
                let show = |nanos: i64| nanos as f64 / keys::NANOS;
                return Err(ApiError::budget(format!(
                    "This key may spend {limit} a month; {} is spent, {} set aside for requests under way, and this request may cost {}. \
                     The next month begins on {next} (UTC).",
                    show(used.money),
                    show(others.money),
                    show(amount.money)
                )));
            }
        }
        Ok(())
    }

    fn record(&self, record: Record) {
        self.tell(Message::Used(record));
    }

    fn tell(&self, message: Message) {
        // Without a writer the runtime is ending, and this process with it.
        drop(self.writer.send(message));
    }

    /// Waits until all usage so far is committed, but no longer than that.
    pub async fn flush(&self, longest: Duration) {
        let (done, flushed) = oneshot::channel();
        self.tell(Message::Flush(done));
        if tokio::time::timeout(longest, flushed).await.is_err() {
            tracing::error!("usage of requests that were cut off could not be written before the end");
        }
    }
}

/// Does something with the database of a configuration, in a runtime of its own: for programs beside the server.
///
/// # Errors
/// The database cannot be opened, or what is done with it fails.
pub fn with_store<T>(config: &ServeConfig, work: impl AsyncFnOnce(&Store) -> Result<T, StoreError>) -> crate::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(crate::Error::Start)?;
    Ok(runtime.block_on(async {
        let store = Database::named(config.database.as_deref())?.open().await?;
        let outcome = work(&store).await;
        store.close().await;
        outcome
    })?)
}

/// 503 for a database that does not answer; the log says why.
pub fn away(error: &StoreError) -> ApiError {
    tracing::error!(%error, "the accounts are away");
    ApiError::accounts_away("The server's database does not answer at present")
}

/// Makes a key and writes it down. Returns it with what its owner gets, which nobody can show again.
///
/// # Errors
/// The database is away, or the system has no random numbers.
pub async fn create_key(store: &Store, grant: Grant, actor: Actor) -> Result<(Key, String), StoreError> {
    let NewSecret { id, hash, presented } = NewSecret::generate().map_err(StoreError::Random)?;
    let now = unix_seconds();
    let detail = serde_json::json!(grant).to_string();
    let audit = Audit { at: now, actor, action: "keys.create", target: id.clone(), detail };
    let key = Key { id, grant, created: now, revoked: None, last_used: None };
    store.insert_key(&key, &hash, &audit).await?;
    Ok((key, presented))
}

/// Revokes a key, at once and for good. `None` if there is none of that id.
///
/// # Errors
/// The database is away.
pub async fn revoke_key(store: &Store, id: &str, actor: Actor) -> Result<Option<Key>, StoreError> {
    let audit = Audit { at: unix_seconds(), actor, action: "keys.revoke", target: id.to_owned(), detail: String::new() };
    store.revoke_key(id, &audit).await?;
    Ok(store.key(id).await?.map(|(key, _)| key))
}
