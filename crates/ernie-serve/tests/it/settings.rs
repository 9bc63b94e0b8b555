//! Settings that change while the server runs.
use std::time::{Duration, Instant};

use ernie_serve::ServeConfig;
use serde_json::{Value, json};

use crate::client::Running;

const PATH: &str = "/admin/api/settings";

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_is_given_changes_and_what_makes_no_sense_is_refused() {
    let server = Running::with(ServeConfig { max_batch_size: 5, dynamic_batching: false, ..ServeConfig::default() });
    assert_eq!(server.get(PATH).json(), json!({"dynamic_batching": false, "max_batch_size": 5}));
    assert_eq!(server.patch(PATH, &json!({"dynamic_batching": true})).json(), json!({"dynamic_batching": true, "max_batch_size": 5}));
    assert_eq!(server.patch(PATH, &json!({"max_batch_size": 9})).json(), json!({"dynamic_batching": true, "max_batch_size": 9}));
    assert_eq!(server.patch(PATH, &json!({})).json(), json!({"dynamic_batching": true, "max_batch_size": 9}));
    for size in [json!(0), json!(-1), json!(1.5), json!("2"), json!(5_000_000_000_u64)] {
        let (param, message) = server.patch(PATH, &json!({"max_batch_size": size, "dynamic_batching": false})).error(400);
        assert_eq!(param.as_deref(), Some("max_batch_size"), "{message}");
    }
    server.patch(PATH, &json!({"dynamic_batching": "yes"})).error(400);
    let (_, message) = server.patch(PATH, &json!({"max_batch": 3})).error(400);
    assert!(message.contains("max_batch_size"), "{message}");
    assert_eq!(server.get(PATH).json(), json!({"dynamic_batching": true, "max_batch_size": 9}));
    server.post(PATH, &json!({"max_batch_size": 3})).error(405);
    // Both changes, and nothing else, stand in the audit log.
    let log = server.get("/admin/api/audit").json();
    let details: Vec<&str> = log["data"].as_array().unwrap().iter().map(|line| line["detail"].as_str().unwrap()).collect();
    assert!(details.len() == 2 && details[0].contains("\"max_batch_size\":9") && details[1].contains("false"), "{log}");
}

/// The lengths and texts of `n` answers, which are all the same.
fn answers(reply: &Value, n: usize) -> Vec<String> {
    assert_eq!(reply["usage"]["completion_tokens"], 300 * n, "{reply}");
    reply["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn changes_take_effect_while_requests_run_and_none_is_lost() {
    let server = Running::with(ServeConfig { max_batch_size: 1, ..ServeConfig::default() });
    let body = |n: usize| json!({"prompt": "Once upon a time", "max_tokens": 300, "temperature": 0, "ignore_eos": true, "n": n});
    let expected = answers(&server.post("/v1/completions", &body(1)).json(), 1);
    let running = || server.metric("ernie_requests_running");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| server.post("/v1/completions", &body(12)));
        wait("one of them is computed", || running() == 1.0);
        server.patch(PATH, &json!({"max_batch_size": 4}));
        wait("four of them are computed", || running() == 4.0);
        // Those four go on; the others come one by one.
        server.patch(PATH, &json!({"max_batch_size": 2, "dynamic_batching": false}));
        wait("two of them are computed", || running() == 2.0);
        let most = std::cell::Cell::new(0.0_f64);
        server.patch(PATH, &json!({"max_batch_size": 3, "dynamic_batching": true}));
        wait("three of them are computed", || {
            most.set(most.get().max(running()));
            running() == 3.0
        });
        assert!(most.get() <= 3.0);
        let texts = answers(&asked.join().unwrap().json(), 12);
        assert!(texts.iter().all(|text| *text == expected[0]));
    });
    assert_eq!(server.metric("ernie_requests_finished_total{reason=\"length\"}"), 13.0);
}
