//! Progress on standard error: a bar on a terminal, a plain line now and then anywhere else.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::StepMetrics;

/// Time between two plain lines, so that a log of a long run stays readable.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// What the run shows while it works.
pub(super) struct Progress {
    total_steps: u64,
    resume_step: u64,
    started: Instant,
    view: View,
}

enum View {
    Bar(ProgressBar),
    Plain { last: Option<Instant> },
    Hidden,
}

impl Progress {
    /// A bar when standard error is a terminal, plain lines otherwise, nothing when `quiet`.
    pub(super) fn new(total_steps: u64, resume_step: u64, quiet: bool) -> Self {
        let view = if quiet {
            View::Hidden
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}").expect("the template is a constant");
            bar.set_style(style);
            bar.set_position(resume_step);
            View::Bar(bar)
        } else {
            View::Plain { last: None }
        };
        Self { total_steps, resume_step, started: Instant::now(), view }
    }

    pub(super) fn step(&mut self, metrics: &StepMetrics) {
        let status = status(metrics, self.remaining(metrics.step));
        match &mut self.view {
            View::Bar(bar) => {
                bar.set_message(status);
                bar.set_position(metrics.step);
            }
            View::Plain { last } => {
                let due = last.is_none_or(|at| at.elapsed() >= PLAIN_INTERVAL);
                if due || metrics.step >= self.total_steps {
                    *last = Some(Instant::now());
                    eprintln!("step {}/{}  {status}", metrics.step, self.total_steps);
                }
            }
            View::Hidden => {}
        }
    }

    /// A line of its own, above the bar.
    pub(super) fn message(&self, text: &str) {
        match &self.view {
            View::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            View::Plain { .. } => eprintln!("{text}"),
            View::Hidden => {}
        }
    }

    /// Leaves the bar as it stands.
    pub(super) fn finish(&self) {
        if let View::Bar(bar) = &self.view {
            bar.abandon();
        }
    }

    /// Time left at the pace since this process started, validation and checkpoints included.
    fn remaining(&self, step: u64) -> Duration {
        let done = step.saturating_sub(self.resume_step).max(1) as f64;
        let left = self.total_steps.saturating_sub(step) as f64;
        Duration::from_secs_f64(self.started.elapsed().as_secs_f64() / done * left)
    }
}

fn status(metrics: &StepMetrics, remaining: Duration) -> String {
    format!("loss {:.4}  lr {:.2e}  {} tok/s  ETA {}", metrics.loss, metrics.lr, grouped(metrics.tok_s), duration(remaining))
}

/// A whole number with commas between thousands.
fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return digits;
    }
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `45s`, `3m20s`, `2h05m`.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_shows_loss_rate_speed_and_time_left() {
        let metrics = StepMetrics { step: 10, loss: 3.21456, lr: 2.2e-4, tok_s: 4150.4, ..StepMetrics::default() };
        assert_eq!(status(&metrics, Duration::from_secs(7500)), "loss 3.2146  lr 2.20e-4  4,150 tok/s  ETA 2h05m");
    }

    #[test]
    fn numbers_and_times_are_readable_at_every_size() {
        assert_eq!([0.0, 999.0, 1000.0, 1234567.4, f64::NAN].map(grouped), ["0", "999", "1,000", "1,234,567", "NaN"]);
        assert_eq!([0, 45, 200, 7500, 360_000].map(|s| duration(Duration::from_secs(s))), ["0s", "45s", "3m20s", "2h05m", "100h00m"]);
    }

    #[test]
    fn time_left_counts_only_the_steps_of_this_process() {
        let mut progress = Progress::new(200, 100, true);
        progress.started = Instant::now() - Duration::from_secs(10);
        let left = progress.remaining(150).as_secs_f64();
        assert!((10.0..10.5).contains(&left), "{left}");
        assert_eq!(progress.remaining(300), Duration::ZERO);
    }
}
