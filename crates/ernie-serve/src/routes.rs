//! Which path does what; and what goes around every request: its id, its line in the log, its count.
use std::sync::atomic::Ordering;

use axum::extract::{MatchedPath, Request, State as Extract};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::Serialize;
use utoipa::ToSchema;

use crate::accounts::Caller;
use crate::accounts::access;
use crate::accounts::limits::Rate;
use crate::api_error::ApiError;
use crate::body::Leftover;
use crate::chat::chat_completions;
use crate::completions::completions;
use crate::description::openapi;
use crate::embeddings::embeddings;
use crate::exchange::{Asked, Exchange};
use crate::parameters::Segment;
use crate::request_id::{self, RequestId};
use crate::settings::{change_settings, settings};
use crate::state::{Shared, State};
use crate::tokens::{detokenize, tokenize};
use crate::{admin, cors, page};

/// All routes.
pub fn router(state: Shared) -> Router {
    Router::new()
        .route("/v1/models", get(list_models))
        .route("/v1/models/{model}", get(one_model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/tokenize", post(tokenize))
        .route("/v1/detokenize", post(detokenize))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/live", get(crate::live::events))
        .route("/admin/api/settings", get(settings).patch(change_settings))
        .route("/", get(page::index))
        .route("/assets/{file}", get(page::asset))
        .route("/openapi.json", get(openapi))
        .merge(admin::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(middleware::from_fn_with_state(state.clone(), around))
        .with_state(state)
}

/// A model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelEntry {
    /// Its name.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// When the server started, Unix seconds.
    pub created: u64,
    /// Whose it is.
    pub owned_by: &'static str,
    /// Most tokens of a request, prompt and answer together.
    pub max_model_len: usize,
}

/// All models: one, or none if the key may not use it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: &'static str,
    /// The models.
    pub data: Vec<ModelEntry>,
}

fn entry(state: &State) -> ModelEntry {
    ModelEntry { id: state.name.clone(), object: "model", created: state.started, owned_by: "ernie", max_model_len: state.max_len }
}

/// The models
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, description = "The models", body = ModelList)))]
pub(crate) async fn list_models(Extract(state): Extract<Shared>, Extension(caller): Extension<Caller>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: caller.allows_model(&state.name).then(|| entry(&state)).into_iter().collect() })
}

/// One model
#[utoipa::path(get, path = "/v1/models/{model}", tag = "openai", params(("model" = String, Path, description = "Its name")), responses(
    (status = 200, description = "The model", body = ModelEntry),
))]
pub(crate) async fn one_model(
    Extract(state): Extract<Shared>,
    Extension(caller): Extension<Caller>,
    Segment(model): Segment,
) -> Result<Json<ModelEntry>, ApiError> {
    state.check_model(Some(&model))?;
    if !caller.allows_model(&model) {
        return Err(ApiError::no_model(&model));
    }
    Ok(Json(entry(&state)))
}

/// Whether the process answers
#[utoipa::path(get, path = "/health/live", tag = "operation", responses((status = 200, description = "It does", body = String)))]
pub(crate) async fn live() -> &'static str {
    "live\n"
}

/// Whether requests are taken
#[utoipa::path(get, path = "/health/ready", tag = "operation", responses(
    (status = 200, description = "They are", body = String),
))]
pub(crate) async fn ready(Extract(state): Extract<Shared>) -> Result<&'static str, ApiError> {
    if !state.worker.is_open() || state.draining.load(Ordering::SeqCst) {
        return Err(ApiError::unavailable("The server takes no requests."));
    }
    // Requests with keys cannot be answered without the accounts.
    let limit = std::time::Duration::from_secs(1);
    match tokio::time::timeout(limit, state.accounts.is_at_hand()).await {
        Ok(true) => Ok("ready\n"),
        _ => Err(ApiError::accounts_away("The server's database does not answer at present")),
    }
}

/// What Prometheus asks for.
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Counters and histograms
#[utoipa::path(get, path = "/metrics", tag = "operation", responses((status = 200, description = "OpenMetrics text", body = String, content_type = METRICS)))]
pub(crate) async fn metrics(Extract(state): Extract<Shared>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, METRICS)], state.metrics.page(state.worker.waiting()))
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::request(StatusCode::NOT_FOUND, Some("unknown_url"), format!("There is nothing at {}; see /openapi.json.", uri.path()))
}

async fn not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::request(StatusCode::METHOD_NOT_ALLOWED, None, format!("{method} is not what {} answers; see /openapi.json.", uri.path()))
}

/// Names the request, refuses what a page of another site may have sent, notes the answer.
async fn around(Extract(state): Extract<Shared>, request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers(), &state);
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let asked = Asked { id: id.clone(), method: request.method().clone(), route };
    let mut exchange = Exchange::new(&state, asked, &request);
    let notes = exchange.notes();
    let (mut head, body) = request.into_parts();
    let (leftover, waits) = (Leftover::default(), head.headers.contains_key(header::EXPECT));
    let body = leftover.watch(body);
    let page = cors::Page::of(&state.config.cors_origins, &head);
    let host = head.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let of_this_machine = host.is_none_or(is_this_machine);
    let open = state.accounts.is_open().await;
    let mut response = if open && !of_this_machine {
        drop(body);
        let message = "Without keys the server answers to names of this machine only: localhost, 127.0.0.1, [::1].";
        ApiError::request(StatusCode::FORBIDDEN, Some("host_not_allowed"), message).into_response()
    } else if let Some(answer) = page.as_ref().and_then(cors::Page::answer) {
        drop(body);
        answer
    } else {
        match access::authorise(&state, open, &head, &notes).await {
            Ok(caller) => {
                head.extensions.insert(id.clone());
                head.extensions.insert(caller);
                head.extensions.insert(notes.clone());
                next.run(Request::from_parts(head, body)).await
            }
            Err(error) => {
                drop(body);
                error.into_response()
            }
        }
    };
    // Who waits to be told to send a body has not sent it.
    if !waits {
        leftover.discard().await;
    }
    exchange.answered(response.status().as_u16());
    if let Ok(id) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(request_id::HEADER, id);
    }
    if let Some(key) = notes.known_key() {
        rate_headers(response.headers_mut(), state.accounts.rates(&key));
    }
    if let Some(page) = page {
        page.tell(response.headers_mut());
    }
    // Its body may go on for long.
    response.map(|body| exchange.over(body))
}

/// How far a key's limits of a minute are used, as OpenAI says it; of those that it has.
fn rate_headers(headers: &mut HeaderMap, rates: [Option<Rate>; 2]) {
    const NAMES: [[HeaderName; 3]; 2] = [
        [
            HeaderName::from_static("x-ratelimit-limit-requests"),
            HeaderName::from_static("x-ratelimit-remaining-requests"),
            HeaderName::from_static("x-ratelimit-reset-requests"),
        ],
        [
            HeaderName::from_static("x-ratelimit-limit-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-tokens"),
            HeaderName::from_static("x-ratelimit-reset-tokens"),
        ],
    ];
    for ([limit, remaining, reset], rate) in NAMES.into_iter().zip(rates) {
        let Some(rate) = rate else { continue };
        headers.insert(limit, rate.limit.into());
        headers.insert(remaining, rate.remaining.into());
        if let Ok(duration) = HeaderValue::from_str(&minutes(rate.reset)) {
            headers.insert(reset, duration);
        }
    }
}

/// `1s`, `6m0s`.
fn minutes(seconds: u64) -> String {
    match seconds / 60 {
        0 => format!("{seconds}s"),
        minutes => format!("{minutes}m{}s", seconds % 60),
    }
}

/// Whether a `Host` header means this machine. A page whose name was made to lead here (DNS rebinding) sends its own name.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::{is_this_machine, minutes};

    #[test]
    fn durations_as_openai_writes_them() {
        assert_eq!([0, 1, 59, 60, 61, 360].map(minutes), ["0s", "1s", "59s", "1m0s", "1m1s", "6m0s"]);
    }

    #[test]
    fn names_of_this_machine() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.3.2.1", "[::1]:8080", "[::1]"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in ["", "example.com", "localhost.example.com", "10.0.0.1:80", "[2001:db8::1]", "127.0.0.1.example.com:80"] {
            assert!(!is_this_machine(host), "{host}");
        }
    }
}
