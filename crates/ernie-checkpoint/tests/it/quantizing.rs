//! A checkpoint in 8 bits.
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ernie_checkpoint::{
    Checkpoint, Dtype, Error, Quantization, QuantizeOptions, QuantizeScheme, QuantizeSummary, TensorGroup, TensorRole, quantize,
};
use serde_json::json;

use crate::fixture::{header_of, int4_model, mentions_all, model, rewrite_header, wide_moe};

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
    run(&source, many.path(), QuantizeOptions { max_shard_bytes: 5000, ..QuantizeOptions::default() }).unwrap().unwrap();
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

#[test]
fn experts_in_four_bits_are_within_half_a_step_but_where_cutting_off_is_better() {
    let (from, dir) = (model(&wide_moe()), int4_model());
    let (source, copy) = (Checkpoint::open(from.path()).unwrap(), Checkpoint::open(dir.path()).unwrap());
    copy.validate().unwrap();
    assert_eq!(copy.config().quantization, Some(Quantization::Int4Experts { group: 32 }));
    assert_eq!(copy.names().collect::<Vec<_>>(), source.names().collect::<Vec<_>>());
    let mut experts = 0;
    for spec in source.config().tensor_specs().iter().filter(|spec| source.contains(&spec.name)) {
        let (before, after) = (source.tensor(&spec.name).unwrap(), copy.tensor(&spec.name).unwrap());
        assert_eq!((copy.dtype(&spec.name), &after.shape), (Some(after.dtype), &spec.shape));
        let routed = spec.group == TensorGroup::RoutedExpert && spec.role == TensorRole::Projection;
        assert_eq!(after.dtype == Dtype::I4, routed, "{}", spec.name);
        let Some(weights) = after.as_int4() else { continue };
        experts += 1;
        assert_eq!((weights.group, weights.bytes.len() * 2, after.len()), (32, before.len(), before.len()));
        let (exact, rounded) = (before.to_f32().unwrap(), after.to_f32().unwrap());
        let (mut errors, mut squares) = (0.0, 0.0);
        for (i, (exact, rounded)) in exact.iter().zip(&rounded).enumerate() {
            let scale = weights.scales[i / 32];
            let beyond = (exact.abs() - 7.0 * scale).max(0.0);
            assert!((exact - rounded).abs() <= 0.5001 * scale + beyond, "{} at {i}: {rounded} for {exact}", spec.name);
            (errors, squares) = (errors + (exact - rounded).powi(2), squares + exact.powi(2));
        }
        assert!(errors / squares < 0.08 * 0.08, "{}: {}", spec.name, (errors / squares).sqrt());
        let width = spec.shape[1];
        assert_eq!(after.rows_to_f32(3..5), rounded[3 * width..5 * width]);
    }
    assert_eq!(experts, 2 * 5 * 3);
}

#[test]
fn rows_that_cannot_be_cut_and_models_without_experts_are_refused() {
    let w4a8 = |group| QuantizeOptions { scheme: QuantizeScheme::W4a8 { group }, ..QuantizeOptions::default() };
    let out = tempfile::tempdir().unwrap();
    for (name, group, words) in [("moe_k2", 32, "groups of 32"), ("dense_tied", 32, "no routed experts"), ("moe_k2", 48, "groups of 48")] {
        let error = run(&Checkpoint::open(&golden(name)).unwrap(), out.path(), w4a8(group)).unwrap_err();
        mentions_all(&error, &["model.safetensors", words]);
    }
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
    let from = model(&wide_moe());
    let error = run(&Checkpoint::open(from.path()).unwrap(), out.path(), w4a8(64)).unwrap_err();
    mentions_all(&error, &["mlp.experts.0.down_proj.weight", "rows of 32", "groups of 64"]);
}

#[test]
fn packed_tensors_whose_parts_do_not_fit_are_refused_by_name() {
    let stem = "model.layers.1.mlp.experts.0.gate_proj.weight";
    let (packed, scale, shape) = (format!("{stem}_packed"), format!("{stem}_scale"), format!("{stem}_shape"));
    let open = |dir: &Path| Checkpoint::open(dir).and_then(|checkpoint| checkpoint.validate());
    for (tensor, field, value, words) in [
        (&packed, "dtype", json!("F32"), "expected a matrix of I32"),
        (&packed, "shape", json!([256]), "expected a matrix of I32"),
        (&packed, "shape", json!([16, 16]), "weight_shape"),
        (&scale, "shape", json!([2, 32]), "groups that divide 64 columns"),
        (&shape, "dtype", json!("F32"), "expected I64 or I32"),
    ] {
        let dir = int4_model();
        rewrite_header(&dir.path().join("model.safetensors"), |header| {
            header[tensor.as_str()][field] = value.clone();
            if field == "dtype" && tensor == &shape {
                header[tensor.as_str()]["shape"] = json!([4]);
            }
        });
        mentions_all(&open(dir.path()).unwrap_err(), &["model.safetensors", "gate_proj.weight", words]);
    }
    // A part under another name leaves one missing and one too many.
    for part in [&scale, &packed, &shape] {
        let dir = int4_model();
        rewrite_header(&dir.path().join("model.safetensors"), |header| {
            let entry = header.as_object_mut().unwrap().remove(part.as_str()).unwrap();
            header[format!("other.{part}")] = entry;
        });
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(stem) || error.contains("other."), "{error}");
    }
    // A scale that is no number.
    let dir = int4_model();
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = 8 + header_of(&bytes).1 + header_of(&bytes).0[scale.as_str()]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(&path, bytes).unwrap();
    mentions_all(&open(dir.path()).unwrap_err(), &["model.safetensors", stem, "NaN"]);
    // Integers that are nobody's weights.
    let dir = int4_model();
    rewrite_header(&dir.path().join("model.safetensors"), |header| {
        let norm = &mut header["model.norm.weight"];
        norm["dtype"] = json!("I32");
    });
    mentions_all(&open(dir.path()).unwrap_err(), &["model.norm.weight", "I32"]);
}
