//! config.json: the released files' spellings and defaults, refusals, and writing back.

use std::path::Path;

use ernie_checkpoint::{Config, ContextGate, Error, Family, Mechanisms, MlpKind, Quantization};
use serde_json::{Map, Value, json};

use crate::fixture::{assert_error, dense, mentions_all, moe, vision_language, wide_moe};

fn parse(value: &Value) -> Result<Config, Error> {
    Config::from_json(&value.to_string(), Path::new("some/config.json"))
}

/// The released 0.3B config in the remote code's spelling.
fn released_dense() -> Value {
    json!({
        "architectures": ["Ernie4_5_ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072,
        "model_type": "ernie4_5", "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
        "num_hidden_layers": 18, "rms_norm_eps": 1e-05, "rope_theta": 500000, "rope_scaling": null,
        "torch_dtype": "bfloat16", "tie_word_embeddings": true, "use_bias": false, "use_cache": false, "vocab_size": 103424,
    })
}

/// A flat vision-language config with lists, as Baidu releases it.
fn released_vl() -> Value {
    json!({
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_moe_vl",
        "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28, "num_attention_heads": 20,
        "num_key_value_heads": 4, "vocab_size": 103424, "rope_theta": 500000, "rope_3d": true, "freq_allocation": 20,
        "moe_num_experts": [64, 64], "moe_k": 6, "moe_intermediate_size": [1536, 512], "moe_num_shared_experts": 2,
        "moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 28], "moe_layer_interval": 1,
        "im_patch_id": 100295, "spatial_conv_size": 2, "temporal_conv_size": 2, "bos_token_id": 1, "eos_token_id": 2,
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4,
                          "num_heads": 16, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2},
    })
}

#[test]
fn released_dense_reads_and_writes_back_unchanged() {
    let text = released_dense();
    let config = parse(&text).unwrap();
    assert_eq!((config.family, config.head_dim, config.rope_theta), (Family::Dense, 128, 500_000.0));
    assert_eq!((config.bos_token_id, config.eos_token_id.as_slice(), config.pad_token_id), (Some(1), &[2][..], Some(0)));
    assert_eq!(config.to_json().to_string(), text.to_string());
    let counts = config.parameter_counts();
    assert_eq!(counts.total, 360_748_032);
    assert_eq!((counts.active, counts.embedding, counts.head), (counts.total, 103_424 * 1024, 0));
    assert_eq!(config.kv_bytes_per_token(2), 18_432);
}

#[test]
fn family_defaults_have_the_released_sizes() {
    let moe = parse(&json!({"model_type": "ernie4_5_moe", "num_nextn_predict_layers": 1})).unwrap();
    // 21.83 billion, about 3.35 active with shared experts and embedding.
    let counts = moe.parameter_counts();
    assert_eq!((counts.total + 5_000_000) / 10_000_000, 2183);
    assert!((3.2e9..3.5e9).contains(&(counts.active as f64)), "{}", counts.active);
    assert!(counts.mtp > 0);
    assert_eq!(moe.kv_bytes_per_token(2), 57_344);
    assert!(!moe.is_moe_layer(0) && (1..28).all(|l| moe.is_moe_layer(l)) && !moe.is_moe_layer(28));

    for model_type in ["ernie4_5_vl_moe", "ernie4_5_moe_vl"] {
        let vl = parse(&json!({"model_type": model_type})).unwrap();
        assert_eq!(vl.family, Family::VlMoe);
        assert_eq!(vl.moe.as_ref().unwrap().vision.unwrap().intermediate_size, 512);
        assert_eq!(vl.bos_token_id, None);
    }
    assert_eq!(parse(&json!({"model_type": "ernie4_5"})).unwrap().head_dim, 128);
    // Without a head_dim only the dense code has a default of its own.
    let narrow = json!({"model_type": "ernie4_5_moe", "hidden_size": 640, "num_attention_heads": 20});
    assert_eq!(parse(&narrow).unwrap().head_dim, 32);
    let null = json!({"model_type": "ernie4_5", "head_dim": null, "num_key_value_heads": null});
    let null = parse(&null).unwrap();
    assert_eq!((null.head_dim, null.num_key_value_heads), (64, 16));
}

#[test]
fn both_spellings_of_every_name() {
    for architecture in ["Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"] {
        assert_eq!(parse(&json!({"architectures": [architecture]})).unwrap().family, Family::Dense);
    }
    let by_alias = json!({
        "model_type": "ernie4_5_moe", "n_embd": 640, "n_layer": 5, "n_head": 4, "n_inner": 100, "n_positions": 99,
        "activation_function": "silu", "num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 2,
    });
    let config = parse(&by_alias).unwrap();
    let experts = config.moe.as_ref().unwrap();
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.num_attention_heads), (640, 5, 4));
    assert_eq!((config.intermediate_size, config.max_position_embeddings), (100, 99));
    assert_eq!((experts.num_experts, experts.top_k), (8, 3));
    assert_eq!(config.to_json(), by_alias);

    let error = parse(&json!({"model_type": "ernie4_5_moe", "moe_k": 2, "num_experts_per_tok": 3})).unwrap_err();
    mentions_all(&error, &["some/config.json", "num_experts_per_tok", "moe_k", "2", "3"]);
    let error = parse(&json!({"model_type": "ernie4_5", "architectures": ["Ernie4_5_MoeForCausalLM"]})).unwrap_err();
    mentions_all(&error, &["architectures", "Moe"]);
}

#[test]
fn rope_theta_at_the_top_or_in_rope_parameters() {
    let theta = |rest: Value| {
        let mut object = json!({"model_type": "ernie4_5"});
        object.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        parse(&object).map(|config| config.rope_theta)
    };
    assert_eq!(theta(json!({})).unwrap(), 500_000.0);
    assert_eq!(theta(json!({"rope_theta": 1e4})).unwrap(), 1e4);
    let inner = json!({"rope_theta": 1e4, "rope_type": "default"});
    assert_eq!(theta(json!({"rope_parameters": inner})).unwrap(), 1e4);
    assert_eq!(theta(json!({"rope_scaling": {"type": "default", "rope_theta": 7.0}})).unwrap(), 7.0);
    assert_eq!(theta(json!({"rope_parameters": inner, "rope_theta": 10000})).unwrap(), 1e4);
    let error = theta(json!({"rope_parameters": inner, "rope_theta": 5})).unwrap_err();
    mentions_all(&error, &["rope_theta", "10000", "5"]);

    let mut config = parse(&json!({"model_type": "ernie4_5", "rope_parameters": inner})).unwrap();
    config.rope_theta = 3e4;
    assert_eq!(config.to_json()["rope_parameters"]["rope_theta"], 3e4);
    assert_eq!(config.to_json().get("rope_theta"), None);
}

#[test]
fn vision_language_lists_and_nesting() {
    let flat = released_vl();
    let config = parse(&flat).unwrap();
    let experts = config.moe.as_ref().unwrap();
    assert_eq!((experts.layer_start, experts.layer_end), (1, 29));
    assert!(!config.is_moe_layer(0) && config.is_moe_layer(27) && !config.is_moe_layer(28));
    let vl = config.vl.as_ref().unwrap();
    assert_eq!((vl.mrope_section, vl.vision.hidden_size, vl.vision.intermediate_size), ([22, 22, 20], 1280, 5120));
    assert_eq!(config.to_json().to_string(), flat.to_string());
    let names: Vec<_> = config.tensor_specs().into_iter().map(|spec| (spec.name, spec.shape)).collect();
    for (name, shape) in [
        ("model.layers.1.mlp.gate.weight", vec![2560, 64]),
        ("model.layers.1.mlp.gate.weight_1", vec![2560, 64]),
        ("model.layers.1.mlp.moe_statics.e_score_correction_bias", vec![2, 64]),
        ("model.layers.27.mlp.experts.127.down_proj.weight", vec![2560, 512]),
        ("vision_model.patch_embed.proj.weight", vec![1280, 588]),
        ("vision_model.blocks.31.attn.qkv.bias", vec![3840]),
        ("model.resampler_model.temporal_linear.0.weight", vec![5120, 10240]),
        ("model.resampler_model.mlp.weight", vec![2560, 5120]),
    ] {
        assert!(names.contains(&(name.to_owned(), shape)), "{name}");
    }

    // As transformers saves it; made in memory, it says the same of itself.
    let written = vision_language().to_json();
    assert_eq!(written["text_config"]["mlp_layer_types"], json!(["dense", "sparse"]));
    assert_eq!(written["text_config"]["moe_num_experts"], 4);
    let read = parse(&written).unwrap();
    assert_eq!(read.moe.as_ref().unwrap().mlp_layer_types, Some(vec![MlpKind::Dense, MlpKind::Sparse]));
    assert_eq!(read.tensor_specs(), vision_language().tensor_specs());
    assert_eq!(read.to_json().to_string(), written.to_string());
}

#[test]
fn the_rule_for_expert_layers() {
    let layers = |change: Value| {
        let mut object = moe().to_json();
        object["num_hidden_layers"] = json!(12);
        object.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let config = parse(&object).unwrap();
        (0..14).filter(|&l| config.is_moe_layer(l)).collect::<Vec<_>>()
    };
    assert_eq!(layers(json!({"moe_layer_start_index": 3})), (3..12).collect::<Vec<_>>());
    assert_eq!(layers(json!({"moe_layer_interval": 2})), [1, 3, 5, 7, 9, 11]);
    assert_eq!(layers(json!({"moe_layer_interval": 3, "moe_layer_start_index": 3, "moe_layer_end_index": 8})), [5, 8]);
    assert_eq!(layers(json!({"moe_layer_start_index": [4, 2], "moe_layer_end_index": [5, 6]})), [2, 3, 4, 5, 6]);
    assert_eq!(layers(json!({"moe_layer_start_index": 9, "moe_layer_end_index": 5})), [0; 0]);
    assert_eq!(layers(json!({"moe_layer_end_index": [5, -1]})), (1..12).collect::<Vec<_>>());
}

#[test]
fn unknown_values_are_refused_by_field() {
    let cases = [
        ("hidden_act", json!("gelu")),
        ("hidden_act", json!(3)),
        ("model_type", json!("llama")),
        ("architectures", json!(["LlamaForCausalLM"])),
        ("architectures", json!("Ernie4_5_MoeForCausalLM")),
        ("moe_gate_act", json!("sigmoid")),
        ("moe_group_experts", json!(true)),
        ("compression_ratio", json!(2.0)),
        ("use_rmsnorm", json!(false)),
        ("sliding_window", json!(4096)),
        ("layer_types", json!(["sliding_attention"])),
        ("hidden_size", json!(-5)),
        ("hidden_size", json!("12")),
        ("hidden_size", json!(12.0)),
        ("vocab_size", json!(1e30)),
        ("rms_norm_eps", json!("small")),
        ("use_bias", json!(1)),
        ("eos_token_id", json!([1, "2"])),
        ("eos_token_id", json!([-1])),
        ("bos_token_id", json!(1_u64 << 40)),
        ("moe_num_experts", json!([4, 4])),
        ("moe_num_experts", json!([])),
        ("moe_layer_end_index", json!(-2)),
        ("moe_layer_start_index", json!(-1)),
        ("mlp_layer_types", json!(["sparse", "dense", "thick"])),
        ("text_config", Value::Null),
    ];
    for (field, value) in cases {
        let mut object = moe().to_json();
        object[field] = value.clone();
        let result = parse(&object);
        if value.is_null() {
            result.unwrap();
            continue;
        }
        let error = result.expect_err(field);
        mentions_all(&error, &["some/config.json", field]);
        assert_error!(error, Error::ConfigField { .. });
    }
    for rope in [
        json!({"rope_type": "yarn", "factor": 4.0}),
        json!({"type": "linear"}),
        json!({"rope_type": "default", "factor": 2}),
        json!({"rope_theta": "big"}),
    ] {
        for section in ["rope_parameters", "rope_scaling"] {
            let mut object = dense().to_json();
            object[section] = rope.clone();
            let error = parse(&object).unwrap_err();
            mentions_all(&error, &["some/config.json", section]);
            assert_error!(error, Error::ConfigField { .. });
        }
    }
}

#[test]
fn impossible_numbers_are_refused_without_overflow() {
    let huge = json!(u64::MAX);
    for (field, value) in [
        ("hidden_size", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("head_dim", json!(7)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", huge.clone()),
        ("vocab_size", json!(0)),
        ("vocab_size", huge.clone()),
        ("hidden_size", huge.clone()),
        ("head_dim", huge.clone()),
        ("num_attention_heads", json!(1 << 22)),
        ("intermediate_size", json!(0)),
        ("max_position_embeddings", json!(0)),
        ("rms_norm_eps", json!(0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rope_theta", json!(0)),
        ("moe_k", json!(0)),
        ("moe_k", json!(6)),
        ("moe_num_experts", json!(0)),
        ("moe_num_experts", json!(1 << 23)),
        ("moe_intermediate_size", json!(0)),
        ("moe_num_shared_experts", huge.clone()),
        ("moe_layer_interval", json!(0)),
        ("moe_norm_min", json!(-1)),
        ("num_nextn_predict_layers", json!(9)),
        ("mlp_layer_types", json!(["sparse"])),
    ] {
        let mut object = moe().to_json();
        object[field] = value;
        let error = parse(&object).expect_err(field);
        mentions_all(&error, &["some/config.json", field]);
        assert_error!(error, Error::ConfigField { .. });
    }
    for text in ["", "[]", "{", "null", "3"] {
        assert_error!(Config::from_json(text, Path::new("config.json")).unwrap_err(), Error::Json { .. });
    }
}

#[test]
fn unknown_keys_are_kept_in_order() {
    let text = r#"{"zebra": [1, {"b": 2, "a": 1.50}], "model_type": "ernie4_5", "zulu": {"gates": true}, "alpha": null, "n_embd": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "big": 12345678901234567890, "precise": 0.1}"#;
    let mut config = Config::from_json(text, Path::new("config.json")).unwrap();
    let source: Value = serde_json::from_str(text).unwrap();
    assert_eq!(config.to_json().to_string(), source.to_string());
    let keys: Vec<_> = config.extra.keys().collect();
    assert_eq!(keys, ["zebra", "zulu", "alpha", "big", "precise"]);

    // A changed field changes in its place and spelling; extra may be edited; what was not there comes last.
    config.hidden_size = 128;
    config.vocab_size = 100;
    config.extra.insert("zebra".into(), json!(7));
    config.extra.shift_remove("alpha");
    let changed = config.to_json();
    let keys: Vec<_> = changed.as_object().unwrap().keys().map(String::as_str).collect();
    let rest = ["zulu", "n_embd", "num_attention_heads", "num_key_value_heads", "big", "precise", "vocab_size"];
    assert_eq!(keys, [&["zebra", "model_type"][..], &rest].concat());
    assert_eq!((&changed["n_embd"], &changed["zebra"], &changed["vocab_size"]), (&json!(128), &json!(7), &json!(100)));
}

/// What goes under `ernie_rs` of a model of three layers whose last attends to paragraphs.
fn paragraphs(settings: Value) -> Value {
    json!({"layer_types": ["full_attention", "full_attention", "paragraph_attention"], "paragraphs": settings})
}

#[test]
fn paragraphs_end_at_line_breaks_and_where_they_are_too_long() {
    let own = paragraphs(json!({"end_tokens": [9, 4, 9], "min_tokens": 32, "max_tokens": 40}));
    let config = parse(&json!({"model_type": "ernie4_5", "num_hidden_layers": 3, "ernie_rs": own})).unwrap();
    let read = config.mechanisms.paragraphs.as_ref().unwrap();
    assert_eq!((&read.end_tokens[..], read.min_tokens, read.max_tokens), (&[4, 9][..], 32, 40));
    assert_eq!((config.reach(1), config.reach(2), config.local_layers(), config.paragraph_layers()), (None, Some(40), 1, 1));
    let written = config.to_json();
    assert_eq!(parse(&written).unwrap().mechanisms, config.mechanisms);
    let specs = config.tensor_specs();
    let pools: Vec<_> = specs.iter().filter(|spec| spec.name.contains("paragraph_pool")).collect();
    assert_eq!((pools.len(), &pools[0].name[..]), (1, "model.layers.2.self_attn.paragraph_pool.weight"));
    assert_eq!(pools[0].shape, [config.num_key_value_heads, config.head_dim]);

    // An end token that comes too early ends nothing; a document's end does.
    let mut ids = vec![1; 150];
    (ids[10], ids[35], ids[60]) = (9, 4, 9);
    assert_eq!(read.bounds(&ids, &[0, 150]), [0, 36, 76, 116, 150]);
    assert_eq!(read.bounds(&ids, &[0, 20, 20, 150]), [0, 20, 60, 100, 140, 150]);
    assert_eq!(read.bounds(&[], &[0]), [0]);
}

#[test]
fn mechanisms_are_read_checked_and_written() {
    let text = r#"{"model_type": "ernie4_5", "num_hidden_layers": 3, "ernie_rs": {"sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}}"#;
    let source: Value = serde_json::from_str(text).unwrap();
    let mut config = parse(&source).unwrap();
    assert_eq!((0..3).map(|layer| config.window(layer)).collect::<Vec<_>>(), [Some(64), Some(64), None]);
    assert_eq!((config.window(3), config.local_layers()), (None, 2));
    assert_eq!(config.kv_bytes_per_token(2), 2 * 2 * 128 * 2);
    assert_eq!(config.kv_bytes_of_window(2), 2 * 64 * 2 * 2 * 128 * 2);
    assert_eq!(config.to_json().to_string(), source.to_string());
    config.mechanisms.context_gate = Some(ContextGate { threshold: 0.25 });
    let written = config.to_json();
    assert_eq!(written["ernie_rs"]["context_gate"], json!({"threshold": 0.25}));
    assert_eq!(parse(&written).unwrap().mechanisms, config.mechanisms);
    let names: Vec<String> = config.tensor_specs().into_iter().map(|spec| spec.name).filter(|name| name.contains("context_gate")).collect();
    assert_eq!(names.len(), 3 * 4);
    config.mechanisms = Mechanisms::default();
    assert_eq!(config.to_json().get("ernie_rs"), None);

    for (own, field) in [
        (json!({"gates": 1}), "ernie_rs.gates"),
        (json!({"layer_types": ["full_attention"]}), "ernie_rs.layer_types"),
        (json!({"layer_types": ["full_attention", "full_attention", "wide"]}), "ernie_rs.layer_types"),
        (json!({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}), "ernie_rs.sliding_window"),
        (json!({"sliding_window": 64}), "ernie_rs.sliding_window"),
        (json!({"sliding_window": 0, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}), "ernie_rs.sliding_window"),
        (json!([]), "ernie_rs"),
        (json!({"context_gate": {"threshold": 1.0}}), "ernie_rs.context_gate.threshold"),
        (json!({"context_gate": {"level": 0.1}}), "ernie_rs.context_gate.level"),
        (json!({"context_gate": true}), "ernie_rs.context_gate"),
        (json!({"layer_types": vec!["paragraph_attention"; 3]}), "ernie_rs.paragraphs"),
        (json!({"paragraphs": {}}), "ernie_rs.paragraphs"),
        (paragraphs(json!({"min_tokens": 31})), "ernie_rs.paragraphs.min_tokens"),
        (paragraphs(json!({"min_tokens": 100, "max_tokens": 99})), "ernie_rs.paragraphs.max_tokens"),
        (paragraphs(json!({"end_tokens": [3, 103_424]})), "ernie_rs.paragraphs.end_tokens"),
        (paragraphs(json!({"end_tokens": [-1]})), "ernie_rs.paragraphs.end_tokens"),
        (paragraphs(json!({"ends": [1]})), "ernie_rs.paragraphs.ends"),
    ] {
        let mut object = source.clone();
        object["ernie_rs"] = own;
        let error = parse(&object).expect_err(field);
        mentions_all(&error, &["some/config.json", field]);
    }
}

#[test]
fn configs_made_in_memory_read_back_the_same() {
    for config in [dense(), moe(), vision_language()] {
        let read = parse(&config.to_json()).unwrap();
        assert_eq!(read.tensor_specs(), config.tensor_specs());
        assert_eq!(read.parameter_counts(), config.parameter_counts());
        assert_eq!((read.eos_token_id, read.rope_theta), (config.eos_token_id.clone(), config.rope_theta));
        assert_eq!(read.extra, Map::new());
    }
}

#[test]
fn only_groups_of_four_bits_that_are_implemented() {
    let mut config = wide_moe();
    config.quantization = Some(Quantization::Int4Experts { group: 64 });
    let good = config.to_json();
    assert_eq!(parse(&good).unwrap().quantization, config.quantization);
    let weights = "/quantization_config/config_groups/group_2/weights";
    for (field, value) in [
        ("num_bits", json!(2)),
        ("strategy", json!("channel")),
        ("group_size", json!(48)),
        ("group_size", Value::Null),
        ("symmetric", json!(false)),
        ("actorder", json!("group")),
    ] {
        let mut bad = good.clone();
        bad.pointer_mut(weights).unwrap()[field] = value;
        mentions_all(&parse(&bad).unwrap_err(), &["some/config.json", "quantization_config", field]);
    }
}

#[test]
fn only_the_int8_convention_that_is_implemented() {
    let mut config = dense();
    config.quantization = Some(Quantization::Int8PerChannel);
    let good = config.to_json();
    assert_eq!(parse(&good).unwrap().quantization, Some(Quantization::Int8PerChannel));
    let weights = "/quantization_config/config_groups/group_0/weights";
    for (pointer, field, value) in [
        ("/quantization_config", "quant_method", json!("gptq")),
        ("/quantization_config", "format", json!("marlin-24")),
        (weights, "num_bits", json!(3)),
        (weights, "type", json!("float")),
        (weights, "strategy", json!("group")),
        (weights, "symmetric", json!(false)),
        (weights, "num_bits", Value::Null),
    ] {
        let mut bad = good.clone();
        bad.pointer_mut(pointer).unwrap()[field] = value;
        mentions_all(&parse(&bad).unwrap_err(), &["some/config.json", "quantization_config", field]);
    }
}
