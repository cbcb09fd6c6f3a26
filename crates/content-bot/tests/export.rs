//! Trees on disk, with a real repository and real files: whole, linked by one rename, mended, and cleared away.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::StatusCode};

use content_bot::{
    machine::{FetchResult, Reference, Trees},
    shell::{
        callers::Call,
        export::{Exporter, Hook, Plan},
        gates::Check,
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin},
        source::Source,
    },
};
use repo::Repo;
use tempfile::TempDir;

const LIMITS: Limits =
    Limits { size_max: 1_000_000, files_max: 100, look: Duration::from_secs(20), fetch: Duration::from_secs(60) };

struct Bench {
    scratch: TempDir,
    repo: Repo,
    mirror: Mirror,
}

impl Bench {
    fn new() -> Self {
        let scratch = TempDir::new().expect("scratch");
        let repo = Repo::new(scratch.path());
        let source = Source::parse(&repo.url()).expect("good");
        let nobody = Credentials::default();
        let origin = Origin::new(source, Reference::parse("main"), nobody);
        let mirror = Mirror::open(&scratch.path().join("data"), origin, LIMITS, Stop::default()).expect("a mirror");
        Self { scratch, repo, mirror }
    }

    fn push(&self, files: &[(&str, &[u8])]) -> String {
        let sha = self.repo.push(files);
        assert_eq!(self.mirror.fetch(&sha), FetchResult::Complete);
        sha
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn plan(&self) -> Plan {
        Plan {
            root: self.path("out"),
            link: self.path("out/current"),
            touch_file: Some(self.path("touched")),
            hook: Hook::default(),
            scratch: self.path("hook"),
        }
    }

    fn exporter(&self) -> Exporter {
        Exporter::open(self.plan()).expect("an exporter")
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn the_link_names_a_whole_tree_and_moves_to_the_next() {
    let bench = Bench::new();
    let exporter = bench.exporter();
    let run = bench.repo.work.join("run.sh");
    fs::write(&run, "#!/bin/sh\n").expect("write");
    fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).expect("chmod");
    symlink("index.html", bench.repo.work.join("home")).expect("link");
    let first = bench.push(&[("index.html", b"one"), ("css/a.css", b"style")]);
    exporter.put(&bench.mirror, &first).expect("exported");
    let link = bench.path("out/current");
    assert_eq!(fs::read_link(&link).expect("a link"), Path::new(".worktrees").join(&first));
    assert_eq!((read(&link.join("home")), read(&link.join("css/a.css"))), ("one".into(), "style".into()));
    assert_eq!(fs::metadata(link.join("run.sh")).expect("run").permissions().mode() & 0o111, 0o111);
    assert!(bench.path("touched").exists());

    let second = bench.push(&[("index.html", b"two")]);
    exporter.put(&bench.mirror, &second).expect("exported");
    assert_eq!(read(&link.join("index.html")), "two");
    assert_eq!(exporter.trees(), Trees { linked: Some(second.clone()), others: vec![first.clone()] });
    exporter.remove(&second);
    exporter.remove(&first);
    assert_eq!(exporter.trees(), Trees { linked: Some(second), others: vec![] });
    assert_eq!(read(&link.join("index.html")), "two");
}

#[test]
fn what_a_killed_bot_left_half_is_cleared_and_a_root_has_one_bot() {
    let bench = Bench::new();
    let sha = bench.push(&[("index.html", b"one")]);
    let exporter = bench.exporter();
    exporter.put(&bench.mirror, &sha).expect("exported");
    assert_eq!(Exporter::open(bench.plan()).expect_err("in use").code, 3);
    drop(exporter);
    let half = bench.path("out/.worktrees/.half-0123");
    fs::create_dir_all(half.join("css")).expect("half a tree");
    symlink("nowhere", bench.path("out/.current.next")).expect("half a link");
    let exporter = bench.exporter();
    assert!(!half.exists() && fs::symlink_metadata(bench.path("out/.current.next")).is_err());
    assert_eq!(exporter.trees(), Trees { linked: Some(sha), others: vec![] });
}

#[test]
fn a_damaged_tree_is_mended_where_it_stands() {
    let bench = Bench::new();
    let sha = bench.push(&[("index.html", b"one"), ("b.html", b"two")]);
    let exporter = bench.exporter();
    exporter.put(&bench.mirror, &sha).expect("exported");
    let link = bench.path("out/current");
    fs::write(link.join("index.html"), "0ne").expect("damage");
    fs::remove_file(link.join("b.html")).expect("damage");
    exporter.put(&bench.mirror, &sha).expect("mended");
    assert_eq!((read(&link.join("index.html")), read(&link.join("b.html"))), ("one".into(), "two".into()));
    assert_eq!(exporter.trees(), Trees { linked: Some(sha), others: vec![] });
}

#[test]
fn what_stands_in_the_links_place_is_left_alone() {
    let bench = Bench::new();
    let sha = bench.push(&[("index.html", b"one")]);
    let exporter = bench.exporter();
    fs::create_dir_all(bench.path("out/current/precious")).expect("a folder");
    let error = exporter.put(&bench.mirror, &sha).expect_err("refused").to_string();
    assert!(error.contains("export.link") && error.contains("no symbolic link"), "{error}");
    assert!(bench.path("out/current/precious").is_dir());
    // Elsewhere, absolute.
    drop(exporter);
    let link = bench.path("www/site");
    let exporter = Exporter::open(Plan { link: link.clone(), ..bench.plan() }).expect("an exporter");
    exporter.put(&bench.mirror, &sha).expect("exported");
    assert_eq!(fs::read_link(&link).expect("a link"), bench.path("out/.worktrees").join(&sha));
}

#[tokio::test]
async fn a_hook_runs_in_the_tree_and_its_failure_is_told() {
    let bench = Bench::new();
    let sha = bench.push(&[("index.html", b"one")]);
    let check = async |script: &str, deadline: Duration| {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        let program = Some(Check { command, deadline });
        let plan = Plan { hook: Hook { program, call: None }, ..bench.plan() };
        let exporter = Exporter::open(plan).expect("an exporter");
        exporter.put(&bench.mirror, &sha).expect("exported");
        let sha = sha.clone();
        tokio::task::spawn_blocking(move || exporter.run_hook(&sha, Stop::default())).await.expect("no panic")
    };
    let told = bench.path("told");
    let script = format!("cat index.html > {0} && echo \" $CONTENT_SHA\" >> {0}", told.display());
    check(&script, Duration::from_secs(10)).await.expect("it says yes");
    assert_eq!(read(&told), format!("one {sha}\n"));
    let error = check("echo no such host >&2; exit 3", Duration::from_secs(10)).await.expect_err("it says no");
    assert!(error.contains("export.exec_hook") && error.contains("no such host"), "{error}");
    let error = check("sleep 60", Duration::from_millis(300)).await.expect_err("too late");
    assert!(error.contains("not done within"), "{error}");
}

type Heard = Arc<Mutex<Vec<String>>>;

/// Takes down what it is told, and says no the first time.
async fn listen(
    State(heard): State<Heard>,
    method: hyper::Method,
    uri: hyper::Uri,
    headers: hyper::HeaderMap,
    body: Bytes,
) -> StatusCode {
    let key = headers.get("x-key").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let mut heard = heard.lock().expect("not poisoned");
    heard.push(format!("{method} {uri} {key} {}", String::from_utf8_lossy(&body)));
    if heard.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::NO_CONTENT }
}

#[tokio::test]
async fn a_webhook_is_told_which_commit_is_linked_and_its_refusal_is_told() {
    let bench = Bench::new();
    let sha = bench.push(&[("index.html", b"one")]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let heard = Heard::default();
    let app = Router::new().fallback(listen).with_state(Arc::clone(&heard));
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    fs::write(bench.path("key"), "a secret\n").expect("write");
    let call = Call {
        method: hyper::Method::POST,
        url: format!("http://{address}/reload?commit={{sha}}"),
        headers: Vec::new(),
        header_files: vec![(String::from("x-key"), bench.path("key"))],
        ca_file: None,
        body: String::from("now {sha}"),
    };
    let plan = Plan { hook: Hook { program: None, call: Some(call) }, ..bench.plan() };
    let exporter = Exporter::open(plan).expect("an exporter");
    exporter.put(&bench.mirror, &sha).expect("exported");
    let error = exporter.call(&sha).await.expect_err("it says no");
    assert!(error.contains("export.webhook") && error.contains("503") && !error.contains("a secret"), "{error}");
    exporter.call(&sha).await.expect("it says yes");
    server.abort();
    let expected = format!("POST /reload?commit={sha} a secret now {sha}");
    assert_eq!(*heard.lock().expect("not poisoned"), [expected.clone(), expected]);
    let error = exporter.call(&sha).await.expect_err("nobody listens");
    assert!(error.contains("export.webhook"), "{error}");
}
