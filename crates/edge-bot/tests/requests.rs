//! What a real HAProxy with our configuration makes of requests that are meant to be read in two ways, or to be too much: it
//! refuses them, or passes them on so that they can be read in one way only.

mod proxy;

use std::sync::{Arc, Mutex, PoisonError};

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
    serve: std::net::SocketAddr,
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
    let shown = proxy.look(&[]).await;
    let place = shown.servers.iter().find(|s| s.place.backend == Backend::Web).expect("one").place.clone();
    let address = Command::SetAddress { place: place.clone(), serve: recorder.serve, check: recorder.serve };
    proxy.look(&[address, Command::SetAdmin { place: place.clone(), admin: Admin::Ready }]).await;
    (proxy, recorder)
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
