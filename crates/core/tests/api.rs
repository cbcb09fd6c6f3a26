//! The API's limits: who may change something, how large a request may be, and what its small client makes of answers.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use axum::{Router, routing::post};
use bots_core::{
    machine::Span,
    shell::{
        Clock, Exit, Metrics, Secret, StatusHub,
        api::{Api, BODY_BYTES_MAX, Server, router},
        config::{Credentials, RestApi},
        http::{self, HttpError, Response},
        status::Identity,
    },
};
use bytes::Bytes;
use hyper::{HeaderMap, Method, header};

const DEADLINE: Duration = Duration::from_secs(10);

fn identity() -> Identity {
    Identity {
        name: "a".into(),
        scope: "s".into(),
        namespace: "service".into(),
        kind: "test".into(),
        instance: "i".into(),
        version: "0".into(),
    }
}

async fn serve(listen: &str, password: Option<&str>) -> Server {
    let hub = StatusHub::new(identity());
    let authentication = password.map(|password| Credentials {
        username: "me".into(),
        password: Some(Secret::new(password)),
        password_file: None,
    });
    let config = RestApi { listen: listen.parse().expect("address"), authentication, ..RestApi::default() };
    let own = Router::new().route("/change", post(|body: Bytes| async move { format!("{} bytes", body.len()) }));
    let hook = Router::new().route("/hook", post(|| async { "hooked" }));
    Api::bind(&config).await.expect("bind").serve(router(&hub, &Metrics::new()), own, hook)
}

async fn ask(server: &Server, method: Method, path: &str, authorization: Option<&str>, body: usize) -> Response {
    let mut headers = HeaderMap::new();
    if let Some(value) = authorization {
        headers.insert(header::AUTHORIZATION, value.parse().expect("header"));
    }
    let url = format!("http://127.0.0.1:{}{path}", server.address().port());
    http::request(method, &url, headers, Bytes::from(vec![b'x'; body]), DEADLINE, BODY_BYTES_MAX)
        .await
        .expect("an answer")
}

async fn post_status(server: &Server, path: &str, authorization: Option<&str>) -> u16 {
    ask(server, Method::POST, path, authorization, 1).await.status
}

#[tokio::test]
async fn a_password_guards_what_changes_something_and_nothing_else() {
    let server = serve("127.0.0.1:0", Some("secret")).await;
    assert_eq!(ask(&server, Method::GET, "/status", None, 0).await.status, 200);
    let refused = ask(&server, Method::POST, "/change", None, 1).await;
    assert_eq!((refused.status, refused.headers.contains_key(header::WWW_AUTHENTICATE)), (401, true));
    assert_eq!(post_status(&server, "/change", Some("Basic bWU6d3Jvbmc=")).await, 401);
    assert_eq!(post_status(&server, "/change", Some("Basic bWU6c2VjcmV0")).await, 200);
    assert_eq!(post_status(&server, "/hook", None).await, 200, "it checks a signature of its own");
}

#[tokio::test]
async fn without_a_password_only_this_machine_may_change_something() {
    let server = serve("127.0.0.1:0", None).await;
    assert_eq!(post_status(&server, "/change", None).await, 200);
    server.stop().await;
    let server = serve("0.0.0.0:0", None).await;
    assert_eq!(ask(&server, Method::GET, "/status", None, 0).await.status, 200);
    assert_eq!(post_status(&server, "/change", None).await, 403);
    assert_eq!(post_status(&server, "/nowhere", None).await, 404);
}

#[tokio::test]
async fn a_web_page_changes_nothing_on_the_machine_of_whoever_looks_at_it() {
    for (password, given) in [(None, None), (Some("secret"), Some("Basic bWU6c2VjcmV0"))] {
        let server = serve("127.0.0.1:0", password).await;
        let url = format!("http://127.0.0.1:{}", server.address().port());
        for origin in ["https://example.org", &url, "null"] {
            let mut headers = HeaderMap::from_iter([(header::ORIGIN, origin.parse().expect("header"))]);
            headers.extend(given.map(|value| (header::AUTHORIZATION, value.parse().expect("header"))));
            let send = |method, path| {
                let url = format!("{url}{path}");
                let headers = headers.clone();
                async move { http::request(method, &url, headers, Bytes::new(), DEADLINE, BODY_BYTES_MAX).await }
            };
            assert_eq!(send(Method::POST, "/change").await.expect("an answer").status, 403, "{origin}");
            assert_eq!(send(Method::GET, "/status").await.expect("an answer").status, 200, "looking is harmless");
        }
    }
}

#[tokio::test]
async fn a_body_has_a_limit() {
    let server = serve("127.0.0.1:0", None).await;
    assert_eq!(ask(&server, Method::POST, "/change", None, BODY_BYTES_MAX).await.status, 200);
    assert_eq!(ask(&server, Method::POST, "/change", None, BODY_BYTES_MAX + 1).await.status, 413);
}

/// The server closes with a part of the head unread, which may take its answer along: what counts is that it takes no such head.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_has_a_limit() {
    let server = serve("127.0.0.1:0", None).await;
    let mut stream = connect(&server);
    let head = format!("GET /status HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "x".repeat(HEAD_TOO_LONG));
    let _shown_out_early = stream.write_all(head.as_bytes());
    let mut answer = Vec::new();
    let _cut_off = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 431"), "{text}");
    assert_eq!(ask(&server, Method::GET, "/status", None, 0).await.status, 200);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let server = serve("127.0.0.1:0", None).await;
    let config = RestApi { listen: server.address(), ..RestApi::default() };
    let Err(Exit { code, message }) = Api::bind(&config).await else { panic!("bound twice") };
    assert_eq!(code, 4);
    assert!(message.contains(&server.address().to_string()), "{message}");
}

#[tokio::test]
async fn the_client_says_what_went_wrong() {
    let server = serve("127.0.0.1:0", None).await;
    let url = format!("http://{}/status", server.address());
    let cut = http::request(Method::GET, &url, HeaderMap::new(), Bytes::new(), DEADLINE, 10).await;
    assert!(matches!(cut, Err(HttpError::TooLarge { limit: 10, .. })), "{cut:?}");
    assert!(matches!(http::get("https://a/", DEADLINE).await, Err(HttpError::Url(_))));
    assert!(matches!(http::get("nonsense", DEADLINE).await, Err(HttpError::Url(_))));
    let silent = TcpListener::bind("127.0.0.1:0").expect("bind");
    let url = format!("http://{}/", silent.local_addr().expect("address"));
    assert!(matches!(http::get(&url, Duration::from_millis(100)).await, Err(HttpError::Deadline(_))));
    drop(silent);
    assert!(matches!(http::get(&url, DEADLINE).await, Err(HttpError::Connect { .. })));
    assert_eq!(http::probe_instance(&url, &identity()).await, None);
}

/// Twice what a head may have: hyper's limit is a soft one.
const HEAD_TOO_LONG: usize = 256 * 1024;

/// More clients than there are places.
const CROWD: usize = 300;

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", server.address().port())).expect("connect");
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_clients_cost_nobody_anything() {
    let server = serve("127.0.0.1:0", None).await;
    let mut crowd: Vec<TcpStream> = (0..CROWD).map(|_| connect(&server)).collect();
    for (n, stream) in crowd.iter_mut().enumerate() {
        if n % 2 == 0 {
            stream.write_all(b"GET /status HTTP/1.1\r\nhost:").expect("half a request");
        }
    }
    let began = Clock::now();
    assert_eq!(ask(&server, Method::GET, "/status", None, 0).await.status, 200);
    let took = Clock::now().since(began);
    assert!(took < Span::from_secs(1), "one that asks waited for {took}");
    // Those that stay silent are shown out in the end.
    let mut last = crowd.pop().expect("one of them");
    assert_eq!(last.read(&mut [0; 1]).expect("closed, not cut off by our own deadline"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_serves_many_requests_and_a_body_must_arrive_in_time() {
    let server = serve("127.0.0.1:0", None).await;
    let mut stream = connect(&server);
    let mut answer = vec![0; 4_096];
    for _ in 0..3 {
        stream.write_all(b"POST /change HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab").expect("a request");
        let read = stream.read(&mut answer).expect("an answer");
        let text = String::from_utf8_lossy(&answer[..read]);
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("2 bytes"), "{text}");
    }
    stream.set_read_timeout(Some(DEADLINE * 2)).expect("a deadline");
    stream.write_all(b"POST /change HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\na").expect("half a body");
    let began = Clock::now();
    let read = stream.read(&mut answer).expect("an answer");
    let text = String::from_utf8_lossy(&answer[..read]);
    assert!(text.starts_with("HTTP/1.1 4"), "{text}");
    let took = Clock::now().since(began);
    assert!(took < Span::from_secs(15), "after {took}");
}
