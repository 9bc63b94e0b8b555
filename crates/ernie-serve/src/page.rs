//! The page: `/` and `/assets/{file}`. Its files are part of the program, so it needs nothing from elsewhere and works without a network.
//!
//! Files are found by name in a table, never on a disk. Browsers keep them and ask with their tag whether they are still the same.
use std::hash::{DefaultHasher, Hasher};
use std::sync::LazyLock;

use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};

use crate::api_error::ApiError;
use crate::parameters::Segment;

/// What a browser may do with the page: its own scripts and styles and its own server, nothing written inside the document, no frame around it. Strings
/// never become markup or code either (trusted types), whatever a model writes.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

const HEADERS: [(HeaderName, &str); 7] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    // Kept, but never used without asking: names do not change with contents.
    (header::CACHE_CONTROL, "no-cache"),
];

struct File {
    name: &'static str,
    kind: &'static str,
    contents: &'static [u8],
}

macro_rules! files {
    ($($name:literal: $kind:expr),* $(,)?) => {
        [$(File { name: $name, kind: $kind, contents: include_bytes!(concat!("../web/", $name)) }),*]
    };
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The first is the page itself.
static FILES: &[File] = &files! {
    "index.html": HTML,
    "favicon.svg": "image/svg+xml",
    "admin-keys.js": SCRIPT,
    "admin-usage.js": SCRIPT,
    "admin.js": SCRIPT,
    "api.js": SCRIPT,
    "app.js": SCRIPT,
    "base.css": CSS,
    "charts.js": SCRIPT,
    "chat.css": CSS,
    "chat.js": SCRIPT,
    "dialog.js": SCRIPT,
    "dom.js": SCRIPT,
    "en.js": SCRIPT,
    "i18n.js": SCRIPT,
    "live.js": SCRIPT,
    "markdown.js": SCRIPT,
    "message.js": SCRIPT,
    "panels.css": CSS,
    "sampling.js": SCRIPT,
    "sidebar.js": SCRIPT,
    "storage.js": SCRIPT,
    "store.js": SCRIPT,
    "theme.js": SCRIPT,
    "zh.js": SCRIPT,
};

/// A tag for each file, in their order: a hash of its contents.
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |file: &File| {
        let mut hasher = DefaultHasher::new();
        hasher.write(file.contents);
        format!("\"{:016x}\"", hasher.finish())
    };
    FILES.iter().map(tag).collect()
});

/// `GET /`
pub async fn index(headers: HeaderMap) -> Response {
    answer(0, &headers)
}

/// `GET /assets/{file}`
pub async fn asset(Segment(name): Segment, uri: Uri, headers: HeaderMap) -> Result<Response, ApiError> {
    match FILES.iter().position(|file| file.name == name) {
        Some(index @ 1..) => Ok(answer(index, &headers)),
        _ => Err(ApiError::request(StatusCode::NOT_FOUND, Some("unknown_url"), format!("There is nothing at {}.", uri.path()))),
    }
}

fn answer(index: usize, asked: &HeaderMap) -> Response {
    let (file, tag) = (&FILES[index], &TAGS[index]);
    let known = asked.get_all(header::IF_NONE_MATCH).iter().filter_map(|tags| tags.to_str().ok()).any(|tags| names(tags, tag));
    let mut response = if known { StatusCode::NOT_MODIFIED.into_response() } else { file.contents.into_response() };
    let headers = response.headers_mut();
    if !known {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(file.kind));
    }
    if let Ok(tag) = HeaderValue::from_str(tag) {
        headers.insert(header::ETAG, tag);
    }
    headers.extend(HEADERS.map(|(name, value)| (name, HeaderValue::from_static(value))));
    response
}

/// Whether a list of tags names this one. Proxies that compress make tags weak.
fn names(tags: &str, tag: &str) -> bool {
    tags.split(',').map(str::trim).any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_tags() {
        for tags in ["\"a\"", "W/\"a\"", "\"b\", \"a\"", "*", " \"a\" "] {
            assert!(names(tags, "\"a\""), "{tags}");
        }
        for tags in ["", "a", "\"ab\"", "\"b\",W/\"c\""] {
            assert!(!names(tags, "\"a\""), "{tags}");
        }
    }

    /// Whoever adds a file to the page must add it to the table, and the page may ask for no other.
    #[test]
    fn the_table_has_what_the_folder_has() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
        let mut there: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let mut here: Vec<&str> = FILES.iter().map(|file| file.name).collect();
        there.sort();
        here.sort_unstable();
        assert_eq!(there, here);
    }

    /// The policy forbids what is written inside the document, so nothing may rely on it.
    #[test]
    fn nothing_is_inline_and_nothing_comes_from_elsewhere() {
        for file in FILES {
            let text = std::str::from_utf8(file.contents).unwrap();
            for part in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "@import"] {
                assert!(!text.contains(part), "{}: {part}", file.name);
            }
        }
        let page = std::str::from_utf8(FILES[0].contents).unwrap();
        for part in ["<style", " style=", " onclick", " onload", "http://", "https://", "javascript:"] {
            assert!(!page.contains(part), "{part}");
        }
        assert_eq!(page.matches("<script").count(), page.matches("<script type=\"module\" src=\"/assets/").count());
    }
}
