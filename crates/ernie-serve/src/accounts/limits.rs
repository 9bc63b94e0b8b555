//! What keys may use in a minute, and what is set aside for requests under way.
//!
//! Both live in this process: a second server with the same database has minutes and reservations of its own.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Seconds that are kept: a minute, and the one that has begun.
const SECONDS: usize = 61;

/// What was used in the last minute, by second. Exact to a second, in as much memory whatever the limit.
#[derive(Clone, Debug)]
struct Window {
    used: [u64; SECONDS],
    /// The latest second.
    now: u64,
}

impl Window {
    fn new(now: u64) -> Self {
        Window { used: [0; SECONDS], now }
    }

    fn advance(&mut self, now: u64) {
        for second in (self.now + 1..=now).take(SECONDS) {
            self.used[second as usize % SECONDS] = 0;
        }
        // After a long pause all are empty, whichever they were.
        self.now = self.now.max(now);
    }

    /// Takes an amount, or says in how many seconds there will be room for it; `None` if never.
    fn take(&mut self, now: u64, limit: u64, amount: u64) -> Result<(), Option<u64>> {
        self.advance(now);
        let used = self.used.iter().fold(0, |sum: u64, used| sum.saturating_add(*used));
        if used.saturating_add(amount) <= limit {
            let second = &mut self.used[self.now as usize % SECONDS];
            *second = second.saturating_add(amount);
            return Ok(());
        }
        if amount > limit {
            return Err(None);
        }
        // The oldest second leaves first.
        let mut left = used;
        for step in 1..SECONDS as u64 {
            left = left.saturating_sub(self.used[(self.now + step) as usize % SECONDS]);
            if left.saturating_add(amount) <= limit {
                return Err(Some(step));
            }
        }
        Err(Some(SECONDS as u64))
    }

    /// What is used, and seconds until nothing is, if no more is taken.
    fn state(&mut self, now: u64) -> (u64, u64) {
        self.advance(now);
        let used = self.used.iter().fold(0, |sum: u64, used| sum.saturating_add(*used));
        // Ages of seconds: the youngest that is used leaves last.
        let youngest = (0..SECONDS as u64).find(|age| self.now >= *age && self.used[(self.now - age) as usize % SECONDS] > 0);
        (used, youngest.map_or(0, |age| SECONDS as u64 - age))
    }

    /// Gives back a part of what was taken in a second.
    fn give_back(&mut self, second: u64, amount: u64) {
        if self.now.saturating_sub(second) < SECONDS as u64 {
            let used = &mut self.used[second as usize % SECONDS];
            *used = used.saturating_sub(amount);
        }
    }
}

/// One key's.
#[derive(Clone, Debug)]
struct Counters {
    requests: Window,
    tokens: Window,
    reserved: Amount,
}

/// A limit of a minute, and how far it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The limit.
    pub limit: u64,
    /// What may be used now.
    pub remaining: u64,
    /// Seconds until all of it may.
    pub reset: u64,
}

/// Tokens and what they cost, in billionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Of prompts and answers.
    pub tokens: u64,
    /// Billionths of the currency.
    pub money: i64,
}

/// What is set aside for a request; what was not used is given back when this is dropped.
#[derive(Debug)]
pub struct Reservation {
    limiter: Arc<Limiter>,
    key_id: String,
    amount: Amount,
    /// Since the start of the server.
    second: u64,
    /// Tokens that were used after all.
    pub used: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Reservation { limiter, key_id, amount, second, used } = self;
        limiter.with(key_id, |counters, now| {
            counters.reserved.tokens = counters.reserved.tokens.saturating_sub(amount.tokens);
            counters.reserved.money = counters.reserved.money.saturating_sub(amount.money);
            counters.tokens.advance(now);
            counters.tokens.give_back(*second, amount.tokens.saturating_sub(*used));
        });
    }
}

/// Of all keys.
#[derive(Debug)]
pub struct Limiter {
    began: Instant,
    keys: Mutex<HashMap<String, Counters>>,
}

/// Nothing used.
impl Default for Limiter {
    fn default() -> Self {
        Limiter { began: Instant::now(), keys: Mutex::default() }
    }
}

impl Limiter {
    fn with<T>(&self, key_id: &str, work: impl FnOnce(&mut Counters, u64) -> T) -> T {
        let now = self.began.elapsed().as_secs();
        // Numbers only: none is half changed.
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if !keys.contains_key(key_id) {
            let new = Counters { requests: Window::new(now), tokens: Window::new(now), reserved: Amount::default() };
            keys.insert(key_id.to_owned(), new);
        }
        match keys.get_mut(key_id) {
            Some(counters) => work(counters, now),
            None => unreachable!("it was just put there"),
        }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// Seconds after which there will be room.
    pub fn request(&self, key_id: &str, limit: u64) -> Result<(), u64> {
        self.with(key_id, |counters, now| counters.requests.take(now, limit, 1)).map_err(|wait| wait.unwrap_or(60))
    }

    /// How far a key's limits of a minute are used, that of requests and that of tokens.
    pub fn rates(&self, key_id: &str, requests: Option<u64>, tokens: Option<u64>) -> [Option<Rate>; 2] {
        let rate = |limit: u64, (used, reset): (u64, u64)| Rate { limit, remaining: limit.saturating_sub(used), reset };
        self.with(key_id, |counters, now| {
            [requests.map(|limit| rate(limit, counters.requests.state(now))), tokens.map(|limit| rate(limit, counters.tokens.state(now)))]
        })
    }

    /// Sets aside what a request may use at most. Returns what was set aside for others before it.
    ///
    /// # Errors
    /// Seconds after which the tokens of a minute have room; `None` if they never will.
    pub fn reserve(
        self: &Arc<Self>,
        key_id: &str,
        amount: Amount,
        tokens_per_minute: Option<u64>,
    ) -> Result<(Reservation, Amount), Option<u64>> {
        self.with(key_id, |counters, now| {
            counters.tokens.take(now, tokens_per_minute.unwrap_or(u64::MAX), amount.tokens)?;
            let others = counters.reserved;
            counters.reserved.tokens = others.tokens.saturating_add(amount.tokens);
            counters.reserved.money = others.money.saturating_add(amount.money);
            Ok((Reservation { limiter: Arc::clone(self), key_id: key_id.to_owned(), amount, second: now, used: 0 }, others))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_holds_its_limit_and_no_more() {
        let mut window = Window::new(100);
        for second in [100, 110, 110] {
            window.take(second, 3, 1).unwrap();
        }
        assert_eq!(window.take(110, 3, 1), Err(Some(51)));
        assert_eq!(window.take(110, 3, 4), Err(None));
        assert_eq!(window.take(160, 3, 1), Err(Some(1)), "60 seconds are not over before 61 have begun");
        window.take(161, 3, 1).unwrap();
        assert_eq!(window.take(161, 3, 1), Err(Some(10)));
        assert_eq!(window.state(161), (3, 61));
        window.give_back(110, 1);
        assert_eq!(window.state(161), (2, 61));
        window.take(161, 3, 1).unwrap();
        window.give_back(100, 50);
        assert_eq!(window.take(161, 3, 1), Err(Some(10)), "what has left the window is not given back");
        assert_eq!(window.state(221), (2, 1), "those of second 161");
        assert_eq!(window.state(222), (0, 0));
        window.take(100_000, 3, 3).unwrap();
    }

    /// Against a list of all that was taken: in no 60 seconds is it more than the limit.
    #[test]
    fn no_sixty_seconds_exceed_the_limit() {
        let (mut window, mut taken, mut state) = (Window::new(0), Vec::new(), 1u64);
        for second in 0..2000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let amount = (state >> 33) % 5;
            if window.take(second, 40, amount).is_ok() {
                taken.push((second, amount));
            }
            let sum: u64 = taken.iter().filter(|(at, _)| second - at < 60).map(|(_, amount)| amount).sum();
            assert!(sum <= 40, "{sum} at {second}");
        }
        assert!(taken.len() > 400);
    }

    #[test]
    fn reservations_see_those_before_them_and_leave_what_was_used() {
        let limiter = Arc::new(Limiter::default());
        let amount = Amount { tokens: 30, money: 7 };
        let (mut first, others) = limiter.reserve("a", amount, Some(100)).unwrap();
        assert_eq!(others, Amount::default());
        let (second, others) = limiter.reserve("a", amount, Some(100)).unwrap();
        assert_eq!(others, amount);
        let _other = limiter.reserve("b", amount, Some(30)).unwrap();
        assert!(limiter.reserve("a", Amount { tokens: 41, money: 0 }, Some(100)).is_err());
        first.used = 10;
        drop((first, second));
        let (_third, others) = limiter.reserve("a", Amount { tokens: 90, money: 0 }, Some(100)).unwrap();
        assert_eq!(others, Amount::default());
        assert_eq!(limiter.reserve("a", Amount { tokens: 101, money: 0 }, Some(100)).unwrap_err(), None);
    }
}
