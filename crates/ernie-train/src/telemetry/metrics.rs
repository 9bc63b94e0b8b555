//! `metrics.jsonl`: one JSON object per line, appended as the run goes; the record that the other views are drawn from.
//!
//! Four kinds of line, all with the step and the wall-clock time in seconds since 1970:
//! `{"kind":"train","step":7,"time":…,"tokens":…,"loss":…,"lr":…,"grad_norm":…,"tok_s":…,…}` and
//! `{"kind":"validation","step":7,"time":…,"losses":{"SOURCE":…}}`, of a model with experts also `"experts"`: where the tokens of each domain went, of one with
//! gated heads also `"heads"`: `[{"layer":0,"share":…,"correlation":…}]`, how many were active, and how far more of them where tokens bring more,
//! and under a curriculum `"expert_losses"`: `[{"layer":1,"losses":[[…]]}]`, means of the training's tokens by domain and expert. Before the first step of a new
//! assignment of experts `{"kind":"assignment","step":7,"time":…,"layers":[{"layer":1,"changed":2,"experts":[["DOMAIN"],…]}]}`: how many changed hands, and the
//! domains of each. At the end of a process that was asked for it `{"kind":"profile","step":7,"time":…,"profile":{…}}`: where its time went.
//! Losses are nats per token. A number that is not finite is
//! written as `null`, which is what JSON has for it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::TelemetryError;
use crate::curriculum::Assigned;
use crate::profile::Profile;
use crate::validation::Validated;

/// What one optimizer update reports.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepMetrics {
    /// Number of the update, counted from 1 over the whole run, resumed or not.
    pub step: u64,
    /// Tokens trained on since the start of the run.
    pub tokens: u64,
    /// Mean cross-entropy of the update's tokens, nats per token, without auxiliary losses.
    pub loss: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens per second of this update.
    pub tok_s: f64,
    /// Further numbers by name: auxiliary losses, expert load and the like. A name must not be one of the keys above.
    pub extra: BTreeMap<String, f64>,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Record {
    Train { time: f64, metrics: StepMetrics },
    Validation { time: f64, step: u64, found: Validated },
    Assignment { time: f64, step: u64, layers: Vec<Assigned> },
    Profile { time: f64, step: u64, profile: Profile },
}

/// Keys of a train line that are not `extra`.
const TRAIN_KEYS: [&str; 8] = ["kind", "step", "time", "tokens", "loss", "lr", "grad_norm", "tok_s"];

impl Record {
    pub(super) fn step(&self) -> u64 {
        match self {
            Self::Train { metrics, .. } => metrics.step,
            Self::Validation { step, .. } | Self::Assignment { step, .. } | Self::Profile { step, .. } => *step,
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Train { time, metrics } => {
                let mut line = json!({
                    "kind": "train",
                    "step": metrics.step,
                    "time": time,
                    "tokens": metrics.tokens,
                    "loss": metrics.loss,
                    "lr": metrics.lr,
                    "grad_norm": metrics.grad_norm,
                    "tok_s": metrics.tok_s,
                });
                for (name, value) in &metrics.extra {
                    assert!(!TRAIN_KEYS.contains(&name.as_str()), "extra metric named {name}, which is a fixed key");
                    line[name] = json!(value);
                }
                line
            }
            Self::Validation { time, step, found } => {
                let losses: Map<String, Value> = found.losses.iter().map(|(source, loss)| (source.clone(), json!(loss))).collect();
                let mut line = json!({"kind": "validation", "step": step, "time": time, "losses": losses});
                if let Some(experts) = &found.experts {
                    line["experts"] = json!(experts);
                }
                if !found.active_heads.is_empty() {
                    line["heads"] = json!(found.active_heads);
                }
                if !found.expert_losses.is_empty() {
                    line["expert_losses"] = json!(found.expert_losses);
                }
                line
            }
            Self::Assignment { time, step, layers } => json!({"kind": "assignment", "step": step, "time": time, "layers": layers}),
            Self::Profile { time, step, profile } => json!({"kind": "profile", "step": step, "time": time, "profile": profile}),
        }
    }

    /// Reads a line back; the error says which key is wrong.
    fn from_json(line: &[u8]) -> Result<Self, String> {
        let line: Map<String, Value> = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        let integer = |key: &str| line.get(key).and_then(Value::as_u64).ok_or_else(|| format!("`{key}` is not a whole number"));
        let float = |key: &str| line.get(key).and_then(number).ok_or_else(|| format!("`{key}` is not a number"));
        let time = float("time")?;
        let step = integer("step")?;
        match line.get("kind").and_then(Value::as_str) {
            Some("train") => {
                let mut extra = BTreeMap::new();
                for key in line.keys().filter(|key| !TRAIN_KEYS.contains(&key.as_str())) {
                    extra.insert(key.clone(), float(key)?);
                }
                let metrics = StepMetrics {
                    step,
                    tokens: integer("tokens")?,
                    loss: float("loss")?,
                    lr: float("lr")?,
                    grad_norm: float("grad_norm")?,
                    tok_s: float("tok_s")?,
                    extra,
                };
                Ok(Self::Train { time, metrics })
            }
            Some("validation") => {
                let losses = line.get("losses").and_then(Value::as_object);
                let losses = losses
                    .ok_or("`losses` is not an object")?
                    .iter()
                    .map(|(source, loss)| Some((source.clone(), number(loss)?)))
                    .collect::<Option<Vec<_>>>()
                    .ok_or("`losses` holds something that is not a number")?;
                let found = Validated {
                    losses,
                    experts: part(&line, "experts")?,
                    active_heads: part(&line, "heads")?.unwrap_or_default(),
                    expert_losses: part(&line, "expert_losses")?.unwrap_or_default(),
                };
                Ok(Self::Validation { time, step, found })
            }
            Some("assignment") => Ok(Self::Assignment { time, step, layers: part(&line, "layers")?.ok_or("`layers` is missing")? }),
            Some("profile") => Ok(Self::Profile { time, step, profile: part(&line, "profile")?.ok_or("`profile` is missing")? }),
            _ => Err("`kind` is none of \"train\", \"validation\", \"assignment\" and \"profile\"".to_string()),
        }
    }
}

/// What a line has under a key, if it has that.
fn part<T: serde::de::DeserializeOwned>(line: &Map<String, Value>, key: &str) -> Result<Option<T>, String> {
    line.get(key).map(|value| T::deserialize(value)).transpose().map_err(|error| format!("`{key}`: {error}"))
}

/// A JSON number, or NaN for the `null` that a number which is not finite was written as.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Null => Some(f64::NAN),
        value => value.as_f64(),
    }
}

/// The open `metrics.jsonl`, positioned at its end.
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens or creates the file, cuts off everything after `resume_step` and a torn last line, and returns what is left.
    ///
    /// A process killed between a checkpoint and its next one has logged steps that the resumed run will do again: those lines
    /// go. Only the last line can be torn, since lines are appended whole; any other unreadable line is an error.
    pub(super) fn open(path: &Path, resume_step: u64) -> Result<(Self, Vec<Record>), TelemetryError> {
        let io = |action| move |source| TelemetryError::io(action, path, source);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io("open"))?;
        let (kept, records) = read_lines(&file, path, resume_step)?;
        file.set_len(kept).map_err(io("truncate"))?;
        let mut file = file;
        file.seek(SeekFrom::End(0)).map_err(io("seek in"))?;
        let path = path.to_path_buf();
        Ok((Self { path, file }, records))
    }

    /// Appends one line with one write, so that a killed process leaves whole lines.
    pub(super) fn append(&mut self, record: &Record) -> Result<(), TelemetryError> {
        let mut line = record.to_json().to_string();
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|source| TelemetryError::io("append to", &self.path, source))
    }

    /// Waits until the lines are on the disk.
    pub(super) fn sync(&self) -> Result<(), TelemetryError> {
        self.file.sync_data().map_err(|source| TelemetryError::io("sync", &self.path, source))
    }
}

/// The records of a file, without a torn last line.
pub(super) fn read(path: &Path) -> Result<Vec<Record>, TelemetryError> {
    let file = File::open(path).map_err(|source| TelemetryError::io("open", path, source))?;
    Ok(read_lines(&file, path, u64::MAX)?.1)
}

/// Whole lines up to the one after step `last`: their bytes, and what they say.
fn read_lines(file: &File, path: &Path, last: u64) -> Result<(u64, Vec<Record>), TelemetryError> {
    let mut reader = BufReader::new(file);
    let (mut kept, mut records) = (0u64, Vec::new());
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(|source| TelemetryError::io("read", path, source))?;
        if read == 0 || line.last() != Some(&b'\n') {
            break;
        }
        let record =
            Record::from_json(&line).map_err(|reason| TelemetryError::Metrics { path: path.to_path_buf(), line: number, reason })?;
        if record.step() > last {
            break;
        }
        kept += read as u64;
        records.push(record);
    }
    Ok((kept, records))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curriculum::LayerLosses;
    use crate::experts::ExpertUse;
    use crate::heads::HeadUse;
    use crate::profile::OperatorSeconds;

    fn train(step: u64) -> Record {
        let metrics = StepMetrics {
            step,
            tokens: step * 512,
            loss: 1.0 / step as f64,
            lr: 0.1 + 0.2,
            grad_norm: 1.5,
            tok_s: 4000.25,
            extra: BTreeMap::from([("balance_loss".to_string(), 1.01)]),
        };
        Record::Train { time: 1.75e9 + step as f64, metrics }
    }

    fn validation(step: u64) -> Record {
        Record::Validation {
            time: 1.75e9,
            step,
            found: Validated {
                losses: vec![("stories".to_string(), 2.5), ("诗".to_string(), 3.25)],
                experts: ExpertUse::new(&["a".into()], [(1, vec![vec![3, step]])]),
                active_heads: vec![HeadUse { layer: 1, share: 0.75, correlation: (step > 2).then_some(-0.5) }],
                expert_losses: vec![LayerLosses { layer: 1, losses: vec![vec![None, Some(2.5)]] }],
            },
        }
    }

    fn assignment(step: u64) -> Record {
        let layers = vec![Assigned { layer: 1, changed: 1, experts: vec![vec!["a".into(), "诗".into()], Vec::new()] }];
        Record::Assignment { time: 1.75e9, step, layers }
    }

    fn profile(step: u64) -> Record {
        let operators = vec![OperatorSeconds { operator: "head".into(), forward: 0.25, backward: 0.125 }];
        Record::Profile { time: 1.75e9, step, profile: Profile { steps: step, step_seconds: 1.5, operators, ..Profile::default() } }
    }

    fn written(path: &Path, records: &[Record]) {
        let (mut file, _) = MetricsFile::open(path, 0).unwrap();
        for record in records {
            file.append(record).unwrap();
        }
        file.sync().unwrap();
    }

    #[test]
    fn every_line_reads_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let records = [train(1), train(2), validation(2), assignment(3), train(3), validation(3), profile(3)];
        written(&path, &records);
        let (_, back) = MetricsFile::open(&path, 3).unwrap();
        assert_eq!(back, records);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 7);
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["loss"], 1.0);
        assert_eq!(first["balance_loss"], 1.01);
    }

    #[test]
    fn resuming_cuts_later_lines_and_a_torn_one_and_appends_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        written(&path, &[train(1), train(2), validation(2), assignment(3), train(3)]);
        let mut raw = std::fs::read(&path).unwrap();
        raw.extend_from_slice(b"{\"kind\":\"train\",\"st");
        std::fs::write(&path, &raw).unwrap();

        let (_, back) = MetricsFile::open(&path, 9).unwrap();
        assert_eq!(back.len(), 5, "only the torn line goes");

        let (mut file, back) = MetricsFile::open(&path, 2).unwrap();
        assert_eq!(back, [train(1), train(2), validation(2)]);
        file.append(&train(3)).unwrap();
        let (_, back) = MetricsFile::open(&path, 3).unwrap();
        assert_eq!(back, [train(1), train(2), validation(2), train(3)]);

        let (_, back) = MetricsFile::open(&path, 0).unwrap();
        assert!(back.is_empty());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn a_number_that_is_not_finite_is_null_and_comes_back_as_nan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let Record::Train { time, mut metrics } = train(1) else { unreachable!() };
        metrics.loss = f64::INFINITY;
        written(&path, &[Record::Train { time, metrics }]);
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"loss\":null"));
        let (_, back) = MetricsFile::open(&path, 1).unwrap();
        let Record::Train { metrics, .. } = &back[0] else { panic!("{back:?}") };
        assert!(metrics.loss.is_nan());
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        for (bad, word) in [
            ("not json", "expected"),
            ("{\"kind\":\"train\",\"step\":-1,\"time\":0}", "step"),
            ("{\"kind\":\"assignment\",\"step\":1,\"time\":0}", "layers"),
            ("{\"kind\":\"profile\",\"step\":1,\"time\":0}", "profile"),
            ("{\"kind\":\"other\",\"step\":1,\"time\":0}", "kind"),
        ] {
            std::fs::write(&path, format!("{bad}\n{}\n", validation(2).to_json())).unwrap();
            let error = match MetricsFile::open(&path, 9) {
                Ok((_, records)) => panic!("{bad} was read as {records:?}"),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(":1") && error.contains(word), "{error}");
            assert!(std::fs::read_to_string(&path).unwrap().starts_with(bad), "an error must not truncate");
        }
    }
}
