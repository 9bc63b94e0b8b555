//! The fields that completions and chats share: how tokens are chosen, how many, and how the answer is sent.
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use ernie_engine::SamplingParams;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{ArrayBuilder, Object, ObjectBuilder, OneOfBuilder, Schema, SchemaType, Type};

use crate::api_error::ApiError;
use crate::numbers::{some_wholes, whole};

/// Most answers to one prompt, as OpenAI has it.
const MAX_N: u32 = 128;
/// Most stop strings: each is looked for in every piece of text.
const MAX_STOPS: usize = 16;
/// Most alternatives reported for a token, as OpenAI's chats have it.
pub const MAX_TOP_LOGPROBS: u32 = 20;

/// How tokens are chosen. Absent and null fields take the defaults of OpenAI's API; the penalties and everything else the released definitions.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct Sampling {
    /// The model's name; the one there is if absent.
    pub model: Option<String>,
    /// Most tokens of an answer; 16 for completions, what the context leaves for chats.
    #[serde(deserialize_with = "whole")]
    pub max_tokens: Option<u32>,
    /// The same under its later name, which wins.
    #[serde(deserialize_with = "whole")]
    pub max_completion_tokens: Option<u32>,
    /// 0 to 2; 0 takes the likeliest token each time. 1 if absent.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Above 0, at most 1; 1 if absent.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// The k likeliest tokens only; 0 and −1 mean all.
    #[schema(minimum = -1)]
    #[serde(deserialize_with = "whole")]
    pub top_k: Option<i64>,
    /// 0 to 1: tokens at least as many times as likely as the likeliest.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// −2 to 2.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// −2 to 2.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Above 0; 1 changes nothing.
    #[schema(exclusive_minimum = 0, maximum = 3.4028234663852886e38)]
    pub repetition_penalty: Option<f32>,
    /// Token ids with what is added to their logits, −100 to 100.
    #[schema(schema_with = biases)]
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed with the same request gives the same answer; a new one each time if absent. Answer i of n has seed + i.
    #[serde(deserialize_with = "whole")]
    pub seed: Option<i64>,
    /// The answer ends before the first of these.
    #[schema(schema_with = stops)]
    pub stop: Option<Stop>,
    /// The answer ends at any of these tokens.
    #[serde(deserialize_with = "some_wholes")]
    pub stop_token_ids: Option<Vec<u32>>,
    /// Go on past the model's own end of a text.
    pub ignore_eos: Option<bool>,
    /// Answers to each prompt, 1 to 128.
    #[schema(minimum = 1, maximum = 128)]
    #[serde(deserialize_with = "whole")]
    pub n: Option<u32>,
    /// Send the answer as server-sent events while it is made.
    pub stream: Option<bool>,
    /// About the stream.
    pub stream_options: Option<StreamOptions>,
}

/// Token ids, written as text, with numbers.
fn biases() -> Object {
    let bias = ObjectBuilder::new().schema_type(Type::Number).minimum(Some(-100)).maximum(Some(100));
    let id = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[0-9]{1,9}$"));
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::Object, Type::Null]))
        .description(Some("Token ids with what is added to their logits, −100 to 100."))
        .additional_properties(Some(bias))
        .property_names(Some(id.build()))
        .build()
}

/// A string or several.
fn stops() -> Schema {
    let one = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).build();
    OneOfBuilder::new()
        .description(Some("The answer ends before the first of these."))
        .item(one.clone())
        .item(ArrayBuilder::new().items(one).max_items(Some(MAX_STOPS)))
        .item(ObjectBuilder::new().schema_type(Type::Null))
        .into()
}

/// About a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct StreamOptions {
    /// A last event with the counts of tokens; those before have null in its place.
    pub include_usage: Option<bool>,
}

/// One string or several.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

impl Sampling {
    /// Answers to each prompt.
    pub fn n(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_N => Ok(n as usize),
            n => Err(out_of_range("n", format!("1 to {MAX_N}"), n)),
        }
    }

    /// Whether the answer is streamed.
    pub fn streams(&self) -> Result<bool, ApiError> {
        let streams = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !streams {
            return Err(ApiError::field("stream_options", "`stream_options` is for streams only; set `stream` to true."));
        }
        Ok(streams)
    }

    /// Whether the stream ends with counts.
    pub fn includes_usage(&self) -> bool {
        self.stream_options.and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// What was said of the most tokens, and in which field.
    pub fn max_tokens(&self) -> Option<(&'static str, usize)> {
        let later = self.max_completion_tokens.map(|most| ("max_completion_tokens", most as usize));
        later.or(self.max_tokens.map(|most| ("max_tokens", most as usize)))
    }

    /// The engine's parameters, all checked. `seed`: the one to take if none is given.
    ///
    /// # Errors
    /// 400 that names the first field out of range.
    pub fn params(&self, seed: u64, max_tokens: usize) -> Result<SamplingParams, ApiError> {
        let default = SamplingParams::default();
        let stop = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Several(stops)) => stops.clone(),
        };
        if stop.len() > MAX_STOPS {
            return Err(ApiError::field("stop", format!("`stop`: expected at most {MAX_STOPS} strings, got {}", stop.len())));
        }
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            k => usize::try_from(k).map_err(|_| out_of_range("top_k", "a number ≥ -1", k))?,
        };
        let params = SamplingParams {
            temperature: in_range("temperature", 0.0..=2.0, self.temperature, default.temperature)?,
            top_p: self.top_p.unwrap_or(default.top_p),
            top_k,
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            presence_penalty: in_range("presence_penalty", -2.0..=2.0, self.presence_penalty, default.presence_penalty)?,
            frequency_penalty: in_range("frequency_penalty", -2.0..=2.0, self.frequency_penalty, default.frequency_penalty)?,
            logit_bias: self.logit_bias()?,
            seed: self.seed.map_or(seed, i64::cast_unsigned),
            stop,
            stop_ids: self.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            max_tokens,
        };
        params.validate().map_err(|error| ApiError::engine(&error, "prompt"))?;
        Ok(params)
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let biases = self.logit_bias.iter().flatten().map(|(token, &bias)| {
            let id = token.parse().map_err(|_| ApiError::field("logit_bias", format!("`logit_bias`: `{token}` is no token id")))?;
            in_range("logit_bias", -100.0..=100.0, Some(bias), 0.0).map(|bias| (id, bias))
        });
        biases.collect()
    }
}

fn out_of_range(field: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> ApiError {
    ApiError::field(field, format!("`{field}`: expected {expected}, got {got}"))
}

fn in_range(field: &str, range: RangeInclusive<f32>, value: Option<f32>, default: f32) -> Result<f32, ApiError> {
    match value.unwrap_or(default) {
        value if range.contains(&value) => Ok(value),
        value => Err(out_of_range(field, format!("a number from {} to {}", range.start(), range.end()), value)),
    }
}
