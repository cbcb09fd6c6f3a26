//! The way to the app: streams bodies both ways, strips what belongs to one connection only, says who asked, and tries
//! again what is safe to try again.

use std::{pin::pin, sync::Arc, time::Duration};

use bots_core::shell::{Clock, Networks};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    body::{Body, Incoming},
    header::{self, HeaderName, HeaderValue},
    http::{request::Parts, uri::PathAndQuery},
    upgrade::OnUpgrade,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};

use super::{
    Backend, InFlight, Shared,
    answer::Answer,
    serve::Entered,
    upload::{Awaited, BrokenOff, Progress, Upload},
    workers::{Client as Asker, Place, Worker},
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type RequestBody = UnsyncBoxBody<Bytes, BoxError>;

/// The app is on this machine: a connection takes microseconds, or nobody listens.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Kept connections to the app are closed after this; shorter than what apps allow, so that we are the ones to close.
const KEEP_ALIVE: Duration = Duration::from_secs(4);

/// How often a request that is safe to repeat is sent in all.
const TRIES_MAX: u32 = 3;

/// Before another try: long enough for the end of a dead app to be noticed.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Headers that belong to one connection (RFC 9110, 7.6.1), and the two that old programs use besides.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What a client may not call a header of one connection, whatever it writes into `Connection`: a proxy in front has said it to the
/// app, or it makes the request what it is. Names that begin with [`FORWARDED_PREFIX`] or [`CONTENT_PREFIX`] belong to them.
const END_TO_END: [&str; 5] = [FORWARDED, REAL_IP, "host", "authorization", "cookie"];

const FORWARDED: &str = "forwarded";
const CONTENT_PREFIX: &str = "content-";

pub(super) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const REAL_IP: &str = "x-real-ip";

/// Those three have relatives, such as the port and the prefix of the path.
const FORWARDED_PREFIX: &str = "x-forwarded-";

/// The client's side of the proxy.
pub(super) struct Proxy {
    client: Client<HttpConnector, RequestBody>,
    answer_timeout: Duration,
    patience: Duration,
}

/// Why the app has not answered.
enum Failure {
    /// Nothing was sent, or the connection broke.
    Broken,
    /// The client broke off, or sent what is no request's body.
    BrokenOff,
    /// The client sends nothing any more.
    Stalled,
    /// The client sent more than we pass on.
    TooLarge,
    /// No answer in time.
    Late,
}

impl Proxy {
    /// The app may take nothing, and answer nothing, for `answer_timeout`; a client may send nothing for `patience`.
    pub(super) fn new(answer_timeout: Duration, patience: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_DEADLINE));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEEP_ALIVE)
            .build(connector);
        Self { client, answer_timeout, patience }
    }

    async fn send(&self, request: Request<RequestBody>, progress: Progress) -> Result<Response<Incoming>, Failure> {
        let mut answer = pin!(self.client.request(request));
        let answered = tokio::select! {
            biased;
            answered = answer.as_mut() => answered,
            failure = self.patience_with(&progress) => return Err(failure),
        };
        answered.map_err(|error| {
            if is_caused_by::<LengthLimitError>(&error) {
                Failure::TooLarge
            } else if is_caused_by::<BrokenOff>(&error) {
                Failure::BrokenOff
            } else {
                tracing::debug!(error = %anyhow::Error::new(error).root_cause(), "the app broke off");
                Failure::Broken
            }
        })
    }

    /// Waits until whoever is waited for has had his time without a break.
    async fn patience_with(&self, progress: &Progress) -> Failure {
        let shorter = self.patience.min(self.answer_timeout);
        loop {
            let (awaited, since) = progress.now();
            let (patience, failure) = match awaited {
                Awaited::Client => (self.patience, Failure::Stalled),
                Awaited::App => (self.answer_timeout, Failure::Late),
            };
            match patience.checked_sub(Clock::now().since(since).to_std()) {
                // Another may be waited for meanwhile.
                Some(left) if !left.is_zero() => tokio::time::sleep(left.min(shorter)).await,
                Some(_) | None => return failure,
            }
        }
    }
}

impl Worker {
    /// Passes a request to the app and its answer back.
    pub(super) async fn forward(
        &self,
        mut request: Request<Incoming>,
        client: Asker,
        in_flight: InFlight,
        first: (Arc<Backend>, bool, InFlight),
    ) -> Response<Answer> {
        let upgrade = wanted_upgrade(request.headers(), request.version()).map(|to| {
            let place = request.extensions_mut().remove();
            (to, hyper::upgrade::on(&mut request), place)
        });
        let (mut head, body) = request.into_parts();
        // The other end of an upgrade is ours to join, and nobody else's.
        head.extensions.clear();
        let version = head.version;
        if head.method == Method::CONNECT {
            return self.trouble(StatusCode::METHOD_NOT_ALLOWED, "this is not a forward proxy\n", in_flight);
        }
        if is_ambiguous(&head.headers) {
            return self.trouble(StatusCode::BAD_REQUEST, "the request has two lengths or two hosts\n", in_flight);
        }
        if let Some(upgrade) = upgrade {
            return self.tunnel(head, body, client, upgrade, in_flight, first).await;
        }
        let safe = matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS) && body.is_end_stream();
        let tries = if safe { TRIES_MAX } else { 1 };
        let mut body = Some(body);
        let mut entered = first;
        for last_try in (0..tries).rev() {
            let (backend, closing, at_app) = entered;
            let body = if safe { None } else { body.take() };
            let progress = Progress::begin();
            let body = body.map(|body| Upload::new(body, progress.clone()));
            let Some(outgoing) = outgoing(&head, body, &backend, client, &self.shared) else {
                return self.trouble(StatusCode::BAD_REQUEST, "the address of the request cannot be used\n", in_flight);
            };
            match self.proxy.send(outgoing, progress).await {
                Ok(answer) => {
                    let (mut head, body) = answer.into_parts();
                    strip(&mut head.headers);
                    let answer = Response::from_parts(head, Answer::app(body, in_flight, at_app));
                    return self.mark(answer, &backend.sha, closing, version);
                }
                Err(Failure::Broken) if last_try > 0 => {
                    drop(at_app);
                    tokio::time::sleep(RETRY_PAUSE).await;
                    entered = match self.enter().await {
                        Entered::App { backend, closing, at_app } => (backend, closing, at_app),
                        Entered::Refused { state } => return self.refuse(&state, version),
                        Entered::Site { .. } => return self.refuse("waking", version),
                    };
                }
                Err(failure) => {
                    let (status, text) = failure.status();
                    return self.mark(self.trouble(status, text, in_flight), &backend.sha, closing, version);
                }
            }
        }
        self.refuse("waking", version)
    }
}

/// A protocol to change to, the client's end of the connection once it has changed, and the connection's place.
type Upgrade = (HeaderValue, OnUpgrade, Option<Arc<Place>>);

impl Worker {
    /// Asks the app to change to another protocol (WebSocket), and if it does, passes on bytes both ways until either
    /// end has enough. The request is in flight for as long, and the connection keeps its place.
    async fn tunnel(
        &self,
        head: Parts,
        body: Incoming,
        client: Asker,
        (to, client_end, place): Upgrade,
        in_flight: InFlight,
        (backend, closing, at_app): (Arc<Backend>, bool, InFlight),
    ) -> Response<Answer> {
        let (version, progress) = (head.version, Progress::begin());
        let body = Upload::new(body, progress.clone());
        let Some(mut outgoing) = outgoing(&head, Some(body), &backend, client, &self.shared) else {
            return self.trouble(StatusCode::BAD_REQUEST, "the address of the request cannot be used\n", in_flight);
        };
        outgoing.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        outgoing.headers_mut().insert(header::UPGRADE, to);
        let mut answer = match self.proxy.send(outgoing, progress).await {
            Ok(answer) => answer,
            Err(failure) => {
                let (status, text) = failure.status();
                return self.mark(self.trouble(status, text, in_flight), &backend.sha, closing, version);
            }
        };
        let taken = answer.headers().get(header::UPGRADE).cloned();
        let Some(taken) = taken.filter(|_| answer.status() == StatusCode::SWITCHING_PROTOCOLS) else {
            let (mut head, body) = answer.into_parts();
            strip(&mut head.headers);
            let answer = Response::from_parts(head, Answer::app(body, in_flight, at_app));
            return self.mark(answer, &backend.sha, closing, version);
        };
        let app_end = hyper::upgrade::on(&mut answer);
        tokio::spawn(async move {
            let _until_its_end = (in_flight, at_app, place);
            if let (Ok(client_end), Ok(app_end)) = tokio::join!(client_end, app_end) {
                let (mut client_end, mut app_end) = (TokioIo::new(client_end), TokioIo::new(app_end));
                // Whoever breaks off has had enough.
                let _ended = tokio::io::copy_bidirectional(&mut client_end, &mut app_end).await;
            }
        });
        let (mut head, _) = answer.into_parts();
        strip(&mut head.headers);
        let answer = Response::from_parts(head, Answer::memory(Bytes::new(), None));
        let mut answer = self.mark(answer, &backend.sha, false, version);
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        answer.headers_mut().insert(header::UPGRADE, taken);
        answer
    }
}

/// The protocol that a client wants to change to, if it does. HTTP/2 knows no such thing.
fn wanted_upgrade(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    let names = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asked = names.flat_map(|names| names.split(',')).any(|name| name.trim().eq_ignore_ascii_case("upgrade"));
    headers.get(header::UPGRADE).filter(|_| asked && version == Version::HTTP_11).cloned()
}

impl Failure {
    const fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Broken => {
                (StatusCode::BAD_GATEWAY, "the app broke off without an answer: it may have acted or not\n")
            }
            Self::BrokenOff => (StatusCode::BAD_REQUEST, "the request broke off\n"),
            Self::Stalled => (StatusCode::REQUEST_TIMEOUT, "the request did not go on in time\n"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "the body of the request is too large\n"),
            Self::Late => (StatusCode::GATEWAY_TIMEOUT, "the app did not answer in time: it may have acted or not\n"),
        }
    }
}

/// The request as the app shall see it; nothing if its address makes no sense there.
fn outgoing(
    head: &Parts,
    body: Option<Upload>,
    backend: &Backend,
    client: Asker,
    shared: &Shared,
) -> Option<Request<RequestBody>> {
    let path = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let uri = Uri::builder().scheme("http").authority(format!("127.0.0.1:{}", backend.port)).path_and_query(path);
    let body = match body {
        Some(body) => Limited::new(body, shared.body_max).boxed_unsync(),
        None => Empty::new().map_err(|never| match never {}).boxed_unsync(),
    };
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = uri.build().ok()?;
    *request.version_mut() = Version::HTTP_11;
    *request.headers_mut() = outgoing_headers(&head.headers, &head.uri, client, &shared.trusted);
    Some(request)
}

/// Two lengths or two hosts, of which the app might see the other one. HTTP/2 knows where a request ends without its length, and
/// the host from elsewhere: there, nobody has looked at the second.
fn is_ambiguous(headers: &HeaderMap) -> bool {
    [header::CONTENT_LENGTH, header::HOST].iter().any(|name| headers.get_all(name).iter().nth(1).is_some())
}

fn outgoing_headers(received: &HeaderMap, uri: &Uri, client: Asker, trusted: &Networks) -> HeaderMap {
    let mut headers = received.clone();
    as_http1(&mut headers, uri);
    strip_but(&mut headers, is_end_to_end);
    introduce(&mut headers, client, trusted);
    headers
}

/// What HTTP/2 says in another way: the host beside the headers, and cookies in several (RFC 9113, 8.3.1 and 8.2.3).
fn as_http1(headers: &mut HeaderMap, uri: &Uri) {
    if let Some(authority) = uri.authority().filter(|_| !headers.contains_key(header::HOST)) {
        let port = authority.port().map_or_else(String::new, |port| format!(":{port}"));
        headers.extend(HeaderValue::from_str(&format!("{}{port}", authority.host())).ok().map(|v| (header::HOST, v)));
    }
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

/// Says who asked, and for what host. What was said of that before counts only if a trusted proxy said it.
fn introduce(headers: &mut HeaderMap, client: Asker, trusted: &Networks) {
    let peer = client.address.ip().to_canonical();
    if !trusted.contains(peer) {
        forget_origin(headers);
    }
    let before: Vec<&str> = headers.get_all(&FORWARDED_FOR).iter().filter_map(|v| v.to_str().ok()).collect();
    let chain = before.into_iter().map(str::to_owned).chain([peer.to_string()]).collect::<Vec<_>>().join(", ");
    headers.remove(&FORWARDED_FOR);
    headers.extend(HeaderValue::from_str(&chain).ok().map(|chain| (FORWARDED_FOR, chain)));
    // A proxy in front knows better than we do.
    if !headers.contains_key(&FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if client.secure { "https" } else { "http" }));
    }
    if !headers.contains_key(&FORWARDED_HOST)
        && let Some(host) = headers.get(header::HOST).cloned()
    {
        headers.insert(FORWARDED_HOST, host);
    }
}

/// Takes out all that apps may believe to be said by a proxy.
fn forget_origin(headers: &mut HeaderMap) {
    let of_origin = |name: &&HeaderName| {
        // Some apps cannot tell the two signs.
        let name = name.as_str().replace('_', "-");
        name == FORWARDED || name == REAL_IP || name.starts_with(FORWARDED_PREFIX)
    };
    let names: Vec<HeaderName> = headers.keys().filter(of_origin).cloned().collect();
    for name in names {
        headers.remove(&name);
    }
}

/// Takes out what belongs to one connection: the known headers, and those that `Connection` names.
fn strip(headers: &mut HeaderMap) {
    strip_but(headers, |_| false);
}

/// The same, but for those that `Connection` names and has no say over.
fn strip_but(headers: &mut HeaderMap, kept: impl Fn(&HeaderName) -> bool) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|names| names.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| !kept(name))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn is_end_to_end(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    END_TO_END.contains(&name.as_str()) || name.starts_with(FORWARDED_PREFIX) || name.starts_with(CONTENT_PREFIX)
}

fn is_caused_by<E: std::error::Error + 'static>(error: &hyper_util::client::legacy::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<E>() {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name.parse::<HeaderName>().expect("name"), value.parse().expect("value"));
        }
        headers
    }

    #[test]
    fn what_belongs_to_a_connection_is_stripped() {
        let mut found = headers(&[
            ("connection", "close, x-private"),
            ("connection", "X-Other"),
            ("x-private", "1"),
            ("x-other", "2"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("proxy-authorization", "secret"),
            ("content-type", "text/html"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
        ]);
        strip(&mut found);
        let kept = headers(&[("content-type", "text/html"), ("set-cookie", "a=1"), ("set-cookie", "b=2")]);
        assert_eq!(found, kept);
    }

    #[test]
    fn a_client_cannot_have_taken_away_what_a_proxy_says_of_it() {
        let edge = Asker { address: "127.0.0.1:4711".parse().expect("address"), secure: false };
        let received = headers(&[
            ("host", "example.org"),
            (
                "connection",
                "x-forwarded-for, X-Forwarded-Host, X-Real-IP, forwarded, host, content-type, cookie, x-mine",
            ),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-host", "example.org"),
            ("x-forwarded-proto", "https"),
            ("x-real-ip", "192.0.2.1"),
            ("content-type", "text/plain"),
            ("cookie", "a=1"),
            ("x-mine", "1"),
        ]);
        let found = outgoing_headers(&received, &Uri::from_static("/"), edge, &Networks::loopback());
        let mut wanted = received;
        wanted.remove("connection");
        wanted.remove("x-mine");
        wanted.insert(FORWARDED_FOR, HeaderValue::from_static("192.0.2.1, 127.0.0.1"));
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_http2_says_in_another_way_is_said_as_apps_know_it() {
        let peer = Asker { address: "192.0.2.1:4711".parse().expect("address"), secure: true };
        let received = headers(&[("cookie", "a=1"), ("cookie", "b=2; c=3")]);
        let uri = Uri::from_static("https://example.org:8443/a");
        let found = outgoing_headers(&received, &uri, peer, &Networks::loopback());
        let wanted = headers(&[
            ("cookie", "a=1; b=2; c=3"),
            ("host", "example.org:8443"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "example.org:8443"),
        ]);
        assert_eq!(found, wanted);
    }

    #[test]
    fn the_app_learns_who_asked() {
        let peer = Asker { address: "10.0.0.7:4711".parse().expect("address"), secure: false };
        let mut found = headers(&[("host", "example.org")]);
        introduce(&mut found, peer, &Networks::loopback());
        let wanted = headers(&[
            ("host", "example.org"),
            ("x-forwarded-for", "10.0.0.7"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "example.org"),
        ]);
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_a_trusted_proxy_says_of_the_client_is_passed_on_and_nobody_elses_word() {
        let peer = Asker { address: "10.0.0.7:4711".parse().expect("address"), secure: false };
        let said = headers(&[
            ("host", "example.org"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "bank.example"),
            ("x-forwarded-port", "443"),
            ("forwarded", "for=192.0.2.1"),
            ("x-real-ip", "192.0.2.1"),
            ("x_forwarded_for", "192.0.2.1"),
        ]);
        let mut believed = said.clone();
        introduce(&mut believed, peer, &Networks::parse(["10.0.0.0/24"]).expect("networks"));
        let mut wanted = said.clone();
        wanted.insert(FORWARDED_FOR, HeaderValue::from_static("192.0.2.1, 192.0.2.2, 10.0.0.7"));
        assert_eq!(believed, wanted);

        let mut overwritten = said;
        introduce(&mut overwritten, peer, &Networks::loopback());
        let wanted = headers(&[
            ("host", "example.org"),
            ("x-forwarded-for", "10.0.0.7"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "example.org"),
        ]);
        assert_eq!(overwritten, wanted);
    }
}
