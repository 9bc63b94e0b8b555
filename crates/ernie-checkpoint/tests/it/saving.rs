//! Saving: every dtype, sharded or not, over another model, and refusals that leave the old model alone.

use std::fs;
use std::path::Path;

use ernie_checkpoint::{Checkpoint, Config, Dtype, Error, Quantization, SaveDtype};
use half::bf16;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::fixture::{Item, assert_error, dense, mentions_all, model, moe, shard_count, tensors, vision_language, write};

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_reads(dir: &Path, items: &[Item], tolerance: impl Fn(&str, &[f32], usize) -> f32) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.validate().unwrap();
    assert_eq!(checkpoint.names().count(), items.len());
    for (name, shape, values) in items {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!(&tensor.shape, shape);
        for (i, (got, want)) in tensor.to_f32().unwrap().iter().zip(values).enumerate() {
            assert!((got - want).abs() <= tolerance(name, values, i), "{name}[{i}]: {got} {want}");
        }
    }
}

#[test]
fn f32_is_exact_single_and_sharded() {
    for config in [dense(), moe(), vision_language()] {
        let items = tensors(&config);
        for max_shard_bytes in [u64::MAX, 5000, 0] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &config, &items, SaveDtype::F32, max_shard_bytes).unwrap();
            assert_reads(dir.path(), &items, |_, _, _| 0.0);
            match max_shard_bytes {
                u64::MAX => assert_eq!(files(dir.path()), ["config.json", "model.safetensors"]),
                5000 => assert!(shard_count(dir.path()) > 1),
                _ => assert_eq!(shard_count(dir.path()), items.len()),
            }
        }
    }
}

#[test]
fn bf16_rounds_matrices_and_keeps_the_router_and_vectors() {
    let config = moe();
    let items = tensors(&config);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config, &items, SaveDtype::Bf16, u64::MAX).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (name, shape, values) in &items {
        let tensor = checkpoint.tensor(name).unwrap();
        let router = name.contains("mlp.gate.") || name.contains("correction_bias");
        if shape.len() == 1 || router {
            assert_eq!(tensor.dtype, Dtype::F32, "{name}");
            assert_eq!(&tensor.to_f32().unwrap(), values);
            assert_eq!(tensor.as_f32().unwrap(), values);
        } else {
            let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            assert_eq!(tensor.dtype, Dtype::Bf16, "{name}");
            assert_eq!(tensor.to_bf16().unwrap(), rounded);
            assert_eq!(tensor.as_bf16().unwrap(), rounded);
        }
    }
    let written: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((&written["dtype"], written.get("quantization_config")), (&json!("bfloat16"), None));
}

#[test]
fn int8_is_within_half_a_step_of_its_row() {
    let config = moe();
    let items = tensors(&config);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config, &items, SaveDtype::Int8PerChannel, 4000).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config().quantization, Some(Quantization::Int8PerChannel));
    assert_eq!(checkpoint.dtype("model.embed_tokens.weight"), Some(Dtype::I8));
    assert_eq!(checkpoint.dtype("model.layers.1.mlp.gate.weight"), Some(Dtype::F32));
    let shapes: std::collections::HashMap<_, _> = items.iter().map(|item| (item.0.as_str(), &item.1)).collect();
    assert_reads(dir.path(), &items, |name, values, i| {
        if checkpoint.dtype(name) == Some(Dtype::F32) {
            return 0.0;
        }
        let row = shapes[name][1];
        let largest = values[i / row * row..][..row].iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        largest / 127.0 * 0.501
    });
    // Saving what was read gives the same int8: the row's largest element is ±127 again.
    let again: Vec<Item> = checkpoint
        .names()
        .map(|name| {
            let tensor = checkpoint.tensor(name).unwrap();
            (name.to_owned(), tensor.shape.clone(), tensor.to_f32().unwrap())
        })
        .collect();
    let second = tempfile::tempdir().unwrap();
    write(second.path(), checkpoint.config(), &again, SaveDtype::Int8PerChannel, u64::MAX).unwrap();
    let second = Checkpoint::open(second.path()).unwrap();
    for name in checkpoint.names() {
        assert_eq!(checkpoint.tensor(name).unwrap().as_bytes(), second.tensor(name).unwrap().as_bytes(), "{name}");
    }
    // And saved as bf16, the config no longer claims quantisation.
    let third = tempfile::tempdir().unwrap();
    write(third.path(), checkpoint.config(), &again, SaveDtype::Bf16, u64::MAX).unwrap();
    assert_eq!(Checkpoint::open(third.path()).unwrap().config().quantization, None);
}

/// Every matrix that is not int8 in the files is of an ignored module, and none that is int8.
#[test]
fn an_int8_config_names_what_is_not_quantised() {
    let mut untied = moe();
    untied.tie_word_embeddings = false;
    let mut foreign = dense();
    foreign.quantization = Some(Quantization::Int8PerChannel);
    let mut json = foreign.to_json();
    json["quantization_config"]["ignore"] = json!(["re:.*down_proj"]);
    let foreign = Config::from_json(&json.to_string(), Path::new("config.json")).unwrap();
    for (config, expected) in [
        (untied, json!(["re:.*mlp\\.gate$"])),
        (dense(), json!(["re:.*mlp\\.gate$", "lm_head"])),
        (foreign, json!(["re:.*mlp\\.gate$", "lm_head"])),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config, &tensors(&config), SaveDtype::Int8PerChannel, u64::MAX).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(written["quantization_config"]["ignore"], expected);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for spec in config.tensor_specs().iter().filter(|spec| checkpoint.contains(&spec.name) && spec.name.ends_with("proj.weight")) {
            assert_eq!(checkpoint.dtype(&spec.name), Some(Dtype::I8), "{}", spec.name);
        }
        assert_eq!(checkpoint.contains("lm_head.weight"), !config.tie_word_embeddings);
    }
}

#[test]
fn the_safetensors_crate_reads_what_we_write_and_we_what_it_writes() {
    let config = moe();
    let items = tensors(&config);
    let dir = model(&config);
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), items.len());
    let views = items.iter().map(|(name, shape, values)| {
        let view = read.tensor(name).unwrap();
        assert_eq!(view.shape(), shape);
        assert_eq!(view.data(), values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        (name.clone(), view)
    });
    let theirs = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    fs::write(dir.path().join("model.safetensors"), theirs).unwrap();
    assert_reads(dir.path(), &items, |_, _, _| 0.0);
}

#[test]
fn the_file_does_not_depend_on_the_order_of_the_tensors() {
    let config = moe();
    let mut items = tensors(&config);
    let dir = model(&config);
    let forwards = fs::read(dir.path().join("model.safetensors")).unwrap();
    items.reverse();
    write(dir.path(), &config, &items, SaveDtype::F32, u64::MAX).unwrap();
    assert_eq!(fs::read(dir.path().join("model.safetensors")).unwrap(), forwards);
}

#[test]
fn a_new_model_replaces_the_old_one_whole() {
    let dir = tempfile::tempdir().unwrap();
    let other = ["README.md", "tokenizer.json", "optimizer.safetensors"];
    for name in other {
        fs::write(dir.path().join(name), "mine").unwrap();
    }
    let steps = [(moe(), 4000), (dense(), u64::MAX), (vision_language(), 3000), (moe(), 9000), (dense(), 2000)];
    for (config, max_shard_bytes) in steps {
        let items = tensors(&config);
        write(dir.path(), &config, &items, SaveDtype::F32, max_shard_bytes).unwrap();
        assert_reads(dir.path(), &items, |_, _, _| 0.0);
        let names = files(dir.path());
        let ours = names.iter().filter(|name| name.starts_with("model")).count();
        let shards = shard_count(dir.path());
        assert_eq!(ours, if shards == 0 { 1 } else { shards + 1 }, "{names:?}");
        assert_eq!(names.len(), ours + 1 + other.len(), "{names:?}");
    }
    for name in other {
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), "mine");
    }
}

#[test]
fn what_is_not_a_whole_model_is_refused_and_the_old_one_stays() {
    type Change = fn(&mut Config, &mut Vec<Item>);
    let cases: [(&str, Change); 9] = [
        ("model.norm.weight", |_, items| items.retain(|item| item.0 != "model.norm.weight")),
        ("rubbish", |_, items| items.push(("rubbish".into(), vec![1], vec![0.0]))),
        ("model.norm.weight", |_, items| items.push(("model.norm.weight".into(), vec![12], vec![0.0; 12]))),
        ("embed_tokens", |_, items| items[0].1.reverse()),
        ("embed_tokens", |_, items| items[0].2.truncate(7)),
        ("embed_tokens", |_, items| items[0].2[3] = f32::NAN),
        ("lm_head.weight", |config, _| config.tie_word_embeddings = false),
        ("num_key_value_heads", |config, _| config.num_key_value_heads = 3),
        ("hidden_size", |config, _| config.hidden_size = usize::MAX),
    ];
    let old = tensors(&dense());
    for dtype in [SaveDtype::F32, SaveDtype::Bf16, SaveDtype::Int8PerChannel] {
        for (mention, change) in cases {
            let dir = model(&dense());
            let before = files(dir.path());
            let (mut config, mut items) = (dense(), old.clone());
            change(&mut config, &mut items);
            let error = write(dir.path(), &config, &items, dtype, 2000).unwrap_err();
            mentions_all(&error, &[mention]);
            assert_eq!(files(dir.path()), before, "{error}");
            assert_reads(dir.path(), &old, |_, _, _| 0.0);
        }
    }
}

#[test]
fn an_overflow_in_rounding_is_refused() {
    let dir = model(&dense());
    let mut items = tensors(&dense());
    items[0].2[5] = f32::MAX;
    let error = write(dir.path(), &dense(), &items, SaveDtype::Bf16, u64::MAX).unwrap_err();
    mentions_all(&error, &["model.embed_tokens.weight", "5"]);
    assert_error!(error, Error::NonFinite { at: 5, .. });
}

#[test]
fn a_file_where_the_directory_should_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    fs::write(&path, "a file").unwrap();
    let error = write(&path, &dense(), &tensors(&dense()), SaveDtype::F32, u64::MAX).unwrap_err();
    assert_error!(error, Error::Io { .. });
    assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
}

/// Names the directory to the child process of the next test, which is the test itself again.
const SAVE_INTO: &str = "ERNIE_TEST_SAVE_INTO";

#[test]
fn a_save_killed_at_any_time_leaves_a_whole_model() {
    if let Ok(dir) = std::env::var(SAVE_INTO) {
        let models = [dense(), moe()].map(|config| (tensors(&config), config));
        for i in 0.. {
            let (items, config) = &models[i % 2];
            write(Path::new(&dir), config, items, SaveDtype::F32, [4000, u64::MAX][i / 2 % 2]).unwrap();
        }
    }
    let dir = model(&dense());
    let config_file = dir.path().join("config.json");
    let written = || fs::metadata(&config_file).unwrap().modified().unwrap();
    for round in 0..25_u64 {
        let before = written();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "saving::a_save_killed_at_any_time_leaves_a_whole_model"])
            .env(SAVE_INTO, dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Let it save at least once, then kill it at some point of a later save.
        while written() == before {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(round * 7919 % 40_000));
        child.kill().unwrap();
        child.wait().unwrap();
        Checkpoint::open(dir.path()).unwrap().validate().unwrap();
    }
}

#[test]
fn readers_during_saves_see_one_model_or_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (dense(), moe());
    let models = [(&small, tensors(&small)), (&large, tensors(&large))];
    write(dir.path(), &small, &models[0].1, SaveDtype::F32, 4000).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for i in 1..40 {
                let (config, items) = &models[i % 2];
                write(dir.path(), config, items, SaveDtype::F32, [4000, u64::MAX][i / 2 % 2]).unwrap();
            }
        });
        let mut opened = 0;
        while !writer.is_finished() {
            Checkpoint::open(dir.path()).unwrap().validate().unwrap();
            opened += 1;
        }
        assert!(opened > 0);
    });
}
