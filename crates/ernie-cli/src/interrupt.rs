//! Ctrl-C (and SIGTERM): the first asks the running work to stop, the second ends the program at once.
use anyhow::Context;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::outcome;

/// Set once work is under way that can stop by itself; see [`Interrupt::begin`].
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    stop: Arc<AtomicBool>,
    working: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over Ctrl-C for the rest of the program.
    pub fn install() -> anyhow::Result<Self> {
        let interrupt = Self::default();
        let handler = interrupt.clone();
        ctrlc::set_handler(move || {
            let asked_before = handler.stop.swap(true, Ordering::SeqCst);
            if asked_before || !handler.working.load(Ordering::SeqCst) {
                // Nothing is lost: files are only ever replaced whole.
                std::process::exit(outcome::INTERRUPTED.into());
            }
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(interrupt)
    }

    /// Work begins that watches [`Interrupt::stopped`]; earlier requests are forgotten. Until the guard is dropped Ctrl-C sets the flag; outside it
    /// ends the program.
    pub fn begin(&self) -> Working<'_> {
        self.stop.store(false, Ordering::SeqCst);
        self.working.store(true, Ordering::SeqCst);
        Working(self)
    }

    /// Whether the work should stop.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// The flag itself, for work that takes one.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }
}

/// While this lives, Ctrl-C asks before it kills.
#[derive(Debug)]
pub struct Working<'a>(&'a Interrupt);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.working.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginning_forgets_an_earlier_request() {
        let interrupt = Interrupt::default();
        interrupt.flag().store(true, Ordering::SeqCst);
        let working = interrupt.begin();
        assert!(!interrupt.stopped());
        assert!(interrupt.working.load(Ordering::SeqCst));
        drop(working);
        assert!(!interrupt.working.load(Ordering::SeqCst));
    }
}
