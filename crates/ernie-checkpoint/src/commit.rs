//! Replacing several files of a directory together.
//!
//! New files lie ready under temporary names, durable. Then a journal that lists the renames is written; its rename
//! into place is the commit. Killed before it, the old model stands; killed after it, the next [`finish_and_lock`]
//! (every open and every save) carries out the rest. So no reader that goes through this crate sees a mix.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::atomic::{AtomicFile, TEMPORARY_PREFIX, atomic_write, sync_directory};
use crate::error::{Error, Result};
use crate::files::{self, ReadError};
use crate::shards::{INDEX, SINGLE};

/// Files beside config and weights that belong to a model, which go with them when it is copied.
pub(crate) const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer.model",
    "spm.model",
    "ernie_token_100k.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
];

const JOURNAL: &str = ".ernie-save.json";

/// Leftovers of killed saves are removed once they are older than any save takes.
const STALE_AFTER: Duration = Duration::from_secs(6 * 60 * 60);

/// Temporary and final names to rename, and names to remove, all plain names in the directory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Journal {
    rename: Vec<(String, String)>,
    remove: Vec<String>,
}

/// Files that are written but not yet in place.
#[derive(Debug)]
pub(crate) struct Staged {
    dir: PathBuf,
    files: Vec<(PathBuf, String)>,
}

impl Staged {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), files: Vec::new() }
    }

    /// A file to be staged under `name`, to be given back to [`Staged::add`] when written.
    pub(crate) fn create(&self, name: &str) -> Result<AtomicFile> {
        AtomicFile::create(&self.dir.join(name))
    }

    /// Makes a written file durable under its temporary name, to become `name`.
    pub(crate) fn add(&mut self, file: AtomicFile, name: String) -> Result<()> {
        let path = file.keep()?;
        self.files.push((path, name));
        Ok(())
    }

    /// Changes what the `index`-th added file will become.
    pub(crate) fn rename(&mut self, index: usize, name: String) {
        self.files[index].1 = name;
    }

    /// Puts all files in place and removes weights files of an older model that are not among them.
    pub(crate) fn commit(mut self) -> Result<()> {
        sync_directory(&self.dir)?;
        let lock = lock(&self.dir, true);
        finish(&self.dir)?;
        let is_new = |name: &String| self.files.iter().any(|(_, new)| new == name);
        let remove = names_in(&self.dir)?.into_iter().filter(|name| is_weights_file(name) && !is_new(name)).collect();
        let name_of = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let rename = self.files.iter().filter_map(|(path, name)| Some((name_of(path)?, name.clone()))).collect();
        let journal = Journal { rename, remove };
        let text = serde_json::to_vec(&journal).map_err(|e| Error::Json { file: self.dir.join(JOURNAL), reason: e.to_string() })?;
        atomic_write(&self.dir.join(JOURNAL), &text)?;
        self.files.clear(); // committed: from here on the journal owns them
        finish(&self.dir)?;
        drop(lock);
        remove_stale(&self.dir);
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for (path, _) in &self.files {
            // Best effort: what stays is recognised by its prefix and removed by a later save.
            let _ = fs::remove_file(path);
        }
    }
}

/// Finishes an interrupted save, if there is one, and keeps others from committing while the returned lock lives.
pub(crate) fn finish_and_lock(dir: &Path) -> Result<Option<File>> {
    let shared = lock(dir, false);
    if !dir.join(JOURNAL).exists() {
        return Ok(shared);
    }
    drop(shared);
    let exclusive = lock(dir, true);
    finish(dir)?;
    drop(exclusive);
    Ok(lock(dir, false))
}

/// Locks the directory itself; `None` where the file system or the system has no such locks. Then only readers that
/// open during the few renames of a commit are unprotected; crashes are covered by the journal either way.
fn lock(dir: &Path, exclusive: bool) -> Option<File> {
    // Opening a named pipe waits for a writer; what is no directory is refused when it is read.
    let handle = dir.is_dir().then(|| File::open(dir).ok())??;
    let locked = if exclusive { handle.lock() } else { handle.lock_shared() };
    locked.is_ok().then_some(handle)
}

/// Carries out the journal. Every step may have been done before, by a process that was killed.
fn finish(dir: &Path) -> Result<()> {
    let path = dir.join(JOURNAL);
    let text = match files::read(&path, files::MAX_TEXT_BYTES) {
        Err(ReadError::Io(e)) if e.kind() == ErrorKind::NotFound => return Ok(()),
        read => read.map_err(Error::reading(&path))?,
    };
    let interrupted = |reason: String| Error::InterruptedSave { file: path.clone(), reason };
    let journal: Journal = serde_json::from_slice(&text).map_err(|e| interrupted(e.to_string()))?;
    // The journal is a file like any other and may have been downloaded: it must not reach beyond model files.
    for (from, to) in &journal.rename {
        let plain = !from.contains(['/', '\\']) && from.starts_with(TEMPORARY_PREFIX);
        if !plain || !(is_weights_file(to) || to == "config.json" || COMPANIONS.contains(&to.as_str())) {
            return Err(interrupted(format!("it renames {from:?} to {to:?}, which is not a model file")));
        }
    }
    if let Some(name) = journal.remove.iter().find(|name| !is_weights_file(name)) {
        return Err(interrupted(format!("it removes {name:?}, which is not a weights file")));
    }
    let done = |result: std::io::Result<()>| match result {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(interrupted(e.to_string())),
        _ => Ok(()),
    };
    for (from, to) in &journal.rename {
        done(fs::rename(dir.join(from), dir.join(to)))?;
    }
    for name in &journal.remove {
        done(fs::remove_file(dir.join(name)))?;
    }
    sync_directory(dir)?;
    done(fs::remove_file(&path))?;
    sync_directory(dir)
}

/// `model.safetensors`, its index, or a shard of it: what a save may replace.
fn is_weights_file(name: &str) -> bool {
    let shard = name.starts_with("model-") && name.ends_with(".safetensors") && !name.contains(['/', '\\']);
    name == SINGLE || name == INDEX || shard
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(Error::io(dir, "list"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.collect())
}

/// Removes temporary files that a killed save left long ago; failing to is no error of this save.
fn remove_stale(dir: &Path) {
    let Ok(names) = names_in(dir) else { return };
    for path in names.iter().filter(|name| name.starts_with(TEMPORARY_PREFIX)).map(|name| dir.join(name)) {
        let modified = fs::metadata(&path).and_then(|metadata| metadata.modified());
        let age = modified.ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
        if age.is_some_and(|age| age > STALE_AFTER) {
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory as a process killed right after its commit leaves it, with the first `renamed` renames done.
    fn interrupted(renamed: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("config.json"), "old").unwrap();
        fs::write(path("model-00001-of-00002.safetensors"), "old").unwrap();
        fs::write(path(".ernie-tmp-a"), "new weights").unwrap();
        fs::write(path(".ernie-tmp-b"), "new config").unwrap();
        let rename = [(".ernie-tmp-a", "model.safetensors"), (".ernie-tmp-b", "config.json")];
        for (from, to) in &rename[..renamed] {
            fs::rename(path(from), path(to)).unwrap();
        }
        let rename = rename.map(|(from, to)| (from.to_owned(), to.to_owned())).to_vec();
        let journal = Journal { rename, remove: vec!["model-00001-of-00002.safetensors".into()] };
        fs::write(path(JOURNAL), serde_json::to_vec(&journal).unwrap()).unwrap();
        dir
    }

    #[test]
    fn a_committed_save_is_finished_wherever_it_was_killed() {
        for renamed in 0..=2 {
            let dir = interrupted(renamed);
            finish_and_lock(dir.path()).unwrap();
            let mut names = names_in(dir.path()).unwrap();
            names.sort();
            assert_eq!(names, ["config.json", "model.safetensors"]);
            assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), "new config");
        }
    }

    #[test]
    fn a_journal_that_reaches_beyond_model_files_is_refused() {
        for text in [
            r#"{"rename": [["../x", "config.json"]], "remove": []}"#,
            r#"{"rename": [[".ernie-tmp-/../../x", "config.json"]], "remove": []}"#,
            r#"{"rename": [[".ernie-tmp-a", "notes.txt"]], "remove": []}"#,
            r#"{"rename": [], "remove": ["../model-1.safetensors"]}"#,
            r#"{"rename": [], "remove": ["config.json"]}"#,
            "nonsense",
        ] {
            let dir = interrupted(0);
            fs::write(dir.path().join(JOURNAL), text).unwrap();
            let error = finish_and_lock(dir.path()).unwrap_err();
            assert!(matches!(error, Error::InterruptedSave { .. }), "{error}");
            assert!(error.to_string().contains(JOURNAL));
            assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), "old");
        }
    }

    #[test]
    fn before_the_commit_the_old_files_stand() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "old").unwrap();
        let mut staged = Staged::new(dir.path());
        let file = staged.create("config.json").unwrap();
        staged.add(file, "config.json".into()).unwrap();
        drop(staged);
        assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), "old");
        assert_eq!(names_in(dir.path()).unwrap().len(), 1);
    }
}
