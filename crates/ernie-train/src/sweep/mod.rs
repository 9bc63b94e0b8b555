//! An experiment: one recipe in several variants (*arms*), each with several seeds, trained one after the other and compared.
//!
//! A sweep is a TOML file beside its recipe:
//!
//! ```toml
//! name = "priority"
//! recipe = "mixed.toml"       # relative to this file
//! out = "runs/priority"
//! seeds = [1, 2, 3]
//!
//! [[arm]]
//! name = "uniform"
//!
//! [[arm]]
//! name = "priority"
//! [arm.set]                   # dotted keys of the recipe
//! "data.priority.alpha" = 1.0
//! ```
//!
//! All runs have one tokenizer, that of the recipe. A run that was stopped goes on where it was, one that is finished is not run again: stopping and
//! starting a sweep loses nothing. A run of another recipe or of other text, finished or not, is refused. The first arm is what the others are compared with.
mod page;
mod pictures;
mod report;
mod text;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use ernie_checkpoint::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::data;
use crate::error::TrainError;
use crate::origin::{recipe_fingerprint, report_fingerprint};
use crate::recipe::{self, Recipe};
use crate::report::Report;
use crate::snapshot;
use crate::trainer::{self, TrainOptions};
pub use report::{ArmHeads, ArmReport, Comparison, RunReport, Spread, SweepReport};
use text::TextNow;

/// A sweep as its file has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// Heading of the report.
    pub name: String,
    /// The recipe that all arms start from, relative to the sweep's file.
    pub recipe: PathBuf,
    /// Folder of all runs and of the report.
    pub out: PathBuf,
    /// `run.seed` of the runs of each arm.
    pub seeds: Vec<u64>,
    /// A text on which the report shows what each arm's model of the first seed chose, token by token.
    #[serde(default)]
    pub text: Option<String>,
    /// The variants (`[[arm]]`); the first is what the others are compared with.
    #[serde(rename = "arm")]
    pub arms: Vec<Arm>,
    /// The recipe's text as a table.
    #[serde(skip)]
    base: toml::Table,
}

/// One variant of the recipe.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Its name in the report; also the name of its folder.
    pub name: String,
    /// Values by dotted keys of the recipe, which replace the recipe's.
    #[serde(default)]
    pub set: toml::Table,
}

/// A picture for the report.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What it shows.
    pub caption: String,
    /// The picture, an SVG document.
    pub svg: String,
}

/// One run of a sweep.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Number of its arm.
    pub arm: usize,
    /// Its seed.
    pub seed: u64,
    /// Its recipe.
    pub recipe: Recipe,
}

impl Sweep {
    /// Reads a sweep and its recipe, and checks every variant of the recipe as far as that goes without data.
    ///
    /// # Errors
    /// [`recipe::Error`], with the file, and the arm where one is at fault.
    pub fn from_file(path: &Path) -> Result<Self, recipe::Error> {
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|source| recipe::Error::Read { path: path.into(), source });
        let mut sweep: Sweep = recipe::parse(&read(path)?, path)?;
        let base = path.parent().unwrap_or(Path::new(".")).join(&sweep.recipe);
        sweep.base = recipe::parse(&read(&base)?, &base)?;
        sweep.check()?;
        Ok(sweep)
    }

    fn check(&self) -> Result<(), recipe::Error> {
        let refused = |key: String, problem: &str, fix: &str| Err(recipe::Error::Invalid { key, problem: problem.into(), fix: fix.into() });
        if self.seeds.is_empty() || self.arms.is_empty() {
            return refused("seeds, arm".into(), "there is nothing to run", "give at least one seed and one [[arm]]");
        }
        if self.seeds.iter().enumerate().any(|(index, seed)| self.seeds[..index].contains(seed)) {
            return refused("seeds".into(), "a seed is given twice", "give each seed once");
        }
        for (index, arm) in self.arms.iter().enumerate() {
            let key = format!("arm[{index}].name");
            if arm.name.is_empty() || !arm.name.chars().all(|c| c.is_alphanumeric() || "_- ".contains(c)) {
                return refused(key, "it is not a plain name", "use letters, digits, spaces, `_` and `-`");
            }
            if self.arms[..index].iter().any(|other| folder_name(&other.name) == folder_name(&arm.name)) {
                return refused(key, "another arm has this name", "give each arm its own name");
            }
            if arm.set.contains_key("run.seed") || arm.set.contains_key("run.out") {
                return refused(format!("arm[{index}].set"), "run.seed and run.out are the sweep's", "remove them");
            }
        }
        for planned in self.runs()? {
            if planned.recipe.data.validation_fraction == 0.0 {
                let (problem, fix) = ("runs are compared by validation losses, and it is 0".into(), "give it above 0".into());
                return Err(self.of_arm(planned.arm, recipe::Error::Invalid { key: "data.validation_fraction".into(), problem, fix }));
            }
            trainer::model_config(&planned.recipe).map_err(|error| match error {
                TrainError::Recipe(error) => self.of_arm(planned.arm, error),
                error => recipe::Error::Invalid {
                    key: format!("arm[{}] ({})", planned.arm, self.arms[planned.arm].name),
                    problem: error.to_string(),
                    fix: "correct the model that it sets".into(),
                },
            })?;
        }
        Ok(())
    }

    /// All runs, seed by seed, so that what is finished is comparable early.
    ///
    /// # Errors
    /// If a variant is no recipe.
    pub fn runs(&self) -> Result<Vec<Planned>, recipe::Error> {
        let mut runs = Vec::new();
        for &seed in &self.seeds {
            for (index, arm) in self.arms.iter().enumerate() {
                let mut table = self.base.clone();
                for (key, value) in &arm.set {
                    set(&mut table, key, value.clone()).map_err(|problem| recipe::Error::Invalid {
                        key: format!("arm[{index}].set.\"{key}\""),
                        problem,
                        fix: "give the dotted path of a key of the recipe".into(),
                    })?;
                }
                let origin = PathBuf::from(format!("{} with arm `{}`", self.recipe.display(), arm.name));
                let text = toml::to_string(&table).expect("a table that was read can be written");
                let mut recipe = Recipe::from_toml(&text, &origin)?;
                recipe.run.name = format!("{}: {}, seed {seed}", self.name, arm.name);
                recipe.run.seed = seed;
                // Tokenised once for all.
                recipe.data.cache = Some(recipe.data.cache.take().unwrap_or_else(|| self.out.join("cache")));
                recipe.run.out = self.out.join(folder_name(&arm.name)).join(format!("seed-{seed}"));
                recipe.export = None;
                runs.push(Planned { arm: index, seed, recipe });
            }
        }
        Ok(runs)
    }

    fn of_arm(&self, arm: usize, error: recipe::Error) -> recipe::Error {
        match error {
            recipe::Error::Invalid { key, problem, fix } => {
                recipe::Error::Invalid { key: format!("{key}` of arm `{}", self.arms[arm].name), problem, fix }
            }
            error => error,
        }
    }

    /// Trains every run that is not finished and writes `report.json` and `report.html` after each; `say` is told what is being done. Ends early when
    /// `options.stop` is set.
    ///
    /// # Errors
    /// See [`TrainError`]; what is finished stays finished.
    pub fn run(&self, options: &TrainOptions, say: &mut dyn FnMut(&str)) -> Result<SweepReport, TrainError> {
        let planned = self.runs()?;
        let mut runs = Vec::new();
        let mut tokenizer = None;
        let mut text_is_checked = false;
        // All of them first: what is of another recipe or other text is refused before anything is trained.
        let mut text = TextNow::default();
        let check = |planned: &Planned| -> Result<_, TrainError> {
            let report = finished(&planned.recipe)?;
            if let Some(origin) = report.as_ref().and_then(|report| report.origin.as_ref()) {
                text.refuse_other(&planned.recipe, origin, options.data_root.as_deref())?;
            }
            Ok(report)
        };
        let done = planned.iter().map(check).collect::<Result<Vec<_>, _>>()?;
        for (index, (Planned { arm, seed, mut recipe }, done)) in planned.iter().cloned().zip(done).enumerate() {
            if options.stop.load(Ordering::Relaxed) {
                break;
            }
            if let Some(report) = done {
                runs.push(RunReport::new(arm, seed, report, &recipe.run.out)?);
                continue;
            }
            // Of the recipe as it is planned, before it gets the common tokenizer.
            let fingerprint = report_fingerprint(&recipe);
            say(&format!("run {} of {}: {}", index + 1, planned.len(), recipe.run.name));
            if recipe.tokenizer.path.is_none() {
                // Its sample depends on the seed, and losses per token compare only under one tokenizer.
                if tokenizer.is_none() {
                    let first = &planned[0].recipe;
                    tokenizer = Some(data::prepare(first, &first.data_root(options.data_root.as_deref())?, say)?.tokenizer_dir);
                }
                recipe.tokenizer.path = tokenizer.clone();
            }
            if !std::mem::replace(&mut text_is_checked, true) {
                self.check_text(&planned, tokenizer.as_deref())?;
            }
            let mut report = trainer::train(&recipe, options)?;
            if !report.finished {
                break;
            }
            if let Some(origin) = &mut report.origin {
                origin.recipe = fingerprint;
            }
            report::write_run(&report_path(&recipe), &report)?;
            runs.push(RunReport::new(arm, seed, report, &recipe.run.out)?);
            self.write_report(&runs, planned.len())?;
        }
        self.write_report(&runs, planned.len())
    }

    /// Refuses a text that is longer than what the models that will be shown on it are made for, before any of them is trained. `common` is the tokenizer of
    /// the recipes that name none.
    fn check_text(&self, planned: &[Planned], common: Option<&Path>) -> Result<(), TrainError> {
        let Some(text) = &self.text else { return Ok(()) };
        for Planned { arm, recipe, .. } in planned.iter().filter(|planned| planned.seed == self.seeds[0]) {
            let config = trainer::model_config(recipe)?;
            let Some(dir) = recipe.tokenizer.path.as_deref().or(common) else { continue };
            let unusable =
                |error: ernie_checkpoint::TokenizerError| data::Error::Tokenizer { origin: dir.to_path_buf(), problem: error.to_string() };
            let tokens = Tokenizer::from_dir(dir).and_then(|tokenizer| tokenizer.encode(text, true)).map_err(unusable)?.len();
            let limit = config.max_position_embeddings;
            if (config.moe.is_some() || config.mechanisms.context_gate.is_some()) && tokens > limit {
                let problem = format!("it has {tokens} tokens, and the model of arm `{}` is made for {limit}", self.arms[*arm].name);
                return Err(recipe::Error::Invalid { key: "text".into(), problem, fix: "shorten it".into() }.into());
            }
        }
        Ok(())
    }

    fn write_report(&self, runs: &[RunReport], planned: usize) -> Result<SweepReport, TrainError> {
        let report = SweepReport::new(self, runs, planned);
        std::fs::create_dir_all(&self.out).map_err(|source| TrainError::Io { path: self.out.clone(), source })?;
        let json = serde_json::to_vec_pretty(&report).expect("a report is plain data");
        ernie_checkpoint::atomic_write(&self.out.join("report.json"), &json)?;
        self.illustrate(&report, &[])?;
        Ok(report)
    }

    /// Writes `report.html` with pictures after what it shows by itself.
    ///
    /// # Errors
    /// If the disk refuses; the page that was there is still there then.
    pub fn illustrate(&self, report: &SweepReport, figures: &[Figure]) -> Result<(), TrainError> {
        Ok(ernie_checkpoint::atomic_write(&self.out.join("report.html"), page::html(report, figures).as_bytes())?)
    }
}

fn report_path(recipe: &Recipe) -> PathBuf {
    recipe.run.out.join("report.json")
}

/// The report of the recipe's run, if that is finished; refused when it is a run of another recipe.
fn finished(recipe: &Recipe) -> Result<Option<Report>, TrainError> {
    let Some(report) = report::read_run(&report_path(recipe)) else { return Ok(None) };
    let (saved, given) = match &report.origin {
        Some(origin) => (Some(origin.recipe.clone()), report_fingerprint(recipe)),
        // Of a program that did not say: what its last checkpoint was trained by.
        None => (snapshot::newest(&trainer::checkpoints(recipe))?.map(|newest| newest.position.recipe), recipe_fingerprint(recipe)),
    };
    if saved.as_ref() == Some(&given) {
        return Ok(Some(report));
    }
    Err(TrainError::OtherRun { out: recipe.run.out.clone(), saved: saved.unwrap_or_else(|| "unknown".to_owned()), given })
}

/// Sets the value under a dotted key, making the tables on its way.
fn set(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), String> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((first, rest)) => match table.entry(first).or_insert_with(|| toml::Value::Table(toml::Table::new())) {
            toml::Value::Table(inner) => set(inner, rest, value),
            _ => Err(format!("`{first}` is no table")),
        },
    }
}

fn folder_name(name: &str) -> String {
    name.replace(' ', "-")
}

#[cfg(test)]
mod tests;
