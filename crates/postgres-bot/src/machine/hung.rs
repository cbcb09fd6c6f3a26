//! Hung is dead: a primary whose server answers nobody, or whose disk takes no writes, gives the lock up, if another can take
//! over. What is the matter is the shell's to see; how long it may last is decided here.

use bots_core::{
    machine::{Span, Time},
    wire::{PostgresStatus, tags},
};
use serde::Serialize;

use super::{
    postgres::{Disk, Postgres},
    state::{State, Timer},
    turn::Turn,
};

/// However short the lease, unless `primary_hung_timeout` says otherwise, a server gets this long after it was found silent, which takes three questions without an answer:
/// a saturated machine answers one of ten late, and not none. So does a disk that is full.
const HUNG_AFTER_MIN: Span = Span::from_secs(5);

/// A disk that stalls gets this long: flushes of seconds are common on a saturated one.
const STALLED_AFTER_MIN: Span = Span::from_secs(15);

/// As long as nobody can take over, it is looked again this often whether somebody can.
const LOOK_AGAIN: Span = Span::from_secs(1);

/// The lock came back though it was given up: nobody else could use it. For this long it is kept.
const KEEPS_FOR: Span = Span::from_secs(120);

/// What ails the server or its disk, and since when.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Health {
    pub(super) disk: Disk,
    disk_since: Option<Time>,
    silent_since: Option<Time>,
    /// When a primary was last given up for it.
    gave_up: Option<Time>,
}

impl State {
    /// Whether the server answers and its disk takes writes, as far as was seen.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.health.disk == Disk::Good && self.postgres != Postgres::Silent
    }

    /// What is wrong with the disk; nothing if all is well.
    pub(super) fn disk_trouble(&self) -> Option<String> {
        match &self.health.disk {
            Disk::Good => None,
            Disk::Full { dir, bytes_free } => {
                Some(format!("the disk of {dir} is full: {bytes_free} bytes are free: make room"))
            }
            Disk::Failing { why } => Some(format!("the server's files cannot be written to: {why}")),
            Disk::Stalled => Some(String::from("the disk of the data directory or of pg_wal does not finish a write")),
        }
    }

    /// When a primary in this state is to be given up, and why.
    fn given_up_at(&self) -> Option<(Time, String)> {
        let hung_after = self.dynamic.primary_hung_timeout.unwrap_or(self.dynamic.ttl.max(HUNG_AFTER_MIN));
        if hung_after == Span::ZERO {
            return None;
        }
        let patience = match &self.health.disk {
            Disk::Stalled => hung_after.times(3).max(STALLED_AFTER_MIN),
            Disk::Good | Disk::Full { .. } | Disk::Failing { .. } => hung_after,
        };
        let disk = self.health.disk_since.zip(self.disk_trouble()).map(|(since, why)| (since + patience, why));
        let silent = self
            .health
            .silent_since
            .map(|since| (since + hung_after, String::from("Postgres is alive and answers nobody")));
        let (at, why) = disk.into_iter().chain(silent).min()?;
        let kept_until = self.health.gave_up.map_or(Time::ZERO, |at| at + KEEPS_FOR);
        Some((at.max(kept_until), why))
    }

    /// Whether another member looks fit to lead, as far as etcd says: it would take the lock at once.
    fn another_is_fit(&self) -> bool {
        let (current, maximum_lag) = (self.timelines().current, self.dynamic.maximum_lag_on_failover);
        let status: PostgresStatus = self.view.json(&self.settings.scope.status()).unwrap_or_default();
        self.peers().filter(|(name, _)| self.loses_nothing_by(name)).any(|(name, _)| {
            self.member(name).is_some_and(|(member, facts)| {
                let position = facts.xlog_location.unwrap_or_default();
                member.head.state == "running"
                    && facts.timeline == Some(current)
                    && !tags::nofailover(&facts.tags)
                    && status.optime.0.saturating_sub(position.0) <= maximum_lag
            })
        })
    }
}

impl Turn {
    /// Keeps in mind since when the server does not answer, and the disk is not well.
    pub(super) fn note_health(&mut self) {
        let (now, silent, disk) = (self.now, self.s.postgres == Postgres::Silent, self.s.health.disk != Disk::Good);
        let since = |since: Option<Time>, ails: bool| ails.then(|| since.unwrap_or(now));
        self.s.health.silent_since = since(self.s.health.silent_since, silent);
        self.s.health.disk_since = since(self.s.health.disk_since, disk);
        if self.s.given_up_at().is_none() {
            self.s.timers.disarm(Timer::Hung);
        }
    }

    /// What has ailed the server for longer than is borne; nothing if all is well, or may be yet.
    pub(super) fn ails_for_too_long(&mut self) -> Option<String> {
        let (due, why) = self.s.given_up_at()?;
        if self.now < due {
            self.s.timers.arm(Timer::Hung, due);
            return None;
        }
        Some(why)
    }

    /// Gives up a server that has been ailing for too long; says whether it did.
    pub(super) fn gives_up_hung(&mut self) -> bool {
        let Some(why) = self.ails_for_too_long() else { return false };
        let locked = self.s.leadership.fence(self.now, &self.s.membership).is_some() && self.s.view.is_watched();
        if !locked || self.s.dynamic.pause || !self.s.another_is_fit() {
            self.s.timers.arm(Timer::Hung, self.now + LOOK_AGAIN);
            return false;
        }
        self.s.health.gave_up = Some(self.now);
        self.unfit(&format!("another shall lead: {why}"));
        true
    }
}
