//! Metrics in Prometheus' form: one registry a bot, none global, so that many bots fit in one test process.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// A label set of one operation's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Op {
    /// The operation.
    pub op: &'static str,
}

/// The registry of one bot, with what every bot counts. Clones share.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    /// Requests sent to etcd, by operation.
    pub etcd_requests: Family<Op, Counter>,
    /// Steps that the machine has taken.
    pub steps: Counter,
    /// Changes of role.
    pub role_changes: Counter,
    /// Events that waited in the queue when the last step began.
    pub queue_length: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry with the common metrics in it.
    #[must_use]
    pub fn new() -> Self {
        let metrics = Self {
            registry: Arc::new(Mutex::new(Registry::default())),
            etcd_requests: Family::default(),
            steps: Counter::default(),
            role_changes: Counter::default(),
            queue_length: Gauge::default(),
        };
        metrics.with(|r| {
            r.register("bots_etcd_requests", "Requests sent to etcd", metrics.etcd_requests.clone());
            r.register("bots_steps", "Steps that the machine has taken", metrics.steps.clone());
            r.register("bots_role_changes", "Changes of role", metrics.role_changes.clone());
            r.register("bots_event_queue_length", "Events that wait for the machine", metrics.queue_length.clone());
        });
        metrics
    }

    /// Registers a bot's own metrics.
    pub fn with<R>(&self, register: impl FnOnce(&mut Registry) -> R) -> R {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts a request to etcd.
    pub fn etcd_request(&self, op: &'static str) {
        self.etcd_requests.get_or_create(&Op { op }).inc();
    }

    /// All metrics in the OpenMetrics text format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        match self.with(|r| encode(&mut out, r)) {
            Ok(()) => out,
            Err(std::fmt::Error) => String::new(),
        }
    }
}
