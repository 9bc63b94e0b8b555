//! The server's life: listening, accepting, draining, ending.
use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use ernie_checkpoint::end_of_turn_ids;
use ernie_engine::Engine;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::accounts::{self, Accounts};
use crate::config::ServeConfig;
use crate::connection::Timed;
use crate::error::{Error, Result};
use crate::exchange::UnderWay;
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::settings::Settings;
use crate::state::{ServedModel, Shared, State, unix_seconds};
use crate::tls::Certificates;
use crate::worker::Worker;
use crate::{live, routes};

/// After an error of the system while accepting (no more files, say): time for others to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the end waits for usage of requests that were cut off; that of answered ones is written down already.
const FLUSH: Duration = Duration::from_secs(5);

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    certificates: Option<Arc<Certificates>>,
    state: Shared,
    engine: JoinHandle<()>,
}

impl Server {
    /// Starts the engine and listens. Connections wait until [`Server::run`].
    ///
    /// # Errors
    /// A configuration out of range, a certificate that cannot be used, a database that cannot be opened, an address that cannot be had or that others reach without there being keys, an engine that does not take its options, no thread.
    pub async fn bind(config: ServeConfig, served: ServedModel) -> Result<Self> {
        config.validate()?;
        let certificates = match (&config.tls_certificate, &config.tls_key) {
            (Some(certificate), Some(key)) => Some(Arc::new(Certificates::load(certificate, key)?)),
            _ => None,
        };
        let asked = SocketAddr::new(config.host, config.port);
        let listen = |error| Error::Listen { address: asked, error };
        #[cfg(feature = "otel")]
        let traces = crate::otel::Traces::start(&config)?;
        let accounts = Accounts::open(&config).await?;
        if !config.host.is_loopback() && !accounts.has_seen_keys() {
            return Err(Error::NotLoopback { host: config.host });
        }
        let listener = listener(asked).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let ServedModel { name, model, tokenizer, template } = served;
        let (tokenizer, metrics) = (Arc::new(tokenizer), Arc::new(Metrics::new()));
        let engine = Engine::new(Arc::clone(&model), config.engine_options())?;
        let ends: Vec<u32> = model.config().eos_token_id.iter().copied().chain(end_of_turn_ids(&tokenizer)).collect();
        let grammars = Grammars::new(&tokenizer, model.config().vocab_size, &ends)?;
        let max_len = engine.max_len();
        let settings = Settings { dynamic_batching: config.dynamic_batching, max_batch_size: config.max_batch_size };
        let started = Worker::start(engine, settings, Arc::clone(&tokenizer), Arc::clone(&metrics), config.max_queue);
        let (worker, engine) = started.map_err(Error::Start)?;
        let state = Arc::new(State {
            streams: Arc::new(Semaphore::new(config.max_streams)),
            watchers: Arc::new(Semaphore::new(live::MAX_WATCHERS)),
            config,
            name,
            model,
            max_len,
            tokenizer,
            template,
            grammars,
            worker,
            accounts,
            metrics,
            #[cfg(feature = "otel")]
            traces,
            draining: AtomicBool::new(false),
            closing: watch::channel(false).0,
            cutting_off: AtomicBool::new(false),
            started: unix_seconds(),
            random: Default::default(),
        });
        Ok(Server { listener, address, certificates, state, engine })
    }

    /// Who may use it, and what they used.
    pub fn accounts(&self) -> Arc<Accounts> {
        Arc::clone(&self.state.accounts)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown` comes; then no request is taken any more (503), and those under way are finished as far as the configured time allows.
    ///
    /// # Errors
    /// None at present.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let Server { listener, address, certificates, state, engine } = self;
        let mut accepting = Accepting {
            slots: Arc::new(Semaphore::new(connections(state.config.max_connections))),
            router: routes::router(Arc::clone(&state)),
            connections: JoinSet::new(),
            listener,
            certificates,
            state,
        };
        tracing::info!(%address, model = %accepting.state.name, "listening");
        accepting.until(pin!(shutdown)).await;

        // Still accepting, so that who asks is told.
        let state = Arc::clone(&accepting.state);
        let deadline = Instant::now() + Duration::from_secs(state.config.drain_timeout_s);
        state.draining.store(true, Ordering::SeqCst);
        state.worker.close();
        tracing::info!("shutting down: no new requests, finishing those under way");
        let mut finished = tokio::task::spawn_blocking(move || engine.join());
        let stopped = Arc::clone(&state);
        let drained = async {
            tokio::select! {
                _ = &mut finished => {}
                () = sleep_until(deadline) => {
                    stopped.worker.stop();
                    let _ = (&mut finished).await;
                }
            }
        };
        accepting.until(pin!(drained)).await;
        let Accepting { mut connections, listener, .. } = accepting;
        drop(listener);
        state.closing.send_replace(true);
        // What is computed may still have to be read.
        let last = deadline.max(Instant::now() + Duration::from_secs(1));
        if timeout_at(last, async { while connections.join_next().await.is_some() {} }).await.is_err() {
            tracing::warn!(connections = connections.len(), "connections cut off");
            state.cutting_off.store(true, Ordering::SeqCst);
            connections.abort_all();
            while connections.join_next().await.is_some() {}
        }
        // All requests are over, and so all accounts with the writer.
        state.accounts.flush(FLUSH).await;
        // So that the file is whole by itself, without SQLite's log beside it.
        if timeout(FLUSH, state.accounts.store.close()).await.is_err() {
            tracing::warn!("the database was not closed in time");
        }
        #[cfg(feature = "otel")]
        drop(tokio::task::spawn_blocking(move || state.traces.iter().for_each(crate::otel::Traces::flush)).await);
        tracing::info!("stopped");
        Ok(())
    }

    /// Ends the engine before its next step, whatever is under way.
    pub fn stopper(&self) -> impl Fn() + Send + use<> {
        let state = Arc::clone(&self.state);
        move || state.worker.stop()
    }
}

/// Connections that may wait to be accepted: in a burst those beyond are told nothing and try again a second later. The system may allow fewer.
const BACKLOG: u32 = 4096;

fn listener(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server that starts again must not wait for the ends of its last connections.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Files that are open besides connections: the model, the database, the log.
const OTHER_FILES: u64 = 128;

/// How many connections the system lets a process have, if that is fewer than `wanted`: one too many would fail, and hold up all others. Asks for as many as may be asked for.
#[cfg(unix)]
fn connections(wanted: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = wanted as u64 + OTHER_FILES;
    let limit = match current {
        Some(current) if current < needed => {
            let asked = maximum.map_or(needed, |maximum| maximum.min(needed)).max(current);
            // What was stays if that is not allowed.
            if setrlimit(Resource::Nofile, Rlimit { current: Some(asked), maximum }).is_ok() { asked } else { current }
        }
        _ => needed,
    };
    let possible = usize::try_from(limit.saturating_sub(OTHER_FILES)).unwrap_or(wanted).clamp(1, wanted);
    if possible < wanted {
        tracing::warn!(max_connections = wanted, possible, "the system allows fewer open files than connections are configured");
    }
    possible
}

#[cfg(not(unix))]
fn connections(wanted: usize) -> usize {
    wanted
}

/// What accepting takes.
struct Accepting {
    listener: TcpListener,
    certificates: Option<Arc<Certificates>>,
    slots: Arc<Semaphore>,
    router: Router,
    connections: JoinSet<()>,
    state: Shared,
}

impl Accepting {
    /// Accepts connections until `end` comes.
    async fn until(&mut self, mut end: Pin<&mut impl Future<Output = ()>>) {
        loop {
            let next = async {
                let slot = Arc::clone(&self.slots).acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            tokio::select! {
                () = &mut end => return,
                Some(_) = self.connections.join_next(), if !self.connections.is_empty() => {}
                (slot, accepted) = next => match accepted {
                    Ok((stream, _)) => {
                        let certificates = self.certificates.clone();
                        let connection = serve(stream, certificates, self.router.clone(), Arc::clone(&self.state));
                        self.connections.spawn(async move {
                            connection.await;
                            drop(slot);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }
}

/// One connection, until its end or the server's.
async fn serve(stream: TcpStream, certificates: Option<Arc<Certificates>>, router: Router, state: Shared) {
    // Pieces of a stream are small and wanted at once; without the option they only come later.
    let _ = stream.set_nodelay(true);
    let stream = Timed::new(stream, Duration::from_secs(state.config.write_timeout_s));
    let stands_still = stream.stands_still();
    let Some(certificates) = certificates else {
        return serve_http(stream, stands_still, router, state).await;
    };
    // Who has no head of a request after this time has no greeting either.
    let limit = Duration::from_secs(state.config.header_timeout_s);
    let greeted = tokio::select! {
        greeted = timeout(limit, certificates.acceptor().accept(stream)) => greeted,
        () = state.closed() => return,
    };
    match greeted {
        Ok(Ok(stream)) => serve_http(stream, stands_still, router, state).await,
        Ok(Err(error)) => tracing::debug!(%error, "no HTTPS"),
        Err(_) => tracing::debug!("no HTTPS in time"),
    }
}

/// HTTP on a connection. When the server ends, an answer under way is finished, and so are bytes that a reader has not taken yet; a request whose head has not come
/// whole is none.
async fn serve_http<S: AsyncRead + AsyncWrite + Unpin>(stream: S, stands_still: impl Fn() -> bool, router: Router, state: Shared) {
    let under_way = UnderWay::default();
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(under_way.clone());
        router.call(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(state.config.header_timeout_s));
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = state.closed() => {
            connection.as_mut().graceful_shutdown();
            poll_fn(|cx| match connection.as_mut().poll(cx) {
                Poll::Pending if !under_way.is_held() && !stands_still() => Poll::Ready(Ok(())),
                polled => polled,
            })
            .await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// Whether the configured address may be listened on, before a model is loaded for it: any address of this machine, others only with keys. Tells whether there are keys.
///
/// # Errors
/// [`Error::NotLoopback`]; the database cannot be opened.
pub fn check_address(config: &ServeConfig) -> Result<bool> {
    let has_keys = accounts::with_store(config, async |store| store.has_keys().await)?;
    if has_keys || config.host.is_loopback() { Ok(has_keys) } else { Err(Error::NotLoopback { host: config.host }) }
}

/// Runs a server until Ctrl-C, SIGTERM or SIGHUP, in a runtime of its own. `listening` is told where as soon as that is known.
///
/// # Errors
/// As [`Server::bind`]; [`Error::Stopped`] if a second Ctrl-C or SIGTERM came before all was finished.
pub fn serve_until_signal(config: ServeConfig, served: ServedModel, listening: impl FnOnce(SocketAddr)) -> Result<()> {
    // Threads for connections only: they wait most of the time, and the cores are the engine's.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Error::Start)?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let server = Server::bind(config, served).await?;
        listening(server.address());
        let (stop, accounts) = (server.stopper(), server.accounts());
        let (begin, begun) = tokio::sync::oneshot::channel::<()>();
        let run = server.run(async {
            // A sender that is gone means the same.
            let _ = begun.await;
        });
        let mut run = pin!(run);
        tokio::select! {
            ended = &mut run => return ended,
            () = signals.any() => drop(begin),
        }
        tokio::select! {
            ended = &mut run => ended,
            () = signals.insistent() => {
                stop();
                accounts.flush(Duration::from_secs(1)).await;
                Err(Error::Stopped)
            }
        }
    });
    runtime.shutdown_background();
    outcome
}

/// Ctrl-C and SIGTERM, and SIGHUP: a terminal that is closed.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    hangup: Option<tokio::signal::unix::Signal>,
}

impl Signals {
    fn new() -> Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let of = |kind| signal(kind).map_err(Error::Start);
            // Who started it with `nohup` wants it to go on.
            let hangup = if ignores_hangup() { None } else { Some(of(SignalKind::hangup())?) };
            Ok(Signals { terminate: of(SignalKind::terminate())?, interrupt: of(SignalKind::interrupt())?, hangup })
        }
        #[cfg(not(unix))]
        Ok(Signals {})
    }

    /// The next of all three.
    async fn any(&mut self) {
        #[cfg(unix)]
        if let Some(hangup) = &mut self.hangup {
            tokio::select! {
                _ = hangup.recv() => {}
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
            }
            return;
        }
        self.insistent().await;
    }

    /// The next but for SIGHUP, which comes more than once when a terminal is closed, and behind SIGTERM from some service managers.
    async fn insistent(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            // Without signals it runs until it is killed.
            std::future::pending::<()>().await;
        }
    }
}

/// Whether this process was started with SIGHUP ignored; where the system does not say, it was not.
#[cfg(unix)]
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    // The first bit is signal 1.
    ignored.is_some_and(|signals| signals & 1 == 1)
}

/// The address as it stands in a URL.
pub fn url(scheme: &str, address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) => format!("{scheme}://{ip}:{}", address.port()),
        IpAddr::V6(ip) => format!("{scheme}://[{ip}]:{}", address.port()),
    }
}
