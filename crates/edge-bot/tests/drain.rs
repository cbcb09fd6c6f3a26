//! A web bot leaves while it still sends: the real bot, a real etcd and a real HAProxy let it finish, although it answers
//! its check with 503 from the first moment on, and HAProxy takes it for down long before the end.

#![cfg(feature = "shell")]

mod proxy;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bots_core::{
    dcs::{Outcome, Scope, Transaction, Write},
    shell::{
        Clock,
        process::send_signal,
        testing::{EtcdServer, free_port},
    },
    wire::{Kind, Member, MemberHead, WebFacts},
};
use edge_bot::{
    machine::{Admin, Backend, Look, Server},
    shell::socket::converse,
};
use proxy::{STEP, listener, local};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Twice as long as the three bad answers that take a server down.
const PARTS: usize = 24;
const PART_EVERY: Duration = Duration::from_millis(250);

const NAME: &str = "web-1";

/// A web bot as the edge sees it: its site, which sends slowly, and the check of its API.
struct Site {
    serve: SocketAddr,
    check: SocketAddr,
    ready: Arc<AtomicBool>,
}

impl Site {
    async fn start() -> Self {
        let (site, api) = (listener().await, listener().await);
        let (serve, check) = (site.local_addr().expect("bound"), api.local_addr().expect("bound"));
        let ready = Arc::new(AtomicBool::new(true));
        let says = Arc::clone(&ready);
        tokio::spawn(async move {
            while let Ok((stream, _)) = site.accept().await {
                tokio::spawn(send_slowly(stream));
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = api.accept().await {
                let word = if says.load(Ordering::Relaxed) { "200 OK" } else { "503 Service Unavailable" };
                let _cut = stream.read(&mut [0; 1024]).await;
                let _cut = stream.write_all(format!("HTTP/1.0 {word}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
            }
        });
        Self { serve, check, ready }
    }

    fn member(&self, state: &str) -> Write {
        let head = MemberHead {
            kind: Kind::Web,
            state: state.to_owned(),
            role: String::from("member"),
            version: String::from("0.1.0"),
            api_url: format!("http://{}/status", self.check),
            instance: String::from("i"),
            node: state.to_owned(),
            since_unix_ms: 0,
        };
        let facts = WebFacts { url: format!("http://{}", self.serve), ..WebFacts::default() };
        Write::put(web().member(NAME), Member::new(head, &facts).to_json())
    }
}

async fn send_slowly(mut stream: TcpStream) {
    let _request = stream.read(&mut [0; 4096]).await;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {PARTS}\r\nconnection: close\r\n\r\n");
    let _cut = stream.write_all(head.as_bytes()).await;
    for _ in 0..PARTS {
        tokio::time::sleep(PART_EVERY).await;
        if stream.write_all(b".").await.is_err() {
            return;
        }
    }
}

fn web() -> Scope {
    Scope::new("service", "web").expect("valid")
}

/// The bot and its proxy, both killed when dropped.
struct Edge {
    bot: Child,
    socket: PathBuf,
    web: SocketAddr,
    proxy: Option<u32>,
}

impl Edge {
    fn start(dir: &Path, etcd: &str) -> Self {
        let (api, web) = (free_port().expect("a port"), free_port().expect("a port"));
        let data = dir.join("edge");
        let config = dir.join("edge.yml");
        let text = format!(
            "scope: edge\nname: edge-1\netcd3: {{hosts: '{etcd}'}}\nrestapi: {{listen: '127.0.0.1:{api}'}}\n\
             web: {{scope: web, listen: '127.0.0.1:{web}'}}\nproxy: {{places: 2}}\ndata_dir: {}\n",
            data.display(),
        );
        std::fs::write(&config, text).expect("write it");
        let log = std::fs::File::create(dir.join("edge.log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_edge-bot"));
        let bot =
            command.arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("it starts");
        Self { bot, socket: data.join("haproxy.sock"), web: local(web), proxy: None }
    }

    /// Waits until a place of the web backend looks like that.
    async fn until(&mut self, what: &str, good: impl Fn(&Server) -> bool) {
        let began = Clock::now();
        loop {
            let look = converse(&self.socket, &[]).await;
            if let Look::Up { snapshot, .. } = &look {
                self.proxy = Some(snapshot.pid);
                if snapshot.servers.iter().any(|s| s.place.backend == Backend::Web && good(s)) {
                    return;
                }
            }
            assert!(Clock::now().since(began).to_std() < STEP, "{what}: not in time: {look:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _ended = self.bot.kill();
        let _status = self.bot.wait();
        if let Some(pid) = self.proxy {
            send_signal(pid, Signal::KILL).expect("it is ours");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_outlives_the_drain_of_the_bot_that_sends_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let etcd = EtcdServer::start(dir.path()).expect("etcd starts");
    let client = etcd.client();
    let write = async |write: Write| {
        let outcome = client.transact(&Transaction::new(Vec::new(), vec![write])).await;
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    };
    let site = Site::start().await;
    write(site.member("serving")).await;
    let mut edge = Edge::start(dir.path(), &etcd.endpoint());
    let serves = |s: &Server| s.serve == Some(site.serve);
    edge.until("it is routed to", |s| serves(s) && s.admin == Admin::Ready && s.up).await;

    let mut download = TcpStream::connect(edge.web).await.expect("the proxy listens");
    download.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("it takes the request");
    edge.until("the download is under way", |s| serves(s) && s.sessions == 1).await;
    site.ready.store(false, Ordering::Relaxed);
    write(site.member("stopping")).await;
    edge.until("it drains", |s| serves(s) && s.admin == Admin::Drain).await;
    edge.until("its check is bad", |s| serves(s) && !s.up && s.admin == Admin::Drain).await;

    let mut answer = String::new();
    let read = tokio::time::timeout(STEP, download.read_to_string(&mut answer)).await.expect("in time");
    assert!(read.is_ok() && answer.ends_with(&".".repeat(PARTS)), "cut off: {read:?} {answer}");
    edge.until("its place is free", |s| serves(s) && s.admin == Admin::Maint).await;
}
