//! What several targets share: tiny models, and what every tokenizer promises.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::Path;

use ernie_checkpoint::{
    Checkpoint, Config, Error, Family, QuantizeOptions, QuantizeScheme, SaveDtype, SaveOptions, Tokenizer, quantize, save,
};

/// How weights are stored.
#[derive(Clone, Copy)]
pub enum Form {
    /// As [`save`] writes them.
    Saved(SaveDtype),
    /// With experts of 4 bits.
    W4a8,
}

/// Models of a few KB of weights: name, config, and how the weights are stored.
pub fn models() -> [(&'static str, Config, Form); 4] {
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
    // Rows that groups of 32 divide.
    let mut wide = moe.clone();
    wide.hidden_size = 32;
    if let Some(experts) = &mut wide.moe {
        (experts.num_experts, experts.intermediate_size, experts.num_shared_experts) = (2, 32, 0);
    }
    [
        ("dense", dense.clone(), Form::Saved(SaveDtype::F32)),
        ("dense_int8", dense, Form::Saved(SaveDtype::Int8PerChannel)),
        ("moe", moe, Form::Saved(SaveDtype::Bf16)),
        ("moe_int4", wide, Form::W4a8),
    ]
}

/// Writes config.json and model.safetensors of a model.
pub fn write_model(directory: &Path, config: &Config, form: Form) -> Result<(), Error> {
    let specs = config.tensor_specs().into_iter().filter(|spec| !(config.tie_word_embeddings && spec.name == "lm_head.weight"));
    let tensors = specs.map(|spec| {
        let values = (0..spec.shape.iter().product()).map(|i: usize| (i % 7) as f32 - 3.0).collect();
        (spec.name, spec.shape, Cow::Owned(values))
    });
    let dtype = if let Form::Saved(dtype) = form { dtype } else { SaveDtype::F32 };
    save(directory, config, tensors, &SaveOptions { dtype, max_shard_bytes: u64::MAX })?;
    if let Form::W4a8 = form {
        let options = QuantizeOptions { scheme: QuantizeScheme::W4a8 { group: 32 }, ..QuantizeOptions::default() };
        quantize(&Checkpoint::open(directory)?, None, directory, options, &mut |_| ControlFlow::Continue(()))?;
    }
    Ok(())
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
