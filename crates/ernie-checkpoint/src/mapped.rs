//! A read-only file of any kind as bytes, for callers outside this crate.
use std::ops::Deref;
use std::path::Path;

use crate::error::Result;
use crate::mapping::FileBytes;

/// A memory-mapped file. As with a checkpoint's files, it must not be written in place while it is open; replacing it
/// by rename ([`crate::atomic_write`]) is fine.
#[derive(Debug)]
pub struct MappedFile(FileBytes);

impl MappedFile {
    /// Maps a regular file; an empty one gives no bytes.
    pub fn open(path: &Path) -> Result<Self> {
        FileBytes::map(path).map(Self)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
