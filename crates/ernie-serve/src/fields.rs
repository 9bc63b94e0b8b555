//! Which fields a request may have: those that the description names, and some of OpenAI's that change no answer.
//!
//! A name that is none of these is a slip or asks for what is not done here; as at OpenAI, either is said rather than passed over.
use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;

use axum::http::StatusCode;
use serde::de::IgnoredAny;
use serde_json::Value;
use utoipa::OpenApi;

use crate::api_error::ApiError;
use crate::body::JsonBody;
use crate::routes::Description;

/// Fields that OpenAI has for its own books, caches and tiers.
const PASSED_OVER: [&str; 9] = [
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

static SCHEMAS: LazyLock<Value> = LazyLock::new(|| {
    serde_json::to_value(Description::openapi()).map(|mut document| document["components"]["schemas"].take()).unwrap_or_default()
});

/// The fields of a request by the name of its schema.
fn fields(schema: &str) -> HashSet<String> {
    let mut found = HashSet::new();
    let mut open = vec![&SCHEMAS[schema]];
    while let Some(schema) = open.pop() {
        found.extend(schema["properties"].as_object().into_iter().flat_map(|fields| fields.keys().cloned()));
        open.extend(schema["allOf"].as_array().into_iter().flatten());
        open.extend(schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()).map(|name| &SCHEMAS[name]));
    }
    found
}

/// Checks the names of a body's fields. `known`: as [`Known::of`] found them.
///
/// # Errors
/// 400 that names the first field that is unknown; a body that is no object.
pub fn check(body: &JsonBody, known: &Known) -> Result<(), ApiError> {
    // Null, which is as good as absent, is `None`; values are not looked at.
    let given: BTreeMap<String, Option<IgnoredAny>> = body.parse()?;
    match given.iter().find(|(name, value)| value.is_some() && !known.0.contains(name.as_str())) {
        None => Ok(()),
        Some((name, _)) => {
            let message = format!("Unrecognized request argument supplied: {name}");
            Err(ApiError::request(StatusCode::BAD_REQUEST, Some("unknown_parameter"), message).of(name))
        }
    }
}

/// The fields of one request.
#[derive(Debug)]
pub struct Known(HashSet<String>);

impl Known {
    /// Those of a schema of the description.
    pub fn of(schema: &str) -> Self {
        let mut known = fields(schema);
        known.extend(PASSED_OVER.map(str::to_owned));
        Known(known)
    }
}
