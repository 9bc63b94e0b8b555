//! The page and its files.
use std::path::Path;

use crate::client::{Reply, Running};

/// Names in `quotes` after a word.
fn named(text: &str, before: &str) -> Vec<String> {
    text.split(before).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
}

fn is_safe(reply: &Reply) {
    let policy = reply.headers["content-security-policy"].to_str().unwrap();
    for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*') && !policy.contains("http"), "{policy}");
    assert_eq!(reply.headers["x-content-type-options"], "nosniff");
    assert_eq!(reply.headers["referrer-policy"], "no-referrer");
}

#[test]
fn everything_that_the_page_asks_for_is_there() {
    let server = Running::start();
    let page = server.get("/");
    assert_eq!((page.status, page.headers["content-type"].to_str().unwrap()), (200, "text/html; charset=utf-8"));
    is_safe(&page);
    let mut wanted = named(&page.text, "=\"/assets/");
    assert!(wanted.len() > 4);
    let mut seen = Vec::new();
    while let Some(name) = wanted.pop() {
        if seen.contains(&name) {
            continue;
        }
        let file = server.get(&format!("/assets/{name}"));
        assert_eq!(file.status, 200, "{name}");
        is_safe(&file);
        let kind = match Path::new(&name).extension().and_then(|end| end.to_str()) {
            Some("js") => "text/javascript; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            Some("svg") => "image/svg+xml",
            _ => panic!("{name}"),
        };
        assert_eq!(file.headers["content-type"], kind);
        if name.ends_with(".js") {
            wanted.extend(named(&file.text, "from \"./"));
        }
        seen.push(name);
    }
    assert!(seen.len() > 15, "{seen:?}");
}

#[test]
fn what_a_browser_has_is_not_sent_again() {
    let server = Running::start();
    for path in ["/", "/assets/app.js"] {
        let first = server.get(path);
        let tag = first.headers["etag"].to_str().unwrap().to_owned();
        assert_eq!(first.headers["cache-control"], "no-cache");
        for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
            let again = server.get_with(path, "if-none-match", &known);
            assert_eq!((again.status, again.text.as_str()), (304, ""), "{known}");
            assert_eq!(again.headers["etag"].to_str().unwrap(), tag);
            is_safe(&again);
        }
        assert_eq!(server.get_with(path, "if-none-match", "\"other\"").text, first.text);
        let head = server.head(path);
        assert_eq!((head.status, head.text.as_str()), (200, ""));
        assert_eq!(head.headers["content-length"].to_str().unwrap(), first.text.len().to_string());
        assert_eq!(head.headers["etag"].to_str().unwrap(), tag);
        is_safe(&head);
    }
    let tag = |path| server.get(path).headers["etag"].clone();
    assert_ne!(tag("/"), tag("/assets/app.js"));
}

#[test]
fn there_are_no_other_files() {
    let server = Running::start();
    for name in [
        "none.js",
        "index.html",
        "App.js",
        "app.js%00",
        "..%2fsrc%2flib.rs",
        "%2e%2e%2fCargo.toml",
        "..%5cCargo.toml",
        "%2fetc%2fpasswd",
        "app.js/",
        "a/app.js",
        "",
    ] {
        server.get(&format!("/assets/{name}")).error(404);
    }
    server.get("/index.html").error(404);
    server.post("/", &serde_json::json!({})).error(405);
}

/// Every text of the page is there in each language, with the same values in it.
#[test]
fn dictionaries_have_the_same_keys() {
    let server = Running::start();
    let entries = |path: &str| -> Vec<(String, Vec<String>)> {
        let text = server.get(path).text;
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix('"')?.split_once("\": "));
        let values = |text: &str| {
            let mut values: Vec<_> = text.split('{').skip(1).filter_map(|rest| Some(rest.split_once('}')?.0.to_owned())).collect();
            values.sort();
            values
        };
        lines.map(|(key, text)| (key.to_owned(), values(text))).collect()
    };
    let english = entries("/assets/en.js");
    assert!(english.len() > 100);
    assert_eq!(english, entries("/assets/zh.js"));
}
