//! What the database means for us: while it fails over we change nothing that can wait, and we never ask it for more
//! connections than it has.
//!
//! Requests that wait for a new primary pile up. That looks like load, and is none: more bots would only wait with them.
//! A flip or a restart in such a moment starts an app that cannot reach its database.

use bots_core::{
    dcs::{Scope, View},
    machine::{Deadline, Span, Time},
    wire::{Connections, Member, PostgresFacts},
};
use serde::Serialize;

use super::{app::INSTANCES_MAX, settings::ConnectionBudget};

/// How long after a failover requests that had to wait may still look like load.
pub const FAILOVER_SETTLE: Span = Span::from_secs(3);

/// A database that is gone for longer than this is not failing over: content and settings go their way again.
pub const FREEZE_MAX: Span = Span::from_secs(60);

/// The sub-machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Database {
    /// The primary, as last seen.
    primary: Option<String>,
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
                if let Some(connections) = facts.and_then(|facts| facts.connections) {
                    self.connections = Some(connections);
                }
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
        let ends = [
            self.disturbed_since.map(|since| due(since + FREEZE_MAX, "stop waiting for a failover of the database")),
            self.well_since.map(|since| due(since + FAILOVER_SETTLE, "the database's failover is over")),
        ];
        Deadline::earliest(ends.map(|end| end.filter(|deadline| deadline.at > now)))
    }

    /// One line, while everything waits for the database.
    pub(super) fn trouble(&self, now: Time) -> Option<String> {
        let disturbed = self.disturbed_since.is_some_and(|since| now < since + FREEZE_MAX);
        disturbed.then(|| String::from("the database fails over: no flip, no restart and no scaling meanwhile"))
    }
}
