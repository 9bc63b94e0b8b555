//! What one request uses up, counted where it is used and written down once.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::Accounts;
use super::calendar::Day;
use super::in_use::InUse;
use super::limits::Reservation;
use super::usage::{Totals, UsageKey};
use super::writer::Record;
use crate::api_error::ApiError;
use crate::state::unix_seconds;

/// How long an answer waits for its usage to be committed before it is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// The account of one request. Its HTTP side and its jobs in the engine have copies; if nobody settled it before the last is dropped
/// (the client left, the engine failed), it is written down then.
#[derive(Clone, Debug)]
pub struct Charge {
    meter: Arc<Meter>,
    /// Whether prompts count: of several answers to a prompt only the first pays for it.
    prompts: bool,
}

#[derive(Debug)]
struct Meter {
    accounts: Arc<Accounts>,
    key_id: String,
    model: String,
    reservation: Mutex<Option<Reservation>>,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    nanoseconds: AtomicU64,
    nanojoules: AtomicU64,
    /// Whether the writer has it.
    handed_over: AtomicBool,
}

impl Charge {
    /// Of a request of a key; of none if the id is empty.
    pub(super) fn new(accounts: Arc<Accounts>, key_id: String, model: String, reservation: Option<Reservation>) -> Self {
        let meter = Meter {
            accounts,
            key_id,
            model,
            reservation: Mutex::new(reservation),
            prompt_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            nanojoules: AtomicU64::new(0),
            handed_over: AtomicBool::new(false),
        };
        Charge { meter: Arc::new(meter), prompts: true }
    }

    /// The same account, for a job whose prompt another job pays for.
    pub fn answers_only(&self) -> Self {
        Charge { meter: Arc::clone(&self.meter), prompts: false }
    }

    /// The key that pays, as one in use; `None` without one.
    pub fn key_in_use(&self) -> Option<InUse> {
        let Meter { accounts, key_id, .. } = &*self.meter;
        (!key_id.is_empty()).then(|| accounts.in_use.hold(key_id))
    }

    /// The engine takes in a prompt.
    pub fn prompt(&self, tokens: usize) {
        if self.prompts {
            self.meter.prompt_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        }
    }

    /// The engine chose a token.
    pub fn token(&self) {
        self.meter.completion_tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// The engine worked on it.
    pub fn spent(&self, time: Duration) {
        self.meter.nanoseconds.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.meter.nanojoules.fetch_add(self.meter.accounts.power.nanojoules(time), Ordering::Relaxed);
    }

    /// Writes it down, to be called before the last bytes of the answer are sent. All jobs are over.
    ///
    /// # Errors
    /// 503: the database does not take it. It is kept and written when that is over.
    pub async fn settle(&self) -> Result<(), ApiError> {
        let accounts = &self.meter.accounts;
        let (sender, committed) = oneshot::channel();
        let strict = !self.meter.key_id.is_empty();
        // Without keys nobody pays, and a full disk is no reason not to answer.
        let waits = strict || accounts.is_healthy();
        self.meter.hand_over(Some(sender));
        if !waits {
            return Ok(());
        }
        match tokio::time::timeout(PATIENCE, committed).await {
            Ok(Ok(())) => Ok(()),
            _ if strict => Err(ApiError::accounts_away("The usage of this answer cannot be written down at present")),
            _ => Ok(()),
        }
    }
}

impl Meter {
    fn hand_over(&self, committed: Option<oneshot::Sender<()>>) {
        if self.handed_over.swap(true, Ordering::SeqCst) {
            return;
        }
        let get = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let (prompt, completion) = (get(&self.prompt_tokens), get(&self.completion_tokens));
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let totals = Totals {
            requests: 1,
            prompt_tokens: signed(prompt),
            completion_tokens: signed(completion),
            microseconds: signed(get(&self.nanoseconds) / 1000),
            microjoules: signed(get(&self.nanojoules) / 1000),
            money: self.accounts.prices.money(prompt, completion),
        };
        let day = Day::of(unix_seconds()).to_string();
        let usage = UsageKey { day, key_id: self.key_id.clone(), model: self.model.clone() };
        let mut reservation = self.reservation.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reservation) = &mut reservation {
            reservation.used = totals.tokens();
        }
        self.accounts.record(Record { usage, totals, reservation, committed });
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.hand_over(None);
    }
}
