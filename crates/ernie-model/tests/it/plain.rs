//! A whole training step of the network, against the same network written in Burn's own operators: loss, every gradient, updated weights.
use std::{path::Path, sync::Arc};

use burn::{
    prelude::*,
    tensor::{TensorData, activation},
};
use ernie_checkpoint::Config;
use ernie_kernels::{adamw, attention::Shape, rope::RopeTable, router};
use ernie_model::{
    Ernie, LossWeights, PackedBatch,
    mlp::Mlp,
    moe::Moe,
    norm::RmsNorm,
    ops::{self, AttentionContext, ExpertsContext, LossContext, Precision, plain},
    text::FeedForward,
};

const EPS: f64 = 1e-5;

fn config(moe: bool) -> Config {
    let mut json = serde_json::json!({
        "model_type": "ernie4_5", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": EPS,
        "rope_theta": 10000.0, "use_bias": false, "tie_word_embeddings": false, "initializer_range": 0.2,
        "ernie_rs": {"layer_types": ["sliding_attention", "full_attention", "paragraph_attention"], "sliding_window": 9,
            "paragraphs": {"end_tokens": [7, 60], "min_tokens": 32, "max_tokens": 40}, "context_gate": {"threshold": 0.86}}
    });
    if moe {
        let more = serde_json::json!({
            "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    }
    Config::from_json(&json.to_string(), Path::new("test")).unwrap()
}

fn mlp(residual_th: Tensor<2>, x_th: Tensor<2>, norm: &RmsNorm, mlp: &Mlp) -> Tensor<2> {
    let layers = [mlp.gate_proj.weight.val(), mlp.up_proj.weight.val()];
    plain::swiglu_linear_add(residual_th, plain::norm_linear(x_th, norm.weight.val(), EPS, layers), mlp.down_proj.weight.val())
}

fn moe(x_th: Tensor<2>, norm: &RmsNorm, moe: &Moe, config: &Config) -> Tensor<2> {
    let (top_k, experts) = config.moe.as_ref().map(|moe| (moe.top_k, moe.num_experts)).unwrap();
    let z_th = plain::rms_norm(x_th.clone(), norm.weight.val(), EPS);
    let probs_te = activation::softmax(plain::linear(z_th, moe.gate.weight.val()), 1);
    let indices = router::scalar::select(&ops::host_f32(&probs_te), None, experts, top_k);
    let index_data = TensorData::new(indices.iter().map(|&e| i64::from(e)).collect::<Vec<_>>(), [indices.len() / top_k, top_k]);
    let chosen_tk = probs_te.clone().gather(1, Tensor::<2, Int>::from_data(index_data, &probs_te.device()));
    let weights_tk = chosen_tk.clone() / chosen_tk.sum_dim(1);
    let context = ExpertsContext { indices: indices.into(), top_k, precision: Precision::F32 };
    let stacks = [moe.experts.gate_proj.val(), moe.experts.up_proj.val(), moe.experts.down_proj.val()];
    let y_th = plain::norm_experts_add(x_th.clone(), norm.weight.val(), EPS, stacks, weights_tk, &context);
    mlp(y_th, x_th, norm, moe.shared_experts.as_ref().unwrap())
}

fn plain_loss(model: &Ernie, batch: &PackedBatch) -> Tensor<1> {
    let config = model.config();
    let context = AttentionContext {
        shape: Shape { q_heads: config.num_attention_heads, kv_heads: config.num_key_value_heads, head_dim: config.head_dim },
        cu_seqlens: batch.cu_seqlens.clone(),
        window: None,
        paragraphs: config.mechanisms.paragraphs.as_ref().unwrap().bounds(&batch.ids, &batch.cu_seqlens).into(),
        rope: Arc::new(RopeTable::new(config.rope_theta, config.head_dim, 96)),
    };
    let mut x_th = plain::embedding(model.model.embed_tokens.weight.val(), &batch.ids);
    for (index, layer) in model.model.layers.iter().enumerate() {
        let (attention, context) = (&layer.self_attn, AttentionContext { window: config.window(index), ..context.clone() });
        let layers = [attention.q_proj.weight.val(), attention.k_proj.weight.val(), attention.v_proj.weight.val()];
        let qkv = plain::norm_linear(x_th.clone(), layer.input_layernorm.weight.val(), EPS, layers);
        let gate = attention.context_gate.as_ref().unwrap();
        let z_th = plain::rms_norm(x_th.clone(), layer.input_layernorm.weight.val(), EPS);
        let density = plain::semantic_density(z_th.clone(), activation::sigmoid(gate.decay.val()), &batch.cu_seqlens);
        let bias = gate.bias.val().unsqueeze::<2>();
        let logits = plain::linear(z_th, gate.weight.val()) + density * gate.density.val().unsqueeze::<2>() + bias;
        let attended = match &attention.paragraph_pool {
            Some(pool) => plain::paragraph_attention(qkv, pool.weight.val(), &context),
            None => plain::rope_attention(qkv, &context),
        };
        let heads = plain::gate_heads(attended, logits, config.mechanisms.context_gate.unwrap().threshold);
        x_th = plain::linear_add(x_th, heads, attention.o_proj.weight.val());
        x_th = match &layer.mlp {
            FeedForward::Dense(dense) => mlp(x_th.clone(), x_th, &layer.post_attention_layernorm, dense),
            FeedForward::Moe(experts) => moe(x_th, &layer.post_attention_layernorm, experts, config),
        };
    }
    let states_th = plain::rms_norm(x_th, model.model.norm.weight.val(), EPS);
    plain::cross_entropy(
        plain::linear(states_th, model.lm_head.weight.as_ref().unwrap().val()),
        &LossContext::new(&batch.targets, Precision::F32),
    )
}

#[test]
fn a_whole_step_equals_the_plain_operators() {
    let documents: Vec<Vec<u32>> = [75, 1, 20].iter().map(|n| (0..*n).map(|i| (i * 7 + n) % 61).collect()).collect();
    let batch = PackedBatch::from_documents(documents.iter().map(Vec::as_slice));
    for with_experts in [false, true] {
        let mut model = Ernie::init(&config(with_experts), &ernie_model::training_device(), 3);
        model.reserve_positions(96);
        let fused = model.loss(&batch, &LossWeights::default()).total;
        let plain = plain_loss(&model, &batch);
        let (a, b) = (ops::scalar(&fused), ops::scalar(&plain));
        assert!((a - b).abs() < 2e-6 * b.abs(), "losses {a} and {b}");

        let (fused, plain) = (model.backward(fused), model.backward(plain));
        let trainable = model.parameters().into_iter().filter(|parameter| parameter.trainable).map(|parameter| parameter.name);
        assert_eq!(
            fused.keys().cloned().collect::<Vec<_>>(),
            std::collections::BTreeSet::from_iter(trainable).into_iter().collect::<Vec<_>>()
        );
        for (name, values) in model.named_parameters() {
            let (Some(a), Some(b)) = (fused.get(&name), plain.get(&name)) else { continue };
            assert!(b.iter().any(|g| *g != 0.0), "{name} has no gradient");
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let error = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied());
            assert!(error < 1e-5, "{name}: gradient off by {error:e}");

            // ε well above the rounding of gradients that are nearly nothing: AdamW would make whole steps of it.
            let step = adamw::Step { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1, step: 1, gradient_scale: 1.0 };
            let updated = |gradient: &[f32]| {
                let (mut p, mut m, mut v) = (values.clone(), vec![0.0; values.len()], vec![0.0; values.len()]);
                adamw::step(&mut p, gradient, &mut m, &mut v, &step);
                p
            };
            let error = updated(a).iter().zip(updated(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-5, "{name}: updated weights differ by {error:e}");
        }
    }
}
