//! Packs as they are given out, by the real program: what keeps one from being written is not the commit's fault.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bots_core::{
    machine::Span,
    shell::{
        Clock, http,
        testing::{EtcdServer, free_port},
    },
};
use bytes::Bytes;
use repo::{Repo, unpack};
use tempfile::TempDir;

/// All of it takes a second or two; the machine may be busy.
const PATIENCE: Span = Span::from_secs(30);
const DEADLINE: Duration = Duration::from_secs(5);

/// A bot's process, stopped by its pid when the test ends.
struct Bot {
    port: u16,
    child: Child,
}

impl Bot {
    async fn get(&self, path: &str) -> (u16, Bytes) {
        http::get(&format!("http://127.0.0.1:{}{path}", self.port), DEADLINE).await.unwrap_or_default()
    }

    async fn fetches(&self) -> String {
        let text = String::from_utf8(self.get("/metrics").await.1.to_vec()).expect("text");
        let line = text.lines().find(|line| line.starts_with("content_fetches_total "));
        line.unwrap_or_else(|| panic!("fetches are not counted: {text}")).to_owned()
    }
}

impl Drop for Bot {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[tokio::test]
async fn a_disk_that_takes_no_pack_for_a_while_is_not_taken_for_damage() {
    let scratch = TempDir::new().expect("scratch");
    let etcd = EtcdServer::start(scratch.path()).expect("etcd");
    let repo = Repo::new(scratch.path());
    let sha = repo.push(&[("index.html", b"a page")]);
    let (port, data, config) =
        (free_port().expect("a port"), scratch.path().join("data"), scratch.path().join("one.yml"));
    let text = format!(
        "scope: site\nname: one\netcd3: {{hosts: '{}'}}\nrestapi: {{listen: '127.0.0.1:{port}'}}\n\
         git: {{url: '{}'}}\ndata_dir: {}\nttl_s: 2\n",
        etcd.endpoint(),
        repo.url(),
        data.display(),
    );
    fs::write(&config, text).expect("write");
    let mut command = Command::new(env!("CARGO_BIN_EXE_content-bot"));
    command.arg(&config).env("GIT_CONFIG_GLOBAL", "/dev/null").stdin(Stdio::null()).stdout(Stdio::null());
    let bot = Bot { port, child: command.stderr(Stdio::null()).spawn().expect("content-bot") };
    let (path, began) = (format!("/pack/{sha}"), Clock::now());
    while bot.get(&path).await.0 != 200 {
        assert!(Clock::now() < began + PATIENCE, "the bot does not give out the pack");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let fetches = bot.fetches().await;
    // As a full disk would.
    fs::remove_dir_all(data.join("packs")).expect("there");
    fs::write(data.join("packs"), b"").expect("write");
    let (status, words) = bot.get(&path).await;
    let words = String::from_utf8_lossy(&words);
    assert!(status == 503 && words.contains("the commit cannot be packed now: try again"), "{status}: {words}");
    fs::remove_file(data.join("packs")).expect("there");
    fs::create_dir(data.join("packs")).expect("mkdir");
    let (status, pack) = bot.get(&path).await;
    assert_eq!(status, 200);
    let files = unpack(&scratch.path().join("unpacked"), &pack, &sha);
    assert_eq!(files, [(String::from("index.html"), b"a page".to_vec())]);
    assert_eq!(bot.fetches().await, fetches, "the commit was not fetched again");
}
