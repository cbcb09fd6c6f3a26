//! Real etcd servers for tests, the demo and the benchmarks: on free loopback ports, in a directory of the caller's,
//! stopped by pid when dropped. And configurations as nobody should write them.

mod documents;
mod ports;
mod skips;

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;

use super::{clock::Clock, config, dcs::Etcd, process::send_signal};
use crate::machine::Span;

pub use documents::{in_etcd, mutated, refusal, spoilt};
pub use ports::free_port;
pub use skips::skipped;

/// How long a member may take until it answers. A cold disk on a busy machine needs seconds.
const READY_DEADLINE: Span = Span::from_secs(30);

/// One member: its process, and what it takes to start it again.
#[derive(Debug)]
pub struct EtcdServer {
    name: String,
    dir: PathBuf,
    client_port: u16,
    peer_port: u16,
    initial_cluster: String,
    more: Vec<String>,
    child: Option<Child>,
}

impl EtcdServer {
    /// A cluster of one, in `dir`; returns when it answers.
    ///
    /// # Errors
    /// If it cannot be started or does not answer.
    pub fn start(dir: &Path) -> io::Result<Self> {
        Self::start_with(dir, &[])
    }

    /// The same, with more arguments.
    ///
    /// # Errors
    /// If it cannot be started or does not answer.
    pub fn start_with(dir: &Path, more: &[&str]) -> io::Result<Self> {
        let mut cluster = EtcdCluster::start_with(dir, 1, more)?;
        Ok(cluster.members.remove(0))
    }

    /// Runs `etcdctl` against it; its output, or what it complains of.
    ///
    /// # Errors
    /// If it cannot be run or fails.
    pub fn ctl(&self, arguments: &[&str]) -> io::Result<String> {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").env("ETCDCTL_ENDPOINTS", self.endpoint()).args(arguments);
        let output = command.stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// Puts a snapshot, as `etcdctl snapshot save` makes it, in the place of its data, as the cluster called `token`, and starts it
    /// again on the same ports.
    ///
    /// # Errors
    /// If the snapshot cannot be restored, or it does not answer after that.
    pub fn set_back(&mut self, snapshot: &Path, token: &str) -> io::Result<()> {
        self.kill()?;
        let data = self.dir.join(&self.name);
        std::fs::remove_dir_all(&data)?;
        let (peer, text) = (format!("http://127.0.0.1:{}", self.peer_port), |path: &Path| path.display().to_string());
        self.ctl(&[
            "snapshot",
            "restore",
            &text(snapshot),
            "--data-dir",
            &text(&data),
            "--name",
            &self.name,
            "--initial-cluster",
            &self.initial_cluster,
            "--initial-cluster-token",
            token,
            "--initial-advertise-peer-urls",
            &peer,
        ])?;
        self.restart()
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// The port that other members use.
    #[must_use]
    pub const fn peer_port(&self) -> u16 {
        self.peer_port
    }

    /// The process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// A client of this member alone.
    #[must_use]
    pub fn client(&self) -> Etcd {
        Etcd::new(&config::Etcd::from_hosts(&self.endpoint())).expect("an address of our own making")
    }

    /// Kills it without a word and waits for its end, as a power cut would.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> io::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill()?;
        child.wait().map(|_status| ())
    }

    /// Starts it again on the same data and ports; returns when it answers.
    ///
    /// # Errors
    /// If it cannot be started or does not answer.
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill()?;
        self.spawn()?;
        self.wait_until_ready()
    }

    /// Freezes it: it holds its connections and says nothing.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn freeze(&self) -> io::Result<()> {
        self.pid().map_or(Ok(()), |pid| send_signal(pid, Signal::STOP))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn thaw(&self) -> io::Result<()> {
        self.pid().map_or(Ok(()), |pid| send_signal(pid, Signal::CONT))
    }

    fn spawn(&mut self) -> io::Result<()> {
        let client = format!("http://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let log = File::options().create(true).append(true).open(self.dir.join(format!("{}.log", self.name)))?;
        let child = Command::new("etcd")
            .args(["--name", &self.name])
            .arg("--data-dir")
            .arg(self.dir.join(&self.name))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.initial_cluster, "--initial-cluster-state", "new"])
            .args(["--initial-cluster-token", "bots", "--logger", "zap", "--log-level", "warn"])
            // Members of one machine share its disk; a fast election keeps fault tests short, as a fast network would.
            .args(["--heartbeat-interval", "100", "--election-timeout", "1000"])
            .args(&self.more)
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("cannot start etcd: {e}: is it installed and on PATH?")))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until the member answers `/health`, which it does once it knows a leader.
    fn wait_until_ready(&mut self) -> io::Result<()> {
        let started = Clock::now();
        while Clock::now().since(started) < READY_DEADLINE {
            if healthy(self.client_port) {
                return Ok(());
            }
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok()).flatten() {
                let log = self.dir.join(format!("{}.log", self.name));
                return Err(io::Error::other(format!("etcd ended with {status}: see {}", log.display())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("etcd {} does not answer", self.name)))
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        let _gone_already = self.kill();
    }
}

/// Several members that know each other.
#[derive(Debug)]
pub struct EtcdCluster {
    /// The members, by number.
    pub members: Vec<EtcdServer>,
}

impl EtcdCluster {
    /// `size` members in `dir`; returns when all answer.
    ///
    /// # Errors
    /// If one cannot be started or does not answer.
    pub fn start(dir: &Path, size: usize) -> io::Result<Self> {
        Self::start_with(dir, size, &[])
    }

    fn start_with(dir: &Path, size: usize, more: &[&str]) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut members = Vec::new();
        for number in 0..size {
            members.push(EtcdServer {
                name: format!("etcd{number}"),
                dir: dir.to_owned(),
                client_port: free_port()?,
                peer_port: free_port()?,
                initial_cluster: String::new(),
                more: more.iter().map(ToString::to_string).collect(),
                child: None,
            });
        }
        let peer = |m: &EtcdServer| format!("{}=http://127.0.0.1:{}", m.name, m.peer_port);
        let initial_cluster = members.iter().map(peer).collect::<Vec<_>>().join(",");
        for member in &mut members {
            member.initial_cluster.clone_from(&initial_cluster);
            member.spawn()?;
        }
        members.iter_mut().try_for_each(EtcdServer::wait_until_ready)?;
        Ok(Self { members })
    }

    /// All client addresses, as `etcd3.hosts` takes them.
    #[must_use]
    pub fn hosts(&self) -> String {
        self.members.iter().map(EtcdServer::endpoint).collect::<Vec<_>>().join(",")
    }

    /// A client of all members.
    #[must_use]
    pub fn client(&self) -> Etcd {
        Etcd::new(&config::Etcd::from_hosts(&self.hosts())).expect("addresses of our own making")
    }
}

fn healthy(port: u16) -> bool {
    use std::io::{Read, Write};
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let ask = || -> io::Result<bool> {
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.contains("\"health\":\"true\""))
    };
    ask().unwrap_or(false)
}
