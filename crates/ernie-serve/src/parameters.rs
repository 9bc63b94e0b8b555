//! What stands in the URL of a request: a name in its path, a query. What is wrong with either is said as everywhere, with the parameter's name.
use std::error::Error;

use axum::extract::path::ErrorKind;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use crate::api_error::ApiError;

/// The one parameter of a path.
#[derive(Debug)]
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(segment)) => Ok(Segment(segment)),
            Err(PathRejection::FailedToDeserializePathParams(error)) => Err(match error.kind() {
                ErrorKind::InvalidUtf8InPathParam { key } => ApiError::field(key, format!("`{key}`: expected UTF-8, percent-encoded")),
                _ => ApiError::request(StatusCode::BAD_REQUEST, None, error.body_text()),
            }),
            // A route without parameters would be our own fault.
            Err(error) => Err(ApiError::internal(error.body_text())),
        }
    }
}

type Fault = serde_path_to_error::Error<serde::de::value::Error>;

/// What is wrong, and where.
fn cause<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Fault> {
    error.downcast_ref().or_else(|| cause(error.source()?))
}

/// A query.
#[derive(Debug)]
pub struct Asked<T>(pub T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Query(asked) = Query::try_from_uri(&parts.uri).map_err(|rejection| {
            let Some(cause) = cause(&rejection) else { return ApiError::request(StatusCode::BAD_REQUEST, None, rejection.body_text()) };
            let (path, text) = (cause.path().to_string(), cause.inner().to_string());
            // A parameter that comes twice has no place of its own.
            let twice = text.strip_prefix("duplicate field `").and_then(|rest| rest.split('`').next());
            match twice.unwrap_or(&path) {
                "." => ApiError::request(StatusCode::BAD_REQUEST, None, text),
                param => ApiError::field(param, format!("`{param}`: {text}")),
            }
        })?;
        Ok(Asked(asked))
    }
}
