//! Whether a checkpoint is the model that its config describes: every tensor there, none too many, shapes right, all
//! numbers finite.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::numeric;
use crate::shards::Stored;
use crate::specs::{TensorGroup, TensorRole};

impl Checkpoint {
    /// Checks the whole checkpoint against its config, reading every byte once.
    ///
    /// # Errors
    /// The first problem: [`Error::MissingTensor`], [`Error::Misshapen`], [`Error::SurplusTensor`],
    /// [`Error::UnsupportedDtype`], [`Error::NonFinite`] or [`Error::Scale`].
    pub fn validate(&self) -> Result<()> {
        match self.structure_problems().into_iter().next() {
            Some(problem) => Err(problem),
            None => self.number_problems(true).into_iter().next().map_or(Ok(()), Err),
        }
    }

    /// The part of [`Checkpoint::validate`] that reads no weights: names, shapes and types.
    ///
    /// # Errors
    /// As [`Checkpoint::validate`], but for what only the numbers tell.
    pub fn validate_structure(&self) -> Result<()> {
        self.structure_problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// The part of [`Checkpoint::validate`] that reads one tensor's weights, for a reader who takes them one by one.
    ///
    /// # Errors
    /// [`Error::NonFinite`], [`Error::NoSuchTensor`].
    pub fn validate_numbers(&self, name: &str) -> Result<()> {
        let Some(source) = self.table.sources.get(name) else {
            return Err(Error::NoSuchTensor { file: self.weights.origin.clone(), tensor: name.into() });
        };
        self.non_finite(&self.weights.stored[source.stored]).map_or(Ok(()), Err)
    }

    /// Every problem that [`Checkpoint::validate`] would stop at, for showing: names and shapes first, then numbers.
    pub fn problems(&self) -> Vec<Error> {
        let mut problems = self.structure_problems();
        problems.extend(self.number_problems(false));
        problems
    }

    fn structure_problems(&self) -> Vec<Error> {
        let mut problems = Vec::new();
        let sources = &self.table.sources;
        let specs = self.config().tensor_specs();
        // An optional group is there as a whole or not at all.
        let begun: HashSet<TensorGroup> = specs.iter().filter(|s| sources.contains_key(&s.name)).map(|s| s.group).collect();
        let optional = [TensorGroup::Mtp, TensorGroup::ExpertBias];
        let mut known = HashMap::with_capacity(specs.len().min(sources.len()));
        for spec in &specs {
            let Some(source) = sources.get(&spec.name) else {
                if spec.required || (optional.contains(&spec.group) && begun.contains(&spec.group)) {
                    problems.push(Error::MissingTensor {
                        file: self.weights.origin.clone(),
                        tensor: spec.name.clone(),
                        expected: spec.shape.clone(),
                    });
                }
                continue;
            };
            known.insert(spec.name.as_str(), spec);
            let stored = &self.weights.stored[source.stored];
            let file = || self.weights.path(stored).to_owned();
            if source.shape != spec.shape {
                problems.push(Error::Misshapen {
                    file: file(),
                    tensor: spec.name.clone(),
                    expected: spec.shape.clone(),
                    got: source.shape.clone(),
                });
            }
            let may_be_quantised = matches!(spec.role, TensorRole::Projection | TensorRole::Embedding);
            if source.dtype.is_quantised() && !may_be_quantised {
                let expected = "a float type, F32 where precision matters";
                let (tensor, got) = (spec.name.clone(), source.dtype.to_string());
                problems.push(Error::UnsupportedDtype { file: file(), tensor, expected, got });
            }
        }
        let surplus = sources.iter().filter(|(name, _)| !known.contains_key(name.as_str()));
        let surplus = surplus.map(|(name, source)| (name.clone(), source.stored));
        let orphans = self.table.orphans.iter().map(|&i| (self.weights.stored[i].entry.name.clone(), i));
        problems.extend(surplus.chain(orphans).map(|(tensor, index)| {
            let stored = &self.weights.stored[index];
            let (file, shape) = (self.weights.path(stored).to_owned(), stored.entry.shape.clone());
            Error::SurplusTensor { file, tensor, shape }
        }));
        problems
    }

    /// Scans all numbers on all cores, in stored order; with `stop_early` the first problem found ends the scan.
    fn number_problems(&self, stop_early: bool) -> Vec<Error> {
        let stored = &self.weights.stored;
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let scan = || {
            let mut found = Vec::new();
            while !(stop_early && stop.load(Ordering::Relaxed)) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(tensor) = stored.get(index) else { break };
                if let Some(problem) = self.non_finite(tensor) {
                    found.push((index, problem));
                    stop.store(true, Ordering::Relaxed);
                }
            }
            found
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(stored.len().div_ceil(16)).max(1);
        let mut found: Vec<(usize, Error)> = thread::scope(|scope| {
            let workers: Vec<_> = (1..threads).map(|_| scope.spawn(scan)).collect();
            let mut found = scan();
            // A worker cannot panic: it only compares numbers of checked ranges.
            found.extend(workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()));
            found
        });
        found.sort_by_key(|(index, _)| *index);
        let scales = self.table.sources.iter().filter_map(|(name, source)| Some((name, source.scale?)));
        let scales = scales.filter_map(|(name, scale)| self.scales(name, scale).err());
        found.into_iter().map(|(_, problem)| problem).chain(scales).collect()
    }

    fn non_finite(&self, stored: &Stored) -> Option<Error> {
        let (at, value) = numeric::first_non_finite(stored.entry.dtype, self.weights.bytes(stored))?;
        let file = self.weights.path(stored).to_owned();
        Some(Error::NonFinite { file, tensor: stored.entry.name.clone(), at, value })
    }
}
