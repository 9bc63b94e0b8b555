//! Load, leaving clients, and the end.
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use ernie_engine::SamplingParams;
use ernie_serve::ServeConfig;
use serde_json::json;

use crate::client::Running;
use crate::nano;

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A request that takes long, sent and not read.
fn long_request(server: &Running, stream: bool, n: usize) -> TcpStream {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": true, "stream": stream, "n": n}).to_string();
    send(
        server,
        &format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ),
    )
}

fn send(server: &Running, text: &str) -> TcpStream {
    let mut connection = TcpStream::connect(server.address).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.write_all(text.as_bytes()).unwrap();
    connection
}

fn read(mut connection: TcpStream) -> String {
    let mut text = String::new();
    connection.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_client_that_leaves_is_cancelled() {
    let server = Running::start();
    for stream in [true, false] {
        let before = server.metric("ernie_requests_finished_total{reason=\"cancelled\"}");
        let connection = long_request(&server, stream, 8);
        wait("the request is computed", || server.metric("ernie_requests_running") == 8.0);
        drop(connection);
        wait("the request is cancelled", || server.metric("ernie_requests_finished_total{reason=\"cancelled\"}") == before + 8.0);
        wait("nothing runs", || server.metric("ernie_requests_running") == 0.0);
        assert_eq!(server.metric("ernie_kv_cache_used_bytes"), 0.0);
    }
    wait("the streams are given back", || server.metric("ernie_streams") == 0.0);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Running::with(ServeConfig { max_batch_size: 1, max_queue: 2, max_streams: 1, ..ServeConfig::default() });
    let first = long_request(&server, true, 1);
    wait("the first is computed", || server.metric("ernie_requests_running") == 1.0);
    let second = json!({"prompt": "x", "max_tokens": 2, "stream": true});
    let reply = server.post("/v1/completions", &second);
    assert!(reply.error(429).1.contains("streamed"), "{}", reply.text);
    let waiting = [long_request(&server, false, 1), long_request(&server, false, 1)];
    wait("the queue is full", || server.metric("ernie_queue_length") == 2.0);
    let reply = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2}));
    reply.error(429);
    assert_eq!(reply.headers["retry-after"], "1");
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "n": 3})).error(400).0.as_deref(), Some("n"));
    drop((first, waiting));
    wait("there is room again", || server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).status == 200);
}

#[test]
fn a_shutdown_finishes_what_runs_and_takes_nothing_new() {
    let mut server = Running::with(ServeConfig { max_batch_size: 1, ..ServeConfig::default() });
    assert_eq!(server.get("/health/ready").status, 200);
    let (running, waiting) = (long_request(&server, true, 1), long_request(&server, false, 1));
    let counted = |name: &str| server.metric(name) == 1.0;
    wait("one is computed and one waits", || counted("ernie_requests_running") && counted("ernie_queue_length"));
    server.shut_down();
    wait("it is not ready", || server.has_ended() || server.get("/health/ready").status == 503);
    assert!(!server.has_ended());
    let reply = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2}));
    reply.error(503);
    assert_eq!(server.get("/health/live").status, 200);
    let streamed = read(running);
    assert!(streamed.contains("\"finish_reason\":\"length\"") && streamed.contains("[DONE]"), "{streamed}");
    assert!(read(waiting).contains("\"completion_tokens\":480"));
    wait("the server ends", || server.has_ended());
}

#[test]
fn a_shutdown_does_not_wait_for_ever() {
    let config = ServeConfig { max_batch_size: 1, drain_timeout_s: 0, ..ServeConfig::default() };
    let mut server = Running::with(config);
    let running = long_request(&server, true, 64);
    wait("the first is computed", || server.metric("ernie_requests_running") == 1.0);
    server.shut_down();
    wait("the server ends", || server.has_ended());
    let text = read(running);
    assert!(text.contains("\"error\"") && text.contains("[DONE]"), "{text}");
}

#[test]
fn an_answer_that_takes_too_long_is_cut_off_and_computed_no_further() {
    let server = Running::with(ServeConfig { max_batch_size: 1, answer_timeout_s: 1, ..ServeConfig::default() });
    let (streamed, whole) = (long_request(&server, true, 60), long_request(&server, false, 60));
    let text = read(streamed);
    assert!(text.contains("\"code\":\"timeout\"") && text.contains("[DONE]"), "{text}");
    let text = read(whole);
    assert!(text.starts_with("HTTP/1.1 504 ") && text.contains("the 1 s that"), "{text}");
    wait("nothing is computed", || server.metric("ernie_requests_running") == 0.0);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).status, 200);
}

/// Who has not said what they want when all else is answered is not waited for.
#[test]
fn a_shutdown_waits_for_no_request_that_is_not_there() {
    let limit = 60;
    let config = ServeConfig { header_timeout_s: limit, body_timeout_s: limit, drain_timeout_s: limit, ..ServeConfig::default() };
    let mut server = Running::with(config);
    let running = long_request(&server, true, 1);
    wait("it is computed", || server.metric("ernie_requests_running") == 1.0);
    let post = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{";
    let [nothing, head, body] = ["", "GET /health/live HTTP/1.1\r\nhost: local", post].map(|text| send(&server, text));
    let mut used = send(&server, "GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n");
    used.read_exact(&mut [0; 12]).unwrap();
    used.write_all(b"GET /health/li").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    server.shut_down();
    let began = Instant::now();
    // What runs is finished nevertheless.
    assert!(read(running).contains("[DONE]"));
    wait("the server ends", || server.has_ended());
    assert!(began.elapsed() < Duration::from_secs(limit / 2), "{:?}", began.elapsed());
    assert_eq!(read(nothing) + &read(head), "");
    assert!(read(body).starts_with("HTTP/1.1 503 "));
    assert!(!read(used).contains("HTTP/1.1"));
}

/// A reader who is behind gets what was computed, as long as the drain lasts.
#[test]
fn a_shutdown_sends_what_a_slow_reader_has_not_taken() {
    let mut server = Running::with(ServeConfig { stream_buffer: 100_000, ..ServeConfig::default() });
    // Megabytes: more than the system takes between us (4 MiB on the server's side, little on this).
    let body = json!({"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": true, "n": 40, "logprobs": 20}).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let connection = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(server.address).await.unwrap().into_std().unwrap()
    });
    connection.set_nonblocking(false).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(&connection, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    wait("it is computed", || server.metric("ernie_requests_finished_total{reason=\"length\"}") == 40.0);
    server.shut_down();
    std::thread::sleep(Duration::from_millis(500));
    let text = read(connection);
    assert!(text.len() > 5 << 20 && text.ends_with("}}"), "{} bytes", text.len());
    wait("the server ends", || server.has_ended());
}

#[test]
fn slow_heads_and_bodies_are_cut_off() {
    let server = Running::with(ServeConfig { header_timeout_s: 1, body_timeout_s: 1, ..ServeConfig::default() });
    let began = Instant::now();
    let head = send(&server, "GET /health/live HTTP/1.1\r\nhost: local");
    let body =
        send(&server, "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{");
    assert!(!read(head).contains("200 OK"));
    assert!(read(body).starts_with("HTTP/1.1 408 "));
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn names_of_requests_and_hosts() {
    let server = Running::start();
    let ask = |headers: &str| read(send(&server, &format!("GET /health/live HTTP/1.1\r\nconnection: close\r\n{headers}\r\n")));
    assert!(ask("host: localhost\r\nx-request-id: my-own.1\r\n").contains("x-request-id: my-own.1\r\n"));
    assert!(!ask("host: localhost\r\nx-request-id: a b<c\r\n").contains("a b<c"));
    assert!(ask("host: evil.example\r\n").starts_with("HTTP/1.1 403 "));
    let counted = server.metric("ernie_http_requests_total{route=\"/health/live\",status=\"403\"}");
    assert_eq!(counted, 1.0);
}

#[test]
fn what_is_counted_adds_up() {
    let server = Running::start();
    let prompt = nano::tokenizer().encode("Once upon a time", true).unwrap();
    let generation = nano::generate(&prompt, &SamplingParams { max_tokens: 25, ignore_eos: true, ..SamplingParams::greedy() });
    for _ in 0..3 {
        let body = json!({"prompt": prompt, "max_tokens": 25, "temperature": 0, "ignore_eos": true});
        assert_eq!(server.post("/v1/completions", &body).json()["choices"][0]["text"], generation.text);
    }
    let count = |name: &str| server.metric(name);
    wait("the last step is counted", || count("ernie_requests_running") == 0.0);
    assert_eq!(count("ernie_output_tokens_total"), 75.0);
    assert_eq!(count("ernie_prompt_tokens_total"), 3.0 * prompt.len() as f64);
    assert_eq!(count("ernie_requests_finished_total{reason=\"length\"}"), 3.0);
    assert_eq!(count("ernie_time_to_first_token_seconds_count"), 3.0);
    assert_eq!(count("ernie_inter_token_latency_seconds_count"), 72.0);
    assert_eq!(count("ernie_request_duration_seconds_count"), 3.0);
    assert!(server.get("/metrics").text.ends_with("# EOF\n"));
    // The prompt is shorter than a block, so nothing of it is found again.
    assert_eq!((count("ernie_prefix_cache_queries_total"), count("ernie_prefix_cache_hits_total")), (3.0 * prompt.len() as f64, 0.0));
    let long = json!({"prompt": vec![7; 100], "max_tokens": 1});
    for _ in 0..2 {
        assert_eq!(server.post("/v1/completions", &long).status, 200);
    }
    wait("the second finds the first", || count("ernie_prefix_cache_hits_total") == 96.0);
}
