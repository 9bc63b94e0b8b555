//! The checks. Each is a function from the repository's files to what is wrong with them, tested on small made-up repositories.

mod documents;
mod manifests;
mod sources;

use std::fmt;

use crate::tree::Tree;

/// Whether a problem fails the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Error,
    Warning,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    /// `path` or `path:line`.
    pub place: String,
    pub message: String,
}

impl Problem {
    fn error(place: impl Into<String>, message: impl Into<String>) -> Self {
        let (place, message) = (place.into(), message.into());
        Self { severity: Severity::Error, place, message }
    }

    fn warning(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(place, message) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{severity}: {}: {}", self.place, self.message)
    }
}

/// Every check in turn.
pub fn check(tree: &Tree) -> Vec<Problem> {
    let checks: [fn(&Tree) -> Vec<Problem>; 12] = [
        manifests::internal_dependencies,
        manifests::descriptions_and_lints,
        manifests::pinned_dependencies,
        manifests::dependency_reasons,
        sources::file_lengths,
        sources::forbidden_names,
        sources::machine_paths,
        sources::registry_hosts,
        sources::unsafe_places,
        sources::file_sizes,
        documents::readme_trees,
        documents::links,
    ];
    checks.iter().flat_map(|check| check(tree)).collect()
}

/// Lines with their numbers, from 1.
fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_repository_is_tidy() {
        let root = crate::root();
        if !root.join(".git").exists() {
            eprintln!("SKIPPED: not a git checkout, so the repository's files cannot be told from others");
            return;
        }
        let tree = Tree::of_checkout(&root).unwrap();
        assert!(tree.contains("xtask/src/tidy/mod.rs"));
        let errors: Vec<String> =
            check(&tree).into_iter().filter(|problem| problem.severity == Severity::Error).map(|problem| problem.to_string()).collect();
        assert!(errors.is_empty(), "{}", errors.join("\n"));
    }

    #[test]
    fn a_problem_reads_as_severity_place_and_reason() {
        assert_eq!(Problem::error("a.rs:3", "bad").to_string(), "error: a.rs:3: bad");
        assert_eq!(Problem::warning("b", "long").to_string(), "warning: b: long");
    }
}
