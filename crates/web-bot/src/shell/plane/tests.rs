//! The data plane on a real socket: static answers, the proxy, the swap, the hold, the end of requests.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bots_core::shell::{Metrics, Networks, http, runtime};
use bytes::Bytes;
use hyper::{HeaderMap, Method};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{Backend, Doors, Hold, Meter, Plane, SiteBuilder, Target, TlsFiles, Vault};

const PATIENCE: Duration = Duration::from_secs(10);

struct Stand {
    plane: Plane,
    address: SocketAddr,
}

fn stand(app_answer_timeout: Duration) -> Stand {
    stand_with(app_answer_timeout, PATIENCE, None)
}

fn stand_with(app_answer_timeout: Duration, patience: Duration, tls: Option<(StdListener, TlsFiles)>) -> Stand {
    stand_behind(|plain| Doors { tls, app_answer_timeout, patience, ..doors(plain) })
}

fn doors(plain: StdListener) -> Doors {
    Doors {
        plain,
        tls: None,
        access_log: None,
        app_answer_timeout: PATIENCE,
        trusted: Networks::loopback(),
        patience: PATIENCE,
        hold: Hold { timeout: PATIENCE, requests_max: 1_024 },
        body_max: 64 << 20,
    }
}

fn stand_behind(doors: impl FnOnce(StdListener) -> Doors) -> Stand {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let address = listener.local_addr().expect("address");
    let (events, _queue) = runtime::queue();
    let doors = doors(listener);
    let plane = Plane::start(doors, "web-1", events, &Metrics::new()).expect("start");
    Stand { plane, address }
}

impl Stand {
    async fn ask(&self, method: Method, path: &str, headers: HeaderMap, body: &'static str) -> http::Response {
        let url = format!("http://{}{path}", self.address);
        http::request(method, &url, headers, Bytes::from(body), PATIENCE, 1 << 20).await.expect("an answer")
    }

    async fn get(&self, path: &str) -> http::Response {
        self.ask(Method::GET, path, HeaderMap::new(), "").await
    }
}

fn files(sha: &str) -> Target {
    let vault = Vault::new(&std::env::temp_dir(), 256 << 20);
    let mut site = SiteBuilder::new(sha, 0, "web-1", &vault);
    site.add("index.html", "e1", format!("page of {sha}").as_bytes()).expect("added");
    site.add("big", "e2", &vec![b'x'; 32 << 20]).expect("added");
    Target::Static { site: Arc::new(site.finish()), closing: false }
}

fn text(answer: &http::Response) -> &str {
    std::str::from_utf8(&answer.body).expect("text")
}

fn header<'a>(answer: &'a http::Response, name: &str) -> &'a str {
    answer.headers.get(name).map_or("", |v| v.to_str().expect("ascii"))
}

/// An app that reads one request a connection and answers `answer`, after `pause`; what it read is sent back.
async fn app(answer: &'static str, pause: Duration) -> (Arc<Backend>, tokio::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut read = vec![0; 1 << 16];
                let n = stream.read(&mut read).await.expect("read");
                sender.send(String::from_utf8_lossy(&read[..n]).into_owned()).await.expect("send");
                tokio::time::sleep(pause).await;
                stream.write_all(answer.as_bytes()).await.expect("write");
            });
        }
    });
    (Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() }), receiver)
}

const HELLO: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-app: yes\r\nkeep-alive: timeout=9\r\n\
                     x-bots-revision: forged\r\nconnection: close\r\n\r\nhello";

mod hostile;
mod http2;
mod lane;
mod streams;
mod tunnels;
mod uploads;

#[tokio::test]
async fn an_idle_bot_says_so_and_names_its_state() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(Target::Refuse { state: String::from("idle") });
    let answer = stand.get("/").await;
    assert_eq!((answer.status, header(&answer, "retry-after")), (503, "1"));
    let body: serde_json::Value = serde_json::from_slice(&answer.body).expect("json");
    assert_eq!((body["state"].as_str(), body["name"].as_str()), (Some("idle"), Some("web-1")));
    assert_eq!(header(&answer, "x-bots-name"), "web-1");
}

#[tokio::test]
async fn files_are_served_and_marked_with_their_commit() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let answer = stand.get("/").await;
    assert_eq!((answer.status, text(&answer)), (200, "page of aaaa"));
    assert_eq!((header(&answer, "x-bots-revision"), header(&answer, "etag")), ("aaaa", "\"e1\""));
    let mut headers = HeaderMap::new();
    headers.insert("if-none-match", "\"e1\"".parse().expect("value"));
    assert_eq!(stand.ask(Method::GET, "/", headers, "").await.status, 304);
    let head = stand.ask(Method::HEAD, "/big", HeaderMap::new(), "").await;
    assert_eq!((head.status, header(&head, "content-length"), head.body.len()), (200, "33554432", 0));
}

#[tokio::test]
async fn a_kept_connection_sees_the_swap_at_its_next_request_and_the_end_when_we_leave() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    let mut ask = async |expected: &str| {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("write");
        let mut read = vec![0; 4096];
        let n = stream.read(&mut read).await.expect("read");
        let answer = String::from_utf8_lossy(&read[..n]).into_owned();
        assert!(answer.contains(expected), "{answer}");
        answer
    };
    ask("page of aaaa").await;
    stand.plane.set_target(files("bbbb"));
    assert!(!ask("page of bbbb").await.contains("connection: close"));
    let Target::Static { site, .. } = files("bbbb") else { unreachable!("made so") };
    stand.plane.set_target(Target::Static { site, closing: true });
    assert!(ask("page of bbbb").await.contains("connection: close"));
}

#[tokio::test]
async fn who_waits_for_the_last_byte_waits_for_slow_readers_too() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("write");
    let mut first = [0; 10];
    stream.read_exact(&mut first).await.expect("the answer has begun");
    stand.plane.set_target(Target::Refuse { state: String::from("draining") });
    let finished = stand.plane.finish();
    tokio::pin!(finished);
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut finished).await.is_err(), "not sent yet");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.expect("the rest comes");
    assert!(rest.len() > 32 << 20);
    tokio::time::timeout(PATIENCE, finished).await.expect("nothing is in flight any more");
}

/// A client may open a connection for later. It is not in flight, whether the bot writes an access log or not.
#[tokio::test]
async fn a_connection_that_has_said_nothing_does_not_hold_up_a_drain() {
    let folder = tempfile::tempdir().expect("a folder");
    for access_log in [None, Some(folder.path().join("access.log"))] {
        let patience = PATIENCE.saturating_mul(100);
        let stand = stand_behind(|plain| Doors { access_log, patience, ..doors(plain) });
        stand.plane.set_target(files("aaaa"));
        let mut silent = TcpStream::connect(stand.address).await.expect("connect");
        let open = || {
            let connections = stand.plane.shared.connections.lock().expect("nobody has panicked");
            connections.receiver_count()
        };
        while open() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::timeout(PATIENCE, stand.plane.finish()).await.expect("nothing is in flight");
        assert_eq!(silent.read(&mut [0; 1]).await.expect("it is closed in good order"), 0);
    }
}

#[tokio::test]
async fn the_proxy_passes_on_what_it_should() {
    let stand = stand(PATIENCE);
    let (backend, mut seen) = app(HELLO, Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend, closing: false });
    let mut headers = HeaderMap::new();
    headers.insert("connection", "x-secret".parse().expect("value"));
    headers.insert("x-secret", "1".parse().expect("value"));
    headers.insert("content-type", "text/plain".parse().expect("value"));
    let answer = stand.ask(Method::POST, "/entries?a=%2F", headers, "words").await;
    assert_eq!((answer.status, text(&answer)), (200, "hello"));
    assert_eq!((header(&answer, "x-app"), header(&answer, "keep-alive")), ("yes", ""));
    assert_eq!((header(&answer, "x-bots-revision"), header(&answer, "x-bots-name")), ("aaaa", "web-1"));
    let request = seen.recv().await.expect("a request").to_ascii_lowercase();
    assert!(request.starts_with("post /entries?a=%2f http/1.1\r\n"), "{request}");
    for line in ["content-type: text/plain", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http"] {
        assert!(request.contains(line), "{line} in {request}");
    }
    assert!(request.contains(&format!("host: {}", stand.address)), "the host is the client's: {request}");
    assert!(!request.contains("x-secret"), "{request}");
}

#[tokio::test]
async fn a_request_waits_for_an_app_that_is_about_to_be_there() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(Target::Hold);
    let (backend, _seen) = app(HELLO, Duration::ZERO).await;
    let later = async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        stand.plane.set_target(Target::App { backend, closing: false });
    };
    let (answer, ()) = tokio::join!(stand.get("/"), later);
    assert_eq!((answer.status, text(&answer)), (200, "hello"));
}

#[tokio::test]
async fn the_one_too_many_does_not_wait_and_the_others_go_on() {
    let hold = Hold { timeout: PATIENCE, requests_max: 2 };
    let stand = stand_behind(|plain| Doors { hold, ..doors(plain) });
    stand.plane.set_target(Target::Hold);
    let (backend, _seen) = app(HELLO, Duration::ZERO).await;
    let wait_for = async |waiting: usize| {
        while stand.plane.shared.held.load(Ordering::Relaxed) != waiting {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let later = async {
        wait_for(2).await;
        let answer = stand.get("/").await;
        assert_eq!((answer.status, header(&answer, "retry-after")), (503, "1"));
        assert!(text(&answer).contains("\"waking\""), "{}", text(&answer));
        wait_for(2).await;
        stand.plane.set_target(Target::App { backend, closing: false });
    };
    let (one, other, ()) = tokio::join!(stand.get("/"), stand.get("/"), later);
    assert_eq!([text(&one), text(&other)], ["hello"; 2]);
    wait_for(0).await;
}

#[tokio::test]
async fn the_one_too_late_is_told_so() {
    let hold = Hold { timeout: Duration::from_millis(200), requests_max: 2 };
    let stand = stand_behind(|plain| Doors { hold, ..doors(plain) });
    stand.plane.set_target(Target::Hold);
    let began = bots_core::shell::Clock::now();
    let answer = stand.get("/").await;
    assert_eq!((answer.status, header(&answer, "retry-after")), (503, "1"));
    assert!(bots_core::shell::Clock::now().since(began).to_std() >= hold.timeout, "it has waited");
    assert_eq!((stand.plane.shared.held.load(Ordering::Relaxed), stand.plane.meter().counts().0), (0, 0));
    // Its place is free.
    let (backend, _seen) = app(HELLO, Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend, closing: false });
    assert_eq!(stand.get("/").await.status, 200);
}

#[tokio::test]
async fn what_is_safe_is_tried_again_and_what_is_not_is_told() {
    let stand = stand(PATIENCE);
    // It takes the request and breaks off without a word.
    let (dying, mut seen) = app("", Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend: Arc::clone(&dying), closing: false });
    let answer = stand.ask(Method::POST, "/", HeaderMap::new(), "once").await;
    assert_eq!(answer.status, 502, "{}", text(&answer));
    assert!(seen.recv().await.expect("sent once").starts_with("POST"));
    let (healthy, _seen) = app(HELLO, Duration::ZERO).await;
    let swap = async {
        assert!(seen.recv().await.expect("sent").starts_with("GET"));
        stand.plane.set_target(Target::App { backend: healthy, closing: false });
    };
    let (answer, ()) = tokio::join!(stand.get("/"), swap);
    assert_eq!((answer.status, text(&answer)), (200, "hello"));
    assert!(seen.try_recv().is_err(), "the write was sent once");
}

#[tokio::test]
async fn an_app_that_hangs_is_a_504_and_one_that_is_gone_a_502() {
    let stand = stand(Duration::from_millis(200));
    let (slow, _seen) = app(HELLO, PATIENCE).await;
    stand.plane.set_target(Target::App { backend: slow, closing: false });
    assert_eq!(stand.get("/").await.status, 504);
    let port = bots_core::shell::testing::free_port().expect("port");
    let gone = Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() });
    stand.plane.set_target(Target::App { backend: gone, closing: false });
    assert_eq!(stand.get("/").await.status, 502);
}

#[tokio::test]
async fn requests_of_an_old_instance_are_counted_until_they_end() {
    let stand = stand(PATIENCE);
    let (old, mut seen) = app(HELLO, Duration::from_millis(300)).await;
    stand.plane.set_target(Target::App { backend: Arc::clone(&old), closing: false });
    let swap = async {
        seen.recv().await.expect("the request has arrived");
        stand.plane.set_target(files("bbbb"));
        assert_eq!(old.meter.counts().0, 1);
        assert_eq!(text(&stand.get("/").await), "page of bbbb");
        old.meter.still().await;
    };
    let (answer, ()) = tokio::join!(stand.get("/slow"), swap);
    assert_eq!((answer.status, header(&answer, "x-bots-revision")), (200, "aaaa"));
}
