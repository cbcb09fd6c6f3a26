//! Timers as data: an enum of purposes and a table of deadlines. Nothing here waits.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Time;

/// The next moment at which a machine wants a step, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Deadline {
    /// When.
    pub at: Time,
    /// What for, in the words of the report.
    pub reason: String,
}

impl Deadline {
    /// The earlier of two deadlines.
    #[must_use]
    pub fn earliest(candidates: impl IntoIterator<Item = Option<Self>>) -> Option<Self> {
        candidates.into_iter().flatten().min_by_key(|d| d.at)
    }
}

/// A table of armed timers, at most one a purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Timers<K: Ord> {
    armed: BTreeMap<K, Time>,
}

impl<K: Ord> Default for Timers<K> {
    fn default() -> Self {
        Self { armed: BTreeMap::new() }
    }
}

impl<K: Ord + Copy + std::fmt::Display> Timers<K> {
    /// Arms `timer` for `at`, replacing what it was armed for.
    pub fn arm(&mut self, timer: K, at: Time) {
        self.armed.insert(timer, at);
    }

    /// Arms `timer` for `at` unless it is already armed.
    pub fn arm_if_idle(&mut self, timer: K, at: Time) {
        self.armed.entry(timer).or_insert(at);
    }

    /// Disarms `timer`.
    pub fn disarm(&mut self, timer: K) {
        self.armed.remove(&timer);
    }

    /// Whether `timer` is armed, and for when.
    #[must_use]
    pub fn armed(&self, timer: K) -> Option<Time> {
        self.armed.get(&timer).copied()
    }

    /// Takes one timer that is due at `now`, the earliest first.
    pub fn take_due(&mut self, now: Time) -> Option<K> {
        let timer =
            self.armed.iter().filter(|(_, at)| **at <= now).min_by_key(|(k, at)| (**at, **k)).map(|(k, _)| *k)?;
        self.armed.remove(&timer);
        Some(timer)
    }

    /// The next deadline, in its timer's words.
    #[must_use]
    pub fn next(&self) -> Option<Deadline> {
        self.armed.iter().min_by_key(|(_, at)| **at).map(|(k, at)| Deadline { at: *at, reason: k.to_string() })
    }
}
