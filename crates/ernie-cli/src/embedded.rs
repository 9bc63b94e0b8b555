//! The model compiled into the program, so that an installed `ernie` works in any folder.
use ernie_checkpoint::{Checkpoint, EmbeddedFiles, Tokenizer};
use std::path::Path;

/// What messages call it.
pub const NAME: &str = "the built-in model";

const CONFIG: &str = include_str!("../../../models/nano/config.json");
/// Aligned as safetensors' own header is, to 8 bytes, so that its numbers can be read in place.
static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../models/nano/model.safetensors"));
const TOKENIZER: &[u8] = include_bytes!("../../../models/nano/tokenizer.json");

#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// Its configuration and weights.
pub fn checkpoint() -> Result<Checkpoint, ernie_checkpoint::Error> {
    Checkpoint::from_static(EmbeddedFiles { config: CONFIG, safetensors: &WEIGHTS.0 })
}

/// Its tokenizer. Its chat template is the family's.
pub fn tokenizer() -> anyhow::Result<Tokenizer> {
    Ok(Tokenizer::from_tokenizer_json(TOKENIZER, Path::new("tokenizer.json"))?)
}
