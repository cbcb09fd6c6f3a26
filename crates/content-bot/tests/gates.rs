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
        Self::of("main", gates)
    }

    fn of(reference: &str, gates: impl FnOnce(&Path) -> Gates) -> Self {
        let scratch = TempDir::new().expect("scratch");
        let repo = Repo::new(scratch.path());
        let source = Source::parse(&repo.url()).expect("good");
        let nobody = Credentials::default();
        let origin = Origin::new(source, Reference::parse(reference), nobody);
        let mirror = Mirror::open(&scratch.path().join("data"), origin, LIMITS, Stop::default()).expect("a mirror");
        let mirror = Arc::new(mirror.behind(gates(scratch.path())));
        Self { scratch, repo, mirror }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Commits, signed as the work tree is set up, and fetches.
    async fn fetch(&self, page: &str) -> FetchResult {
        self.fetch_commit(self.repo.push(&[("index.html", page.as_bytes())])).await
    }

    async fn fetch_commit(&self, sha: String) -> FetchResult {
        let mirror = Arc::clone(&self.mirror);
        let result = tokio::task::spawn_blocking(move || mirror.fetch(&sha)).await.expect("no panic");
        assert!(!self.path("data/checking").exists(), "nothing is left behind");
        result
    }

    async fn refused(&self, page: &str, why: &str) {
        check_unfit(&self.fetch(page).await, why);
    }

    fn sign(&self, settings: &[(&str, &str)]) {
        self.sign_with(settings);
        git(&self.repo.work, &["config", "commit.gpgsign", "true"]);
    }

    /// With what is signed that is told so: tags.
    fn sign_with(&self, settings: &[(&str, &str)]) {
        for (name, value) in settings {
            git(&self.repo.work, &["config", name, value]);
        }
    }

    /// Commits, makes a tag of it with these options of git, pushes both, and fetches.
    async fn release(&self, tag: &str, options: &[&str]) -> FetchResult {
        let sha = self.repo.push(&[("index.html", tag.as_bytes())]);
        git(&self.repo.work, &[&["tag"], options, &[tag]].concat());
        git(&self.repo.work, &["push", "--quiet", "--force", "--tags"]);
        self.fetch_commit(sha).await
    }
}

const SIGNED: [&str; 3] = ["--sign", "--message", "a release"];

fn check_unfit(result: &FetchResult, why: &str) {
    let FetchResult::Unfit { reason } = result else { panic!("it must be unfit: {why}: {result:?}") };
    assert!(reason.contains(why), "{reason}");
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

/// Lets in what is signed with the key `ours`, which it makes.
fn signed_by_ours(dir: &Path) -> Gates {
    let public = fs::read_to_string(ssh_key(dir, "ours").with_extension("pub")).expect("there");
    let line = format!("editor@example.org namespaces=\"git\" {public}");
    fs::write(dir.join("allowed"), line).expect("write");
    Gates { signers: Some(Signers { ssh: Some(dir.join("allowed")), gpg: None }), check: None }
}

/// The key of somebody at GPG.
struct Gpg(TempDir);

impl Gpg {
    /// Made now, unless another time is given, and good for so long.
    fn new(at: Option<&str>, good_for: &str) -> Self {
        let home = TempDir::new().expect("a home");
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700)).expect("mode");
        let gpg = Self(home);
        let time = at.map(|at| ["--faked-system-time", at]);
        let generate =
            ["--passphrase", "", "--quick-generate-key", "Editor <e@example.org>", "ed25519", "sign", good_for];
        gpg.run(&[time.as_ref().map_or(&[][..], |time| &time[..]), &generate].concat());
        gpg
    }

    fn run(&self, args: &[&str]) -> Vec<u8> {
        run("gpg", &[&["--homedir", text(self.0.path()), "--batch"], args].concat())
    }

    /// Where its public key is, in `dir`.
    fn export(&self, dir: &Path) -> PathBuf {
        let path = dir.join("keys.asc");
        fs::write(&path, self.run(&["--armor", "--export"])).expect("write");
        path
    }

    /// Lets in what is signed with it.
    fn gates(&self, dir: &Path) -> Gates {
        Gates { signers: Some(Signers { ssh: None, gpg: Some(self.export(dir)) }), check: None }
    }

    /// What git is to call for a signature, at a time of our choosing.
    fn program(&self, at: Option<&str>) -> PathBuf {
        let path = self.0.path().join("signs");
        let time = at.map(|at| format!("--faked-system-time {at}")).unwrap_or_default();
        let script = format!("#!/bin/sh\nexec gpg --homedir {} {time} \"$@\"\n", text(self.0.path()));
        fs::write(&path, script).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
        path
    }

    /// Has the bench sign with it.
    fn sign(&self, bench: &Bench, at: Option<&str>) {
        let program = self.program(at);
        bench.sign_with(&[
            ("gpg.format", "openpgp"),
            ("gpg.program", text(&program)),
            ("user.signingkey", "e@example.org"),
        ]);
    }

    /// With the certificate that gpg has made beside the key.
    fn revoke(&self) {
        let made = fs::read_dir(self.0.path().join("openpgp-revocs.d")).expect("gpg makes one").next().expect("one");
        let path = made.expect("readable").path();
        let usable = fs::read_to_string(&path).expect("text").replace(":-----BEGIN", "-----BEGIN");
        fs::write(&path, usable).expect("write");
        self.run(&["--import", text(&path)]);
    }
}

impl Drop for Gpg {
    fn drop(&mut self) {
        let _ended = Command::new("gpgconf").args(["--homedir", text(self.0.path()), "--kill", "all"]).output();
    }
}

#[tokio::test]
async fn a_commit_is_signed_by_an_allowed_ssh_key() {
    let bench = Bench::new(signed_by_ours);
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
    let (ours, theirs) = (Gpg::new(None, "never"), Gpg::new(None, "never"));
    let bench = Bench::new(|dir| ours.gates(dir));
    git(&bench.repo.work, &["config", "commit.gpgsign", "true"]);
    ours.sign(&bench, None);
    assert_eq!(bench.fetch("signed").await, FetchResult::Complete);
    theirs.sign(&bench, None);
    bench.refused("signed by a stranger", "by no key of verify.gpg_keys_file").await;
    let ssh = ssh_key(bench.scratch.path(), "ssh");
    bench.sign(&[("gpg.format", "ssh"), ("user.signingkey", text(&ssh))]);
    bench.refused("signed in another way", "signed with an ssh key, and none is allowed").await;
}

#[tokio::test]
async fn a_gpg_key_that_has_expired_or_was_revoked_counts_no_more() {
    let old = Gpg::new(Some("20200101T000000"), "1y");
    let bench = Bench::new(|dir| old.gates(dir));
    git(&bench.repo.work, &["config", "commit.gpgsign", "true"]);
    old.sign(&bench, Some("20200301T000000"));
    bench.refused("signed in time", "its signature or its key has expired").await;

    let lost = Gpg::new(None, "never");
    lost.export(bench.scratch.path());
    lost.sign(&bench, None);
    let sha = bench.repo.push(&[("index.html", b"signed before it was lost")]);
    assert_eq!(bench.fetch_commit(sha.clone()).await, FetchResult::Complete);
    lost.revoke();
    lost.export(bench.scratch.path());
    check_unfit(&bench.fetch_commit(sha).await, "its signature is by a key that was revoked");
}

#[tokio::test]
async fn a_release_is_signed_as_a_tag_by_an_allowed_ssh_key() {
    let bench = Bench::of("semver:^1", signed_by_ours);
    let (ours, theirs) = (bench.path("ours"), ssh_key(bench.scratch.path(), "theirs"));
    bench.sign_with(&[("gpg.format", "ssh"), ("user.signingkey", text(&ours))]);
    assert_eq!(bench.release("v1.0.0", &SIGNED).await, FetchResult::Complete);
    let first = bench.repo.head();
    check_unfit(&bench.release("v1.1.0", &["--message", "a release"]).await, "of refs/tags/v1.1.0: it is not signed");
    check_unfit(&bench.release("v1.2.0", &[]).await, "it is not signed, and `verify` asks for a signature");
    bench.sign_with(&[("user.signingkey", text(&theirs))]);
    check_unfit(&bench.release("v1.3.0", &SIGNED).await, "by no key of verify.ssh_allowed_signers_file");
    // Whoever may push could give an old release a new name.
    bench.sign_with(&[("user.signingkey", text(&ours))]);
    let old = bench.repo.push(&[("index.html", b"v0.1.0")]);
    git(&bench.repo.work, &[&["tag"], &SIGNED[..], &["v0.1.0"]].concat());
    git(&bench.repo.work, &["push", "--quiet", "origin", "refs/tags/v0.1.0:refs/tags/v1.4.0"]);
    check_unfit(&bench.fetch_commit(old).await, "the tag was made as `v0.1.0`");
    // What is live is not the greatest for ever; a bot that is new fetches it all the same.
    assert_eq!(bench.fetch_commit(first).await, FetchResult::Complete);
}

#[tokio::test]
async fn a_release_is_signed_as_a_tag_by_an_allowed_gpg_key() {
    let (ours, theirs) = (Gpg::new(None, "never"), Gpg::new(None, "never"));
    let bench = Bench::of("v1", |dir| ours.gates(dir));
    theirs.sign(&bench, None);
    check_unfit(
        &bench.release("v1", &SIGNED).await,
        "of refs/tags/v1: its signature is by no key of verify.gpg_keys_file",
    );
    ours.sign(&bench, None);
    let moved = [&["--force"], &SIGNED[..]].concat();
    assert_eq!(bench.release("v1", &moved).await, FetchResult::Complete);
    // A commit that the tag has left: nobody vouches for it here any more, and the look will say what is asked for now.
    let left = bench.repo.head();
    assert_eq!(bench.release("v1", &moved).await, FetchResult::Complete);
    match bench.fetch_commit(left).await {
        FetchResult::Doubtful { reason } => assert!(reason.contains("git.ref names another commit now"), "{reason}"),
        other => panic!("it may be named again: {other:?}"),
    }
}

/// A branch is not what its commits are called by.
#[tokio::test]
async fn a_signed_tag_beside_a_branch_signs_nothing() {
    let bench = Bench::of("main", signed_by_ours);
    let ours = bench.path("ours");
    bench.sign_with(&[("gpg.format", "ssh"), ("user.signingkey", text(&ours))]);
    check_unfit(&bench.release("v1", &SIGNED).await, "commit with `git commit -S`");
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
