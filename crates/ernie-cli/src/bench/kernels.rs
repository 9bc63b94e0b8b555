//! Where the time goes, by kernel.
use std::collections::BTreeMap;
use std::fmt::Write as _;

use ernie_engine::{Computed, Limits, Model, PREFILL_CHUNK, Part, Profile};
use serde::Serialize;

/// Profiles of runs, with what they computed.
#[derive(Debug, Default)]
pub struct Profiles {
    prefill: Option<(Computed, Profile)>,
    decode: BTreeMap<u32, (Computed, Profile)>,
}

/// What `--kernels` adds: parts by name.
#[derive(Debug, Serialize)]
pub struct Kernels {
    prefill: BTreeMap<&'static str, Kernel>,
    decode: BTreeMap<u32, BTreeMap<&'static str, Kernel>>,
}

/// A part of a run.
#[derive(Debug, Serialize)]
struct Kernel {
    seconds: f64,
    share_of_time: f64,
    /// The least time for it over the time it took; `null` for what is small by its nature.
    share_of_limit: Option<f64>,
}

impl Profiles {
    /// Of a prompt of `tokens` tokens.
    pub fn prefill(&mut self, tokens: usize, profile: Profile) {
        let steps = tokens.div_ceil(PREFILL_CHUNK) as f64;
        let tokens = tokens as f64;
        let pairs = tokens * (tokens + 1.0) / 2.0 / steps;
        let computed = Computed { steps, tokens: tokens / steps, wanted: 1.0 / steps, pairs, positions: (tokens + tokens / steps) / 2.0 };
        self.prefill = Some((computed, profile));
    }

    /// Of `steps` steps that give a token to each of `batch` texts of `context` tokens.
    pub fn decode(&mut self, batch: u32, context: f64, steps: usize, profile: Profile) {
        let tokens = f64::from(batch);
        let seen = tokens * context;
        let computed = Computed { steps: steps as f64, tokens, wanted: tokens, pairs: seen, positions: seen };
        self.decode.insert(batch, (computed, profile));
    }

    /// As shares of what the machine could do.
    pub fn against(&self, model: &Model, limits: &Limits) -> Kernels {
        let kernels = |(computed, profile): &(Computed, Profile)| {
            let kernel = |part: Part| {
                let seconds = profile.seconds(part);
                let share_of_limit = computed.least_seconds(model, limits, part).map(|least| least / seconds);
                (part.as_str(), Kernel { seconds, share_of_time: seconds / profile.total(), share_of_limit })
            };
            Part::ALL.into_iter().filter(|part| profile.seconds(*part) > 0.0).map(kernel).collect()
        };
        Kernels {
            prefill: self.prefill.as_ref().map(kernels).unwrap_or_default(),
            decode: self.decode.iter().map(|(batch, run)| (*batch, kernels(run))).collect(),
        }
    }
}

impl Kernels {
    /// As a table: a row for each part, two columns for each run.
    pub fn write(&self, out: &mut String, prompt: usize, generated: usize) {
        let runs: Vec<(String, &BTreeMap<&'static str, Kernel>)> = [(format!("prompt of {prompt}"), &self.prefill)]
            .into_iter()
            .chain(self.decode.iter().map(|(batch, kernels)| (format!("{generated} tokens × {batch}"), kernels)))
            .collect();
        let _ = write!(out, "\n{:<14}", "time, of limit");
        for (name, _) in &runs {
            let _ = write!(out, " {name:>18}");
        }
        out.push('\n');
        for part in Part::ALL.map(Part::as_str) {
            if runs.iter().all(|(_, kernels)| !kernels.contains_key(part)) {
                continue;
            }
            let _ = write!(out, "{part:<14}");
            for (_, kernels) in &runs {
                let percent = |share: f64| format!("{:.0} %", share * 100.0);
                let (time, limit) = match kernels.get(part) {
                    None => Default::default(),
                    Some(kernel) => (percent(kernel.share_of_time), kernel.share_of_limit.map_or_else(|| "·".to_owned(), percent)),
                };
                let _ = write!(out, " {time:>9} {limit:>8}");
            }
            out.push('\n');
        }
    }
}
