//! Limits of a minute.
use ernie_serve::accounts::keys::Limits;
use serde_json::json;

use crate::accounts::{Accounts, completion};
use crate::client::Reply;
use crate::databases;

#[test]
fn minutes_have_room_for_their_limits() {
    let accounts = Accounts::start(databases::file());
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
    let accounts = Accounts::start(databases::file());
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
