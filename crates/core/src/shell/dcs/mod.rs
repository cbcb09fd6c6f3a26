//! The way to the real store: actions in, events out. A thin layer over etcd; decisions are the machines'.

mod convert;
mod etcd;
mod fatal;
mod renewal;
mod route;
mod version;
mod watch;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

pub use etcd::{Etcd, EtcdError};

use self::{
    fatal::Fatal,
    renewal::{Renewal, Renewals},
};
use super::{
    config,
    metrics::Metrics,
    runtime::{Events, Pulse},
    status::{Identity, StatusHub},
};
use crate::dcs::{DcsAction, DcsEvent, LeaseId, Outcome, RequestId, Transaction};

/// Transactions that may wait for their turn. A machine asks for a handful at once; more is a storm to be refused.
const JOBS_MAX: usize = 256;

/// Takes the store's events to the machine's queue. Clones share.
#[derive(Clone)]
pub struct DcsSink {
    inner: Arc<dyn Sink>,
}

trait Sink: Send + Sync {
    fn send(&self, event: DcsEvent) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

struct Wrapping<E> {
    events: Events<E>,
    wrap: fn(DcsEvent) -> E,
}

impl<E: Send + 'static> Sink for Wrapping<E> {
    fn send(&self, event: DcsEvent) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.events.send((self.wrap)(event)))
    }
}

impl DcsSink {
    /// A sink that wraps every event with `wrap` and queues it.
    pub fn new<E: Send + 'static>(events: Events<E>, wrap: fn(DcsEvent) -> E) -> Self {
        Self { inner: Arc::new(Wrapping { events, wrap }) }
    }

    async fn send(&self, event: DcsEvent) {
        self.inner.send(event).await;
    }
}

/// A bot's way to etcd: performs actions in order, answers through the sink, renews the lease on a thread of its own.
/// Clones share.
#[derive(Clone)]
pub struct DcsHandle {
    etcd: Etcd,
    sink: DcsSink,
    jobs: mpsc::Sender<Job>,
    renewal: Renewal,
    /// A key that this bot may read.
    readable: Arc<OnceLock<String>>,
    fatal: Fatal,
    hub: StatusHub,
}

/// The way to etcd that several machines of one process share: its connections, and the thread that renews leases.
#[derive(Clone)]
pub struct DcsLine {
    etcd: Etcd,
    renewals: Renewals,
    fatal: Fatal,
}

impl DcsLine {
    /// A way to the configured members; `hubs` are told when they stop or begin to answer.
    ///
    /// # Errors
    /// If the configuration names no usable member, or the renewal thread cannot be started.
    pub fn open(config: &config::Etcd, hubs: Vec<StatusHub>, metrics: Metrics) -> Result<Self, EtcdError> {
        let tell = move |trouble: Option<String>| hubs.iter().for_each(|hub| hub.set_store_trouble(trouble.clone()));
        let etcd = Etcd::for_bot(config, metrics, tell)?;
        let fatal = Fatal::default();
        let renewals = Renewals::start(etcd.on_another_thread(), fatal.clone())
            .map_err(|e| EtcdError::Config(format!("cannot start the renewal thread: {e}")))?;
        Ok(Self { etcd, renewals, fatal })
    }

    /// The way of one machine, which `hub` shows. Must be called inside a runtime.
    #[must_use]
    pub fn handle(&self, sink: DcsSink, pulse: Pulse, hub: StatusHub) -> DcsHandle {
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        self.fatal.supervise("the task that writes to etcd", work(self.etcd.clone(), sink.clone(), queue));
        let (readable, etcd) = (Arc::new(OnceLock::new()), self.etcd.clone());
        let renewal = self.renewals.of(sink.clone(), pulse, Arc::clone(&readable));
        DcsHandle { etcd, sink, jobs, renewal, readable, fatal: self.fatal.clone(), hub }
    }

    /// Ends when the way to etcd has ended for good, and says why: nothing but another start of the bot can mend that.
    pub async fn failed(&self) -> String {
        self.fatal.told().await
    }
}

enum Job {
    Transact { id: RequestId, transaction: Transaction },
    Revoke { lease: LeaseId },
    Drained(oneshot::Sender<()>),
}

impl DcsHandle {
    /// Begins to work; connects when there is something to do. Must be called inside a runtime.
    ///
    /// # Errors
    /// If the configuration names no usable member, or the renewal thread cannot be started.
    pub fn start(
        config: &config::Etcd,
        sink: DcsSink,
        pulse: Pulse,
        hub: StatusHub,
        metrics: Metrics,
    ) -> Result<Self, EtcdError> {
        Ok(DcsLine::open(config, vec![hub.clone()], metrics)?.handle(sink, pulse, hub))
    }

    /// Performs an action; never waits. Answers arrive through the sink.
    pub fn perform(&self, action: DcsAction) {
        match action {
            DcsAction::GrantLease { ttl } => self.renewal.grant(ttl),
            DcsAction::PaceLease { lease, every } => self.renewal.pace(lease, every),
            DcsAction::RevokeLease { lease } => {
                self.renewal.forget(lease);
                self.queue(Job::Revoke { lease });
            }
            DcsAction::Transact { id, transaction } => self.queue(Job::Transact { id, transaction }),
        }
    }

    /// Watches the prefixes from now on, each until the process ends.
    pub fn watch(&self, prefixes: impl IntoIterator<Item = String>) {
        for prefix in prefixes {
            let _the_first = self.readable.set(prefix.clone());
            let (follow, fatal) = (watch::follow(self.etcd.clone(), prefix, self.sink.clone()), self.fatal.clone());
            self.fatal.supervise("the task that watches etcd", async move { fatal.tell(follow.await) });
        }
    }

    /// Ends when the way to etcd has ended for good, and says why.
    pub async fn failed(&self) -> String {
        self.fatal.told().await
    }

    /// Who the bot is that goes this way.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        self.hub.identity()
    }

    /// The client underneath, for reads that no machine decides upon.
    #[must_use]
    pub const fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// Waits until what was asked for so far has been done, but not longer than `deadline`.
    pub async fn drain(&self, deadline: Duration) {
        let (done, drained) = oneshot::channel();
        let all = async {
            if self.jobs.send(Job::Drained(done)).await.is_ok() {
                let _ended = drained.await;
            }
        };
        let _elapsed = tokio::time::timeout(deadline, all).await;
    }

    fn queue(&self, job: Job) {
        let Err(error) = self.jobs.try_send(job) else { return };
        if let Job::Transact { id, .. } = error.into_inner() {
            let sink = self.sink.clone();
            let outcome = Outcome::Unknown(format!("{JOBS_MAX} requests to etcd wait already"));
            tokio::spawn(async move { sink.send(DcsEvent::Answered { id, outcome }).await });
        }
    }
}

async fn work(etcd: Etcd, sink: DcsSink, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Transact { id, transaction } => {
                let outcome = etcd.transact(&transaction).await;
                sink.send(DcsEvent::Answered { id, outcome }).await;
            }
            Job::Revoke { lease } => {
                if let Err(error) = etcd.revoke(lease).await {
                    tracing::warn!(%error, "a lease could not be given back; it will run out by itself");
                }
            }
            Job::Drained(done) => {
                let _gone = done.send(());
            }
        }
    }
}
