//! What a commit must pass, with real keys and real programs: git signs, ssh-keygen and gpg judge.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use bots_core::shell::Clock;
use content_bot::{
    machine::{FetchResult, Reference},
    shell::{
        gates::{Check, Gates, Signers},
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin},
        source::Source,
    },
};
use repo::{Repo, git};
use tempfile::TempDir;

const LIMITS: Limits =
    Limits { size_max: 1_000_000, files_max: 100, look: Duration::from_secs(20), fetch: Duration::from_secs(60) };

struct Bench {
    scratch: TempDir,
    repo: Repo,
    mirror: Arc<Mirror>,
}

impl Bench {
    fn new(gates: impl FnOnce(&Path) -> Gates) -> Self {
        let scratch = TempDir::new().expect("scratch");
        let repo = Repo::new(scratch.path());
        let source = Source::parse(&repo.url()).expect("good");
        let nobody = Credentials::default();
        let origin = Origin::new(source, Reference::parse("main"), nobody);
        let mirror = Mirror::open(&scratch.path().join("data"), origin, LIMITS, Stop::default()).expect("a mirror");
        let mirror = Arc::new(mirror.behind(gates(scratch.path())));
        Self { scratch, repo, mirror }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Commits, signed as the work tree is set up, and fetches.
    async fn fetch(&self, page: &str) -> FetchResult {
        let sha = self.repo.push(&[("index.html", page.as_bytes())]);
        let mirror = Arc::clone(&self.mirror);
        let result = tokio::task::spawn_blocking(move || mirror.fetch(&sha)).await.expect("no panic");
        assert!(!self.path("data/checking").exists(), "nothing is left behind");
        result
    }

    async fn refused(&self, page: &str, why: &str) {
        match self.fetch(page).await {
            FetchResult::Unfit { reason } => assert!(reason.contains(why), "{reason}"),
            other => panic!("{page} must be unfit: {other:?}"),
        }
    }

    fn sign(&self, settings: &[(&str, &str)]) {
        for (name, value) in settings {
            git(&self.repo.work, &["config", name, value]);
        }
        git(&self.repo.work, &["config", "commit.gpgsign", "true"]);
    }
}

fn run(program: &str, args: &[&str]) -> Vec<u8> {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} is needed: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn ssh_key(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", text(&path)]);
    path
}

#[tokio::test]
async fn a_commit_is_signed_by_an_allowed_ssh_key() {
    let bench = Bench::new(|dir| {
        let public = fs::read_to_string(ssh_key(dir, "ours").with_extension("pub")).expect("there");
        let line = format!("editor@example.org namespaces=\"git\" {public}");
        fs::write(dir.join("allowed"), line).expect("write");
        Gates { signers: Some(Signers { ssh: Some(dir.join("allowed")), gpg: None }), check: None }
    });
    bench.refused("unsigned", "not signed").await;
    let ours = bench.path("ours");
    bench.sign(&[("gpg.format", "ssh"), ("user.signingkey", text(&ours))]);
    assert_eq!(bench.fetch("signed").await, FetchResult::Complete);
    let theirs = ssh_key(bench.scratch.path(), "theirs");
    bench.sign(&[("user.signingkey", text(&theirs))]);
    bench.refused("signed by a stranger", "by no key of verify.ssh_allowed_signers_file").await;
    // A key that was taken out counts no more, from the next commit on.
    bench.sign(&[("user.signingkey", text(&ours))]);
    fs::write(bench.path("allowed"), "# nobody\n").expect("write");
    bench.refused("signed by one who has left", "by no key").await;
    // A file that is not there says nothing about the commit.
    fs::remove_file(bench.path("allowed")).expect("remove");
    let failed = bench.fetch("signed, and nobody can say by whom").await;
    assert!(
        matches!(&failed, FetchResult::Failed { why } if why.contains("verify.ssh_allowed_signers_file")),
        "{failed:?}"
    );
}

#[tokio::test]
async fn a_commit_is_signed_by_an_allowed_gpg_key() {
    let (home, other) = (TempDir::new().expect("a home"), TempDir::new().expect("a home"));
    for dir in [&home, &other] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).expect("mode");
        let who = [
            "--batch",
            "--passphrase",
            "",
            "--quick-generate-key",
            "Editor <e@example.org>",
            "ed25519",
            "sign",
            "never",
        ];
        run("gpg", &[&["--homedir", text(dir.path())], &who[..]].concat());
    }
    let keys = run("gpg", &["--homedir", text(home.path()), "--armor", "--export"]);
    let bench = Bench::new(|dir| {
        fs::write(dir.join("keys.asc"), keys).expect("write");
        Gates { signers: Some(Signers { ssh: None, gpg: Some(dir.join("keys.asc")) }), check: None }
    });
    let program = |home: &TempDir, name: &str| {
        let path = bench.path(name);
        fs::write(&path, format!("#!/bin/sh\nexec gpg --homedir {} \"$@\"\n", text(home.path()))).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
        path
    };
    let (ours, theirs) = (program(&home, "gpg-ours"), program(&other, "gpg-theirs"));
    bench.sign(&[("gpg.program", text(&ours)), ("user.signingkey", "e@example.org")]);
    assert_eq!(bench.fetch("signed").await, FetchResult::Complete);
    bench.sign(&[("gpg.program", text(&theirs))]);
    bench.refused("signed by a stranger", "by no key of verify.gpg_keys_file").await;
    let ssh = ssh_key(bench.scratch.path(), "ssh");
    bench.sign(&[("gpg.format", "ssh"), ("user.signingkey", text(&ssh))]);
    bench.refused("signed in another way", "signed with an ssh key, and none is allowed").await;
    for dir in [&home, &other] {
        run("gpgconf", &["--homedir", text(dir.path()), "--kill", "all"]);
    }
}

/// A program of the operator's, written in shell.
fn check(dir: &Path, script: &str, deadline: Duration) -> Gates {
    let path = dir.join("check");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    let command = vec![text(&path).to_owned(), String::from("index.html")];
    Gates { signers: None, check: Some(Check { command, deadline }) }
}

#[tokio::test]
async fn a_program_looks_at_the_files_and_has_the_last_word() {
    let script = "test -n \"$CONTENT_SHA\" && test \"$PWD\" = \"$CONTENT_DIR\" && test -z \"$BOT_SECRET\" || exit 9\n\
                  grep -q good \"$1\" || { echo looking; echo \"$1 is not good\" >&2; exit 3; }";
    let bench = Bench::new(|dir| check(dir, script, Duration::from_secs(20)));
    assert_eq!(bench.fetch("good").await, FetchResult::Complete);
    bench.refused("bad", "verify.command says no (exit code 3): index.html is not good").await;
    assert_eq!(bench.fetch("good again").await, FetchResult::Complete);
    assert_eq!(bench.mirror.holds().len(), 2, "what is unfit is not kept");
}

#[tokio::test]
async fn a_program_that_does_not_end_is_ended_with_its_children() {
    let script = "sleep 300 & echo $! > \"$CONTENT_DIR/../../../child\"; wait";
    let bench = Bench::new(|dir| check(dir, script, Duration::from_millis(600)));
    match bench.fetch("slow").await {
        FetchResult::Doubtful { reason } => {
            assert!(reason.contains("verify.command was not done within 600ms"), "{reason}");
        }
        other => panic!("a busy machine may be to blame: {other:?}"),
    }
    let child = fs::read_to_string(bench.path("child")).expect("the child has begun");
    // It is killed before the refusal; a busy machine takes a moment to carry that out.
    let began = Clock::now();
    loop {
        let state = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        if state.is_empty() || state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')) {
            break;
        }
        assert!(Clock::now().since(began).as_millis() < 10_000, "the child lives on: {state}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// As the kernel does it when memory runs out.
#[tokio::test]
async fn a_program_that_is_killed_has_said_nothing() {
    let bench = Bench::new(|dir| check(dir, "kill -9 $$", Duration::from_secs(20)));
    match bench.fetch("good").await {
        FetchResult::Failed { why } => assert!(why.contains("verify.command was cut short (signal 9)"), "{why}"),
        other => panic!("the commit is not to blame: {other:?}"),
    }
}
