//! Tiny models and hand-made safetensors files.

use std::borrow::Cow;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use ernie_checkpoint::{Checkpoint, Config, Error, Family, QuantizeOptions, QuantizeScheme, SaveDtype, SaveOptions, quantize, save};
use serde_json::{Value, json};
use tempfile::TempDir;

pub type Item = (String, Vec<usize>, Vec<f32>);

pub fn dense() -> Config {
    let mut config = Config::defaults(Family::Dense);
    config.hidden_size = 12;
    config.intermediate_size = 20;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = 6;
    config.vocab_size = 31;
    config.max_position_embeddings = 64;
    config
}

pub fn moe() -> Config {
    let mut config = Config::defaults(Family::Moe);
    config.hidden_size = 12;
    config.intermediate_size = 20;
    config.num_hidden_layers = 3;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = 6;
    config.vocab_size = 31;
    config.max_position_embeddings = 64;
    config.tie_word_embeddings = false;
    config.num_nextn_predict_layers = 1;
    let moe = config.moe.as_mut().unwrap();
    moe.num_experts = 5;
    moe.top_k = 2;
    moe.intermediate_size = 8;
    config
}

/// Experts whose rows can be cut into groups of 32.
pub fn wide_moe() -> Config {
    let mut config = moe();
    config.hidden_size = 64;
    config.moe.as_mut().unwrap().intermediate_size = 32;
    config
}

/// The files of [`wide_moe`] with its experts in 4 bits.
pub fn int4_model() -> TempDir {
    let (from, out) = (model(&wide_moe()), tempfile::tempdir().unwrap());
    let options = QuantizeOptions { scheme: QuantizeScheme::W4a8 { group: 32 }, ..QuantizeOptions::default() };
    quantize(&Checkpoint::open(from.path()).unwrap(), None, out.path(), options, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    out
}

pub fn vision_language() -> Config {
    let mut config = Config::defaults(Family::VlMoe);
    config.hidden_size = 12;
    config.intermediate_size = 20;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.head_dim = 16;
    config.vocab_size = 31;
    config.max_position_embeddings = 64;
    let moe = config.moe.as_mut().unwrap();
    moe.num_experts = 4;
    moe.top_k = 2;
    moe.intermediate_size = 8;
    moe.num_shared_experts = 1;
    moe.vision.as_mut().unwrap().num_experts = 4;
    moe.vision.as_mut().unwrap().intermediate_size = 6;
    let vl = config.vl.as_mut().unwrap();
    vl.mrope_section = [3, 3, 2];
    vl.vision.depth = 1;
    vl.vision.hidden_size = 8;
    vl.vision.intermediate_size = 32;
    vl.vision.num_heads = 2;
    vl.vision.patch_size = 2;
    config
}

/// Every tensor of a config with reproducible values of about ±1; correction biases around 30, as released.
pub fn tensors(config: &Config) -> Vec<Item> {
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
    };
    let specs = config.tensor_specs().into_iter();
    specs
        .filter(|spec| !(config.tie_word_embeddings && spec.name == "lm_head.weight"))
        .map(|spec| {
            let offset = if spec.name.contains("correction_bias") { 30.0 } else { 0.0 };
            let values = (0..spec.shape.iter().product()).map(|_| offset + next()).collect();
            (spec.name, spec.shape, values)
        })
        .collect()
}

pub fn write(dir: &Path, config: &Config, items: &[Item], dtype: SaveDtype, max_shard_bytes: u64) -> Result<(), Error> {
    let items = items.iter().map(|(name, shape, values)| (name.clone(), shape.clone(), Cow::Borrowed(values.as_slice())));
    save(dir, config, items, &SaveOptions { dtype, max_shard_bytes })
}

/// A directory with a whole f32 model in one file.
pub fn model(config: &Config) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, &tensors(config), SaveDtype::F32, u64::MAX).unwrap();
    dir
}

/// A directory with a whole f32 model in several shards.
pub fn sharded_model(config: &Config) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, &tensors(config), SaveDtype::F32, 4096).unwrap();
    assert!(shard_count(dir.path()) > 2);
    dir
}

pub fn shard_count(dir: &Path) -> usize {
    let is_shard = |name: &str| name.starts_with("model-") && name.ends_with(".safetensors");
    fs::read_dir(dir).unwrap().filter(|e| is_shard(e.as_ref().unwrap().file_name().to_str().unwrap())).count()
}

/// A safetensors file with this header text and these data bytes, whether they fit together or not.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A well-formed safetensors file of (name, dtype, shape, bytes).
pub fn well_formed(tensors: &[(String, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend(bytes);
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    file(&Value::Object(header).to_string(), &data)
}

/// A directory with a dense config and these bytes as its weights.
pub fn with_weights(bytes: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), dense().to_json().to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}

/// The error of opening, whose message must name each of `mentions`.
#[track_caller]
pub fn open_error(dir: &Path, mentions: &[&str]) -> Error {
    let error = Checkpoint::open(dir).expect_err("a bad directory was accepted");
    mentions_all(&error, mentions);
    error
}

#[track_caller]
pub fn mentions_all(error: &Error, mentions: &[&str]) {
    let text = error.to_string();
    for mention in mentions {
        assert!(text.contains(mention), "{text:?} does not mention {mention:?}");
    }
}

/// Asserts the variant of an error.
macro_rules! assert_error {
    ($error:expr, $pattern:pat) => {{
        let error = $error;
        assert!(matches!(error, $pattern), "expected {}, got {error:?}", stringify!($pattern));
    }};
}
pub(crate) use assert_error;

/// The header of a safetensors file, and its length.
pub fn header_of(bytes: &[u8]) -> (Value, usize) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), length)
}

/// Changes the header of a safetensors file; the data stay.
pub fn rewrite_header(path: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(path).unwrap();
    let (mut header, length) = header_of(&bytes);
    change(&mut header);
    fs::write(path, file(&header.to_string(), &bytes[8 + length..])).unwrap();
}
