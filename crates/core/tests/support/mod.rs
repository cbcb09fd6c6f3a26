//! What the tests of the core share: stores behind one trait, a proxy that breaks connections, and patience.

#![allow(dead_code, reason = "every test program uses a part of it")]

pub(crate) mod proxy;
pub(crate) mod store;

use std::time::Duration;

use bots_core::{
    dcs::DcsEvent,
    machine::Time,
    shell::{
        Clock, DcsHandle, Metrics, Pulse, StatusHub, config,
        dcs::DcsSink,
        runtime::{Queue, queue},
        status::Identity,
    },
};

/// Long beside anything a healthy store does, so that a busy machine does not fail a test; a broken one fails it once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A handle as a bot has it, with a loop that turns for as long as `pulse` is beaten.
pub(crate) struct Bench {
    pub(crate) dcs: DcsHandle,
    pub(crate) events: Queue<DcsEvent>,
    pub(crate) pulse: Pulse,
    pub(crate) hub: StatusHub,
    pub(crate) metrics: Metrics,
}

impl Bench {
    /// A bot on `hosts` whose loop turns by itself.
    pub(crate) fn new(hosts: &str) -> Self {
        Self::with(&config::Etcd::from_hosts(hosts))
    }

    /// The same, as `config` says.
    pub(crate) fn with(config: &config::Etcd) -> Self {
        let bench = Self::build(config);
        let pulse = bench.pulse.clone();
        tokio::spawn(async move {
            loop {
                pulse.beat();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        bench
    }

    /// A bot on `hosts` whose loop turns only when the test says so.
    pub(crate) fn standing_still(hosts: &str) -> Self {
        Self::build(&config::Etcd::from_hosts(hosts))
    }

    fn build(config: &config::Etcd) -> Self {
        let (events, queue) = queue();
        let (pulse, metrics) = (Pulse::new(), Metrics::new());
        let hub = StatusHub::new(Identity {
            name: "a".into(),
            scope: "s".into(),
            namespace: "service".into(),
            kind: "test".into(),
            instance: "i".into(),
            version: "0".into(),
        });
        let sink = DcsSink::new(events, |event| event);
        let dcs = DcsHandle::start(config, sink, pulse.clone(), hub.clone(), metrics.clone()).expect("start");
        Self { dcs, events: queue, pulse, hub, metrics }
    }

    /// The next event that `pick` takes; the others are passed over.
    pub(crate) async fn until<T>(&mut self, what: &str, mut pick: impl FnMut(&DcsEvent) -> Option<T>) -> T {
        let next = async {
            loop {
                let event = self.events.next().await.expect("the handle lives");
                if let Some(found) = pick(&event) {
                    return found;
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.unwrap_or_else(|_| panic!("no {what} in {PATIENCE:?}"))
    }
}

/// Repeats `probe` until it yields something.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Clock::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Clock::now().since(started).to_std() < PATIENCE, "no {what} in {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Milliseconds from `a` to `b`, which lies later.
pub(crate) fn ms_between(a: Time, b: Time) -> u64 {
    b.since(a).as_millis()
}
