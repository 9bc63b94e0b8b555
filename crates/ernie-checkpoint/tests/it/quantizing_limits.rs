//! What rounding a checkpoint takes of the machine: memory, and room on the disk.
use std::fs::{self, File};
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;

use ernie_checkpoint::{Checkpoint, Config, Error, QuantizeOptions, QuantizeScheme, quantize};
use serde_json::{Value, json};

use crate::fixture::{dense, mentions_all, model, wide_moe};

/// A directory whose bf16 weights are one file of zeros that the disk need not hold; `None` if the file system has no files of that size.
fn sparse_model(config: &Config) -> Option<tempfile::TempDir> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_json().to_string()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0u64);
    for spec in config.tensor_specs().iter().filter(|spec| !(config.tie_word_embeddings && spec.name == "lm_head.weight")) {
        let begin = end;
        end += 2 * spec.shape.iter().map(|&n| n as u64).product::<u64>();
        header.insert(spec.name.clone(), json!({"dtype": "BF16", "shape": spec.shape, "data_offsets": [begin, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).ok()?;
    Some(dir)
}

/// Bytes that an unprivileged user may write where `dir` is.
#[cfg(unix)]
fn free_bytes(dir: &Path) -> u64 {
    let disk = rustix::fs::statvfs(dir).unwrap();
    disk.f_bavail * disk.f_frsize
}

#[test]
#[cfg(unix)]
fn a_disk_too_small_is_refused_before_anything_is_written() {
    // 4 TiB in bf16, 2 TiB in 8 bits.
    let mut config = dense();
    config.vocab_size = 1 << 23;
    config.hidden_size = 1 << 18;
    let Some(from) = sparse_model(&config) else {
        eprintln!("not checked: no files of 4 TiB here");
        return;
    };
    let out = tempfile::tempdir().unwrap();
    if free_bytes(out.path()) > 2 << 40 {
        eprintln!("not checked: more than 2 TiB are free here");
        return;
    }
    fs::write(out.path().join("config.json"), "of the one before").unwrap();
    let source = Checkpoint::open(from.path()).unwrap();
    let mut called = false;
    let error = quantize(&source, None, out.path(), QuantizeOptions::default(), &mut |_| {
        called = true;
        ControlFlow::Continue(())
    });
    let error = error.unwrap_err();
    assert!(matches!(error, Error::DiskFull { needed, free, .. } if needed > 2 << 40 && free < needed), "{error:?}");
    mentions_all(&error, &[&out.path().display().to_string()]);
    assert!(!called);
    assert_eq!(fs::read_to_string(out.path().join("config.json")).unwrap(), "of the one before");
    let others: Vec<_> = fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(others, ["config.json"], "left behind");
}

#[test]
fn memory_is_under_twice_the_largest_tensor_in_its_own_form() {
    let mut plain = dense();
    (plain.vocab_size, plain.hidden_size, plain.intermediate_size) = (8192, 96, 8192);
    let mut experts = wide_moe();
    (experts.vocab_size, experts.hidden_size) = (2048, 96);
    experts.moe.as_mut().unwrap().intermediate_size = 2048;
    for (config, scheme) in [(plain, QuantizeScheme::W8a8), (experts, QuantizeScheme::W4a8 { group: 32 })] {
        let from = model(&config);
        let source = Checkpoint::open(from.path()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let options = QuantizeOptions { scheme, ..QuantizeOptions::default() };
        let (mut largest, mut all) = (0, 0);
        for spec in config.tensor_specs() {
            let bytes = 4 * spec.shape.iter().product::<usize>() as u64;
            (largest, all) = (largest.max(bytes), all + bytes);
        }
        // The source is a map, so what is allocated is all that is held.
        let counted = allocation_counter::measure(|| {
            quantize(&source, Some(from.path()), out.path(), options, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
        });
        assert!(counted.bytes_max < 2 * largest, "{scheme:?}: {} bytes at once, the largest tensor has {largest}", counted.bytes_max);
        assert!(all > 4 * largest, "a whole model in memory would pass");
    }
}
