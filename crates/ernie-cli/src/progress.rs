//! How far a long command has come, on standard error: a bar on a terminal, a plain line now and then anywhere else.
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two plain lines, so that a log stays readable.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Shows how many of a number of things are done, until it is dropped.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: usize,
    view: View,
}

#[derive(Debug)]
enum View {
    Bar(ProgressBar),
    Plain { last: Instant },
}

impl Progress {
    /// Work on `total` things begins.
    pub fn new(what: &'static str, total: usize) -> Self {
        let view = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}  ETA {eta}").expect("the template is a constant");
            bar.set_style(style);
            bar.set_message(what);
            View::Bar(bar)
        } else {
            eprintln!("0/{total} {what}");
            View::Plain { last: Instant::now() }
        };
        Self { what, total, view }
    }

    /// So many are done.
    pub fn set(&mut self, done: usize) {
        match &mut self.view {
            View::Bar(bar) => bar.set_position(done as u64),
            View::Plain { last } => {
                if last.elapsed() >= PLAIN_INTERVAL {
                    *last = Instant::now();
                    eprintln!("{done}/{} {}", self.total, self.what);
                }
            }
        }
    }
}

impl Drop for Progress {
    /// Leaves the bar as it stands.
    fn drop(&mut self) {
        if let View::Bar(bar) = &self.view {
            bar.abandon();
        }
    }
}
