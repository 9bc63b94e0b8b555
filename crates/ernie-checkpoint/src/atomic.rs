//! Files that are either the old one or the new one, whatever happens in between: write a temporary file in the same
//! directory, fsync it, rename it over the target, fsync the directory.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Prefix of temporary files, so that leftovers of a killed process can be recognised.
pub(crate) const TEMPORARY_PREFIX: &str = ".ernie-tmp-";

/// A file being written next to its target; it takes the target's name in [`AtomicFile::commit`]. Dropped before that,
/// it disappears and the target stays as it was.
#[derive(Debug)]
pub struct AtomicFile {
    temporary: BufWriter<NamedTempFile>,
    target: PathBuf,
}

impl AtomicFile {
    /// Begins a file that will be `target`; the directory must exist.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be written.
    pub fn create(target: &Path) -> Result<Self> {
        let temporary = tempfile::Builder::new()
            .prefix(TEMPORARY_PREFIX)
            .permissions_like_umask()
            .tempfile_in(directory_of(target))
            .map_err(Error::io(target, "create a temporary file for"))?;
        Ok(Self { temporary: BufWriter::with_capacity(1 << 20, temporary), target: target.to_owned() })
    }

    /// Makes the content durable, then gives it the target's name in one step.
    ///
    /// # Errors
    /// [`Error::Io`]; the target is then unchanged.
    pub fn commit(self) -> Result<()> {
        let target = self.target.clone();
        let file = self.synced()?;
        file.persist(&target).map_err(|e| Error::io(&target, "rename the temporary file to")(e.error))?;
        sync_directory(directory_of(&target))
    }

    /// Makes the content durable under its temporary name, for a caller that renames several files together.
    pub(crate) fn keep(self) -> Result<PathBuf> {
        let target = self.target.clone();
        let file = self.synced()?;
        let (_, path) = file.keep().map_err(|e| Error::io(&target, "keep the temporary file for")(e.error))?;
        Ok(path)
    }

    fn synced(self) -> Result<NamedTempFile> {
        let Self { temporary, target } = self;
        let file = temporary.into_inner().map_err(|e| Error::io(&target, "write")(e.into_error()))?;
        file.as_file().sync_all().map_err(Error::io(&target, "fsync"))?;
        Ok(file)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temporary.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temporary.flush()
    }
}

/// Replaces `path` by a file with these bytes: a reader sees the old content or the new, never part of either, also
/// after a crash.
///
/// # Errors
/// [`Error::Io`]; `path` is then unchanged.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::io(path, "write"))?;
    file.commit()
}

/// Makes renames and removals in `directory` durable. A no-op where directories cannot be opened as files (Windows).
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    if cfg!(unix) {
        let handle = File::open(directory).map_err(Error::io(directory, "open"))?;
        handle.sync_all().map_err(Error::io(directory, "fsync"))?;
    }
    Ok(())
}

fn directory_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Temporary files default to mode 0600; a model should be as readable as any other new file.
trait PermissionsLikeUmask {
    fn permissions_like_umask(&mut self) -> &mut Self;
}

impl PermissionsLikeUmask for tempfile::Builder<'_, '_> {
    #[cfg(unix)]
    fn permissions_like_umask(&mut self) -> &mut Self {
        use std::os::unix::fs::PermissionsExt;
        // The system applies the umask to these bits when the file is created.
        self.permissions(fs::Permissions::from_mode(0o666))
    }

    #[cfg(not(unix))]
    fn permissions_like_umask(&mut self) -> &mut Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        atomic_write(&path, b"one").unwrap();
        atomic_write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_dropped_file_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        atomic_write(&path, b"one").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half of").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_directory_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none/a.json");
        let error = atomic_write(&path, b"x").unwrap_err();
        assert!(matches!(error, Error::Io { .. }));
        assert!(error.to_string().contains("a.json"));
    }
}
