//! What `explain` says against the model's own choices, and its losses against transformers.
use ernie_checkpoint::Checkpoint;
use ernie_eval::explain::{Error, explain};
use ernie_model::{Ernie, PackedBatch, inference_device};
use std::path::PathBuf;

/// Of losses in f32.
const LOSS_TOLERANCE: f64 = 2e-5;

fn golden(model: &str) -> (Checkpoint, serde_json::Value, PathBuf) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models").join(model);
    let golden = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    (Checkpoint::open(&dir).unwrap(), golden, dir)
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn losses_are_those_of_the_reference() {
    for model in ["dense_tied", "dense_gated", "moe_gated_local", "moe_k2", "moe_bias_mqa"] {
        let (checkpoint, golden, dir) = golden(model);
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let expected = tensors.tensor("token_losses").unwrap();
        let expected: Vec<f32> = expected.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let rows = golden["ids"].as_array().unwrap();
        for (row, expected) in rows.iter().zip(expected.chunks(expected.len() / rows.len())) {
            let found = explain(&checkpoint, &ids(row)).unwrap();
            assert_eq!(found.losses[0], None);
            // The reference's last target is not in the text.
            for (found, expected) in found.losses[1..].iter().zip(&expected[..expected.len() - 1]) {
                let difference = (f64::from(found.unwrap()) - f64::from(*expected)).abs();
                assert!(difference <= LOSS_TOLERANCE * f64::from(expected.max(1.0)), "{model}: |Δ| = {difference}");
            }
            assert_eq!(found.layers.is_empty(), model == "dense_tied");
        }
    }
}

#[test]
fn choices_are_those_of_the_model() {
    let (checkpoint, golden, _) = golden("moe_gated_local");
    let ids = ids(&golden["ids"][0]);
    let found = explain(&checkpoint, &ids).unwrap();
    let mut model = Ernie::load(&checkpoint, &inference_device()).unwrap();
    model.reserve_positions(ids.len());
    let hidden = model.forward(&PackedBatch::from_documents([&ids[..]]));

    let mut gated = 0;
    for (layer, gating) in hidden.gating() {
        let heads = found.layers.iter().find(|found| found.layer == layer).unwrap().heads.as_ref().unwrap();
        assert_eq!(heads.active.concat(), gating.active());
        assert_eq!(heads.density, gating.density());
        assert_eq!((heads.active_share, heads.correlation), (gating.active_share(), gating.correlation()));
        assert!(heads.density.iter().all(|density| (0.0..=2.0).contains(density)));
        // Active is what is open by the threshold of this model's config.json.
        for (gate, active) in heads.gates.concat().into_iter().zip(heads.active.concat()) {
            assert_eq!(active, gate >= 0.4, "gate {gate}");
        }
        assert!(heads.active_share > 0.0 && heads.active_share < 1.0, "this model shows nothing: {}", heads.active_share);
        gated += 1;
    }
    let mut routed = 0;
    for (layer, routing) in hidden.routing() {
        let experts = found.layers.iter().find(|found| found.layer == layer).unwrap().experts.as_ref().unwrap();
        assert_eq!(experts.choices.concat().iter().map(|choice| choice.expert).collect::<Vec<_>>(), &routing.indices[..]);
        assert_eq!(experts.tokens, routing.usage());
        let probs = routing.probs_te.to_data().try_into_vec::<f32>().unwrap();
        for (choices, probs) in experts.choices.iter().zip(probs.chunks(routing.experts())) {
            // The formula of the router: probabilities of the chosen, over their sum.
            let total: f32 = choices.iter().map(|choice| probs[choice.expert as usize]).sum();
            for choice in choices {
                assert!((choice.weight - probs[choice.expert as usize] / total).abs() < 1e-6);
            }
        }
        routed += 1;
    }
    assert_eq!((gated, routed), (2, 1));
}

#[test]
fn what_cannot_be_explained_is_refused_with_its_numbers() {
    let (checkpoint, ..) = golden("dense_gated");
    assert!(matches!(explain(&checkpoint, &[]), Err(Error::Empty)));
    assert!(matches!(explain(&checkpoint, &[3; 257]), Err(Error::TooLong { tokens: 257, limit: 256 })));
    assert!(matches!(explain(&checkpoint, &[3, 101]), Err(Error::UnknownToken { position: 1, id: 101, vocab_size: 101 })));
    assert_eq!(explain(&checkpoint, &[3; 256]).unwrap().losses.len(), 256);
    let one = explain(&checkpoint, &[3]).unwrap();
    assert_eq!((one.losses.len(), one.mean_loss()), (1, 0.0));
    assert_eq!(one.layers[0].heads.as_ref().unwrap().correlation, None);
}
