//! The repository's files as the checks see them: those git tracks, and new ones it does not ignore.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Paths, relative to the root with `/` between folders, and contents.
pub struct Tree {
    files: BTreeMap<String, Vec<u8>>,
}

impl Tree {
    /// The files of the git checkout at `root`. A tracked file that was deleted and not yet committed is left out.
    pub fn of_checkout(root: &Path) -> Result<Self, String> {
        let output = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .map_err(|e| format!("cannot run git to list the files: {e}"))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_string();
            return Err(format!("git cannot list the files of {}: {reason}", root.display()));
        }
        let mut files = BTreeMap::new();
        for path in output.stdout.split(|&b| b == 0).filter(|path| !path.is_empty()) {
            let path = String::from_utf8(path.to_vec()).map_err(|e| format!("a file name is not UTF-8: {e}"))?;
            match std::fs::read(root.join(&path)) {
                Ok(contents) => drop(files.insert(path, contents)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(format!("cannot read {path}: {e}")),
            }
        }
        Ok(Self { files })
    }

    /// A made-up repository.
    #[cfg(test)]
    pub fn of<C: AsRef<[u8]>>(files: &[(&str, C)]) -> Self {
        let files = files.iter().map(|(path, contents)| (path.to_string(), contents.as_ref().to_vec()));
        Self { files: files.collect() }
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Every path with its contents, in the order of the paths.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(path, contents)| (path.as_str(), contents.as_slice()))
    }

    /// The files that are UTF-8 text without NUL.
    pub fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files().filter_map(|(path, contents)| Some((path, as_text(contents)?)))
    }

    /// A text file's contents; `None` when it is missing or not text.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).and_then(|contents| as_text(contents))
    }

    /// Whether `path` is a file, or a folder that holds one. The empty path is the root.
    pub fn contains(&self, path: &str) -> bool {
        let folder = format!("{path}/");
        path.is_empty()
            || self.files.contains_key(path)
            || self.files.range(folder.clone()..).next().is_some_and(|(p, _)| p.starts_with(&folder))
    }

    /// Names of the folders directly inside `folder` (the root when empty), in order.
    pub fn folders(&self, folder: &str) -> Vec<&str> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let inside = self.files.keys().filter_map(|path| path.strip_prefix(&prefix));
        let mut names: Vec<&str> = inside.filter_map(|path| Some(path.split_once('/')?.0)).collect();
        names.dedup();
        names
    }
}

fn as_text(contents: &[u8]) -> Option<&str> {
    std::str::from_utf8(contents).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_files_are_found_and_others_are_not() {
        let tree = Tree::of(&[("a/b/c.rs", ""), ("a/d.rs", ""), ("ab/e", ""), ("f.md", "")]);
        for path in ["", "a", "a/b", "a/b/c.rs", "f.md"] {
            assert!(tree.contains(path), "{path}");
        }
        for path in ["b", "a/b/c", "f", "a/d.rs/x"] {
            assert!(!tree.contains(path), "{path}");
        }
        assert_eq!(tree.folders(""), ["a", "ab"]);
        assert_eq!(tree.folders("a"), ["b"]);
    }

    #[test]
    fn bytes_that_are_not_text_are_not_offered_as_text() {
        let tree = Tree::of(&[("text", &b"ok"[..]), ("nul", b"a\0b"), ("latin", b"\xe9")]);
        assert_eq!(tree.texts().collect::<Vec<_>>(), [("text", "ok")]);
        assert_eq!(tree.text("nul"), None);
    }
}
