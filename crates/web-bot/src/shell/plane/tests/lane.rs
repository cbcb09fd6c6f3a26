//! The short way says what the long way says, and hands over what is not its own without losing or adding a byte.

use super::*;

/// Sends bytes, and reads until the other end closes.
async fn talk(stand: &Stand, request: &str) -> String {
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    read.expect("the connection is closed").expect("read");
    String::from_utf8(answer).expect("text")
}

/// The last request of a connection, which only the long way answers.
const LAST: &str = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

/// An answer as a sorted list of lines, without what tells the last one of a connection.
fn lines(answer: &str) -> Vec<String> {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let kept = head.lines().filter(|line| !line.starts_with("connection: ") && !line.starts_with("date: "));
    let mut lines: Vec<String> = kept.map(str::to_owned).collect();
    lines.sort();
    lines.push(body.to_owned());
    lines
}

#[tokio::test]
async fn both_ways_give_the_same_answers() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    for more in [
        "",
        "accept-encoding: gzip, br\r\n",
        "if-none-match: \"e1\"\r\n",
        "if-none-match: W/\"e1\", \"e7\"\r\n",
        "if-none-match: \"e7\"\r\n",
        "if-none-match: \"e7\"\r\nif-modified-since: Thu, 01 Jan 1970 00:00:00 GMT\r\n",
        "if-modified-since: Thu, 01 Jan 1970 00:00:00 GMT\r\n",
        "if-modified-since: Fri, 02 Jan 1970 00:00:00 GMT\r\n",
    ] {
        let short = format!("GET /?a=b HTTP/1.1\r\nhost: x\r\nConnection: keep-alive\r\n{more}\r\n");
        let long = format!("GET /?a=b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n");
        let both = talk(&stand, &(short + &long)).await;
        let second = both.rfind("HTTP/1.1 ").expect("two answers");
        assert!(second > 0, "{more}: two answers: {both}");
        let (first, second) = both.split_at(second);
        assert!(!first.contains("connection: close") && first.contains("\r\ndate: "), "{first}");
        assert_eq!(lines(first), lines(second), "{more}");
    }
}

#[tokio::test]
async fn requests_that_come_at_once_are_answered_in_order() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let one = "GET /index.html HTTP/1.1\r\nhost: x\r\n\r\n";
    let other = "GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n";
    let answer = talk(&stand, &format!("{one}{one}{other}{one}{LAST}")).await;
    let found: Vec<&str> = answer.split("HTTP/1.1 ").filter_map(|part| part.get(..3)).collect();
    assert_eq!(found, ["200", "200", "404", "200", "200"], "{answer}");
}

#[tokio::test]
async fn a_body_is_never_taken_for_a_request() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let smuggled = "GET /index.html HTTP/1.1\r\nhost: x\r\n\r\n";
    let (length, chunk) = (smuggled.len(), format!("{:x}", smuggled.len()));
    for (method, head, body) in [
        ("GET", format!("content-length: {length}"), smuggled.to_owned()),
        ("POST", format!("Content-Length: {length}"), smuggled.to_owned()),
        ("GET", String::from("transfer-encoding: chunked"), format!("{chunk}\r\n{smuggled}\r\n0\r\n\r\n")),
    ] {
        let first = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let answer =
            talk(&stand, &format!("{first}{method} / HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{body}{LAST}")).await;
        let answers = answer.matches("HTTP/1.1 ").count();
        assert_eq!(answers, 3, "{head}: {answer}");
    }
    for head in
        ["content-length: 5\r\ncontent-length: 6", "content-length: +5", "transfer-encoding: xchunked", "a b: c"]
    {
        let first = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let answer = talk(&stand, &format!("{first}GET / HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{smuggled}")).await;
        let found: Vec<&str> = answer.split("HTTP/1.1 ").filter_map(|part| part.get(..3)).collect();
        assert_eq!(found, ["200", "400"], "{head}: {answer}");
    }
}

#[tokio::test]
async fn a_head_in_pieces_is_answered_too() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.set_nodelay(true).expect("set");
    let request = format!("GET / HTTP/1.1\r\nhost: x\r\n\r\n{LAST}");
    for byte in request.as_bytes() {
        stream.write_all(&[*byte]).await.expect("write");
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    assert_eq!(answer.matches("page of aaaa").count(), 2, "{answer}");
}

#[tokio::test]
async fn an_idle_connection_ends_when_the_bot_leaves() {
    let stand = stand(PATIENCE);
    stand.plane.set_target(files("aaaa"));
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("write");
    let mut read = vec![0; 4096];
    assert!(stream.read(&mut read).await.expect("read") > 0);
    tokio::time::timeout(PATIENCE, stand.plane.finish()).await.expect("it ends");
    assert_eq!(stream.read(&mut read).await.expect("read"), 0);
}
