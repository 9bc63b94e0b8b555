//! The last minute: how many tokens and requests there were, and how long they took. Of fixed size: a ring of seconds, each with its counts.
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use utoipa::ToSchema;

/// Seconds that latencies are told of.
const SECONDS: u64 = 60;
/// Complete seconds over which rates are averaged.
const RATE_SECONDS: u64 = 5;
/// Latencies are counted in classes, eight for each doubling, from a tenth of a millisecond to seven minutes: a quantile is off by at most 5%.
const CLASSES: usize = 176;
const CLASSES_PER_DOUBLING: f64 = 8.0;
const SHORTEST: f64 = 1e-4;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Latency {
    /// From a request's arrival to its first token.
    FirstToken,
    /// Between two tokens.
    BetweenTokens,
    /// From arrival to the end.
    Whole,
}

/// What is counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Amount {
    PromptTokens,
    OutputTokens,
    /// Those that came to an end, whatever it was.
    Requests,
}

/// Milliseconds that half of all stay below, and all but one in a hundred. Null where nothing was timed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Quantiles {
    /// The median.
    pub p50: Option<f64>,
    /// The 99th percentile.
    pub p99: Option<f64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Recent {
    began: Instant,
    /// One more than are told of, for the second that has only begun.
    slots: Mutex<Vec<Slot>>,
}

#[derive(Clone, Debug)]
struct Slot {
    /// Which second it is, from the beginning.
    second: u64,
    amounts: [u64; 3],
    latencies: [[u32; CLASSES]; 3],
}

impl Slot {
    const EMPTY: Slot = Slot { second: 0, amounts: [0; 3], latencies: [[0; CLASSES]; 3] };
}

impl Recent {
    pub fn new() -> Self {
        Recent { began: Instant::now(), slots: Mutex::new(vec![Slot::EMPTY; SECONDS as usize + 1]) }
    }

    pub fn count(&self, amount: Amount, more: u64) {
        self.count_at(self.second(Instant::now()), amount, more);
    }

    pub fn time(&self, latency: Latency, duration: Duration, now: Instant) {
        self.time_at(self.second(now), latency, duration);
    }

    /// A second's mean over the last few that are complete.
    pub fn per_second(&self, amount: Amount) -> f64 {
        self.per_second_at(self.second(Instant::now()), amount)
    }

    /// Of the last minute.
    pub fn quantiles(&self, latency: Latency) -> Quantiles {
        self.quantiles_at(self.second(Instant::now()), latency)
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs()
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        // Counts are never half changed.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, second: u64, change: impl FnOnce(&mut Slot)) {
        let mut slots = self.slots();
        let place = (second % (SECONDS + 1)) as usize;
        let slot = &mut slots[place];
        if slot.second != second {
            *slot = Slot { second, ..Slot::EMPTY };
        }
        change(slot);
    }

    fn count_at(&self, second: u64, amount: Amount, more: u64) {
        self.change(second, |slot| slot.amounts[amount as usize] += more);
    }

    fn time_at(&self, second: u64, latency: Latency, duration: Duration) {
        let class = ((duration.as_secs_f64() / SHORTEST).log2() * CLASSES_PER_DOUBLING).clamp(0.0, CLASSES as f64 - 1.0) as usize;
        self.change(second, |slot| slot.latencies[latency as usize][class] += 1);
    }

    fn per_second_at(&self, second: u64, amount: Amount) -> f64 {
        let seconds = second.min(RATE_SECONDS);
        if seconds == 0 {
            return 0.0;
        }
        let complete = second - seconds..second;
        let sum: u64 = self.slots().iter().filter(|slot| complete.contains(&slot.second)).map(|slot| slot.amounts[amount as usize]).sum();
        sum as f64 / seconds as f64
    }

    fn quantiles_at(&self, second: u64, latency: Latency) -> Quantiles {
        let mut counts = [0u64; CLASSES];
        let minute = second.saturating_sub(SECONDS)..=second;
        for slot in self.slots().iter().filter(|slot| minute.contains(&slot.second)) {
            for (sum, count) in counts.iter_mut().zip(&slot.latencies[latency as usize]) {
                *sum += u64::from(*count);
            }
        }
        let all: u64 = counts.iter().sum();
        let quantile = |share: f64| {
            let rank = ((all as f64 * share).ceil() as u64).max(1);
            let mut below = 0;
            let class = counts.iter().position(|count| {
                below += count;
                below >= rank
            })?;
            // The middle of the class.
            let seconds = SHORTEST * ((class as f64 + 0.5) / CLASSES_PER_DOUBLING).exp2();
            Some((seconds * 1e6).round() / 1e3)
        };
        Quantiles { p50: quantile(0.5), p99: quantile(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: Option<f64>, expected: f64) {
        let got = got.unwrap();
        assert!((got / expected - 1.0).abs() < 0.05, "{got} for {expected}");
    }

    #[test]
    fn quantiles_are_those_of_the_last_minute() {
        let recent = Recent::new();
        assert_eq!(recent.quantiles_at(0, Latency::Whole), Quantiles::default());
        for ms in 1..=1000 {
            recent.time_at(ms / 40, Latency::Whole, Duration::from_millis(ms));
        }
        let quantiles = recent.quantiles_at(30, Latency::Whole);
        near(quantiles.p50, 500.0);
        near(quantiles.p99, 990.0);
        assert_eq!(recent.quantiles_at(30, Latency::FirstToken), Quantiles::default());
        // Forty seconds later the first ten seconds are forgotten.
        near(recent.quantiles_at(70, Latency::Whole).p50, 700.0);
        assert_eq!(recent.quantiles_at(100, Latency::Whole), Quantiles::default());
        for (extreme, bound) in [(Duration::ZERO, 0.0), (Duration::MAX, 1e5)] {
            recent.time_at(200, Latency::BetweenTokens, extreme);
            assert!(recent.quantiles_at(200, Latency::BetweenTokens).p99.unwrap() >= bound);
        }
    }

    #[test]
    fn rates_are_those_of_complete_seconds() {
        let recent = Recent::new();
        recent.count_at(0, Amount::OutputTokens, 30);
        assert_eq!(recent.per_second_at(0, Amount::OutputTokens), 0.0);
        assert_eq!(recent.per_second_at(1, Amount::OutputTokens), 30.0);
        recent.count_at(1, Amount::OutputTokens, 10);
        assert_eq!(recent.per_second_at(1, Amount::OutputTokens), 30.0);
        assert_eq!(recent.per_second_at(2, Amount::OutputTokens), 20.0);
        assert_eq!(recent.per_second_at(5, Amount::OutputTokens), 8.0);
        assert_eq!(recent.per_second_at(6, Amount::OutputTokens), 2.0);
        assert_eq!(recent.per_second_at(6, Amount::PromptTokens), 0.0);
        // The place of second 0 in the ring.
        recent.count_at(61, Amount::OutputTokens, 5);
        assert_eq!(recent.per_second_at(62, Amount::OutputTokens), 1.0);
    }
}
