//! Everything that can be wrong with a model directory. Each variant names the file, the tensor or field, what was
//! expected, what came, and where it helps, what to do about it.

use std::path::PathBuf;

use crate::files::ReadError;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong while reading, checking or writing a model directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// The verb: open, map, write, rename, ….
        action: &'static str,
        /// The system's own reason.
        source: std::io::Error,
    },
    /// Something that is not a file stands under a file's name.
    #[error("{}: expected a regular file, got {got}; put the file itself there", file.display())]
    NotRegular {
        /// The path.
        file: PathBuf,
        /// What it is: a directory, a named pipe, ….
        got: &'static str,
    },
    /// A config or an index larger than any real one.
    #[error("{}: expected at most {limit} bytes, got at least {size}; this is not the file its name says", file.display())]
    FileTooLarge {
        /// The file.
        file: PathBuf,
        /// Bytes that it has at least.
        size: u64,
        /// Bytes that it may have.
        limit: u64,
    },
    /// The directory holds neither `model.safetensors` nor `model.safetensors.index.json`.
    #[error(
        "{}: expected model.safetensors or model.safetensors.index.json, found neither; other weight formats must first be converted to safetensors",
        dir.display()
    )]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
    },
    /// A JSON file (config, shard index) is not valid JSON or not a JSON object.
    #[error("{}: expected a JSON object, got invalid text: {reason}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// The parser's message, with line and column.
        reason: String,
    },
    /// A field of config.json has a value this program does not know or that cannot be right.
    #[error("{}: field `{field}`: expected {expected}, got {got}", file.display())]
    ConfigField {
        /// The config file.
        file: PathBuf,
        /// The field, with its path for nested sections.
        field: String,
        /// What would be accepted.
        expected: String,
        /// The value found (shortened).
        got: String,
    },
    /// The file is too short for the eight bytes that announce the header, or for the header they announce.
    #[error("{}: the safetensors header needs {needed} bytes, the file has {available}; the file is truncated or not safetensors", file.display())]
    HeaderLength {
        /// The file.
        file: PathBuf,
        /// Bytes that the header claims, its length prefix included.
        needed: u64,
        /// Bytes in the file.
        available: u64,
    },
    /// The header claims more than the format's limit of 100 MB.
    #[error("{}: the safetensors header claims {claimed} bytes, above the format's limit of {limit}", file.display())]
    HeaderTooLarge {
        /// The file.
        file: PathBuf,
        /// Bytes that the header claims.
        claimed: u64,
        /// The limit.
        limit: u64,
    },
    /// The header is not the JSON object that the format asks for.
    #[error("{}: invalid safetensors header: {reason}", file.display())]
    HeaderSyntax {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One tensor's entry in the header is not `{dtype, shape, data_offsets}`.
    #[error("{}: tensor `{tensor}`: invalid header entry: {reason}", file.display())]
    HeaderEntry {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is stored twice: in one header, in two shards, or both fused and unfused.
    #[error("{}: tensor `{tensor}` is already stored in {}; keep one of them", file.display(), first.display())]
    DuplicateTensor {
        /// The file with the second one.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file with the first one.
        first: PathBuf,
    },
    /// The element type is not one that this program reads here.
    #[error("{}: tensor `{tensor}`: expected dtype {expected}, got {got}", file.display())]
    UnsupportedDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The types that would be read.
        expected: &'static str,
        /// The type found.
        got: String,
    },
    /// A shape whose number of bytes does not fit in 64 bits.
    #[error("{}: tensor `{tensor}`: the size of shape {shape:?} overflows", file.display())]
    ShapeOverflow {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The claimed shape.
        shape: Vec<u64>,
    },
    /// `data_offsets` end before they begin.
    #[error("{}: tensor `{tensor}`: data_offsets begin at {begin} and end at {end}, before the beginning", file.display())]
    OffsetsReversed {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// One past the last byte.
        end: u64,
    },
    /// `data_offsets` reach past the end of the file: the file was cut short, or its header lies.
    #[error("{}: tensor `{tensor}`: data_offsets end at {end}, but the file holds {available} data bytes; the file is truncated or its header is wrong", file.display())]
    OffsetsOutside {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// One past the last byte claimed.
        end: u64,
        /// Data bytes in the file.
        available: u64,
    },
    /// The byte range does not have the size of shape × dtype.
    #[error("{}: tensor `{tensor}`: shape {shape:?} of {dtype} takes {expected} bytes, data_offsets give {got}", file.display())]
    SizeMismatch {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its element type.
        dtype: String,
        /// Bytes by shape and type.
        expected: u64,
        /// Bytes by the offsets.
        got: u64,
    },
    /// Two tensors claim the same bytes.
    #[error("{}: tensor `{tensor}` overlaps tensor `{other}` at data byte {at}", file.display())]
    Overlap {
        /// The file.
        file: PathBuf,
        /// The later tensor.
        tensor: String,
        /// The earlier tensor.
        other: String,
        /// Where the later one begins.
        at: u64,
    },
    /// Data bytes that belong to no tensor, in front of `tensor` (or at the end of the file).
    #[error("{}: data bytes {begin}..{end} before {} belong to no tensor; the format allows no holes", file.display(), tensor.as_ref().map_or("the end of the file".to_owned(), |t| format!("tensor `{t}`")))]
    Hole {
        /// The file.
        file: PathBuf,
        /// The tensor behind the hole; `None` at the end of the file.
        tensor: Option<String>,
        /// First unclaimed byte.
        begin: u64,
        /// One past the last unclaimed byte.
        end: u64,
    },
    /// The shard index names a file that is not a plain file inside the model directory.
    #[error("{}: tensor `{tensor}`: expected the name of a file in this directory, got {shard:?}, which leads outside it", file.display())]
    ShardOutside {
        /// The index.
        file: PathBuf,
        /// A tensor that the index puts there.
        tensor: String,
        /// The name in the index.
        shard: String,
    },
    /// The shard index names a file that does not exist.
    #[error("{}: tensor `{tensor}` should be in {}, which does not exist; download the missing shard", file.display(), shard.display())]
    ShardMissing {
        /// The index.
        file: PathBuf,
        /// A tensor that the index puts there.
        tensor: String,
        /// The missing file.
        shard: PathBuf,
    },
    /// The shard index puts a tensor into a shard that does not hold it.
    #[error("{}: tensor `{tensor}` is missing; {} says it is here", file.display(), index.display())]
    NotInShard {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The index.
        index: PathBuf,
    },
    /// A shard holds a tensor that the index does not list for it.
    #[error("{}: tensor `{tensor}` is not listed for this file in {}", file.display(), index.display())]
    NotInIndex {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The index.
        index: PathBuf,
    },
    /// The model that config.json describes needs a tensor that is not stored.
    #[error("{}: tensor `{tensor}` of shape {expected:?} is missing", file.display())]
    MissingTensor {
        /// The weights file or index.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A stored tensor that the model described by config.json does not have.
    #[error("{}: tensor `{tensor}` of shape {shape:?} is not part of the model that config.json describes", file.display())]
    SurplusTensor {
        /// The file.
        file: PathBuf,
        /// The tensor, as stored.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor with another shape than config.json asks for.
    #[error("{}: tensor `{tensor}`: expected shape {expected:?} by config.json, got {got:?}", file.display())]
    Misshapen {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape by config.json.
        expected: Vec<usize>,
        /// The shape found.
        got: Vec<usize>,
    },
    /// A tensor holds a NaN or an infinity.
    #[error("{}: tensor `{tensor}`: expected finite values, got {value} at element {at}", file.display())]
    NonFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index of the first one, in stored order.
        at: usize,
        /// The value.
        value: f32,
    },
    /// A model to be quantised that is quantised already.
    #[error("{}: these weights are quantised already; give the model they were made from", file.display())]
    AlreadyQuantised {
        /// The weights file or index.
        file: PathBuf,
    },
    /// Rows that cannot be cut into groups of this size.
    #[error(
        "{}: tensor `{tensor}`: rows of {columns} cannot be cut into groups of {group}; groups of 32, 64 or 128 that divide them are possible, or 8 bits",
        file.display()
    )]
    GroupSize {
        /// The weights file or index.
        file: PathBuf,
        /// The first such tensor.
        tensor: String,
        /// Elements of its rows.
        columns: usize,
        /// The size asked for.
        group: usize,
    },
    /// A scheme for routed experts, and a model without.
    #[error("{}: this model has no routed experts, which alone would be rounded to 4 bits; quantize it to 8", file.display())]
    NoExperts {
        /// The weights file or index.
        file: PathBuf,
    },
    /// Not enough room for what would be written.
    #[error("{}: {needed} bytes are needed on this disk and {free} are free; make room or choose another", dir.display())]
    DiskFull {
        /// Where it would be written.
        dir: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// An int8 weight without its `weight_scale`, or a scale without its weight.
    #[error("{}: tensor `{tensor}` is int8 and needs `{scale}` of shape [{rows}, 1] or [{rows}]: {got}", file.display())]
    Scale {
        /// The file.
        file: PathBuf,
        /// The int8 tensor.
        tensor: String,
        /// The name of its scale.
        scale: String,
        /// Output channels of the weight.
        rows: usize,
        /// What was found instead.
        got: String,
    },
    /// A packed 4-bit weight whose parts do not fit together.
    #[error("{}: 4-bit tensor `{tensor}`: {problem}", file.display())]
    Packed {
        /// The file.
        file: PathBuf,
        /// The packed tensor or the weight it stands for.
        tensor: String,
        /// What was expected and what came.
        problem: String,
    },
    /// A name that no tensor of this checkpoint has.
    #[error("{}: there is no tensor `{tensor}`", file.display())]
    NoSuchTensor {
        /// The weights file or index.
        file: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// A caller's data does not have the number of elements of its shape.
    #[error("{}: tensor `{tensor}`: shape {shape:?} needs {expected} elements, got {got}", file.display())]
    ElementCount {
        /// The directory being written.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape given.
        shape: Vec<usize>,
        /// Elements by shape; `None` if that overflows is reported as `usize::MAX`.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// A save was interrupted after its commit and cannot be finished here.
    #[error("{}: a save was interrupted and could not be finished: {reason}; make the directory writable and open it again", file.display())]
    InterruptedSave {
        /// The journal file.
        file: PathBuf,
        /// Why it could not be finished.
        reason: String,
    },
}

impl Error {
    /// Wraps an I/O error with the file and the attempted action.
    pub(crate) fn io(file: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.into();
        move |source| Self::Io { file, action, source }
    }

    /// Names the file that was not read.
    pub(crate) fn reading(file: impl Into<PathBuf>) -> impl FnOnce(ReadError) -> Self {
        let file = file.into();
        move |error| match error {
            ReadError::Io(source) => Self::Io { file, action: "read", source },
            ReadError::NotRegular(got) => Self::NotRegular { file, got },
            ReadError::TooLarge { size, limit } => Self::FileTooLarge { file, size, limit },
        }
    }
}
