//! Bodies of requests: their size, their time, and what JSON says where.
use std::marker::PhantomData;
use std::time::Duration;

use axum::body::{Body, HttpBody, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::{DeserializeOwned, DeserializeSeed};

use crate::api_error::ApiError;
use crate::state::Shared;

/// A whole body that says it is JSON. Types are read from it by [`JsonBody::parse`], as many as there are.
#[derive(Debug)]
pub struct JsonBody(Vec<u8>);

impl FromRequest<Shared> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Shared) -> Result<Self, ApiError> {
        // A page of another site can make a browser send text, but not JSON without asking first.
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
            let message = "The body must be JSON; send the header `content-type: application/json`.";
            return Err(ApiError::request(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, message));
        }
        let limit = state.config.max_body_bytes;
        let too_large = || {
            let message = format!("The body is larger than {limit} bytes.");
            ApiError::request(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
        };
        let body: Body = request.into_body();
        if body.size_hint().lower() > limit as u64 {
            return Err(too_large());
        }
        match tokio::time::timeout(Duration::from_secs(state.config.body_timeout_s), to_bytes(body, limit)).await {
            Ok(Ok(bytes)) => Ok(JsonBody(bytes.into())),
            // The other reason, a client that is gone, reads no answer.
            Ok(Err(_)) => Err(too_large()),
            Err(_) => Err(ApiError::request(StatusCode::REQUEST_TIMEOUT, None, "The body did not come in time.")),
        }
    }
}

impl JsonBody {
    /// Reads a type; fields that it does not know are passed over.
    ///
    /// # Errors
    /// 400 that names the field at fault, if it is one.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        self.parse_with(PhantomData)
    }

    /// Reads it with a state.
    ///
    /// # Errors
    /// As [`JsonBody::parse`].
    pub fn parse_with<T>(&self, seed: impl for<'de> DeserializeSeed<'de, Value = T>) -> Result<T, ApiError> {
        // Fields by their places in a list would be taken too.
        if self.0.trim_ascii_start().first() == Some(&b'[') {
            return Err(ApiError::request(StatusCode::BAD_REQUEST, None, "expected a JSON object, got a list"));
        }
        let mut json = serde_json::Deserializer::from_slice(&self.0);
        let refuse = |error: &serde_json::Error, param: Option<String>| {
            let place = param.as_ref().map_or(String::new(), |param| format!("`{param}`: "));
            let error = ApiError::request(StatusCode::BAD_REQUEST, None, format!("{place}{error}"));
            param.into_iter().fold(error, ApiError::of)
        };
        let mut track = serde_path_to_error::Track::new();
        let value = seed.deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track)).map_err(|error| {
            let path = track.path().to_string();
            let inside = (path != ".").then_some(path);
            let text = error.to_string();
            let missing = text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
            let field = match (inside, missing) {
                (Some(path), Some(missing)) => Some(format!("{path}.{missing}")),
                (None, Some(missing)) => Some(missing.to_owned()),
                (inside, None) => inside,
            };
            // What is no JSON is nobody's field.
            refuse(&error, field.filter(|_| error.is_data()))
        })?;
        json.end().map_err(|error| refuse(&error, None))?;
        Ok(value)
    }
}
