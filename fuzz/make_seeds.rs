//! Writes `fuzz/seeds/TARGET/…`, a few KB each, from testdata and from the configs of the tiny models: `cargo run --example make_seeds`.
//! Tokenizers are cut down to their first pieces.

use std::error::Error;
use std::fs;
use std::path::Path;

use ernie_checkpoint::{Config, Family};
use serde_json::Value;

/// Pieces kept of a tokenizer: control and byte pieces, and some more.
const PIECES: usize = 290;

fn main() -> Result<(), Box<dyn Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (seeds, testdata) = (here.join("seeds"), here.join("../testdata/tokenizers"));
    models(&seeds)?;
    for name in ["bpe_bytes", "bpe_suffix", "unigram_bytes", "unigram_unused"] {
        let model = fs::read(testdata.join(format!("{name}.model")))?;
        write(&seeds.join("sentencepiece").join(name), &first_pieces(&model))?;
    }
    for name in ["json_bytelevel", "json_byte_fallback"] {
        let tokenizer = serde_json::from_slice(&fs::read(testdata.join(format!("{name}.json")))?)?;
        write(&seeds.join("tokenizer_json").join(name), first_tokens(tokenizer).to_string().as_bytes())?;
    }
    let chat: Value = serde_json::from_slice(&fs::read(testdata.join("chat.json"))?)?;
    for (name, source) in chat["templates"].as_object().into_iter().flatten() {
        if let Some(source) = source.as_str() {
            write(&seeds.join("chat_template").join(name), source.as_bytes())?;
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    fs::write(path, bytes)
}

fn models(seeds: &Path) -> Result<(), Box<dyn Error>> {
    for (name, config, form) in ernie_fuzz::models() {
        let model = tempfile::tempdir()?;
        ernie_fuzz::write_model(model.path(), &config, form)?;
        write(&seeds.join("config").join(name), &fs::read(model.path().join("config.json"))?)?;
        write(&seeds.join("safetensors").join(name), &fs::read(model.path().join("model.safetensors"))?)?;
    }
    let vision = Config::defaults(Family::VlMoe).to_json();
    write(&seeds.join("config").join("vision"), serde_json::to_string_pretty(&vision)?.as_bytes())?;
    Ok(())
}

/// A SentencePiece model with its first pieces only, and without its table of normalisation, the bulk of some.
fn first_pieces(model: &[u8]) -> Vec<u8> {
    const PIECE: u8 = 1 << 3 | LENGTH_DELIMITED;
    const NORMALIZER: u8 = 3 << 3 | LENGTH_DELIMITED;
    const TABLE: u8 = 2 << 3 | LENGTH_DELIMITED;
    let (mut kept, mut pieces) = (Vec::new(), 0);
    for (key, content) in fields(model) {
        pieces += usize::from(key == PIECE);
        if key == NORMALIZER {
            let mut normalizer = Vec::new();
            fields(content).filter(|&(key, _)| key != TABLE).for_each(|(key, content)| push(&mut normalizer, key, content));
            push(&mut kept, key, &normalizer);
        } else if key != PIECE || pieces <= PIECES {
            push(&mut kept, key, content);
        }
    }
    kept
}

/// The wire type of strings, bytes and messages in Protocol Buffers; all fields outside have it, numbers have 0.
const LENGTH_DELIMITED: u8 = 2;

/// Keys below 16 and contents of a message's fields; the content of a number is its digits.
fn fields(mut message: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (&key, after) = message.split_first()?;
        let (value, digits) = varint(after);
        let (start, end) = if key & 7 == LENGTH_DELIMITED { (digits, digits + value) } else { (0, digits) };
        message = &after[end..];
        Some((key, &after[start..end]))
    })
}

fn push(message: &mut Vec<u8>, key: u8, content: &[u8]) {
    message.push(key);
    if key & 7 == LENGTH_DELIMITED {
        let mut length = content.len();
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
    }
    message.extend_from_slice(content);
}

fn varint(bytes: &[u8]) -> (usize, usize) {
    let digits = bytes.iter().take_while(|&&byte| byte >= 0x80).count() + 1;
    (bytes[..digits].iter().rev().fold(0, |value, &byte| value << 7 | usize::from(byte & 0x7f)), digits)
}

/// A byte-pair tokenizer with the merges among its first tokens only.
fn first_tokens(mut tokenizer: Value) -> Value {
    let model = &mut tokenizer["model"];
    if let Some(vocabulary) = model["vocab"].as_object_mut() {
        vocabulary.retain(|_, id| id.as_u64().is_some_and(|id| id < PIECES as u64));
    }
    let vocabulary = model["vocab"].clone();
    if let Some(merges) = model["merges"].as_array_mut() {
        merges.retain(|merge| {
            let parts: Vec<&str> = match merge {
                Value::String(pair) => pair.split(' ').collect(),
                pair => pair.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
            };
            parts.iter().all(|part| vocabulary.get(part).is_some()) && vocabulary.get(parts.concat()).is_some()
        });
    }
    tokenizer
}
