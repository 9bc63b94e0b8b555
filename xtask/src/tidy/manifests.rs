//! Checks of the Cargo manifests against the tables of ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::{Problem, numbered};
use crate::tree::Tree;

const ARCHITECTURE: &str = "ARCHITECTURE.md";
/// Heading of the crate table: crate, its one job, which crates it may use.
const CRATES_HEADING: &str = "## Crates";
/// Heading of the dependency table: external crate, reason.
const DEPENDENCIES_HEADING: &str = "## Dependencies";

/// A crate uses only the workspace crates that the table of ARCHITECTURE.md allows it.
///
/// "May use" is transitive: what an allowed crate may use is allowed too, as Cargo links it in any case. Dev-dependencies are free: a test may
/// compare a crate with any oracle. Folder and crate have one name, each crate has one row, each row one crate.
pub fn internal_dependencies(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut rows = BTreeMap::new();
    for (line, cells) in table(tree, CRATES_HEADING, &mut problems) {
        let place = format!("{ARCHITECTURE}:{line}");
        let [name, _, may_use] = &cells[..] else {
            problems.push(Problem::error(place, "the crate table has three columns: crate, its one job, may use"));
            continue;
        };
        let may_use: BTreeSet<String> = match may_use.as_str() {
            "–" | "-" => BTreeSet::new(),
            list => list.split(',').map(|item| code(item).to_string()).collect(),
        };
        if rows.insert(code(name).to_string(), (place.clone(), may_use)).is_some() {
            problems.push(Problem::error(place, format!("{name} has two rows")));
        }
    }
    let crates: BTreeSet<&str> = tree.folders("crates").into_iter().collect();
    for (name, (place, may_use)) in &rows {
        if !crates.contains(name.as_str()) {
            problems.push(Problem::error(place, format!("there is no crate {name}")));
        }
        for used in may_use.iter().filter(|used| *used != "all" && !rows.contains_key(*used)) {
            problems.push(Problem::error(place, format!("{name} may use {used}, which has no row")));
        }
    }
    for (path, manifest) in members(tree, &mut problems) {
        let folder = path.rsplit('/').nth(1).unwrap_or_default();
        let name = manifest.get("package").and_then(|p| p.get("name")).and_then(Value::as_str).unwrap_or_default();
        if name != folder {
            problems.push(Problem::error(&path, format!("the crate is called {name} and its folder {folder}")));
        }
        let row = rows.get(folder);
        if row.is_none() && crates.contains(folder) {
            problems.push(Problem::error(&path, format!("{folder} has no row in {ARCHITECTURE}, {CRATES_HEADING}")));
            continue;
        }
        let allowed = allowed(folder, &rows);
        for used in dependencies(&manifest, &["dependencies", "build-dependencies"]).into_keys() {
            if crates.contains(used.as_str()) && !allowed.contains(&used) {
                problems.push(Problem::error(&path, format!("{folder} may not use {used} ({ARCHITECTURE}, {CRATES_HEADING})")));
            }
        }
    }
    problems
}

type Rows = BTreeMap<String, (String, BTreeSet<String>)>;

/// Everything a crate may use, directly or through what it may use. A crate without a row, as xtask, may use none.
fn allowed(name: &str, rows: &Rows) -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    let mut pending = vec![name.to_string()];
    while let Some(next) = pending.pop() {
        let Some((_, may_use)) = rows.get(&next) else { continue };
        if may_use.contains("all") {
            return rows.keys().cloned().collect();
        }
        pending.extend(may_use.iter().filter(|used| allowed.insert((*used).clone())).cloned());
    }
    allowed
}

/// Every crate says what it is and takes the workspace's lints.
pub fn descriptions_and_lints(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, manifest) in members(tree, &mut problems) {
        let description = manifest.get("package").and_then(|package| package.get("description"));
        let described = match description {
            Some(Value::String(text)) => !text.trim().is_empty(),
            Some(inherited) => is_workspace(inherited),
            None => false,
        };
        if !described {
            problems.push(Problem::error(&path, "[package] has no description"));
        }
        if !manifest.get("lints").is_some_and(is_workspace) {
            problems.push(Problem::error(&path, "[lints] is not `workspace = true`"));
        }
    }
    problems
}

/// Versions stand in the root manifest only, each pinned with `=`, and each is used.
pub fn pinned_dependencies(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    let declared = workspace_dependencies(tree, &mut problems);
    let mut used = BTreeSet::new();
    for (path, manifest) in members(tree, &mut problems) {
        for (name, value) in dependencies(&manifest, &["dependencies", "build-dependencies", "dev-dependencies"]) {
            if !is_workspace(&value) {
                problems.push(Problem::error(&path, format!("{name} is not taken from the workspace (`{name}.workspace = true`)")));
            }
            used.insert(name);
        }
    }
    for (name, value) in &declared {
        let version = value.as_str().or_else(|| value.get("version").and_then(Value::as_str));
        let internal = value.get("path").is_some();
        if !internal && !version.is_some_and(|version| version.starts_with('=')) {
            problems.push(Problem::error("Cargo.toml", format!("{name} is not pinned: write its version as \"=X.Y.Z\"")));
        }
        if !used.contains(name) {
            problems.push(Problem::error("Cargo.toml", format!("{name} is declared and no crate uses it")));
        }
    }
    problems
}

/// ARCHITECTURE.md gives the reason for each external dependency, and for no other.
pub fn dependency_reasons(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut reasons = BTreeSet::new();
    let declared = workspace_dependencies(tree, &mut problems);
    let external: BTreeSet<&String> = declared.iter().filter(|(_, value)| value.get("path").is_none()).map(|(name, _)| name).collect();
    for (line, cells) in table(tree, DEPENDENCIES_HEADING, &mut problems) {
        let place = format!("{ARCHITECTURE}:{line}");
        // Crates of one project that serve one purpose share a row.
        for name in cells[0].split(',').map(|name| code(name).to_string()) {
            if !external.contains(&name) {
                problems.push(Problem::error(&place, format!("{name} is not in [workspace.dependencies]")));
            }
            if cells.get(1).is_none_or(|reason| reason.is_empty()) {
                problems.push(Problem::error(&place, format!("{name} has no reason")));
            }
            if !reasons.insert(name.clone()) {
                problems.push(Problem::error(&place, format!("{name} has two rows")));
            }
        }
    }
    for name in external.into_iter().filter(|name| !reasons.contains(*name)) {
        let message = format!("{name} has no reason in {ARCHITECTURE}, {DEPENDENCIES_HEADING}");
        problems.push(Problem::error("Cargo.toml", message));
    }
    problems
}

/// Rows of the first table under a heading of ARCHITECTURE.md, with their line numbers, without its head.
fn table(tree: &Tree, heading: &str, problems: &mut Vec<Problem>) -> Vec<(usize, Vec<String>)> {
    let text = tree.text(ARCHITECTURE).unwrap_or_default();
    let rows: Vec<(usize, Vec<String>)> = numbered(text)
        .skip_while(|(_, line)| line.trim_end() != heading)
        .skip(1)
        .take_while(|(_, line)| !line.starts_with("## "))
        .skip_while(|(_, line)| !line.starts_with('|'))
        .take_while(|(_, line)| line.starts_with('|'))
        .skip(2)
        .map(|(number, line)| {
            let cells = line.trim().trim_matches('|').split('|');
            (number, cells.map(|cell| cell.trim().to_string()).collect())
        })
        .collect();
    if rows.is_empty() {
        problems.push(Problem::error(ARCHITECTURE, format!("there is no table under \"{heading}\"")));
    }
    rows
}

/// A name without the backticks around it.
fn code(cell: &str) -> &str {
    cell.trim().trim_matches('`')
}

/// Manifests of the crates and of xtask, by path. A manifest that cannot be read is a problem.
fn members(tree: &Tree, problems: &mut Vec<Problem>) -> Vec<(String, Table)> {
    let paths: Vec<&str> = tree
        .files()
        .map(|(path, _)| path)
        .filter(|path| {
            let parts: Vec<&str> = path.split('/').collect();
            matches!(parts[..], ["crates", _, "Cargo.toml"] | ["xtask", "Cargo.toml"])
        })
        .collect();
    paths.into_iter().filter_map(|path| Some((path.to_string(), manifest(tree, path, problems)?))).collect()
}

fn manifest(tree: &Tree, path: &str, problems: &mut Vec<Problem>) -> Option<Table> {
    match tree.text(path).unwrap_or_default().parse::<Table>() {
        Ok(manifest) => Some(manifest),
        Err(e) => {
            problems.push(Problem::error(path, format!("cannot be read: {}", e.message())));
            None
        }
    }
}

fn workspace_dependencies(tree: &Tree, problems: &mut Vec<Problem>) -> Table {
    let root = manifest(tree, "Cargo.toml", problems).unwrap_or_default();
    let dependencies = root.get("workspace").and_then(|workspace| workspace.get("dependencies"));
    dependencies.and_then(Value::as_table).cloned().unwrap_or_default()
}

/// Entries of the named sections, also of those under `[target.….]`.
fn dependencies(manifest: &Table, sections: &[&str]) -> BTreeMap<String, Value> {
    let targets = manifest.get("target").and_then(Value::as_table);
    let targets = targets.into_iter().flat_map(|targets| targets.values().filter_map(Value::as_table));
    std::iter::once(manifest)
        .chain(targets)
        .flat_map(|table| sections.iter().filter_map(|section| table.get(*section)?.as_table()))
        .flat_map(|section| section.iter().map(|(name, value)| (name.clone(), value.clone())))
        .collect()
}

fn is_workspace(value: &Value) -> bool {
    value.get("workspace").and_then(Value::as_bool) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
# A
## Crates
Words.
| crate | its one job | may use |
|---|---|---|
| a | one | – |
| b | two | a |
| c | three | b |
| d | four | all |

## Dependencies
| crate | reason |
|---|---|
| `x` | because |
| `y`, `z` | because |
";
    const ROOT: &str =
        "[workspace.dependencies]\na = { path = \"crates/a\" }\nx = \"=1.0.0\"\ny = { version = \"=2.0.0\" }\nz = \"=3.0.0\"\n";

    fn member(name: &str, rest: &str) -> String {
        format!("[package]\nname = \"{name}\"\ndescription = \"d\"\n[lints]\nworkspace = true\n{rest}")
    }

    /// Four crates and the documents that describe them, with some files replaced.
    fn tree(replaced: &[(&str, &str)]) -> Tree {
        let mut files = BTreeMap::from([
            ("ARCHITECTURE.md", DOCUMENT.to_string()),
            ("Cargo.toml", ROOT.to_string()),
            ("crates/a/Cargo.toml", member("a", "[dependencies]\nx.workspace = true\n")),
            (
                "crates/b/Cargo.toml",
                member("b", "[dependencies]\na.workspace = true\n[target.'cfg(unix)'.dependencies]\ny.workspace = true\n"),
            ),
            (
                "crates/c/Cargo.toml",
                member("c", "[dependencies]\nb.workspace = true\na.workspace = true\n[dev-dependencies]\nd.workspace = true\n"),
            ),
            ("crates/d/Cargo.toml", member("d", "[dependencies]\na = { workspace = true, optional = true }\n")),
            ("xtask/Cargo.toml", member("xtask", "[dependencies]\nz.workspace = true\n")),
        ]);
        files.extend(replaced.iter().map(|(path, text)| (*path, text.to_string())));
        Tree::of(&files.into_iter().collect::<Vec<_>>())
    }

    #[track_caller]
    fn one(problems: Vec<Problem>, words: &[&str]) {
        let text: Vec<String> = problems.iter().map(Problem::to_string).collect();
        assert_eq!(text.len(), 1, "{text:#?}");
        for word in words {
            assert!(text[0].contains(word), "{word} is not in {text:?}");
        }
    }

    #[test]
    fn a_repository_as_described_passes_every_check() {
        let tree = tree(&[]);
        for check in [internal_dependencies, descriptions_and_lints, pinned_dependencies, dependency_reasons] {
            assert_eq!(check(&tree), []);
        }
    }

    #[test]
    fn a_dependency_that_the_table_does_not_allow_is_found() {
        let upward = member("a", "[dependencies]\nb.workspace = true\n");
        one(internal_dependencies(&tree(&[("crates/a/Cargo.toml", &upward)])), &["crates/a", "a may not use b"]);
        let build = member("b", "[build-dependencies]\nc.workspace = true\n");
        one(internal_dependencies(&tree(&[("crates/b/Cargo.toml", &build)])), &["b may not use c"]);
        let target = member("a", "[target.'cfg(unix)'.dependencies]\nb.workspace = true\n");
        one(internal_dependencies(&tree(&[("crates/a/Cargo.toml", &target)])), &["a may not use b"]);
        let xtask = member("xtask", "[dependencies]\na.workspace = true\n");
        one(internal_dependencies(&tree(&[("xtask/Cargo.toml", &xtask)])), &["xtask may not use a"]);
    }

    #[test]
    fn crates_and_rows_must_match() {
        let without = DOCUMENT.replace("| d | four | all |\n", "");
        one(internal_dependencies(&tree(&[("ARCHITECTURE.md", &without)])), &["d has no row"]);
        let surplus = DOCUMENT.replace("| d |", "| e | five | – |\n| d |");
        one(internal_dependencies(&tree(&[("ARCHITECTURE.md", &surplus)])), &["no crate e", "ARCHITECTURE.md:9"]);
        let dangling = DOCUMENT.replace("| c | three | b |", "| c | three | b, q |");
        one(internal_dependencies(&tree(&[("ARCHITECTURE.md", &dangling)])), &["c may use q"]);
        let twice = DOCUMENT.replace("| d |", "| a | again | – |\n| d |");
        one(internal_dependencies(&tree(&[("ARCHITECTURE.md", &twice)])), &["a has two rows"]);
        let renamed = member("bb", "");
        one(internal_dependencies(&tree(&[("crates/b/Cargo.toml", &renamed)])), &["called bb", "folder b"]);
    }

    #[test]
    fn a_crate_without_description_or_lints_is_found() {
        let bare = "[package]\nname = \"a\"\n[lints]\nworkspace = true\n";
        one(descriptions_and_lints(&tree(&[("crates/a/Cargo.toml", bare)])), &["no description"]);
        let lax = "[package]\nname = \"a\"\ndescription.workspace = true\n";
        one(descriptions_and_lints(&tree(&[("crates/a/Cargo.toml", lax)])), &["[lints]"]);
        one(descriptions_and_lints(&tree(&[("crates/a/Cargo.toml", "[package")])), &["cannot be read"]);
    }

    #[test]
    fn loose_local_and_unused_versions_are_found() {
        let loose = ROOT.replace("\"=1.0.0\"", "\"1.0.0\"");
        one(pinned_dependencies(&tree(&[("Cargo.toml", &loose)])), &["x is not pinned"]);
        let table = ROOT.replace("\"=2.0.0\"", "\"^2.0.0\"");
        one(pinned_dependencies(&tree(&[("Cargo.toml", &table)])), &["y is not pinned"]);
        let local = member("a", "[dependencies]\nx = \"=1.0.0\"\n");
        one(pinned_dependencies(&tree(&[("crates/a/Cargo.toml", &local)])), &["crates/a", "x is not taken"]);
        let unused = format!("{ROOT}w = \"=1.0.0\"\n");
        one(pinned_dependencies(&tree(&[("Cargo.toml", &unused)])), &["w is declared and no crate uses it"]);
    }

    #[test]
    fn a_dependency_without_a_reason_and_a_reason_without_a_dependency_are_found() {
        let missing = DOCUMENT.replace("| `x` | because |\n", "");
        one(dependency_reasons(&tree(&[("ARCHITECTURE.md", &missing)])), &["x has no reason"]);
        let empty = DOCUMENT.replace("| `x` | because |", "| `x` | |");
        one(dependency_reasons(&tree(&[("ARCHITECTURE.md", &empty)])), &["x has no reason", ":14"]);
        let surplus = format!("{DOCUMENT}| `w` | because |\n");
        one(dependency_reasons(&tree(&[("ARCHITECTURE.md", &surplus)])), &["w is not in"]);
        let twice = format!("{DOCUMENT}| `x` | because |\n");
        one(dependency_reasons(&tree(&[("ARCHITECTURE.md", &twice)])), &["x has two rows"]);
    }

    #[test]
    fn a_document_without_the_tables_is_found() {
        let problems = internal_dependencies(&tree(&[("ARCHITECTURE.md", "# A\n")]));
        assert!(problems[0].to_string().contains("no table under \"## Crates\""));
        let problems = dependency_reasons(&tree(&[("ARCHITECTURE.md", "# A\n")]));
        assert!(problems[0].to_string().contains("no table under \"## Dependencies\""));
    }
}
