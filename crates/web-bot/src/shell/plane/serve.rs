//! Connections and requests: accept within limits, follow the route, mark every answer with commit and name.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, PoisonError},
    time::Duration,
};

use bots_core::shell::Metrics;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use super::{Backend, InFlight, Shared, Site, Target, answer::Answer, site};

/// Connections at once. Each costs a few kilobytes; more clients than this belong behind a proxy.
const CONNECTIONS_MAX: usize = 8_192;

/// How long a client may take to send the head of its next request, on a new connection and on a kept one.
const HEAD_DEADLINE: Duration = Duration::from_secs(60);

/// How long a request waits for an app that is about to be there.
const HOLD_MAX: Duration = Duration::from_secs(10);

/// Says which commit an answer is from.
pub(super) const REVISION_HEADER: HeaderName = HeaderName::from_static("x-bots-revision");

/// Says which bot has answered.
const NAME_HEADER: HeaderName = HeaderName::from_static("x-bots-name");

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    class: u16,
}

/// What is counted for Prometheus.
pub(super) struct Counters {
    answers: Family<Class, Counter>,
    connections: Gauge,
}

impl Counters {
    pub(super) fn register(metrics: &Metrics) -> Self {
        let counters = Self { answers: Family::default(), connections: Gauge::default() };
        metrics.with(|registry| {
            registry.register("web_answers", "Answers sent, by the hundreds of their status", counters.answers.clone());
            registry.register("web_connections", "Open connections of clients", counters.connections.clone());
        });
        counters
    }
}

/// What a request has begun with.
pub(super) enum Entered {
    Refused { state: String },
    Site { site: Arc<Site>, closing: bool },
    App { backend: Arc<Backend>, closing: bool, at_app: InFlight },
}

/// Takes connections until the runtime ends.
pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, peer)) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    connection(stream, peer, shared).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    let _best_effort = stream.set_nodelay(true);
    shared.counters.connections.inc();
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(shared.answer(request, peer).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), service);
    let watched = shared.connections.lock().unwrap_or_else(PoisonError::into_inner).watch(connection);
    // A client that breaks off is its own business.
    let _broken = watched.await;
    shared.counters.connections.dec();
}

impl Shared {
    async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: SocketAddr) -> Response<Answer> {
        let mut answer = self.route(request, peer).await;
        answer.headers_mut().insert(NAME_HEADER, self.name.clone());
        self.counters.answers.get_or_create(&Class { class: answer.status().as_u16() / 100 * 100 }).inc();
        answer
    }

    async fn route(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Answer> {
        let refused = match &*self.route.borrow() {
            Target::Refuse { state } => Some(state.clone()),
            Target::Hold | Target::Static { .. } | Target::App { .. } => None,
        };
        if let Some(state) = refused {
            return self.refuse(&state);
        }
        // In flight before the route is followed: who waits for the end of all requests misses none.
        let in_flight = self.meter.begin();
        match self.enter().await {
            Entered::Refused { state } => self.refuse(&state),
            Entered::Site { site, closing } => {
                let answer = site.answer(request.method(), request.uri().path(), request.headers());
                mark(answer.map(|body| Answer::memory(body, Some(in_flight))), site.sha(), closing)
            }
            Entered::App { backend, closing, at_app } => {
                self.forward(request, peer, in_flight, (backend, closing, at_app)).await
            }
        }
    }

    /// Follows the route, waiting while it says so.
    pub(super) async fn enter(&self) -> Entered {
        let mut route = self.route.subscribe();
        let waited = tokio::time::timeout(HOLD_MAX, route.wait_for(|target| !matches!(target, Target::Hold))).await;
        match waited {
            // The lock of the route is held: when a new one is set, whoever follows the old one is counted already.
            Ok(Ok(target)) => match &*target {
                Target::Refuse { state } => Entered::Refused { state: state.clone() },
                Target::Static { site, closing } => Entered::Site { site: Arc::clone(site), closing: *closing },
                Target::App { backend, closing } => {
                    let at_app = backend.meter.begin();
                    Entered::App { backend: Arc::clone(backend), closing: *closing, at_app }
                }
                Target::Hold => Entered::Refused { state: String::from("waking") },
            },
            Ok(Err(_)) | Err(_) => Entered::Refused { state: String::from("waking") },
        }
    }

    /// 503: not here, not now.
    pub(super) fn refuse(&self, state: &str) -> Response<Answer> {
        let name = String::from_utf8_lossy(self.name.as_bytes());
        let body = serde_json::json!({
            "name": name,
            "state": state,
            "message": "this bot does not serve at the moment: ask another, or try again soon",
        });
        let mut answer = Response::new(Answer::memory(Full::from(Bytes::from(format!("{body}\n"))), None));
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if state == "draining" || state == "stopping" {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

/// Says which commit an answer is from, and asks for the connection's end if we are leaving.
pub(super) fn mark(mut answer: Response<Answer>, sha: &str, closing: bool) -> Response<Answer> {
    let headers = answer.headers_mut();
    headers.insert(REVISION_HEADER, HeaderValue::from_str(sha).unwrap_or(HeaderValue::from_static("unknown")));
    if closing {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// A short answer about trouble with the app.
pub(super) fn trouble(status: StatusCode, text: &'static str, in_flight: InFlight) -> Response<Answer> {
    site::plain(status, text).map(|body| Answer::memory(body, Some(in_flight)))
}
