//! The API that every bot serves: status, health, metrics, a stream of changes; and the limits around all routes.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::{MethodRouter, get},
};
use futures_util::{Stream, StreamExt};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use subtle::ConstantTimeEq;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;

use super::{
    config::RestApi,
    http,
    metrics::Metrics,
    places::{Answering, Places},
    runtime::Exit,
    status::{Status, StatusHub},
};

/// The largest request body. Webhooks are the largest that we take, and GitHub cuts its own at 25 MiB; ours are small.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Connections at once. Checks, scrapes and peers are few; what is more is a mistake or an attack.
const CONNECTIONS_MAX: usize = 256;
/// The largest head of a request. Checks and webhooks have a few hundred bytes, the largest proxies add a few thousand.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// How long a client may take to send its headers.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a request may take from its headers to those of the answer.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// How long open connections may take to finish when the bot ends.
const STOP_DEADLINE: Duration = Duration::from_secs(1);
/// At most one event of the stream in this time: a burst of steps is one change to a reader.
const STREAM_PAUSE: Duration = Duration::from_millis(50);

/// The bound socket with the guard in front of it.
pub struct Api {
    listener: TcpListener,
    guard: Arc<Guard>,
}

/// A server at work.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// Tells endless answers that the server stops.
#[derive(Clone)]
struct Stopping(CancellationToken);

/// Who may use verbs that change something.
enum Guard {
    /// Whoever reaches us: only this machine can.
    Loopback,
    /// Nobody: others can reach us, and there is no password.
    Refuse,
    /// Who knows the password; the whole `Authorization` header as it must be.
    Basic(String),
}

impl Api {
    /// Binds the configured address.
    ///
    /// # Errors
    /// Code 4 if the port is in use, 2 if the address is not ours or a password cannot be read.
    pub async fn bind(config: &RestApi) -> Result<Self, Exit> {
        let guard = match &config.authentication {
            Some(credentials) => {
                let secret = credentials.secret("restapi.authentication").map_err(Exit::usage)?;
                Guard::Basic(http::basic_authorization(&credentials.username, &secret))
            }
            None if config.listen.ip().is_loopback() => Guard::Loopback,
            None => {
                tracing::warn!(
                    listen = %config.listen,
                    "restapi.authentication is missing and the API can be reached from other machines: \
                     requests that change something will be refused"
                );
                Guard::Refuse
            }
        };
        let listener = listen("restapi.listen", config.listen).await?;
        Ok(Self { listener, guard: Arc::new(guard) })
    }

    /// Begins to serve `common` and `routes` behind the guard, and `self_authenticated` without it. A path that is in both
    /// `common` and `routes` is that of `routes`.
    #[must_use]
    pub fn serve(self, common: Router, routes: Router, self_authenticated: Router) -> Server {
        let guard = middleware::from_fn_with_state(Arc::clone(&self.guard), check_credentials);
        // A path that nobody has needs no password to be not found.
        let routes = if routes.has_routes() { routes.route_layer(guard.clone()) } else { routes };
        let guarded = routes.fallback_service(common.route_layer(guard));
        Server::begin(self.listener, guarded.merge(self_authenticated))
    }
}

/// Listens at an address; `field` is where it stands in the configuration.
///
/// # Errors
/// Code 4 if the port is in use, 2 if the address is not ours.
pub async fn listen(field: &str, address: SocketAddr) -> Result<TcpListener, Exit> {
    TcpListener::bind(address).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            Exit::missing(format!("{field}: {address} is in use: stop the program that has it or choose another port"))
        }
        _ => Exit::usage(format!("{field}: cannot listen on {address}: {e}")),
    })
}

/// Begins to serve strangers, apart from the API: `self_authenticated`, and whether the process lives. Nothing else of it is
/// told there.
#[must_use]
pub fn serve_strangers(listener: TcpListener, self_authenticated: Router, hubs: Vec<StatusHub>) -> Server {
    let alive = move |State(hubs): State<Arc<[StatusHub]>>| async move {
        if hubs.iter().all(|hub| hub.health().alive) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
    };
    let liveness = Router::new().route("/liveness", get(alive).options(alive)).with_state(Arc::from(hubs));
    Server::begin(listener, liveness.merge(self_authenticated))
}

impl Server {
    /// Serves within the limits of the API.
    fn begin(listener: TcpListener, routes: Router) -> Self {
        let stop = CancellationToken::new();
        let all = routes
            .layer(middleware::from_fn(limit_time))
            .layer(Extension(Stopping(stop.clone())))
            .layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
        let address = listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        let task = tokio::spawn(accept(listener, all, stop.clone()));
        Self { address, stop, task }
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more connections and lets the open ones finish, for a moment.
    pub async fn stop(self) {
        self.stop.cancel();
        let _panicked = self.task.await;
    }
}

/// The routes that every bot has.
pub fn router(hub: &StatusHub, metrics: &Metrics) -> Router {
    let metrics = metrics.clone();
    Router::new()
        .route("/status", get(|State(hub): State<StatusHub>| async move { Json(hub.status()) }))
        .route("/health", check(|hub| hub.health().healthy))
        .route("/liveness", check(|hub| hub.health().alive))
        .route("/readiness", check(|hub| hub.health().ready))
        .route("/events", get(changes))
        .route("/metrics", get(|| async move { ([(header::CONTENT_TYPE, OPENMETRICS)], metrics.text()) }))
        .with_state(hub.clone())
}

/// The routes at the top where several bots share the API: each of them has those of [`router`] below a path of its own.
pub fn overview(hubs: Vec<StatusHub>, metrics: &Metrics) -> Router {
    let metrics = metrics.clone();
    let all = |holds: fn(&StatusHub) -> bool| {
        get(move |State(hubs): State<Arc<[StatusHub]>>| async move {
            let good = hubs.iter().all(holds);
            (if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, statuses(&hubs))
        })
    };
    Router::new()
        .route("/status", get(|State(hubs): State<Arc<[StatusHub]>>| async move { statuses(&hubs) }))
        .route("/health", all(|hub| hub.health().healthy))
        .route("/liveness", all(|hub| hub.health().alive))
        .route("/readiness", all(|hub| hub.health().ready))
        .route("/metrics", get(|| async move { ([(header::CONTENT_TYPE, OPENMETRICS)], metrics.text()) }))
        .with_state(Arc::from(hubs))
}

fn statuses(hubs: &[StatusHub]) -> Json<serde_json::Value> {
    Json(serde_json::json!({ "sites": hubs.iter().map(StatusHub::status).collect::<Vec<_>>() }))
}

fn check(holds: fn(&StatusHub) -> bool) -> MethodRouter<StatusHub> {
    let asked = move |State(hub): State<StatusHub>| async move { answer(&hub, holds(&hub)) };
    get(asked).options(asked)
}

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// 200 or 503, with the status as the body.
#[must_use]
pub fn answer(hub: &StatusHub, good: bool) -> Response {
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json::<Status>(hub.status())).into_response()
}

/// The state now, and again after every change, as server-sent events called `state`, until the bot ends.
async fn changes(
    State(hub): State<StatusHub>,
    Extension(Stopping(stop)): Extension<Stopping>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let stream = WatchStream::new(hub.subscribe()).then(move |_steps| {
        let hub = hub.clone();
        async move {
            tokio::time::sleep(STREAM_PAUSE).await;
            let data = serde_json::to_string(&hub.status()).unwrap_or_default();
            Ok(Event::default().event("state").data(data))
        }
    });
    Sse::new(stream.take_until(stop.cancelled_owned())).keep_alive(KeepAlive::default())
}

async fn check_credentials(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let given = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], |v| v.as_bytes());
    match guard.as_ref() {
        _ if safe => next.run(request).await,
        // Browsers say so of whatever a page sends, and nobody else does: the page of a stranger must not use the operator's machine
        // or password.
        _ if request.headers().contains_key(header::ORIGIN) => {
            (StatusCode::FORBIDDEN, "refused: a web page has sent this (it has an Origin header)\n").into_response()
        }
        Guard::Loopback => next.run(request).await,
        Guard::Basic(wanted) if bool::from(wanted.as_bytes().ct_eq(given)) => next.run(request).await,
        Guard::Basic(_) => {
            let ask = [(header::WWW_AUTHENTICATE, "Basic realm=\"bots\"")];
            (StatusCode::UNAUTHORIZED, ask, "a user name and a password are needed\n").into_response()
        }
        Guard::Refuse => {
            let why = "refused: set restapi.authentication, or listen on 127.0.0.1 only\n";
            (StatusCode::FORBIDDEN, why).into_response()
        }
    }
}

async fn limit_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_DEADLINE, next.run(request)).await {
        Ok(response) => response,
        Err(_elapsed) => (StatusCode::SERVICE_UNAVAILABLE, "the request took too long\n").into_response(),
    }
}

async fn accept(listener: TcpListener, router: Router, stop: CancellationToken) {
    let graceful = GracefulShutdown::new();
    let places = Places::new(CONNECTIONS_MAX);
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _peer)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        // Dropped if everybody is busy: the client sees its connection closed.
        let Some(place) = places.take() else { continue };
        let connection = graceful.watch(connection(stream, place.answering(router.clone())));
        tokio::spawn(async move {
            tokio::select! {
                // A client that breaks off is its own business.
                _broken = connection => {}
                () = place.wanted() => {}
            }
        });
    }
    let _elapsed = tokio::time::timeout(STOP_DEADLINE, graceful.shutdown()).await;
}

fn connection(
    stream: TcpStream,
    answering: Answering,
) -> hyper::server::conn::http1::Connection<TokioIo<TcpStream>, Answering> {
    let _best_effort = stream.set_nodelay(true);
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), answering)
}
