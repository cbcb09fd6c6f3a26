//! What a client of one proxy sees of a change: where new connections end up, and when an old session is shut.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use fleet::wait::until;
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    task::{JoinHandle, JoinSet},
};

/// Between two connections. The least that is told apart; a thousandth of what health checks take.
const CONNECT_EVERY: Duration = Duration::from_millis(1);

/// A session of before, which the change shall end.
pub(crate) struct Session(TcpStream);

/// How one change looked at one proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    /// From the change until a new connection reached the new leader.
    pub(crate) routed: Duration,
    /// From the change until the session with the old leader was shut; nothing if it never was in this time.
    pub(crate) shut: Option<Duration>,
    /// Connections that reached the old leader after the change.
    pub(crate) astray: usize,
    /// Connections that were closed without an answer.
    pub(crate) refused: usize,
}

/// Connections so far: when each was begun and answered, and by whom.
type Seen = Arc<Mutex<Vec<(Instant, Instant, Option<String>)>>>;

/// Connects all the time, and watches a session, from before a change until it is through.
pub(crate) struct Probe {
    seen: Seen,
    stop: Arc<AtomicBool>,
    connecting: JoinHandle<()>,
    session: JoinHandle<Instant>,
}

impl Probe {
    /// Begins at the proxy that listens at `port`, which must route to `old`.
    pub(crate) async fn begin(port: u16, old: &str) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let session = Session::open(address, old).await?;
        let seen = Seen::default();
        let stop = Arc::new(AtomicBool::new(false));
        let connecting = tokio::spawn(connect_on_and_on(address, Arc::clone(&seen), Arc::clone(&stop)));
        Ok(Self { seen, stop, connecting, session: tokio::spawn(session.ended()) })
    }

    /// Waits until a new connection has reached `new` after `moment`, and yields how it looked.
    pub(crate) async fn end(self, moment: Instant, new: &str, deadline: Duration) -> Result<Change> {
        let first = |seen: &[(Instant, Instant, Option<String>)]| {
            let after = seen.iter().filter(|(_, answered, name)| *answered > moment && name.as_deref() == Some(new));
            after.map(|(_, answered, _)| *answered).min()
        };
        let routed = until("a connection reaches the new leader", deadline, || async {
            first(&self.seen.lock().unwrap_or_else(PoisonError::into_inner)).ok_or_else(|| String::from("not yet"))
        })
        .await;
        // A session that is shut at all is shut before or with the opening, or a moment later.
        let shut = tokio::time::timeout(Duration::from_millis(50), self.session).await;
        self.stop.store(true, Ordering::SeqCst);
        self.connecting.abort();
        let routed = routed?;
        let all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let after = || all.iter().filter(|(began, answered, _)| *began > moment && *answered <= routed);
        let shut = match shut {
            Ok(ended) => Some(ended.context("watch the session")?.saturating_duration_since(moment)),
            Err(_elapsed) => None,
        };
        Ok(Change {
            routed: routed - moment,
            shut,
            astray: after().filter(|(_, _, name)| name.as_deref().is_some_and(|name| name != new)).count(),
            refused: after().filter(|(_, _, name)| name.is_none()).count(),
        })
    }
}

impl Session {
    async fn open(address: SocketAddr, name: &str) -> Result<Self> {
        let mut stream = TcpStream::connect(address).await.context("connect to the proxy")?;
        let found = greeting(&mut stream).await;
        if found.as_deref() != Some(name) {
            bail!("the proxy routes to {found:?}, not to {name}");
        }
        Ok(Self(stream))
    }

    async fn ended(mut self) -> Instant {
        let mut nothing = [0; 16];
        while self.0.read(&mut nothing).await.is_ok_and(|bytes| bytes > 0) {}
        Instant::now()
    }
}

/// So many connections in a row go to the same server by its route, not by chance: a stock proxy takes all for healthy at
/// first, and distributes.
const IN_A_ROW: usize = 8;

/// Waits until the proxy at `port` routes to `name`, and to nobody else.
pub(crate) async fn routes_to(port: u16, name: &str, deadline: Duration) -> Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    until(&format!("port {port} routes to {name}"), deadline, || async {
        for _ in 0..IN_A_ROW {
            Session::open(address, name).await.map_err(|error| format!("{error:#}"))?;
        }
        Ok(())
    })
    .await
}

/// Whether one is held or not, the next one is begun.
async fn connect_on_and_on(address: SocketAddr, seen: Seen, stop: Arc<AtomicBool>) {
    let mut under_way = JoinSet::new();
    let mut ticks = tokio::time::interval(CONNECT_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !stop.load(Ordering::SeqCst) {
        ticks.tick().await;
        while under_way.try_join_next().is_some() {}
        let seen = Arc::clone(&seen);
        under_way.spawn(async move {
            let began = Instant::now();
            let name = match TcpStream::connect(address).await {
                Ok(mut stream) => greeting(&mut stream).await,
                Err(_refused) => None,
            };
            seen.lock().unwrap_or_else(PoisonError::into_inner).push((began, Instant::now(), name));
        });
    }
}

/// What a server says to who connects; nothing if the connection is closed before.
async fn greeting(stream: &mut TcpStream) -> Option<String> {
    let mut name = [0; 64];
    let bytes = stream.read(&mut name).await.ok().filter(|bytes| *bytes > 0)?;
    Some(String::from_utf8_lossy(&name[..bytes]).into_owned())
}
