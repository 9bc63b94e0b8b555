//! Checks of the documents: the trees in the READMEs and the links everywhere.

use std::collections::BTreeSet;

use super::{Problem, numbered};
use crate::tree::Tree;

/// First line of the block that shows the workspace.
const TREE_ROOT: &str = "ernie-rs/";
const READMES: [&str; 2] = ["README.md", "README.zh.md"];

/// The READMEs show every folder at the root and every crate, and nothing that is not there.
///
/// The block starts with a line `ernie-rs/`; each further line is a path from the root, two spaces, and what it is.
/// Folders whose names start with a dot need not be shown.
pub fn readme_trees(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    let crates = tree.folders("crates").into_iter().map(|name| format!("crates/{name}"));
    let folders = tree.folders("").into_iter().filter(|name| !name.starts_with('.') && *name != "crates");
    let wanted: BTreeSet<String> = crates.chain(folders.map(str::to_string)).collect();
    for readme in READMES {
        let text = tree.text(readme).unwrap_or_default();
        let block: Vec<(usize, &str)> = numbered(text)
            .skip_while(|(_, line)| line.trim() != TREE_ROOT)
            .skip(1)
            .take_while(|(_, line)| !line.starts_with("```"))
            .collect();
        if block.is_empty() {
            problems.push(Problem::error(readme, format!("shows no workspace: no block starts with {TREE_ROOT}")));
            continue;
        }
        let mut shown = BTreeSet::new();
        for (number, line) in block {
            let (path, description) = line.trim().split_once("  ").unwrap_or((line.trim(), ""));
            let path = path.trim_end_matches('/');
            let place = format!("{readme}:{number}");
            if !tree.contains(path) {
                problems.push(Problem::error(&place, format!("{path} is not in the repository")));
            } else if description.trim().is_empty() {
                problems.push(Problem::error(&place, format!("{path} has no description")));
            }
            shown.insert(path.to_string());
        }
        for path in wanted.difference(&shown) {
            problems.push(Problem::error(readme, format!("does not show {path}")));
        }
    }
    problems
}

/// Relative links of Markdown files lead to a file or folder of the repository, and to a heading where they name one.
pub fn links(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (path, text) in tree.texts().filter(|(path, _)| path.ends_with(".md")) {
        for (number, link) in relative_links(text) {
            if let Err(reason) = follow(tree, path, &link) {
                problems.push(Problem::error(format!("{path}:{number}"), format!("link to {link}: {reason}")));
            }
        }
    }
    problems
}

fn follow(tree: &Tree, from: &str, link: &str) -> Result<(), String> {
    let (target, anchor) = link.split_once('#').unwrap_or((link, ""));
    if target.starts_with('/') {
        return Err("it is absolute; write it relative to the file".to_string());
    }
    let target = if target.is_empty() { from.to_string() } else { resolve(from, target)? };
    if !tree.contains(&target) {
        return Err(format!("{target} is not in the repository"));
    }
    if anchor.is_empty() || !target.ends_with(".md") {
        return Ok(());
    }
    let text = tree.text(&target).unwrap_or_default();
    let found = outside_code(text).any(|(_, line)| line.starts_with('#') && slug(line.trim_start_matches('#')) == anchor);
    if found { Ok(()) } else { Err(format!("{target} has no heading #{anchor}")) }
}

/// `target` as seen from the folder of `from`, as a path from the root.
fn resolve(from: &str, target: &str) -> Result<String, String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop().ok_or("it leads out of the repository")?),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

/// Links `[…](target)`, images, and definitions `[…]: target` that name no scheme, outside code.
fn relative_links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (number, line) in outside_code(text) {
        // Every second piece between backticks is code.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        let inline = prose.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
        let definition = prose.strip_prefix('[').and_then(|rest| rest.split_once("]: "));
        for link in inline.chain(definition.map(|(_, target)| target.trim())) {
            let link = link.trim_matches(['<', '>']);
            let scheme = link.split(['/', '#']).next().is_some_and(|start| start.contains(':'));
            if !scheme {
                links.push((number, link.to_string()));
            }
        }
    }
    links
}

/// Lines outside fenced code blocks.
fn outside_code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut inside = false;
    numbered(text).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    })
}

/// The anchor that GitHub gives a heading: lower case, spaces to hyphens, punctuation dropped.
fn slug(heading: &str) -> String {
    heading
        .trim()
        .to_lowercase()
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(problems: Vec<Problem>) -> Vec<String> {
        problems.iter().map(Problem::to_string).collect()
    }

    const README: &str = "\
# X
```text
ernie-rs/
crates/a/  the first
docs/      words
run.sh     a script
```
";

    fn readme_problems(english: &str, chinese: &str) -> Vec<String> {
        messages(readme_trees(&Tree::of(&[
            ("README.md", english),
            ("README.zh.md", chinese),
            ("crates/a/Cargo.toml", ""),
            ("docs/x.md", ""),
            (".ci/run", ""),
            ("run.sh", ""),
        ])))
    }

    #[test]
    fn a_tree_that_shows_what_is_there_passes() {
        assert_eq!(readme_problems(README, README), Vec::<String>::new());
    }

    #[test]
    fn a_tree_that_omits_invents_or_leaves_unexplained_is_found() {
        let omits = README.replace("docs/      words\n", "");
        assert_eq!(readme_problems(&omits, README), ["error: README.md: does not show docs"]);
        let invents = README.replace("run.sh ", "gone.sh ");
        assert_eq!(readme_problems(README, &invents), ["error: README.zh.md:6: gone.sh is not in the repository"]);
        let mute = README.replace("crates/a/  the first", "crates/a/");
        assert_eq!(readme_problems(&mute, README), ["error: README.md:4: crates/a has no description"]);
        assert!(readme_problems("# X\n", README)[0].contains("shows no workspace"));
    }

    #[test]
    fn links_that_lead_somewhere_pass() {
        let text = "[a](docs/b.md) [c](docs/) ![d](./e.svg \"title\") [f](docs/b.md#two-words-二) [g](#here)\n\
            [h](https://example.com/x) [i](mailto:a@b.c) `[j](gone.md)`\n\
            ```\n[k](gone.md)\n```\n[l]: docs/b.md\n# Here\n";
        let tree = Tree::of(&[("a.md", text), ("docs/b.md", "## Two words: 二\n[up](../a.md)\n"), ("e.svg", "")]);
        assert_eq!(messages(links(&tree)), Vec::<String>::new());
    }

    #[test]
    fn links_that_lead_nowhere_are_found_with_their_line() {
        let text = "[a](gone.md)\n\n[b](docs/b.md#none) and [c](../out.md)\n[d](/a.md)\n[e]: gone.svg\n";
        let tree = Tree::of(&[("a.md", text), ("docs/b.md", "```\n# none\n```\n")]);
        let found = messages(links(&tree));
        let wanted = [
            ("a.md:1", "gone.md is not in the repository"),
            ("a.md:3", "docs/b.md has no heading #none"),
            ("a.md:3", "leads out of the repository"),
            ("a.md:4", "absolute"),
            ("a.md:5", "gone.svg is not in the repository"),
        ];
        assert_eq!(found.len(), wanted.len(), "{found:#?}");
        for (message, (place, reason)) in found.iter().zip(wanted) {
            assert!(message.contains(place) && message.contains(reason), "{message}");
        }
    }
}
