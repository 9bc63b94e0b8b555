//! A server on a free port and a plain HTTP client for it.
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::thread::JoinHandle;

use ernie_checkpoint::{ChatTemplate, Tokenizer};
use ernie_serve::{ServeConfig, ServedModel, Server, url};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::nano;

/// A server of its own, which ends with the test.
pub struct Running {
    pub address: SocketAddr,
    agent: ureq::Agent,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A status with a body.
pub struct Reply {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The values of a stream, which ends with `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let data: Vec<&str> = self.text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
        let (last, events) = data.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Checks status and shape of an error; returns its parameter and its message.
    pub fn error(&self, status: u16) -> (Option<String>, String) {
        assert_eq!(self.status, status, "{}", self.text);
        let json = self.json();
        let error = json["error"].as_object().unwrap();
        let mut keys: Vec<_> = error.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"], "{json}");
        (error["param"].as_str().map(str::to_owned), error["message"].as_str().unwrap().to_owned())
    }
}

impl Running {
    /// With the default configuration on a free port.
    pub fn start() -> Self {
        Self::with(ServeConfig::default())
    }

    /// With another one.
    pub fn with(config: ServeConfig) -> Self {
        Self::with_template(config, ChatTemplate::builtin())
    }

    /// With another template too.
    pub fn with_template(config: ServeConfig, template: ChatTemplate) -> Self {
        // Accounts of its own; those of a user are none of a test's business.
        let database = config.database.clone().or_else(|| Some("sqlite::memory:".to_owned()));
        let config = ServeConfig { port: 0, cache_mib: 64, database, ..config };
        let served = ServedModel { template, ..Self::served() };
        let (shutdown, asked) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let server = Server::bind(config, served).await.unwrap();
                tell.send(server.address()).unwrap();
                server.run(async { drop(asked.await) }).await.unwrap();
            });
        });
        let agent =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(std::time::Duration::from_secs(100))).build();
        Running { address: told.recv().unwrap(), agent: agent.into(), shutdown: Some(shutdown), thread: Some(thread) }
    }

    fn served() -> ServedModel {
        ServedModel {
            name: "nano".to_owned(),
            model: nano::model(),
            tokenizer: Tokenizer::from_dir(nano::folder()).unwrap(),
            template: ChatTemplate::builtin(),
        }
    }

    /// Why a server does not start.
    pub fn refused(config: ServeConfig) -> ernie_serve::Error {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Server::bind(ServeConfig { port: 0, ..config }, Self::served())).unwrap_err()
    }

    fn reply(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Reply {
        let mut response = response.unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        Reply { status: response.status().as_u16(), headers: response.headers().clone(), text }
    }

    pub fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask("POST", path, Some(body))
    }

    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.as_key(None).ask(method, path, body)
    }

    /// As the owner of a key, or of none.
    pub fn as_key(&self, key: Option<&str>) -> Client<'_> {
        Client { server: self, headers: key.map(|key| ("authorization".to_owned(), format!("Bearer {key}"))).into_iter().collect() }
    }

    pub fn with_key(&self, key: &str) -> Client<'_> {
        self.as_key(Some(key))
    }

    /// With a header.
    pub fn header(&self, name: &str, value: &str) -> Client<'_> {
        self.as_key(None).header(name, value)
    }

    /// With a header more.
    pub fn get_with(&self, path: &str, name: &str, value: &str) -> Reply {
        Self::reply(self.agent.get(url("http", self.address) + path).header(name, value).call())
    }

    pub fn head(&self, path: &str) -> Reply {
        Self::reply(self.agent.head(url("http", self.address) + path).call())
    }

    pub fn patch(&self, path: &str, body: &Value) -> Reply {
        Self::reply(self.agent.patch(url("http", self.address) + path).send_json(body))
    }

    /// The first so many values of a stream that does not end.
    pub fn first_events(&self, path: &str, count: usize) -> Vec<Value> {
        let response = self.agent.get(url("http", self.address) + path).call().unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let lines = BufReader::new(response.into_body().into_reader()).lines();
        let data = lines.filter_map(|line| Some(line.unwrap().strip_prefix("data: ")?.to_owned()));
        data.take(count).map(|data| serde_json::from_str(&data).unwrap()).collect()
    }

    /// A body as it is.
    pub fn post_bytes(&self, path: &str, kind: &str, body: &[u8]) -> Reply {
        Self::reply(self.agent.post(url("http", self.address) + path).content_type(kind).send(body))
    }

    /// A metric's value, by its whole name with labels.
    pub fn metric(&self, name: &str) -> f64 {
        self.as_key(None).metric(name)
    }

    /// Begins the shutdown and does not wait for it.
    pub fn shut_down(&mut self) {
        drop(self.shutdown.take());
    }

    /// Whether the server has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// Requests with some headers.
#[derive(Clone)]
pub struct Client<'a> {
    server: &'a Running,
    headers: Vec<(String, String)>,
}

impl Client<'_> {
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask("POST", path, Some(body))
    }

    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        let mut request = ureq::http::Request::builder().method(method).uri(url("http", self.server.address) + path);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        // A stream that does not end: its head.
        if path == "/v1/live" && body.is_none() {
            let response = self.server.agent.run(request.body(()).unwrap()).unwrap();
            if response.status() == 200 {
                return Reply { status: 200, headers: response.headers().clone(), text: String::new() };
            }
            return Running::reply(Ok(response));
        }
        Running::reply(match body {
            None => self.server.agent.run(request.body(()).unwrap()),
            Some(body) => {
                self.server.agent.run(request.header("content-type", "application/json").body(body.to_string().into_bytes()).unwrap())
            }
        })
    }

    pub fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").text;
        page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap_or(0.0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shut_down();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_none_or(|ended| ended.is_ok()));
    }
}
