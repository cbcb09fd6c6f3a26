//! Clients that mean no good, or do not know better: what they send is refused, and costs nobody else anything.

use super::*;

/// Sends bytes, and reads until the other end closes or is silent for a while.
async fn raw(stand: &Stand, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    // The other end may have had enough before all is sent.
    let _sent = stream.write_all(request).await;
    let mut answer = Vec::new();
    loop {
        let mut read = [0; 4096];
        match tokio::time::timeout(Duration::from_secs(2), stream.read(&mut read)).await {
            Ok(Ok(n)) if n > 0 => answer.extend_from_slice(&read[..n]),
            Ok(Ok(_) | Err(_)) | Err(_) => break,
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_huge_head_is_refused() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let long = format!("GET / HTTP/1.1\r\nhost: x\r\nx-long: {}\r\n\r\n", "a".repeat(100 * 1024));
    let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(500));
    let path = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(70 * 1024));
    for head in [long, many, path] {
        let answer = raw(&stand, head.as_bytes()).await;
        // Who still sends when the other end closes may lose the answer on its way.
        let refused = ["HTTP/1.1 431", "HTTP/1.1 414"].iter().any(|status| answer.starts_with(status));
        assert!(refused || answer.is_empty(), "{answer}");
    }
    assert_eq!(stand.get("/").await.status, 200);
}

/// As it would be with an access log, which knows the long way only, and without.
async fn on_both_ways(patience: Duration, check: impl AsyncFn(&Stand)) {
    let folder = tempfile::tempdir().expect("a folder");
    for access_log in [None, Some(folder.path().join("access.log"))] {
        let stand = stand_behind(|plain| Doors { access_log, patience, ..doors(plain) });
        stand.plane.set_target(files("aaaa"));
        check(&stand).await;
    }
}

const WHOLE: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn who_sends_nothing_more_is_shown_the_door() {
    on_both_ways(Duration::from_millis(300), async |stand| {
        for first in [&b""[..], b"G", b"GET / HTTP/1.1\r\nhost: x\r\n", WHOLE] {
            let mut stream = TcpStream::connect(stand.address).await.expect("connect");
            stream.write_all(first).await.expect("write");
            let ended = async {
                let mut read = Vec::new();
                let _reset = stream.read_to_end(&mut read).await;
            };
            tokio::time::timeout(PATIENCE, ended).await.expect("the connection is closed");
        }
    })
    .await;
}

/// A drop comes sooner than patience ends, but the head never does.
#[tokio::test]
async fn who_sends_a_head_drop_by_drop_is_shown_the_door() {
    let patience = Duration::from_millis(300);
    on_both_ways(patience, async |stand| {
        let line = b"GET / HTTP/1.1\r\n";
        for (first, drops) in [(&b""[..], &line[..]), (line, b"x: "), (WHOLE, line)] {
            let mut stream = TcpStream::connect(stand.address).await.expect("connect");
            stream.write_all(first).await.expect("write");
            let (mut reads, mut writes) = stream.split();
            let dripping = async {
                for drop in drops.iter().chain(std::iter::repeat(&b'a')) {
                    if writes.write_all(&[*drop]).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(patience / 10).await;
                }
            };
            let ended = async {
                let mut read = Vec::new();
                let _reset = reads.read_to_end(&mut read).await;
            };
            let shown = async {
                tokio::select! {
                    () = ended => {}
                    () = dripping => {}
                }
            };
            tokio::time::timeout(PATIENCE, shown).await.expect("the connection is closed");
        }
    })
    .await;
}

#[tokio::test]
async fn who_does_not_read_is_cut_off() {
    let stand = stand_with(PATIENCE, Duration::from_millis(300), None);
    stand.plane.set_target(files("aaaa"));
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("write");
    let cut_off = async {
        while stand.plane.meter().counts() != (0, 1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut_off).await.expect("the answer is given up");
    // The head and some megabytes were taken by the two kernels; the end never comes.
    let mut read = Vec::new();
    let _reset = stream.read_to_end(&mut read).await;
    assert!(read.len() < 32 << 20, "{}", read.len());
}

#[tokio::test]
async fn no_request_is_smuggled_to_the_app() {
    let stand = stand(Duration::from_secs(2));
    let (backend, mut seen) = app(HELLO, Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend, closing: false });
    // Two lengths, a length that is none, an encoding that is not the last or not known: refused, never passed on.
    for head in [
        "content-length: 5\r\ncontent-length: 6",
        "content-length: +5",
        "content-length: 0x5",
        "content-length: 5, 6",
        "transfer-encoding: identity",
        "transfer-encoding: chunked, gzip",
        "transfer-encoding: xchunked",
        "transfer-encoding: chunked\r\n : x",
        "bad header: x",
        "content-length : 5",
    ] {
        let request = format!("POST / HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n");
        let answer = raw(&stand, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{head}: {answer}");
        assert!(answer.matches("HTTP/1.1").count() == 1, "{head}: {answer}");
    }
    assert!(seen.try_recv().is_err(), "nothing has reached the app");
    // Both a length and chunks: the app sees one of them, and as much body as both ends count.
    let both =
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let answer = raw(&stand, both.as_bytes()).await;
    if answer.starts_with("HTTP/1.1 200") {
        let asked = seen.recv().await.expect("a request").to_ascii_lowercase();
        assert!(asked.contains("transfer-encoding: chunked") && !asked.contains("content-length"), "{asked}");
    } else {
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    // A chunk whose length is none breaks the request off.
    let bad = "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n";
    raw(&stand, bad.as_bytes()).await;
    while let Ok(asked) = seen.try_recv() {
        assert!(!asked.contains("/smuggled"), "{asked}");
    }
}

#[tokio::test]
async fn paths_do_not_leave_the_site_on_the_wire_either() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    for path in
        ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/.git/config", "http://x/../etc/passwd"]
    {
        let answer =
            raw(&stand, format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 404") || answer.starts_with("HTTP/1.1 400"), "{path}: {answer}");
    }
}
