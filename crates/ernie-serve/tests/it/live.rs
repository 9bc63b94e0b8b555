//! How things stand, as events and as metrics.
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Running;

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn events_say_how_things_stand() {
    let server = Running::start();
    let before = &server.first_events("/v1/live", 1)[0];
    for latency in ["ttft_ms", "itl_ms", "e2e_ms"] {
        assert_eq!(before[latency], json!({"p50": null, "p99": null}));
    }
    let body = json!({"prompt": "Once upon a time there was a little bird who lived in a tree", "max_tokens": 40, "ignore_eos": true});
    let usage = server.post("/v1/completions", &body).json()["usage"].clone();
    assert_eq!(usage["completion_tokens"], 40);
    // The rate is that of complete seconds.
    let events = server.first_events("/v1/live", 3);
    let event = &events[2];
    let expected = [
        "at",
        "e2e_ms",
        "experts",
        "gates",
        "itl_ms",
        "kv",
        "model",
        "prefix_hits",
        "prefix_lookups",
        "prompt_tokens_per_s",
        "queue_places",
        "requests_per_s",
        "requests_total",
        "running",
        "settings",
        "streams",
        "tokens_per_s",
        "ttft_ms",
        "uptime_s",
        "waiting",
    ];
    assert_eq!(keys(event), expected);
    assert_eq!(
        (&event["model"], &event["running"], &event["waiting"], &event["streams"]),
        (&json!("nano"), &json!(0), &json!(0), &json!(0))
    );
    assert_eq!((&event["requests_total"], &event["queue_places"]), (&json!(1), &json!(128)));
    assert!(event["tokens_per_s"].as_f64().unwrap() > 0.0 && event["prompt_tokens_per_s"].as_f64().unwrap() > 0.0, "{event}");
    for latency in ["ttft_ms", "itl_ms", "e2e_ms"] {
        let (p50, p99) = (event[latency]["p50"].as_f64().unwrap(), event[latency]["p99"].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p99, "{event}");
    }
    assert_eq!(event["kv"]["used_blocks"], 0);
    assert!(event["kv"]["blocks"].as_u64().unwrap() > 0 && event["kv"]["cached_blocks"].as_u64().unwrap() > 0);
    assert_eq!((&event["prefix_hits"], &event["prefix_lookups"]), (&json!(0), &usage["prompt_tokens"]));
    assert_eq!(event["settings"], json!({"dynamic_batching": true, "max_batch_size": 16}));
    let experts = event["experts"].as_array().unwrap();
    assert_eq!(experts.iter().map(|layer| layer["layer"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    for layer in experts {
        let shares = layer["share"].as_array().unwrap();
        assert_eq!(shares.len(), 8);
        let sum: f64 = shares.iter().map(|share| share.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-3, "{layer}");
    }
    assert_eq!(event["gates"], Value::Null);
    assert!(events[0]["at"].as_u64() < event["at"].as_u64());
}

#[test]
fn metrics_count_what_each_expert_got() {
    let server = Running::start();
    let usage =
        server.post("/v1/completions", &json!({"prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": true})).json()["usage"]
            .clone();
    let tokens = usage["prompt_tokens"].as_f64().unwrap() + 19.0;
    for layer in 1..6 {
        let count = |expert| server.metric(&format!("ernie_expert_tokens_total{{layer=\"{layer}\",expert=\"{expert}\"}}"));
        assert_eq!((0..8).map(count).sum::<f64>(), 2.0 * tokens, "layer {layer}");
    }
    assert!(!server.get("/metrics").text.contains("ernie_expert_tokens_total{layer=\"0\""));
}

#[test]
fn a_shutdown_does_not_wait_for_who_looks_on_and_not_everybody_may() {
    let mut server = Running::start();
    let address = server.address;
    // What a client got until its first event or the end of an error.
    let watch = || {
        let mut connection = TcpStream::connect(address).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        connection.write_all(b"GET /v1/live HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut text = String::new();
        while !text.contains("}\n\n") && !text.contains("}}") {
            let mut bytes = [0; 8192];
            let count = connection.read(&mut bytes).unwrap();
            assert!(count > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        (connection, text)
    };
    let watchers: Vec<_> = (0..64).map(|_| watch()).collect();
    assert!(watchers.iter().all(|(_, text)| text.starts_with("HTTP/1.1 200 ")));
    assert!(watch().1.starts_with("HTTP/1.1 429 "));
    drop(watchers);
    let began = Instant::now();
    let mut last = loop {
        let (connection, text) = watch();
        if text.starts_with("HTTP/1.1 200 ") {
            break connection;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{text}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let began = Instant::now();
    server.shut_down();
    last.read_to_string(&mut String::new()).unwrap();
    while !server.has_ended() {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
}
