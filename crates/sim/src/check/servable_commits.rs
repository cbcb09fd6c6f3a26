//! A commit that no web bot can serve is not published while a web bot is there to say so, and one that is quarantined, or is not
//! the one that is pinned, is neither posted nor tried nor published.
//!
//! Where no web bot is, or has been for so short a time that the leader may not have heard of it, nobody can say it.

use bots_core::{
    dcs::{Outcome, Write},
    machine::{Span, Time},
    wire::{Canary, ContentRevision, Kind, Pin},
};

use super::{Check, Seen};
use crate::world::{Applied, Node, World};

/// How much longer than its lease a leader may act on what it knew: its last transaction is under way.
const MARGIN: Span = Span::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct ServableCommits {
    /// Since when some web bot has been a member without a break.
    manned_since: Option<Time>,
    /// Since when some web bot has said without a break that it serves.
    served_since: Option<Time>,
}

impl Check for ServableCommits {
    fn requirement(&self) -> &'static str {
        "S4 what no web bot can serve, or is quarantined or pinned away, is never published"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Moment => {
                let members: Vec<&str> = members(world).collect();
                let serves = members.iter().any(|value| value.contains("\"serving\":"));
                self.manned_since = (!members.is_empty()).then(|| self.manned_since.unwrap_or(world.now));
                self.served_since = serves.then(|| self.served_since.unwrap_or(world.now));
                Ok(())
            }
            Seen::Applied(applied) if matches!(applied.outcome, Outcome::Done(_)) => self.applied(world, applied),
            Seen::Applied(_)
            | Seen::TimerFired { .. }
            | Seen::PostgresStep { .. }
            | Seen::JobStarted { .. }
            | Seen::Writable { .. }
            | Seen::SetAside { .. }
            | Seen::Response { .. } => Ok(()),
        }
    }
}

impl ServableCommits {
    fn applied(&self, world: &World, applied: &Applied<'_>) -> Result<(), String> {
        let scope = Node::scope_of(Kind::Content);
        for write in &applied.transaction.then {
            let Write::Put { key, value, .. } = write else { continue };
            let Some((deed, sha)) = deed(key, value) else { continue };
            if world.store.value(&scope.quarantine(&sha)).is_some() {
                return Err(format!("{sha} is {deed}, and it is quarantined"));
            }
            let pin = world.store.value(&scope.revision_pin());
            let pin = pin.and_then(|text| serde_json::from_str::<Pin>(text).ok()).map(|pin| pin.sha);
            if let Some(pin) = pin.filter(|pin| *pin != sha) {
                return Err(format!("{sha} is {deed}, and {pin} is pinned"));
            }
            let known = Span::from_secs(world.plan.ttl_s) + MARGIN;
            // What shows only when an app is started can only be known where one serves.
            let since = if world.never_comes_up(&sha) { self.served_since } else { self.manned_since };
            let heard = since.is_some_and(|since| since + known <= world.now);
            if key.ends_with("/revision/live") && heard && world.origin.is_refused(&sha) {
                return Err(format!("{sha} is published, and no web bot can serve it"));
            }
        }
        Ok(())
    }
}

/// What a write does with which commit.
fn deed(key: &str, value: &str) -> Option<(&'static str, String)> {
    let revision = || serde_json::from_str::<ContentRevision>(value).ok().map(|revision| revision.sha);
    let canary = || serde_json::from_str::<Canary>(value).ok().map(|canary| canary.sha);
    let scope = Node::scope_of(Kind::Content);
    let (deed, sha) = if key == scope.revision_candidate() {
        ("posted", revision())
    } else if key == scope.revision_live() {
        ("published", revision())
    } else if key == scope.revision_canary() {
        ("tried", canary())
    } else {
        return None;
    };
    sha.map(|sha| (deed, sha))
}

/// What web bots say of themselves.
fn members(world: &World) -> impl Iterator<Item = &str> {
    let webs = world.nodes.iter().filter(|node| node.kind == Kind::Web);
    webs.filter_map(|node| world.store.value(&node.scope().member(&node.name)))
}
