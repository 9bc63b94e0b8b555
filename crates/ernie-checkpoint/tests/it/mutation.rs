//! Whatever bytes a directory holds: an error or a checkpoint whose every tensor can be read, never a panic.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use ernie_checkpoint::{Checkpoint, Config, SaveDtype};
use proptest::prelude::*;

use crate::fixture::{dense, int4_model, moe, sharded_model, tensors, write};

/// Reads everything that can be read.
fn use_it(dir: &Path) {
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    for problem in checkpoint.problems() {
        assert!(!problem.to_string().is_empty());
    }
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            let elements: usize = tensor.shape.iter().product();
            assert_eq!(tensor.to_f32().unwrap().len(), elements);
            assert_eq!(tensor.to_bf16().unwrap().len(), elements);
        }
    }
}

struct Original {
    config: Vec<u8>,
    weights: Vec<u8>,
}

fn original(config: &Config, dtype: SaveDtype) -> Original {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, &tensors(config), dtype, u64::MAX).unwrap();
    read_original(dir.path())
}

fn read_original(dir: &Path) -> Original {
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    Original { config: read("config.json"), weights: read("model.safetensors") }
}

static ORIGINALS: LazyLock<[Original; 4]> = LazyLock::new(|| {
    [
        original(&dense(), SaveDtype::F32),
        original(&dense(), SaveDtype::Int8PerChannel),
        original(&moe(), SaveDtype::Bf16),
        read_original(int4_model().path()),
    ]
});

/// Positions are shares of the length, mostly in the first part, where headers are.
fn mutate(bytes: &mut Vec<u8>, edits: &[(f64, u8)], keep: Option<f64>) {
    for &(share, value) in edits {
        let at = ((share * share * bytes.len() as f64) as usize).min(bytes.len() - 1);
        bytes[at] = value;
    }
    if let Some(keep) = keep {
        bytes.truncate((keep * bytes.len() as f64) as usize);
    }
}

fn edits() -> impl Strategy<Value = Vec<(f64, u8)>> {
    // Digits, quotes and brackets keep JSON alive more often than random bytes do.
    let byte = prop_oneof![any::<u8>(), (b'0'..=b'9'), prop::sample::select(b"[]{}\",:- eE.".to_vec())];
    prop::collection::vec((0.0..1.0, byte), 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_weights_never_panic(which in 0..4_usize, edits in edits(), keep in prop::option::of(0.0..1.0)) {
        let original = &ORIGINALS[which];
        let mut weights = original.weights.clone();
        mutate(&mut weights, &edits, keep);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), &original.config).unwrap();
        fs::write(dir.path().join("model.safetensors"), weights).unwrap();
        use_it(dir.path());
    }

    #[test]
    fn mutated_configs_never_panic(which in 0..4_usize, edits in edits(), keep in prop::option::of(0.5..1.0)) {
        let original = &ORIGINALS[which];
        let mut config = original.config.clone();
        // Spread over the whole text: it is all header.
        let edits: Vec<_> = edits.into_iter().map(|(share, value)| (share.sqrt(), value)).collect();
        mutate(&mut config, &edits, keep);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        fs::write(dir.path().join("model.safetensors"), &original.weights).unwrap();
        if let Ok(config) = Config::from_dir(dir.path()) {
            let written = config.to_json().to_string();
            let again = Config::from_json(&written, Path::new("again.json")).unwrap();
            prop_assert_eq!(again.to_json().to_string(), written);
            let _ = config.parameter_counts();
        }
        use_it(dir.path());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_indexes_never_panic(edits in edits(), keep in prop::option::of(0.5..1.0)) {
        let dir = sharded_model(&moe());
        let path = dir.path().join("model.safetensors.index.json");
        let mut index = fs::read(&path).unwrap();
        mutate(&mut index, &edits, keep);
        fs::write(&path, index).unwrap();
        use_it(dir.path());
    }
}
