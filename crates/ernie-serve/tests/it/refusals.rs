//! What is refused: the right status, OpenAI's shape, the field named.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ernie_serve::ServeConfig;
use serde_json::{Value, json};

use crate::client::Running;

#[test]
fn fields_out_of_range_are_named() {
    let server = Running::start();
    let cases = [
        ("prompt", json!({})),
        ("prompt", json!({"prompt": ""})),
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": 5})),
        ("prompt", json!({"prompt": [[1, 2], "x"]})),
        ("prompt", json!({"prompt": [99_999]})),
        ("max_tokens", json!({"max_tokens": 0})),
        ("max_tokens", json!({"max_tokens": 512})),
        ("max_tokens", json!({"max_tokens": -1})),
        ("max_tokens", json!({"max_tokens": 1.5})),
        ("temperature", json!({"temperature": 2.1})),
        ("temperature", json!({"temperature": "hot"})),
        ("top_p", json!({"top_p": 0})),
        ("top_k", json!({"top_k": -2})),
        ("min_p", json!({"min_p": 1.5})),
        ("presence_penalty", json!({"presence_penalty": 3})),
        ("frequency_penalty", json!({"frequency_penalty": -3})),
        ("repetition_penalty", json!({"repetition_penalty": 0})),
        ("logit_bias", json!({"logit_bias": {"x": 1}})),
        ("logit_bias", json!({"logit_bias": {"1": 101}})),
        ("logit_bias", json!({"logit_bias": {"99999": 1}})),
        ("n", json!({"n": 0})),
        ("n", json!({"n": 129})),
        ("best_of", json!({"best_of": 3})),
        ("suffix", json!({"suffix": "end"})),
        ("logprobs", json!({"logprobs": 21})),
        ("stop", json!({"stop": [""]})),
        ("stop", json!({"stop": 3})),
        ("stop", json!({"stop": vec!["a"; 17]})),
        ("seed", json!({"seed": "x"})),
        ("stream", json!({"stream": 1})),
        ("stream_options", json!({"stream_options": {"include_usage": true}})),
    ];
    for (param, change) in cases {
        let mut body = if param == "prompt" { json!({}) } else { json!({"prompt": "Once", "max_tokens": 4}) };
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (named, message) = server.post("/v1/completions", &body).error(400);
        // A missing field has no place; its name stands in the message.
        assert!(named.as_deref() == Some(param) || (named.is_none() && message.contains(param)), "{body}: {named:?}: {message}");
    }
    let chats = [
        ("messages", json!({"messages": []})),
        ("messages", json!({"messages": "Hi"})),
        ("messages", json!({"messages": [{"role": "nobody", "content": "Hi"}]})),
        ("messages[0].role", json!({"messages": [{"content": "Hi"}]})),
        ("messages[0].content", json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]})),
        ("messages", json!({"messages": [{"role": "user", "content": "word ".repeat(600)}]})),
        ("messages[0].content", json!({"messages": [{"role": "user"}]})),
        ("messages[1].content", json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null}]})),
        ("messages[1].content", json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": []}]})),
        // A list in place of an object: its items are not taken for fields.
        ("messages[0]", json!({"messages": [["user", "hi"]]})),
        ("messages[0].content[0]", json!({"messages": [{"role": "user", "content": [["text", "hi"]]}]})),
        (
            "messages[1].tool_calls[0]",
            json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [[0, "a", "function"]]}]}),
        ),
        (
            "messages[1].tool_calls[0].function",
            json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"function": ["f", "{}"]}]}]}),
        ),
        ("stream_options", json!({"stream": true, "stream_options": [true]})),
        ("tools[0]", json!({"tools": [["function"]]})),
        ("tools[0].function", json!({"tools": [{"type": "function", "function": ["f"]}]})),
        ("tool_choice", json!({"tool_choice": ["function", {"name": "f"}]})),
        ("tool_choice.function", json!({"tool_choice": {"type": "function", "function": ["f"]}})),
        ("response_format", json!({"response_format": ["json_object"]})),
        ("response_format.json_schema", json!({"response_format": {"type": "json_schema", "json_schema": ["x"]}})),
        ("structured_outputs", json!({"structured_outputs": [{"type": "object"}]})),
        ("tools[0].function", json!({"tools": [{"type": "function"}]})),
        ("functions", json!({"functions": [{"name": "f"}]})),
        ("top_logprobs", json!({"top_logprobs": 2})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 21})),
    ];
    for (param, change) in chats {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (named, message) = server.post("/v1/chat/completions", &body).error(400);
        assert_eq!(named.as_deref(), Some(param), "{message}");
    }
    server.post("/v1/detokenize", &json!({"tokens": [1, 99_999]})).error(400);
    server.post("/v1/tokenize", &json!({})).error(400);
    assert_eq!(server.post("/v1/tokenize", &json!({"messages": [["user", "hi"]]})).error(400).0.as_deref(), Some("messages[0]"));
    assert_eq!(server.post("/v1/tokenize", &json!({"prompt": "x", "whatever": 1})).status, 200);
    let tools = json!({"prompt": "x", "tools": [{"type": "other", "function": {"name": "f"}}]});
    assert_eq!(server.post("/v1/tokenize", &tools).error(400).0.as_deref(), Some("tools[0].type"));
    server.post("/v1/embeddings", &json!({"input": "x", "dimensions": 3})).error(400);
    // What changes no answer is passed over, and null is as good as absent, even of what nobody knows.
    let body =
        json!({"prompt": "Once", "max_tokens": 2, "user": "me", "store": true, "stop": null, "top_p": null, "n": null, "whatever": null});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
    // A whole number is one, however it is written.
    let body = json!({"prompt": "Once", "max_tokens": 2.0, "n": 1.0, "seed": 3.0, "top_k": -1.0, "logprobs": 0.0, "stop_token_ids": [5.0]});
    assert_eq!(server.post("/v1/completions", &body).json()["usage"]["completion_tokens"], 2);
    // A slip, and what only other servers do, is said; so is what is missing.
    for (path, body, param) in [
        ("/v1/completions", json!({"prompt": "Once", "max_token": 5}), "max_token"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hi"}], "modalities": ["audio"]}), "modalities"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hi"}], "echo": true}), "echo"),
        ("/v1/embeddings", json!({"input": "x", "whatever": 1}), "whatever"),
        ("/v1/completions", json!({}), "prompt"),
        ("/v1/chat/completions", json!({"n": 1}), "messages"),
        ("/v1/chat/completions", json!({"messages": [{"content": "Hi"}]}), "messages[0].role"),
        ("/v1/embeddings", json!({}), "input"),
    ] {
        let (named, message) = server.post(path, &body).error(400);
        assert_eq!(named.as_deref(), Some(param), "{path}: {message}");
    }
    // More texts than the queue has places.
    let many: Vec<String> = (0..300).map(|i| format!("text {i}")).collect();
    let reply = server.post("/v1/embeddings", &json!({"input": many})).json();
    let indices: Vec<u64> = reply["data"].as_array().unwrap().iter().map(|one| one["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, (0..300).collect::<Vec<_>>());
    assert_eq!(reply["data"][299], {
        let mut alone = server.post("/v1/embeddings", &json!({"input": "text 299"})).json()["data"][0].clone();
        alone["index"] = json!(299);
        alone
    });
}

#[test]
fn bodies_of_every_wrong_kind() {
    let server = Running::with(ServeConfig { max_body_bytes: 2000, body_timeout_s: 1, ..ServeConfig::default() });
    let json = "application/json";
    for path in ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/tokenize", "/v1/detokenize"] {
        for body in
            [&b""[..], b"{", b"[]", b"null", b"\"x\"", b"{\"prompt\": \"\xff\xfe\"}", b"{} x", b"{\"prompt\": \"\\ud800\"}", &[b'['; 1500]]
        {
            server.post_bytes(path, json, body).error(400);
        }
        server.post_bytes(path, "text/plain", b"{}").error(415);
        server.post_bytes(path, json, format!("{{\"prompt\": \"{}\"}}", "x".repeat(2000)).as_bytes()).error(413);
        server.get(path).error(405);
    }
    server.get("/v1/nothing").error(404);
    let (param, _) = server.post("/v1/completions", &json!({"model": "gpt", "prompt": "x"})).error(404);
    assert_eq!(param.as_deref(), Some("model"));
    server.get("/v1/models/gpt").error(404);
    assert_eq!(server.get("/v1/models/%ff").error(400).0.as_deref(), Some("model"));
    assert_eq!(server.get("/assets/%ff").error(400).0.as_deref(), Some("file"));
    let id = "/admin/api/keys/%ff";
    assert_eq!(server.ask("PATCH", id, Some(&json!({}))).error(400).0.as_deref(), Some("id"));
    assert_eq!(server.post(&format!("{id}/revoke"), &json!({})).error(400).0.as_deref(), Some("id"));
    assert_eq!(server.get("/v1/models/nano").json(), server.get("/v1/models").json()["data"][0]);
    for kind in ["Application/JSON; charset=utf-8", "application/json;charset=\"UTF-8\"", "application/json; x=y; Charset=utf8"] {
        let usual = server.post_bytes("/v1/tokenize", kind, b"{\"prompt\": \"x\"}");
        assert_eq!(usual.status, 200, "{}", usual.text);
    }
    for kind in ["application/json; charset=utf-16", "application/json; x=y; charset=\"iso-8859-1\"", "application/json;charset="] {
        assert!(server.post_bytes("/v1/tokenize", kind, b"{\"prompt\": \"x\"}").error(415).1.contains("UTF-8"), "{kind}");
    }
    let encoded = |encoding: &str| server.header("content-encoding", encoding).post("/v1/tokenize", &json!({"prompt": "x"}));
    assert_eq!((encoded("identity").status, encoded("Identity, identity").status), (200, 200));
    for encoding in ["gzip", "br", "identity, gzip", "x-unknown"] {
        let refused = encoded(encoding);
        assert!(refused.error(415).1.contains("content-encoding"), "{encoding}");
        assert_eq!(refused.json()["error"]["code"], "unsupported_content_encoding");
    }
}

/// A body that comes after its answer is certain must not cost the client that answer, nor its connection.
#[test]
fn who_is_refused_may_still_be_sending() {
    let server = Running::start();
    let mut connection = TcpStream::connect(server.address).unwrap();
    let mut reader = BufReader::new(connection.try_clone().unwrap());
    let mut answer = || {
        let (mut head, mut body) = (String::new(), Vec::new());
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "closed after {head:?}");
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
        body.resize(length, 0);
        reader.read_exact(&mut body).unwrap();
        head
    };
    for (head, status) in [
        ("POST /v1/completions HTTP/1.1\r\nhost: elsewhere.example", "403"),
        ("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain", "415"),
        ("POST /v1/nowhere HTTP/1.1\r\nhost: localhost", "404"),
        ("POST /v1/models HTTP/1.1\r\nhost: localhost", "405"),
    ] {
        write!(connection, "{head}\r\ncontent-length: 5\r\n\r\n").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        connection.write_all(b"later").unwrap();
        let answer = answer();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    write!(connection, "GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    assert!(answer().starts_with("HTTP/1.1 200 "));
}

#[test]
fn the_description_is_what_is_served() {
    let server = Running::start();
    let document = server.get("/openapi.json").json();
    let paths = document["paths"].as_object().unwrap();
    assert_eq!(paths.len(), 19);
    for (path, methods) in paths.into_iter().filter(|(path, _)| !path.starts_with("/admin/api/") || path.as_str() == "/admin/api/settings")
    {
        let path = path.replace("{model}", "nano");
        for method in methods.as_object().unwrap().keys() {
            let (reply, expected) = match method.as_str() {
                // It does not end.
                "get" if path == "/v1/live" => {
                    assert_eq!(server.first_events(&path, 1).len(), 1);
                    continue;
                }
                "get" => (server.get(&path), 200),
                "patch" => (server.patch(&path, &json!({})), 200),
                "post" => (server.post(&path, &json!({})), 400),
                other => panic!("{other} {path}"),
            };
            assert_eq!(reply.status, expected, "{method} {path}: {}", reply.text);
        }
    }
    // Who may use a route, and what it may refuse.
    let statuses = |path: &str, method: &str| {
        let operation = &document["paths"][path][method];
        let statuses: Vec<&str> = operation["responses"].as_object().unwrap().keys().map(String::as_str).collect();
        (statuses.join(" "), operation.get("security").is_some())
    };
    for (path, method, expected) in [
        ("/health/live", "get", "200 403"),
        ("/health/ready", "get", "200 403 503"),
        ("/metrics", "get", "200 401 403 429 503"),
        ("/v1/models/{model}", "get", "200 400 401 403 404 429 503"),
        ("/v1/chat/completions", "post", "200 400 401 402 403 404 408 413 415 429 500 503 504"),
        ("/admin/api/keys", "post", "201 400 401 403 408 413 415 429 503"),
        ("/admin/api/keys/{id}/revoke", "post", "200 400 401 403 404 429 503"),
        ("/admin/api/audit", "get", "200 400 401 403 429 503"),
    ] {
        assert_eq!(statuses(path, method), (expected.to_owned(), !path.starts_with("/health")), "{method} {path}");
    }
    for (name, response) in document["components"]["responses"].as_object().unwrap() {
        assert_eq!(response["headers"]["retry-after"].is_object(), ["TooManyRequests", "ServiceUnavailable"].contains(&name.as_str()));
        assert_eq!(response["headers"]["www-authenticate"].is_object(), name == "Unauthorized");
    }
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    // Without keys none is needed.
    assert_eq!(document["paths"]["/v1/models"]["get"]["security"], json!([{}, {"key": []}]));
    // Kinds of contents are those that are sent.
    let kinds = |path: &str, method: &str| {
        let content = document["paths"][path][method]["responses"]["200"]["content"].as_object().unwrap();
        content.keys().cloned().collect::<Vec<_>>()
    };
    for path in ["/metrics", "/health/live", "/v1/models"] {
        assert_eq!(
            [server.get(path).headers["content-type"].to_str().unwrap().replace("; charset=utf-8", "")],
            *kinds(path, "get").iter().map(|kind| kind.replace("; charset=utf-8", "")).collect::<Vec<_>>()
        );
    }
    assert_eq!(kinds("/v1/live", "get"), ["text/event-stream"]);
    for path in ["/v1/completions", "/v1/chat/completions"] {
        assert_eq!(kinds(path, "post"), ["application/json", "text/event-stream"]);
    }
    // Other methods.
    for (method, path, allowed) in [
        ("DELETE", "/v1/models", "GET,HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/admin/api/settings", "GET,HEAD,PATCH"),
        ("PATCH", "/admin/api/keys", "GET,HEAD,POST"),
    ] {
        let reply = server.ask(method, path, None);
        reply.error(405);
        let mut methods: Vec<&str> = reply.headers["allow"].to_str().unwrap().split(',').collect();
        methods.sort_unstable();
        assert_eq!(methods.join(","), allowed, "{method} {path}");
    }
    // Every field that is read is described, and the other way round.
    let schemas = &document["components"]["schemas"];
    let fields = |name: &str| {
        let mut found: Vec<String> = Vec::new();
        let mut open: Vec<Value> = vec![schemas[name].clone()];
        while let Some(schema) = open.pop() {
            found.extend(schema["properties"].as_object().into_iter().flat_map(|p| p.keys().cloned()));
            for part in schema["allOf"].as_array().into_iter().flatten() {
                let name = part["$ref"].as_str().and_then(|r| r.rsplit('/').next());
                open.push(name.map_or_else(|| part.clone(), |name| schemas[name].clone()));
            }
        }
        found
    };
    let of_chats = &schemas["ChatRequest"];
    assert_eq!((&of_chats["properties"]["n"]["minimum"], &of_chats["properties"]["n"]["maximum"]), (&json!(1), &json!(128)));
    assert_eq!((&of_chats["properties"]["top_p"]["exclusiveMinimum"], &of_chats["properties"]["top_p"]["maximum"]), (&json!(0), &json!(1)));
    let ids = json!({"type": "integer", "format": "uint32", "minimum": 0, "maximum": u32::MAX});
    assert_eq!(of_chats["properties"]["stop_token_ids"]["items"], ids);
    assert_eq!((&of_chats["additionalProperties"], &of_chats["required"]), (&json!({"type": "null"}), &json!(["messages"])));
    assert_eq!((&schemas["NewKey"]["required"], &schemas["KeyFields"]["required"]), (&json!(["name", "scopes"]), &Value::Null));
    for (name, some) in [("CompletionRequest", ["prompt", "echo", "logit_bias"]), ("ChatRequest", ["messages", "top_logprobs", "min_p"])] {
        let fields = fields(name);
        assert!(some.iter().all(|field| fields.iter().any(|f| f == field)), "{name}: {fields:?}");
    }
}
