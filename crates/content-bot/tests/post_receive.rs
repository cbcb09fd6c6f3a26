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

#[test]
fn every_ref_of_a_push_is_announced() {
    let dir = tempfile::tempdir().expect("a folder");
    let told = dir.path().join("told");
    // It reads its own input to the end, as curl might: the lines of the push are not for it.
    program(dir.path(), "curl", &format!("cat >/dev/null; printf '%s\\n' \"$*\" >>'{}'", told.display()));
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").expect("PATH"));
    let mut hook = Command::new("sh")
        .arg(HOOK)
        .env("PATH", path)
        .env("BOT_PUSH_SECRET", "a secret")
        .stdin(Stdio::piped())
        .spawn()
        .expect("the hook runs");
    let (old, new) = ("a".repeat(40), "b".repeat(40));
    let refs = ["refs/heads/draft", "refs/heads/main", "refs/tags/v1"];
    let lines: String = refs.iter().map(|name| format!("{old} {new} {name}\n")).collect();
    hook.stdin.take().expect("piped").write_all(lines.as_bytes()).expect("write");
    assert!(hook.wait().expect("it ends").success());

    let told = fs::read_to_string(told).expect("somebody was told");
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), refs.len(), "{told}");
    let id = |line: &str| line.split("webhook-id: ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
    for (line, name) in lines.iter().zip(refs) {
        assert!(line.contains(&format!(r#""ref":"{name}""#)), "{line}");
        let (signed, shown) = (signature(line, name), line.split("v1,").nth(1).unwrap_or_default());
        assert!(shown.starts_with(&signed), "{signed}: {line}");
        assert!(!line.contains("a secret"), "the secret is no argument: {line}");
    }
    let mut ids: Vec<_> = lines.iter().filter_map(|line| id(line)).collect();
    ids.dedup();
    assert_eq!(ids.len(), refs.len(), "no announcement looks like the replay of another: {told}");
}
