//! Checks of file contents, names and sizes.

use super::{Problem, numbered};
use crate::tree::Tree;

/// A Rust file aims at no more lines than this, and
const LINES_AIM: usize = 600;
/// fails above this, unless it is listed here with the reason.
const LINES_LIMIT: usize = 700;
const LONG_FILES: &[(&str, &str)] = &[];

/// Names that say nothing about what is inside.
const FORBIDDEN_NAMES: [&str; 6] = ["utils", "util", "common", "misc", "helpers", "helper"];

/// Where the keyword `unsafe` may be written, and why nowhere else: see ARCHITECTURE.md.
const UNSAFE_PLACES: [&str; 2] = ["crates/ernie-kernels/src/arch/", "crates/ernie-checkpoint/src/mapping.rs"];

/// Bytes of one file, apart from models: fixtures are small, and history never forgets.
const FILE_LIMIT: usize = 1 << 20;
/// Bytes of one folder under `models/`.
const MODEL_LIMIT: usize = 12_000_000;

/// Long Rust files: a warning above the aim, an error above the limit, an error for an exemption no longer needed.
pub fn file_lengths(tree: &Tree) -> Vec<Problem> {
    file_lengths_except(tree, LONG_FILES)
}

fn file_lengths_except(tree: &Tree, exempt: &[(&str, &str)]) -> Vec<Problem> {
    let lines = |path: &str| tree.text(path).map_or(0, |text| text.lines().count());
    let mut problems = Vec::new();
    for (path, text) in rust_files(tree) {
        let count = text.lines().count();
        let listed = exempt.iter().any(|(listed, _)| *listed == path);
        if count > LINES_LIMIT && !listed {
            problems.push(Problem::error(path, format!("{count} lines; the limit is {LINES_LIMIT}: split it at a boundary")));
        } else if count > LINES_AIM && !listed {
            problems.push(Problem::warning(path, format!("{count} lines; the aim is {LINES_AIM}")));
        }
    }
    for (path, reason) in exempt {
        if lines(path) <= LINES_LIMIT {
            problems.push(Problem::error(*path, format!("no longer needs its exemption from the length limit ({reason})")));
        }
    }
    problems
}

/// Files, folders and inline modules with a name that says nothing.
pub fn forbidden_names(tree: &Tree) -> Vec<Problem> {
    let advice = "names what is inside by no word; call it after what it does";
    let mut problems = Vec::new();
    for (path, _) in tree.files() {
        let says_nothing = |part: &str| {
            let stem = part.split('.').next().unwrap_or(part);
            FORBIDDEN_NAMES.contains(&stem)
        };
        if path.split('/').any(says_nothing) {
            problems.push(Problem::error(path, advice));
        }
    }
    for (path, text) in rust_files(tree) {
        let code = code_only(text);
        for (number, line) in numbered(&code) {
            let words: Vec<&str> = words(line).collect();
            if words.windows(2).any(|pair| pair[0] == "mod" && FORBIDDEN_NAMES.contains(&pair[1])) {
                problems.push(Problem::error(format!("{path}:{number}"), advice));
            }
        }
    }
    problems
}

/// Absolute paths of some machine in what people read or run. Data files may hold anything.
pub fn machine_paths(tree: &Tree) -> Vec<Problem> {
    // Written in parts, or this file would find itself.
    let places = ["work", "home", "root", "tmp", "Users", "mnt"].map(|name| format!("/{name}"));
    lines_with(tree, "an absolute path of some machine", |line| {
        places.iter().find(|place| {
            line.match_indices(place.as_str()).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let after = line[at + place.len()..].chars().next();
                before.is_none_or(|c| !(is_word(c) || ".-~/})]>*".contains(c))) && after.is_none_or(|c| !(is_word(c) || c == '-'))
            })
        })
    })
}

/// Names of package registries' hosts: which mirror a machine uses is that machine's business.
pub fn registry_hosts(tree: &Tree) -> Vec<Problem> {
    let hosts: Vec<String> = [
        ["index.crates", "io"],
        ["static.crates", "io"],
        ["pypi", "org"],
        ["files.pythonhosted", "org"],
        ["registry.npmjs", "org"],
        ["deb.debian", "org"],
        ["security.debian", "org"],
        ["archive.ubuntu", "com"],
        ["proxy.golang", "org"],
    ]
    .iter()
    .map(|parts| parts.join("."))
    .collect();
    lines_with(tree, "the host of a package registry", |line| hosts.iter().find(|host| line.contains(host.as_str())))
}

fn lines_with<'a>(tree: &Tree, what: &str, found: impl Fn(&str) -> Option<&'a String>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in tree.texts().filter(|(path, _)| is_written_by_hand(path)) {
        for (number, line) in numbered(text) {
            if let Some(word) = found(line) {
                problems.push(Problem::error(format!("{path}:{number}"), format!("{what}: {word}")));
            }
        }
    }
    problems
}

/// Programs, configuration and documents, as opposed to data and generated files.
fn is_written_by_hand(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    match name.rsplit_once('.') {
        Some((stem, extension)) => {
            stem.is_empty() || ["rs", "toml", "md", "py", "sh", "yml", "yaml", "html", "css", "js", "jinja", "svg"].contains(&extension)
        }
        None => name != "LICENSE",
    }
}

/// `unsafe`, and the attribute that lifts its lint, outside the places made for them.
pub fn unsafe_places(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in rust_files(tree) {
        let allowed = UNSAFE_PLACES.iter().any(|place| path == *place || (place.ends_with('/') && path.starts_with(place)));
        if allowed {
            continue;
        }
        let code = code_only(text);
        for (number, line) in numbered(&code) {
            let words: Vec<&str> = words(line).collect();
            let lifts = words.contains(&"unsafe_code") && (words.contains(&"allow") || words.contains(&"expect"));
            if words.contains(&"unsafe") || lifts {
                let message = format!("unsafe code belongs into {}", UNSAFE_PLACES.join(" or "));
                problems.push(Problem::error(format!("{path}:{number}"), message));
            }
        }
    }
    problems
}

/// Large files: each is bounded, and each folder under `models/` as a whole.
pub fn file_sizes(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, contents) in tree.files().filter(|(path, _)| !path.starts_with("models/")) {
        if contents.len() > FILE_LIMIT {
            let message = format!("{} bytes; the limit is {FILE_LIMIT}: make it at build or test time", contents.len());
            problems.push(Problem::error(path, message));
        }
    }
    for model in tree.folders("models") {
        let folder = format!("models/{model}/");
        let inside = tree.files().filter(|(path, _)| path.starts_with(&folder));
        let total: usize = inside.map(|(_, contents)| contents.len()).sum();
        if total > MODEL_LIMIT {
            problems.push(Problem::error(folder, format!("{total} bytes; the limit of a model is {MODEL_LIMIT}")));
        }
    }
    problems
}

fn rust_files(tree: &Tree) -> impl Iterator<Item = (&str, &str)> {
    tree.texts().filter(|(path, _)| path.ends_with(".rs"))
}

/// Identifiers and numbers of a line.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// Rust source with comments and the insides of literals blanked; line breaks stay.
fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match literal_or_comment(&chars, at) {
            Some(end) => end.min(chars.len()),
            None => {
                code.push(chars[at]);
                at += 1;
                continue;
            }
        };
        code.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
        at = end;
    }
    code
}

/// Where the comment, string or character that starts at `at` ends; `None` when none starts there.
fn literal_or_comment(chars: &[char], at: usize) -> Option<usize> {
    let get = |i: usize| chars.get(i).copied();
    let find = |from: usize, wanted: &dyn Fn(usize) -> bool| (from..chars.len()).find(|&i| wanted(i)).unwrap_or(chars.len());
    match (chars[at], get(at + 1)) {
        ('/', Some('/')) => Some(find(at, &|i| chars[i] == '\n')),
        ('/', Some('*')) => {
            let (mut depth, mut i) = (1, at + 2);
            while i < chars.len() && depth > 0 {
                match (chars[i], get(i + 1)) {
                    ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
                    ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
            }
            Some(i)
        }
        ('"', _) => {
            let mut i = at + 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            Some(i + 1)
        }
        ('r', Some('"' | '#')) if at == 0 || !is_word(chars[at - 1]) || chars[at - 1] == 'b' => {
            let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
            let open = at + 1 + hashes;
            if get(open) != Some('"') {
                return None; // a raw identifier
            }
            let closes = |i: usize| chars[i] == '"' && (1..=hashes).all(|n| get(i + n) == Some('#'));
            Some(find(open + 1, &closes) + 1 + hashes)
        }
        // A character, not a lifetime: an escape, or one character and the closing quote.
        ('\'', Some('\\')) => Some(find(at + 3, &|i| chars[i] == '\'') + 1),
        ('\'', Some(_)) if get(at + 2) == Some('\'') => Some(at + 3),
        _ => None,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn places(problems: &[Problem]) -> Vec<&str> {
        problems.iter().map(|problem| problem.place.as_str()).collect()
    }

    #[test]
    fn long_files_warn_then_fail_unless_listed_and_listed_ones_must_be_long() {
        let tree = Tree::of(&[
            ("a.rs", "x\n".repeat(600)),
            ("b.rs", "x\n".repeat(601)),
            ("c.rs", "x\n".repeat(701)),
            ("c.json", "x\n".repeat(701)),
        ]);
        let problems = file_lengths_except(&tree, &[]);
        assert_eq!(places(&problems), ["b.rs", "c.rs"]);
        assert_eq!([problems[0].severity, problems[1].severity], [Severity::Warning, Severity::Error]);
        assert_eq!(places(&file_lengths_except(&tree, &[("c.rs", "a table")])), ["b.rs"]);
        assert_eq!(places(&file_lengths_except(&tree, &[("c.rs", "a table"), ("a.rs", "once")])), ["b.rs", "a.rs"]);
    }

    #[test]
    fn names_that_say_nothing_are_found_as_files_folders_and_modules() {
        let tree = Tree::of(&[
            ("crates/a/src/utils.rs", ""),
            ("crates/a/tests/common/mod.rs", ""),
            ("tools/helpers.py", ""),
            ("crates/a/src/lib.rs", "//! mod utils\npub mod common_denominator;\nmod misc {\n}\n"),
            ("docs/common-denominator.md", ""),
        ]);
        assert_eq!(
            places(&forbidden_names(&tree)),
            ["crates/a/src/utils.rs", "crates/a/tests/common/mod.rs", "tools/helpers.py", "crates/a/src/lib.rs:3"]
        );
    }

    #[test]
    fn machine_paths_are_found_in_text_but_not_in_data_links_or_relative_paths() {
        let path = |name: &str| format!("see /{name}/x\n");
        let tree = Tree::of(&[
            ("a.md", path("home")),
            ("b.rs", format!("\ncd /{}", "tmp")),
            (".ci/run", path("work")),
            ("tokens.json", path("home")),
            ("c.md", "a/home/b, ../work/x, $ROOT/tmp/y, https://example.com/home/z, ${X}/tmp/, /rooted".to_string()),
        ]);
        assert_eq!(places(&machine_paths(&tree)), [".ci/run:1", "a.md:1", "b.rs:2"]);
    }

    #[test]
    fn registry_hosts_are_found_outside_the_lock_file() {
        let host = format!("https://static.{}.io/crates", "crates");
        let tree = Tree::of(&[("a.toml", &host), ("Cargo.lock", &host), ("b.md", &"crates.io".to_string())]);
        assert_eq!(places(&registry_hosts(&tree)), ["a.toml:1"]);
    }

    #[test]
    fn unsafe_code_is_found_outside_its_places_only() {
        let block = "fn f() {\n    unsafe { g() }\n}\n";
        let tree = Tree::of(&[
            ("crates/ernie-kernels/src/arch/dot.rs", block),
            ("crates/ernie-checkpoint/src/mapping.rs", block),
            ("crates/ernie-kernels/src/architecture.rs", block),
            ("crates/b/src/lib.rs", "#![allow(unsafe_code)]\n"),
            (
                "crates/c/src/lib.rs",
                "// unsafe\n/* /* unsafe */ unsafe */ const A: &str = \"unsafe \\\" unsafe\";\nconst B: &str = r#\"\" unsafe\"#; let c = '\"'; // unsafe\n#![deny(unsafe_code)]\n",
            ),
            ("crates/d/src/lib.rs", "let a: &'static str = \"\"; let q = '\\''; unsafe {}\n"),
        ]);
        assert_eq!(
            places(&unsafe_places(&tree)),
            ["crates/b/src/lib.rs:1", "crates/d/src/lib.rs:1", "crates/ernie-kernels/src/architecture.rs:2"]
        );
    }

    #[test]
    fn blanking_keeps_lines_and_code() {
        let source = "let a = \"x\ny\"; // z\nr#fn(b\"q\", br\"w\", '\\n', 'a', &'a b)";
        let code = code_only(source);
        assert_eq!(code.lines().count(), source.lines().count());
        assert_eq!(words(&code).collect::<Vec<_>>(), ["let", "a", "r", "fn", "b", "b", "a", "b"]);
        assert_eq!(code_only("\"unclosed"), " ".repeat(9));
    }

    #[test]
    fn large_files_and_models_are_found() {
        let tree = Tree::of(&[
            ("a.bin", vec![0; FILE_LIMIT]),
            ("b.bin", vec![0; FILE_LIMIT + 1]),
            ("models/nano/model.safetensors", vec![0; MODEL_LIMIT]),
            ("models/wide/config.json", vec![0; 1]),
            ("models/wide/model.safetensors", vec![0; MODEL_LIMIT]),
        ]);
        assert_eq!(places(&file_sizes(&tree)), ["b.bin", "models/wide/"]);
    }
}
