//! From typed fields back to the JSON object, changing as little of what was read as possible.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Config, Family, MlpKind, Quantization, mechanisms, parse};

/// Where a field lives; text and root are one object unless the config is nested.
#[derive(Clone, Copy, PartialEq)]
enum Section {
    Root,
    Text,
    Vision,
}

/// A typed field as JSON, with the spellings it is read from; the first is the one written.
struct Field {
    section: Section,
    spellings: &'static [&'static str],
    value: Value,
}

/// Objects and names that are handled one by one rather than as a [`Field`].
const STRUCTURE: [&str; 8] = [
    "architectures",
    "model_type",
    "text_config",
    "vision_config",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    mechanisms::KEY,
];

/// The top-level keys that typed fields are read from.
pub(super) fn known_keys(family: Family) -> Vec<&'static str> {
    let fields = fields(&parse::defaults(family));
    let spellings = fields.iter().filter(|f| f.section != Section::Vision).flat_map(|f| f.spellings.iter().copied());
    let merge_sizes: &[&str] = match family {
        Family::VlMoe => &["freq_allocation", "spatial_conv_size", "temporal_conv_size"],
        Family::Dense | Family::Moe => &[],
    };
    spellings.chain(STRUCTURE).chain(["rope_theta"]).chain(merge_sizes.iter().copied()).collect()
}

pub(super) fn to_json(config: &Config) -> Value {
    let family = config.family;
    // What the object says as it was read: a field that still has that value is left in its place and spelling.
    let before = match config.source.is_empty() {
        true => None,
        false => parse::parse(config.source.clone(), Path::new("config.json")).ok().filter(|b| b.family == family),
    };
    let known = known_keys(family);
    let mut root: Map<String, Value> = Map::new();
    for (key, value) in &config.source {
        if known.contains(&key.as_str()) {
            root.insert(key.clone(), value.clone());
        } else if let Some(value) = config.extra.get(key) {
            root.insert(key.clone(), value.clone());
        }
    }
    if before.is_none() {
        let (model_type, architecture) = match family {
            Family::Dense => ("ernie4_5", "Ernie4_5ForCausalLM"),
            Family::Moe => ("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
            Family::VlMoe => ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration"),
        };
        root.insert("architectures".into(), json!([architecture]));
        root.insert("model_type".into(), json!(model_type));
        if family == Family::VlMoe {
            root.insert("text_config".into(), json!({"model_type": "ernie4_5_vl_moe_text"}));
            root.insert("vision_config".into(), json!({"model_type": "ernie4_5_vl_moe_vision"}));
        }
    }
    let nested = family == Family::VlMoe && root.get("text_config").is_some_and(Value::is_object);

    let fields_before = before.as_ref().map(fields);
    for (i, field) in fields(config).into_iter().enumerate() {
        let unchanged = fields_before.as_ref().and_then(|fields| fields.get(i)).is_some_and(|f| f.value == field.value);
        if unchanged {
            continue;
        }
        let map = match field.section {
            Section::Text if nested => section(&mut root, "text_config"),
            Section::Vision => section(&mut root, "vision_config"),
            Section::Text | Section::Root => &mut root,
        };
        let present: Vec<_> = field.spellings.iter().filter(|name| map.contains_key(**name)).collect();
        match present.as_slice() {
            [] => drop(map.insert(field.spellings[0].to_owned(), field.value)),
            names => names.iter().for_each(|name| drop(map.insert((**name).to_owned(), field.value.clone()))),
        }
    }

    let text = if nested { section(&mut root, "text_config") } else { &mut root };
    write_rope(config, before.as_ref(), text);
    if before.as_ref().is_none_or(|b| b.quantization != config.quantization) {
        match config.quantization {
            None => drop(root.shift_remove("quantization_config")),
            Some(quantization) => {
                root.insert("quantization_config".into(), compressed_tensors(quantization, config.tie_word_embeddings));
            }
        }
    }
    if before.as_ref().is_none_or(|b| b.mechanisms != config.mechanisms) {
        match config.mechanisms.to_json() {
            None => drop(root.shift_remove(mechanisms::KEY)),
            Some(object) => drop(root.insert(mechanisms::KEY.into(), object)),
        }
    }
    for (key, value) in &config.extra {
        root.insert(key.clone(), value.clone());
    }
    Value::Object(root)
}

fn section<'a>(root: &'a mut Map<String, Value>, name: &str) -> &'a mut Map<String, Value> {
    let slot = root.entry(name).or_insert_with(|| json!({}));
    if !slot.is_object() {
        *slot = json!({});
    }
    match slot {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// The base of the angles stands at the top, in `rope_parameters`, or in both.
fn write_rope(config: &Config, before: Option<&Config>, text: &mut Map<String, Value>) {
    let mrope = config.vl.as_ref().map(|vl| vl.mrope_section);
    let changed = before.is_none_or(|b| b.rope_theta != config.rope_theta || b.vl.as_ref().map(|vl| vl.mrope_section) != mrope);
    if !changed {
        return;
    }
    let mut inside = false;
    for name in ["rope_parameters", "rope_scaling"] {
        if let Some(Value::Object(rope)) = text.get_mut(name) {
            rope.insert("rope_theta".into(), json!(config.rope_theta));
            if let Some(mrope) = mrope {
                rope.insert("mrope_section".into(), json!(mrope));
            }
            inside = true;
        }
    }
    match mrope {
        Some(mrope) if !inside => {
            let rope = json!({"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": mrope});
            text.insert("rope_parameters".into(), rope);
            text.shift_remove("rope_theta");
            text.shift_remove("freq_allocation");
        }
        _ if text.contains_key("rope_theta") || !inside => {
            text.insert("rope_theta".into(), json!(config.rope_theta));
        }
        _ => {}
    }
}

/// The projections of routed experts, as a pattern over the names of modules.
const EXPERTS: &str = r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$";

/// How weights are quantised, in the fields of compressed-tensors' configs: all matrices, those of the
/// embedding among them, as symmetric weights with one scale per output channel (routed experts perhaps as packed ones with a
/// scale per group), and activations rounded per token as they come, which is what the engine computes with. The modules that are
/// not quantised are named: the routers, and a tied head, which has no tensor of its own.
pub(crate) fn compressed_tensors(quantization: Quantization, tied: bool) -> Value {
    let mut ignore = vec!["re:.*mlp\\.gate$"];
    if tied {
        ignore.push("lm_head");
    }
    let weights = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false});
    let activations = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true});
    // An embedding's input is ids, which are not rounded; without the format by its side it would be taken for a packed one.
    let mut json = json!({
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "format": "int-quantized", "weights": weights, "input_activations": activations, "output_activations": null},
            "group_1": {"targets": ["Embedding"], "format": "int-quantized", "weights": weights, "input_activations": null, "output_activations": null},
        },
        "ignore": ignore,
    });
    if let Quantization::Int4Experts { group } = quantization {
        let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": group, "dynamic": false});
        json["format"] = json!("mixed-precision");
        // Names go before types where several groups could take a module.
        json["config_groups"]["group_2"] = json!({"targets": [EXPERTS], "format": "pack-quantized", "weights": weights, "input_activations": activations, "output_activations": null});
    }
    json
}

/// Every field that is one JSON value, in the order it is written. The order depends on the family alone.
fn fields(config: &Config) -> Vec<Field> {
    let mut list = Vec::new();
    let mut text = |spellings, value| list.push(Field { section: Section::Text, spellings, value });
    text(&["vocab_size"], json!(config.vocab_size));
    text(&["hidden_size", "n_embd"], json!(config.hidden_size));
    text(&["intermediate_size", "n_inner"], json!(config.intermediate_size));
    text(&["num_hidden_layers", "n_layer"], json!(config.num_hidden_layers));
    text(&["num_attention_heads", "n_head"], json!(config.num_attention_heads));
    text(&["num_key_value_heads"], json!(config.num_key_value_heads));
    text(&["head_dim"], json!(config.head_dim));
    text(&["hidden_act", "activation_function"], json!("silu"));
    text(&["max_position_embeddings", "n_positions"], json!(config.max_position_embeddings));
    text(&["rms_norm_eps"], json!(config.rms_norm_eps));
    text(&["use_bias"], json!(config.use_bias));
    text(&["initializer_range"], json!(config.initializer_range));
    text(&["bos_token_id"], json!(config.bos_token_id));
    text(
        &["eos_token_id"],
        match config.eos_token_id.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        },
    );
    text(&["pad_token_id"], json!(config.pad_token_id));
    text(&["num_nextn_predict_layers"], json!(config.num_nextn_predict_layers));
    if let Some(moe) = &config.moe {
        let per_modality = |text: usize, vision: Option<usize>| match vision {
            Some(vision) => json!([text, vision]),
            None => json!(text),
        };
        let vision = moe.vision;
        let experts = match vision {
            // transformers' nested config has one number for both modalities.
            Some(v) if v.num_experts == moe.num_experts => json!(moe.num_experts),
            _ => per_modality(moe.num_experts, vision.map(|v| v.num_experts)),
        };
        text(&["moe_num_experts", "num_experts"], experts);
        text(&["moe_k", "num_experts_per_tok"], json!(moe.top_k));
        text(&["moe_intermediate_size"], per_modality(moe.intermediate_size, vision.map(|v| v.intermediate_size)));
        text(&["moe_num_shared_experts"], json!(moe.num_shared_experts));
        text(&["moe_layer_start_index"], json!(moe.layer_start));
        text(&["moe_layer_end_index"], json!(moe.layer_end));
        text(&["moe_layer_interval"], json!(moe.layer_interval));
        text(&["moe_norm_min"], json!(moe.norm_min));
        text(&["moe_use_aux_free"], json!(moe.use_correction_bias));
        let kind = |kind: &MlpKind| match kind {
            MlpKind::Dense => "dense",
            MlpKind::Sparse => "sparse",
        };
        // transformers' nested config knows only the list, not start, end and interval.
        let kinds = match (&moe.mlp_layer_types, &config.vl) {
            (Some(kinds), _) => json!(kinds.iter().map(kind).collect::<Vec<_>>()),
            (None, Some(_)) if config.source.is_empty() => json!(
                (0..config.num_hidden_layers)
                    .map(|l| kind(if config.is_moe_layer(l) { &MlpKind::Sparse } else { &MlpKind::Dense }))
                    .collect::<Vec<_>>()
            ),
            (None, _) => Value::Null,
        };
        if config.vl.is_some() {
            text(&["mlp_layer_types"], kinds);
        }
    }
    let mut root = |spellings, value| list.push(Field { section: Section::Root, spellings, value });
    root(&["tie_word_embeddings"], json!(config.tie_word_embeddings));
    if let Some(vl) = &config.vl {
        root(&["image_start_token_id"], json!(vl.image_start_token_id));
        root(&["image_end_token_id"], json!(vl.image_end_token_id));
        root(&["image_token_id", "im_patch_id"], json!(vl.image_token_id));
        root(&["video_start_token_id"], json!(vl.video_start_token_id));
        root(&["video_end_token_id"], json!(vl.video_end_token_id));
        root(&["video_token_id"], json!(vl.video_token_id));
        let vision = &vl.vision;
        let mut field = |spellings, value| list.push(Field { section: Section::Vision, spellings, value });
        field(&["depth", "num_hidden_layers"], json!(vision.depth));
        field(&["hidden_size", "embed_dim"], json!(vision.hidden_size));
        field(&["intermediate_size"], json!(vision.intermediate_size));
        field(&["num_heads", "num_attention_heads"], json!(vision.num_heads));
        field(&["in_channels", "in_chans"], json!(vision.in_channels));
        field(&["patch_size"], json!(vision.patch_size));
        field(&["spatial_merge_size"], json!(vision.spatial_merge_size));
        field(&["temporal_merge_size"], json!(vision.temporal_merge_size));
        field(&["rms_norm_eps"], json!(vision.rms_norm_eps));
    }
    list
}
