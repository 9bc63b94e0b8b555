//! A checkpoint in 8 bits.
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ernie_checkpoint::{Checkpoint, Dtype, Error, Quantization, QuantizeOptions, QuantizeSummary, TensorRole, quantize};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models").join(name)
}

fn run(source: &Checkpoint, out: &Path, options: QuantizeOptions) -> ernie_checkpoint::Result<Option<QuantizeSummary>> {
    quantize(source, None, out, options, &mut |_| ControlFlow::Continue(()))
}

#[test]
fn every_matrix_is_within_half_a_step_and_the_rest_exact() {
    for name in ["dense_tied", "dense_bias_mqa", "moe_k2", "moe_mtp", "moe_k3_no_shared"] {
        let (dir, source) = (tempfile::tempdir().unwrap(), Checkpoint::open(&golden(name)).unwrap());
        let summary = run(&source, dir.path(), QuantizeOptions::default()).unwrap().unwrap();
        let copy = Checkpoint::open(dir.path()).unwrap();
        copy.validate().unwrap();
        assert_eq!(copy.config().quantization, Some(Quantization::Int8PerChannel));
        assert_eq!(copy.names().collect::<Vec<_>>(), source.names().collect::<Vec<_>>(), "{name}");
        let mut largest = 0.0f64;
        for spec in source.config().tensor_specs().iter().filter(|spec| source.contains(&spec.name)) {
            let (before, after) = (source.tensor(&spec.name).unwrap(), copy.tensor(&spec.name).unwrap());
            let (exact, rounded) = (before.to_f32().unwrap(), after.to_f32().unwrap());
            if !matches!(spec.role, TensorRole::Projection | TensorRole::Embedding) {
                assert_eq!((after.dtype, exact), (Dtype::F32, rounded), "{}", spec.name);
                continue;
            }
            let (_, scales) = after.as_int8().unwrap();
            let width = spec.shape[1];
            for (row, (exact, rounded)) in exact.chunks_exact(width).zip(rounded.chunks_exact(width)).enumerate() {
                for (exact, rounded) in exact.iter().zip(rounded) {
                    assert!((exact - rounded).abs() <= 0.5001 * scales[row], "{} row {row}: {rounded} for {exact}", spec.name);
                    largest = largest.max(f64::from((exact - rounded).abs()));
                }
            }
        }
        assert!(largest > 0.0 && summary.relative_errors.values().all(|error| *error > 0.0 && *error < 0.02), "{summary:?}");
        assert_eq!(summary.relative_errors.contains_key("routed experts"), name.starts_with("moe"));
        assert_eq!(summary.bytes, summary_bytes(&copy));
    }
}

/// The data bytes of a checkpoint's tensors and scales.
fn summary_bytes(copy: &Checkpoint) -> u64 {
    let bytes = |name: &str| {
        let tensor = copy.tensor(name).unwrap();
        tensor.as_bytes().len() + tensor.as_int8().map_or(0, |(_, scales)| scales.len() * 4)
    };
    copy.names().map(|name| bytes(name) as u64).sum()
}

#[test]
fn shards_hold_the_same() {
    let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = Checkpoint::open(&golden("moe_k2")).unwrap();
    run(&source, one.path(), QuantizeOptions::default()).unwrap().unwrap();
    run(&source, many.path(), QuantizeOptions { max_shard_bytes: 5000 }).unwrap().unwrap();
    assert!(many.path().join("model.safetensors.index.json").exists() && !many.path().join("model.safetensors").exists());
    let (one, many) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(many.path()).unwrap());
    many.validate().unwrap();
    for name in one.names() {
        assert_eq!(one.tensor(name).unwrap().to_f32().unwrap(), many.tensor(name).unwrap().to_f32().unwrap());
    }
}

#[test]
fn stopping_leaves_the_directory_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("dense_tied")).unwrap();
    let mut calls = 0;
    let result = quantize(&source, Some(&golden("dense_tied")), dir.path(), QuantizeOptions::default(), &mut |at| {
        assert!(at.done <= at.total && !at.tensor.is_empty());
        calls += 1;
        if calls == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((result.unwrap(), calls), (None, 5));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was left behind");
}

#[test]
fn tokenizer_files_come_along() {
    let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in ["tokenizer.json", "generation_config.json", "chat_template.jinja", "notes.txt"] {
        std::fs::write(from.path().join(name), name).unwrap();
    }
    let source = Checkpoint::open(&golden("dense_tied")).unwrap();
    quantize(&source, Some(from.path()), out.path(), QuantizeOptions::default(), &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    assert_eq!(std::fs::read_to_string(out.path().join("tokenizer.json")).unwrap(), "tokenizer.json");
    assert!(out.path().join("chat_template.jinja").exists() && !out.path().join("notes.txt").exists());
}

#[test]
fn what_is_quantised_already_is_refused() {
    let (once, twice) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&Checkpoint::open(&golden("dense_tied")).unwrap(), once.path(), QuantizeOptions::default()).unwrap().unwrap();
    let error = run(&Checkpoint::open(once.path()).unwrap(), twice.path(), QuantizeOptions::default()).unwrap_err();
    assert!(matches!(error, Error::AlreadyQuantised { .. }) && error.to_string().contains("already"), "{error}");
    assert_eq!(std::fs::read_dir(twice.path()).unwrap().count(), 0);
}
