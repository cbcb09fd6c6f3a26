//! A real HAProxy with our configuration, in a folder of its own, and a server behind it.

#![allow(dead_code, unreachable_pub, reason = "shared by tests, each of which is a crate of its own")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bots_core::shell::{Clock, process::send_signal, testing::free_port};
use edge_bot::{
    machine::{Command, Look, Place, Server, Snapshot, Started},
    shell::{config::find_binary, launch::Launch, socket::converse},
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Nothing takes this long unless something is wrong.
pub const STEP: Duration = Duration::from_secs(20);
/// How often other ports are tried if somebody else takes those that were free.
const STARTS_MAX: usize = 5;
/// A second longer than the checks take to bring a server up: the hold does not race with them by chance.
pub const HOLD_MS: u64 = 3_000;

/// How long a stream may be silent.
pub const STREAM_S: u64 = 60;

/// A running proxy in a folder of its own; killed when dropped.
pub struct Proxy {
    pub socket: PathBuf,
    pub primary: SocketAddr,
    pub web: SocketAddr,
    pub pid: u32,
    pub launch: Option<Launch>,
    _dir: tempfile::TempDir,
}

impl Proxy {
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// One with this configuration instead of the built-in one.
    pub async fn start_with(own: Option<&str>) -> Self {
        Self::start_trusting(own, "127.0.0.0/8 ::1").await
    }

    /// One that believes these networks.
    pub async fn start_trusting(own: Option<&str>, trusted: &str) -> Self {
        for _ in 0..STARTS_MAX {
            match Self::start_on_free_ports(own, trusted).await {
                Ok(proxy) => return proxy,
                Err(why) => assert!(why.contains("Address already in use"), "{why}"),
            }
        }
        panic!("its ports were taken {STARTS_MAX} times");
    }

    /// A port that is free may be taken by the time that the proxy binds it.
    async fn start_on_free_ports(own: Option<&str>, trusted: &str) -> Result<Self, String> {
        let dir = tempfile::tempdir().expect("a folder");
        let (primary, web) = (local(free_port().expect("a port")), local(free_port().expect("a port")));
        let socket = dir.path().join("haproxy.sock");
        let config_file = own.map(|text| {
            let path = dir.path().join("own.cfg");
            std::fs::write(&path, text).expect("write it");
            path
        });
        let launch = Launch {
            binary: find_binary("haproxy".as_ref()).expect("haproxy is installed"),
            config_file,
            data_dir: dir.path().to_owned(),
            env: vec![
                ("EDGE_SOCKET", socket.display().to_string()),
                ("EDGE_LUA", Launch::hold_file(dir.path()).display().to_string()),
                ("EDGE_HOLD_MS", HOLD_MS.to_string()),
                ("EDGE_PLACES", String::from("2")),
                ("EDGE_PRIMARY", primary.to_string()),
                ("EDGE_REPLICAS", local(free_port().expect("a port")).to_string()),
                ("EDGE_WEB", web.to_string()),
                ("EDGE_STREAM_S", STREAM_S.to_string()),
                ("EDGE_TRUSTED", trusted.to_owned()),
            ],
        };
        assert!(matches!(converse(&socket, &[]).await, Look::Absent { .. }), "nobody listens yet");
        if let Started::Failed { why } = launch.start().await {
            return Err(why);
        }
        let Look::Up { snapshot, .. } = converse(&socket, &[]).await else { panic!("it answers") };
        Ok(Self { socket, primary, web, pid: snapshot.pid, launch: Some(launch), _dir: dir })
    }

    /// Runs commands, none of which may be refused, and looks.
    pub async fn look(&self, commands: &[Command]) -> Snapshot {
        match converse(&self.socket, commands).await {
            Look::Up { snapshot, complaints } => {
                assert!(complaints.is_empty(), "{commands:?}: {complaints:?}");
                snapshot
            }
            other @ (Look::Absent { .. } | Look::Silent { .. }) => panic!("{other:?}"),
        }
    }

    pub async fn server(&self, place: &Place, commands: &[Command]) -> Server {
        let shown = self.look(commands).await;
        shown.servers.into_iter().find(|s| s.place == *place).expect("the place is there")
    }

    /// Waits until the server looks like that.
    pub async fn until(&self, what: &str, place: &Place, good: impl Fn(&Server) -> bool) {
        let began = Clock::now();
        loop {
            let server = self.server(place, &[]).await;
            if good(&server) {
                return;
            }
            assert!(Clock::now().since(began).to_std() < STEP, "{what}: not in time: {server:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the check of `backing` has failed so often, counted from now on.
    pub async fn fails(&self, backing: &Backing, times: usize) {
        let (before, began) = (backing.failed.load(Ordering::Relaxed), Clock::now());
        while backing.failed.load(Ordering::Relaxed) < before + times {
            assert!(Clock::now().since(began).to_std() < STEP, "the check does not fail {times} times in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.primary).await.expect("the proxy listens")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        send_signal(self.pid, Signal::KILL).expect("it is ours");
    }
}

/// A server that sends back what it gets, and a health check that says what it is told.
pub struct Backing {
    pub serve: SocketAddr,
    pub check: SocketAddr,
    pub healthy: Arc<AtomicBool>,
    /// Answers of the check that were bad.
    pub failed: Arc<AtomicUsize>,
}

impl Backing {
    pub async fn start() -> Self {
        let (echo, checks) = (listener().await, listener().await);
        let (serve, check) = (echo.local_addr().expect("bound"), checks.local_addr().expect("bound"));
        let healthy = Arc::new(AtomicBool::new(false));
        let failed = Arc::new(AtomicUsize::new(0));
        let (says, counts) = (Arc::clone(&healthy), Arc::clone(&failed));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _cut = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = checks.accept().await {
                let good = says.load(Ordering::Relaxed);
                let word = if good { "200 OK" } else { "503 Service Unavailable" };
                let answer = format!("HTTP/1.0 {word}\r\ncontent-length: 0\r\n\r\n");
                let mut request = [0; 1024];
                let _cut = stream.read(&mut request).await;
                let _cut = stream.write_all(answer.as_bytes()).await;
                if !good {
                    counts.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { serve, check, healthy, failed }
    }
}

pub async fn listener() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port")
}

pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Whether the connection is served: what is sent comes back.
pub async fn served(stream: &mut TcpStream) -> bool {
    let mut back = [0; 2];
    let sent = stream.write_all(b"hi").await.is_ok();
    let answered = tokio::time::timeout(STEP, stream.read_exact(&mut back)).await.expect("in time");
    sent && answered.is_ok() && back == *b"hi"
}
