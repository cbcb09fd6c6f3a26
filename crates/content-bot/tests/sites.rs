//! Several sites in one process, with a real etcd and real repositories: each has its own origin, secret, lock and packs, and
//! the trouble of one is not the other's.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use bots_core::{
    dcs::Scope,
    machine::Span,
    shell::{
        Clock, Etcd, Status, http, probe_instance,
        process::{Signal, send_signal},
        testing::{EtcdServer, free_port},
    },
    wire::{ContentFacts, ContentRevision, Member},
};
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use hyper::HeaderMap;
use repo::Repo;
use serde_json::Value;
use sha2::Sha256;
use tempfile::TempDir;

/// Everything here takes a second or two; the machine may be busy.
const PATIENCE: Span = Span::from_secs(40);
const DEADLINE: Duration = Duration::from_secs(5);
const SITES: [&str; 2] = ["docs", "shop"];

/// A process of both sites, killed when the test ends.
struct Bot {
    port: u16,
    child: Child,
    config: PathBuf,
}

impl Bot {
    fn spawn(config: &Path) -> Child {
        let log = fs::File::options().create(true).append(true).open(config.with_extension("log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_content-bot"));
        command.arg(config).env("GIT_CONFIG_GLOBAL", "/dev/null").stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("content-bot")
    }

    fn start(bench: &Bench, name: &str) -> Self {
        let (port, dir) = (free_port().expect("a port"), bench.scratch.path());
        let config = dir.join(format!("{name}.yml"));
        let mut text = format!(
            "name: {name}\netcd3: {{hosts: '{}'}}\nrestapi: {{listen: '127.0.0.1:{port}'}}\ndata_dir: {}\nttl_s: 2\n\
             git: {{poll_interval_s: 3600}}\nsites:\n",
            bench.etcd.endpoint(),
            dir.join(format!("{name}.data")).display(),
        );
        for (site, repo) in SITES.iter().zip(&bench.repos) {
            let (url, secret) = (repo.url(), secret(site));
            text += &format!(
                "- {{scope: {site}, git: {{url: '{url}'}}, push: {{secret: '{secret}'}}, web_scopes: [{site}-web]}}\n"
            );
        }
        fs::write(&config, text).expect("write");
        let child = Self::spawn(&config);
        Self { port, child, config }
    }

    fn kill(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }

    async fn stop(mut self) -> ExitStatus {
        send_signal(self.child.id(), Signal::TERM).expect("it lives");
        until("it ends", async || self.child.try_wait().expect("ours")).await
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    async fn get(&self, path: &str) -> (u16, Bytes) {
        http::get(&self.url(path), DEADLINE).await.unwrap_or_default()
    }

    /// What a site says of itself.
    async fn report(&self, site: &str) -> Value {
        let status: Value =
            serde_json::from_slice(&self.get(&format!("/sites/{site}/status")).await.1).unwrap_or_default();
        status["report"].clone()
    }

    /// Announces a push at `path`, signed with the secret of `site`.
    async fn announce(&self, path: &str, site: &str) -> u16 {
        announce(&self.url(path), site).await
    }

    fn log(&self) -> String {
        fs::read_to_string(self.config.with_extension("log")).expect("a log")
    }
}

impl Drop for Bot {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn announce(url: &str, site: &str) -> u16 {
    let number = Clock::now().as_millis();
    let body = Bytes::from(format!(r#"{{"ref":"refs/heads/main","number":{number}}}"#));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret(site).as_bytes()).expect("any length");
    mac.update(&body);
    let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
    let mut headers = HeaderMap::new();
    headers.insert("x-hub-signature-256", format!("sha256={hex}").parse().expect("ASCII"));
    let answer = http::request(hyper::Method::POST, url, headers, body, DEADLINE, 1_000_000).await;
    answer.map_or(0, |a| a.status)
}

struct Bench {
    etcd: EtcdServer,
    repos: [Repo; 2],
    scratch: TempDir,
}

impl Bench {
    fn new() -> Self {
        let scratch = TempDir::new().expect("scratch");
        let repos = SITES.map(|site| {
            let dir = scratch.path().join(site);
            fs::create_dir(&dir).expect("mkdir");
            Repo::new(&dir)
        });
        let etcd = EtcdServer::start(scratch.path()).expect("etcd");
        Self { etcd, repos, scratch }
    }

    fn store(&self) -> Etcd {
        self.etcd.client()
    }

    async fn wait_for_live(&self, site: &str, sha: &str) {
        until(&format!("{sha} is live at {site}"), async || {
            let found = self.store().get(&scope(site).revision_live()).await.expect("etcd answers")?;
            let live: ContentRevision = serde_json::from_str(&found.value).expect("a revision");
            (live.sha == sha).then_some(())
        })
        .await;
    }

    async fn leader(&self, site: &str) -> Option<String> {
        self.store().get(&scope(site).leader()).await.expect("etcd answers").map(|kv| kv.value)
    }

    async fn member(&self, site: &str, name: &str) -> Member {
        let found = self.store().get(&scope(site).member(name)).await.expect("etcd answers").expect("a member");
        Member::from_json(&found.value).expect("a member")
    }
}

fn scope(site: &str) -> Scope {
    Scope::new("service", site).expect("valid")
}

fn secret(site: &str) -> String {
    format!("the secret of {site}")
}

async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Clock::now();
    loop {
        if let Some(found) = found().await {
            return found;
        }
        assert!(Clock::now().since(began) < PATIENCE, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn sites_of_one_process_have_nothing_to_do_with_each_other() {
    let bench = Bench::new();
    let [docs, shop] = &bench.repos;
    let firsts = [docs.push(&[("index.html", b"docs one")]), shop.push(&[("index.html", b"shop one")])];
    let mut bot = Bot::start(&bench, "c1");
    for (site, first) in SITES.iter().zip(&firsts) {
        bench.wait_for_live(site, first).await;
        // Each is a bot of its own to its peers and to operators, at an address of its own.
        let member = bench.member(site, "c1").await;
        let facts: ContentFacts = member.facts().expect("facts");
        assert_eq!(facts.pack_url, bot.url(&format!("/sites/{site}")));
        assert_eq!(member.head.api_url, bot.url(&format!("/sites/{site}/status")));
        let (_, status) = http::get(&member.head.api_url, DEADLINE).await.expect("its status");
        let ours = serde_json::from_slice::<Status>(&status).expect("a status").identity;
        assert_eq!(ours.scope, *site);
        let instance = probe_instance(&member.head.api_url, &ours).await;
        assert_eq!(instance.as_deref(), Some(member.head.instance.as_str()));
        assert_eq!(bot.get(&format!("/sites/{site}/pack/{first}")).await.0, 200);
        assert_eq!(bot.get(&format!("/sites/{site}/leader")).await.0, 200);
    }
    assert_eq!(bot.get(&format!("/sites/shop/pack/{}", firsts[0])).await.0, 404, "it is the other site's");
    assert_eq!(bot.get(&format!("/pack/{}", firsts[0])).await.0, 404);
    assert_eq!(bot.get("/health").await.0, 200);

    // The poll is an hour away: what follows is due to announcements, of one site with its own secret.
    let second = docs.push(&[("index.html", b"docs two")]);
    for (path, site, expected) in [
        ("/push/docs", "shop", 401),
        ("/push", "docs", 404),
        ("/push/elsewhere", "docs", 404),
        ("/push/docs/nobody", "docs", 404),
        ("/push/docs/github", "docs", 202),
    ] {
        assert_eq!(bot.announce(path, site).await, expected, "{path} with the secret of {site}");
    }
    bench.wait_for_live("docs", &second).await;
    let text = String::from_utf8(bot.get("/metrics").await.1.to_vec()).expect("text");
    for line in ["content_pushes_total{site=\"docs\"} 1", "content_pushes_total{site=\"shop\"} 0"] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    assert_eq!(text.matches("# TYPE content_pushes counter").count(), 1, "{text}");

    // An origin that is away is its own site's trouble.
    let away = docs.bare.with_extension("away");
    fs::rename(&docs.bare, &away).expect("rename");
    assert_eq!(bot.announce("/push/docs", "docs").await, 202);
    until("docs is in trouble", async || {
        bot.report("docs").await["troubles"].as_array().is_some_and(|t| !t.is_empty()).then_some(())
    })
    .await;
    let next = shop.push(&[("index.html", b"shop two")]);
    assert_eq!(bot.announce("/push/shop", "shop").await, 202);
    bench.wait_for_live("shop", &next).await;
    assert_eq!(bot.report("shop").await["troubles"], Value::Array(Vec::new()));
    assert_eq!((bot.get("/liveness").await.0, bot.get("/readiness").await.0), (200, 200));
    assert!(bot.log().contains("site{scope=\"docs\"}: the origin could not be looked at"), "{}", bot.log());
    fs::rename(&away, &docs.bare).expect("rename");

    // Killed, and taken over by another of both sites; back, it stands by for both.
    let other = Bot::start(&bench, "c2");
    for site in SITES {
        until("c2 stands by", async || (other.report(site).await["role"] == "follower").then_some(())).await;
    }
    // Nobody is told of these pushes: the new leader's first look finds them.
    let lasts = [docs.push(&[("index.html", b"docs three")]), shop.push(&[("index.html", b"shop three")])];
    bot.kill();
    for (site, last) in SITES.iter().zip(&lasts) {
        until("c2 leads", async || (bench.leader(site).await.as_deref() == Some("c2")).then_some(())).await;
        bench.wait_for_live(site, last).await;
    }
    bot.child = Bot::spawn(&bot.config);
    for (site, last) in SITES.iter().zip(&lasts) {
        until("c1 is back and has it", async || {
            let is_back = bot.report(site).await["role"] == "follower";
            (is_back && bot.get(&format!("/sites/{site}/pack/{last}")).await.0 == 200).then_some(())
        })
        .await;
    }
    // Asked to end, it says goodbye for both, and the other leads at once.
    assert_eq!(other.stop().await.code(), Some(0));
    for site in SITES {
        let members = bench.store().list(&scope(site).members_prefix()).await.expect("etcd answers").1;
        assert_eq!(members.len(), 1, "{members:?}");
        until("c1 leads", async || (bench.leader(site).await.as_deref() == Some("c1")).then_some(())).await;
    }
    assert_eq!(bot.stop().await.code(), Some(0));
}

/// One address for the open network, and each site's announcements are its own there.
#[tokio::test]
async fn sites_share_the_address_for_strangers() {
    let bench = Bench::new();
    let [docs, shop] = &bench.repos;
    let firsts = [docs.push(&[("index.html", b"docs one")]), shop.push(&[("index.html", b"shop one")])];
    let mut bot = Bot::start(&bench, "c1");
    bot.kill();
    let port = free_port().expect("a port");
    let text = fs::read_to_string(&bot.config).expect("there");
    fs::write(&bot.config, format!("push: {{listen: '127.0.0.1:{port}'}}\n{text}")).expect("write");
    bot.child = Bot::spawn(&bot.config);
    for (site, first) in SITES.iter().zip(&firsts) {
        bench.wait_for_live(site, first).await;
    }
    let outside = |path: &str| format!("http://127.0.0.1:{port}{path}");
    let get = async |path: &str| http::get(&outside(path), DEADLINE).await.expect("an answer").0;
    assert_eq!(get("/liveness").await, 200);
    assert_eq!(get(&format!("/sites/docs/pack/{}", firsts[0])).await, 404);
    assert_eq!(get("/status").await, 404);
    let next = shop.push(&[("index.html", b"shop two")]);
    assert_eq!(announce(&outside("/push/shop"), "docs").await, 401);
    assert_eq!(announce(&outside("/push"), "shop").await, 404);
    assert_eq!(announce(&outside("/push/shop"), "shop").await, 202);
    bench.wait_for_live("shop", &next).await;
}

#[test]
fn what_sites_cannot_be_is_said_before_anything_is_done() {
    let scratch = TempDir::new().expect("scratch");
    let check = |sites: &str, expected: &str| {
        let config = scratch.path().join("bad.yml");
        let top = "name: c1\netcd3: {host: '127.0.0.1:1'}\ndata_dir: /tmp/none\n";
        fs::write(&config, format!("{top}sites: [{sites}]\n")).expect("write");
        let done = Command::new(env!("CARGO_BIN_EXE_content-bot")).arg("--check").arg(&config).output().expect("run");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(2), "{said}");
        assert!(said.contains(expected) && said.trim().lines().count() == 1, "{expected}: {said}");
    };
    check(
        "{scope: a, git: {url: /a}}, {scope: a, git: {url: /b}, web_scopes: [b]}",
        "sites.1.scope: a is the scope of sites.0",
    );
    check("{scope: a, git: {url: /a}}, {scope: b, git: {url: 'ftp://x/y'}, web_scopes: [b-web]}", "sites.1.git.url");
    check("{scope: a, git: {url: /a}}, {scope: b, git: {url: /b}}", "sites.1.web_scopes: web");
}
