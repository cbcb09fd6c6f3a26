//! What a call by curl leaves to be seen, on disk and among the processes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use bots_core::{machine::Span, shell::Clock};
use hyper::Method;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Answer, Call, Purging, clear, heard};

/// Tests of one process must not count each other's programs.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// What must not be seen.
const TOKEN: &str = "s3cret-of-the-cache";

fn names(folder: &Path) -> Vec<String> {
    let found = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = found.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The arguments of our children that are called curl.
fn curls() -> Vec<String> {
    let ours = format!("PPid:\t{}\n", std::process::id());
    let processes = fs::read_dir("/proc").expect("Linux").flatten().map(|entry| entry.path());
    let ours = processes.filter(|path| fs::read_to_string(path.join("status")).is_ok_and(|s| s.contains(&ours)));
    let arguments = ours.filter_map(|path| fs::read(path.join("cmdline")).ok());
    let text = arguments.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    text.filter(|text| text.starts_with("curl ")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_by_curl_overlap_and_show_no_secret() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scratch = TempDir::new().expect("scratch");
    // A cache that takes connections, and says nothing for as long as it is looked at.
    let cache = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = cache.local_addr().expect("bound");
    let file = scratch.path().join("token");
    fs::write(&file, TOKEN).expect("write");
    let call = Call {
        method: Method::POST,
        url: format!("https://{address}/purge"),
        headers: Vec::new(),
        header_files: vec![(String::from("x-key"), file)],
        ca_file: None,
        body: String::new(),
    };
    let make = || {
        let (call, folder) = (call.clone(), scratch.path().to_path_buf());
        tokio::spawn(async move { call.make("abc", &folder).await })
    };
    let both = [make(), make()];
    let mut connections = Vec::new();
    for _call in &both {
        let connection = tokio::time::timeout(Duration::from_secs(20), cache.accept()).await;
        connections.push(connection.expect("curl connects").expect("a connection"));
    }
    let seen = curls();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(seen.iter().all(|arguments| !arguments.contains(TOKEN)), "{seen:?}");
    let folder = scratch.path().join("calls");
    let told: Vec<String> = names(&folder).into_iter().filter(|name| name.ends_with(".config")).collect();
    assert_eq!(told.len(), 2, "each has its own: {told:?}");
    for name in told {
        assert!(fs::read_to_string(folder.join(name)).expect("there").contains(TOKEN));
    }
    drop(connections);
    for call in both {
        let ended = call.await.expect("no panic");
        assert!(ended.as_ref().is_err_and(|why| why.contains("curl ended with") && !why.contains(TOKEN)), "{ended:?}");
    }
    assert!(names(&folder).is_empty(), "{:?}", names(&folder));
    // One that is given up leaves nothing, either.
    let given_up = make();
    let began = Clock::now();
    while names(&folder).is_empty() && Clock::now().since(began) < Span::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    given_up.abort();
    assert!(given_up.await.is_err_and(|e| e.is_cancelled()));
    assert!(names(&folder).is_empty(), "{:?}", names(&folder));
    // Nor does a bot that was killed, once it is back.
    fs::write(folder.join("7.config"), TOKEN).expect("write");
    clear(scratch.path()).expect("cleared");
    assert!(!folder.exists());
}

/// A certificate of its own making for `localhost`, and a server that has it: it answers requests, whose last bytes are `end`,
/// until it has given all answers, and says what the last one was.
async fn https_server(
    dir: &Path,
    end: &'static str,
    answers: Vec<String>,
) -> (u16, PathBuf, tokio::task::JoinHandle<String>) {
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let args = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let made = std::process::Command::new("openssl")
        .args(args)
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
        .args([Path::new("-keyout"), &key, Path::new("-out"), &certificate])
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let chain: Vec<_> = CertificateDer::pem_file_iter(&certificate).expect("PEM").map(|c| c.expect("one")).collect();
    let private = PrivateKeyDer::from_pem_file(&key).expect("a key");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .expect("a pair");
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let heard = tokio::spawn(async move {
        let (mut answers, mut heard) = (answers.into_iter().peekable(), String::new());
        while answers.peek().is_some() {
            let (stream, _) = listener.accept().await.expect("a connection");
            // Who does not trust the certificate goes.
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            heard.clear();
            let mut some = [0; 4096];
            while !heard.ends_with(end) {
                let read = stream.read(&mut some).await.expect("a request");
                assert!(read > 0, "it broke off: {heard}");
                heard.push_str(std::str::from_utf8(&some[..read]).expect("text"));
            }
            let answer = answers.next().expect("there is one");
            stream.write_all(answer.as_bytes()).await.expect("taken");
            let _gone_before = stream.shutdown().await;
        }
        heard
    });
    (port, certificate, heard)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_behind_tls_is_told_if_its_certificate_is_trusted() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scratch = TempDir::new().expect("scratch");
    let answers = vec![String::from("HTTP/1.1 204 No Content\r\n\r\n")];
    let (port, certificate, heard) = https_server(scratch.path(), "all of it", answers).await;
    let file = scratch.path().join("token");
    fs::write(&file, TOKEN).expect("write");
    let mut call = Call {
        method: Method::from_bytes(b"PURGE").expect("a method"),
        url: format!("https://localhost:{port}/site?commit={{sha}}"),
        headers: Vec::new(),
        header_files: vec![(String::from("x-key"), file)],
        ca_file: None,
        body: String::from("all of it"),
    };
    let refused = call.make("abc", scratch.path()).await;
    assert!(refused.as_ref().is_err_and(|why| why.contains("certificate is not trusted")), "{refused:?}");
    call.ca_file = Some(certificate);
    assert_eq!(call.make("abc", scratch.path()).await, Ok(204));
    let heard = heard.await.expect("no panic");
    assert!(heard.starts_with("PURGE /site?commit=abc HTTP/1.1\r\n"), "{heard}");
    assert!(heard.contains(&format!("x-key: {TOKEN}\r\n")), "{heard}");
}

/// An answer of a cache that says which commit it is from.
fn page(status: &str, commit: &str) -> String {
    format!("HTTP/1.1 {status}\r\nX-Bots-Revision: {commit}\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_behind_tls_shows_whether_a_cache_has_been_purged() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scratch = TempDir::new().expect("scratch");
    let (live, old) = ("a".repeat(40), "b".repeat(40));
    let answers = vec![page("200 OK", &live), page("200 OK", &old), page("503 Service Unavailable", &live)];
    let (port, certificate, heard) = https_server(scratch.path(), "\r\n\r\n", answers).await;
    let address = format!("https://localhost:{port}/news/");
    let purge = async |ca_file: Option<&Path>| {
        let probes = vec![Call::page(&address, ca_file.map(Path::to_path_buf))];
        Purging { calls: Vec::new(), probes }.purge(&live, scratch.path()).await
    };
    let refused = |why: &str| Err(format!("{address} is not purged: {why}"));
    let stranger = purge(None).await;
    assert!(stranger.as_ref().is_err_and(|why| why.contains("certificate is not trusted")), "{stranger:?}");
    assert_eq!(purge(Some(&certificate)).await, Ok(()));
    assert_eq!(purge(Some(&certificate)).await, refused("it answers from commit `bbbbbbbb`"), "nobody has purged it");
    assert_eq!(purge(Some(&certificate)).await, refused("it answers 503"));
    let heard = heard.await.expect("no panic");
    assert!(heard.starts_with("GET /news/ HTTP/1.1\r\n"), "{heard}");
}

#[test]
fn the_last_answer_that_curl_has_heard_counts() {
    let answer = |status, revision: &str| Some(Answer { status, revision: revision.to_owned() });
    let early = "HTTP/1.1 103 Early Hints\r\nx-bots-revision: old\r\n\r\n";
    let check = |said: &str, expected: Option<Answer>| assert_eq!(heard(said.as_bytes()), expected, "{said}");
    check(&format!("{early}HTTP/2 200 \r\nage: 3\r\nX-BOTS-Revision: abc\r\n\r\n200"), answer(200, "abc"));
    check(&format!("{early}HTTP/2 404 \r\nage: 3\r\n\r\n404"), answer(404, ""));
    check("204", answer(204, ""));
    check("", None);
    check("HTTP/2 200 \r\n\r\n", None);
}
