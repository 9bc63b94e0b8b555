//! What a browser is told about pages of other sites.
use ernie_serve::ServeConfig;
use ernie_serve::accounts::keys::Scope;
use serde_json::json;

use crate::accounts::Accounts;
use crate::client::{Reply, Running};
use crate::databases;

const ORIGIN: &str = "https://chat.example";

fn header<'a>(reply: &'a Reply, name: &str) -> Option<&'a str> {
    reply.headers.get(name).map(|value| value.to_str().unwrap())
}

fn allowed(reply: &Reply) -> Option<&str> {
    header(reply, "access-control-allow-origin")
}

fn preflight(server: &Running, path: &str, origin: &str) -> Reply {
    let asks = server.header("origin", origin).header("access-control-request-method", "POST");
    asks.header("access-control-request-headers", "authorization,content-type,x-stainless-os").ask("OPTIONS", path, None)
}

#[test]
fn pages_of_other_sites_are_told_nothing_by_default() {
    let server = Running::start();
    let reply = preflight(&server, "/v1/chat/completions", ORIGIN);
    assert_eq!((reply.status, allowed(&reply)), (405, None));
    let reply = server.header("origin", ORIGIN).get("/v1/models");
    assert!(reply.headers.keys().all(|name| !name.as_str().starts_with("access-control") && name != "vary"), "{:?}", reply.headers);
}

#[test]
fn named_pages_may_use_the_api_and_nothing_else() {
    let cors_origins = vec!["http://localhost:3000".to_owned(), ORIGIN.to_owned()];
    let accounts = Accounts::with(databases::either(), ServeConfig { cors_origins, ..ServeConfig::default() });
    let (server, key) = (&accounts.server, accounts.scoped(&[Scope::Models, Scope::Completions, Scope::Admin]));
    // A browser asks without a key.
    let reply = preflight(server, "/v1/chat/completions", ORIGIN);
    assert_eq!((reply.status, allowed(&reply)), (204, Some(ORIGIN)));
    assert_eq!(header(&reply, "access-control-allow-headers"), Some("authorization,content-type,x-stainless-os"));
    assert_eq!(header(&reply, "access-control-allow-methods"), Some("GET, POST"));
    assert!(header(&reply, "access-control-max-age").is_some() && header(&reply, "access-control-allow-credentials").is_none());
    // Answers and refusals can be read, and which page that is said for is known to caches between.
    let ask = |origin: &str| server.with_key(&key).header("origin", origin).get("/v1/models");
    assert_eq!((ask(ORIGIN).status, allowed(&ask(ORIGIN)), header(&ask(ORIGIN), "vary")), (200, Some(ORIGIN), Some("origin")));
    assert!(header(&ask(ORIGIN), "access-control-expose-headers").unwrap().contains("x-request-id"));
    let refused = server.header("origin", ORIGIN).get("/v1/models");
    refused.error(401);
    assert_eq!(allowed(&refused), Some(ORIGIN));
    // Others not, be they nearly the same.
    for origin in ["https://evil.example", "https://chat.example.evil.example", "http://chat.example", "https://chat.example:444", "null"] {
        assert_eq!(
            (preflight(server, "/v1/completions", origin).status, allowed(&preflight(server, "/v1/completions", origin))),
            (401, None)
        );
        assert_eq!((allowed(&ask(origin)), header(&ask(origin), "vary")), (None, Some("origin")), "{origin}");
    }
    // Nor anything but the API.
    for path in ["/admin/api/keys", "/metrics", "/health/live", "/openapi.json", "/", "/v1"] {
        assert!(matches!(preflight(server, path, ORIGIN).status, 401 | 405), "{path}");
        assert_eq!(allowed(&server.with_key(&key).header("origin", ORIGIN).get(path)), None, "{path}");
    }
    // Who asks for a page that may not is not let in without a key either.
    assert_eq!(server.header("origin", ORIGIN).ask("OPTIONS", "/v1/models", None).status, 401);
}

#[test]
fn all_pages_may_where_that_is_said_and_other_protection_stays() {
    let server = Running::with(ServeConfig { cors_origins: vec!["*".to_owned()], ..ServeConfig::default() });
    let reply = preflight(&server, "/v1/completions", "http://any.example");
    assert_eq!((reply.status, allowed(&reply)), (204, Some("*")));
    let body = json!({"prompt": "x", "max_tokens": 2, "stream": true});
    let reply = server.header("origin", "http://any.example").post("/v1/completions", &body);
    assert_eq!((reply.status, allowed(&reply)), (200, Some("*")));
    // A name that was led here, and changes of the administration without keys.
    assert_eq!(server.header("origin", "http://evil.example").header("host", "evil.example").get("/v1/models").status, 403);
    let change = server.header("origin", "http://any.example").ask("PATCH", "/admin/api/settings", Some(&json!({})));
    assert_eq!((change.status, allowed(&change)), (403, None));
}
