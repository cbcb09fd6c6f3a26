//! What the database means for us: while it fails over we change nothing that can wait, and we never ask it for more
//! connections than it has.
//!
//! Requests that wait for a new primary pile up. That looks like load, and is none: more bots would only wait with them.
//! A flip or a restart in such a moment starts an app that cannot reach its database. Before the lease of a lost primary has
//! ended the store shows nothing of that, so the primary is asked itself before a bot more is asked for.

use bots_core::{
    dcs::{Scope, View},
    machine::{Deadline, Span, Time},
    wire::{Connections, DATABASE_FAILS_OVER, Member, PostgresFacts},
};
use serde::Serialize;

use super::{
    Action,
    app::{INSTANCES_MAX, host_of},
    settings::ConnectionBudget,
};

/// How long after a failover requests that had to wait may still look like load.
pub const FAILOVER_SETTLE: Span = Span::from_secs(3);

/// A database that is gone for longer than this is not failing over: content and settings go their way again.
pub const FREEZE_MAX: Span = Span::from_secs(60);

/// How long an answer of the primary is good for: it is asked and answers within milliseconds.
pub const PROBE_COUNTS: Span = Span::from_secs(1);

/// The pause before a primary that did not answer is asked again.
pub const PROBE_PAUSE: Span = Span::from_millis(500);

/// What is known of the primary from itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
enum Probe {
    #[default]
    Unasked,
    Asked {
        id: u64,
        at: Time,
    },
    Answered {
        until: Time,
    },
    Silent {
        ask_again: Time,
    },
}

/// The sub-machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Database {
    /// The primary, as last seen.
    primary: Option<String>,
    /// Where it takes connections.
    address: Option<String>,
    probe: Probe,
    probes: u64,
    /// When the last question was asked that is settled, and whether it was answered.
    heard: Option<(Time, bool)>,
    /// Since when it has not answered.
    silent_since: Option<Time>,
    /// Since when there is none, or another one that we have not got used to.
    disturbed_since: Option<Time>,
    /// Since when all is well again, until that is old news.
    well_since: Option<Time>,
    /// What the last primary that said so gives away; a failover does not make us forget.
    connections: Option<Connections>,
}

impl Database {
    /// Looks at who leads in the database scope, and whether it takes writes.
    pub(super) fn observe(&mut self, now: Time, scope: Option<&Scope>, view: &View) {
        let Some(scope) = scope else { return };
        let primary = view.value(&scope.leader()).and_then(|name| {
            let member = Member::from_json(view.value(&scope.member(name))?)?;
            let well = member.head.role == "primary" && member.head.state == "running";
            well.then(|| (name.to_owned(), member.facts::<PostgresFacts>()))
        });
        match primary {
            Some((name, facts)) => {
                let facts = facts.unwrap_or_default();
                self.connections = facts.connections.or(self.connections);
                self.meet(host_of(&facts.conn_url));
                let moved = self.primary.as_ref().is_some_and(|known| *known != name);
                if self.disturbed_since.take().is_some() || moved {
                    self.well_since = Some(now);
                }
                self.primary = Some(name);
            }
            // A cluster that we have never seen well is being made: nothing of ours depends on it yet.
            None if self.primary.is_some() && self.disturbed_since.is_none() => self.disturbed_since = Some(now),
            None => {}
        }
        self.well_since = self.well_since.filter(|since| now < *since + FAILOVER_SETTLE);
    }

    /// Whether to leave everything as it is.
    pub(super) fn is_frozen(&self, now: Time) -> bool {
        let disturbed = self.disturbed_since.is_some_and(|since| now < since + FREEZE_MAX);
        disturbed || self.well_since.is_some_and(|since| now < since + FAILOVER_SETTLE)
    }

    fn meet(&mut self, address: Option<String>) {
        if address != self.address {
            (self.address, self.probe, self.silent_since, self.heard) = (address, Probe::Unasked, None, None);
        }
    }

    /// Whether requests that wait may be load: the primary has just answered, or cannot be asked, or is silent for so long that
    /// it does not fail over.
    pub(super) fn answers(&self, now: Time) -> bool {
        let given_up = self.silent_since.is_some_and(|since| since + FREEZE_MAX <= now);
        self.address.is_none() || given_up || matches!(self.probe, Probe::Answered { until } if now < until)
    }

    /// Whether the primary has answered a question that was asked at `since` or later; nothing if there was none. One that cannot
    /// be asked is taken for well.
    pub(super) fn answered_since(&self, since: Time) -> Option<bool> {
        if self.address.is_none() {
            return Some(true);
        }
        self.heard.filter(|(asked_at, _)| *asked_at >= since).map(|(_, answers)| answers)
    }

    /// Asks the primary whether it answers, unless that is under way or has to wait.
    pub(super) fn ask(&mut self, now: Time, out: &mut Vec<Action>) {
        let waits = match self.probe {
            Probe::Unasked | Probe::Answered { .. } => false,
            Probe::Asked { .. } => true,
            Probe::Silent { ask_again } => now < ask_again,
        };
        let Some(address) = self.address.clone().filter(|_| !waits) else { return };
        self.probes += 1;
        self.probe = Probe::Asked { id: self.probes, at: now };
        out.push(Action::ProbeDatabase { id: self.probes, address });
    }

    /// It need not be known any more whether the primary answers; what is known of it by now gets old.
    pub(super) fn forget_silence(&mut self) {
        self.silent_since = None;
        if let Probe::Silent { .. } = self.probe {
            self.probe = Probe::Unasked;
        }
    }

    /// Takes in what came of that.
    pub(super) fn probed(&mut self, now: Time, id: u64, answers: bool) {
        let Probe::Asked { at, .. } = self.probe else { return };
        if self.probe != (Probe::Asked { id, at }) {
            return;
        }
        self.heard = Some((at, answers));
        (self.probe, self.silent_since) = if answers {
            (Probe::Answered { until: now + PROBE_COUNTS }, None)
        } else {
            (Probe::Silent { ask_again: now + PROBE_PAUSE }, self.silent_since.or(Some(now)))
        };
    }

    /// How many bots may serve; nothing if the database does not say what it has. A flip replaces the instances of all bots
    /// at once, so each counts for as many as it may have by then.
    pub(super) fn bots_max(&self, budget: ConnectionBudget) -> Option<u32> {
        let Connections { max, reserved } = self.connections?;
        let given = u64::from(max.saturating_sub(reserved)) * u64::from(budget.share_percent) / 100;
        let instances = given / u64::from(budget.per_instance.max(1));
        u32::try_from(instances / INSTANCES_MAX).ok()
    }

    /// When the sub-machine wants a step of its own accord.
    pub(super) fn deadline(&self, now: Time) -> Option<Deadline> {
        let due = |at, reason: &str| Deadline { at, reason: reason.to_owned() };
        let ask_again = match self.probe {
            Probe::Silent { ask_again } => Some(due(ask_again, "ask the database again whether it answers")),
            Probe::Unasked | Probe::Asked { .. } | Probe::Answered { .. } => None,
        };
        let ends = [
            ask_again,
            self.disturbed_since.map(|since| due(since + FREEZE_MAX, "stop waiting for a failover of the database")),
            self.well_since.map(|since| due(since + FAILOVER_SETTLE, "the database's failover is over")),
        ];
        Deadline::earliest(ends.map(|end| end.filter(|deadline| deadline.at > now)))
    }

    /// One line, while something waits for the database.
    pub(super) fn trouble(&self, now: Time) -> Option<String> {
        let disturbed = self.disturbed_since.is_some_and(|since| now < since + FREEZE_MAX);
        if disturbed {
            return Some(format!("{DATABASE_FAILS_OVER}: no flip, no restart and no scaling meanwhile"));
        }
        let address = self.address.as_ref().filter(|_| self.silent_since.is_some())?;
        Some(format!("the database does not answer at {address}: requests that wait for it ask for no more bots"))
    }
}
