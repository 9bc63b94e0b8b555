//! `ernie keys`, `ernie usage`, and what a killed server leaves behind.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ernie_serve::ServeConfig;
use ernie_serve::accounts::{store::Store, with_store};
use serde_json::{Value, json};

use crate::program::{Run, command, ernie};

fn keys(database: &str, arguments: &[&str]) -> Run {
    ernie([&["keys", "--database", database][..], arguments].concat())
}

/// A new key's id and the key.
fn create(database: &str, arguments: &[&str]) -> (String, String) {
    let made = keys(database, &[&["create", "--json"], arguments].concat()).json();
    (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned())
}

fn database(folder: &Path) -> String {
    format!("sqlite:{}", folder.join("deep/er/accounts.db").display())
}

#[test]
fn keys_are_shown_once_listed_and_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let database = database(folder.path());
    assert!(keys(&database, &["list"]).ok().contains("no keys"));
    let shown = keys(&database, &["create", "team 甲", "--scopes", "chat,models", "--expires", "30d", "--tokens-per-month", "5000"]).ok();
    let shown = shown.trim();
    assert!(shown.starts_with("ernie_") && shown.len() == 6 + 16 + 1 + 64, "{shown}");
    let (id, key) = create(&database, &["other", "--expires", "2020-01-01", "--money-per-month", "2.5", "--models", "nano"]);
    let late = keys(&format!("{database}.other"), &["create", "late", "--expires", "2020-01-01"]);
    assert!(late.stderr.contains("never taken"), "{}", late.stderr);
    let list = keys(&database, &["list"]).ok();
    for part in ["team 甲", "chat,models", "5000 tokens/month", "until ", &id, "expired 2020-01-01", "2.5/month", "nano"] {
        assert!(list.contains(part), "no {part} in {list}");
    }
    assert!(!list.contains(shown) && !list.contains(&key[key.len() - 64..]));
    assert!(keys(&database, &["revoke", &id]).ok().contains("revoked"));
    assert!(keys(&database, &["revoke", &id, "--json"]).json()["revoked"].is_u64(), "twice is as good as once");
    keys(&database, &["revoke", "nobody"]).fails(1, &["nobody", "ernie keys list"]);
    let json = keys(&database, &["list", "--json"]).json();
    let data = json["data"].as_array().unwrap();
    let team = data.iter().find(|key| key["name"] == "team 甲").unwrap();
    assert_eq!((data.len(), &team["scopes"]), (2, &json!(["chat", "models"])));
    // Neither the file nor its log holds a secret.
    let accounts = folder.path().join("deep/er");
    for file in std::fs::read_dir(&accounts).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        for secret in [&key[key.len() - 64..], &shown[shown.len() - 64..]] {
            assert!(!bytes.windows(64).any(|window| window == secret.as_bytes()));
        }
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(accounts.join("accounts.db")).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{mode:o}");
    }
    ernie(["usage", "--database", &database]).ok();
    keys("sqlite:/proc/nowhere/accounts.db", &["list"]).fails(1, &["cannot open the database", "/proc/nowhere"]);
}

#[test]
#[cfg(unix)]
fn the_audit_log_names_the_user_of_the_system_whatever_the_environment_says() {
    let folder = tempfile::tempdir().unwrap();
    let database = database(folder.path());
    let arguments = ["keys", "--database", &database, "create", "x"];
    let output = command().args(arguments).env("USER", "mallory").env("LOGNAME", "mallory").output().unwrap();
    assert!(output.status.success());
    let id = std::process::Command::new("id").arg("-un").output().unwrap();
    // Users that only a directory knows have a name for `id` and a number here.
    let name = if id.status.success() { String::from_utf8(id.stdout).unwrap() } else { String::new() };
    let log = with_store(&ServeConfig { database: Some(database), ..ServeConfig::default() }, async |store| store.audit(1, None).await);
    let actor = log.unwrap()[0].actor.clone();
    assert!(actor == format!("cli:{}", name.trim()) || actor.starts_with("cli:uid "), "{actor}");
}

struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(database: &str) -> Self {
        Self::run(command(), database)
    }

    /// `program`: what runs `ernie` with more arguments.
    fn run(mut program: Command, database: &str) -> Self {
        let arguments = ["serve", "--port", "0", "--cache-mib", "64", "--threads", "1", "--log-level", "error", "--database", database];
        let mut child = program.args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.split("http://").nth(1).and_then(|rest| rest.split("/v1").next());
        let address = address.unwrap_or_else(|| panic!("{line:?}")).to_owned();
        assert!(line.contains("to those who have a key"), "{line}");
        Serving { child, address }
    }

    /// The answer's body as far as it came.
    fn complete(&self, key: &str, stream: bool) -> Option<String> {
        let body = json!({
            "prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": true, "stream": stream,
            "stream_options": if stream { json!({"include_usage": true}) } else { Value::Null }
        })
        .to_string();
        let mut connection = TcpStream::connect(&self.address).ok()?;
        let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n";
        write!(connection, "{head}authorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).ok()?;
        let mut answer = Vec::new();
        // Cut off is as good as not at all; what came before may be whole.
        let _ = connection.read_to_end(&mut answer);
        Some(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A copy of the file alone is a whole backup of a server that has ended.
#[test]
#[cfg(unix)]
fn a_server_that_has_ended_leaves_one_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let database = database(folder.path());
    let (_, key) = create(&database, &["clients"]);
    let mut serving = Serving::start(&database);
    assert!(serving.complete(&key, false).unwrap().contains("HTTP/1.1 200"));
    let end = format!("kill -TERM {}", serving.child.id());
    assert!(Command::new("sh").args(["-c", &end]).status().unwrap().success());
    assert!(serving.child.wait().unwrap().success());
    let files: Vec<_> = std::fs::read_dir(folder.path().join("deep/er")).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files, ["accounts.db"]);
    let row = ernie(["usage", "--by", "key", "--json", "--database", &database]).json()["data"][0].clone();
    assert_eq!((&row["requests"], &row["completion_tokens"]), (&json!(1), &json!(20)));
}

/// The disk fills under a running server, and then has room again: a limit on the size of files stands for it.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_ends_answers_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let database = database(folder.path());
    let (_, key) = create(&database, &["clients"]);
    let mut shell = Command::new("sh");
    // Without the signal a write beyond the limit is an error, as on a full disk. The unit is half a KiB.
    shell.args(["-c", "trap '' XFSZ; ulimit -S -f 400; exec \"$0\" \"$@\""]).arg(command().get_program());
    let serving = Serving::run(shell, &database);
    let (mut answered, began) = (0, Instant::now());
    let refused = loop {
        let answer = serving.complete(&key, false).unwrap();
        if !answer.contains("HTTP/1.1 200") {
            break answer;
        }
        answered += 1;
        assert!(began.elapsed() < Duration::from_secs(100), "{answered} answers are in the books of a full disk");
    };
    assert!(refused.contains("HTTP/1.1 503") && refused.contains("accounts_unavailable"), "{refused}");
    let room = format!("prlimit --pid {} --fsize=unlimited", serving.child.id());
    assert!(Command::new("sh").args(["-c", &room]).status().unwrap().success());
    let began = Instant::now();
    while !serving.complete(&key, false).unwrap().contains("HTTP/1.1 200") {
        assert!(began.elapsed() < Duration::from_secs(30), "it does not answer again");
        std::thread::sleep(Duration::from_millis(50));
    }
    let row = ernie(["usage", "--by", "key", "--json", "--database", &database]).json()["data"][0].clone();
    // The one that was refused because its usage could not be written was computed.
    let booked = row["requests"].as_u64().unwrap();
    assert!((answered + 1..=answered + 2).contains(&booked), "{booked} in the books, {answered} answered before");
    assert_eq!(row["completion_tokens"].as_u64().unwrap(), booked * 20);
}

/// Every answer that a client has whole is in the books of a server that was killed while it answered others.
#[test]
fn what_was_answered_is_in_the_books_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let database = database(folder.path());
    let (_, key) = create(&database, &["clients"]);
    let (requests, tokens) = (AtomicU64::new(0), AtomicU64::new(0));
    const CLIENTS: u64 = 4;
    let mut begun = 0;
    for round in 0..3 {
        let started = Instant::now();
        let mut serving = Serving::start(&database);
        assert!(round == 0 || started.elapsed() < Duration::from_secs(2), "started again in {:?}", started.elapsed());
        let (serving_now, killed) = (&serving, AtomicU64::new(0));
        let pid = serving_now.child.id();
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (key, requests, tokens, killed) = (&key, &requests, &tokens, &killed);
                scope.spawn(move || {
                    while killed.load(Ordering::SeqCst) == 0 {
                        let Some(answer) = serving_now.complete(key, client % 2 == 0) else { return };
                        let whole = answer.contains("HTTP/1.1 200") && (answer.contains("data: [DONE]") || answer.contains("\"usage\":{"));
                        if whole {
                            assert!(answer.contains("\"completion_tokens\":20"), "{answer}");
                            requests.fetch_add(1, Ordering::SeqCst);
                            tokens.fetch_add(20, Ordering::SeqCst);
                        }
                    }
                });
            }
            let before = requests.load(Ordering::SeqCst);
            while requests.load(Ordering::SeqCst) < before + 12 {
                std::thread::sleep(Duration::from_millis(3));
            }
            let kill = std::process::Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status().unwrap();
            assert!(kill.success());
            killed.store(1, Ordering::SeqCst);
        });
        serving.child.wait().unwrap();
        begun += CLIENTS;
        let row = ernie(["usage", "--by", "key", "--json", "--database", &database]).json()["data"][0].clone();
        let (booked, answered) = (row["requests"].as_u64().unwrap(), requests.load(Ordering::SeqCst));
        // Those that were committed and not yet sent are in the books too: at most one of each client, each time.
        assert!((answered..=answered + begun).contains(&booked), "{booked} in the books, {answered} answered");
        assert!(row["completion_tokens"].as_u64().unwrap() >= tokens.load(Ordering::SeqCst));
        assert_eq!(row["completion_tokens"].as_u64().unwrap(), booked * 20);
        let config = ServeConfig { database: Some(database.clone()), ..ServeConfig::default() };
        let state = with_store(&config, async |store| {
            let Store::Sqlite(pool, _) = store else { panic!("a file was asked for") };
            let (state,): (String,) = sqlx::query_as("PRAGMA integrity_check").fetch_one(pool).await?;
            Ok(state)
        });
        assert_eq!(state.unwrap(), "ok");
    }
}
