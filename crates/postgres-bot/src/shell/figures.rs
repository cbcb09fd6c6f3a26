//! Figures that Patroni has not: how often this member took over and how long that took, and how near the fence came. Read off
//! the machine's state after every step; nothing here decides.

use std::sync::atomic::AtomicU64;

use bots_core::{machine::Time, shell::Metrics};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use crate::machine::{Role, State};

/// Seconds without a primary: from a switchover on a quiet machine to a lost node at a long lease.
const OUTAGE_SECONDS: [f64; 11] = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

/// Seconds that were left: at a lease of 5 s that is renewed in time, about three.
const MARGIN_SECONDS: [f64; 10] = [0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0];

/// What is counted, and what must be remembered for it.
#[derive(Debug)]
pub(super) struct Figures {
    promotions: Counter,
    promotion_seconds: Histogram,
    restarts: Counter,
    restart_seconds: Histogram,
    fences: Counter,
    margin_seconds: Histogram,
    margin_seconds_min: Gauge<f64, AtomicU64>,
    role: Role,
    leaderless_since: Option<Time>,
    crashed_at: Option<Time>,
    valid_until: Option<Time>,
    margin_ms_min: Option<u64>,
}

impl Figures {
    /// Registers them.
    pub(super) fn new(metrics: &Metrics, guard_fences: Counter) -> Self {
        let figures = Self {
            promotions: Counter::default(),
            promotion_seconds: Histogram::new(OUTAGE_SECONDS),
            restarts: Counter::default(),
            restart_seconds: Histogram::new(OUTAGE_SECONDS),
            fences: Counter::default(),
            margin_seconds: Histogram::new(MARGIN_SECONDS),
            margin_seconds_min: Gauge::default(),
            role: Role::Initializing,
            leaderless_since: None,
            crashed_at: None,
            valid_until: None,
            margin_ms_min: None,
        };
        metrics.with(|registry| {
            let mut add = |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
            add(
                "bots_postgres_promotions",
                "Times that this member became the primary by promotion",
                &figures.promotions,
            );
            add(
                "bots_postgres_restarts_in_place",
                "Times that a crashed primary came back in place",
                &figures.restarts,
            );
            add(
                "bots_postgres_fences",
                "Times that the server was stopped for want of the lock or its lease",
                &figures.fences,
            );
            add(
                "bots_postgres_guard_fences",
                "Times that the server was stopped by its guard, as far as this bot has seen",
                &guard_fences,
            );
            let mut add = |name: &str, help: &str, seconds: &Histogram| registry.register(name, help, seconds.clone());
            add(
                "bots_postgres_promotion_seconds",
                "From when the leader key was seen gone until this member accepted writes",
                &figures.promotion_seconds,
            );
            add(
                "bots_postgres_restart_in_place_seconds",
                "From the crash of a primary until it accepted writes again in place",
                &figures.restart_seconds,
            );
            add(
                "bots_postgres_fence_margin_seconds",
                "How far off the guard's fence was when the lease of a leader was renewed",
                &figures.margin_seconds,
            );
            let min = figures.margin_seconds_min.clone();
            registry.register(
                "bots_postgres_fence_margin_seconds_min",
                "The smallest of those since the bot was started",
                min,
            );
        });
        figures
    }

    /// Takes note of a step.
    pub(super) fn note(&mut self, state: &State, now: Time) {
        for role in state.passed() {
            self.passed(self.role, *role, now);
            if *role == Role::Demoting && state.is_fenced() {
                self.fences.inc();
            }
            self.role = *role;
        }
        self.leaderless_since = state.leaderless_since().or(self.leaderless_since);
        if matches!(self.role, Role::Replica | Role::Primary) && state.leaderless_since().is_none() {
            self.leaderless_since = None;
        }
        let valid_until = state.membership().valid_until().filter(|_| state.leadership().is_held());
        if let (Some(before), Some(after)) = (self.valid_until, valid_until)
            && after > before
        {
            let left = (before - state.guard_margin()).since(now).as_millis();
            self.margin_seconds.observe(seconds(left));
            let least = self.margin_ms_min.map_or(left, |least| least.min(left));
            self.margin_ms_min = Some(least);
            self.margin_seconds_min.set(seconds(least));
        }
        self.valid_until = valid_until;
    }

    fn passed(&mut self, from: Role, to: Role, now: Time) {
        let ms_since = |moment: Option<Time>| moment.map(|moment| now.since(moment).as_millis());
        match (from, to) {
            (Role::Promoting, Role::Primary) => {
                self.promotions.inc();
                if let Some(ms) = ms_since(self.leaderless_since.take()) {
                    self.promotion_seconds.observe(seconds(ms));
                }
            }
            (Role::Primary, Role::Recovering) => self.crashed_at = Some(now),
            (Role::Recovering, Role::Primary) => {
                if let Some(ms) = ms_since(self.crashed_at.take()) {
                    self.restarts.inc();
                    self.restart_seconds.observe(seconds(ms));
                }
            }
            (_, _) => self.crashed_at = None,
        }
    }
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}
