//! Keys whose answers are under way: when one is revoked or expires, those answers end too, as they do when their time is over.
//!
//! A key is looked at when a request comes; a stream may go on for minutes after that. All that are in use are looked at again once a second, each once however many answers it
//! has, and a key that is revoked by this process is told at once.
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::api_error::ApiError;

/// From one look at the keys in use to the next.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The keys in use, by id.
#[derive(Debug, Default)]
pub struct KeysInUse(Mutex<HashMap<String, Weak<watch::Sender<bool>>>>);

/// A key that is in use until this is dropped.
#[derive(Debug)]
pub struct InUse {
    ended: watch::Receiver<bool>,
    /// Told by [`KeysInUse::end`]; that it is there says that somebody wants to know.
    _end: Arc<watch::Sender<bool>>,
}

impl KeysInUse {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Weak<watch::Sender<bool>>>> {
        // Nothing there is half written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody uses it.
    pub fn hold(&self, key_id: &str) -> InUse {
        let mut keys = self.lock();
        let known = keys.get(key_id).and_then(Weak::upgrade);
        let end = known.unwrap_or_else(|| {
            let end = Arc::new(watch::channel(false).0);
            keys.insert(key_id.to_owned(), Arc::downgrade(&end));
            end
        });
        InUse { ended: end.subscribe(), _end: end }
    }

    /// Those that are used.
    pub fn ids(&self) -> Vec<String> {
        let mut keys = self.lock();
        keys.retain(|_, end| end.strong_count() > 0);
        keys.keys().cloned().collect()
    }

    /// It is not taken any more: all who use it are told.
    pub fn end(&self, key_id: &str) {
        if let Some(end) = self.lock().remove(key_id).and_then(|end| end.upgrade()) {
            end.send_replace(true);
        }
    }
}

impl InUse {
    /// Whether it is taken no more.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits until it is taken no more.
    pub async fn ended(&mut self) {
        // The sender lives as long as this.
        drop(self.ended.wait_for(|ended| *ended).await);
    }
}

/// How long an answer may go on: while its key is taken, and until its time is over.
#[derive(Debug)]
pub struct Term {
    key: Option<InUse>,
    limit: Duration,
    end: Instant,
}

impl Term {
    /// From now on.
    pub fn new(key: Option<InUse>, limit: Duration) -> Self {
        Term { key, limit, end: Instant::now() + limit }
    }

    /// The outcome of work, if it comes within the term.
    ///
    /// # Errors
    /// The key is taken no more; the time is over.
    pub async fn within<T>(&mut self, work: impl Future<Output = T>) -> Result<T, ApiError> {
        let Term { key, limit, end } = self;
        let key_ended = async {
            match key {
                Some(key) => key.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = key_ended => Err(ApiError::key_ended()),
            () = sleep_until(*end) => Err(ApiError::out_of_time(limit.as_secs())),
            outcome = work => Ok(outcome),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_use_a_key_are_told_and_those_after_them_are_not() {
        let keys = KeysInUse::default();
        let (one, two, other) = (keys.hold("a"), keys.hold("a"), keys.hold("b"));
        keys.end("a");
        keys.end("nobody's");
        assert!(one.has_ended() && two.has_ended() && !other.has_ended());
        // It was given a later end, say.
        let again = keys.hold("a");
        drop((one, two));
        assert!(!again.has_ended());
        let mut ids = keys.ids();
        ids.sort();
        assert_eq!(ids, ["a", "b"]);
        drop((again, other));
        assert!(keys.ids().is_empty());
    }
}
