//! From the JSON object to typed fields: both spellings of every name, list-or-int fields, the released defaults, and
//! the refusal of values that the network here does not implement.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::write::known_keys;
use super::{Config, Family, HiddenAct, Mechanisms, MlpKind, MoeConfig, Quantization, VisionConfig, VisionExperts, VlConfig};
use crate::error::Result;

/// `model_type` values and their families.
const MODEL_TYPES: [(&str, Family); 5] = [
    ("ernie4_5", Family::Dense),
    ("ernie4_5_moe", Family::Moe),
    ("ernie4_5_vl_moe", Family::VlMoe),
    ("ernie4_5_moe_vl", Family::VlMoe),
    ("ernie4_5_vl", Family::VlMoe),
];

/// `architectures` values and their families: transformers' spelling, then the remote code's.
const ARCHITECTURES: [(&str, Family); 8] = [
    ("Ernie4_5ForCausalLM", Family::Dense),
    ("Ernie4_5_ForCausalLM", Family::Dense),
    ("Ernie4_5_MoeForCausalLM", Family::Moe),
    ("Ernie4_5_MoEForCausalLM", Family::Moe),
    ("Ernie4_5_VLMoeForConditionalGeneration", Family::VlMoe),
    ("Ernie4_5_VL_MoeForConditionalGeneration", Family::VlMoe),
    ("Ernie4_5_VLMoEForConditionalGeneration", Family::VlMoe),
    ("Ernie4_5_VLForConditionalGeneration", Family::VlMoe),
];

/// The released code's defaults (transformers `Ernie4_5Config`, `Ernie4_5_MoeConfig`, `Ernie4_5_VLMoeTextConfig` and
/// `Ernie4_5_VLMoeVisionConfig`).
pub(super) fn defaults(family: Family) -> Config {
    let dense = family == Family::Dense;
    let vl = family == Family::VlMoe;
    let moe = MoeConfig {
        num_experts: 64,
        top_k: 6,
        intermediate_size: 1536,
        num_shared_experts: 2,
        layer_start: 1,
        layer_end: -1,
        layer_interval: 1,
        mlp_layer_types: None,
        norm_min: 1e-12,
        use_correction_bias: true,
        vision: vl.then_some(VisionExperts { num_experts: 64, intermediate_size: 512 }),
    };
    let vision_language = VlConfig {
        vision: VisionConfig {
            depth: 32,
            hidden_size: 1280,
            intermediate_size: 5120,
            num_heads: 16,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_merge_size: 2,
            rms_norm_eps: 1e-6,
        },
        mrope_section: [22, 22, 20],
        image_start_token_id: 101304,
        image_end_token_id: 101305,
        image_token_id: 100295,
        video_start_token_id: 101306,
        video_end_token_id: 101307,
        video_token_id: 103367,
    };
    Config {
        family,
        hidden_size: if dense { 1024 } else { 2560 },
        intermediate_size: if dense { 3072 } else { 12288 },
        num_hidden_layers: if dense { 18 } else { 28 },
        num_attention_heads: if dense { 16 } else { 20 },
        num_key_value_heads: if dense { 2 } else { 4 },
        head_dim: 128,
        vocab_size: 103424,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        max_position_embeddings: 131_072,
        use_bias: false,
        tie_word_embeddings: true,
        hidden_act: HiddenAct::Silu,
        bos_token_id: (!vl).then_some(1),
        eos_token_id: if vl { Vec::new() } else { vec![2] },
        pad_token_id: (!vl).then_some(0),
        initializer_range: 0.02,
        num_nextn_predict_layers: 0,
        moe: (!dense).then_some(moe),
        vl: vl.then_some(vision_language),
        quantization: None,
        mechanisms: Mechanisms::default(),
        extra: Map::new(),
        source: Map::new(),
    }
}

pub(super) fn parse(source: Map<String, Value>, origin: &Path) -> Result<Config> {
    let root = Fields { origin, section: "", map: &source };
    let family = family(&root)?;
    let nested = if family == Family::VlMoe { root.section("text_config", "text_config.")? } else { None };
    let text = nested.unwrap_or(root);
    refuse_unknown_values(&text)?;

    let d = defaults(family);
    let hidden_size = text.size(&["hidden_size", "n_embd"])?.unwrap_or(d.hidden_size);
    let heads = text.size(&["num_attention_heads", "n_head"])?.unwrap_or(d.num_attention_heads);
    // Absent means the released default; an explicit null means one key/value head per query head.
    let kv_heads = match text.map.get("num_key_value_heads") {
        None => d.num_key_value_heads,
        Some(Value::Null) => heads,
        Some(value) => text.as_size("num_key_value_heads", value)?,
    };
    // Only the dense config has a default (128); elsewhere, and for an explicit null, it is hidden_size / heads.
    let head_dim = match text.map.get("head_dim") {
        None if family == Family::Dense => d.head_dim,
        None | Some(Value::Null) => hidden_size.checked_div(heads).unwrap_or(0),
        Some(value) => text.as_size("head_dim", value)?,
    };
    let mut config = Config {
        hidden_size,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size: text.size(&["intermediate_size", "n_inner"])?.unwrap_or(d.intermediate_size),
        num_hidden_layers: text.size(&["num_hidden_layers", "n_layer"])?.unwrap_or(d.num_hidden_layers),
        vocab_size: text.size(&["vocab_size"])?.unwrap_or(d.vocab_size),
        rms_norm_eps: text.float(&["rms_norm_eps"])?.unwrap_or(d.rms_norm_eps),
        rope_theta: rope_theta(&text)?.unwrap_or(d.rope_theta),
        max_position_embeddings: text.size(&["max_position_embeddings", "n_positions"])?.unwrap_or(d.max_position_embeddings),
        use_bias: text.flag("use_bias")?.unwrap_or(d.use_bias),
        // A nested config writes it at the top, where transformers reads it.
        tie_word_embeddings: root.flag("tie_word_embeddings")?.or(text.flag("tie_word_embeddings")?).unwrap_or(d.tie_word_embeddings),
        bos_token_id: id_or_null(&text, "bos_token_id", d.bos_token_id)?,
        eos_token_id: eos(&text, d.eos_token_id)?,
        pad_token_id: id_or_null(&text, "pad_token_id", d.pad_token_id)?,
        initializer_range: text.float(&["initializer_range"])?.unwrap_or(d.initializer_range),
        num_nextn_predict_layers: text.size(&["num_nextn_predict_layers"])?.unwrap_or(0),
        moe: d.moe.map(|moe| experts(&text, moe)).transpose()?,
        vl: d.vl.map(|vl| vision_language(&root, &text, vl, head_dim)).transpose()?,
        quantization: quantization(&root)?,
        mechanisms: Mechanisms::parse(&root)?,
        ..d
    };
    config.extra = source.iter().filter(|(key, _)| !known_keys(family).contains(&key.as_str())).map(pair).collect();
    config.source = source;
    Ok(config)
}

fn pair((key, value): (&String, &Value)) -> (String, Value) {
    (key.clone(), value.clone())
}

/// The family by `model_type` and `architectures`; at least one must be there, and they must agree.
fn family(root: &Fields<'_>) -> Result<Family> {
    let names = |table: &[(&str, Family)]| table.iter().map(|t| t.0).collect::<Vec<_>>().join(", ");
    let look_up = |field: &str, table: &[(&str, Family)], value: &Value| {
        let found = table.iter().find(|t| Some(t.0) == value.as_str()).map(|t| t.1);
        found.ok_or_else(|| root.error(field, format!("one of {}", names(table)), value))
    };
    let by_type = match root.get(&["model_type"])? {
        Some((name, value)) => Some(look_up(name, &MODEL_TYPES, value)?),
        None => None,
    };
    let by_architecture = match root.get(&["architectures"])? {
        None => None,
        Some((name, list)) => match list.as_array().map(Vec::as_slice) {
            Some([]) => None,
            Some([one]) => Some((look_up(name, &ARCHITECTURES, one)?, list)),
            _ => return Err(root.error(name, "a list with one architecture", list)),
        },
    };
    match (by_type, by_architecture) {
        (Some(family), Some((other, list))) if family != other => {
            Err(root.error("architectures", "the architecture that `model_type` names", list))
        }
        (Some(family), _) | (None, Some((family, _))) => Ok(family),
        (None, None) => Err(root.error("model_type", format!("one of {}", names(&MODEL_TYPES)), &Value::Null)),
    }
}

/// Fields of the released code and its training framework whose other values are other networks.
fn refuse_unknown_values(text: &Fields<'_>) -> Result<()> {
    let silu = [json!("silu"), json!("swish")]; // two names of one function in transformers
    text.only("hidden_act", &silu)?;
    text.only("activation_function", &silu)?;
    text.only("moe_gate_act", &[json!("softmax")])?;
    text.only("moe_group_experts", &[json!(false)])?;
    text.only("moe_norm_gate_logits", &[json!(true)])?;
    text.only("use_rmsnorm", &[json!(true)])?;
    text.only("use_qk_norm", &[json!(false)])?;
    text.only("compression_ratio", &[json!(1)])?;
    text.only("partial_rotary_factor", &[json!(1)])?;
    text.only("attention_bias", &[json!(false)])?;
    text.only("cachekv_quant", &[json!(false)])?;
    text.only("sliding_window", &[])?;
    if let Some((name, kinds)) = text.get(&["layer_types"])? {
        let full = kinds.as_array().is_some_and(|kinds| kinds.iter().all(|kind| kind == "full_attention"));
        if !full {
            return Err(text.error(name, "only \"full_attention\"", kinds));
        }
    }
    Ok(())
}

/// `rope_theta` inside `rope_parameters` (transformers 5) or `rope_scaling`, else at the top; also checks their type.
fn rope_theta(text: &Fields<'_>) -> Result<Option<f64>> {
    let mut inner = None;
    for (name, section) in [("rope_parameters", "rope_parameters."), ("rope_scaling", "rope_scaling.")] {
        let Some(rope) = text.section(name, section)? else { continue };
        // `ernie_3d` is the remote vision-language code's word for the default angles in three dimensions.
        let types: &[Value] = &[json!("default"), json!("ernie_3d")];
        rope.only("rope_type", types)?;
        rope.only("type", types)?;
        rope.only("factor", &[json!(1)])?;
        rope.only("partial_rotary_factor", &[json!(1)])?;
        inner = inner.or(rope.float(&["rope_theta"])?);
    }
    let outer = text.float(&["rope_theta"])?;
    match (inner, outer) {
        (Some(inner), Some(outer)) if inner != outer => {
            Err(text.error("rope_theta", format!("{inner}, as rope_parameters says"), &json!(outer)))
        }
        _ => Ok(inner.or(outer)),
    }
}

/// Absent = the default; null = no such token.
fn id_or_null(text: &Fields<'_>, name: &str, default: Option<u32>) -> Result<Option<u32>> {
    match text.map.get(name) {
        None => Ok(default),
        Some(_) => text.id(&[name]),
    }
}

fn eos(text: &Fields<'_>, default: Vec<u32>) -> Result<Vec<u32>> {
    if !text.map.contains_key("eos_token_id") {
        return Ok(default);
    }
    let Some((name, ids)) = text.sizes(&["eos_token_id"])? else { return Ok(Vec::new()) };
    let narrow = ids.iter().map(|&id| u32::try_from(id).ok()).collect::<Option<Vec<_>>>();
    narrow.ok_or_else(|| text.error(&name, "token ids", &Value::from(ids)))
}

fn experts(text: &Fields<'_>, d: MoeConfig) -> Result<MoeConfig> {
    // [text, vision] in vision-language configs, one number otherwise.
    let (experts, vision_experts) = modalities(text, &["moe_num_experts", "num_experts"], d.num_experts, d.vision.map(|v| v.num_experts))?;
    let (width, vision_width) = modalities(text, &["moe_intermediate_size"], d.intermediate_size, d.vision.map(|v| v.intermediate_size))?;
    let start = match text.sizes(&["moe_layer_start_index"])? {
        Some((_, starts)) => starts.into_iter().min().unwrap_or(d.layer_start),
        None => d.layer_start,
    };
    let end = match text.integers(&["moe_layer_end_index"])? {
        // -1 is the last layer, beyond every other entry of a list.
        Some((_, ends)) if ends.contains(&-1) => -1,
        Some((name, ends)) => match ends.iter().max() {
            Some(&end) if ends.iter().all(|&e| e >= 0) => end,
            _ => return Err(text.error(&name, "layer indices or -1", &Value::from(ends))),
        },
        None => d.layer_end,
    };
    Ok(MoeConfig {
        num_experts: experts,
        top_k: text.size(&["moe_k", "num_experts_per_tok"])?.unwrap_or(d.top_k),
        intermediate_size: width,
        num_shared_experts: text.size(&["moe_num_shared_experts"])?.unwrap_or(d.num_shared_experts),
        layer_start: start,
        layer_end: end,
        layer_interval: text.size(&["moe_layer_interval"])?.unwrap_or(d.layer_interval),
        mlp_layer_types: mlp_layer_types(text)?,
        norm_min: text.float(&["moe_norm_min"])?.unwrap_or(d.norm_min),
        use_correction_bias: text.flag("moe_use_aux_free")?.unwrap_or(d.use_correction_bias),
        vision: match (vision_experts, vision_width) {
            (Some(num_experts), Some(intermediate_size)) => Some(VisionExperts { num_experts, intermediate_size }),
            _ => None,
        },
    })
}

/// A text value and, where the family has vision experts, a vision value. One number serves both modalities.
fn modalities(text: &Fields<'_>, spellings: &[&str], default: usize, vision_default: Option<usize>) -> Result<(usize, Option<usize>)> {
    let Some((name, sizes)) = text.sizes(spellings)? else { return Ok((default, vision_default)) };
    match (sizes.as_slice(), vision_default) {
        ([text], None) => Ok((*text, None)),
        ([both], Some(_)) => Ok((*both, Some(*both))),
        ([text, vision], Some(_)) => Ok((*text, Some(*vision))),
        (_, None) => Err(text.error(&name, "one integer", &Value::from(sizes))),
        (_, Some(_)) => Err(text.error(&name, "one integer, or one for text and one for vision", &Value::from(sizes))),
    }
}

fn mlp_layer_types(text: &Fields<'_>) -> Result<Option<Vec<MlpKind>>> {
    let Some((name, value)) = text.get(&["mlp_layer_types"])? else { return Ok(None) };
    let kind = |item: &Value| match item.as_str() {
        Some("dense") => Some(MlpKind::Dense),
        Some("sparse") => Some(MlpKind::Sparse),
        _ => None,
    };
    let kinds = value.as_array().and_then(|items| items.iter().map(kind).collect::<Option<Vec<_>>>());
    kinds.map(Some).ok_or_else(|| text.error(name, "a list of \"dense\" and \"sparse\"", value))
}

fn vision_language(root: &Fields<'_>, text: &Fields<'_>, d: VlConfig, head_dim: usize) -> Result<VlConfig> {
    text.only("rope_3d", &[json!(true)])?;
    let mut mrope_section = d.mrope_section;
    // The remote code gives only the share of time; height and width take the rest in halves.
    if let Some(time) = text.size(&["freq_allocation"])? {
        let side = (head_dim / 2).saturating_sub(time) / 2;
        mrope_section = [side, side, time];
    }
    for (name, section) in [("rope_parameters", "rope_parameters."), ("rope_scaling", "rope_scaling.")] {
        let Some(rope) = text.section(name, section)? else { continue };
        let Some((name, sizes)) = rope.sizes(&["mrope_section"])? else { continue };
        mrope_section = match sizes.as_slice() {
            &[height, width, time] => [height, width, time],
            _ => return Err(rope.error(&name, "three integers", &Value::from(sizes))),
        };
    }
    let id = |spellings: &[&str], default| Ok(root.id(spellings)?.unwrap_or(default));
    Ok(VlConfig {
        vision: vision(root, d.vision)?,
        mrope_section,
        image_start_token_id: id(&["image_start_token_id"], d.image_start_token_id)?,
        image_end_token_id: id(&["image_end_token_id"], d.image_end_token_id)?,
        image_token_id: id(&["image_token_id", "im_patch_id"], d.image_token_id)?,
        video_start_token_id: id(&["video_start_token_id"], d.video_start_token_id)?,
        video_end_token_id: id(&["video_end_token_id"], d.video_end_token_id)?,
        video_token_id: id(&["video_token_id"], d.video_token_id)?,
    })
}

fn vision(root: &Fields<'_>, d: VisionConfig) -> Result<VisionConfig> {
    // The remote code has the merge sizes of the resampler at the top.
    let temporal = root.size(&["temporal_conv_size"])?.unwrap_or(d.temporal_merge_size);
    let spatial = root.size(&["spatial_conv_size"])?.unwrap_or(d.spatial_merge_size);
    let Some(vision) = root.section("vision_config", "vision_config.")? else {
        return Ok(VisionConfig { temporal_merge_size: temporal, spatial_merge_size: spatial, ..d });
    };
    vision.only("hidden_act", &[json!("quick_gelu")])?;
    // In the remote code `embed_dim` is the width and `hidden_size` may be something else.
    let hidden_size = match vision.size(&["embed_dim"])? {
        Some(width) => width,
        None => vision.size(&["hidden_size"])?.unwrap_or(d.hidden_size),
    };
    let ratio = vision.size(&["mlp_ratio"])?;
    let patch_size = match vision.sizes(&["patch_size"])? {
        None => d.patch_size,
        Some((name, sides)) => match *sides.as_slice() {
            [side] => side,
            [height, width] if height == width => height,
            _ => return Err(vision.error(&name, "one side, or two equal ones", &Value::from(sides))),
        },
    };
    Ok(VisionConfig {
        depth: vision.size(&["depth", "num_hidden_layers"])?.unwrap_or(d.depth),
        hidden_size,
        intermediate_size: match (vision.size(&["intermediate_size"])?, ratio) {
            (Some(width), _) => width,
            (None, Some(ratio)) => ratio.saturating_mul(hidden_size),
            (None, None) => d.intermediate_size,
        },
        num_heads: vision.size(&["num_heads", "num_attention_heads"])?.unwrap_or(d.num_heads),
        in_channels: vision.size(&["in_channels", "in_chans"])?.unwrap_or(d.in_channels),
        patch_size,
        spatial_merge_size: vision.size(&["spatial_merge_size"])?.unwrap_or(spatial),
        temporal_merge_size: vision.size(&["temporal_merge_size"])?.unwrap_or(temporal),
        rms_norm_eps: vision.float(&["rms_norm_eps"])?.unwrap_or(d.rms_norm_eps),
    })
}

/// `quantization_config`: what [`crate::Tensor`] reads, which is 8-bit weights with a scale per output channel and 4-bit weights with a scale per group.
fn quantization(root: &Fields<'_>) -> Result<Option<Quantization>> {
    let Some(section) = root.section("quantization_config", "quantization_config.")? else { return Ok(None) };
    let required = |fields: &Fields<'_>, name: &'static str, allowed: &[Value]| {
        fields.only(name, allowed)?;
        match fields.get(&[name])? {
            Some(_) => Ok(()),
            None => Err(fields.error(name, allowed[0].to_string(), &Value::Null)),
        }
    };
    required(&section, "quant_method", &[json!("compressed-tensors")])?;
    section.only("format", &[json!("int-quantized"), json!("naive-quantized"), json!("pack-quantized"), json!("mixed-precision")])?;
    section.only("quantization_status", &[json!("compressed")])?;
    section.only("kv_cache_scheme", &[])?;
    let groups = section.section("config_groups", "quantization_config.config_groups.")?;
    let Some(groups) = groups.filter(|groups| !groups.map.is_empty()) else {
        return Err(section.error("config_groups", "at least one group", &Value::Null));
    };
    let mut quantization = Quantization::Int8PerChannel;
    for name in groups.map.keys() {
        let Some(group) = groups.section(name, "quantization_config.config_groups.*.")? else { continue };
        group.only("format", &[json!("int-quantized"), json!("naive-quantized"), json!("pack-quantized")])?;
        if let Some(activations) = group.section("input_activations", "quantization_config.config_groups.*.input_activations.")? {
            required(&activations, "num_bits", &[json!(8)])?;
            required(&activations, "type", &[json!("int")])?;
            required(&activations, "strategy", &[json!("token")])?;
            required(&activations, "dynamic", &[json!(true)])?;
            activations.only("symmetric", &[json!(true)])?;
        }
        group.only("output_activations", &[])?;
        let Some(weights) = group.section("weights", "quantization_config.config_groups.*.weights.")? else {
            return Err(group.error("weights", "an object", &Value::Null));
        };
        required(&weights, "num_bits", &[json!(8), json!(4)])?;
        required(&weights, "type", &[json!("int")])?;
        weights.only("symmetric", &[json!(true)])?;
        weights.only("dynamic", &[json!(false)])?;
        weights.only("actorder", &[])?;
        if weights.get(&["num_bits"])?.is_some_and(|(_, bits)| bits.as_f64() == Some(4.0)) {
            required(&weights, "strategy", &[json!("group")])?;
            required(&weights, "group_size", &[json!(32), json!(64), json!(128)])?;
            let group = weights.size(&["group_size"])?.unwrap_or_default();
            quantization = Quantization::Int4Experts { group };
        } else {
            required(&weights, "strategy", &[json!("channel")])?;
        }
    }
    Ok(Some(quantization))
}
