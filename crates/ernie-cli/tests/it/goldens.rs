//! The program against the released family's reference implementation: logits and greedy tokens of tiny checkpoints.
//! `testdata/models/*/golden.*` were made by `testdata/scripts`.
use crate::program::ernie;
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Of logits in f32.
const LOGITS_TOLERANCE: f64 = 1e-4;

/// Directories whose golden.json has greedy tokens, with that file.
fn golden_models() -> Vec<(PathBuf, Value)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models");
    let mut models = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(bytes) = std::fs::read(dir.join("golden.json")) else { continue };
        let golden: Value = serde_json::from_slice(&bytes).unwrap();
        if golden.get("greedy").is_some() {
            models.push((dir, golden));
        }
    }
    assert!(models.len() >= 6, "only {} goldens", models.len());
    models
}

fn list(ids: &Value) -> String {
    ids.as_array().unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn greedy_tokens_are_those_of_the_reference() {
    for (dir, golden) in golden_models() {
        let greedy = &golden["greedy"];
        let count = greedy["tokens"].as_array().unwrap().len();
        let flags = ["--temperature", "0", "--ignore-eos", "--json", "--model", dir.to_str().unwrap()];
        let call = ["generate", "--ids", &list(&greedy["prompt"]), "--max-tokens", &count.to_string()];
        let output = ernie([&call[..], &flags[..]].concat()).json();
        assert_eq!(output["tokens"], greedy["tokens"], "{}", dir.display());
    }
}

#[test]
fn logits_are_those_of_the_reference() {
    let mut compared = 0;
    for (dir, golden) in golden_models() {
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let expected = tensors.tensor("logits").unwrap();
        let [batch, length, vocab] = expected.shape()[..] else { panic!("{:?}", expected.shape()) };
        let expected: Vec<f32> = expected.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(expected.len(), batch * length * vocab);
        for (row, ids) in golden["ids"].as_array().unwrap().iter().enumerate() {
            let call = ["logits", "--ids", &list(ids), "--last", &length.to_string(), "--dtype", "f32", "--model", dir.to_str().unwrap()];
            let output = ernie(call).json();
            let logits: Vec<Vec<f64>> = serde_json::from_value(output["logits"].clone()).unwrap();
            assert_eq!((logits.len(), logits[0].len()), (length, vocab));
            let worst =
                logits.iter().flatten().zip(&expected[row * length * vocab..]).map(|(a, &b)| (a - f64::from(b)).abs()).fold(0.0, f64::max);
            assert!(worst <= LOGITS_TOLERANCE, "{}: |Δ| = {worst}", dir.display());
            compared += 1;
        }
    }
    assert!(compared >= 12, "only {compared} sequences");
}
