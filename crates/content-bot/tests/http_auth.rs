//! Credentials over HTTP, against git's own server: asked for, read afresh from the file, never shown.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use bots_core::shell::Secret;
use content_bot::{
    machine::{FetchResult, PollResult, Reference},
    shell::{
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin},
        source::Source,
    },
};
use repo::Repo;
use tempfile::TempDir;

const LIMITS: Limits =
    Limits { size_max: 10_000_000, files_max: 100, look: Duration::from_secs(20), fetch: Duration::from_secs(20) };

/// `bot:s3cret`.
const AUTHORIZATION: &str = "Basic Ym90OnMzY3JldA==";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_are_shown_and_rotate() {
    let scratch = TempDir::new().expect("scratch");
    let repo = Repo::new(scratch.path());
    let sha = repo.push(&[("page", b"behind a door")]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let app = Router::new().fallback(serve).with_state(Arc::new(scratch.path().to_path_buf()));
    let server = tokio::spawn(async move { axum::serve(listener, app).await });

    let data = scratch.path().join("data");
    let token = scratch.path().join("token");
    let checks = tokio::task::spawn_blocking(move || {
        let open = |url: &str, password: Option<&str>, file: Option<PathBuf>| {
            let credentials = Credentials {
                username: file.is_some().then(|| String::from("bot")),
                password: password.map(Secret::new),
                password_file: file,
                ssh_key_file: None,
                ssh_key_passphrase: None,
                known_hosts_file: None,
            };
            let origin = Origin::new(Source::parse(url).expect("url"), Reference::parse("main"), credentials);
            Mirror::open(&data, origin, LIMITS, Stop::default()).expect("a mirror")
        };
        let url = format!("http://{address}/origin.git");
        let why = |mirror: &Mirror| match mirror.origin().look(Stop::default(), LIMITS.look) {
            PollResult::Failed { why } => why,
            other => panic!("{other:?}"),
        };

        let nobody = open(&url, None, None);
        assert!(why(&nobody).contains("set git.username and git.password_file"), "{}", why(&nobody));
        drop(nobody);

        let stranger = open(&format!("http://bot:wr0ng@{address}/origin.git"), None, None);
        let complaint = why(&stranger);
        assert!(complaint.starts_with(&format!("cannot read {url}: ")) && !complaint.contains("wr0ng"), "{complaint}");
        drop(stranger);

        fs::write(&token, "old token\n").expect("write");
        let bot = open(&url, None, Some(token.clone()));
        assert!(why(&bot).contains("refuses the credentials"), "{}", why(&bot));
        fs::write(&token, "s3cret\n").expect("write");
        assert_eq!(bot.origin().look(Stop::default(), LIMITS.look), PollResult::Found { sha: sha.clone() });
        assert_eq!(bot.fetch(&sha), FetchResult::Complete);
        drop(bot);

        let in_url = open(&format!("http://bot:s3cret@{address}/origin.git"), None, None);
        assert_eq!(in_url.origin().look(Stop::default(), LIMITS.look), PollResult::Found { sha });
    });
    checks.await.expect("the checks hold");
    server.abort();
}

/// git's CGI program behind basic authentication.
async fn serve(State(root): State<Arc<PathBuf>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    if head.headers.get(header::AUTHORIZATION).is_none_or(|v| v != AUTHORIZATION) {
        return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Basic realm=\"git\"")]).into_response();
    }
    let body = axum::body::to_bytes(axum::body::Body::new(body), 1_000_000).await.expect("a body");
    let content_type = head.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root.as_path())
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("PATH_INFO", head.uri.path())
        .env("QUERY_STRING", head.uri.query().unwrap_or_default())
        .env("REQUEST_METHOD", head.method.as_str())
        .env("CONTENT_TYPE", content_type)
        .env("CONTENT_LENGTH", body.len().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("git");
    child.stdin.take().expect("piped").write_all(&body).expect("write");
    let out = child.wait_with_output().expect("git").stdout;
    let end = out.windows(4).position(|w| w == b"\r\n\r\n").expect("headers");
    let text = String::from_utf8_lossy(&out[..end]).into_owned();
    let kind = text.lines().find_map(|l| l.strip_prefix("Content-Type: ")).unwrap_or_default().to_owned();
    ([(header::CONTENT_TYPE, kind)], Bytes::copy_from_slice(&out[end + 4..])).into_response()
}
