//! Requests with a body, whose end is the client's affair: a slow one takes its time, one that breaks off or stalls is told so, and
//! neither is an error of the app, which would speak against its commit.

use super::*;

/// An app that reads a request until it has all of it, `end` and all, and answers then.
async fn reader() -> Arc<Backend> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut all, mut read) = (Vec::new(), vec![0; 4096]);
                while !String::from_utf8_lossy(&all).contains("end") {
                    match stream.read(&mut read).await {
                        Ok(bytes @ 1..) => all.extend_from_slice(&read[..bytes]),
                        Ok(_) | Err(_) => return,
                    }
                }
                let _gone = stream.write_all(HELLO.as_bytes()).await;
            });
        }
    });
    Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() })
}

/// Sends parts, with a pause between two, and reads the answer; also says how many errors that was for the commit.
async fn send(stand: &Stand, parts: &[&str], pause: Duration) -> (String, u64) {
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    for part in parts {
        stream.write_all(part.as_bytes()).await.expect("write");
        tokio::time::sleep(pause).await;
    }
    let mut answer = String::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("in time");
    assert!(read.is_ok(), "{read:?}");
    (answer, stand.plane.meter().sample().0.errors)
}

const CHUNKED: &str =
    "POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";

#[tokio::test]
async fn a_client_that_breaks_off_is_no_error_of_the_commit() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(Target::App { backend: reader().await, closing: false });
    let (answer, errors) = send(&stand, &[CHUNKED, "no length\r\n"], Duration::from_millis(100)).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(errors, 0, "{answer}");
    // An app that breaks off is one.
    let (dying, _seen) = app("", Duration::ZERO).await;
    stand.plane.set_target(Target::App { backend: dying, closing: false });
    let (answer, errors) = send(&stand, &[CHUNKED, "0\r\n\r\n"], Duration::ZERO).await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert_eq!(errors, 1, "{answer}");
}

#[tokio::test]
async fn a_slow_upload_is_not_the_apps_time() {
    let stand = stand(Duration::from_millis(400));
    stand.plane.set_target(Target::App { backend: reader().await, closing: false });
    let parts = [CHUNKED, "3\r\nabc\r\n", "3\r\nabc\r\n", "3\r\nabc\r\n", "3\r\nend\r\n0\r\n\r\n"];
    let (answer, errors) = send(&stand, &parts, Duration::from_millis(600)).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(errors, 0, "{answer}");
    // From its end on, it is.
    let (slow, _seen) = app(HELLO, PATIENCE).await;
    stand.plane.set_target(Target::App { backend: slow, closing: false });
    let (answer, errors) = send(&stand, &[CHUNKED, "0\r\n\r\n"], Duration::ZERO).await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert_eq!(errors, 1, "{answer}");
}

#[tokio::test]
async fn an_upload_that_stalls_is_given_up() {
    let stand = stand_with(PATIENCE.saturating_mul(10), Duration::from_millis(300), None);
    stand.plane.set_target(Target::App { backend: reader().await, closing: false });
    let (answer, errors) = send(&stand, &[CHUNKED], Duration::ZERO).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert_eq!(errors, 0, "{answer}");
}

#[tokio::test]
async fn an_app_that_takes_nothing_of_an_upload_is_late() {
    let stand = stand(Duration::from_millis(300));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let backend = Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() });
    stand.plane.set_target(Target::App { backend, closing: false });
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 33554432\r\n\r\n").await.expect("write");
    // More than the kernel keeps for either.
    let upload = tokio::spawn(async move { stream.write_all(&vec![b'x'; 32 << 20]).await });
    let given_up = async {
        while stand.plane.meter().counts() != (0, 1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, given_up).await.expect("it is given up");
    assert_eq!(stand.plane.meter().sample().0.errors, 1);
    upload.abort();
    drop(listener);
}

#[tokio::test]
async fn a_body_up_to_the_limit_is_passed_on_and_a_larger_one_is_not() {
    let stand = stand_behind(|plain| Doors { body_max: 3, ..doors(plain) });
    stand.plane.set_target(Target::App { backend: reader().await, closing: false });
    let chunked = "POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    let whole =
        |length: usize| format!("POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    for (head, body, expected) in [
        (whole(3), "end", "HTTP/1.1 200"),
        (whole(4), "end.", "HTTP/1.1 413"),
        (chunked.to_owned(), "3\r\nend\r\n0\r\n\r\n", "HTTP/1.1 200"),
        (chunked.to_owned(), "1\r\n.\r\n3\r\nend\r\n0\r\n\r\n", "HTTP/1.1 413"),
    ] {
        let (answer, errors) = send(&stand, &[&head, body], Duration::ZERO).await;
        assert!(answer.starts_with(expected), "{head}{body}: {answer}");
        assert_eq!(errors, 0, "it is no error of the commit: {answer}");
    }
}
