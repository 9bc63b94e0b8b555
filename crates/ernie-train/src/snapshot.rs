//! Crash-safe training checkpoints: a directory per step that either exists whole or not at all.
//!
//! `checkpoints/step-00000200/` holds a complete Hugging Face model directory in f32, the optimizer's moments, and the trainer's position. It
//! is written under a name that starts with a dot, every file is flushed to disk, and only then is it renamed; a kill at any instant leaves
//! the previous checkpoint whole and at most a dotted directory, which the next run removes.
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{
    curriculum::RoutingState,
    data::packing::DataState,
    optimizer::{AdamW, Moments},
};
use ernie_checkpoint::{AtomicFile, Checkpoint, Config, SaveDtype, SaveOptions, safetensors_header};
use ernie_model::Ernie;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

/// A training checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The operating system refused.
    #[error("{path}: {source}; check the disk's free space and the folder's permissions")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
    /// The model part is at fault.
    #[error(transparent)]
    Model(#[from] ernie_checkpoint::Error),
    /// The optimizer or trainer part is not what this version wrote.
    #[error("{path}: {problem}; delete this checkpoint to continue from the one before it")]
    Corrupt {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Where the trainer was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps taken.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Seconds spent training, over all runs.
    pub seconds: f64,
    /// Where the data is.
    pub data: DataState,
    /// Steps since the last line of the metrics.
    #[serde(default)]
    pub unlogged: Unlogged,
    /// What a curriculum has learned of the experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curriculum: Option<RoutingState>,
    /// Hash of the reference model's configuration and weights, where priorities or a curriculum go by one; checkpoints of earlier programs do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Hash of the recipe's parts that decide the result; a changed recipe must not continue an old run.
    pub recipe: String,
}

/// Sums over the steps since the last line of the metrics, so that the next line is the same whether or not the run was interrupted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Unlogged {
    /// Of the steps' mean losses.
    pub loss: f64,
    /// Of their tokens.
    pub tokens: u64,
    /// Of their seconds.
    pub seconds: f64,
    /// How many they are.
    pub steps: u64,
}

const MOMENTS: &str = "optimizer.safetensors";
const POSITION: &str = "trainer.json";
/// What makes a tokenizer, in any of the forms that the family uses.
const TOKENIZER_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Everything a run needs to go on.
pub struct Snapshot {
    /// The weights.
    pub model: Checkpoint,
    /// Where the trainer was.
    pub position: Position,
    /// The optimizer's moments, by internal parameter name.
    pub moments: std::collections::BTreeMap<String, Moments>,
    /// Its folder.
    pub path: PathBuf,
}

/// Where checkpoints go and whose tokenizer they carry, so that each can be talked to.
pub struct Directory<'a> {
    /// Folder of the checkpoints.
    pub root: &'a Path,
    /// Folder with the run's tokenizer files.
    pub tokenizer: &'a Path,
}

/// Writes the checkpoint of `position.step` and deletes all but the last `keep_last`.
///
/// # Errors
/// If the disk refuses; what was there before is still there then.
pub fn write(
    directory: &Directory,
    config: &Config,
    model: &Ernie,
    optimizer: &AdamW,
    position: &Position,
    keep_last: usize,
) -> Result<PathBuf, SnapshotError> {
    let root = directory.root;
    let name = format!("step-{:08}", position.step);
    let (partial, whole) = (root.join(format!(".{name}")), root.join(&name));
    fs::create_dir_all(root).map_err(|source| io(root, source))?;
    if whole.exists() {
        // The run is deterministic: the same step of the same run is the same checkpoint.
        return Ok(whole);
    }
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|source| io(&partial, source))?;
    }
    let tensors = model.export().into_iter().map(|(name, shape, values)| (name, shape, values.into()));
    ernie_checkpoint::save(&partial, config, tensors, &SaveOptions { dtype: SaveDtype::F32, ..SaveOptions::default() })?;
    copy_tokenizer(directory.tokenizer, &partial)?;
    write_moments(&partial.join(MOMENTS), optimizer)?;
    let json = serde_json::to_vec_pretty(position).expect("a position is plain data");
    ernie_checkpoint::atomic_write(&partial.join(POSITION), &json)?;
    fs::rename(&partial, &whole).map_err(|source| io(&whole, source))?;
    sync_dir(root)?;
    let steps = list(root)?;
    for (_, old) in steps.iter().rev().skip(keep_last.max(1)) {
        // Under a dotted name first, so that a kill in the middle of the deletion leaves no half checkpoint that looks whole.
        let name = old.file_name().expect("listed by its name").to_string_lossy().into_owned();
        let doomed = root.join(format!(".{name}.old"));
        fs::rename(old, &doomed).map_err(|source| io(old, source))?;
        fs::remove_dir_all(&doomed).map_err(|source| io(&doomed, source))?;
    }
    Ok(whole)
}

/// A checkpoint of which only the trainer's position has been read.
pub struct Newest {
    /// Where the trainer was.
    pub position: Position,
    path: PathBuf,
}

impl Newest {
    /// Reads the rest of it.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn read(self) -> Result<Snapshot, SnapshotError> {
        let Self { position, path } = self;
        let model = Checkpoint::open(&path)?;
        let moments = read_moments(&path.join(MOMENTS))?;
        Ok(Snapshot { model, position, moments, path })
    }
}

/// The newest checkpoint under `root`, if there is one.
///
/// # Errors
/// If its position cannot be read or is damaged.
pub fn newest(root: &Path) -> Result<Option<Newest>, SnapshotError> {
    if !root.exists() {
        return Ok(None);
    }
    list(root)?.pop().map(|(_, path)| Ok(Newest { position: read_position(&path)?, path })).transpose()
}

/// Removes what a killed run left half-written under `root`: for who trains there, and nobody else.
///
/// # Errors
/// If the disk refuses.
pub fn remove_partial(root: &Path) -> Result<(), SnapshotError> {
    if !root.exists() {
        return Ok(());
    }
    for entry in entries(root)? {
        if entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".step-")) {
            fs::remove_dir_all(&entry).map_err(|source| io(&entry, source))?;
        }
    }
    Ok(())
}

/// Copies the tokenizer files of one folder into another.
///
/// # Errors
/// If the disk refuses.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    for name in TOKENIZER_FILES {
        let file = from.join(name);
        if file.exists() {
            let bytes = fs::read(&file).map_err(|source| io(&file, source))?;
            ernie_checkpoint::atomic_write(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

fn read_position(path: &Path) -> Result<Position, SnapshotError> {
    let file = path.join(POSITION);
    let bytes = fs::read(&file).map_err(|source| io(&file, source))?;
    serde_json::from_slice(&bytes).map_err(|error| corrupt(&file, error))
}

/// Complete checkpoints by step, oldest first.
fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>, SnapshotError> {
    let step = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
    let mut steps = entries(root)?.into_iter().filter_map(|path| Some((step(&path)?, path))).collect::<Vec<_>>();
    steps.sort();
    Ok(steps)
}

fn entries(root: &Path) -> Result<Vec<PathBuf>, SnapshotError> {
    let read = fs::read_dir(root).map_err(|source| io(root, source))?;
    read.map(|entry| entry.map(|entry| entry.path()).map_err(|source| io(root, source))).collect()
}

/// Tensor by tensor: a copy of all moments beside what a step leaves would be the peak of a run.
fn write_moments(path: &Path, optimizer: &AdamW) -> Result<(), SnapshotError> {
    let first = optimizer.moments.iter().map(|(name, moments)| (format!("first.{name}"), &moments.first));
    let second = optimizer.moments.iter().map(|(name, moments)| (format!("second.{name}"), &moments.second));
    let named: Vec<(String, [usize; 1], &[f32])> = first.chain(second).map(|(name, values)| (name, [values.len()], &values[..])).collect();
    let header = safetensors_header(
        &[],
        named.iter().map(|(name, shape, values)| (name.as_str(), ernie_checkpoint::Dtype::F32, &shape[..], size_of_val(*values))),
    );
    let mut file = AtomicFile::create(path)?;
    let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(|source| io(path, source));
    write(&header)?;
    named.iter().try_for_each(|(.., values)| write(bytemuck::cast_slice(values)))?;
    Ok(file.commit()?)
}

fn read_moments(path: &Path) -> Result<std::collections::BTreeMap<String, Moments>, SnapshotError> {
    let bytes = fs::read(path).map_err(|source| io(path, source))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| corrupt(path, error))?;
    let values = |name: &str| -> Result<Vec<f32>, SnapshotError> {
        let view = tensors.tensor(name).map_err(|error| corrupt(path, error))?;
        if view.dtype() != Dtype::F32 {
            return Err(corrupt(path, format!("{name} is {:?}, expected F32", view.dtype())));
        }
        Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    };
    let names = tensors.names().into_iter().filter_map(|name| name.strip_prefix("first.")).map(String::from).collect::<Vec<_>>();
    let read = |name: String| {
        let moments = Moments { first: values(&format!("first.{name}"))?, second: values(&format!("second.{name}"))? };
        Ok((name, moments))
    };
    names.into_iter().map(read).collect()
}

fn sync_dir(path: &Path) -> Result<(), SnapshotError> {
    fs::File::open(path).and_then(|dir| dir.sync_all()).map_err(|source| io(path, source))
}

fn io(path: &Path, source: std::io::Error) -> SnapshotError {
    SnapshotError::Io { path: path.to_path_buf(), source }
}

fn corrupt(path: &Path, problem: impl ToString) -> SnapshotError {
    SnapshotError::Corrupt { path: path.to_path_buf(), problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::AdamWConfig;

    #[test]
    fn moments_read_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MOMENTS);
        let mut optimizer = AdamW::new(AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 });
        for (name, len) in [("a.weight", 3), ("b", 70_000), ("层", 1)] {
            let values = |factor: f32| (0..len).map(|i| factor * i as f32 - f32::MIN_POSITIVE).collect();
            optimizer.moments.insert(name.to_owned(), Moments { first: values(0.1), second: values(3.0) });
        }
        write_moments(&path, &optimizer).unwrap();
        assert_eq!(read_moments(&path).unwrap(), optimizer.moments);
        // The header ends where the elements are aligned, and nothing follows the last of them.
        let bytes = fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!((header % 8, bytes.len()), (0, 8 + header + 2 * 4 * (3 + 70_000 + 1)));
    }
}
