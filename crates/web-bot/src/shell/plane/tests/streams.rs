//! Connections that stay: HTTP/2 with and without TLS, a new certificate, WebSocket, events, long bodies.

use std::{path::Path, process::Command};

use super::*;
use crate::shell::plane::Keys;

/// Asks with the real curl; yields what it prints.
fn curl(args: &[&str]) -> String {
    let done = Command::new("curl").args(["--silent", "--show-error", "--max-time", "10"]).args(args).output();
    let done = done.expect("curl is installed");
    assert!(done.status.success(), "curl {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text")
}

/// A certificate of its own making, for `localhost`.
fn certificate(dir: &Path, name: &str) -> TlsFiles {
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let subject = format!("/CN={name}");
    let args = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let made = Command::new("openssl")
        .args(args)
        .args(["-subj", &subject, "-addext", "subjectAltName=DNS:localhost"])
        .args([Path::new("-keyout"), &key, Path::new("-out"), &certificate])
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    TlsFiles { certificate, key }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_is_spoken_to_who_begins_with_it() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let url = format!("http://{}/", stand.address);
    let said = curl(&["--http2-prior-knowledge", "--write-out", " %{http_version}", &url]);
    assert_eq!(said, "page of aaaa 2");
    let large =
        curl(&["--http2-prior-knowledge", "--write-out", "%{size_download}", "-o", "/dev/null", &format!("{url}big")]);
    assert_eq!(large, (32 << 20).to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_sees_the_host_and_the_cookies_of_http2_as_those_of_http1() {
    let stand = stand(PATIENCE);
    let (backend, mut seen) = app(HELLO, Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend, closing: false });
    let url = format!("http://{}/", stand.address);
    let cookies = ["-H", "cookie: a=1", "-H", "cookie: b=2"];
    assert_eq!(curl(&[&["--http2-prior-knowledge"], &cookies[..], &[url.as_str()]].concat()), "hello");
    let request = seen.recv().await.expect("a request").to_ascii_lowercase();
    let host = stand.address;
    for line in [format!("\r\nhost: {host}\r\n"), format!("\r\nx-forwarded-host: {host}\r\n")] {
        assert!(request.contains(&line), "{line} in {request}");
    }
    assert!(request.contains("\r\ncookie: a=1; b=2\r\n"), "{request}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_speaks_both_and_takes_a_new_certificate() {
    let dir = tempfile::tempdir().expect("a folder");
    let tls = certificate(dir.path(), "first");
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let port = listener.local_addr().expect("address").port();
    let stand = stand_with(PATIENCE, PATIENCE, Some((listener, tls.clone())));
    stand.plane.set_target(files("aaaa"));
    let url = format!("https://localhost:{port}/");
    let ca = tls.certificate.to_string_lossy().into_owned();
    let ask = |version: &str| curl(&["--cacert", &ca, version, "--write-out", " %{http_version}", &url]);
    assert_eq!(ask("--http2"), "page of aaaa 2");
    assert_eq!(ask("--http1.1"), "page of aaaa 1.1");
    certificate(dir.path(), "second");
    let until = bots_core::shell::Clock::now() + bots_core::machine::Span::from_secs(30);
    loop {
        let seen = Command::new("curl").args(["--silent", "--cacert", &ca, &url]).output().expect("curl runs");
        if seen.status.success() {
            break;
        }
        assert!(bots_core::shell::Clock::now() < until, "the new certificate is served");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[test]
fn half_of_a_new_pair_is_not_used() {
    let (dir, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let (files, new) = (certificate(dir.path(), "first"), certificate(other.path(), "second"));
    let keys = Keys::read(files.clone()).expect("a pair");
    let (first, mut seen) = (keys.current(), keys.mark());
    std::fs::copy(&new.key, &files.key).expect("copy");
    keys.look(&mut seen);
    assert!(Arc::ptr_eq(&keys.current(), &first), "the old one goes on");
    std::fs::copy(&new.certificate, &files.certificate).expect("copy");
    keys.look(&mut seen);
    assert!(keys.current().cert != first.cert, "the whole pair is used");
}

#[tokio::test]
async fn a_key_that_does_not_fit_is_named() {
    let (one, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let (mine, theirs) = (certificate(one.path(), "one"), certificate(other.path(), "other"));
    let check = |files: TlsFiles, expected: &str| {
        let listener = || StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let doors = Doors { tls: Some((listener(), files)), ..doors(listener()) };
        let error = Plane::start(doors, "web-1", runtime::queue().0, &Metrics::new()).err().expect("refused");
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    };
    check(TlsFiles { key: theirs.key, ..mine.clone() }, "web.tls.key");
    check(TlsFiles { certificate: mine.key.clone(), ..mine.clone() }, "web.tls.certificate");
    check(TlsFiles { key: "/nowhere".into(), ..mine }, "web.tls.key: /nowhere");
}

#[tokio::test]
async fn a_websocket_is_passed_on_both_ways_and_is_in_flight_until_its_end() {
    let stand = stand(PATIENCE);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let app = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        let mut read = vec![0; 4096];
        let n = stream.read(&mut read).await.expect("read");
        let asked = String::from_utf8_lossy(&read[..n]).to_ascii_lowercase();
        assert!(asked.contains("connection: upgrade") && asked.contains("upgrade: websocket"), "{asked}");
        assert!(asked.contains("sec-websocket-key: abc") && asked.contains("x-forwarded-for: 127.0.0.1"), "{asked}");
        let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello";
        stream.write_all(head.as_bytes()).await.expect("write");
        let mut echo = [0; 4];
        stream.read_exact(&mut echo).await.expect("read");
        stream.write_all(&echo).await.expect("write");
        let ended = stream.read(&mut read).await.expect("the end");
        assert_eq!(ended, 0);
    });
    let backend = Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() });
    stand.plane.set_target(Target::App { backend: Arc::clone(&backend), closing: false });
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    let ask = "GET /chat HTTP/1.1\r\nhost: x\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: abc\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.expect("write");
    let mut seen = String::new();
    while !seen.ends_with("hello") {
        let mut read = [0; 1024];
        let n = stream.read(&mut read).await.expect("read");
        assert!(n > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&read[..n]));
    }
    assert!(seen.starts_with("HTTP/1.1 101") && seen.to_ascii_lowercase().contains("upgrade: websocket"), "{seen}");
    stream.write_all(b"ping").await.expect("write");
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.expect("read");
    assert_eq!((&echo, backend.meter.counts().0), (b"ping", 1));
    drop(stream);
    backend.meter.still().await;
    app.await.expect("the app saw the end");
}

#[tokio::test]
async fn an_event_arrives_while_the_answer_goes_on() {
    let stand = stand(PATIENCE);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let (go_on, wait) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        let _asked = stream.read(&mut [0; 4096]).await.expect("read");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(format!("{head}9\r\ndata: 1\n\n\r\n").as_bytes()).await.expect("write");
        wait.await.expect("the first event was seen");
        stream.write_all(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n").await.expect("write");
    });
    let backend = Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() });
    stand.plane.set_target(Target::App { backend, closing: false });
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("write");
    let mut seen = String::new();
    while !seen.contains("data: 1") {
        let mut read = [0; 1024];
        let n = stream.read(&mut read).await.expect("read");
        assert!(n > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&read[..n]));
    }
    go_on.send(()).expect("the app waits");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.expect("the end");
    assert!(rest.contains("data: 2"), "{rest}");
}
