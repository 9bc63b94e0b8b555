//! Bodies of requests: their size, their time, and what JSON says where.
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use hyper::body::{Frame, SizeHint};
use serde::de::{DeserializeOwned, DeserializeSeed};

use crate::api_error::ApiError;
use crate::state::Shared;
use crate::worker::Refused;

/// Bytes of a body that are read although the request is refused, and how long they are waited for: a connection that is closed while some are on their way may
/// take the answer with it.
const DISCARDED: usize = 64 << 10;
const DISCARD_TIME: Duration = Duration::from_millis(500);

/// What nobody has read of a body.
#[derive(Clone, Debug, Default)]
pub struct Leftover(Arc<Mutex<Option<Body>>>);

impl Leftover {
    /// The body, of which this gets what is left when it is dropped.
    pub fn watch(&self, body: Body) -> Body {
        Body::new(Watched { body: Some(body), leftover: self.clone() })
    }

    /// Reads the rest, if it is short and comes soon. To be called when all is answered.
    pub async fn discard(&self) {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(body) = body.filter(|body| body.size_hint().lower() <= DISCARDED as u64) {
            drop(tokio::time::timeout(DISCARD_TIME, to_bytes(body, DISCARDED)).await);
        }
    }
}

/// A body that gives back what is not read of it.
struct Watched {
    /// None once it has come to its end.
    body: Option<Body>,
    leftover: Leftover,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let rest = self.body.take().filter(|body| !body.is_end_stream());
        *self.leftover.0.lock().unwrap_or_else(PoisonError::into_inner) = rest;
    }
}

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
        // Compressed, or in another character set, it would be read as something else than was meant.
        let encodings = request.headers().get_all(header::CONTENT_ENCODING).iter();
        let encoded = encodings.map(|value| value.to_str().unwrap_or("?")).flat_map(|value| value.split(',')).map(str::trim);
        if let Some(encoding) = encoded.into_iter().find(|encoding| !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity")) {
            let message = format!("The body must come as it is, without `content-encoding`; got `{}`.", encoding.escape_debug());
            return Err(ApiError::request(StatusCode::UNSUPPORTED_MEDIA_TYPE, Some("unsupported_content_encoding"), message));
        }
        let charset = kind.split(';').skip(1).find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("charset").then(|| value.trim().trim_matches('"'))
        });
        if let Some(charset) = charset.filter(|charset| !charset.eq_ignore_ascii_case("utf-8") && !charset.eq_ignore_ascii_case("utf8")) {
            let message = format!("The body must be UTF-8, as all JSON; got `charset={}`.", charset.escape_debug());
            return Err(ApiError::request(StatusCode::UNSUPPORTED_MEDIA_TYPE, Some("unsupported_charset"), message));
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
        let read = tokio::time::timeout(Duration::from_secs(state.config.body_timeout_s), to_bytes(body, limit));
        let read = tokio::select! {
            read = read => read,
            () = state.closed() => return Err(ApiError::refused(Refused::Closed)),
        };
        match read {
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
