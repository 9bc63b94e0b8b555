//! The weights files of a directory: one `model.safetensors`, or shards listed by `model.safetensors.index.json`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};
use crate::files;
use crate::header::{self, HeaderEntry, Members};
use crate::mapping::FileBytes;

/// The single weights file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The list of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// All weights files of a checkpoint, with their headers checked.
#[derive(Debug)]
pub(crate) struct Weights {
    /// The file that lists everything: the single file or the index.
    pub(crate) origin: PathBuf,
    pub(crate) files: Vec<FileBytes>,
    pub(crate) stored: Vec<Stored>,
}

/// One tensor as stored.
#[derive(Debug)]
pub(crate) struct Stored {
    /// Index into [`Weights::files`].
    pub(crate) file: usize,
    pub(crate) entry: HeaderEntry,
}

impl Weights {
    /// The file that holds a tensor.
    pub(crate) fn path(&self, stored: &Stored) -> &Path {
        &self.files[stored.file].path
    }

    /// A tensor's bytes; the header was checked against the file's length.
    pub(crate) fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.files[stored.file][stored.entry.bytes.clone()]
    }

    /// One file's worth of tensors.
    pub(crate) fn from_file(file: FileBytes) -> Result<Self> {
        let entries = header::read(&file.path, &file)?;
        let stored = entries.into_iter().map(|entry| Stored { file: 0, entry }).collect();
        Ok(Self { origin: file.path.clone(), files: vec![file], stored })
    }

    /// The weights of a directory; as in transformers the single file goes before an index.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        if exists(&single)? {
            return Self::from_file(FileBytes::map(&single)?);
        }
        let index = dir.join(INDEX);
        if exists(&index)? {
            return Self::from_index(dir, index);
        }
        // Distinguish a wrong path from a directory in another format.
        dir.read_dir().map_err(Error::io(dir, "list"))?;
        Err(Error::NoWeights { dir: dir.into() })
    }

    fn from_index(dir: &Path, index: PathBuf) -> Result<Self> {
        let mut shards = read_index(&index)?;
        for (name, tensors) in &shards {
            check_shard(dir, &index, name, tensors.first().map_or("", String::as_str))?;
        }
        let mut weights = Self { origin: index, files: Vec::new(), stored: Vec::new() };
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (file, (name, listed)) in shards.iter_mut().enumerate() {
            let content = FileBytes::map(&dir.join(name))?;
            let entries = header::read(&content.path, &content)?;
            let path = content.path.clone();
            weights.files.push(content);
            listed.sort_unstable();
            for entry in &entries {
                if let Some(&first) = seen.get(&entry.name) {
                    let first = weights.files[first].path.clone();
                    return Err(Error::DuplicateTensor { file: path, tensor: entry.name.clone(), first });
                }
                seen.insert(entry.name.clone(), file);
                if listed.binary_search(&entry.name).is_err() {
                    let index = weights.origin.clone();
                    return Err(Error::NotInIndex { file: path, tensor: entry.name.clone(), index });
                }
            }
            if let Some(tensor) = listed.iter().find(|tensor| seen.get(*tensor) != Some(&file)) {
                return Err(Error::NotInShard { file: path, tensor: tensor.clone(), index: weights.origin.clone() });
            }
            weights.stored.extend(entries.into_iter().map(|entry| Stored { file, entry }));
        }
        Ok(weights)
    }
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(Error::io(path, "look for"))
}

/// Shard names with the tensors the index puts into each.
fn read_index(index: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Members,
    }
    let json = |reason: String| Error::Json { file: index.into(), reason };
    let text = files::read_text(index, files::MAX_TEXT_BYTES).map_err(Error::reading(index))?;
    let Index { weight_map: Members(members) } = serde_json::from_str(&text).map_err(|e| json(e.to_string()))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut seen = HashMap::with_capacity(members.len());
    for (tensor, shard) in members {
        let Some(shard) = shard.as_str() else {
            return Err(json(format!("weight_map: tensor `{tensor}`: expected a file name, got {shard}")));
        };
        if let Some(first) = seen.insert(tensor.clone(), shard.to_owned()) {
            return Err(Error::DuplicateTensor { file: index.into(), tensor, first: first.into() });
        }
        shards.entry(shard.to_owned()).or_default().push(tensor);
    }
    Ok(shards)
}

/// A shard must be a plain name of an existing file whose content lies inside the directory.
fn check_shard(dir: &Path, index: &Path, name: &str, tensor: &str) -> Result<()> {
    let outside = || Error::ShardOutside { file: index.into(), tensor: tensor.to_owned(), shard: name.to_owned() };
    // Backslashes and colons are separators elsewhere; an index is refused the same way on every system.
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
    if !plain || name.contains(['/', '\\', ':', '\0']) {
        return Err(outside());
    }
    let shard = dir.join(name);
    let Ok(target) = shard.canonicalize() else {
        return Err(Error::ShardMissing { file: index.into(), tensor: tensor.to_owned(), shard });
    };
    let dir = dir.canonicalize().map_err(Error::io(dir, "resolve"))?;
    // The Hugging Face cache keeps snapshots/<revision>/<name> as links to ../../blobs/<hash>; nothing else may leave.
    let blobs = match (dir.parent(), dir.ancestors().nth(2)) {
        (Some(snapshots), Some(repository)) if snapshots.ends_with("snapshots") => Some(repository.join("blobs")),
        _ => None,
    };
    let inside = target.starts_with(&dir) || blobs.is_some_and(|blobs| target.parent() == Some(&blobs));
    if inside { Ok(()) } else { Err(outside()) }
}
