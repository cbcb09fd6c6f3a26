//! Credentials over HTTP, against git's own server: asked for, read afresh from the file, never shown.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
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
        origin::{Credentials, Limits, Origin, Reach},
        source::Source,
        submodules::Submodules,
    },
};
use repo::{Repo, git};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LIMITS: Limits =
    Limits { size_max: 10_000_000, files_max: 100, look: Duration::from_secs(20), fetch: Duration::from_secs(20) };

/// `bot:s3cret`.
const AUTHORIZATION: &str = "Basic Ym90OnMzY3JldA==";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_are_shown_and_rotate() {
    let scratch = TempDir::new().expect("scratch");
    let repo = Repo::new(scratch.path());
    let sha = repo.push(&[("page", b"behind a door")]);
    let (address, _shown) = server(scratch.path()).await;

    let data = scratch.path().join("data");
    let token = scratch.path().join("token");
    let checks = tokio::task::spawn_blocking(move || {
        let open = |url: &str, password: Option<&str>, file: Option<PathBuf>| {
            let credentials = Credentials {
                username: file.is_some().then(|| String::from("bot")),
                password: password.map(Secret::new),
                password_file: file,
                ..Credentials::default()
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
}

/// The host is nowhere: only a proxy could know it.
#[test]
fn an_origin_behind_a_proxy_is_asked_for_at_the_proxy() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let proxy = listener.local_addr().expect("bound");
    let asked = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut head = [0; 1_000];
        let read = stream.read(&mut head).expect("a request");
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").expect("an answer");
        String::from_utf8_lossy(&head[..read]).into_owned()
    });
    let nobody = Credentials::default();
    let reach = Reach { proxy: Some(Secret::new(format!("http://{proxy}"))), depth: 0 };
    let source = Source::parse("https://git.invalid/origin.git").expect("url");
    let looked =
        Origin::new(source, Reference::parse("main"), nobody).reached(reach).look(Stop::default(), LIMITS.look);
    assert!(matches!(&looked, PollResult::Failed { why } if why.contains("proxy")), "{looked:?}");
    let asked = asked.join().expect("no panic");
    assert!(asked.starts_with("CONNECT git.invalid:443 HTTP/1.1\r\n"), "{asked}");
}

/// A host that only the proxy knows, behind TLS that it does not end: everything comes through its tunnel.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_goes_through_a_proxy() {
    let scratch = TempDir::new().expect("scratch");
    let repo = Repo::new(scratch.path());
    let noise: Vec<u8> = (0..50_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    let sha = repo.push(&[("page", b"behind a proxy"), ("noise", &noise)]);
    let (git_host, _shown) = server(scratch.path()).await;
    let (certificate, tls) = certified(scratch.path(), "git.invalid");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let (proxy, asked) = proxy(git_host, acceptor).await;
    let reach = Reach { proxy: Some(Secret::new(format!("http://{proxy}"))), depth: 0 };
    let data = scratch.path().join("data");
    let commit = sha.clone();
    let fetched = tokio::task::spawn_blocking(move || {
        #[expect(unsafe_code, reason = "libgit2's global options are not synchronised")]
        // SAFETY: a test is a process of its own, and this one has not used libgit2 yet.
        unsafe {
            git2::opts::set_ssl_cert_file(&certificate).expect("libgit2 takes a certificate");
        }
        let bot = Credentials {
            username: Some(String::from("bot")),
            password: Some(Secret::new("s3cret")),
            ..Credentials::default()
        };
        let source = Source::parse("https://git.invalid/origin.git").expect("url");
        let origin = Origin::new(source, Reference::parse("main"), bot).reached(reach);
        let mirror = Mirror::open(&data, origin, LIMITS, Stop::default()).expect("a mirror");
        let looked = mirror.origin().look(Stop::default(), LIMITS.look);
        (looked, mirror.fetch(&commit))
    });
    assert_eq!(fetched.await.expect("no panic"), (PollResult::Found { sha }, FetchResult::Complete));
    let asked = asked.lock().expect("not poisoned").clone();
    assert!(asked.len() >= 2, "to look, and to fetch: {asked:?}");
    assert!(asked.iter().all(|line| line == "CONNECT git.invalid:443 HTTP/1.1"), "{asked:?}");
}

/// A certificate of its own making for `host`: the file, and a server's configuration with it.
fn certified(dir: &Path, host: &str) -> (PathBuf, rustls::ServerConfig) {
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let args = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let made = Command::new("openssl")
        .args(args)
        .args(["-subj", &format!("/CN={host}"), "-addext", &format!("subjectAltName=DNS:{host}")])
        .args([Path::new("-keyout"), &key, Path::new("-out"), &certificate])
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let chain: Vec<_> = CertificateDer::pem_file_iter(&certificate).expect("PEM").map(|c| c.expect("one")).collect();
    let private = PrivateKeyDer::from_pem_file(&key).expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .expect("a pair");
    (certificate, config)
}

/// A proxy that lets everybody through to one host, whose TLS it ends behind the tunnel; and the first lines that it was sent.
async fn proxy(host: SocketAddr, tls: tokio_rustls::TlsAcceptor) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (address, asked) = (listener.local_addr().expect("bound"), Arc::<Mutex<Vec<String>>>::default());
    let lines = Arc::clone(&asked);
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.expect("a client");
            let (tls, lines) = (tls.clone(), Arc::clone(&lines));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.expect("a request"));
                }
                let first = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
                lines.lock().expect("not poisoned").push(first);
                client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.expect("an answer");
                let mut client = tls.accept(client).await.expect("TLS");
                let mut server = tokio::net::TcpStream::connect(host).await.expect("the host");
                // Either may go when it has what it wanted.
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, asked)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_submodule_at_another_host_is_shown_no_credentials() {
    let scratch = TempDir::new().expect("scratch");
    let [site, theme] = ["site", "theme"].map(|name| {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).expect("mkdir");
        Repo::new(&dir)
    });
    let style = theme.push(&[("theme.css", b"a style")]);
    // One serves the site, and the theme too; to the other the credentials are none of its business.
    let (own, shown_own) = server(scratch.path()).await;
    let (other, shown_other) = server(scratch.path()).await;
    let with_theme_at = |url: &str| {
        let text = format!("[submodule \"theme\"]\n\tpath = theme\n\turl = {url}\n");
        fs::write(site.work.join(".gitmodules"), text).expect("write");
        fs::create_dir_all(site.work.join("theme")).expect("mkdir");
        git(&site.work, &["update-index", "--add", "--cacheinfo", &format!("160000,{style},theme")]);
        site.push(&[("index.html", url.as_bytes())])
    };
    let elsewhere = with_theme_at(&format!("http://{other}/theme/origin.git"));
    let in_its_address = with_theme_at(&format!("http://{own}@{other}/theme/origin.git"));
    let beside = with_theme_at("../../theme/origin.git");
    let data = scratch.path().join("data");
    let checks = tokio::task::spawn_blocking(move || {
        let mirrors = std::cell::Cell::new(0);
        // A mirror for each: one that has the theme already would not ask for it.
        let fetch = |url: &str, credentials: Credentials, sha: &str| {
            mirrors.set(mirrors.get() + 1);
            let data = data.join(mirrors.get().to_string());
            let origin = Origin::new(Source::parse(url).expect("url"), Reference::parse("main"), credentials);
            let mirror = Mirror::open(&data, origin, LIMITS, Stop::default()).expect("a mirror");
            mirror.following(Submodules::Recursive).fetch(sha)
        };
        let nobody = Credentials::default;
        let bot =
            || Credentials { username: Some(String::from("bot")), password: Some(Secret::new("s3cret")), ..nobody() };
        let (plain, with_password) =
            (format!("http://{own}/site/origin.git"), format!("http://bot:s3cret@{own}/site/origin.git"));
        for (url, credentials) in [(&plain, bot()), (&with_password, nobody())] {
            for sha in [&elsewhere, &in_its_address] {
                let result = fetch(url, credentials.clone(), sha);
                assert!(!matches!(result, FetchResult::Complete), "the other asks for a password: {result:?}");
                assert!(!format!("{result:?}").contains("s3cret"), "{result:?}");
            }
            assert_eq!(fetch(url, credentials, &beside), FetchResult::Complete, "at the same host they count");
        }
    });
    checks.await.expect("the checks hold");
    let shown = shown_other.lock().expect("not poisoned").clone();
    assert!(!shown.is_empty(), "it was asked");
    assert!(shown.iter().all(|value| value.as_deref() != Some(AUTHORIZATION)), "{shown:?}");
    assert!(shown_own.lock().expect("not poisoned").iter().any(|value| value.as_deref() == Some(AUTHORIZATION)));
}

/// What a server was shown as `Authorization`, request by request.
type Shown = Arc<Mutex<Vec<Option<String>>>>;

/// A server of all repositories below `root`, which ends with the test.
async fn server(root: &Path) -> (SocketAddr, Shown) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let shown = Shown::default();
    let app = Router::new().fallback(serve).with_state((Arc::new(root.to_path_buf()), Arc::clone(&shown)));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, shown)
}

/// git's CGI program behind basic authentication.
async fn serve(State((root, shown)): State<(Arc<PathBuf>, Shown)>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let authorization = head.headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
    shown.lock().expect("not poisoned").push(authorization);
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
