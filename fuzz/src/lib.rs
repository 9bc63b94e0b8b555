//! What several targets share: tiny models, and what every tokenizer promises.

use std::borrow::Cow;
use std::path::Path;

use ernie_checkpoint::{Config, Error, Family, SaveDtype, SaveOptions, Tokenizer, save};

/// Models of less than a KB of weights: name, config, and how the weights are stored.
pub fn models() -> [(&'static str, Config, SaveDtype); 3] {
    let tiny = |family| {
        let mut config = Config::defaults(family);
        config.hidden_size = 4;
        config.intermediate_size = 6;
        config.num_attention_heads = 2;
        config.num_key_value_heads = 1;
        config.head_dim = 2;
        config.vocab_size = 7;
        config.max_position_embeddings = 16;
        config
    };
    let mut dense = tiny(Family::Dense);
    dense.num_hidden_layers = 1;
    let mut moe = tiny(Family::Moe);
    moe.num_hidden_layers = 2;
    moe.tie_word_embeddings = false;
    if let Some(experts) = &mut moe.moe {
        experts.num_experts = 3;
        experts.top_k = 2;
        experts.intermediate_size = 2;
    }
    [("dense", dense.clone(), SaveDtype::F32), ("dense_int8", dense, SaveDtype::Int8PerChannel), ("moe", moe, SaveDtype::Bf16)]
}

/// Writes config.json and model.safetensors of a model.
pub fn write_model(directory: &Path, config: &Config, dtype: SaveDtype) -> Result<(), Error> {
    let specs = config.tensor_specs().into_iter().filter(|spec| !(config.tie_word_embeddings && spec.name == "lm_head.weight"));
    let tensors = specs.map(|spec| {
        let values = (0..spec.shape.iter().product()).map(|i: usize| (i % 7) as f32 - 3.0).collect();
        (spec.name, spec.shape, Cow::Owned(values))
    });
    save(directory, config, tensors, &SaveOptions { dtype, max_shard_bytes: u64::MAX })
}

/// Encodes, decodes and streams; no id is larger than the tokenizer says, and a stream gives the text of the whole.
pub fn use_tokenizer(tokenizer: &Tokenizer, more: &[u8]) {
    let texts: [&[u8]; 4] = [b"Once upon a time, 42 birds \xe9\x80\xa3\xe7\x9f\xad\n", b"<s> \xe2\x96\x81 a\xff\xc0</s>", b"", more];
    for text in texts {
        for add_special in [false, true] {
            let Ok(ids) = tokenizer.encode_bytes(text, add_special) else { continue };
            for skip_special in [false, true] {
                let mut stream = tokenizer.decode_stream(skip_special);
                let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
                streamed.push_str(&stream.finish());
                assert_eq!(streamed, tokenizer.decode(&ids, skip_special));
            }
        }
    }
    let size = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    // Every id of a small vocabulary, in an order that no text has; ids outside it mean nothing.
    let ids: Vec<u32> = (0..size.min(600)).rev().chain([size, u32::MAX]).collect();
    for &id in &ids {
        let piece = tokenizer.id_to_piece(id);
        assert!((id as usize) < tokenizer.vocab_size() || piece.is_none(), "{id} of {size}");
        let _ = (tokenizer.is_special(id), piece.and_then(|piece| tokenizer.piece_to_id(&piece)));
    }
    let mut stream = tokenizer.decode_stream(false);
    let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
    streamed.push_str(&stream.finish());
    assert_eq!(streamed, tokenizer.decode(&ids, false));
}
