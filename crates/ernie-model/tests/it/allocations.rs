//! Buffers of a step are those of the step before.
use std::{path::Path, sync::Arc};

use ernie_checkpoint::Config;
use ernie_kernels::scratch;
use ernie_model::{Ernie, LossWeights, PackedBatch, training_device};

const TOKENS: usize = 512;
const HIDDEN: usize = 256;
/// Bytes of the hidden states of all tokens.
const STATES: u64 = (TOKENS * HIDDEN * 4) as u64;

/// Three layers; with experts in the last two.
fn network(experts: bool) -> Ernie {
    let mut json = serde_json::json!({
        "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": TOKENS,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": true, "use_bias": false,
    });
    if experts {
        json["architectures"] = serde_json::json!(["Ernie4_5_MoeForCausalLM"]);
        json["model_type"] = "ernie4_5_moe".into();
        for (key, value) in [
            ("moe_num_experts", 4),
            ("moe_k", 2),
            ("moe_intermediate_size", 32),
            ("moe_num_shared_experts", 1),
            ("moe_layer_start_index", 1),
            ("moe_layer_end_index", 2),
            ("moe_layer_interval", 1),
        ] {
            json[key] = value.into();
        }
    }
    let config: Config = Config::from_json(&json.to_string(), Path::new("test")).unwrap();
    let mut model = Ernie::init(&config, &training_device(), 3);
    model.reserve_positions(TOKENS);
    model
}

fn batch() -> PackedBatch {
    PackedBatch {
        ids: (0..TOKENS).map(|t| (t * 7 % 64) as u32).collect(),
        targets: (0..TOKENS).map(|t| (t * 5 % 64) as i32).collect(),
        cu_seqlens: Arc::new([0, TOKENS as u32 / 2, TOKENS as u32]) as Arc<[u32]>,
        ..PackedBatch::default()
    }
}

/// Bytes that this thread asks for in a third round of `work`.
fn bytes_when_warm(mut work: impl FnMut()) -> u64 {
    (0..2).for_each(|_| work());
    allocation_counter::measure(work).bytes_total
}

#[test]
fn a_step_of_training_uses_the_buffers_of_the_one_before() {
    for experts in [false, true] {
        let model = network(experts);
        let batch = batch();
        for recompute in [false, true] {
            let bytes = bytes_when_warm(|| {
                let (_, gradients) = model.loss_and_gradients(&batch, &LossWeights::default(), 1.0, recompute);
                gradients.into_values().for_each(scratch::recycle);
                scratch::end_step();
            });
            // Of a network with experts the routers are in Burn's operators. With recomputation each layer begins a tape: its input is dropped where the tape ends, and Burn adds the
            // input's gradients.
            let most = [0.6, 1.8][usize::from(experts)] + if recompute { 8.0 } else { 0.0 };
            let states = bytes as f64 / STATES as f64;
            assert!(states < most, "experts {experts}, recompute {recompute}: {states:.2} times the hidden states");
        }
    }
}

#[test]
fn so_does_a_forward_pass_without_a_tape() {
    for experts in [false, true] {
        let model = network(experts).without_tape();
        let batch = batch();
        let bytes = bytes_when_warm(|| {
            let hidden = model.forward(&batch);
            model.cross_entropy(hidden.states_th, &batch.targets);
            scratch::end_step();
        });
        let states = bytes as f64 / STATES as f64;
        assert!(states < 0.6, "experts {experts}: {states:.2} times the hidden states");
    }
}
