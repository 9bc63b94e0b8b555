//! Errors as clients of OpenAI's API read them: `{"error": {"message", "type", "param", "code"}}` with a fitting status.
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::accounts::keys::Scope;
use crate::worker::Refused;

/// Seconds after which a client that found the server full may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// The body of every error.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong, and where.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For people: what was expected and what came.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error`, `insufficient_quota` or `server_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field of the request, if it is one field's fault.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
}

/// An error on its way to the client.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    detail: ErrorDetail,
    /// Seconds after which to come again, if that is known.
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        ApiError { status, detail: ErrorDetail { message: message.into(), kind, param: None, code }, retry_after: None }
    }

    /// The request is at fault: 4xx.
    pub fn request(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    /// A field of the request is out of range or of the wrong kind: 400.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, None, message).of(param)
    }

    /// A model that is not there, or not for this key: 404, as OpenAI answers.
    pub fn no_model(name: &str) -> Self {
        let message = format!("The model `{name}` does not exist or is not yours to use; see /v1/models.");
        Self::request(StatusCode::NOT_FOUND, Some("model_not_found"), message).of("model")
    }

    /// A field asks for what this server does not do: 400.
    pub fn unsupported(param: &str, what: &str) -> Self {
        let mut error = Self::field(param, format!("`{param}`: {what}"));
        error.detail.code = Some("unsupported_value");
        error
    }

    /// The server has as much to do as it can: 429.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server takes no more requests: 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable"), message)
    }

    /// The server is at fault: 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// No key, or none that is taken: one answer for all of them, so that nobody learns which it was. 401.
    pub fn no_valid_key() -> Self {
        let message = "No valid API key. Send one that is neither revoked nor expired as `Authorization: Bearer KEY`.";
        Self::request(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    /// The key of an answer under way was revoked or has expired: 401.
    pub fn key_ended() -> Self {
        let message = "The API key of this request was revoked or has expired meanwhile.";
        Self::request(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    /// The answer took longer than it may: 504.
    pub fn out_of_time(seconds: u64) -> Self {
        let message = format!("The answer was cut off: it took more than the {seconds} s that one may take here, waiting included.");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout"), message)
    }

    /// The key is known but was not made for this: 403.
    pub fn insufficient_scope(wanted: Scope) -> Self {
        let message = format!("This key does not have the scope `{wanted}`.");
        Self::request(StatusCode::FORBIDDEN, Some("insufficient_scope"), message)
    }

    /// A route for which nobody said who may use it: 403.
    pub fn no_scope() -> Self {
        Self::request(StatusCode::FORBIDDEN, Some("insufficient_scope"), "No key may be used for this.")
    }

    /// A key's minute is full: 429 that says in how many seconds it is not.
    pub fn rate_limited(message: impl Into<String>, wait: u64) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"), message);
        ApiError { retry_after: Some(wait), ..error }
    }

    /// More tokens than a key's minute ever has: 400, for waiting would not help.
    pub fn too_large_for_limit(message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, Some("request_too_large_for_limit"), message)
    }

    /// A key's tokens of the month are used up: 429, as OpenAI answers; `wait`: seconds to the next month.
    pub fn quota(message: impl Into<String>, wait: u64) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", Some("insufficient_quota"), message);
        ApiError { retry_after: Some(wait), ..error }
    }

    /// A key's money of the month is spent: 402.
    pub fn budget(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYMENT_REQUIRED, "insufficient_quota", Some("budget_exceeded"), message)
    }

    /// Who asks cannot be seen, or what they use not be written down: 503. `what` goes before the advice.
    pub fn accounts_away(what: &str) -> Self {
        let message = format!("{what}; try again later.");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("accounts_unavailable"), message)
    }

    /// The same, of one field.
    pub fn of(mut self, param: impl Into<String>) -> Self {
        self.detail.param = Some(param.into());
        self
    }

    /// Prompt and answer do not fit in the context.
    pub fn too_long(param: &str, needed: usize, limit: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {limit} tokens; this request needs {needed}. Shorten the prompt or the answer."
        );
        Self::request(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), message).of(param)
    }

    /// Of a job that was not taken.
    pub fn refused(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self::busy("The server's queue is full; try again later."),
            Refused::TooMany { places } => {
                let message = format!("This request asks for more answers than the {places} places of the server's queue.");
                Self::request(StatusCode::BAD_REQUEST, Some("too_many_choices"), message).of("n")
            }
            Refused::Closed => Self::unavailable("The server is shutting down."),
        }
    }

    /// Of something that the engine refused. `param`: the field that holds the prompt.
    pub fn engine(error: &ernie_engine::Error, param: &str) -> Self {
        use ernie_engine::Error;
        match error {
            Error::Parameter { field, .. } => Self::field(*field, error.to_string()),
            Error::ContextLength { needed, limit } => Self::too_long(param, *needed, *limit),
            Error::EmptyPrompt | Error::UnknownToken { .. } => Self::field(param, error.to_string()),
            Error::Constraint { .. } => Self::request(StatusCode::BAD_REQUEST, Some("constraint_failed"), error.to_string()),
            Error::OutOfMemory { .. } => Self::unavailable(error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }

    /// The body, for a stream that has begun.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, self.retry_after.map_or(RETRY_AFTER, HeaderValue::from));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
