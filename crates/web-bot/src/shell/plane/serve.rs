//! Requests: follow the route, mark every answer with commit and name.

use std::sync::{Arc, atomic::Ordering};

use bots_core::shell::Metrics;
use bytes::Bytes;
use hyper::{
    Request, Response, StatusCode, Version,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

use super::{
    Backend, InFlight, Shared, Site, Target,
    answer::Answer,
    site,
    workers::{Client, HEAD_BYTES_MAX, Worker},
};

/// Says which commit an answer is from.
pub(super) const REVISION_HEADER: HeaderName = HeaderName::from_static("x-bots-revision");

/// Says which bot has answered.
pub(super) const NAME_HEADER: HeaderName = HeaderName::from_static("x-bots-name");

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    class: u16,
}

/// What is counted for Prometheus.
pub(super) struct Counters {
    /// By the hundreds of the status.
    answers: [Counter; 5],
    pub(super) connections: Gauge,
}

impl Counters {
    pub(super) fn register(metrics: &Metrics) -> Self {
        let answers = Family::<Class, Counter>::default();
        let of = |class| answers.get_or_create(&Class { class }).clone();
        let counters = Self { answers: [of(100), of(200), of(300), of(400), of(500)], connections: Gauge::default() };
        metrics.with(|registry| {
            registry.register("web_answers", "Answers sent, by the hundreds of their status", answers);
            registry.register("web_connections", "Open connections of clients", counters.connections.clone());
        });
        counters
    }

    pub(super) fn count(&self, status: StatusCode) {
        if let Some(counter) = self.answers.get(usize::from(status.as_u16() / 100).wrapping_sub(1)) {
            counter.inc();
        }
    }
}

/// What a request has begun with.
pub(super) enum Entered {
    Refused { state: String },
    Site { site: Arc<Site>, closing: bool },
    App { backend: Arc<Backend>, closing: bool, at_app: InFlight },
}

impl Worker {
    /// Answers one request.
    pub(super) async fn answer(self: Arc<Self>, request: Request<Incoming>, client: Client) -> Response<Answer> {
        let line = self.shared.log.as_ref().map(|log| log.begin(&request, client, &self.shared.trusted));
        let mut answer = match head_bytes(&request) {
            bytes if bytes > HEAD_BYTES_MAX => head_too_large(),
            _fits => self.route(request, client).await,
        };
        self.shared.counters.count(answer.status());
        let commit = answer.headers().get(REVISION_HEADER).and_then(|commit| commit.to_str().ok());
        if let Some(commit) = commit.filter(|_| answer.status().is_server_error()) {
            self.shared.meter.failed(commit);
        }
        if let Some(mut line) = line {
            line.status = answer.status().as_u16();
            if let Some(commit) = commit {
                commit.clone_into(&mut line.commit);
            }
            answer.body_mut().log(line);
        }
        answer
    }

    async fn route(&self, request: Request<Incoming>, client: Client) -> Response<Answer> {
        let (entered, in_flight) = {
            let target = self.shared.route.borrow();
            if let Target::Refuse { state } = &*target {
                return self.refuse(state, request.version());
            }
            // In flight before the route is left: who waits for the end of all requests misses none.
            let in_flight = self.shared.meter.begin();
            (follow(&target), in_flight)
        };
        let entered = match entered {
            Some(entered) => entered,
            // On the heap, like the way to the app: a request for a file is not to carry their room along.
            None => Box::pin(self.enter()).await,
        };
        match entered {
            Entered::Refused { state } => self.refuse(&state, request.version()),
            Entered::Site { site, closing } => {
                let answer = site.answer(request.method(), request.uri(), request.headers());
                let answer = answer.map(|content| Answer::content(content, in_flight));
                close(answer, closing, request.version())
            }
            Entered::App { backend, closing, at_app } => {
                Box::pin(self.forward(request, client, in_flight, (backend, closing, at_app))).await
            }
        }
    }

    /// Follows the route, waiting while it says so.
    pub(super) async fn enter(&self) -> Entered {
        let waking = || Entered::Refused { state: String::from("waking") };
        let (hold, held) = (self.shared.hold, Held::begin(&self.shared));
        if held.others >= hold.requests_max {
            return waking();
        }
        let mut route = self.shared.route.subscribe();
        let waited = tokio::time::timeout(hold.timeout, route.wait_for(|target| !matches!(target, Target::Hold))).await;
        match waited {
            // The lock of the route is held: when a new one is set, whoever follows the old one is counted already.
            Ok(Ok(target)) => follow(&target).unwrap_or_else(waking),
            Ok(Err(_)) | Err(_) => waking(),
        }
    }

    /// 503: not here, not now.
    pub(super) fn refuse(&self, state: &str, version: Version) -> Response<Answer> {
        let name = &self.shared.name;
        let body = serde_json::json!({
            "name": String::from_utf8_lossy(name.as_bytes()),
            "state": state,
            "message": "this bot does not serve at the moment: ask another, or try again soon",
        });
        let mut answer = Response::new(Answer::memory(Bytes::from(format!("{body}\n")), None));
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(NAME_HEADER, name.clone());
        close(answer, state == "draining" || state == "stopping", version)
    }

    /// Says which commit an answer of the app is from, and who passed it on; asks for the connection's end if we leave.
    pub(super) fn mark(
        &self,
        mut answer: Response<Answer>,
        sha: &str,
        closing: bool,
        version: Version,
    ) -> Response<Answer> {
        let headers = answer.headers_mut();
        headers.insert(REVISION_HEADER, HeaderValue::from_str(sha).unwrap_or(HeaderValue::from_static("unknown")));
        headers.insert(NAME_HEADER, self.shared.name.clone());
        close(answer, closing, version)
    }

    /// A short answer about trouble with the app.
    pub(super) fn trouble(&self, status: StatusCode, text: &'static str, in_flight: InFlight) -> Response<Answer> {
        let mut answer = site::plain(status, text).map(|body| Answer::memory(body, Some(in_flight)));
        answer.headers_mut().insert(NAME_HEADER, self.shared.name.clone());
        answer
    }
}

/// A request that waits, counted.
struct Held<'s> {
    shared: &'s Shared,
    /// How many waited before it.
    others: usize,
}

impl<'s> Held<'s> {
    fn begin(shared: &'s Shared) -> Self {
        Self { shared, others: shared.held.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.shared.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a target leads; nothing if one has to wait there.
fn follow(target: &Target) -> Option<Entered> {
    match target {
        Target::Refuse { state } => Some(Entered::Refused { state: state.clone() }),
        Target::Static { site, closing } => Some(Entered::Site { site: Arc::clone(site), closing: *closing }),
        Target::App { backend, closing } => {
            let at_app = backend.meter.begin();
            Some(Entered::App { backend: Arc::clone(backend), closing: *closing, at_app })
        }
        Target::Hold => None,
    }
}

/// Asks for the end of the connection. HTTP/2 has another way of saying so, when the connection is closed.
fn close(mut answer: Response<Answer>, closing: bool, version: Version) -> Response<Answer> {
    if closing && version <= Version::HTTP_11 {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// The length of a request's head, about as it was on the wire.
fn head_bytes(request: &Request<Incoming>) -> usize {
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    let line = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + ": \r\n".len();
    path + request.headers().iter().map(line).sum::<usize>()
}

fn head_too_large() -> Response<Answer> {
    let text = Bytes::from_static(b"the head of the request is too large\n");
    let mut answer = Response::new(Answer::memory(text, None));
    *answer.status_mut() = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    answer
}
