//! Layouts: the `-Paddle` layout must read as the same tensors as the Hugging Face layout.

use std::fs;

use ernie_checkpoint::{Checkpoint, Config, Error, Layout, SaveDtype};
use half::{bf16, f16};

use crate::fixture::{Item, assert_error, dense, mentions_all, model, moe, open_error, tensors, vision_language, well_formed, write};

/// [out, in] to [in, out].
fn transposed(shape: &[usize], values: &[f32]) -> (Vec<usize>, Vec<f32>) {
    let (out, input) = (shape[0], shape[1]);
    let values = (0..input * out).map(|i| values[i % out * input + i / out]).collect();
    (vec![input, out], values)
}

/// The tensors as a -Paddle release has them: prefix, q|k|v and gate|up side by side, matrices [in, out].
fn paddle_items(config: &Config, fused: bool) -> Vec<Item> {
    let items = tensors(config);
    let find = |name: &str| items.iter().find(|item| item.0 == name).unwrap();
    let mut out = Vec::new();
    for (name, shape, values) in &items {
        let part = name.rsplit('.').nth(1).unwrap();
        let fuse: &[&str] = match part {
            "q_proj" => &["q_proj", "k_proj", "v_proj"],
            "gate_proj" => &["gate_proj", "up_proj"],
            _ => &[],
        };
        let new_name = |name: &str| match name.strip_prefix("model.") {
            Some(rest) => format!("ernie.{rest}"),
            None => name.to_owned(),
        };
        let as_stored = shape.len() == 1
            || name.contains("embed_tokens")
            || name.contains("correction_bias")
            || (config.vl.is_some() && name.contains("mlp.gate.weight"));
        if fused && ["k_proj", "v_proj", "up_proj"].contains(&part) {
            continue;
        }
        if fused && !fuse.is_empty() {
            let parts: Vec<_> = fuse.iter().map(|p| find(&name.replace(part, p))).collect();
            let fused_name = new_name(&name.replace(part, if part == "q_proj" { "qkv_proj" } else { "up_gate_proj" }));
            let rows: usize = parts.iter().map(|p| p.1[0]).sum();
            let stacked: Vec<f32> = parts.iter().flat_map(|p| p.2.iter().copied()).collect();
            match shape.as_slice() {
                [_, input] => {
                    let (shape, values) = transposed(&[rows, *input], &stacked);
                    out.push((fused_name, shape, values));
                }
                _ => out.push((fused_name, vec![rows], stacked)),
            }
        } else if as_stored {
            out.push((new_name(name), shape.clone(), values.clone()));
        } else {
            let (shape, values) = transposed(shape, values);
            out.push((new_name(name), shape, values));
        }
    }
    out
}

fn paddle_model(config: &Config, items: &[Item], dtype: &'static str) -> tempfile::TempDir {
    let bytes = |values: &[f32]| -> Vec<u8> {
        match dtype {
            "F32" => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            "BF16" => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        }
    };
    let stored: Vec<_> = items.iter().map(|(n, s, v)| (n.clone(), dtype, s.clone(), bytes(v))).collect();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_json().to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), well_formed(&stored)).unwrap();
    dir
}

#[track_caller]
fn assert_same(paddle: &Checkpoint, hugging_face: &Checkpoint) {
    assert_eq!(paddle.layout(), Layout::Paddle);
    assert_eq!(hugging_face.layout(), Layout::HuggingFace);
    paddle.validate().unwrap();
    assert!(paddle.names().eq(hugging_face.names()));
    for name in hugging_face.names() {
        let (a, b) = (paddle.tensor(name).unwrap(), hugging_face.tensor(name).unwrap());
        assert_eq!(a.shape, b.shape, "{name}");
        assert_eq!(a.to_f32().unwrap(), b.to_f32().unwrap(), "{name}");
    }
}

fn square() -> Config {
    let mut config = dense();
    // q, o, k, v, gate, up, down and the head all square: nothing but the names tells the layout.
    (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) = (12, 2, 2);
    (config.vocab_size, config.tie_word_embeddings) = (12, false);
    config
}

#[test]
fn equals_the_hugging_face_layout() {
    let mut with_bias = moe();
    with_bias.use_bias = true;
    for config in [dense(), moe(), with_bias, vision_language(), square()] {
        let hugging_face = model(&config);
        let hugging_face = Checkpoint::open(hugging_face.path()).unwrap();
        for fused in [true, false] {
            let dir = paddle_model(&config, &paddle_items(&config, fused), "F32");
            assert_same(&Checkpoint::open(dir.path()).unwrap(), &hugging_face);
        }
    }
}

#[test]
fn half_precision_is_split_and_transposed_too() {
    let config = moe();
    let items = paddle_items(&config, true);
    let want = tensors(&config);
    for (dtype, round) in [("BF16", (|x| bf16::from_f32(x).to_f32()) as fn(f32) -> f32), ("F16", |x| f16::from_f32(x).to_f32())] {
        let dir = paddle_model(&config, &items, dtype);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.validate().unwrap();
        for (name, shape, values) in &want {
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!(&tensor.shape, shape);
            let rounded: Vec<f32> = values.iter().map(|&x| round(x)).collect();
            assert_eq!(tensor.to_f32().unwrap(), rounded, "{name}");
        }
    }
}

#[test]
fn the_mtp_projection_is_read_in_either_orientation() {
    let config = moe();
    let name = "model.mtp_linear_proj.0.weight";
    let mut items = tensors(&config);
    let whole = items.clone();
    let projection = items.iter_mut().find(|item| item.0 == name).unwrap();
    (projection.1, projection.2) = transposed(&projection.1, &projection.2);
    // Hugging Face layout otherwise, as the 300B release.
    let hugging_face = paddle_model(&config, &items, "F32");
    let checkpoint = Checkpoint::open(hugging_face.path()).unwrap();
    assert_eq!(checkpoint.layout(), Layout::HuggingFace);
    checkpoint.validate().unwrap();
    let want = whole.iter().find(|item| item.0 == name).unwrap();
    assert_eq!(checkpoint.tensor(name).unwrap().shape, [12, 24]);
    assert_eq!(checkpoint.tensor(name).unwrap().to_f32().unwrap(), want.2);
    // Untransposed inside the -Paddle layout.
    let mut items = paddle_items(&config, true);
    let projection = items.iter_mut().find(|item| item.0 == "ernie.mtp_linear_proj.0.weight").unwrap();
    (projection.1, projection.2) = (want.1.clone(), want.2.clone());
    let paddle = paddle_model(&config, &items, "F32");
    assert_eq!(Checkpoint::open(paddle.path()).unwrap().tensor(name).unwrap().to_f32().unwrap(), want.2);
}

#[test]
fn the_vision_transformer_is_found_where_transformers_puts_it() {
    let config = vision_language();
    let mut items = tensors(&config);
    for item in items.iter_mut().filter(|item| item.0.starts_with("vision_model.")) {
        item.0.insert_str(0, "model.");
    }
    let dir = paddle_model(&config, &items, "F32");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.layout(), Layout::HuggingFace);
    checkpoint.validate().unwrap();
}

#[test]
fn fused_tensors_of_other_sizes_are_refused() {
    for (part, mentions) in [("qkv_proj", "[12, 48]"), ("up_gate_proj", "[12, ")] {
        let mut items = paddle_items(&dense(), true);
        let item = items.iter_mut().find(|item| item.0.contains(part)).unwrap();
        let columns = item.1[1] - 1;
        item.1[1] = columns;
        item.2.truncate(12 * columns);
        let name = item.0.clone();
        let dir = paddle_model(&dense(), &items, "F32");
        let error = open_error(dir.path(), &["model.safetensors", &name, mentions]);
        assert_error!(error, Error::Misshapen { .. });
    }
}

#[test]
fn fused_beside_unfused_is_refused() {
    let mut items = paddle_items(&dense(), true);
    items.push(("ernie.layers.0.self_attn.q_proj.weight".into(), vec![12, 24], vec![0.0; 288]));
    let dir = paddle_model(&dense(), &items, "F32");
    let error = open_error(dir.path(), &["model.layers.0.self_attn.q_proj.weight"]);
    assert_error!(error, Error::DuplicateTensor { .. });
}

#[test]
fn converting_is_reading_and_saving() {
    let config = moe();
    let paddle = paddle_model(&config, &paddle_items(&config, true), "F32");
    let checkpoint = Checkpoint::open(paddle.path()).unwrap();
    let items: Vec<Item> = checkpoint
        .names()
        .map(|name| {
            let tensor = checkpoint.tensor(name).unwrap();
            (name.to_owned(), tensor.shape.clone(), tensor.to_f32().unwrap())
        })
        .collect();
    // Over itself: the old file stays mapped while its replacement is written.
    write(paddle.path(), checkpoint.config(), &items, SaveDtype::F32, u64::MAX).unwrap();
    assert_same(&checkpoint, &Checkpoint::open(paddle.path()).unwrap());
}

#[test]
fn int8_in_the_paddle_layout_is_refused() {
    let mut items: Vec<_> = paddle_items(&dense(), true)
        .into_iter()
        .map(|(n, s, v)| (n, "F32", s, v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()))
        .collect();
    let item = items.iter_mut().find(|item| item.0.contains("o_proj")).unwrap();
    (item.1, item.3) = ("I8", vec![1; 288]);
    let name = item.0.clone();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), dense().to_json().to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), well_formed(&items)).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    mentions_all(&error, &["model.safetensors", &name, "I8"]);
    assert_error!(error, Error::UnsupportedDtype { .. });
}
