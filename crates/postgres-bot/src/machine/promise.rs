//! A member's word in failsafe mode. To a primary without etcd it is a promise: for [`PROMISE`] neither to stand for leader nor
//! to support who does. To a candidate it is support: for [`SUPPORT`] no promise to any other primary. Whoever gives one
//! refuses the other, and a member that was just started, and does not know what it said before, refuses both.
//!
//! Each is timed by whoever asked from when it asked, and by whoever answered from when it answered: the word outlasts
//! the use that is made of it.

use std::collections::BTreeMap;

use bots_core::{
    dcs::Revision,
    machine::{Deadline, Span, Time},
};
use serde::Serialize;

use super::{
    event::{Action, Ask, AskedId},
    state::State,
    turn::Turn,
};

/// How long a promise to a primary holds. One length for all clusters and times, so that a member that was restarted knows
/// how long to wait: an earlier life may have promised something under any `ttl`.
pub(super) const PROMISE: Span = Span::from_secs(5);

/// How long a member's support can be used. An election takes some ten milliseconds; a slow etcd takes two seconds a
/// question, and then support is asked for once more. Short beside [`PROMISE`], so that a member that was restarted vouches
/// for a primary again before that must stop.
pub(super) const SUPPORT: Span = Span::from_secs(2);

/// What a member has said, and for how long it is bound by it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Word {
    /// When this life began; nothing before its first step.
    born: Option<Time>,
    /// What an earlier life may have promised is over.
    settled: bool,
    /// The primary that it has given a promise, its own server's included, and until when.
    promised: Option<(String, Time)>,
    /// The candidates that it supports, itself included, and until when.
    supports: BTreeMap<String, Time>,
}

impl Word {
    /// The first step of a life, if it is one; what is over is forgotten.
    pub(super) fn note(&mut self, now: Time) {
        self.settled |= *self.born.get_or_insert(now) + PROMISE <= now;
        self.promised.take_if(|(_, until)| *until <= now);
        self.supports.retain(|_, until| now < *until);
    }

    /// At once, for the first step: the age of this life counts from it, and without etcd nothing else may happen for long.
    pub(super) fn deadline(&self) -> Option<Deadline> {
        let at = Time::ZERO;
        self.born.is_none().then(|| Deadline { at, reason: String::from("look around for the first time") })
    }

    /// Binds the member to a primary.
    pub(super) fn promise(&mut self, to: &str, until: Time) {
        let until = self.promised.as_ref().map_or(until, |(_, earlier)| until.max(*earlier));
        self.promised = Some((to.to_owned(), until));
    }

    /// Binds the member to a candidate.
    pub(super) fn support(&mut self, candidate: &str, until: Time) {
        let supported = self.supports.entry(candidate.to_owned()).or_insert(until);
        *supported = until.max(*supported);
    }

    /// Until when it neither stands nor supports a candidate, as of the last step; nothing if it may.
    pub(super) fn bound_until(&self) -> Option<Time> {
        let before = self.born.filter(|_| !self.settled).map(|born| born + PROMISE);
        before.max(self.promised.as_ref().map(|(_, until)| *until))
    }

    /// Why it neither stands nor supports a candidate; nothing if it may.
    pub(super) fn bar_to_candidates(&self, now: Time) -> Option<String> {
        if let Some((to, _)) = self.promised.as_ref().filter(|(_, until)| now < *until) {
            return Some(format!("it has promised {to}, which leads without etcd, not to"));
        }
        let known = self.born.unwrap_or(now) + PROMISE;
        (now < known).then(|| String::from("it was started just now, and may have promised not to before"))
    }

    /// Why it gives `leader` no promise; nothing if it may.
    fn bar_to_promise(&self, now: Time, leader: &str) -> Option<String> {
        if now < self.born.unwrap_or(now) + SUPPORT {
            return Some(String::from("it was started just now, and may support a candidate"));
        }
        let other = self.supports.iter().find(|(name, until)| now < **until && *name != leader);
        other.map(|(name, _)| format!("it supports {name}"))
    }
}

impl State {
    /// The cluster's settings are known, and failsafe mode is off in them. Who was started without etcd does not know them.
    #[must_use]
    pub const fn is_failsafe_off(&self) -> bool {
        self.dynamic.is_known() && !self.dynamic.failsafe_mode
    }

    /// Why this member does not vouch for the primary `leader`, whose lock is of `generation`.
    fn bar_to_promise(&self, now: Time, leader: &str, generation: Revision) -> Option<String> {
        if self.is_failsafe_off() {
            return Some(String::from("failsafe mode is off"));
        }
        if self.may_be_writable() || self.leadership.is_held() {
            return Some(String::from("it leads"));
        }
        if self.leadership.is_busy() {
            return Some(String::from("it has asked for the lock"));
        }
        if self.is_bound() {
            return Some(String::from("it helps to take the lock away from a leader that is gone"));
        }
        let lock = self.view.get(&self.settings.scope.leader());
        if let Some(newer) = lock.filter(|kv| kv.value != leader && kv.created > generation) {
            return Some(format!("{} has led since", newer.value));
        }
        self.word.bar_to_promise(now, leader)
    }

    /// Why this member does not support a candidate.
    fn bar_to_support(&self, now: Time) -> Option<String> {
        if self.may_be_writable() || self.leadership.is_held() {
            return Some(String::from("it leads"));
        }
        self.word.bar_to_candidates(now)
    }
}

impl Turn {
    /// Another member asks for our word.
    pub(super) fn answer_member(&mut self, id: AskedId, ask: &Ask) {
        let bar = match ask {
            Ask::Lead { leader, generation } => self.s.bar_to_promise(self.now, leader, *generation),
            Ask::Stand { candidate: _ } => self.s.bar_to_support(self.now),
        };
        if bar.is_none() {
            match ask {
                Ask::Lead { leader, .. } => self.s.word.promise(leader, self.now + PROMISE),
                Ask::Stand { candidate } => self.s.word.support(candidate, self.now + SUPPORT),
            }
        }
        self.out.push(Action::AnswerMember { id, answer: bar.map_or(Ok(()), Err) });
    }
}
