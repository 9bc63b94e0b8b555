//! Opening and reading the small files of a model directory, whatever stands under their names.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::Path;

/// Largest config.json that is read; released ones have some kilobytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Largest shard index, tokenizer file or chat template that is read.
pub(crate) const MAX_TEXT_BYTES: u64 = 256 << 20;

/// Why a file was not read; the caller's error type adds its name.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The system's reason.
    Io(io::Error),
    /// A directory, pipe, device, …: what it is.
    NotRegular(&'static str),
    /// More bytes than such a file may have.
    TooLarge { size: u64, limit: u64 },
}

/// Opens a regular file (or a link to one) with its size. The check comes before opening: opening a named pipe waits
/// for a writer, perhaps forever.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), ReadError> {
    let regular = |metadata: Metadata| if metadata.is_file() { Ok(metadata.len()) } else { Err(ReadError::NotRegular(kind(&metadata))) };
    regular(fs::metadata(path).map_err(ReadError::Io)?)?;
    let file = File::open(path).map_err(ReadError::Io)?;
    let size = regular(file.metadata().map_err(ReadError::Io)?)?;
    Ok((file, size))
}

/// All bytes of a regular file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ReadError> {
    let (file, size) = open_regular(path)?;
    let mut bytes = Vec::new();
    // Some files of /proc say that they are empty, and a file may grow: what counts is what is read.
    if size <= limit {
        file.take(limit + 1).read_to_end(&mut bytes).map_err(ReadError::Io)?;
    }
    match size.max(bytes.len() as u64) {
        size if size > limit => Err(ReadError::TooLarge { size, limit }),
        _ => Ok(bytes),
    }
}

/// As [`read`], of UTF-8 text.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ReadError> {
    String::from_utf8(read(path, limit)?).map_err(|e| ReadError::Io(io::Error::new(io::ErrorKind::InvalidData, e)))
}

fn kind(metadata: &Metadata) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = metadata.file_type();
        if kind.is_fifo() {
            return "a named pipe";
        } else if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        } else if kind.is_socket() {
            return "a socket";
        }
    }
    if metadata.is_dir() { "a directory" } else { "a special file" }
}
