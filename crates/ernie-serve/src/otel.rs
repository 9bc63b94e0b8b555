//! Traces: one span for each request, to an OpenTelemetry collector over HTTP. Never what clients write or the model answers.
//!
//! Names of attributes are those of OpenTelemetry's semantic conventions for HTTP servers and for generative AI. Spans wait in a queue of the SDK's, whose own thread
//! sends them; when that is full because the collector is away, they are lost and nobody waits.
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use axum::extract::Request;
use axum::http::{Method, header};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, Tracer, TracerProvider};
use opentelemetry::{Array, Context, Key, KeyValue, StringValue, Value};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use crate::config::ServeConfig;
use crate::error::{Error, Result};
use crate::exchange::{Asked, Inference, Outcome};

/// How long the collector may take for a batch.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end waits for the last spans.
const FLUSH: Duration = Duration::from_secs(3);
/// Largest answer of a collector that is read.
const MAX_ANSWER: u64 = 1 << 20;
/// Where collectors take traces.
const PATH: &str = "/v1/traces";

/// The way to the collector.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    scheme: &'static str,
}

impl Traces {
    /// To the configured collector; `None` if there is none.
    ///
    /// # Errors
    /// The variables of the SDK (`OTEL_…`) ask for what is not there.
    pub fn start(config: &ServeConfig) -> Result<Option<Self>> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
        let endpoint = endpoint.trim_end_matches('/');
        let endpoint = if endpoint.ends_with(PATH) { endpoint.to_owned() } else { format!("{endpoint}{PATH}") };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client::new())
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint)
            .with_timeout(TIMEOUT)
            .build()
            .map_err(|error| Error::Config { origin: "otlp_endpoint".to_owned(), reason: error.to_string() })?;
        let detected = Resource::builder().build();
        let unnamed = detected.get(&Key::from_static_str("service.name")).is_none_or(|name| name.as_str().starts_with("unknown_service"));
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let resource = Resource::builder().with_attribute(version);
        let resource = if unnamed { resource.with_service_name("ernie-serve") } else { resource };
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
        let tracer = provider.tracer("ernie-serve");
        Ok(Some(Traces { provider, tracer, scheme: config.scheme() }))
    }

    /// The span of a request begins, under the caller's if it names one (`traceparent`).
    pub fn begin(&self, request: &Request) -> Pending {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(request.headers()));
        let text = |name| Some(request.headers().get(name)?.to_str().ok()?.to_owned());
        Pending {
            tracer: self.tracer.clone(),
            parent,
            began: SystemTime::now(),
            scheme: self.scheme,
            path: request.uri().path().to_owned(),
            user_agent: text(header::USER_AGENT),
        }
    }

    /// Sends what is left, for a moment at most. Blocks.
    pub fn flush(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// The span of a request that is under way.
#[derive(Debug)]
pub struct Pending {
    tracer: SdkTracer,
    parent: Context,
    began: SystemTime,
    scheme: &'static str,
    path: String,
    user_agent: Option<String>,
}

impl Pending {
    /// It is over.
    pub fn end(self, asked: &Asked, status: u16, outcome: Outcome, inference: Option<&Inference>) {
        let Pending { tracer, parent, began, scheme, path, user_agent } = self;
        let Asked { id, method, route } = asked;
        let known = matches!(
            *method,
            Method::GET
                | Method::HEAD
                | Method::POST
                | Method::PUT
                | Method::PATCH
                | Method::DELETE
                | Method::OPTIONS
                | Method::CONNECT
                | Method::TRACE
        );
        let mut attributes = vec![
            KeyValue::new("http.request.method", if known { method.to_string() } else { "_OTHER".to_owned() }),
            KeyValue::new("http.response.status_code", i64::from(status)),
            KeyValue::new("url.scheme", scheme),
            KeyValue::new("url.path", path),
            KeyValue::new("http.response.header.x-request-id", strings([id.0.clone()])),
        ];
        let matched = route.starts_with('/');
        attributes.extend(matched.then(|| KeyValue::new("http.route", route.clone())));
        attributes.extend(user_agent.map(|agent| KeyValue::new("user_agent.original", agent)));
        let error = match outcome {
            Outcome::Finished => None,
            Outcome::ClientLeft => Some("client_left".to_owned()),
            Outcome::Failed if status >= 500 => Some(status.to_string()),
            Outcome::Failed => Some("failed".to_owned()),
        };
        attributes.extend(error.map(|error| KeyValue::new("error.type", error)));
        if let Some(Inference { operation, model, prompt_tokens, completion_tokens, finish_reasons, first_token, .. }) = inference {
            let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
            attributes.extend([
                KeyValue::new("gen_ai.operation.name", *operation),
                KeyValue::new("gen_ai.provider.name", "ernie"),
                KeyValue::new("gen_ai.request.model", model.clone()),
                KeyValue::new("gen_ai.response.model", model.clone()),
                KeyValue::new("gen_ai.usage.input_tokens", number(*prompt_tokens)),
                KeyValue::new("gen_ai.usage.output_tokens", number(*completion_tokens)),
            ]);
            if !finish_reasons.is_empty() {
                attributes.push(KeyValue::new("gen_ai.response.finish_reasons", strings(finish_reasons.iter().copied())));
            }
            attributes.extend(first_token.map(|time| KeyValue::new("gen_ai.response.time_to_first_chunk", time.as_secs_f64())));
        }
        let method = if known { method.as_str() } else { "HTTP" };
        let name = if matched { format!("{method} {route}") } else { method.to_owned() };
        let mut span = tracer
            .span_builder(name)
            .with_kind(SpanKind::Server)
            .with_start_time(began)
            .with_attributes(attributes)
            .start_with_context(&tracer, &parent);
        // What a client did is no error of the server's.
        if outcome == Outcome::Failed {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

fn strings<T: Into<StringValue>>(texts: impl IntoIterator<Item = T>) -> Value {
    Value::Array(Array::String(texts.into_iter().map(Into::into).collect()))
}

/// A plain client that blocks, for the thread that the SDK has for sending.
#[derive(Debug)]
struct Client {
    agent: ureq::Agent,
    /// Whether the last batch was lost: the log says when that begins and when it is over.
    away: AtomicBool,
}

impl Client {
    fn new() -> Self {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).proxy(None).build();
        Client { agent: agent.into(), away: AtomicBool::new(false) }
    }

    fn send(&self, request: axum::http::Request<Bytes>) -> std::result::Result<Response<Bytes>, ureq::Error> {
        let (head, body) = self.agent.run(request.map(|body| body.to_vec()))?.into_parts();
        let body = body.into_with_config().limit(MAX_ANSWER).reader();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut { body }, &mut bytes)?;
        Ok(Response::from_parts(head, bytes.into()))
    }
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: axum::http::Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = std::result::Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
    {
        Box::pin(async move {
            let sent = self.send(request);
            let problem = match &sent {
                Ok(response) if response.status().is_success() => None,
                Ok(response) => Some(response.status().to_string()),
                Err(error) => Some(error.to_string()),
            };
            match (problem, self.away.load(Ordering::Relaxed)) {
                (Some(problem), false) => tracing::warn!(problem, "the collector does not take traces"),
                (None, true) => tracing::info!("the collector takes traces again"),
                _ => {}
            }
            let lost = !sent.as_ref().is_ok_and(|response| response.status().is_success());
            self.away.store(lost, Ordering::Relaxed);
            Ok(sent?)
        })
    }
}
