//! The network against transformers on tiny random models (see testdata/README.md): logits, loss, every gradient, ten optimizer steps, greedy
//! tokens, packed documents, multi-token prediction.
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use ernie_checkpoint::{Checkpoint, Config};
use ernie_kernels::adamw;
use ernie_model::{
    Ernie, LossWeights, Losses, NamedParameters, PackedBatch,
    ops::{self, Precision},
    steering::{Favoured, Steering},
};
use safetensors::SafeTensors;
use serde_json::Value;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models")
}

/// A golden: what transformers computed for one model.
struct Golden {
    name: String,
    dir: PathBuf,
    json: Value,
    tensors: BTreeMap<String, Vec<f32>>,
}

impl Golden {
    /// Every model directory with a golden of its own.
    fn all() -> Vec<Golden> {
        let mut dirs = std::fs::read_dir(models()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        dirs.sort();
        let goldens = dirs.into_iter().filter(|dir| dir.join("golden.safetensors").exists()).map(Golden::read).collect::<Vec<_>>();
        assert!(goldens.len() >= 10, "the goldens are missing: {}", goldens.len());
        goldens
    }

    fn read(dir: PathBuf) -> Golden {
        let json = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let tensors = file.iter().map(|(name, view)| (name.to_string(), floats(view.data()))).collect();
        Golden { name: dir.file_name().unwrap().to_str().unwrap().to_string(), dir, json, tensors }
    }

    fn model(&self) -> Ernie {
        let mut model = Ernie::load(&Checkpoint::open(&self.dir).unwrap(), &ernie_model::training_device()).unwrap();
        model.reserve_positions(96);
        model
    }

    /// The golden's sequences, packed; targets as the golden says.
    fn batch(&self) -> PackedBatch {
        let rows = |key: &str| self.json[key].as_array().unwrap().iter().map(integers).collect::<Vec<_>>();
        let (ids, targets) = (rows("ids"), rows("targets"));
        let bounds = ids.iter().scan(0, |end, row| {
            *end += row.len() as u32;
            Some(*end)
        });
        PackedBatch {
            cu_seqlens: std::iter::once(0).chain(bounds).collect(),
            ids: ids.concat().into_iter().map(|id| id as u32).collect(),
            targets: targets.concat().into_iter().map(|id| id as i32).collect(),
            ..PackedBatch::default()
        }
    }

    fn loss_weights(&self) -> LossWeights {
        LossWeights { mtp: self.json["mtp"]["lambda"].as_f64().unwrap_or(0.0), ..LossWeights::default() }
    }

    fn number(&self, key: &str) -> f64 {
        self.json[key].as_f64().unwrap_or_else(|| panic!("{}: golden.json lacks {key}", self.name))
    }
}

fn integers(row: &Value) -> Vec<i64> {
    row.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Gradients under their checkpoint names.
fn by_checkpoint_name(model: &Ernie, gradients: &NamedParameters) -> BTreeMap<String, Vec<f32>> {
    let split = |parameter| {
        let gradient: &Vec<f32> = gradients.get(&(parameter as &ernie_model::parameters::Parameter).name)?;
        Some(ernie_model::parameters::split(parameter, gradient.clone()))
    };
    model.parameters().iter().filter_map(split).flatten().map(|(name, _, values)| (name, values)).collect()
}

#[test]
fn logits_and_loss_equal_transformers() {
    for golden in Golden::all() {
        let (model, batch) = (golden.model(), golden.batch());
        let hidden = model.forward(&batch);
        let logits = ops::host_f32(&model.logits(hidden.states_th));
        let difference = max_difference(&logits, &golden.tensors["logits"]);
        let loss = model.loss(&batch, &golden.loss_weights());
        let total = ops::scalar(&loss.total) as f64;
        println!("{:<24} logits max|Δ| {difference:.1e}  loss Δ {:.1e}", golden.name, total - golden.number("loss"));
        assert!(difference <= 1e-4, "{}: logits differ by {difference:e}", golden.name);
        assert!((total - golden.number("loss")).abs() <= 1e-5, "{}: loss {total}", golden.name);
        // Without a tape the loss is computed by other code.
        let untracked = model.without_tape().loss(&batch, &golden.loss_weights());
        assert!((ops::scalar(&untracked.total) as f64 - total).abs() <= 1e-5, "{}", golden.name);
    }
}

#[test]
fn every_gradient_equals_transformers() {
    for golden in Golden::all() {
        let expected = golden.tensors.iter().filter_map(|(name, g)| Some((name.strip_prefix("grad.")?, g))).collect::<BTreeMap<_, _>>();
        if expected.is_empty() {
            continue;
        }
        let model = golden.model();
        let gradients = model.backward(model.loss(&golden.batch(), &golden.loss_weights()).total);
        let gradients = by_checkpoint_name(&model, &gradients);
        let names = |map: &mut dyn Iterator<Item = String>| map.collect::<BTreeSet<_>>();
        assert_eq!(
            names(&mut gradients.keys().cloned()),
            names(&mut expected.keys().map(|name| name.to_string())),
            "{}: parameters with a gradient",
            golden.name
        );
        let mut worst = (0.0, String::new());
        for (name, expected) in expected {
            let error = relative(&gradients[name], expected);
            assert!(error <= 1e-3, "{}: gradient of {name} is off by {error:e}", golden.name);
            if error >= worst.0 {
                worst = (error, name.to_string());
            }
        }
        println!("{:<24} worst gradient {:.1e} ({})", golden.name, worst.0, worst.1);
    }
}

#[test]
fn recomputed_gradients_equal_those_of_one_tape() {
    for golden in Golden::all() {
        let mut model = golden.model();
        let weights = LossWeights { balance: 0.3, z: 0.2, pull: 0.4, gate: 0.5, gate_target: 0.6, ..golden.loss_weights() };
        let dense = model.config().moe.is_none();
        let steered = PackedBatch { steering: Some(steering(model.config(), golden.batch().tokens())), ..golden.batch() };
        let cases = [(Precision::F32, 1.0, golden.batch()), (Precision::F32, 0.37, steered), (Precision::Int8Mixed, 0.37, golden.batch())];
        for (precision, share, batch) in cases {
            model.set_precision(precision);
            let (whole, expected) = model.loss_and_gradients(&batch, &weights, share, false);
            let (parts, gradients) = model.loss_and_gradients(&batch, &weights, share, true);
            let numbers = |losses: &Losses| (losses.cross_entropy, losses.mtp, losses.balance, losses.z, losses.pull);
            assert_eq!(numbers(&parts), numbers(&whole), "{}", golden.name);
            assert!((ops::scalar(&parts.total) - ops::scalar(&whole.total)).abs() <= 1e-6 * ops::scalar(&whole.total), "{}", golden.name);
            assert_eq!(parts.pull.is_some(), batch.steering.is_some() && !dense);
            assert_eq!((&parts.usage, &parts.experts), (&whole.usage, &whole.experts), "{}", golden.name);
            assert_eq!(gradients.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{}", golden.name);
            if dense {
                assert_eq!(gradients, expected, "{} in {precision:?}", golden.name);
                continue;
            }
            // A layer of experts has three ways back to its input, and the two tapes add them in different orders. That is the error of a sum in
            // f32; stochastic rounding to 8 bits then draws otherwise. A gradient that is nothing but rounding (softmax does not see a bias of the
            // keys) is held against the size of the others.
            let norm = |values: &[f32]| values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            let floor = 1e-4 * expected.values().map(|values| norm(values)).fold(0.0, f64::max);
            for (name, expected) in &expected {
                let difference = gradients[name].iter().zip(expected).map(|(a, b)| a - b).collect::<Vec<_>>();
                let error = norm(&difference) / norm(expected).max(floor);
                let tolerance = if precision == Precision::F32 { 3e-6 } else { 0.2 };
                assert!(error <= tolerance, "{} in {precision:?}: gradient of {name} is off by {error:e}", golden.name);
            }
        }
    }
}

/// Two domains, every second token of each; one leans to the even experts, the other to the first.
fn steering(config: &Config, tokens: usize) -> Steering {
    let experts = config.moe.as_ref().map_or(1, |moe| moe.num_experts);
    let table = (0..2 * experts).map(|place| if place < experts { place % 2 == 0 } else { place == experts }).collect();
    let layers = (0..config.num_hidden_layers).map(|layer| (layer, Favoured { table: Vec::clone(&table), experts })).collect();
    let domains = (0..tokens).map(|token| (token % 2) as u16).collect();
    Steering::Favoured { domains, layers: Arc::new(layers), strength: 0.3 }
}

/// ‖a − b‖ / ‖b‖; a gradient that is exactly zero there (an expert no token chose) must be zero here.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let (difference, size) = (norm(&mut a.iter().zip(b).map(|(&a, &b)| a as f64 - b as f64)), norm(&mut b.iter().map(|&b| b as f64)));
    if size == 0.0 { difference } else { difference / size }
}

#[test]
fn ten_optimizer_steps_equal_torch() {
    for golden in Golden::all() {
        let Some(settings) = golden.json.get("adamw") else { continue };
        let names = |key: &str| settings[key].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_string()).collect::<BTreeSet<_>>();
        let (decayed, frozen) = (names("decayed"), names("frozen"));
        let mut model = golden.model();
        let batch = golden.batch();
        let mut moments: BTreeMap<String, [Vec<f32>; 2]> = BTreeMap::new();
        let mut worst = 0.0f64;
        for (index, expected) in settings["losses"].as_array().unwrap().iter().enumerate() {
            let loss = model.loss(&batch, &golden.loss_weights());
            let difference = (ops::scalar(&loss.total) as f64 - expected.as_f64().unwrap()).abs();
            assert!(difference <= 1e-4, "{}: loss of step {index} is off by {difference:e}", golden.name);
            worst = worst.max(difference);
            let gradients = model.backward(loss.total);
            model = model.map_parameters(|parameter, mut values| {
                let name = &parameter.checkpoint_tensors()[0].0;
                assert_eq!(frozen.contains(name), !parameter.trainable, "{name}");
                if let Some(gradient) = gradients.get(&parameter.name) {
                    let [m, v] =
                        moments.entry(parameter.name.clone()).or_insert_with(|| [vec![0.0; values.len()], vec![0.0; values.len()]]);
                    let betas = settings["betas"].as_array().unwrap();
                    let step = adamw::Step {
                        lr: settings["lr"].as_f64().unwrap(),
                        beta1: betas[0].as_f64().unwrap(),
                        beta2: betas[1].as_f64().unwrap(),
                        eps: settings["eps"].as_f64().unwrap(),
                        weight_decay: if decayed.contains(name) { settings["weight_decay"].as_f64().unwrap() } else { 0.0 },
                        step: index as u64 + 1,
                        gradient_scale: 1.0,
                    };
                    adamw::step(&mut values, gradient, m, v, &step);
                }
                values
            });
        }
        println!("{:<24} ten steps, worst loss Δ {worst:.1e}", golden.name);
    }
}

#[test]
fn greedy_tokens_equal_transformers() {
    for golden in Golden::all() {
        let greedy = &golden.json["greedy"];
        if greedy.is_null() {
            continue;
        }
        let model = golden.model().without_tape();
        let mut ids = integers(&greedy["prompt"]).into_iter().map(|id| id as u32).collect::<Vec<_>>();
        let expected = integers(&greedy["tokens"]);
        assert_eq!(expected.len(), 24, "{}", golden.name);
        for (index, expected) in expected.into_iter().enumerate() {
            let states_th = model.forward(&PackedBatch::from_documents([&ids[..]])).states_th;
            let [tokens, _] = states_th.dims();
            let logits = ops::host_f32(&model.logits(states_th.narrow(0, tokens - 1, 1)));
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            assert_eq!(best as i64, expected, "{}: token {index}", golden.name);
            ids.push(best as u32);
        }
    }
}

#[test]
fn packed_documents_equal_transformers_on_each_alone() {
    for golden in Golden::all() {
        let packed = &golden.json["packed"];
        if packed.is_null() {
            continue;
        }
        let ids = integers(&packed["ids"]).into_iter().map(|id| id as u32).collect::<Vec<_>>();
        let mut rest = &ids[..];
        let documents = integers(&packed["lengths"]).into_iter().map(|length| {
            let (document, after) = rest.split_at(length as usize);
            rest = after;
            document
        });
        let batch = PackedBatch::from_documents(documents);
        assert_eq!(batch.targets.to_vec(), integers(&packed["targets"]).into_iter().map(|id| id as i32).collect::<Vec<_>>());
        let model = golden.model().without_tape();
        let states_th = model.forward(&batch).states_th;
        let difference = max_difference(&ops::host_f32(&model.logits(states_th.clone())), &golden.tensors["packed.logits"]);
        assert!(difference <= 1e-4, "{}: {difference:e}", golden.name);
        let loss = ops::scalar(&model.cross_entropy(states_th, &batch.targets)) as f64;
        assert!((loss - packed["loss"].as_f64().unwrap()).abs() <= 1e-5, "{}: loss {loss}", golden.name);
    }
}

#[test]
fn other_layouts_hold_the_same_model() {
    for (name, twin) in [
        ("moe_k2_sharded", "moe_k2"),
        ("moe_k2_paddle", "moe_k2"),
        ("dense_untied_gqa_paddle", "dense_untied_gqa"),
        ("dense_bias_mqa_paddle", "dense_bias_mqa"),
    ] {
        let load = |name: &str| Ernie::load(&Checkpoint::open(&models().join(name)).unwrap(), &ernie_model::inference_device()).unwrap();
        assert_eq!(load(name).named_parameters(), load(twin).named_parameters(), "{name}");
    }
}

#[test]
fn an_exported_model_is_the_one_that_was_loaded() {
    for golden in Golden::all() {
        let model = golden.model();
        let dir = tempfile::tempdir().unwrap();
        let tensors = model.export().into_iter().map(|(name, shape, values)| (name, shape, values.into()));
        let options = ernie_checkpoint::SaveOptions { dtype: ernie_checkpoint::SaveDtype::F32, ..Default::default() };
        ernie_checkpoint::save(dir.path(), model.config(), tensors, &options).unwrap();
        let again = Ernie::load(&Checkpoint::open(dir.path()).unwrap(), &ernie_model::inference_device()).unwrap();
        assert_eq!(again.named_parameters(), model.named_parameters(), "{}", golden.name);
    }
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let golden = Golden::all().into_iter().find(|golden| golden.name == "moe_k2").unwrap();
    let config = Checkpoint::open(&golden.dir).unwrap().config().clone();
    let make = |seed| Ernie::init(&config, &ernie_model::inference_device(), seed).named_parameters();
    assert_eq!(make(3), make(3));
    assert_ne!(make(3), make(4));
}
