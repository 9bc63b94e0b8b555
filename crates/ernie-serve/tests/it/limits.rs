//! Limits of a minute, and keys that end while they are used.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ernie_serve::ServeConfig;
use ernie_serve::accounts::keys::{Grant, Limits, Scope};
use serde_json::{Value, json};

use crate::accounts::{Accounts, completion, wait};
use crate::client::Reply;
use crate::databases;

#[test]
fn minutes_have_room_for_their_limits() {
    let accounts = Accounts::start(databases::either());
    let key = accounts.limited(Limits { requests_per_minute: Some(3), ..Limits::default() });
    let statuses: Vec<u16> = (0..4).map(|_| accounts.complete(&key, 1).status).collect();
    assert_eq!(statuses, [200, 200, 200, 429]);
    let reply = accounts.server.with_key(&key).get("/v1/models");
    assert!(reply.error(429).1.contains("3 requests a minute"));
    let seconds: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=61).contains(&seconds), "{seconds}");

    let key = accounts.limited(Limits { tokens_per_minute: Some(100), ..Limits::default() });
    // What no minute has room for is not worth waiting for.
    let never = accounts.complete(&key, 91);
    assert!(never.error(400).1.contains("100 tokens a minute"));
    assert_eq!(never.json()["error"]["code"], "request_too_large_for_limit");
    assert!(!never.headers.contains_key("retry-after"));
    assert_eq!(accounts.complete(&key, 30).status, 200);
    // It stopped early: what it did not use is given back, so 10 + 2 tokens are taken of it and not 10 + 50.
    let mut body = completion(50);
    body["stop_token_ids"] = json!((0..8192).collect::<Vec<u32>>());
    let reply = accounts.server.with_key(&key).post("/v1/completions", &body);
    assert_eq!((reply.status, &reply.json()["usage"]["completion_tokens"]), (200, &json!(1)), "{}", reply.text);
    assert_eq!(accounts.complete(&key, 39).status, 200);
    accounts.complete(&key, 1).error(429);
    // Another key is another minute.
    assert_eq!(accounts.complete(&accounts.limited(Limits { tokens_per_minute: Some(100), ..Limits::default() }), 90).status, 200);
}

/// What OpenAI's clients read to know when to come again.
#[test]
fn answers_say_how_far_the_minute_is_used() {
    let accounts = Accounts::start(databases::either());
    let of = |reply: &Reply, what: &str| {
        let header = |name: &str| reply.headers.get(format!("x-ratelimit-{name}-{what}")).map(|value| value.to_str().unwrap().to_owned());
        (header("limit"), header("remaining"), header("reset"))
    };
    let text = |text: &str| Some(text.to_owned());
    let seconds = |reset: Option<String>| {
        let reset = reset.unwrap();
        let (minutes, seconds) = reset.strip_suffix('s').unwrap().split_once('m').unwrap_or(("0", reset.trim_end_matches('s')));
        minutes.parse::<u64>().unwrap() * 60 + seconds.parse::<u64>().unwrap()
    };
    let key = accounts.limited(Limits { requests_per_minute: Some(3), tokens_per_minute: Some(100), ..Limits::default() });
    let reply = accounts.complete(&key, 20);
    assert_eq!((reply.status, &of(&reply, "requests").0, &of(&reply, "requests").1), (200, &text("3"), &text("2")));
    assert_eq!((&of(&reply, "tokens").0, &of(&reply, "tokens").1), (&text("100"), &text("70")), "10 of the prompt, 20 of the answer");
    assert!((59..=61).contains(&seconds(of(&reply, "requests").2)) && (59..=61).contains(&seconds(of(&reply, "tokens").2)));
    // A stream sets aside what it may use.
    let mut stream = completion(60);
    stream["stream"] = json!(true);
    stream["stop_token_ids"] = json!((0..8192).collect::<Vec<u32>>());
    assert_eq!(of(&accounts.server.with_key(&key).post("/v1/completions", &stream), "tokens").1, text("0"));
    let reply = accounts.server.with_key(&key).get("/v1/models");
    assert_eq!((of(&reply, "requests").1, of(&reply, "tokens").1), (text("0"), text("59")), "and gives back what it did not use");
    let refused = accounts.complete(&key, 1);
    refused.error(429);
    assert_eq!((of(&refused, "requests").1, of(&refused, "tokens").1), (text("0"), text("59")));
    // Only what there is a limit for; and nothing of it without a key.
    let reply = accounts.complete(&accounts.limited(Limits { tokens_per_minute: Some(100), ..Limits::default() }), 90);
    assert_eq!((of(&reply, "requests"), of(&reply, "tokens").1), ((None, None, None), text("0")));
    let reply = accounts.complete(&accounts.limited(Limits::default()), 1);
    assert!(!reply.headers.keys().any(|name| name.as_str().starts_with("x-ratelimit")), "{:?}", reply.headers);
}

/// A request whose head has been read; the rest of its answer.
fn begun(accounts: &Accounts, key: &str, head: &str, body: &str) -> BufReader<TcpStream> {
    let mut connection = TcpStream::connect(accounts.server.address).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let headers = format!("host: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n");
    write!(connection, "{head} HTTP/1.1\r\n{headers}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    BufReader::new(connection)
}

/// The last data of a stream but `[DONE]`.
fn last_event(mut stream: BufReader<TcpStream>) -> Value {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]").collect();
    serde_json::from_str(events.last().unwrap_or_else(|| panic!("{text}"))).unwrap()
}

/// Answers under way end with their key, whoever ends it: this server, another process, or the time.
#[test]
fn a_key_that_ends_takes_its_answers_with_it() {
    // Long enough for all of that: one answer after the other.
    let mut body = json!({"prompt": vec![7; 10], "max_tokens": 490, "ignore_eos": true, "n": 128});
    let whole = body.to_string();
    body["stream"] = json!(true);
    let stream = body.to_string();
    let texts = json!({"input": vec!["a text that waits"; 100]}).to_string();
    for database in databases::all() {
        let accounts = Accounts::with(database, ServeConfig { max_batch_size: 1, max_queue: 600, ..ServeConfig::default() });
        let admin = accounts.scoped(&[Scope::Admin, Scope::Metrics, Scope::Completions]);
        for how in ["here", "elsewhere", "expired"] {
            let scopes = vec![Scope::Completions, Scope::Embeddings, Scope::Metrics];
            let (id, key) = accounts.key(Grant { scopes, ..Grant::new(how) });
            let mut streamed = begun(&accounts, &key, "POST /v1/completions", &stream);
            streamed.read_until(b'}', &mut Vec::new()).unwrap();
            let mut watched = begun(&accounts, &key, "GET /v1/live", "");
            watched.read_until(b'}', &mut Vec::new()).unwrap();
            let embedded = begun(&accounts, &key, "POST /v1/embeddings", &texts);
            let gathered = begun(&accounts, &key, "POST /v1/completions", &whole);
            // Another key's answer goes on.
            let mut other = begun(&accounts, &admin, "POST /v1/completions", &stream);
            other.read_until(b'\n', &mut Vec::new()).unwrap();
            // Places of three requests with 128 answers each and one with 100: with any of them missing it is 384 at most. A request that comes after its key has ended
            // is refused in other words; one that has places has shown its key.
            wait("all have their places", || accounts.server.with_key(&admin).metric("ernie_queue_length") > 384.0);
            let began = Instant::now();
            match how {
                "here" => {
                    assert_eq!(accounts.server.with_key(&admin).post(&format!("/admin/api/keys/{id}/revoke"), &json!({})).status, 200)
                }
                "elsewhere" => accounts.revoke(&id),
                _ => {
                    let soon = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 1;
                    let change = json!({"expires": soon});
                    assert_eq!(accounts.server.with_key(&admin).ask("PATCH", &format!("/admin/api/keys/{id}"), Some(&change)).status, 200);
                }
            }
            for stream in [streamed, watched] {
                let last = last_event(stream);
                assert_eq!(last["error"]["code"], "invalid_api_key", "{how}: {last}");
            }
            for mut answer in [embedded, gathered] {
                let mut text = String::new();
                answer.read_to_string(&mut text).unwrap();
                assert!(text.starts_with("HTTP/1.1 401 ") && text.contains("revoked or has expired"), "{how}: {text}");
            }
            assert!(began.elapsed() < Duration::from_secs(10), "{how}: {:?}", began.elapsed());
            accounts.complete(&key, 1).error(401);
            wait("only the other's is left", || accounts.server.with_key(&admin).metric("ernie_streams") == 1.0);
            drop(other);
            wait("none is left", || accounts.server.with_key(&admin).metric("ernie_streams") == 0.0);
        }
    }
}
