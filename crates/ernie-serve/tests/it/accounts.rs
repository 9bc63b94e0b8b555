//! Keys, what they allow, what they use up: as clients see it.
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use ernie_serve::ServeConfig;
use ernie_serve::accounts::database::Database;
use ernie_serve::accounts::keys::{Grant, Limits, Scope};
use ernie_serve::accounts::store::Store;
use ernie_serve::accounts::usage::Actor;
use ernie_serve::accounts::{create_key, revoke_key};
use serde_json::{Value, json};

use crate::client::{Reply, Running};
use crate::databases::{self, TestDatabase};

/// A server with a database of its own, and that database as another process has it.
pub struct Accounts {
    pub server: Running,
    store: Store,
    runtime: tokio::runtime::Runtime,
    _database: TestDatabase,
}

impl Accounts {
    pub fn start(database: TestDatabase) -> Self {
        Self::with(database, ServeConfig::default())
    }

    pub fn with(database: TestDatabase, config: ServeConfig) -> Self {
        let server = Running::with(ServeConfig { database: Some(database.name.clone()), ..config });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let store = runtime.block_on(Database::named(Some(&database.name)).unwrap().open()).unwrap();
        Accounts { server, store, runtime, _database: database }
    }

    /// A key's id and the key.
    pub fn key(&self, grant: Grant) -> (String, String) {
        let (key, presented) =
            self.runtime.block_on(create_key(&self.store, grant.checked().unwrap(), Actor::CommandLine("test".into()))).unwrap();
        (key.id, presented)
    }

    pub fn scoped(&self, scopes: &[Scope]) -> String {
        self.key(Grant { scopes: scopes.to_vec(), ..Grant::new("scoped") }).1
    }

    pub fn limited(&self, limits: Limits) -> String {
        self.key(Grant { limits, ..Grant::new("limited") }).1
    }

    pub fn revoke(&self, id: &str) {
        self.runtime.block_on(revoke_key(&self.store, id, Actor::CommandLine("test".into()))).unwrap().unwrap();
    }

    pub fn complete(&self, key: &str, max_tokens: usize) -> Reply {
        self.server.with_key(key).post("/v1/completions", &completion(max_tokens))
    }

    /// The rows of a report.
    fn usage(&self, admin: &str, by: &str) -> Vec<Value> {
        let reply = self.server.with_key(admin).get(&format!("/admin/api/usage?by={by}"));
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.json()["data"].as_array().unwrap().clone()
    }
}

pub fn completion(max_tokens: usize) -> Value {
    json!({"prompt": vec![7; 10], "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0})
}

pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Every route with what it needs; `None` is public. Written down apart from the server's own table.
const ROUTES: [(&str, &str, Option<Scope>); 21] = [
    ("GET", "/health/live", None),
    ("GET", "/health/ready", None),
    ("GET", "/openapi.json", None),
    ("GET", "/v1/models", Some(Scope::Models)),
    ("GET", "/v1/models/{model}", Some(Scope::Models)),
    ("POST", "/v1/completions", Some(Scope::Completions)),
    ("POST", "/v1/chat/completions", Some(Scope::Chat)),
    ("POST", "/v1/embeddings", Some(Scope::Embeddings)),
    ("POST", "/v1/tokenize", Some(Scope::Tokenize)),
    ("POST", "/v1/detokenize", Some(Scope::Tokenize)),
    ("GET", "/metrics", Some(Scope::Metrics)),
    ("GET", "/v1/live", Some(Scope::Metrics)),
    ("GET", "/admin/api/settings", Some(Scope::Admin)),
    ("PATCH", "/admin/api/settings", Some(Scope::Admin)),
    ("GET", "/admin/api/session", Some(Scope::Admin)),
    ("GET", "/admin/api/keys", Some(Scope::Admin)),
    ("POST", "/admin/api/keys", Some(Scope::Admin)),
    ("PATCH", "/admin/api/keys/{id}", Some(Scope::Admin)),
    ("POST", "/admin/api/keys/{id}/revoke", Some(Scope::Admin)),
    ("GET", "/admin/api/usage", Some(Scope::Admin)),
    ("GET", "/admin/api/audit", Some(Scope::Admin)),
];

#[test]
fn every_route_with_every_key() {
    let accounts = Accounts::start(databases::either());
    // One key makes all others needed, and the description says so.
    let (_, expired) = accounts.key(Grant { scopes: Scope::ALL.to_vec(), expires: Some(1), ..Grant::new("expired") });
    let document = accounts.server.get("/openapi.json").json();
    for (_, path, scope) in ROUTES {
        for operation in document["paths"][path].as_object().unwrap().values() {
            assert_eq!(operation["security"], scope.map_or(Value::Null, |_| json!([{"key": []}])), "{path}");
        }
    }
    // The table above is all that is described, and that is all there is: an undocumented route would be no one's to use.
    let mut described: Vec<(String, String)> = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        described.extend(methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone())));
    }
    let mut expected: Vec<_> = ROUTES.iter().map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned())).collect();
    described.sort();
    expected.sort();
    assert_eq!(described, expected);

    let all = accounts.key(Grant { scopes: Scope::ALL.to_vec(), ..Grant::new("all") });
    let (revoked_id, revoked) = accounts.key(Grant { scopes: Scope::ALL.to_vec(), ..Grant::new("revoked") });
    accounts.revoke(&revoked_id);
    let wrong_secret = format!("{}0", &all.1[..all.1.len() - 1]);
    let wrong_secret = if wrong_secret == all.1 { format!("{}1", &all.1[..all.1.len() - 1]) } else { wrong_secret };
    let unknown = format!("ernie_{}_{}", "0".repeat(16), "1".repeat(64));
    let refused: [Option<&str>; 7] =
        [None, Some(""), Some("sk-nonsense"), Some(&unknown), Some(&wrong_secret), Some(&expired), Some(&revoked)];
    let scoped = Scope::ALL.map(|scope| (scope, accounts.scoped(&[scope])));
    for (method, path, needed) in ROUTES {
        // Bodies that are refused by whoever reads them (400), and ids that nobody has (404): the matrix changes nothing.
        let path = path.replace("{model}", "nano").replace("{id}", "nobody");
        let ask = |key: Option<&str>| accounts.server.as_key(key).ask(method, &path, (method != "GET").then(|| json!({})).as_ref());
        let passes = |status: u16| matches!(status, 200 | 400 | 404);
        let mut answers = Vec::new();
        for key in refused {
            let reply = ask(key);
            match needed {
                None => assert!(passes(reply.status), "{method} {path} {key:?}: {}", reply.text),
                Some(_) => {
                    assert_eq!(reply.status, 401, "{method} {path} {key:?}: {}", reply.text);
                    answers.push((reply.text, reply.headers["www-authenticate"].clone()));
                }
            }
        }
        answers.dedup();
        assert!(answers.len() <= 1, "{method} {path}: {answers:?}");
        for (scope, key) in &scoped {
            let reply = ask(Some(key));
            let includes = *scope == Scope::Admin && matches!(needed, Some(Scope::Metrics | Scope::Models));
            if needed.is_none() || needed == Some(*scope) || includes {
                assert!(passes(reply.status), "{method} {path} with {scope}: {} {}", reply.status, reply.text);
            } else {
                reply.error(403);
                assert_eq!(reply.json()["error"]["code"], "insufficient_scope");
            }
        }
    }
    // What is not there, and other methods of what is: nothing without a key.
    for path in
        ["/v1/nothing", "/admin", "/admin/api/nothing", "/admin/api/keys/../session", "/assets/../metrics", "//metrics", "/%2e%2e/metrics"]
    {
        accounts.server.get(path).error(401);
        assert!(matches!(accounts.server.with_key(&all.1).get(path).status, 404), "{path}");
    }
    accounts.server.ask("DELETE", "/admin/api/keys", None).error(401);
    accounts.server.with_key(&scoped[0].1).ask("DELETE", "/admin/api/keys", None).error(403);
    accounts.server.with_key(&all.1).ask("DELETE", "/admin/api/keys", None).error(405);
}

#[test]
fn headers_that_are_nearly_right() {
    let accounts = Accounts::start(databases::either());
    let key = accounts.scoped(&[Scope::Models]);
    let raw = |headers: &str| {
        let mut connection = TcpStream::connect(accounts.server.address).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(connection, "GET /v1/models HTTP/1.1\r\nhost: elsewhere.example\r\nconnection: close\r\n{headers}\r\n").unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        text.get(9..12).unwrap_or_default().to_owned()
    };
    assert_eq!(raw(&format!("authorization: Bearer {key}\r\n")), "200");
    assert_eq!(raw(&format!("Authorization: bearer   {key} \r\n")), "200");
    for headers in [
        format!("authorization: Basic {key}\r\n"),
        format!("authorization: {key}\r\n"),
        format!("authorization: Bearer{key}\r\n"),
        format!("authorization: Bearer {}\r\n", key.to_uppercase()),
        format!("authorization: Bearer {key}x\r\n"),
        format!("authorization: Bearer x\r\nauthorization: Bearer {key}\r\n"),
        format!("x-api-key: {key}\r\n"),
        "authorization: Bearer ' OR 1=1 --\r\n".to_owned(),
        "authorization: Bearer ernie_'; DROP TABLE api_keys; --_x\r\n".to_owned(),
        "authorization: Bearer \u{fffd}\u{ff}\r\n".to_owned(),
        format!("authorization: Bearer {}\r\n", "x".repeat(10_000)),
    ] {
        assert_eq!(raw(&headers), "401", "{headers}");
    }
    assert_eq!(raw(&format!("authorization: Bearer {key}\r\n")), "200");
}

#[test]
fn without_keys_this_machine_may_do_all_until_there_is_one() {
    let accounts = Accounts::start(databases::either());
    assert_eq!(accounts.complete("", 2).status, 200, "a key that nobody needs is no harm");
    let session = accounts.server.get("/admin/api/session").json();
    assert_eq!((&session["open"], &session["key"], &session["currency"]), (&json!(true), &Value::Null, &json!("USD")));
    assert!(matches!(session["energy"].as_str(), Some("measured" | "modelled")));
    // A page of another site, which a browser of this machine shows.
    for (name, value) in [("sec-fetch-site", "cross-site"), ("origin", "http://evil.example")] {
        let reply = accounts.server.header(name, value).post("/admin/api/keys", &json!({"name": "x", "scopes": ["admin"]}));
        assert_eq!(reply.error(403).0, None);
    }
    assert_eq!(accounts.server.header("host", "evil.example").get("/admin/api/keys").status, 403);
    let made = accounts.server.post("/admin/api/keys", &json!({"name": "first", "scopes": ["admin", "completions"]}));
    assert_eq!(made.status, 201, "{}", made.text);
    let (key, id) = (made.json()["key"].as_str().unwrap().to_owned(), made.json()["id"].as_str().unwrap().to_owned());
    accounts.server.get("/v1/models").error(401);
    assert_eq!(accounts.server.with_key(&key).get("/v1/models").status, 200);
    assert_eq!(accounts.server.with_key(&key).header("host", "ernie.example").get("/v1/models").status, 200);
    // What was used before has no key.
    let rows = accounts.usage(&key, "key");
    assert_eq!((rows.len(), &rows[0]["key_id"], &rows[0]["completion_tokens"]), (1, &Value::Null, &json!(2)));
    // The last key's end does not open the door.
    assert_eq!(accounts.server.with_key(&key).post(&format!("/admin/api/keys/{id}/revoke"), &json!({})).status, 200);
    accounts.server.with_key(&key).get("/v1/models").error(401);
    accounts.server.get("/v1/models").error(401);
    drop(accounts);
}

#[test]
fn keys_over_the_admin_api() {
    let accounts = Accounts::start(databases::either());
    let admin = accounts.scoped(&[Scope::Admin]);
    let server = accounts.server.with_key(&admin);
    let made = server.post(
        "/admin/api/keys",
        &json!({"name": "team", "scopes": ["chat", "completions"], "models": ["nano"], "requests_per_minute": 50, "money_per_month": 1.25}),
    );
    assert_eq!(made.status, 201, "{}", made.text);
    let (id, key) = (made.json()["id"].as_str().unwrap().to_owned(), made.json()["key"].as_str().unwrap().to_owned());
    assert_eq!(accounts.complete(&key, 3).status, 200);
    let list = server.get("/admin/api/keys");
    assert!(!list.text.contains(&key) && !list.text.contains("hash"), "{}", list.text);
    let entry = list.json()["data"].as_array().unwrap().iter().find(|entry| entry["id"] == *id).unwrap().clone();
    let mut fields: Vec<_> = entry.as_object().unwrap().keys().cloned().collect();
    fields.sort();
    let contract = "created expires id last_used models money_per_month month name requests_per_minute revoked scopes tokens_per_minute tokens_per_month";
    assert_eq!(fields.join(" "), contract);
    assert_eq!((&entry["month"]["requests"], &entry["month"]["completion_tokens"]), (&json!(1), &json!(3)));
    assert_eq!((&entry["money_per_month"], &entry["requests_per_minute"]), (&json!(1.25), &json!(50)));
    wait("the use is noted", || {
        server.get("/admin/api/keys").json()["data"].as_array().unwrap().iter().any(|e| e["id"] == *id && e["last_used"].is_u64())
    });

    let change = |body: Value| server.ask("PATCH", &format!("/admin/api/keys/{id}"), Some(&body));
    let changed = change(json!({"name": "team B", "requests_per_minute": null, "models": ["other"]})).json();
    assert_eq!((&changed["name"], &changed["requests_per_minute"]), (&json!("team B"), &Value::Null));
    assert_eq!((&changed["money_per_month"], &changed["scopes"]), (&json!(1.25), &json!(["chat", "completions"])));
    let refused = accounts.complete(&key, 3);
    refused.error(403);
    assert_eq!(refused.json()["error"]["code"], "model_not_allowed");
    assert_eq!(change(json!({"models": null})).status, 200);
    assert_eq!(accounts.complete(&key, 3).status, 200);

    for (field, body) in [
        ("name", json!({"name": "a\r\nx-evil: 1"})),
        ("name", json!({"name": ""})),
        ("scopes", json!({"scopes": []})),
        ("scopes[0]", json!({"scopes": ["all"]})),
        ("expires", json!({"expires": -5})),
        ("tokens_per_minute", json!({"tokens_per_minute": 0})),
        ("money_per_month", json!({"money_per_month": -0.5})),
    ] {
        assert_eq!(change(body.clone()).error(400).0.as_deref(), Some(field), "{body}");
    }
    change(json!({"nmae": "x"})).error(400);
    server.post("/admin/api/keys", &json!({"scopes": ["chat"]})).error(400);
    server.post("/admin/api/keys", &json!({"name": "x"})).error(400);
    for id in ["nobody", "..%2F..%2Fetc%2Fpasswd", "%0d%0ax", "%00", "'; DROP TABLE api_keys; --"] {
        let id = id.replace(' ', "%20");
        server.post(&format!("/admin/api/keys/{id}/revoke"), &json!({})).error(404);
        server.ask("PATCH", &format!("/admin/api/keys/{id}"), Some(&json!({"name": "x"}))).error(404);
    }

    assert!(server.post(&format!("/admin/api/keys/{id}/revoke"), &json!({})).json()["revoked"].is_u64());
    accounts.complete(&key, 3).error(401);
    let log = server.get("/admin/api/audit?limit=3").json()["data"].as_array().unwrap().clone();
    let actions: Vec<_> = log.iter().map(|line| line["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["keys.revoke", "keys.change", "keys.change"]);
    assert!(log.iter().all(|line| line["target"] == *id && line["actor"].as_str().unwrap().starts_with("key:")));
    let before = log[2]["id"].as_i64().unwrap();
    let log = server.get(&format!("/admin/api/audit?before={before}")).json()["data"].as_array().unwrap().clone();
    assert_eq!(log.iter().map(|line| line["action"].as_str().unwrap()).collect::<Vec<_>>(), ["keys.create", "keys.create"]);
    assert_eq!(log[1]["actor"], "cli:test");
    assert!(!json!(log).to_string().contains(&key[key.len() - 64..]), "no secret in the log");
    let queries = [
        "audit?limit=x",
        "audit?limit=0",
        "audit?limit=1001",
        "audit?limit=",
        "audit?limit=1&limit=2",
        "audit?limit=%ff",
        "audit?before=1.5",
    ];
    for query in queries
        .into_iter()
        .chain(["usage?from=yesterday", "usage?from=%ff", "usage?to=x", "usage?by=week", "usage?by=day,+key"])
        .chain(["usage?from=2024-03-01&to=2024-02-01"])
    {
        let (param, message) = server.get(&format!("/admin/api/{query}")).error(400);
        let named = query.split(['?', '=']).nth(1);
        assert_eq!(param.as_deref(), named, "{query}: {message}");
    }
    assert_eq!(server.get("/admin/api/audit?limit=1000").status, 200);
}

#[test]
fn a_key_that_another_process_revokes_is_refused_at_once() {
    for database in databases::all() {
        let accounts = Accounts::start(database);
        let (id, key) = accounts.key(Grant::new("short-lived"));
        assert_eq!(accounts.complete(&key, 2).status, 200);
        accounts.revoke(&id);
        accounts.complete(&key, 2).error(401);
    }
}

#[test]
fn budgets_hold_against_requests_at_the_same_time() {
    let config = ServeConfig {
        price_per_million_prompt_tokens: 100.0,
        price_per_million_completion_tokens: 1000.0,
        max_batch_size: 4,
        ..ServeConfig::default()
    };
    for database in databases::all() {
        let accounts = Accounts::with(database, config.clone());
        let admin = accounts.scoped(&[Scope::Admin]);
        // 10 prompt tokens and 20 of the answer: 30 tokens for 0.021.
        let cases = [
            (Limits { tokens_per_month: Some(100), ..Limits::default() }, 429, "insufficient_quota"),
            (Limits { money_per_month: Some(0.07), ..Limits::default() }, 402, "budget_exceeded"),
        ];
        for (limits, status, code) in cases {
            let (id, key) = accounts.key(Grant { limits, ..Grant::new("budget") });
            let replies: Vec<Reply> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..12).map(|_| scope.spawn(|| accounts.complete(&key, 20))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let answered = replies.iter().filter(|reply| reply.status == 200).count();
            assert!((1..=3).contains(&answered), "{answered} slipped under");
            for reply in replies.iter().filter(|reply| reply.status != 200) {
                reply.error(status);
                assert_eq!((&reply.json()["error"]["code"], &reply.json()["error"]["type"]), (&json!(code), &json!("insufficient_quota")));
            }
            // One after the other all that fits is answered, and no more.
            for _ in answered..3 {
                assert_eq!(accounts.complete(&key, 20).status, 200);
            }
            accounts.complete(&key, 20).error(status);
            let row = accounts.usage(&admin, "key").into_iter().find(|row| row["key_id"] == *id).unwrap();
            assert_eq!((&row["requests"], &row["completion_tokens"], &row["money"]), (&json!(3), &json!(60), &json!(0.063)));
            // A smaller one fits.
            assert_eq!(accounts.complete(&key, 1).status, if status == 402 { 200 } else { 429 });
            let reply = accounts.server.with_key(&admin).ask(
                "PATCH",
                &format!("/admin/api/keys/{id}"),
                Some(&json!({"tokens_per_month": null, "money_per_month": null})),
            );
            assert_eq!(reply.status, 200);
            assert_eq!(accounts.complete(&key, 20).status, 200);
        }
    }
}

/// What was set aside for an answer that nobody waited for is free again, but for what was generated.
#[test]
fn a_client_that_leaves_gives_back_its_budget() {
    let accounts = Accounts::start(databases::either());
    let key = accounts.limited(Limits { tokens_per_month: Some(7300), tokens_per_minute: Some(7300), ..Limits::default() });
    let body = json!({"prompt": vec![7; 10], "max_tokens": 450, "ignore_eos": true, "stream": true, "n": 16}).to_string();
    let mut connection = TcpStream::connect(accounts.server.address).unwrap();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n");
    write!(connection, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    connection.read_exact(&mut [0; 300]).unwrap();
    assert_eq!(accounts.complete(&key, 190).status, 429, "the stream has the most of it");
    drop(connection);
    wait("it is given back", || accounts.complete(&key, 190).status == 200);
}

/// What is in the books is what the answers said, request by request, and of those that were left what was generated.
#[test]
fn usage_is_what_the_answers_reported() {
    let prices = ServeConfig { price_per_million_prompt_tokens: 2.0, price_per_million_completion_tokens: 8.0, ..ServeConfig::default() };
    for database in databases::all() {
        let accounts = Accounts::with(database, prices.clone());
        let (admin, (_, key)) = (accounts.scoped(&[Scope::Admin]), accounts.key(Grant::new("many")));
        let server = accounts.server.with_key(&key);
        let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9});
        let mut stream = chat.clone();
        stream["stream"] = json!(true);
        stream["stream_options"] = json!({"include_usage": true});
        let mut stream_of_two = completion(7);
        stream_of_two["n"] = json!(2);
        stream_of_two["stream"] = json!(true);
        stream_of_two["stream_options"] = json!({"include_usage": true});
        let bodies = [
            ("/v1/completions", completion(12)),
            ("/v1/completions", json!({"prompt": ["One day", "A bird"], "n": 3, "max_tokens": 5})),
            ("/v1/completions", json!({"prompt": "Once upon", "echo": true, "logprobs": 1, "max_tokens": 0})),
            ("/v1/completions", json!({"prompt": "Once upon", "echo": true, "logprobs": 1, "max_tokens": 3, "n": 2})),
            ("/v1/completions", json!({"prompt": "Once upon a time", "stop": [" "], "max_tokens": 30})),
            ("/v1/completions", stream_of_two),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", stream),
            ("/v1/embeddings", json!({"input": ["one text", "another"]})),
            ("/v1/tokenize", json!({"prompt": "some words"})),
            ("/v1/detokenize", json!({"tokens": [5, 6]})),
        ];
        let sums = std::thread::scope(|scope| {
            let ask = |turn: usize| {
                let mut sums = (0, 0, 0);
                for (path, body) in bodies.iter().cycle().skip(turn * 3).take(bodies.len()) {
                    let reply = server.post(path, body);
                    assert_eq!(reply.status, 200, "{path}: {}", reply.text);
                    let usage = if reply.headers["content-type"] == "text/event-stream" {
                        reply.events().last().unwrap()["usage"].clone()
                    } else {
                        reply.json()["usage"].clone()
                    };
                    let of = |field: &str| usage[field].as_u64().unwrap_or(0);
                    sums = (sums.0 + 1, sums.1 + of("prompt_tokens"), sums.2 + of("completion_tokens"));
                }
                sums
            };
            let threads: Vec<_> = (0..3).map(|turn| scope.spawn(move || ask(turn))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2))
        });
        // At once, for all were answered.
        let (requests, prompt, completion_tokens) = sums;
        let row = accounts.usage(&admin, "key").into_iter().next().unwrap();
        assert_eq!((&row["requests"], &row["key_name"]), (&json!(requests), &json!("many")));
        assert_eq!((&row["prompt_tokens"], &row["completion_tokens"]), (&json!(prompt), &json!(completion_tokens)));
        let money = (prompt * 2 + completion_tokens * 8) as f64 / 1e6;
        assert!((row["money"].as_f64().unwrap() - money).abs() < 1e-12, "{row}");
        assert!(row["seconds"].as_f64().unwrap() > 0.0 && row["joules"].as_f64().unwrap() > 0.0, "{row}");
        let by_model = accounts.usage(&admin, "day,model");
        assert_eq!((by_model.len(), &by_model[0]["model"], &by_model[0]["requests"]), (1, &json!("nano"), &json!(requests)));
        let day = by_model[0]["day"].as_str().unwrap().to_owned();
        // What was refused used nothing.
        server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 100_000})).error(400);
        assert_eq!(accounts.usage(&admin, "day")[0]["requests"], requests);

        // Streams that are left: the books have as many tokens as the engine chose.
        let generated = || accounts.server.with_key(&admin).metric("ernie_output_tokens_total");
        let before = generated();
        for read in [200, 2000] {
            let body = json!({"prompt": vec![7; 10], "max_tokens": 450, "ignore_eos": true, "stream": true}).to_string();
            let mut connection = TcpStream::connect(accounts.server.address).unwrap();
            let head =
                format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n");
            write!(connection, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
            connection.read_exact(&mut vec![0; read]).unwrap();
        }
        wait("both are written down", || accounts.usage(&admin, "key")[0]["requests"] == requests + 2);
        let row = accounts.usage(&admin, "key").remove(0);
        assert_eq!(row["prompt_tokens"], prompt + 20);
        let more = row["completion_tokens"].as_u64().unwrap() - completion_tokens;
        assert!(more > 0 && more as f64 == generated() - before, "{more} of {}", generated() - before);
        let past = accounts.server.with_key(&admin).get("/admin/api/usage?from=2020-01-01&to=2020-12-31").json();
        assert_eq!(past["data"], json!([]));
        assert!(day.len() == 10);
        let counts: BTreeMap<&str, usize> = [("rows", accounts.usage(&admin, "day,key,model").len())].into();
        assert_eq!(counts["rows"], 1);
    }
}

/// Another process holds SQLite's lock for longer than anybody waits.
#[test]
fn answers_wait_for_the_books_and_come_again_when_those_are_back() {
    let accounts = Accounts::start(databases::file());
    let (admin, key) = (accounts.scoped(&[Scope::Admin]), accounts.scoped(&[Scope::Completions, Scope::Tokenize]));
    assert_eq!(accounts.complete(&key, 5).status, 200);
    let Store::Sqlite(pool, _) = &accounts.store else { panic!("a file was asked for") };
    let lock = accounts.runtime.block_on(pool.begin_with("BEGIN IMMEDIATE")).unwrap();
    let stream = {
        let mut body = completion(5);
        body["stream"] = json!(true);
        body
    };
    let reply = accounts.server.with_key(&key).post("/v1/completions", &stream);
    let last = reply.events().pop().unwrap();
    assert_eq!(last["error"]["code"], "accounts_unavailable", "{}", reply.text);
    // From here on nothing begins that could not be written down.
    let reply = accounts.complete(&key, 5);
    assert!(reply.error(503).1.contains("written down"));
    assert!(reply.headers.contains_key("retry-after"));
    accounts.runtime.block_on(lock.rollback()).unwrap();
    wait("it is back", || accounts.complete(&key, 5).status == 200);
    // The one that was not answered was computed: it is in the books, once.
    let rows = accounts.usage(&admin, "day");
    assert_eq!((&rows[0]["requests"], &rows[0]["completion_tokens"]), (&json!(3), &json!(15)));
}

/// There may be keys in a file that took the place of the one that had none.
#[test]
#[cfg(unix)]
fn without_its_database_the_server_is_open_to_nobody() {
    let database = databases::file();
    let path = database.name.strip_prefix("sqlite:").unwrap().to_owned();
    let accounts = Accounts::start(database);
    assert_eq!(accounts.server.get("/v1/models").status, 200);
    std::fs::rename(&path, format!("{path}.moved")).unwrap();
    accounts.server.get("/v1/models").error(401);
    accounts.server.get("/admin/api/keys").error(401);
    accounts.server.with_key("ernie_x_y").get("/v1/models").error(503);
    accounts.server.get("/health/ready").error(503);
    std::fs::rename(format!("{path}.moved"), &path).unwrap();
    assert_eq!(accounts.server.get("/v1/models").status, 200);
    assert_eq!(accounts.server.get("/health/ready").status, 200);
}

/// The server's database goes away and comes back; the server itself goes on.
#[test]
#[ignore = "stops a PostgreSQL server: .ci/postgres.sh runs it"]
fn postgres_goes_away_and_comes_back() {
    let Some(database) = databases::postgres() else { panic!("ERNIE_TEST_POSTGRES names no server") };
    let control = std::env::var("ERNIE_TEST_POSTGRES_CONTROL").unwrap();
    let control = |what: &str| assert!(std::process::Command::new(&control).arg(what).status().unwrap().success());
    let accounts = Accounts::start(database);
    let (admin, key) = (accounts.scoped(&[Scope::Admin, Scope::Metrics]), accounts.scoped(&[Scope::Completions]));
    assert_eq!(accounts.complete(&key, 5).status, 200);
    let mut connection = TcpStream::connect(accounts.server.address).unwrap();
    let body = json!({"prompt": vec![7; 10], "max_tokens": 450, "ignore_eos": true}).to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n");
    write!(connection, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    wait("it is computed", || accounts.server.with_key(&admin).metric("ernie_requests_running") == 1.0);
    control("stop");
    let reply = accounts.complete(&key, 5);
    assert!(reply.error(503).1.contains("database"));
    assert_eq!(reply.json()["error"]["code"], "accounts_unavailable");
    // Who needs no key does not notice.
    assert_eq!(accounts.server.get("/health/live").status, 200);
    let mut first = [0; 12];
    connection.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 503", "what was computed meanwhile could not be written down");
    control("start");
    wait("it is back", || accounts.complete(&key, 5).status == 200);
    let rows = accounts.usage(&admin, "day");
    assert_eq!((&rows[0]["requests"], &rows[0]["completion_tokens"]), (&json!(3), &json!(460)));
}

#[test]
fn addresses_of_others_need_a_key() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let database = databases::either();
    let config = ServeConfig { host: "0.0.0.0".parse().unwrap(), database: Some(database.name.clone()), ..ServeConfig::default() };
    let error = ernie_serve::check_address(&config).unwrap_err().to_string();
    assert!(error.contains("0.0.0.0") && error.contains("ernie keys create"), "{error}");
    runtime.block_on(async {
        let store = Database::named(Some(&database.name)).unwrap().open().await.unwrap();
        create_key(&store, Grant::new("first"), Actor::Local).await.unwrap();
    });
    assert!(ernie_serve::check_address(&config).unwrap());
    let server = Running::with(config);
    server.get("/v1/models").error(401);
}
