//! `ernie serve`: started, asked, told to stop.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::program::{command, ernie};

/// A server on a free port.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(arguments: &[&str]) -> Self {
        let arguments = [&["serve", "--port", "0", "--cache-mib", "64"], arguments].concat();
        let mut child = command().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address =
            line.split("http://").nth(1).and_then(|rest| rest.split("/v1").next()).unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Serving { child, address }
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let mut connection = self.send(path, body);
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    fn send(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut connection = TcpStream::connect(&self.address).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n");
        write!(connection, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
        connection
    }

    fn signal(&self, name: &str) {
        let kill = format!("kill {name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// The exit code and what was logged.
    fn end(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

#[test]
fn what_is_served_is_what_generate_gives_and_a_signal_ends_it() {
    let serving = Serving::start(&["--log-format", "json", "--threads", "1"]);
    let secret = "Once upon a time there was a secret";
    let body = json!({"model": "nano", "prompt": secret, "max_tokens": 20, "temperature": 0});
    let served = serving.post("/v1/completions", &body);
    let generated = ernie(["generate", secret, "--max-tokens", "20", "--temperature", "0", "--json"]).json();
    assert_eq!(served["choices"][0]["text"], generated["text"]);
    serving.signal("-TERM");
    let (code, log) = serving.end();
    assert_eq!(code, Some(0), "{log}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(
        lines.iter().any(|line| line["route"] == "/v1/completions" && line["status"] == 200 && line["request_id"].is_string()),
        "{log}"
    );
    assert!(!log.contains("secret"), "what clients write is not in the log: {log}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let serving = Serving::start(&["--threads", "1", "--max-batch-size", "1", "--max-queue", "128"]);
    let body = json!({"prompt": "Once upon a time", "max_tokens": 490, "ignore_eos": true, "n": 100, "stream": true});
    let mut connection = serving.send("/v1/completions", &body);
    // Something has come: it runs.
    connection.read_exact(&mut [0; 300]).unwrap();
    serving.signal("-INT");
    std::thread::sleep(std::time::Duration::from_millis(100));
    serving.signal("-INT");
    let (code, log) = serving.end();
    assert_eq!(code, Some(130), "{log}");
}

#[test]
fn the_outcome_of_all_sources_is_printed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("serve.toml");
    std::fs::write(&file, "port = 1\nmax_queue = 5\nweights = \"int8\"\n").unwrap();
    let mut command = command();
    command.args(["serve", "--print-config", "--port", "3", "--config"]).arg(&file);
    let output = command.env("ERNIE_SERVE_PORT", "2").env("ERNIE_SERVE_MAX_QUEUE", "6").output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    for line in ["port = 3", "max_queue = 6", "weights = \"int8\"", "host = \"127.0.0.1\""] {
        assert!(printed.lines().any(|printed| printed == line), "no {line} in {printed}");
    }
}

/// A password of the database is told to nobody.
#[test]
fn passwords_are_not_printed() {
    let url = "postgres://me:hidden@127.0.0.1:1/accounts?password=hidden&sslmode=disable";
    let shown = "postgres://me:***@127.0.0.1:1/accounts?password=***&sslmode=disable";
    let printed = ernie(["serve", "--print-config", "--database", url]).ok();
    assert!(printed.contains(shown) && !printed.contains("hidden"), "{printed}");
    let failed = ernie(["serve", "--database", url]).fails(1, &["127.0.0.1:1/accounts"]);
    assert!(!failed.stderr.contains("hidden"), "{}", failed.stderr);
    // Where a file is wrong, what stands there is shown, but not this.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("serve.toml");
    for line in ["database = \"postgres://me:hidden@db/accounts", "port = \"postgres://me:hidden@db/accounts\""] {
        std::fs::write(&file, line).unwrap();
        let failed = ernie(["serve".as_ref(), "--config".as_ref(), file.as_os_str()]).fails(2, &["serve.toml"]);
        assert!(!failed.stderr.contains("hidden"), "{}", failed.stderr);
    }
}
