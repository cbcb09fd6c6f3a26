//! Content bots as processes, with an etcd and a repository, all of it ended with the test.

#![allow(dead_code, unreachable_pub, reason = "each test uses its own part")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use bots_core::{
    dcs::{Scope, Transaction, Write},
    machine::Span,
    shell::{
        Clock, Etcd, http,
        testing::{EtcdServer, free_port},
    },
    wire::{ContentRevision, Kind, Member, MemberHead, WebFacts},
};
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;
use tempfile::TempDir;

use crate::repo::Repo;

/// Everything here takes a second or two; the machine may be busy.
pub const PATIENCE: Span = Span::from_secs(30);
pub const DEADLINE: Duration = Duration::from_secs(5);
pub const SECRET: &str = "It's a Secret to Everybody";

/// A bot's process, stopped by its pid when the test ends.
pub struct Bot {
    pub port: u16,
    pub child: Child,
    pub config: PathBuf,
}

impl Bot {
    pub fn spawn(config: &Path) -> Child {
        let log = fs::File::options().create(true).append(true).open(config.with_extension("log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_content-bot"));
        command.arg(config).env("GIT_CONFIG_GLOBAL", "/dev/null").stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("content-bot")
    }

    pub fn start(fleet: &Fleet, name: &str, git: &str, more: &str) -> Self {
        let port = free_port().expect("a port");
        let dir = fleet.scratch.path();
        let config = dir.join(format!("{name}.yml"));
        let text = format!(
            "scope: site\nname: {name}\netcd3: {{hosts: '{}'}}\nrestapi: {{listen: '127.0.0.1:{port}'}}\n\
             git: {{url: '{}', {git}}}\npush: {{secret: \"{SECRET}\"}}\ndata_dir: {}\nttl_s: 2\n{more}\n",
            fleet.etcd.endpoint(),
            fleet.repo.url(),
            dir.join(format!("{name}.data")).display(),
        );
        fs::write(&config, text).expect("write");
        let child = Self::spawn(&config);
        Self { port, child, config }
    }

    pub fn restart(&mut self) {
        self.kill();
        self.child = Self::spawn(&self.config);
    }

    pub fn kill(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub async fn get(&self, path: &str) -> (u16, Bytes) {
        http::get(&self.url(path), DEADLINE).await.unwrap_or_default()
    }

    pub async fn role(&self) -> String {
        let status: Value = serde_json::from_slice(&self.get("/status").await.1).unwrap_or_default();
        status["report"]["role"].as_str().unwrap_or("down").to_owned()
    }

    pub async fn troubles(&self) -> String {
        let status: Value = serde_json::from_slice(&self.get("/status").await.1).unwrap_or_default();
        status["report"]["troubles"].to_string()
    }

    /// Announces a push that nobody has announced before.
    pub async fn push(&self, secret: Option<&str>) -> u16 {
        let body = body();
        let signature = secret.map(|secret| signature(secret, &body));
        let given = signature.iter().map(|s| ("x-hub-signature-256", s.as_str())).collect::<Vec<_>>();
        self.post("/push", &given, body).await
    }

    pub async fn post(&self, path: &str, headers: &[(&'static str, &str)], body: Bytes) -> u16 {
        post(&self.url(path), headers, body).await
    }

    pub async fn counted(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.get("/metrics").await.1.to_vec()).expect("text");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("_total "));
        line.and_then(|figure| figure.parse().ok()).unwrap_or_else(|| panic!("{name} is not counted: {text}"))
    }

    /// How often something was measured, and the sum of it.
    pub async fn measured(&self, name: &str) -> (u64, f64) {
        let text = String::from_utf8(self.get("/metrics").await.1.to_vec()).expect("text");
        let figure = |what: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(what)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name}{what} is not there: {text}"))
        };
        (figure("_count").parse().expect("a number"), figure("_sum").parse().expect("a number"))
    }

    /// The machine's state, as the status shows it.
    pub async fn state(&self) -> Value {
        let status: Value = serde_json::from_slice(&self.get("/status").await.1).unwrap_or_default();
        status["state"].clone()
    }
}

pub async fn post(url: &str, headers: &[(&'static str, &str)], body: Bytes) -> u16 {
    let pair = |(name, value): &(&'static str, &str)| {
        let value = hyper::header::HeaderValue::from_str(value).expect("ASCII");
        (hyper::header::HeaderName::from_static(name), value)
    };
    let headers = headers.iter().map(pair).collect();
    let answer = http::request(hyper::Method::POST, url, headers, body, DEADLINE, 1_000_000).await;
    answer.map_or(0, |a| a.status)
}

impl Drop for Bot {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Fleet {
    pub etcd: EtcdServer,
    pub repo: Repo,
    pub scratch: TempDir,
}

impl Fleet {
    pub fn new() -> Self {
        let scratch = TempDir::new().expect("scratch");
        let etcd = EtcdServer::start(scratch.path()).expect("etcd");
        let repo = Repo::new(scratch.path());
        Self { etcd, repo, scratch }
    }

    pub fn store(&self) -> Etcd {
        self.etcd.client()
    }

    pub async fn value<T: serde::de::DeserializeOwned>(&self, key: &str) -> Option<T> {
        let found = self.store().get(key).await.expect("etcd answers")?;
        Some(serde_json::from_str(&found.value).expect(key))
    }

    pub async fn live(&self) -> Option<ContentRevision> {
        self.value(&site().revision_live()).await
    }

    pub async fn wait_for_live(&self, sha: &str) -> ContentRevision {
        until(&format!("{sha} is live"), async || self.live().await.filter(|live| live.sha == sha)).await
    }

    pub async fn put(&self, key: String, value: String) {
        let outcome = self.store().transact(&Transaction::new(Vec::new(), vec![Write::put(key, value)])).await;
        assert!(matches!(outcome, bots_core::dcs::Outcome::Done(_)), "{outcome:?}");
    }

    pub async fn web_says(&self, name: &str, prepared: Option<&str>) {
        self.web_serves(name, prepared, None).await;
    }

    pub async fn web_serves(&self, name: &str, prepared: Option<&str>, serving: Option<&str>) {
        let head = MemberHead {
            kind: Kind::Web,
            state: String::from("serving"),
            role: String::from("member"),
            version: String::new(),
            api_url: String::new(),
            instance: String::new(),
            node: String::new(),
            since_unix_ms: 0,
        };
        let [prepared, serving] = [prepared, serving].map(|sha| sha.map(str::to_owned));
        let facts = WebFacts { slot: Some(0), prepared, serving, ..WebFacts::default() };
        let web = Scope::new("service", "web").expect("valid");
        self.put(web.member(name), Member::new(head, &facts).to_json()).await;
    }

    /// Who leads and who follows, once that is settled.
    pub async fn leader_of<'b>(&self, bots: [&'b Bot; 2]) -> (&'b Bot, &'b Bot) {
        until("one bot leads and one follows", async || {
            let leads = [bots[0].get("/leader").await.0 == 200, bots[1].get("/leader").await.0 == 200];
            let roles = [bots[0].role().await, bots[1].role().await];
            match leads {
                [true, false] if roles[1] == "follower" => Some((bots[0], bots[1])),
                [false, true] if roles[0] == "follower" => Some((bots[1], bots[0])),
                _ => None,
            }
        })
        .await
    }
}

pub fn site() -> Scope {
    Scope::new("service", "site").expect("valid")
}

/// No two forges' payloads are alike.
pub fn body() -> Bytes {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Bytes::from(format!(r#"{{"ref":"refs/heads/main","number":{number}}}"#))
}

pub fn signature(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any length");
    mac.update(body);
    let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256={hex}")
}

pub async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Clock::now();
    loop {
        if let Some(found) = found().await {
            return found;
        }
        assert!(Clock::now().since(began) < PATIENCE, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
