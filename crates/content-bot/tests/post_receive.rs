//! The hook of the git server in `deploy/compose`: one push may move several branches and tags, and each is announced. What it
//! calls is stood in for by a program that writes down what it was told.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

const HOOK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/compose/post-receive");

fn program(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make a program of it");
}

/// The signature of an announcement, by openssl, which may know this secret.
fn signature(line: &str, name: &str) -> String {
    let field =
        |after: &str| line.split(after).nth(1).and_then(|rest| rest.split(' ').next()).expect("a field").to_owned();
    let (id, time) = (field("webhook-id: "), field("webhook-timestamp: "));
    let body = format!(r#"{{"ref":"{name}","before":"{}","after":"{}"}}"#, "a".repeat(40), "b".repeat(40));
    let script = format!("printf '%s' '{id}.{time}.{body}' | openssl dgst -sha256 -hmac 'a secret' -binary | base64");
    let done = Command::new("sh").args(["-c", &script]).output().expect("openssl runs");
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

/// A folder with a program in curl's place: it reads its own input to the end, as curl might (the lines of the push are not for it),
/// writes down what it is told, and does as `script` says.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let told = dir.path().join("told");
        program(dir.path(), "curl", &format!("cat >/dev/null; printf '%s\\n' \"$*\" >>'{}'; {script}", told.display()));
        Self { dir }
    }

    /// Runs the hook as git does after a push of these refs, in `repository`: what it says.
    fn run(&self, repository: &Path, env: &[(&str, &str)], refs: &[&str]) -> String {
        let path = format!("{}:{}", self.dir.path().display(), std::env::var("PATH").expect("PATH"));
        let mut hook = Command::new("sh")
            .arg(HOOK)
            .current_dir(repository)
            .env("PATH", path)
            .env("GIT_DIR", ".")
            .envs([("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_SYSTEM", "/dev/null")])
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the hook runs");
        let (old, new) = ("a".repeat(40), "b".repeat(40));
        let lines: String = refs.iter().map(|name| format!("{old} {new} {name}\n")).collect();
        // One that has nothing to tell does not read them.
        let _closed = hook.stdin.take().expect("piped").write_all(lines.as_bytes());
        let ended = hook.wait_with_output().expect("it ends");
        assert!(ended.status.success(), "a push that has happened is not refused");
        String::from_utf8_lossy(&ended.stderr).into_owned()
    }

    /// What curl was told, call by call.
    fn told(&self) -> Vec<String> {
        let told = fs::read_to_string(self.dir.path().join("told")).unwrap_or_default();
        told.lines().map(str::to_owned).collect()
    }
}

const URL: &str = "http://bot:1/push/site/standard";

#[test]
fn every_ref_of_a_push_is_announced() {
    let bench = Bench::new("");
    let refs = ["refs/heads/draft", "refs/heads/main", "refs/tags/v1"];
    bench.run(bench.dir.path(), &[("BOT_PUSH_URL", URL), ("BOT_PUSH_SECRET", "a secret")], &refs);
    let lines = bench.told();
    assert_eq!(lines.len(), refs.len(), "{lines:?}");
    let id = |line: &str| line.split("webhook-id: ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
    for (line, name) in lines.iter().zip(refs) {
        assert!(line.contains(&format!(r#""ref":"{name}""#)), "{line}");
        let (signed, shown) = (signature(line, name), line.split("v1,").nth(1).unwrap_or_default());
        assert!(shown.starts_with(&signed), "{signed}: {line}");
        assert!(line.ends_with(URL), "{line}");
        assert!(!line.contains("a secret"), "the secret is no argument: {line}");
    }
    let mut ids: Vec<_> = lines.iter().filter_map(|line| id(line)).collect();
    ids.dedup();
    assert_eq!(ids.len(), refs.len(), "no announcement looks like the replay of another: {lines:?}");
}

#[test]
fn the_repository_says_whom_to_tell_and_the_next_one_is_told_if_one_is_away() {
    let bench = Bench::new("case $* in *away*) exit 7 ;; esac");
    let (repository, secret) = (bench.dir.path().join("site.git"), bench.dir.path().join("secret"));
    let git = |args: &[&str]| {
        let done = Command::new("git").args(args).env("GIT_CONFIG_GLOBAL", "/dev/null").status().expect("git runs");
        assert!(done.success(), "{args:?}");
    };
    let at = repository.to_str().expect("UTF-8");
    git(&["init", "--quiet", "--bare", at]);
    fs::write(&secret, "a secret\n").expect("write");
    for url in ["http://away:1/push/site/standard", URL, "http://third:1/push/site/standard"] {
        git(&["-C", at, "config", "--add", "bots.pushUrl", url]);
    }
    git(&["-C", at, "config", "bots.pushSecretFile", secret.to_str().expect("UTF-8")]);
    bench.run(&repository, &[], &["refs/heads/main"]);
    let told = bench.told();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains("http://away:1/") && told[1].ends_with(URL), "{told:?}");
    assert!(told[1].contains(&format!("v1,{}", signature(&told[1], "refs/heads/main"))), "{told:?}");
}

/// As Standard Webhooks writes secrets: what is behind the prefix is base64, here of `a secret`.
#[test]
fn a_secret_in_base64_signs_with_what_it_stands_for() {
    let bench = Bench::new("");
    let env = [("BOT_PUSH_URL", URL), ("BOT_PUSH_SECRET", "whsec_YSBzZWNyZXQ=")];
    bench.run(bench.dir.path(), &env, &["refs/heads/main"]);
    let told = bench.told();
    assert!(told[0].contains(&format!("v1,{}", signature(&told[0], "refs/heads/main"))), "{told:?}");
}

#[test]
fn who_is_told_nothing_is_told_that() {
    let bench = Bench::new("");
    for env in
        [[("BOT_PUSH_URL", ""), ("BOT_PUSH_SECRET", "a secret")], [("BOT_PUSH_URL", URL), ("BOT_PUSH_SECRET", "")]]
    {
        let said = bench.run(bench.dir.path(), &env, &["refs/heads/main"]);
        assert!(said.contains("no content bot is told: set BOT_PUSH_URL"), "{said}");
    }
    assert!(bench.told().is_empty());
}
