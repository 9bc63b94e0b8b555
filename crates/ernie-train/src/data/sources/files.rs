//! Finding a source's files and reading them, gzipped or not.
use std::fs;
use std::io::Read;
use std::path::Path;

use super::SourceFile;
use crate::data::Error;
use crate::recipe::Source;

/// No source file is larger than this once unpacked: a gzip bomb ends here, and a file is held in memory several times over.
const LARGEST_FILE: u64 = 512 << 20;

/// The files of `source` under `root`, sorted by relative path. Hidden files are left out, as are those that match
/// an `exclude` pattern; a path that finds nothing is an error.
pub fn find_files(source: &Source, root: &Path) -> Result<Vec<SourceFile>, Error> {
    let mut found: Vec<SourceFile> = Vec::new();
    for entry in &source.paths {
        let before = found.len();
        let path = root.join(entry);
        if entry.contains('*') {
            let fixed: Vec<&str> = entry.split('/').take_while(|part| !part.contains('*')).collect();
            collect(&root.join(fixed.join("/")), root, &mut |file| {
                if matches_pattern(entry, &file.relative) {
                    found.push(file);
                }
            })?;
        } else if path.is_dir() {
            collect(&path, root, &mut |file| {
                let name = file.relative.strip_suffix(".gz").unwrap_or(&file.relative);
                let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
                if source.format.extensions().contains(&extension) {
                    found.push(file);
                }
            })?;
        } else if path.is_file() {
            found.push(SourceFile { relative: entry.clone(), path });
        }
        if found.len() == before {
            return Err(Error::NoFiles { source_name: source.name.clone(), pattern: entry.clone(), root: root.to_path_buf() });
        }
    }
    found.retain(|file| !source.exclude.iter().any(|pattern| matches_pattern(pattern, &file.relative)));
    found.sort_by(|a, b| a.relative.cmp(&b.relative));
    found.dedup_by(|a, b| a.relative == b.relative);
    if found.is_empty() {
        return Err(Error::EmptySource { source_name: source.name.clone(), reason: "`exclude` leaves no file".into() });
    }
    Ok(found)
}

fn collect(folder: &Path, root: &Path, keep: &mut dyn FnMut(SourceFile)) -> Result<(), Error> {
    let read = |source| Error::Read { path: folder.to_path_buf(), source };
    for entry in fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if path.is_dir() {
            collect(&path, root, keep)?;
        } else {
            let parts: Vec<_> = path.strip_prefix(root).unwrap_or(&path).iter().map(|part| part.to_string_lossy()).collect();
            let relative = parts.join("/");
            keep(SourceFile { path, relative });
        }
    }
    Ok(())
}

/// Whether `path` (parts joined by `/`) fits `pattern`: `*` stands for any run of characters within a part, `**` for
/// any number of parts.
pub fn matches_pattern(pattern: &str, path: &str) -> bool {
    fn parts(pattern: &[&str], path: &[&str]) -> bool {
        match (pattern.split_first(), path.split_first()) {
            (None, None) => true,
            (Some((&"**", rest)), _) => parts(rest, path) || path.split_first().is_some_and(|(_, tail)| parts(pattern, tail)),
            (Some((head, rest)), Some((name, tail))) => part(head.as_bytes(), name.as_bytes()) && parts(rest, tail),
            _ => false,
        }
    }
    fn part(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => part(rest, name) || name.split_first().is_some_and(|(_, tail)| part(pattern, tail)),
            (Some((a, rest)), Some((b, tail))) => a == b && part(rest, tail),
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('/').collect();
    let path: Vec<&str> = path.split('/').collect();
    parts(&pattern, &path)
}

/// The file's text: unpacked when gzipped (by its first bytes, not its name), without a byte order mark, with `\n`
/// line ends. Bytes that are not UTF-8 are an error that gives their position.
pub fn read_text(path: &Path) -> Result<String, Error> {
    let read = |source| Error::Read { path: path.to_path_buf(), source };
    let too_large = || Error::Malformed {
        path: path.to_path_buf(),
        line: 0,
        problem: format!("more than {} MiB of text in one file; split it into several", LARGEST_FILE >> 20),
    };
    if fs::metadata(path).map_err(read)?.len() > LARGEST_FILE {
        return Err(too_large());
    }
    let raw = fs::read(path).map_err(read)?;
    let bytes = if raw.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        flate2::read::MultiGzDecoder::new(raw.as_slice()).take(LARGEST_FILE + 1).read_to_end(&mut unpacked).map_err(read)?;
        if unpacked.len() as u64 > LARGEST_FILE {
            return Err(too_large());
        }
        unpacked
    } else {
        raw
    };
    let text =
        String::from_utf8(bytes).map_err(|error| Error::NotUtf8 { path: path.to_path_buf(), offset: error.utf8_error().valid_up_to() })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    Ok(text.replace("\r\n", "\n").replace('\r', "\n"))
}
