//! Metrics in Prometheus' form: one registry a bot, none global, so that many bots fit in one test process.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// A label set of one operation's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Op {
    /// The operation.
    pub op: &'static str,
}

/// A label set of one site's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Site {
    /// The site's scope.
    pub site: String,
}

type HistogramOfSites = Family<Site, Histogram, fn() -> Histogram>;

/// Figures of the same name, one a site.
#[derive(Debug, Default)]
struct OfSites {
    counters: BTreeMap<&'static str, Family<Site, Counter>>,
    gauges: BTreeMap<&'static str, Family<Site, Gauge>>,
    histograms: BTreeMap<&'static str, HistogramOfSites>,
}

/// The registry of one bot, with what every bot counts. Clones share.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    /// The label of what is registered from now on; nothing where a process has one site.
    site: Option<Site>,
    of_sites: Arc<Mutex<OfSites>>,
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
            site: None,
            of_sites: Arc::default(),
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

    /// The same registry, for the figures of one site among others.
    #[must_use]
    pub fn of_site(&self, scope: &str) -> Self {
        Self { site: Some(Site { site: scope.to_owned() }), ..self.clone() }
    }

    /// A new counter of the bot; `help` says what it counts.
    pub fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        let Some(site) = &self.site else {
            let counter = Counter::default();
            self.with(|r| r.register(name, help, counter.clone()));
            return counter;
        };
        let mut of_sites = self.of_sites.lock().unwrap_or_else(PoisonError::into_inner);
        let family = of_sites.counters.entry(name).or_insert_with(|| {
            let family = Family::default();
            self.with(|r| r.register(name, help, family.clone()));
            family
        });
        family.get_or_create(site).clone()
    }

    /// A new gauge of the bot; `help` says what it shows.
    pub fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        let Some(site) = &self.site else {
            let gauge = Gauge::default();
            self.with(|r| r.register(name, help, gauge.clone()));
            return gauge;
        };
        let mut of_sites = self.of_sites.lock().unwrap_or_else(PoisonError::into_inner);
        let family = of_sites.gauges.entry(name).or_insert_with(|| {
            let family = Family::default();
            self.with(|r| r.register(name, help, family.clone()));
            family
        });
        family.get_or_create(site).clone()
    }

    /// A new histogram of the bot, made by `empty`; `help` says what it shows.
    pub fn histogram(&self, name: &'static str, help: &'static str, empty: fn() -> Histogram) -> Histogram {
        let Some(site) = &self.site else {
            let histogram = empty();
            self.with(|r| r.register(name, help, histogram.clone()));
            return histogram;
        };
        let mut of_sites = self.of_sites.lock().unwrap_or_else(PoisonError::into_inner);
        let family = of_sites.histograms.entry(name).or_insert_with(|| {
            let family = Family::new_with_constructor(empty);
            self.with(|r| r.register(name, help, family.clone()));
            family
        });
        family.get_or_create(site).clone()
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
