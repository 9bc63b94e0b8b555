//! Well-formed files that are not the model their config describes, and int8 tensors without usable scales.

use ernie_checkpoint::{Checkpoint, Error, SaveDtype};
use half::bf16;

use crate::fixture::{Item, assert_error, dense, mentions_all, model, moe, tensors, well_formed, with_weights, write};

const FILE: &str = "model.safetensors";

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The dense model in a hand-made f32 file, after `change`; returns all its problems.
#[track_caller]
fn problems_after(change: impl FnOnce(&mut Vec<Item>)) -> Vec<Error> {
    let mut items = tensors(&dense());
    change(&mut items);
    let items: Vec<_> = items.into_iter().map(|(name, shape, values)| (name, "F32", shape, bytes(&values))).collect();
    let dir = with_weights(&well_formed(&items));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let problems = checkpoint.problems();
    assert_eq!(checkpoint.validate().is_err(), !problems.is_empty());
    problems
}

#[track_caller]
fn only(mut problems: Vec<Error>, mentions: &[&str]) -> Error {
    assert_eq!(problems.len(), 1, "{problems:?}");
    let problem = problems.remove(0);
    mentions_all(&problem, mentions);
    problem
}

#[test]
fn a_whole_model_has_no_problems() {
    assert_eq!(problems_after(|_| ()).len(), 0);
    for config in [dense(), moe(), crate::fixture::vision_language()] {
        Checkpoint::open(model(&config).path()).unwrap().validate().unwrap();
    }
}

#[test]
fn each_missing_tensor_is_named() {
    let count = tensors(&dense()).len();
    for i in 0..count {
        let name = tensors(&dense())[i].0.clone();
        let problems = problems_after(|items| drop(items.remove(i)));
        assert_error!(only(problems, &[FILE, &name, "missing"]), Error::MissingTensor { .. });
    }
}

#[test]
fn surplus_tensors_are_named() {
    for name in ["model.layers.2.input_layernorm.weight", "model.layers.0.mlp.gate.weight", "rubbish"] {
        let problems = problems_after(|items| items.push((name.into(), vec![12], vec![0.0; 12])));
        assert_error!(only(problems, &[FILE, name]), Error::SurplusTensor { .. });
    }
}

#[test]
fn misshapen_tensors_are_named() {
    let name = "model.layers.1.mlp.gate_proj.weight";
    let problems = problems_after(|items| {
        let item = items.iter_mut().find(|item| item.0 == name).unwrap();
        item.1.reverse();
    });
    assert_error!(only(problems, &[FILE, name, "[20, 12]", "[12, 20]"]), Error::Misshapen { .. });
}

#[test]
fn non_finite_numbers_are_named_with_their_place() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let name = "model.layers.0.mlp.up_proj.weight";
        let problems = problems_after(|items| items.iter_mut().find(|item| item.0 == name).unwrap().2[77] = value);
        assert_error!(only(problems, &[FILE, name, "77"]), Error::NonFinite { at: 77, .. });
    }
}

#[test]
fn all_problems_are_listed() {
    let problems = problems_after(|items| {
        items[3].2[5] = f32::NAN;
        items[7].2[0] = f32::INFINITY;
        items.remove(0);
        items.push(("rubbish".into(), vec![1], vec![1.0]));
    });
    assert_eq!(problems.len(), 4, "{problems:?}");
}

#[test]
fn optional_groups_come_whole_or_not_at_all() {
    let config = moe();
    let dir = tempfile::tempdir().unwrap();
    let mut items = tensors(&config);
    items.retain(|item| !item.0.contains("mtp"));
    write(dir.path(), &config, &items, SaveDtype::F32, u64::MAX).unwrap();
    Checkpoint::open(dir.path()).unwrap().validate().unwrap();

    let mut items = tensors(&config);
    items.retain(|item| item.0 != "model.mtp_block.0.mlp.down_proj.weight");
    let error = write(dir.path(), &config, &items, SaveDtype::F32, u64::MAX).unwrap_err();
    mentions_all(&error, &["model.mtp_block.0.mlp.down_proj.weight"]);
    assert_error!(error, Error::MissingTensor { .. });
}

#[test]
fn tying_is_decided_by_the_tensors() {
    // The config says tied, the file has a head.
    let problems = problems_after(|items| items.push(("lm_head.weight".into(), vec![31, 12], vec![0.5; 372])));
    assert_eq!(problems.len(), 0);
    let tied = model(&dense());
    assert!(Checkpoint::open(tied.path()).unwrap().tied());
    let untied = model(&moe());
    let untied = Checkpoint::open(untied.path()).unwrap();
    assert!(!untied.tied() && !untied.config().tie_word_embeddings);
    // The config says untied, the file has no head: tied.
    let says_untied = std::fs::read_to_string(tied.path().join("config.json")).unwrap();
    let says_untied = says_untied.replace(r#""tie_word_embeddings": true"#, r#""tie_word_embeddings": false"#);
    assert!(says_untied.contains(r#""tie_word_embeddings": false"#));
    std::fs::write(tied.path().join("config.json"), says_untied).unwrap();
    let checkpoint = Checkpoint::open(tied.path()).unwrap();
    assert!(checkpoint.tied() && checkpoint.problems().is_empty());
    // Writing is another matter: a model said to be untied that lacks its head is not whole.
    let mut config = dense();
    config.tie_word_embeddings = false;
    let problem = write(tied.path(), &config, &tensors(&dense()), SaveDtype::F32, u64::MAX).unwrap_err();
    mentions_all(&problem, &["lm_head.weight"]);
}

#[test]
fn unknown_names_are_refused() {
    let dir = model(&dense());
    let error = Checkpoint::open(dir.path()).unwrap().tensor("model.nothing").unwrap_err();
    mentions_all(&error, &[FILE, "model.nothing"]);
    assert_error!(error, Error::NoSuchTensor { .. });
}

const INT8: &str = "model.layers.0.self_attn.o_proj.weight";
const SCALE: &str = "model.layers.0.self_attn.o_proj.weight_scale";

/// The dense model with one int8 tensor [12, 24] and this scale beside it.
fn with_scale(scale: Option<(&'static str, Vec<usize>, Vec<u8>)>) -> tempfile::TempDir {
    let mut items: Vec<_> = tensors(&dense())
        .into_iter()
        .map(|(name, shape, values)| match name == INT8 {
            true => (name, "I8", shape, (0..288).map(|i| (i % 255) as u8).collect()),
            false => (name, "F32", shape, bytes(&values)),
        })
        .collect();
    items.extend(scale.map(|(dtype, shape, bytes)| (SCALE.to_owned(), dtype, shape, bytes)));
    with_weights(&well_formed(&items))
}

#[test]
fn int8_is_scaled_by_row() {
    let scales: Vec<f32> = (1..=12).map(|i| i as f32 * 0.25).collect();
    let half: Vec<u8> = scales.iter().flat_map(|&s| bf16::from_f32(s).to_le_bytes()).collect();
    for (dtype, shape, bytes) in [("F32", vec![12, 1], bytes(&scales)), ("BF16", vec![12], half)] {
        let dir = with_scale(Some((dtype, shape, bytes)));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.validate().unwrap();
        assert!(checkpoint.names().all(|name| name != SCALE));
        let tensor = checkpoint.tensor(INT8).unwrap();
        let values = tensor.to_f32().unwrap();
        for (i, &value) in values.iter().enumerate() {
            let quantised = f32::from(((i % 255) as u8).cast_signed());
            assert_eq!(value, quantised * scales[i / 24]);
        }
        assert_eq!(tensor.as_int8().unwrap().1, scales);
        let bf16s: Vec<f32> = tensor.to_bf16().unwrap().into_iter().map(bf16::to_f32).collect();
        assert!(bf16s.iter().zip(&values).all(|(b, v)| (b - v).abs() <= v.abs() / 256.0));
    }
}

#[test]
fn int8_without_usable_scales_is_refused() {
    let error = Checkpoint::open(with_scale(None).path()).unwrap_err();
    mentions_all(&error, &[FILE, INT8, SCALE, "missing"]);
    assert_error!(error, Error::Scale { rows: 12, .. });
    for (dtype, shape, count) in [("F32", vec![1, 12], 48), ("F32", vec![11], 44), ("I8", vec![12], 12)] {
        let error = Checkpoint::open(with_scale(Some((dtype, shape, vec![1; count]))).path()).unwrap_err();
        mentions_all(&error, &[FILE, INT8, SCALE]);
        assert_error!(error, Error::Scale { .. });
    }
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut scales = vec![1.0; 12];
        scales[7] = bad;
        let dir = with_scale(Some(("F32", vec![12, 1], bytes(&scales))));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let error = checkpoint.tensor(INT8).unwrap_err();
        mentions_all(&error, &[FILE, INT8, SCALE, "row 7"]);
        assert_error!(error, Error::Scale { .. });
        assert!(checkpoint.validate().is_err());
    }
}

#[test]
fn a_scale_without_an_int8_weight_is_surplus() {
    let scale = "model.layers.0.self_attn.q_proj.weight_scale";
    let problems = problems_after(|items| items.push((scale.into(), vec![24, 1], vec![1.0; 24])));
    assert_error!(only(problems, &[FILE, scale]), Error::SurplusTensor { .. });
}

#[test]
fn int8_vectors_are_refused() {
    let mut items: Vec<_> = tensors(&dense()).into_iter().map(|(name, shape, values)| (name, "F32", shape, bytes(&values))).collect();
    let norm = items.iter_mut().find(|item| item.0 == "model.norm.weight").unwrap();
    (norm.1, norm.3) = ("I8", vec![1; 12]);
    let error = Checkpoint::open(with_weights(&well_formed(&items)).path()).unwrap_err();
    mentions_all(&error, &[FILE, "model.norm.weight", "I8"]);
    assert_error!(error, Error::UnsupportedDtype { .. });
}
