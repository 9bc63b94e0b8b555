//! Which route needs which scope: one table, and what is not in it is refused.
use std::sync::Arc;

use axum::extract::MatchedPath;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};

use super::Caller;
use super::keys::Scope;
use crate::api_error::ApiError;
use crate::exchange::Notes;
use crate::state::Shared;

/// What a route needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Public,
    /// A key with this scope.
    Scope(Scope),
}

use Access::Public;
const fn scope(scope: Scope) -> Access {
    Access::Scope(scope)
}

/// Every route by its pattern. A route that is missing here is answered with 403.
pub const ROUTES: &[(&str, Access)] = &[
    ("/", Public),
    ("/assets/{file}", Public),
    ("/health/live", Public),
    ("/health/ready", Public),
    ("/openapi.json", Public),
    ("/v1/models", scope(Scope::Models)),
    ("/v1/models/{model}", scope(Scope::Models)),
    ("/v1/completions", scope(Scope::Completions)),
    ("/v1/chat/completions", scope(Scope::Chat)),
    ("/v1/embeddings", scope(Scope::Embeddings)),
    ("/v1/tokenize", scope(Scope::Tokenize)),
    ("/v1/detokenize", scope(Scope::Tokenize)),
    ("/v1/live", scope(Scope::Metrics)),
    ("/metrics", scope(Scope::Metrics)),
    ("/admin/api/session", scope(Scope::Admin)),
    ("/admin/api/keys", scope(Scope::Admin)),
    ("/admin/api/keys/{id}", scope(Scope::Admin)),
    ("/admin/api/keys/{id}/revoke", scope(Scope::Admin)),
    ("/admin/api/usage", scope(Scope::Admin)),
    ("/admin/api/audit", scope(Scope::Admin)),
    ("/admin/api/settings", scope(Scope::Admin)),
];

/// Lets a request in or not. `open`: there are no keys. Whose key it was is noted, let in or not.
///
/// # Errors
/// 401, 403, 429, or 503 if the database is away.
pub async fn authorise(state: &Shared, open: bool, request: &Parts, notes: &Notes) -> Result<Caller, ApiError> {
    let route = request.extensions.get::<MatchedPath>().map(MatchedPath::as_str);
    let access = match route {
        Some(route) => Some(ROUTES.iter().find(|(path, _)| *path == route).map(|(_, access)| *access).ok_or_else(ApiError::no_scope)?),
        // Nothing is there; but only who may be here is told so.
        None => None,
    };
    if access == Some(Access::Public) {
        return Ok(Caller(None));
    }
    if open {
        let administers = access == Some(Access::Scope(Scope::Admin));
        if administers && !matches!(request.method, Method::GET | Method::HEAD) && is_cross_site(&request.headers) {
            let message = "Without keys a page of another site may not change anything here.";
            return Err(ApiError::request(StatusCode::FORBIDDEN, Some("cross_site"), message));
        }
        return Ok(Caller(None));
    }
    let presented = request.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let presented = presented.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    let key = state.accounts.authenticate(presented.ok_or_else(ApiError::no_valid_key)?).await?;
    notes.key(&key);
    state.accounts.count_request(&key)?;
    if let Some(Access::Scope(wanted)) = access {
        if !key.allows(wanted) {
            return Err(ApiError::insufficient_scope(wanted));
        }
        let infers = matches!(wanted, Scope::Chat | Scope::Completions | Scope::Embeddings | Scope::Tokenize);
        if infers && !key.allows_model(&state.name) {
            let message = format!("This key may not use the model `{}`.", state.name);
            return Err(ApiError::request(StatusCode::FORBIDDEN, Some("model_not_allowed"), message));
        }
    }
    Ok(Caller(Some(Arc::clone(&key))))
}

/// Whether a browser says that a page from elsewhere sends this. Other programs say nothing.
fn is_cross_site(headers: &HeaderMap) -> bool {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let elsewhere = text(HeaderName::from_static("sec-fetch-site")).is_some_and(|site| !matches!(site, "same-origin" | "none"));
    let host = text(header::HOST).unwrap_or_default();
    let foreign =
        text(header::ORIGIN).is_some_and(|origin| origin.strip_prefix("http://").or(origin.strip_prefix("https://")) != Some(host));
    elsewhere || foreign
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn pages_of_elsewhere_are_known() {
        let headers = |list: &[(&'static str, &'static str)]| {
            list.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect::<HeaderMap>()
        };
        let host = ("host", "localhost:8080");
        for own in [vec![], vec![("sec-fetch-site", "same-origin"), ("origin", "http://localhost:8080")], vec![("sec-fetch-site", "none")]]
        {
            assert!(!is_cross_site(&headers(&[&[host], &own[..]].concat())), "{own:?}");
        }
        for (name, value) in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("origin", "null"),
            ("origin", "http://localhost:3000"),
            ("origin", "http://evil.example"),
        ] {
            assert!(is_cross_site(&headers(&[host, (name, value)])), "{name}: {value}");
        }
    }

    #[test]
    fn no_route_stands_twice() {
        let mut paths: Vec<_> = ROUTES.iter().map(|(path, _)| path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), ROUTES.len());
    }
}
