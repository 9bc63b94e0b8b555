//! `ernie serve`: started, asked, told to stop.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::program::{command, ernie};
use crate::tiny_model;

/// A server on a free port.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(arguments: &[&str]) -> Self {
        Self::of(command().args([&["serve", "--port", "0", "--cache-mib", "64"], arguments].concat()))
    }

    fn of(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
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

/// One line for each answer, when it is over; with what was written only where that is asked for.
#[test]
fn the_log_has_a_line_for_each_answer() {
    for prompts in [false, true] {
        let flags: &[&str] = if prompts { &["--log-prompts"] } else { &[] };
        let serving = Serving::start(&[&["--log-format", "json", "--threads", "1"], flags].concat());
        let text = "Once upon a\ntime there was a secret";
        let body = json!({"prompt": text, "max_tokens": 7, "temperature": 0, "ignore_eos": true, "n": 2});
        let answer = serving.post("/v1/completions", &body);
        let mut stream = json!({"prompt": text, "max_tokens": 450, "ignore_eos": true, "stream": true});
        let mut whole = String::new();
        serving.send("/v1/completions", &stream).read_to_string(&mut whole).unwrap();
        // One that is left in the middle.
        stream["n"] = json!(8);
        serving.send("/v1/completions", &stream).read_exact(&mut [0; 600]).unwrap();
        let chat = json!({"messages": [{"role": "user", "content": text}], "max_tokens": 5, "stream": true});
        serving.send("/v1/chat/completions", &chat).read_to_string(&mut whole).unwrap();
        serving.post("/v1/completions", &json!({"prompt": text, "max_tokens": 0}));
        serving.post("/v1/embeddings", &json!({"input": text}));
        std::thread::sleep(std::time::Duration::from_secs(1));
        serving.signal("-TERM");
        let (code, log) = serving.end();
        assert_eq!(code, Some(0), "{log}");
        let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |route: &str| lines.iter().filter(|line| line["route"] == route).collect::<Vec<_>>();
        let (completions, chats, embeddings) = (of("/v1/completions"), of("/v1/chat/completions"), of("/v1/embeddings"));
        assert_eq!((completions.len(), chats.len(), embeddings.len()), (4, 1, 1), "{log}");
        let of_line =
            |line: &Value| ["status", "outcome", "model", "completion_tokens", "finish_reasons", "key_id"].map(|name| line[name].clone());
        let told = |status: u64, outcome: &str, tokens: u64, reasons: &str| {
            [json!(status), json!(outcome), json!("nano"), json!(tokens), json!(reasons), json!("")]
        };
        let find = |outcome: &str, reasons: Value| {
            let found = completions.iter().find(|line| line["outcome"] == outcome && line["finish_reasons"] == reasons);
            *found.unwrap_or_else(|| panic!("{outcome} {reasons}: {log}"))
        };
        let two = find("finished", json!("length,length"));
        assert_eq!(of_line(two), told(200, "finished", 14, "length,length"));
        assert_eq!(two["prompt_tokens"], answer["usage"]["prompt_tokens"]);
        let streamed = find("finished", json!("length"));
        assert_eq!(of_line(streamed), told(200, "finished", 450, "length"));
        // The line comes when the stream is over, not when it begins.
        let seconds = |name: &str| streamed[name].as_f64().unwrap();
        assert!(0.0 < seconds("first_token_seconds") && seconds("first_token_seconds") * 2.0 < seconds("seconds"), "{streamed}");
        let left = find("client_left", json!(""));
        assert!((1..8 * 450).contains(&left["completion_tokens"].as_u64().unwrap()), "{left}");
        // A refusal is an answer too; it asked nothing of the model.
        let refused = find("finished", Value::Null);
        assert_eq!((&refused["status"], refused.get("model"), refused.get("completion_tokens")), (&json!(400), None, None));
        assert_eq!((&chats[0]["outcome"], &chats[0]["model"]), (&json!("finished"), &json!("nano")));
        assert_eq!(of_line(embeddings[0]), told(200, "finished", 0, ""));
        if prompts {
            let texts = |line: &Value, name: &str| serde_json::from_str::<Vec<String>>(line[name].as_str().unwrap()).unwrap();
            assert!(texts(two, "prompts")[0].ends_with(text), "{two}");
            let choices: Vec<&str> = [0, 1].map(|index| answer["choices"][index]["text"].as_str().unwrap()).to_vec();
            assert_eq!(texts(two, "answers"), choices);
            assert!(texts(chats[0], "prompts")[0].contains(text) && !texts(chats[0], "answers")[0].is_empty());
            assert!(texts(embeddings[0], "prompts")[0].ends_with(text));
        } else {
            assert!(
                !log.contains("secret") && lines.iter().all(|line| line.get("prompts").is_none() && line.get("answers").is_none()),
                "{log}"
            );
        }
    }
}

/// A terminal that is closed ends the server as SIGTERM does, however often it says so; one that was started not to care goes on.
/// Whether this process was started with hangups ignored, where the system tells.
fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|signals| signals & 1 != 0)
}

#[test]
fn a_hangup_finishes_what_runs_unless_it_is_ignored() {
    if hangups_are_ignored() {
        return println!("started with hangups ignored (nohup), which servers inherit");
    }
    let serving = Serving::start(&["--threads", "1"]);
    let body = json!({"prompt": "Once upon a time", "max_tokens": 490, "ignore_eos": true, "n": 4, "stream": true});
    let mut connection = serving.send("/v1/completions", &body);
    connection.read_exact(&mut [0; 300]).unwrap();
    for _ in 0..3 {
        serving.signal("-HUP");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let mut rest = String::new();
    connection.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]") && !rest.contains("\"error\""), "{rest}");
    let (code, log) = serving.end();
    assert_eq!(code, Some(0), "{log}");

    let program = command();
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" serve --port 0 --cache-mib 64 --database sqlite::memory:"]).arg(program.get_program());
    let serving = Serving::of(&mut shell);
    serving.signal("-HUP");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(serving.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2}))["usage"]["completion_tokens"], 2);
    serving.signal("-TERM");
    assert_eq!(serving.end().0, Some(0));
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

/// What clients call a model, and the books, is its directory's name however that was given.
#[test]
fn a_model_is_called_by_its_directory() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("tiny");
    std::fs::create_dir(&directory).unwrap();
    tiny_model::write(&directory);
    let arguments = ["serve", "--port", "0", "--cache-mib", "64", "--threads", "1", "--database", "sqlite::memory:", "--model", "."];
    let serving = Serving::of(command().current_dir(&directory).args(arguments));
    let reply = serving.post("/v1/completions", &json!({"prompt": [5, 6], "max_tokens": 1}));
    assert_eq!(reply["model"], "tiny", "{reply}");
    serving.signal("-TERM");
    assert_eq!(serving.end().0, Some(0));
}
