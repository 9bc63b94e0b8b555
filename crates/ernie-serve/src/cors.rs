//! Pages of other sites: which may use `/v1`, as browsers ask (CORS). None unless the configuration names them.
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};

/// Any page.
const ANY: &str = "*";
/// Headers of answers that pages may read.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "retry-after, x-request-id, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, \
     x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens",
);
/// Seconds that browsers may remember what they may send.
const REMEMBERED: HeaderValue = HeaderValue::from_static("600");

/// What the page that sends a request may do.
#[derive(Clone, Debug)]
pub struct Page {
    /// As the answer names it; `None` for a page that may not read it.
    allowed: Option<HeaderValue>,
    /// Whether only a browser asks, before it sends the request itself; with the headers that it would send.
    preflight: Option<Option<HeaderValue>>,
}

impl Page {
    /// That of a request, if any page may use its path.
    pub fn of(origins: &[String], request: &Parts) -> Option<Self> {
        if origins.is_empty() || !request.uri.path().starts_with("/v1/") {
            return None;
        }
        let header = |name: HeaderName| request.headers.get(name);
        let origin = header(header::ORIGIN);
        let any = origins.iter().any(|allowed| allowed == ANY);
        let allowed = origin.filter(|origin| any || origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()));
        let asks = request.method == Method::OPTIONS && origin.is_some() && header(header::ACCESS_CONTROL_REQUEST_METHOD).is_some();
        Some(Page {
            allowed: allowed.map(|origin| if any { HeaderValue::from_static(ANY) } else { origin.clone() }),
            preflight: asks.then(|| header(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned()),
        })
    }

    /// The answer to a browser that only asks, for a page that may. It has no key with it yet.
    pub fn answer(&self) -> Option<Response> {
        let wanted = self.preflight.as_ref()?;
        self.allowed.as_ref()?;
        let mut response = StatusCode::NO_CONTENT.into_response();
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        // All of them: clients send some of their own, and which key it is says `authorization`, not what a browser adds by itself.
        if let Some(wanted) = wanted {
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, REMEMBERED);
        headers.append(header::VARY, HeaderValue::from_static("access-control-request-headers"));
        Some(response)
    }

    /// Says in an answer who may read it.
    pub fn tell(self, headers: &mut HeaderMap) {
        if let Some(allowed) = self.allowed {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        }
        // Another page gets another answer.
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
}

/// Checks an origin of the configuration: `*`, or as browsers write one.
///
/// # Errors
/// What was expected.
pub fn check(origin: &str) -> Result<(), String> {
    let written = |(scheme, host): (&str, &str)| {
        let url = origin.parse::<axum::http::Uri>().ok()?;
        let plain = !scheme.is_empty() && url.host().is_some_and(|name| !name.is_empty()) && !host.contains(['/', '?', '#', '@', '*']);
        let default = matches!((scheme, url.port_u16()), ("http", Some(80)) | ("https", Some(443)));
        (plain && !default && origin == origin.to_ascii_lowercase()).then_some(())
    };
    if origin == ANY || origin.split_once("://").and_then(written).is_some() {
        return Ok(());
    }
    Err(format!("expected origins as browsers write them, https://HOST or http://HOST:PORT in small letters, or *; got {origin:?}"))
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn origins_as_browsers_write_them() {
        for origin in ["*", "https://chat.example", "http://localhost:3000", "http://[::1]:8080", "tauri://localhost"] {
            assert!(check(origin).is_ok(), "{origin}");
        }
        let wrong = [
            "",
            "null",
            "chat.example",
            "https://chat.example/",
            "https://Chat.example",
            "https://*.example",
            "http://",
            "https://a.b:443",
        ];
        for origin in wrong {
            assert!(check(origin).unwrap_err().contains("https://HOST"), "{origin}");
        }
    }
}
