//! A guard that stands still keeps nobody from harm: if its bot died now, the server would take writes beyond the lease. The kernel
//! ties a server to the guard that has started it, so another guard is to be had by a restart alone. The bot lives and has a fence of
//! its own, so there is time to see whether the guard comes back.

use bots_core::machine::{Span, Time};
use serde::Serialize;

use super::{
    operator::Restart,
    phase::Phase,
    state::{State, Timer},
    turn::Turn,
};

/// However short the lease, a guard gets this long: on a saturated machine everything is late.
const PATIENCE_MIN: Span = Span::from_secs(5);

/// A restart costs every client its connection. What stops the guards of a machine again and again is not mended by restarts.
const NOT_AGAIN_FOR: Span = Span::from_secs(600);

/// As long as a restart is not possible, it is looked again this often whether it is.
const LOOK_AGAIN: Span = Span::from_secs(1);

/// What is known of the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct GuardWatch {
    /// It was seen not to answer then, and has not since.
    pub(super) silent_since: Option<Time>,
    /// When the server was last restarted for it.
    renewed: Option<Time>,
}

impl State {
    /// The restart that is under way was made for want of a guard, and not on an operator's word.
    pub(super) fn is_restarted_for_guard(&self) -> bool {
        self.guard.renewed == Some(self.since)
    }

    /// What is wrong with the guard; nothing if all is well.
    pub(super) fn guard_trouble(&self) -> Option<String> {
        self.guard.silent_since.map(|_| {
            String::from(
                "the guard of Postgres does not answer: if this bot died, nobody would stop the server before another leads",
            )
        })
    }
}

impl Turn {
    /// From now on, and not from when it fell silent: a bot that stood still itself hears late what was said in time.
    pub(super) fn guard_observed(&mut self, answers: bool) {
        self.s.guard.silent_since = (!answers).then(|| self.s.guard.silent_since.unwrap_or(self.now));
    }

    /// Restarts the server of a guard that has stood still for too long, so that it gets another; says whether it did.
    pub(super) fn renews_guard(&mut self) -> bool {
        let Some(silent_since) = self.s.guard.silent_since else {
            self.s.timers.disarm(Timer::Guard);
            return false;
        };
        let patient_until = silent_since + self.s.dynamic.ttl.max(PATIENCE_MIN);
        let due = self.s.guard.renewed.map_or(patient_until, |at| patient_until.max(at + NOT_AGAIN_FOR));
        let possible = matches!(self.s.phase, Phase::Primary(_))
            && self.s.job.is_none()
            && self.s.server().is_some()
            && self.s.may_use_lock(self.now)
            && !self.s.dynamic.pause;
        if self.now < due || !possible {
            self.s.timers.arm(Timer::Guard, due.max(self.now + LOOK_AGAIN));
            return false;
        }
        self.s.guard.renewed = Some(self.now);
        self.s.trouble =
            Some(String::from("Postgres is restarted, so that it has a guard again: its own did not answer"));
        self.begin_restart(None, &Restart::default()).is_ok()
    }
}
