//! What a run is made with: its recipe and its reference model as hashes, the program, the machine, the day.
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ernie_checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};
use time::{Date, OffsetDateTime};

use crate::curriculum::difficulty::weights_hash;
use crate::data::Prepared;
use crate::error::TrainError;
use crate::recipe::{self, Recipe, Source};
use crate::snapshot::Position;

/// What the figures of a report came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Hash of everything in the recipe that decides the figures: the weights, the text, how losses are measured.
    pub recipe: String,
    /// Name of each source and hash of its files, their names and contents, as the run found them; reports of earlier programs do not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub text: Vec<(String, String)>,
    /// The program and its version.
    pub program: String,
    /// Threads that computed.
    pub threads: usize,
    /// The processor's name, where the system tells (Linux: /proc/cpuinfo).
    pub processor: Option<String>,
    /// The day on which the run ended, in UTC: 2026-11-28.
    pub date: String,
}

impl Origin {
    /// Of a run of this recipe on this data that ends now, in this process.
    pub(crate) fn of(recipe: &Recipe, prepared: &Prepared) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self {
            recipe: report_fingerprint(recipe),
            text: recipe.data.source.iter().zip(&prepared.files).map(|(source, files)| (source.name.clone(), text_hash(files))).collect(),
            program: concat!("ernie-rs ", env!("CARGO_PKG_VERSION")).to_owned(),
            threads: rayon::current_num_threads(),
            processor: std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| processor(&text)),
            date: date(since),
        }
    }
}

/// The first processor's name in the text of /proc/cpuinfo; not every architecture gives one.
fn processor(cpuinfo: &str) -> Option<String> {
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(name.trim_start_matches([' ', '\t', ':']).trim_end().to_owned())
}

/// The day of a time in seconds since 1970.
fn date(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.map_or(Date::MAX, OffsetDateTime::date).to_string()
}

/// The hash of a source's files as reports have it.
pub(crate) fn text_hash(files: &blake3::Hash) -> String {
    files.to_hex()[..32].to_string()
}

/// A hash of everything in the recipe that decides the weights: not names, folders, thread counts or how often things are written.
pub(crate) fn recipe_fingerprint(recipe: &Recipe) -> String {
    let decisive = (&recipe.model, &recipe.optimizer, &recipe.schedule, &recipe.loss, recipe.run.seed, recipe.total_steps());
    let shape = (recipe.data.sequence_length, recipe.data.batch_size, recipe.data.gradient_accumulation);
    let arithmetic = (recipe.run.precision, recipe.run.recompute);
    // As before there was a choice, where there was none: runs of then go on.
    let json = match (&recipe.curriculum, &recipe.data.priority, arithmetic == Default::default()) {
        (Some(curriculum), ..) => {
            let domains: Vec<&str> = recipe.data.source.iter().map(recipe::Source::domain).collect();
            serde_json::to_string(&(decisive, shape, arithmetic, curriculum, domains))
        }
        (None, None, true) => serde_json::to_string(&(decisive, shape)),
        (None, None, false) => serde_json::to_string(&(decisive, shape, arithmetic)),
        (None, Some(priority), _) => serde_json::to_string(&(decisive, shape, arithmetic, priority)),
    };
    hash(&json.expect("a recipe is plain data"))
}

/// The same with what decides the text and the validations, but for the files themselves: the state of a run under way has the hash of its text, the [`Origin`] of
/// a finished one those of its sources' files.
pub(crate) fn report_fingerprint(recipe: &Recipe) -> String {
    let sources: Vec<Source> = recipe.data.source.iter().map(|source| Source { licence: String::new(), ..source.clone() }).collect();
    let measured = (recipe.data.validation_fraction, recipe.run.validate_every, recipe.run.validate_tokens);
    let json = serde_json::to_string(&(recipe_fingerprint(recipe), &recipe.tokenizer, sources, measured));
    hash(&json.expect("a recipe is plain data"))
}

/// The model by which the recipe's rows are drawn, if there is one.
fn reference(recipe: &Recipe) -> Option<&Path> {
    let of_curriculum = recipe.curriculum.as_ref().filter(|staged| staged.uses_difficulty()).and_then(|staged| staged.reference.as_ref());
    let of_priority = || recipe.data.priority.as_ref().and_then(|priority| priority.reference.as_deref());
    of_curriculum.map(|reference| reference.model.as_path()).or_else(of_priority)
}

/// A hash of that model's configuration and weights.
pub(crate) fn reference_hash(recipe: &Recipe) -> Result<Option<String>, TrainError> {
    let Some(model) = reference(recipe) else { return Ok(None) };
    Checkpoint::open(model)?;
    Ok(Some(weights_hash(model)?.to_hex()[..32].to_string()))
}

/// Refuses to go on from a position in the recipe's folder that was come to with another recipe or another reference than those of these hashes.
pub(crate) fn refuse_another(recipe: &Recipe, saved: &Position, fingerprint: &str, reference_hash: Option<&str>) -> Result<(), TrainError> {
    if saved.recipe != fingerprint {
        return Err(TrainError::OtherRun { out: recipe.run.out.clone(), saved: saved.recipe.clone(), given: fingerprint.to_owned() });
    }
    match (reference(recipe), &saved.reference, reference_hash) {
        (Some(model), Some(saved), Some(given)) if saved != given => {
            Err(TrainError::OtherReference { model: model.to_path_buf(), saved: saved.clone(), given: given.to_owned() })
        }
        _ => Ok(()),
    }
}

fn hash(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..32].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, day) in [(0, "1970-01-01"), (951_782_400, "2000-02-29"), (951_868_800, "2000-03-01"), (1_798_761_599, "2026-12-31")] {
            assert_eq!(date(seconds), day);
        }
    }

    #[test]
    fn a_processor_has_its_name_where_there_is_one() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nmodel\t\t: 1\nprocessor\t: 1\nmodel name\t: Some CPU @ 2.00GHz\n";
        assert_eq!(processor(text).as_deref(), Some("Some CPU @ 2.00GHz"));
        assert_eq!(processor("processor\t: 0\nCPU part\t: 0xd0c\n"), None);
    }
}
