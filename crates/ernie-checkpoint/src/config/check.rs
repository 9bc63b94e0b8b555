//! Whether the numbers of a config make a network at all. Bounds are far above every released size (300B: h 8192,
//! v 103424, 54 layers); they keep later arithmetic from overflowing and later lists from growing by a file's claim.

use std::path::Path;

use serde_json::json;

use super::{AttentionKind, Config, Family, MoeConfig, Paragraphs, VisionConfig};
use crate::error::{Error, Result};

/// Largest width, vocabulary, position or product of heads and head_dim.
const MAX_SIZE: usize = 1 << 24;
/// Most decoder layers.
const MAX_LAYERS: usize = 1 << 12;
/// Most tensors of a model; the largest released one has about 20,000.
const MAX_TENSORS: u128 = 1 << 18;
/// Most parameters.
const MAX_PARAMETERS: u128 = 1 << 50;

struct Checker<'a> {
    origin: &'a Path,
}

impl Checker<'_> {
    fn error(&self, field: &str, expected: impl Into<String>, got: impl ToString) -> Error {
        Error::ConfigField { file: self.origin.into(), field: field.into(), expected: expected.into(), got: got.to_string() }
    }

    fn within(&self, field: &str, value: usize, range: std::ops::RangeInclusive<usize>) -> Result<()> {
        match range.contains(&value) {
            true => Ok(()),
            false => Err(self.error(field, format!("{} to {}", range.start(), range.end()), value)),
        }
    }

    fn positive(&self, field: &str, value: f64) -> Result<()> {
        match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(self.error(field, "a positive number", value)),
        }
    }
}

pub(super) fn check(config: &Config, origin: &Path) -> Result<()> {
    let c = Checker { origin };
    c.within("hidden_size", config.hidden_size, 1..=MAX_SIZE)?;
    c.within("intermediate_size", config.intermediate_size, 1..=MAX_SIZE)?;
    c.within("num_hidden_layers", config.num_hidden_layers, 1..=MAX_LAYERS)?;
    c.within("num_attention_heads", config.num_attention_heads, 1..=MAX_SIZE)?;
    c.within("num_key_value_heads", config.num_key_value_heads, 1..=config.num_attention_heads)?;
    c.within("head_dim", config.head_dim, 2..=MAX_SIZE)?;
    c.within("vocab_size", config.vocab_size, 1..=MAX_SIZE)?;
    c.within("max_position_embeddings", config.max_position_embeddings, 1..=MAX_SIZE)?;
    c.within("num_nextn_predict_layers", config.num_nextn_predict_layers, 0..=config.num_hidden_layers)?;
    if !config.num_attention_heads.is_multiple_of(config.num_key_value_heads) {
        let expected = format!("a divisor of num_attention_heads, {}", config.num_attention_heads);
        return Err(c.error("num_key_value_heads", expected, config.num_key_value_heads));
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(c.error("head_dim", "an even number, for rotary pairs", config.head_dim));
    }
    if config.num_attention_heads > MAX_SIZE / config.head_dim {
        let expected = format!("num_attention_heads · head_dim of at most {MAX_SIZE}");
        return Err(c.error("num_attention_heads", expected, config.num_attention_heads));
    }
    c.positive("rms_norm_eps", config.rms_norm_eps)?;
    c.positive("rope_theta", config.rope_theta)?;
    if !(config.initializer_range.is_finite() && config.initializer_range >= 0.0) {
        return Err(c.error("initializer_range", "a non-negative number", config.initializer_range));
    }
    match (config.family, &config.moe, &config.vl) {
        (Family::Dense, None, None) | (Family::Moe, Some(MoeConfig { vision: None, .. }), None) => {}
        (Family::VlMoe, Some(MoeConfig { vision: Some(_), .. }), Some(_)) => {}
        (family, ..) => {
            let expected = format!("the expert and vision fields of {family:?}");
            return Err(c.error("model_type", expected, "others"));
        }
    }
    if let Some(moe) = &config.moe {
        check_experts(&c, config, moe)?;
    }
    if let Some(vl) = &config.vl {
        check_vision(&c, &vl.vision)?;
        if vl.mrope_section.iter().try_fold(0_usize, |sum, &n| sum.checked_add(n)) != Some(config.head_dim / 2) {
            let expected = format!("three numbers that sum to head_dim / 2 = {}", config.head_dim / 2);
            return Err(c.error("mrope_section", expected, json!(vl.mrope_section)));
        }
    }
    check_mechanisms(&c, config)?;
    check_total(&c, config)
}

fn check_mechanisms(c: &Checker<'_>, config: &Config) -> Result<()> {
    let mechanisms = &config.mechanisms;
    if config.family == Family::VlMoe && !mechanisms.is_empty() {
        return Err(c.error("ernie_rs", "nothing, for a vision-language model", "mechanisms of text models"));
    }
    if let Some(gate) = &mechanisms.context_gate
        && !(gate.threshold >= 0.0 && gate.threshold < 1.0)
    {
        return Err(c.error("ernie_rs.context_gate.threshold", "a number from 0 to less than 1", gate.threshold));
    }
    let sliding = match &mechanisms.layer_types {
        None => false,
        Some(kinds) if kinds.len() == config.num_hidden_layers => kinds.contains(&AttentionKind::Sliding),
        Some(kinds) => {
            let expected = format!("one entry for each of the {} layers", config.num_hidden_layers);
            return Err(c.error("ernie_rs.layer_types", expected, format!("{} entries", kinds.len())));
        }
    };
    match (sliding, mechanisms.sliding_window) {
        (true, None) => {
            return Err(c.error("ernie_rs.sliding_window", "a number of tokens, for the layers with sliding_attention", "null"));
        }
        (false, Some(window)) => return Err(c.error("ernie_rs.sliding_window", "nothing, for no layer has sliding_attention", window)),
        (_, Some(window)) => c.within("ernie_rs.sliding_window", window, 1..=MAX_SIZE)?,
        (false, None) => {}
    }
    check_paragraphs(c, config)
}

fn check_paragraphs(c: &Checker<'_>, config: &Config) -> Result<()> {
    let asked_for = (0..config.num_hidden_layers).any(|layer| config.attention_kind(layer) == AttentionKind::Paragraph);
    match (&config.mechanisms.paragraphs, asked_for) {
        (None, false) => Ok(()),
        (None, true) => Err(c.error("ernie_rs.paragraphs", "where paragraphs end, for the layers with paragraph_attention", "null")),
        (Some(_), false) => Err(c.error("ernie_rs.paragraphs", "nothing, for no layer has paragraph_attention", "an object")),
        (Some(paragraphs), true) => {
            c.within("ernie_rs.paragraphs.min_tokens", paragraphs.min_tokens, Paragraphs::LEAST..=MAX_SIZE)?;
            c.within("ernie_rs.paragraphs.max_tokens", paragraphs.max_tokens, paragraphs.min_tokens..=MAX_SIZE)?;
            match paragraphs.end_tokens.last() {
                Some(&id) if id as usize >= config.vocab_size => {
                    let expected = format!("token ids below {}", config.vocab_size);
                    Err(c.error("ernie_rs.paragraphs.end_tokens", expected, id))
                }
                _ => Ok(()),
            }
        }
    }
}

fn check_experts(c: &Checker<'_>, config: &Config, moe: &MoeConfig) -> Result<()> {
    c.within("moe_num_experts", moe.num_experts, 1..=MAX_SIZE)?;
    c.within("moe_k", moe.top_k, 1..=moe.num_experts)?;
    c.within("moe_intermediate_size", moe.intermediate_size, 1..=MAX_SIZE)?;
    c.within("moe_num_shared_experts", moe.num_shared_experts, 0..=MAX_SIZE / moe.intermediate_size)?;
    c.within("moe_layer_start_index", moe.layer_start, 0..=MAX_LAYERS)?;
    c.within("moe_layer_interval", moe.layer_interval, 1..=MAX_LAYERS)?;
    if !(-1..=MAX_LAYERS as i64).contains(&moe.layer_end) {
        return Err(c.error("moe_layer_end_index", format!("-1 to {MAX_LAYERS}"), moe.layer_end));
    }
    if !(moe.norm_min.is_finite() && moe.norm_min >= 0.0) {
        return Err(c.error("moe_norm_min", "a non-negative number", moe.norm_min));
    }
    if let Some(kinds) = &moe.mlp_layer_types
        && kinds.len() != config.num_hidden_layers
    {
        let expected = format!("one entry for each of the {} layers", config.num_hidden_layers);
        return Err(c.error("mlp_layer_types", expected, format!("{} entries", kinds.len())));
    }
    if let Some(vision) = moe.vision {
        c.within("moe_num_experts", vision.num_experts, moe.top_k..=MAX_SIZE)?;
        c.within("moe_intermediate_size", vision.intermediate_size, 1..=MAX_SIZE)?;
    }
    Ok(())
}

fn check_vision(c: &Checker<'_>, vision: &VisionConfig) -> Result<()> {
    c.within("vision_config.depth", vision.depth, 1..=MAX_LAYERS)?;
    c.within("vision_config.hidden_size", vision.hidden_size, 1..=MAX_SIZE >> 8)?;
    c.within("vision_config.intermediate_size", vision.intermediate_size, 1..=MAX_SIZE)?;
    c.within("vision_config.num_heads", vision.num_heads, 1..=vision.hidden_size)?;
    if !vision.hidden_size.is_multiple_of(vision.num_heads) {
        let expected = format!("a divisor of hidden_size, {}", vision.hidden_size);
        return Err(c.error("vision_config.num_heads", expected, vision.num_heads));
    }
    c.within("vision_config.in_channels", vision.in_channels, 1..=1 << 10)?;
    c.within("vision_config.patch_size", vision.patch_size, 1..=1 << 10)?;
    c.within("vision_config.spatial_merge_size", vision.spatial_merge_size, 1..=16)?;
    c.within("vision_config.temporal_merge_size", vision.temporal_merge_size, 1..=16)?;
    c.positive("vision_config.rms_norm_eps", vision.rms_norm_eps)
}

/// Bounds the product of the sizes before anything lists or counts by it.
fn check_total(c: &Checker<'_>, config: &Config) -> Result<()> {
    let wide = |n: usize| n as u128;
    let layers = wide(config.num_hidden_layers + config.num_nextn_predict_layers);
    let experts = config.moe.as_ref().map_or(0, |m| wide(m.num_experts) + m.vision.map_or(0, |v| wide(v.num_experts)));
    let vision = config.vl.as_ref().map_or(0, |vl| 12 * wide(vl.vision.depth) + 32);
    // At most 20 tensors of a layer outside the experts, 6 of an expert with biases.
    let tensors = layers * (20 + 6 * experts) + vision + 8;
    if tensors > MAX_TENSORS {
        let got = format!("{tensors} by num_hidden_layers and moe_num_experts");
        return Err(c.error("moe_num_experts", format!("a model of at most {MAX_TENSORS} tensors"), got));
    }
    let total = super::counts::total(config);
    if total > MAX_PARAMETERS {
        return Err(c.error("hidden_size", format!("a model of at most {MAX_PARAMETERS} parameters"), total));
    }
    Ok(())
}
