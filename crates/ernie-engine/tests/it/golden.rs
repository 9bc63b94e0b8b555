//! What transformers computed for tiny random models (see testdata/README.md), and their weights.
use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ernie_checkpoint::{
    AttentionKind, Checkpoint, Config, Mechanisms, QuantizeOptions, QuantizeScheme, SaveDtype, SaveOptions, TensorRole, quantize, save,
};
use ernie_engine::{Model, WeightDtype};
use safetensors::SafeTensors;
use serde_json::Value;

/// One model directory with its expected values.
pub struct Golden {
    pub name: String,
    pub dir: PathBuf,
    /// Sequences that were run.
    pub ids: Vec<Vec<u32>>,
    /// Logits of each of them: `[tokens, vocab]`.
    pub logits: Vec<Vec<f32>>,
    /// Logits of the token after the next, `[tokens − 1, vocab]` each; empty for a model that has no block for them.
    pub mtp_logits: Vec<Vec<f32>>,
    pub prompt: Vec<u32>,
    /// What greedy decoding appends to `prompt`.
    pub greedy: Vec<u32>,
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models")
}

fn numbers(json: &Value) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

impl Golden {
    /// Every model that has weights. A directory with the same weights in another form takes the expected values of the first.
    pub fn all() -> Vec<Golden> {
        let mut dirs: Vec<PathBuf> = std::fs::read_dir(models()).unwrap().map(|entry| entry.unwrap().path()).collect();
        dirs.sort();
        let goldens: Vec<Golden> = dirs.into_iter().filter(|dir| dir.join("golden.json").exists()).map(Golden::read).collect();
        assert!(goldens.len() >= 16, "only {} models in {}", goldens.len(), models().display());
        goldens
    }

    /// One by its name.
    pub fn named(name: &str) -> Golden {
        Golden::read(models().join(name))
    }

    fn read(dir: PathBuf) -> Golden {
        let json = |dir: &Path| serde_json::from_slice::<Value>(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let values = json(&dir).get("same_values_as").map_or(dir.clone(), |other| models().join(other.as_str().unwrap()));
        let expected = json(&values);
        let ids: Vec<Vec<u32>> = expected["ids"].as_array().unwrap().iter().map(numbers).collect();
        let bytes = std::fs::read(values.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let tensor = file.tensor(name).ok();
            let bytes = tensor.as_ref().map_or(&[][..], |tensor| tensor.data());
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let (logits, mtp_logits) = (values("logits"), values("mtp_logits"));
        Golden {
            name: dir.file_name().unwrap().to_str().unwrap().to_owned(),
            logits: logits.chunks_exact(logits.len() / ids.len()).map(<[f32]>::to_vec).collect(),
            mtp_logits: mtp_logits.chunks_exact((mtp_logits.len() / ids.len()).max(1)).map(<[f32]>::to_vec).collect(),
            ids,
            prompt: numbers(&expected["greedy"]["prompt"]),
            greedy: numbers(&expected["greedy"]["tokens"]),
            dir,
        }
    }

    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&self.dir).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// A copy of the checkpoint with another config or in another type.
    pub fn copy(&self, dtype: SaveDtype, change: impl FnOnce(&mut Config)) -> Checkpoint {
        let original = self.checkpoint();
        let mut config = original.config().clone();
        change(&mut config);
        let tensors = original.names().map(|name| {
            let tensor = original.tensor(name).unwrap();
            (name.to_owned(), tensor.shape.clone(), Cow::Owned(tensor.to_f32().unwrap()))
        });
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &config, tensors, &SaveOptions { dtype, ..SaveOptions::default() }).unwrap();
        Checkpoint::open(dir.path()).unwrap()
    }

    pub fn model(&self, dtype: WeightDtype) -> Model {
        Model::load_as(&self.checkpoint(), dtype).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}

/// A model that is no golden, for its experts are wide enough for 4 bits: random weights, `group` of them to a scale.
pub fn int4_checkpoint(group: usize) -> Checkpoint {
    let mut config = Golden::named("moe_k2").checkpoint().config().clone();
    config.hidden_size = 64;
    config.moe.as_mut().unwrap().intermediate_size = 64;
    let mut state = 7u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let specs: Vec<_> = config.tensor_specs().into_iter().filter(|spec| spec.required).collect();
    let tensors = specs.into_iter().map(|spec| {
        let values = (0..spec.shape.iter().product::<usize>()).map(|_| match spec.role {
            TensorRole::Vector => 1.0 + 0.1 * next(),
            TensorRole::CorrectionBias => 0.01 * next(),
            _ => 0.2 * next(),
        });
        (spec.name, spec.shape, Cow::Owned(values.collect()))
    });
    let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(from.path(), &config, tensors, &SaveOptions::default()).unwrap();
    let options = QuantizeOptions { scheme: QuantizeScheme::W4a8 { group }, ..QuantizeOptions::default() };
    quantize(&Checkpoint::open(from.path()).unwrap(), None, out.path(), options, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    Checkpoint::open(out.path()).unwrap()
}

/// A golden's weights under layers that see a window of so many positions, 0 for all.
pub fn windows_checkpoint(name: &str, windows: &[usize]) -> Checkpoint {
    Golden::named(name).copy(SaveDtype::F32, |config| config.mechanisms = self::windows(windows))
}

/// Layers that see a window of so many positions, 0 for all.
pub fn windows(of_layers: &[usize]) -> Mechanisms {
    let kind = |&window: &usize| if window > 0 { AttentionKind::Sliding } else { AttentionKind::Full };
    let sliding_window = of_layers.iter().copied().max().filter(|&window| window > 0);
    Mechanisms { layer_types: Some(of_layers.iter().map(kind).collect()), sliding_window, ..Mechanisms::default() }
}

/// Largest absolute difference.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
