//! The data plane: takes requests on a port of its own, on threads of its own, and sends each where the route says at
//! the moment when it begins. Where the route leads is the machine's affair.
//!
//! A request keeps the route that it began with, and with it the commit: no answer mixes two.

mod activity;
mod answer;
mod lane;
mod log;
mod meter;
mod proxy;
mod serve;
mod site;
#[cfg(test)]
mod tests;
mod tls;
mod upload;
mod workers;

use std::{
    net::TcpListener as StdListener,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicUsize},
    time::Duration,
};

use bots_core::{
    shell::{Events, Metrics, Networks},
    wire::WebLoad,
};
use hyper::header::HeaderValue;
use tokio::{runtime::Runtime, sync::watch};

pub(crate) use self::tls::TlsFiles;
use self::{
    log::{AccessLog, MaybeLog},
    serve::Counters,
    tls::Keys,
    workers::{Workers, ask_silent_peers},
};
pub(crate) use self::{
    meter::{InFlight, Meter},
    site::{Site, SiteBuilder, SiteError, Vault},
};
use crate::machine::Event;

/// How often the load is measured while there is any.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);

/// How soon it is measured for the first time after a silence: an overload that begins at once is told of at once, and a handful
/// of requests that come together is none over this time.
const FIRST_SAMPLE_AFTER: Duration = Duration::from_millis(200);

/// More threads than this gain nothing for what one bot serves.
const THREADS_MAX: usize = 8;

/// Where requests go: the machine's route, with what it takes to follow it.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// 503, naming the state.
    Refuse { state: String },
    /// Wait for another target.
    Hold,
    /// The files of a commit.
    Static { site: Arc<Site>, closing: bool },
    /// An instance of the app.
    App { backend: Arc<Backend>, closing: bool },
}

/// An instance of the app, as requests see it.
pub(crate) struct Backend {
    /// Its port on loopback.
    pub(crate) port: u16,
    /// The commit that it was started on.
    pub(crate) sha: String,
    /// Its own requests.
    pub(crate) meter: Meter,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend").field("port", &self.port).field("sha", &self.sha).finish_non_exhaustive()
    }
}

/// The data plane at work; stops when dropped.
pub(crate) struct Plane {
    shared: Arc<Shared>,
    load: watch::Receiver<WebLoad>,
    runtime: Option<Runtime>,
}

/// What every request needs.
struct Shared {
    name: HeaderValue,
    route: watch::Sender<Target>,
    meter: Meter,
    counters: Counters,
    log: MaybeLog,
    trusted: Networks,
    patience: Duration,
    hold: Hold,
    body_max: usize,
    /// Requests that wait for a route.
    held: AtomicUsize,
    /// Open connections, to be closed when the last answers are sent.
    connections: Mutex<watch::Sender<()>>,
}

/// Where and how to serve.
pub(crate) struct Doors {
    /// For connections as they are.
    pub(crate) plain: StdListener,
    /// For TLS.
    pub(crate) tls: Option<(StdListener, TlsFiles)>,
    /// Where a line for each answer goes.
    pub(crate) access_log: Option<PathBuf>,
    /// How long the app may take to begin an answer.
    pub(crate) app_answer_timeout: Duration,
    /// Whose word about other clients is believed.
    pub(crate) trusted: Networks,
    /// How long a client may take to send the head of its next request, and to read something of what is sent to it.
    pub(crate) patience: Duration,
    /// What waits for an app that is about to be there.
    pub(crate) hold: Hold,
    /// The largest body that is passed to the app, in bytes.
    pub(crate) body_max: usize,
}

/// How long a request waits for an app that is about to be there, and how many may wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hold {
    pub(crate) timeout: Duration,
    pub(crate) requests_max: usize,
}

impl Plane {
    /// Begins to serve; the first route is to be told.
    ///
    /// # Errors
    /// One line: threads, sockets or files cannot be had.
    pub(crate) fn start(doors: Doors, name: &str, events: Events<Event>, metrics: &Metrics) -> Result<Self, String> {
        let log = doors.access_log.map(|path| {
            let open = AccessLog::open(path.clone(), metrics);
            open.map(Arc::new)
                .map_err(|e| format!("web.access_log: {}: {e}: name a file that the bot may write", path.display()))
        });
        let log = log.transpose()?;
        let (tls, keys) = match doors.tls {
            Some((listener, files)) => {
                let keys = Keys::read(files)?;
                (Some((listener, keys.acceptor()?)), Some(keys))
            }
            None => (None, None),
        };
        let failed = |e: std::io::Error| format!("cannot start the web server: {e}");
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS_MAX));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("web")
            .enable_all()
            .build()
            .map_err(failed)?;
        let shared = Arc::new(Shared {
            name: HeaderValue::from_str(name).map_err(|e| format!("name: {e}"))?,
            route: watch::Sender::new(Target::Refuse { state: String::from("starting") }),
            meter: Meter::new(),
            counters: Counters::register(metrics),
            log,
            trusted: doors.trusted,
            patience: doors.patience,
            hold: doors.hold,
            body_max: doors.body_max,
            held: AtomicUsize::new(0),
            connections: Mutex::new(watch::Sender::new(())),
        });
        let (acceptor, secure) = tls.map_or((None, None), |(listener, acceptor)| (Some(acceptor), Some(listener)));
        let (measured, load) = watch::channel(WebLoad::default());
        let workers = Workers::start(threads, &shared, doors.app_answer_timeout, acceptor.as_ref()).map_err(failed)?;
        let workers = Arc::new(workers);
        let _context = runtime.enter();
        for (listener, secure) in [(Some(doors.plain), false), (secure, true)] {
            let Some(listener) = listener else { continue };
            listener.set_nonblocking(true).map_err(failed)?;
            ask_silent_peers(&listener).map_err(failed)?;
            let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
            runtime.spawn(Arc::clone(&workers).accept(listener, secure));
        }
        runtime.spawn(async move {
            if let Some(keys) = keys {
                keys.follow().await;
            }
        });
        runtime.spawn(measure(shared.meter.clone(), measured, events));
        drop(_context);
        Ok(Self { shared, load, runtime: Some(runtime) })
    }

    /// Sends requests to `target` from now on. When this returns, none begins with the old one any more.
    pub(crate) fn set_target(&self, target: Target) {
        match &target {
            Target::Static { site, closing: _ } => self.shared.meter.follow(site.sha()),
            Target::App { backend, closing: _ } => self.shared.meter.follow(&backend.sha),
            Target::Refuse { .. } | Target::Hold => {}
        }
        self.shared.route.send_replace(target);
    }

    /// Closes the open connections, each once the answer that is under way on it has left to the last byte. Ends when all
    /// are closed; connections that are opened meanwhile do not count.
    pub(crate) fn finish(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut connections = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let open = std::mem::replace(&mut *connections, watch::Sender::new(()));
        let meter = self.shared.meter.clone();
        async move {
            open.send_replace(());
            open.closed().await;
            meter.still().await;
        }
    }

    /// The meter of all requests.
    pub(crate) fn meter(&self) -> &Meter {
        &self.shared.meter
    }

    /// The newest load, as it changes.
    pub(crate) fn load(&self) -> watch::Receiver<WebLoad> {
        self.load.clone()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Tells the machine how busy we are: often while there is load, never while there is none.
async fn measure(meter: Meter, measured: watch::Sender<WebLoad>, events: Events<Event>) {
    let mut told = WebLoad::default();
    loop {
        meter.busy().await;
        let mut pause = FIRST_SAMPLE_AFTER;
        loop {
            tokio::time::sleep(pause).await;
            pause = SAMPLE_INTERVAL;
            let (load, busy) = meter.sample();
            if load != told {
                told = load;
                measured.send_replace(load);
                events.send(Event::LoadMeasured(load)).await;
            }
            let silent = WebLoad { requests: load.requests, errors: load.errors, ..WebLoad::default() };
            if !busy && load == silent {
                break;
            }
        }
    }
}
