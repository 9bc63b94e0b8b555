//! A model directory small enough to make anew in each test: random weights, and a tokenizer of bytes and ASCII characters.
use ernie_checkpoint::{Config, SaveOptions, TensorRole, save};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::path::Path;

/// Pieces: 5 special, 256 bytes, 95 printable ASCII characters.
pub const VOCAB: usize = 5 + 256 + 95;
pub const CONTEXT: usize = 96;

const SPECIAL: [&str; 5] = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"];

/// Writes config, weights and tokenizer.
pub fn write(dir: &Path) {
    write_without_tokenizer(dir);
    write_tokenizer(dir);
}

pub fn write_without_tokenizer(dir: &Path) {
    let config = Config::from_json(&config().to_string(), Path::new("config.json")).unwrap();
    let mut seed = 1_u64;
    let specs: Vec<_> = config.tensor_specs().into_iter().filter(|spec| spec.required).collect();
    let tensors = specs.into_iter().map(|spec| {
        let values: Vec<f32> = (0..spec.shape.iter().product::<usize>())
            .map(|_| match spec.role {
                TensorRole::Vector => 1.0,
                TensorRole::CorrectionBias => 0.01,
                _ => uniform(&mut seed),
            })
            .collect();
        (spec.name, spec.shape, Cow::Owned(values))
    });
    save(dir, &config, tensors, &SaveOptions::default()).unwrap();
}

fn write_tokenizer(dir: &Path) {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let characters = (b' '..=b'~').map(|byte| char::from(byte).to_string());
    let pieces = SPECIAL.iter().map(|piece| (*piece).to_owned()).chain(bytes).chain(characters);
    let vocab: Map<String, Value> = pieces.enumerate().map(|(id, piece)| (piece, json!(id))).collect();
    assert_eq!(vocab.len(), VOCAB);
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": []
        }
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn config() -> Value {
    json!({
        "model_type": "ernie4_5_moe", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "use_bias": false, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1
    })
}

/// In ±0.5, by a linear congruence: the same weights everywhere.
fn uniform(seed: &mut u64) -> f32 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
}
