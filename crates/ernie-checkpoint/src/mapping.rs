//! The bytes of one weights file: mapped from disk, or compiled into the program.
#![allow(unsafe_code)] // mapping a file is unsafe by nature; this is the one place, reviewed as such

use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::files;

/// Read-only bytes with the name of the file they came from.
#[derive(Debug)]
pub(crate) struct FileBytes {
    /// Where the bytes come from, for messages.
    pub(crate) path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl FileBytes {
    /// Maps a regular file of at least one byte.
    pub(crate) fn map(path: &Path) -> Result<Self> {
        let (file, size) = files::open_regular(path).map_err(Error::reading(path))?;
        if size == 0 {
            // An empty file cannot be mapped on every system; it is as good as these no bytes.
            return Ok(Self { path: path.to_owned(), content: Content::Static(&[]) });
        }
        // SAFETY: the mapping is private and read-only, and outlives every slice taken from it (the slices borrow
        // `self`). Its bytes would change under us only if another process wrote into or truncated the file in place;
        // this program never does that (it replaces files by rename, which leaves a mapped file intact), and the
        // documentation of `Checkpoint::open` asks the same of others. No type here has invalid bit patterns: changed
        // bytes could change numbers, and are re-checked by `validate`, but cannot break memory safety of the parser,
        // which copies the header before it uses it.
        let mapped = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "map"))?;
        Ok(Self { path: path.to_owned(), content: Content::Mapped(mapped) })
    }

    /// Tells the system that the pages of these bytes need not stay in memory. The bytes remain readable: pages come back from the file.
    pub(crate) fn release(&self, range: std::ops::Range<usize>) {
        #[cfg(unix)]
        if let Content::Mapped(mapped) = &self.content
            && range.end <= mapped.len()
            && !range.is_empty()
        {
            // SAFETY: the mapping is read-only and backed by the file, so no page differs from it: dropping pages changes no byte that a slice
            // into the mapping could show. What `map` asks of the file holds on.
            let _ = unsafe { mapped.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Bytes compiled into the program, under a name for messages.
    pub(crate) fn from_static(path: PathBuf, bytes: &'static [u8]) -> Self {
        Self { path, content: Content::Static(bytes) }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.content {
            Content::Mapped(mapped) => mapped,
            Content::Static(bytes) => bytes,
        }
    }
}
