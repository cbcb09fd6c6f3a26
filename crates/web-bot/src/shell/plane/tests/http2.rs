//! HTTP/2 by clients that are slow or mean no good: who takes no answer is given up, who waits for the app is not, and nothing of
//! what HTTP/2 can say and HTTP/1 cannot reaches the app as something else.

use http_body_util::{BodyExt, Empty};
use hyper::{Request, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinHandle;

use super::*;

type Sender = SendRequest<Empty<Bytes>>;

/// A client that lives, and takes so many bytes of each answer before it reads them; the task ends with its connection.
async fn client(stand: &Stand, window: Option<u32>) -> (Sender, JoinHandle<hyper::Result<()>>) {
    let stream = TcpStream::connect(stand.address).await.expect("connect");
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(window);
    let (client, connection) = builder.handshake(TokioIo::new(stream)).await.expect("HTTP/2");
    (client, tokio::spawn(connection))
}

fn get(stand: &Stand, path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{}{path}", stand.address)).body(Empty::new()).expect("a request")
}

/// Whoever answers pings lives, and is shown the door all the same when it has asked for nothing for long; not while an answer is
/// under way.
#[tokio::test]
async fn an_http2_connection_that_asks_for_nothing_is_closed() {
    let stand = stand_with(PATIENCE, Duration::from_millis(300), None);
    let (backend, _seen) = app(HELLO, Duration::from_secs(2)).await;
    stand.plane.set_target(Target::App { backend, closing: false });
    let (mut client, connection) = client(&stand, None).await;
    let answer = client.send_request(get(&stand, "/")).await.expect("the slow answer comes");
    assert_eq!(answer.status(), 200);
    drop(answer);
    let closed = tokio::time::timeout(PATIENCE, connection).await.expect("it is closed in time");
    let _goodbye = closed.expect("no panic");
    drop(client);
}

#[tokio::test]
async fn an_http2_client_that_takes_no_answer_is_given_up() {
    let stand = stand_with(PATIENCE, Duration::from_millis(300), None);
    stand.plane.set_target(files("aaaa"));
    // No room for a byte, or none for more than the first megabytes.
    for (window, path) in [(Some(0), "/"), (None, "/big")] {
        let (mut client, connection) = client(&stand, window).await;
        let mut answers = Vec::new();
        for _request in 0..3 {
            answers.push(client.send_request(get(&stand, path)).await.expect("the head of an answer"));
        }
        assert_eq!(stand.plane.meter().counts().0, 3, "{path} is in flight");
        tokio::time::timeout(PATIENCE, stand.plane.meter().still()).await.expect("it is no load any more");
        let closed = tokio::time::timeout(PATIENCE, connection).await.expect("the connection is closed");
        let _goodbye = closed.expect("no panic");
        drop(answers);
    }
}

#[tokio::test]
async fn an_http2_client_that_takes_an_answer_slowly_gets_it() {
    let stand = stand_with(PATIENCE, Duration::from_secs(1), None);
    stand.plane.set_target(files("aaaa"));
    let (mut client, _connection) = client(&stand, Some(65_535)).await;
    let mut answer = client.send_request(get(&stand, "/big")).await.expect("the head of an answer");
    for part in 0..30 {
        let frame = answer.frame().await.expect("a part");
        assert!(frame.is_ok(), "part {part}: {frame:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn an_event_comes_over_http2_however_long_the_app_waits_for_it() {
    let patience = Duration::from_millis(200);
    let stand = stand_with(PATIENCE, patience, None);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        let _asked = stream.read(&mut [0; 4096]).await.expect("read");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.expect("write");
        for _event in 0..3 {
            tokio::time::sleep(patience * 5).await;
            stream.write_all(b"9\r\ndata: 1\n\n\r\n").await.expect("write");
        }
        stream.write_all(b"0\r\n\r\n").await.expect("write");
    });
    let backend = Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() });
    stand.plane.set_target(Target::App { backend, closing: false });
    let (mut client, _connection) = client(&stand, None).await;
    let answer = client.send_request(get(&stand, "/events")).await.expect("the head");
    let body = answer.collect().await.expect("it goes on to its end").to_bytes();
    assert_eq!(body, Bytes::from("data: 1\n\n".repeat(3)));
}

/// Kinds of frames.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const GOODBYE: u8 = 7;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// How the heads of two kinds of answers begin.
const STATUS_200: u8 = 0x88;
const STATUS_400: u8 = 0x8c;

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short").to_be_bytes();
    [&[0, length[0], length[1], kind, flags, 0, 0, 0, stream], payload].concat()
}

/// A line of a head as it is, however wrong.
fn field((name, value): (&str, &str)) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).expect("short")], text.as_bytes()].concat();
    [vec![0], text(name), text(value)].concat()
}

/// Asks with these lines, or with these in the place of the usual ones, and this body; yields how the head of the answer begins, if
/// the request is not refused in HTTP/2's own way.
async fn ask(stand: &Stand, lines: &[(&str, &str)], body: Option<&str>) -> Option<u8> {
    let usual = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")];
    let other = |name: &str| lines.iter().find(|line| name.starts_with(':') && line.0 == name);
    let usual = usual.iter().map(|line| other(line.0).unwrap_or(line));
    let more = lines.iter().filter(|(name, _)| !name.starts_with(':'));
    let head: Vec<u8> = usual.chain(more).flat_map(|line| field(*line)).collect();
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(SETTINGS, 0, 0, b""));
    sent.extend(frame(HEADERS, END_HEADERS | if body.is_none() { END_STREAM } else { 0 }, 1, &head));
    sent.extend(body.map(|body| frame(DATA, END_STREAM, 1, body.as_bytes())).unwrap_or_default());
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(&sent).await.expect("write");
    let outcome = async {
        loop {
            let mut begin = [0; 9];
            stream.read_exact(&mut begin).await.ok()?;
            let mut payload = vec![0; usize::from(u16::from_be_bytes([begin[1], begin[2]]))];
            stream.read_exact(&mut payload).await.ok()?;
            match (begin[3], begin[8]) {
                (HEADERS, 1) => return payload.first().copied(),
                (RESET, 1) | (GOODBYE, _) => return None,
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, outcome).await.expect("an answer or a refusal")
}

#[tokio::test]
async fn no_head_of_http2_reaches_the_app_as_another_one() {
    let stand = stand(PATIENCE);
    let (backend, mut seen) = app(HELLO, Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend, closing: false });
    // What is in order comes through: so does this test's way of asking.
    for (lines, body) in [(vec![("x", "y")], None), (vec![(":method", "POST"), ("content-length", "3")], Some("abc"))] {
        assert_eq!(ask(&stand, &lines, body).await, Some(STATUS_200), "{lines:?}");
        seen.recv().await.expect("the app is asked");
    }
    let one = [
        ("x", "a\r\nx-smuggled: b"),
        ("x", "a\nx-smuggled: b"),
        ("x", "a\rb"),
        ("x", "a\0b"),
        ("x\r\nx-smuggled", "b"),
        ("x: y\r\nx-smuggled", "b"),
        ("x y", "b"),
        ("x:", "b"),
        ("X", "b"),
        ("", "b"),
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "x, chunked"),
        ("connection", "close"),
        ("connection", "content-length"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
        ("content-length", "5"),
        ("content-length", "+0"),
        ("content-length", "0, 0"),
        ("content-length", "0x0"),
        (":path", "/ HTTP/1.1\r\nhost: x\r\n\r\nGET /smuggled"),
        (":path", "/a b"),
        (":path", "/a\tb"),
        (":path", "smuggled"),
        (":path", ""),
        (":method", "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\nGET"),
        (":method", "GE T"),
        (":method", ""),
        (":authority", "x\r\nx-smuggled: y"),
        (":authority", "x y"),
    ];
    let two = [[("content-length", "0"), ("content-length", "5")], [("host", "x"), ("host", "y")]];
    for lines in one.iter().map(std::slice::from_ref).chain(two.iter().map(|two| &two[..])) {
        let outcome = ask(&stand, lines, None).await;
        assert!(matches!(outcome, None | Some(STATUS_400)), "{lines:?}: {outcome:x?}");
        assert_eq!(seen.try_recv().ok(), None, "{lines:?}");
    }
}

/// The app has the length before the body: what does not agree with it is nobody's next request.
#[tokio::test]
async fn no_body_of_http2_reaches_the_app_as_another_request() {
    let stand = stand(PATIENCE);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let (sender, mut seen) = tokio::sync::mpsc::channel(64);
    // All that comes on one connection, at its end.
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut read = Vec::new();
                let _broken_off = stream.read_to_end(&mut read).await;
                sender.send(String::from_utf8_lossy(&read).into_owned()).await.expect("send");
            });
        }
    });
    let backend = Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() });
    stand.plane.set_target(Target::App { backend, closing: false });
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
    let cases = [("3", format!("abc{smuggled}")), ("0", smuggled.to_owned()), ("1000", smuggled.to_owned())];
    for (length, body) in &cases {
        let outcome = ask(&stand, &[(":method", "POST"), ("content-length", length)], Some(body)).await;
        assert!(matches!(outcome, None | Some(STATUS_400)), "{length}: {outcome:x?}");
    }
    tokio::time::timeout(PATIENCE, stand.plane.meter().still()).await.expect("all are given up");
    // Each on a connection of its own, that ends with it.
    drop(stand);
    let mut connections = 0;
    while let Ok(Some(all)) = tokio::time::timeout(Duration::from_secs(1), seen.recv()).await {
        connections += 1;
        let (head, body) = all.split_once("\r\n\r\n").unwrap_or((&all, ""));
        assert!(!head.contains("smuggled"), "{all}");
        let length: usize = head
            .split("content-length: ")
            .nth(1)
            .map_or(0, |rest| rest.lines().next().and_then(|length| length.parse().ok()).expect("a length"));
        assert!(body.len() <= length, "{all}");
    }
    assert!(connections <= cases.len(), "{connections}");
}
