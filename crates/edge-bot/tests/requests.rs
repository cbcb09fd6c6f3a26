//! What a real HAProxy with our configuration makes of requests that are meant to be read in two ways, or to be too much: it
//! refuses them, or passes them on so that they can be read in one way only.

mod proxy;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use edge_bot::machine::{Admin, Backend, Command};
use proxy::{Proxy, STEP, listener};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A request that must never be taken for one of its own.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";

/// Longer than HAProxy's buffer.
const TOO_LONG: usize = 17_000;
/// More headers than it takes.
const TOO_MANY: usize = 150;

/// A web server that keeps what it was sent, a text a connection.
struct Recorder {
    serve: SocketAddr,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    async fn start() -> Self {
        let serving = listener().await;
        let serve = serving.local_addr().expect("bound");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&heard);
        tokio::spawn(async move {
            while let Ok((stream, _)) = serving.accept().await {
                tokio::spawn(record(stream, Arc::clone(&all)));
            }
        });
        Self { serve, heard }
    }

    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Answers each request by its head alone, and closes: what is sent behind it on this connection is heard, not answered.
async fn record(mut stream: TcpStream, heard: Arc<Mutex<Vec<String>>>) {
    let (mut text, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    let mut answered = false;
    while let Ok(bytes) = stream.read(&mut buffer).await {
        if bytes == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..bytes]);
        if !answered && text.windows(4).any(|four| four == b"\r\n\r\n") {
            answered = true;
            heard.lock().unwrap_or_else(PoisonError::into_inner).push(String::from_utf8_lossy(&text).into_owned());
            let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    }
}

/// Sends the request as it is, then ends; the status that comes back first.
async fn status_of(proxy: &Proxy, request: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(proxy.web).await.expect("the proxy listens");
    stream.write_all(request.as_bytes()).await.expect("it takes the request");
    let mut answer = vec![0; 4096];
    let bytes = tokio::time::timeout(STEP, stream.read(&mut answer)).await.expect("in time").ok()?;
    let answer = String::from_utf8_lossy(&answer[..bytes]).into_owned();
    answer.split(' ').nth(1)?.parse().ok()
}

async fn behind_the_proxy() -> (Proxy, Recorder) {
    let (proxy, recorder) = (Proxy::start().await, Recorder::start().await);
    route_to(&proxy, recorder.serve).await;
    (proxy, recorder)
}

async fn route_to(proxy: &Proxy, serve: SocketAddr) {
    let shown = proxy.look(&[]).await;
    let place = shown.servers.iter().find(|s| s.place.backend == Backend::Web).expect("one").place.clone();
    let address = Command::SetAddress { place: place.clone(), serve, check: serve };
    proxy.look(&[address, Command::SetAdmin { place: place.clone(), admin: Admin::Ready }]).await;
}

#[tokio::test]
async fn requests_that_can_be_read_in_two_ways_are_refused() {
    let (proxy, recorder) = behind_the_proxy().await;
    let long = "a".repeat(TOO_LONG);
    let many: String = (0..TOO_MANY).map(|n| format!("x{n}: y\r\n")).collect();
    let post = |headers: &str, body: &str| format!("POST / HTTP/1.1\r\nhost: x\r\n{headers}\r\n\r\n{body}");
    let two_lengths = post("content-length: 5\r\ncontent-length: 6", "abcdef");
    let within_a_chunk = format!("27\r\n{SMUGGLED}\r\n0\r\n\r\n");
    let refused = [
        ("two lengths", two_lengths),
        ("a list of lengths", post("content-length: 5, 6", "abcdef")),
        ("a signed length", post("content-length: +5", "abcde")),
        ("an empty length", post("content-length: ", SMUGGLED)),
        ("a length beyond all", post("content-length: 99999999999999999999999", SMUGGLED)),
        ("a space behind a name", post("content-length : 5", "abcde")),
        ("a space behind the coding", post("transfer-encoding : chunked", &format!("0\r\n\r\n{SMUGGLED}"))),
        ("an unknown coding", post("transfer-encoding: xchunked\r\ncontent-length: 3", "abc")),
        ("a coding behind the last", post("transfer-encoding: chunked, identity", "0\r\n\r\n")),
        ("two codings", post("transfer-encoding: chunked\r\ntransfer-encoding: identity", "0\r\n\r\n")),
        ("a chunk that lies", post("transfer-encoding: chunked\r\ncontent-length: 4", &within_a_chunk)),
        ("no chunk's length", post("transfer-encoding: chunked", "zz\r\n\r\n")),
        ("a chunk's length in C", post("transfer-encoding: chunked", "0x5\r\nabcde\r\n0\r\n\r\n")),
        ("a bare carriage return", post("x: a\rcontent-length: 40", "")),
        ("a header without a name", post(":\r\ncontent-length: 3", "abc")),
        ("two hosts", post("host: y\r\ncontent-length: 0", "")),
        (
            "chunks of an old version",
            format!("POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}"),
        ),
        ("no version", String::from("GET /\r\n\r\n")),
        ("a control character", String::from("GET /a\u{1}b HTTP/1.1\r\nhost: x\r\n\r\n")),
        ("a fragment", String::from("GET /a#b HTTP/1.1\r\nhost: x\r\n\r\n")),
        ("a huge header", post(&format!("x: {long}"), "")),
        ("a huge address", format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n")),
        ("too many headers", post(many.trim_end(), "")),
    ];
    for (what, request) in refused {
        let status = status_of(&proxy, &request).await;
        assert!(matches!(status, Some(400 | 403)), "{what}: {status:?}");
        // Its own checks are all that the server hears.
        let heard: Vec<String> = recorder.heard().into_iter().filter(|text| !text.contains("/readiness")).collect();
        assert!(heard.iter().all(|text| !text.contains("smuggled") && !text.contains("abc")), "{what}: {heard:?}");
    }
}

#[tokio::test]
async fn what_is_passed_on_can_be_read_in_one_way() {
    let (proxy, recorder) = behind_the_proxy().await;
    let chunks = "3\r\nabc\r\n0\r\n\r\n";
    let passed = [
        // The length goes: only the chunks count.
        format!("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n{chunks}"),
        format!("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding:\tchunked\r\ncontent-length: 3\r\n\r\n{chunks}"),
        // A folded line becomes one.
        String::from("POST / HTTP/1.1\r\nhost: x\r\nx: a\r\n content-length: 9\r\ncontent-length: 0\r\n\r\n"),
        String::from("GET / HTTP/1.1\nhost: x\n\n"),
        // Nobody behind the proxy is talked into another protocol that it does not follow.
        String::from(
            "GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n\r\n",
        ),
    ];
    for request in passed {
        assert_eq!(status_of(&proxy, &request).await, Some(200), "{request}");
        let heard: Vec<String> = recorder.heard().into_iter().filter(|text| !text.contains("/readiness")).collect();
        let [text] = &heard[..] else { panic!("{request} comes as {heard:?}") };
        let head = text.split("\r\n\r\n").next().unwrap_or_default();
        let count = |name: &str| head.lines().filter(|line| line.starts_with(name)).count();
        assert!(count("content-length:") + count("transfer-encoding:") <= 1, "{request} comes as {text}");
        assert!(!text.contains("upgrade: h2c"), "{text}");
        assert!(head.lines().all(|line| !line.starts_with([' ', '\t'])), "{text}");
    }
}

/// The built-in configuration, with less patience for what is silent.
const IMPATIENT: (&str, &str) =
    ("timeout client 60s\n    timeout server 60s", "timeout client 1s\n    timeout server 1s");
/// Longer than that, shorter than a stream may be silent.
const SILENCE: Duration = Duration::from_millis(2_500);

async fn impatient_proxy() -> Proxy {
    let built_in = include_str!("../src/shell/haproxy.cfg");
    let impatient = built_in.replace(IMPATIENT.0, IMPATIENT.1);
    assert_ne!(impatient, built_in, "the timeouts are where they were");
    Proxy::start_with(Some(&impatient)).await
}

/// Answers the first request of each connection with `head`, and passes the rest of the connection to `talk`; checks are
/// answered well.
async fn serve_streams<T: Future<Output = ()> + Send + 'static>(
    head: &'static str,
    talk: impl Fn(TcpStream) -> T + Copy + Send + 'static,
) -> SocketAddr {
    let serving = listener().await;
    let serve = serving.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = serving.accept().await {
            tokio::spawn(async move {
                if read_head(&mut stream).await.contains("/readiness") {
                    let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
                    return;
                }
                let _gone = stream.write_all(head.as_bytes()).await;
                talk(stream).await;
            });
        }
    });
    serve
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match tokio::time::timeout(STEP, stream.read_u8()).await.expect("in time") {
            Ok(byte) => head.push(byte),
            Err(_end) => break,
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

#[tokio::test]
async fn a_web_socket_may_be_silent_for_longer_than_a_client() {
    let proxy = impatient_proxy().await;
    let switched = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let echo = serve_streams(switched, |mut stream| async move {
        let (mut from, mut to) = stream.split();
        let _cut = tokio::io::copy(&mut from, &mut to).await;
    });
    route_to(&proxy, echo.await).await;
    let mut client = TcpStream::connect(proxy.web).await.expect("the proxy listens");
    let request = "GET /talk HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    client.write_all(request.as_bytes()).await.expect("it takes the request");
    let head = read_head(&mut client).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(proxy::served(&mut client).await, "what is said comes back");
    tokio::time::sleep(SILENCE).await;
    assert!(proxy::served(&mut client).await, "and after a silence");
}

#[tokio::test]
async fn an_event_stream_may_be_silent_for_longer_than_a_server() {
    let proxy = impatient_proxy().await;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let events = serve_streams(head, |mut stream| async move {
        tokio::time::sleep(SILENCE).await;
        let _gone = stream.write_all(b"c\r\ndata: late\n\n\r\n0\r\n\r\n").await;
    });
    route_to(&proxy, events.await).await;
    for (accept, whole) in [("text/event-stream", true), ("*/*", false)] {
        let mut client = TcpStream::connect(proxy.web).await.expect("the proxy listens");
        let request = format!("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\naccept: {accept}\r\n\r\n");
        client.write_all(request.as_bytes()).await.expect("it takes the request");
        let mut answer = String::new();
        let read = tokio::time::timeout(STEP, client.read_to_string(&mut answer)).await.expect("in time");
        assert_eq!(read.is_ok() && answer.contains("data: late"), whole, "{accept}: {answer}");
    }
}

#[tokio::test]
async fn who_asked_is_what_a_trusted_proxy_says_and_else_what_is_seen() {
    const FORGED: &str = "GET / HTTP/1.1\r\nhost: example.org\r\nx-forwarded-for: 192.0.2.1\r\nx-forwarded-host: bank.example\r\n\
                          x-forwarded-proto: https\r\nx-forwarded-port: 443\r\nforwarded: for=192.0.2.1\r\n\
                          x-real-ip: 192.0.2.1\r\nX_Forwarded_For: 192.0.2.1\r\nx_real-ip: 192.0.2.1\r\n\r\n";
    let seen: &[&str] = &["x-forwarded-for: 127.0.0.1", "x-forwarded-host: example.org", "x-forwarded-proto: http"];
    let said: &[&str] = &[
        "forwarded: for=192.0.2.1",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-for: 192.0.2.1",
        "x-forwarded-host: bank.example",
        "x-forwarded-port: 443",
        "x-forwarded-proto: https",
        "x-real-ip: 192.0.2.1",
        "x_forwarded_for: 192.0.2.1",
        "x_real-ip: 192.0.2.1",
    ];
    let plain = "GET / HTTP/1.1\r\nhost: example.org\r\n\r\n";
    for (trusted, request, wanted) in
        [("192.0.2.0/24 ::1", FORGED, seen), ("192.0.2.0/24 127.0.0.0/8", FORGED, said), ("127.0.0.1", plain, seen)]
    {
        let (proxy, recorder) = (Proxy::start_trusting(None, trusted).await, Recorder::start().await);
        route_to(&proxy, recorder.serve).await;
        assert_eq!(status_of(&proxy, request).await, Some(200), "{trusted}");
        let heard = recorder.heard();
        let text = heard.iter().find(|text| !text.contains("/readiness")).expect("the request");
        let mut lines: Vec<&str> =
            text.lines().filter(|line| line.contains("192.0.2.1") || line.contains("forwarded")).collect();
        lines.sort_unstable();
        assert_eq!(lines, wanted, "{trusted}");
    }
}

/// As many clients of the site as there may be in all; half of them may be at once, and the kernel keeps the rest waiting.
const FEW: [(&str, &str); 2] = [("maxconn 4096", "maxconn 8"), ("maxconn 3000", "maxconn 4")];
const MANY: usize = 8;

#[tokio::test]
async fn clients_of_the_site_leave_room_for_those_of_the_primary() {
    let built_in = include_str!("../src/shell/haproxy.cfg");
    let small = FEW.iter().fold(built_in.to_owned(), |text, (from, to)| text.replace(from, to));
    let proxy = Proxy::start_with(Some(&small)).await;
    let backing = proxy::Backing::start().await;
    let shown = proxy.look(&[]).await;
    let place = shown.servers.iter().find(|s| s.place.backend == Backend::Primary).expect("one").place.clone();
    let address = Command::SetAddress { place: place.clone(), serve: backing.serve, check: backing.check };
    let open = [Command::SetAdmin { place: place.clone(), admin: Admin::Ready }, Command::SetUp { place }];
    proxy.look(&[vec![address], open.to_vec()].concat()).await;
    backing.healthy.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut greedy = Vec::new();
    for _ in 0..MANY {
        greedy.push(TcpStream::connect(proxy.web).await.expect("the proxy listens"));
    }
    // Accepted, as far as it goes: half a request is waited for.
    for stream in &mut greedy {
        stream.write_all(b"GET / HTTP/1.1\r\n").await.expect("it takes that much");
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Before the greedy ones have to go, since they do not finish their requests.
    let mut other = proxy.connect().await;
    let served = tokio::time::timeout(STEP / 4, proxy::served(&mut other)).await;
    assert_eq!(served, Ok(true), "the primary's clients are served");
}
