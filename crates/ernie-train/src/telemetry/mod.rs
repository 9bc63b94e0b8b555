//! What a run tells about itself: `metrics.jsonl`, TensorBoard events, a loss curve, progress on the terminal.
//!
//! `metrics.jsonl` is the record; the event file and the curve are drawn from it again when a run resumes, so a process killed at
//! any instant leaves nothing that the next one cannot put right. In the run's folder: `metrics.jsonl`,
//! `tensorboard/events.out.tfevents.*.ernie`, `loss.svg`.

mod curve;
mod history;
mod metrics;
mod progress;
mod tensorboard;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::curriculum::Assigned;
use crate::experts::ExpertUse;
use crate::heads::HeadUse;
use crate::profile::Profile;
use crate::validation::Validated;
use curve::Curve;
pub use history::{Validation, validations};
pub use metrics::StepMetrics;
use metrics::{MetricsFile, Record};
use progress::Progress;
use tensorboard::EventWriter;

/// Time between two drawings of the curve and two flushes of the event file, apart from those at validations and at the end.
const REFRESH_INTERVAL: Duration = Duration::from_secs(60);

/// What went wrong with a telemetry file.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A whole line of `metrics.jsonl` is not one of ours.
    #[error(
        "{}:{line}: {reason}; expected a line written by an earlier part of this run: repair the line, or move the file away to \
         start a new record",
        path.display()
    )]
    Metrics {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The curve could not be drawn.
    #[error("cannot draw {}: {reason}", path.display())]
    Curve {
        /// The SVG file.
        path: PathBuf,
        /// The plotter's reason.
        reason: String,
    },
    /// The curve could not be written.
    #[error(transparent)]
    Write(#[from] ernie_checkpoint::Error),
}

impl TelemetryError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

/// How a run's telemetry is set up.
#[derive(Clone, Debug)]
pub struct TelemetryOptions {
    /// Heading of the loss curve, usually the recipe's name.
    pub title: String,
    /// Updates in the whole run.
    pub total_steps: u64,
    /// The last update that the checkpoint holds, 0 for a new run. Everything recorded after it is dropped.
    pub resume_step: u64,
    /// Show nothing on standard error.
    pub quiet: bool,
}

/// The one thing a training loop talks to.
pub struct Telemetry {
    metrics: MetricsFile,
    events: EventWriter,
    curve: Curve,
    progress: Progress,
    refreshed: Instant,
}

impl Telemetry {
    /// Opens the telemetry of the run in `dir`, which must exist, and brings all files back to `options.resume_step`.
    ///
    /// # Errors
    /// [`TelemetryError`] when a file cannot be read or written, or `metrics.jsonl` holds a line that this program did not write.
    pub fn open(dir: &Path, options: &TelemetryOptions) -> Result<Self, TelemetryError> {
        let path = dir.join("metrics.jsonl");
        let (metrics, history) = MetricsFile::open(&path, options.resume_step)?;
        let (events, older) = EventWriter::create(&dir.join("tensorboard"), now())?;
        let mut telemetry = Self {
            metrics,
            events,
            curve: Curve::new(dir.join("loss.svg"), options.title.clone()),
            progress: Progress::new(options.total_steps, options.resume_step, options.quiet),
            refreshed: Instant::now(),
        };
        for record in &history {
            telemetry.draw_from(record)?;
        }
        telemetry.events.remove(&older)?;
        Ok(telemetry)
    }

    /// Records one update.
    ///
    /// # Errors
    /// [`TelemetryError`] when a file cannot be written.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<(), TelemetryError> {
        self.record(&Record::Train { time: now(), metrics: metrics.clone() })?;
        self.progress.step(metrics);
        if self.refreshed.elapsed() >= REFRESH_INTERVAL {
            self.refresh()?;
        }
        Ok(())
    }

    /// Records what a validation after update `step` found: losses, in nats per token, one per source; where the experts' tokens came from; what gates did.
    ///
    /// # Errors
    /// [`TelemetryError`] when a file cannot be written.
    pub fn validation(&mut self, step: u64, found: Validated) -> Result<(), TelemetryError> {
        let mut shown: Vec<String> = found.losses.iter().map(|(source, loss)| format!("{source} {loss:.4}")).collect();
        shown.extend(found.experts.iter().map(|experts| format!("overlap of experts {:.3}", experts.overlap)));
        self.record(&Record::Validation { time: now(), step, found })?;
        self.message(&format!("validation at step {step}: {}", shown.join("  ")));
        self.refresh()
    }

    /// Records which experts have which domains from update `step` on.
    ///
    /// # Errors
    /// [`TelemetryError`] when a file cannot be written.
    pub fn assignment(&mut self, step: u64, layers: Vec<Assigned>) -> Result<(), TelemetryError> {
        self.message(&assignment_line(step, &layers));
        self.record(&Record::Assignment { time: now(), step, layers })
    }

    /// Records where the time of this process went until update `step`.
    ///
    /// # Errors
    /// [`TelemetryError`] when a file cannot be written.
    pub fn profile(&mut self, step: u64, profile: Profile) -> Result<(), TelemetryError> {
        self.record(&Record::Profile { time: now(), step, profile })
    }

    /// Shows a line to the user without disturbing the progress bar.
    pub fn message(&self, text: &str) {
        self.progress.message(text);
    }

    /// Writes everything out and leaves the progress bar as it stands. A run that stops early calls this too.
    ///
    /// # Errors
    /// [`TelemetryError`] when a file cannot be written.
    pub fn finish(mut self) -> Result<(), TelemetryError> {
        self.progress.finish();
        self.metrics.sync()?;
        self.refresh()
    }

    fn record(&mut self, record: &Record) -> Result<(), TelemetryError> {
        self.metrics.append(record)?;
        self.draw_from(record)
    }

    /// Passes a line of the record on to the event file and the curve.
    fn draw_from(&mut self, record: &Record) -> Result<(), TelemetryError> {
        match record {
            Record::Train { time, metrics } => {
                self.curve.train(metrics.step, metrics.loss);
                let extra = metrics.extra.iter().map(|(name, value)| (name.as_str(), *value));
                let fixed = [
                    ("loss", metrics.loss),
                    ("lr", metrics.lr),
                    ("grad_norm", metrics.grad_norm),
                    ("tok_s", metrics.tok_s),
                    ("tokens", metrics.tokens as f64),
                ];
                let scalars = fixed.into_iter().chain(extra).map(|(name, value)| (format!("train/{name}"), value));
                self.events.scalars(*time, metrics.step, scalars)
            }
            Record::Validation { time, step, found } => {
                for (source, loss) in &found.losses {
                    self.curve.validation(*step, source, *loss);
                }
                let losses = found.losses.iter().map(|(source, loss)| (format!("validation/{source}"), *loss));
                let of_experts = |experts: &ExpertUse| [("overlap", experts.overlap), ("least_used", experts.least_used)];
                let of_experts = found.experts.iter().flat_map(of_experts).map(|(name, value)| (format!("experts/{name}"), value));
                let of_heads = |heads: &HeadUse| {
                    [("active", Some(heads.share)), ("correlation", heads.correlation)].map(|(name, value)| (heads.layer, name, value))
                };
                let of_heads = found.active_heads.iter().flat_map(of_heads);
                let of_heads = of_heads.filter_map(|(layer, name, value)| Some((format!("heads/{name}_layer_{layer}"), value?)));
                self.events.scalars(*time, *step, losses.chain(of_experts).chain(of_heads))
            }
            Record::Assignment { time, step, layers } => {
                let changed = layers.iter().map(|layer| layer.changed).sum::<usize>();
                self.events.scalars(*time, *step, [("experts/changed", changed as f64)])
            }
            Record::Profile { .. } => Ok(()),
        }
    }

    fn refresh(&mut self) -> Result<(), TelemetryError> {
        self.refreshed = Instant::now();
        self.events.flush()?;
        self.curve.write()
    }
}

/// An assignment in one line: of each layer how many experts changed hands, and the domains of each.
fn assignment_line(step: u64, layers: &[Assigned]) -> String {
    let of_expert = |domains: &Vec<String>| if domains.is_empty() { "-".to_owned() } else { domains.join("+") };
    let of_layer = |assigned: &Assigned| {
        let experts: Vec<String> = assigned.experts.iter().map(of_expert).collect();
        format!("layer {}, {} changed: {}", assigned.layer, assigned.changed, experts.join(" "))
    };
    format!("experts from step {step} on: {}", layers.iter().map(of_layer).collect::<Vec<_>>().join("; "))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(resume_step: u64) -> TelemetryOptions {
        TelemetryOptions { title: "test run".to_string(), total_steps: 20, resume_step, quiet: true }
    }

    fn run(telemetry: &mut Telemetry, steps: std::ops::RangeInclusive<u64>) {
        for step in steps {
            if step.is_multiple_of(8) {
                telemetry.assignment(step, vec![Assigned { layer: 1, changed: 1, experts: vec![vec!["en".into()]] }]).unwrap();
            }
            let metrics = StepMetrics { step, tokens: 100 * step, loss: 9.0 / step as f64, ..StepMetrics::default() };
            telemetry.step(&metrics).unwrap();
            if step.is_multiple_of(5) {
                let losses = vec![("en".to_owned(), 3.0), ("zh".to_owned(), 4.0)];
                let heads = [0, 1].map(|layer| HeadUse { layer, share: 0.5, correlation: (layer > 0).then_some(0.25) });
                telemetry.validation(step, Validated { losses, active_heads: heads.into(), ..Validated::default() }).unwrap();
            }
        }
    }

    /// Step and loss of each train line, without the times that differ from run to run.
    fn lines(dir: &Path) -> Vec<(u64, String)> {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .map(|line| {
                let losses = line.get("losses").or(line.get("loss")).or(line.get("layers")).unwrap();
                (line["step"].as_u64().unwrap(), losses.to_string())
            })
            .collect()
    }

    fn event_files(dir: &Path) -> Vec<u64> {
        let entries = std::fs::read_dir(dir.join("tensorboard")).unwrap();
        entries.map(|e| e.unwrap().metadata().unwrap().len()).collect()
    }

    #[test]
    fn a_killed_and_resumed_run_leaves_the_record_of_an_uninterrupted_one() {
        let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut telemetry = Telemetry::open(whole.path(), &options(0)).unwrap();
        run(&mut telemetry, 1..=20);
        telemetry.finish().unwrap();

        let mut telemetry = Telemetry::open(killed.path(), &options(0)).unwrap();
        run(&mut telemetry, 1..=13);
        drop(telemetry);
        let metrics = killed.path().join("metrics.jsonl");
        let mut raw = std::fs::read(&metrics).unwrap();
        raw.truncate(raw.len() - 7);
        std::fs::write(&metrics, raw).unwrap();
        let mut telemetry = Telemetry::open(killed.path(), &options(10)).unwrap();
        run(&mut telemetry, 11..=20);
        telemetry.finish().unwrap();

        assert_eq!(lines(killed.path()), lines(whole.path()));
        assert_eq!(event_files(killed.path()), event_files(whole.path()));
        let svg = |dir: &Path| std::fs::read_to_string(dir.join("loss.svg")).unwrap();
        assert_eq!(svg(killed.path()), svg(whole.path()));
    }

    #[test]
    fn an_assignment_is_one_line() {
        let assigned = |layer, changed, experts: &[&[&str]]| {
            let names = experts.iter().map(|domains| domains.iter().map(|name| (*name).to_owned()).collect());
            Assigned { layer, changed, experts: names.collect() }
        };
        let layers = [assigned(1, 3, &[&["sea"], &["sea", "town"], &[]]), assigned(2, 0, &[&["town"], &["sea"], &["sea"]])];
        assert_eq!(
            assignment_line(7, &layers),
            "experts from step 7 on: layer 1, 3 changed: sea sea+town -; layer 2, 0 changed: town sea sea"
        );
    }

    #[test]
    fn a_missing_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("absent");
        let error = Telemetry::open(&missing, &options(0)).err().unwrap().to_string();
        assert!(error.contains("absent"), "{error}");
    }
}
