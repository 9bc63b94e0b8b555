//! Spans, as a collector gets them.
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use ernie_serve::ServeConfig;
use serde_json::{Value, json};

use crate::client::Running;

/// A field of a protobuf message.
#[derive(Clone, Debug)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

/// The fields of a message by number, as they come (protobuf's encoding).
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        number
    }
    fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(length);
        *bytes = rest;
        taken
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length).to_vec())
            }
            5 => Field::Number(u32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap()).into()),
            other => panic!("wire type {other}"),
        };
        found.push((tag >> 3, field));
    }
    found
}

fn messages(bytes: &[u8], number: u64) -> Vec<Vec<u8>> {
    let of = |(n, field)| match field {
        Field::Bytes(bytes) if n == number => Some(bytes),
        _ => None,
    };
    fields(bytes).into_iter().filter_map(of).collect()
}

fn text(bytes: &[u8], number: u64) -> String {
    messages(bytes, number).pop().map(|bytes| String::from_utf8(bytes).unwrap()).unwrap_or_default()
}

fn number(bytes: &[u8], wanted: u64) -> u64 {
    let of = |(n, field): &(u64, Field)| match field {
        Field::Number(value) if *n == wanted => Some(*value),
        _ => None,
    };
    fields(bytes).iter().find_map(of).unwrap_or(0)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `AnyValue` of OTLP.
fn value(bytes: &[u8]) -> Value {
    match fields(bytes).into_iter().next() {
        Some((1, Field::Bytes(text))) => json!(String::from_utf8(text).unwrap()),
        Some((2, Field::Number(bool))) => json!(bool != 0),
        Some((3, Field::Number(int))) => json!(int as i64),
        Some((4, Field::Number(bits))) => json!(f64::from_bits(bits)),
        Some((5, Field::Bytes(array))) => messages(&array, 1).iter().map(|item| value(item)).collect(),
        other => panic!("{other:?}"),
    }
}

fn attributes(bytes: &[u8], number: u64) -> BTreeMap<String, Value> {
    messages(bytes, number).iter().map(|pair| (text(pair, 1), value(&messages(pair, 2)[0]))).collect()
}

/// A span of OTLP.
#[derive(Debug)]
struct Span {
    trace: String,
    parent: String,
    name: String,
    kind: u64,
    nanoseconds: u64,
    attributes: BTreeMap<String, Value>,
    status: u64,
    service: Value,
}

/// The spans of an `ExportTraceServiceRequest`.
fn spans(request: &[u8]) -> Vec<Span> {
    let mut found = Vec::new();
    for resource in messages(request, 1) {
        let service = messages(&resource, 1).iter().map(|resource| attributes(resource, 1)["service.name"].clone()).next().unwrap();
        for span in messages(&resource, 2).iter().flat_map(|scope| messages(scope, 2)) {
            found.push(Span {
                trace: hex(&messages(&span, 1)[0]),
                parent: messages(&span, 4).first().map(|id| hex(id)).unwrap_or_default(),
                name: text(&span, 5),
                kind: number(&span, 6),
                nanoseconds: number(&span, 8) - number(&span, 7),
                attributes: attributes(&span, 9),
                status: messages(&span, 15).first().map_or(0, |status| number(status, 3)),
                service: service.clone(),
            });
        }
    }
    found
}

/// Takes one request of an exporter; its head and its body.
fn collect(connection: TcpStream) -> (String, Vec<u8>) {
    let mut reader = BufReader::new(connection);
    let mut head = String::new();
    while reader.read_line(&mut head).unwrap() > 2 {}
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    write!(reader.get_mut(), "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").unwrap();
    (head, body)
}

/// A collector on a free port; what it gets.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, received) = channel();
    std::thread::spawn(move || listener.incoming().for_each(|connection| drop(sender.send(collect(connection.unwrap())))));
    (url, received)
}

fn with_collector(url: &str) -> Running {
    Running::with(ServeConfig { otlp_endpoint: Some(url.to_owned()), ..ServeConfig::default() })
}

#[test]
fn every_request_is_a_span_under_its_callers() {
    let (url, received) = collector();
    let server = with_collector(&url);
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let asked = server.header("traceparent", &format!("00-{trace}-{parent}-01")).header("x-request-id", "mine-1");
    let body = json!({"prompt": "a secret", "max_tokens": 300, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}});
    let reply = asked.post("/v1/completions", &body);
    let usage = reply.events().last().unwrap()["usage"].clone();
    server.post("/v1/chat/completions", &json!({"messages": "a secret"})).error(400);
    server.get("/v1/nothing/of/the/kind").error(404);
    // Not sampled by its caller: no span.
    assert_eq!(server.header("traceparent", &format!("00-{trace}-{parent}-00")).get("/v1/models").status, 200);
    // The end sends what is left.
    drop(server);
    let (mut heads, mut all, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    while let Ok((head, body)) = received.try_recv() {
        all.extend(spans(&body));
        heads.push(head);
        bytes.extend(body);
    }
    assert!(
        heads.iter().all(|head| head.starts_with("post /v1/traces ") && head.contains("content-type: application/x-protobuf")),
        "{heads:?}"
    );
    assert!(!String::from_utf8_lossy(&bytes).contains("secret"), "prompts are in no span");
    let named = |name: &str| all.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name} in {all:#?}"));
    assert_eq!(all.len(), 3, "{all:#?}");

    let answer = named("POST /v1/completions");
    assert_eq!((&*answer.trace, &*answer.parent, answer.kind, answer.status), (trace, parent, 2, 0));
    assert_eq!(answer.service, "ernie-serve");
    for (name, expected) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/v1/completions")),
        ("http.response.status_code", json!(200)),
        ("url.scheme", json!("http")),
        ("url.path", json!("/v1/completions")),
        ("http.response.header.x-request-id", json!(["mine-1"])),
        ("gen_ai.operation.name", json!("text_completion")),
        ("gen_ai.request.model", json!("nano")),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].clone()),
        ("gen_ai.usage.output_tokens", json!(300)),
        ("gen_ai.response.finish_reasons", json!(["length"])),
    ] {
        assert_eq!(answer.attributes.get(name), Some(&expected), "{name}: {answer:#?}");
    }
    // It lasts as long as the stream, of which the first token is the beginning.
    let first = answer.attributes["gen_ai.response.time_to_first_chunk"].as_f64().unwrap();
    assert!(0.0 < first && first * 2.0 < answer.nanoseconds as f64 / 1e9, "{first}: {answer:#?}");

    let refused = named("POST /v1/chat/completions");
    assert_eq!((&*refused.parent, refused.status), ("", 0));
    assert_eq!(refused.attributes["http.response.status_code"], 400);
    assert!(!refused.attributes.keys().any(|name| name.starts_with("gen_ai.")));
    assert!(!named("GET").attributes.contains_key("http.route"));
}

/// Neither one that is not there nor one that takes connections and says nothing.
#[test]
fn a_collector_that_is_away_holds_up_nobody() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent.local_addr().unwrap(), gone] {
        let server = with_collector(&format!("http://{address}/v1/traces"));
        let began = Instant::now();
        // More than wait to be sent at most.
        for _ in 0..3000 {
            assert_eq!(server.get("/health/live").status, 200);
        }
        assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).status, 200);
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        let ended = Instant::now();
        drop(server);
        assert!(ended.elapsed() < Duration::from_secs(10), "{:?}", ended.elapsed());
    }
}
