//! S6: nobody acts on a lease past its deadline. A bot believes in its lease only while etcd keeps it; a server accepts writes
//! only while its bot's lock stands in etcd, and a bot makes a server writable only then.

use std::collections::BTreeMap;

use bots_core::machine::{Span, Time};
use postgres_bot::machine::{Action, Job};

use super::{Check, Seen};
use crate::{
    postgres::{Contents, PostgresBody},
    world::{Frozen, GUARD_LATE, Node, NodeId, World},
};

/// What clocks that run wrong may cost over the longest lease.
const DRIFT_MAX: Span = Span::from_millis(10);

#[derive(Debug, Default)]
pub(super) struct LeaseDeadline {
    /// Since when each machine's lock has not been in etcd.
    unlocked: Absence,
    /// Since when the lease that each bot is sure of has not been in etcd.
    expired: Absence,
    /// Since when each machine moves, or moves again after it stood still: its guard acts then. Nothing while it stands.
    moving: BTreeMap<NodeId, Option<Time>>,
}

/// Since when something has been missing, by machine.
#[derive(Debug, Default)]
struct Absence(BTreeMap<NodeId, Time>);

impl Absence {
    /// Takes note; says whether it has been missing for longer than clocks may be wrong.
    fn note(&mut self, world: &World, node: NodeId, there: bool) -> bool {
        if there {
            self.0.remove(&node);
            return false;
        }
        world.now.since(*self.0.entry(node).or_insert(world.now)) > DRIFT_MAX
    }
}

impl LeaseDeadline {
    /// Whether a bot that is sure of its lease may be.
    fn check_belief(&mut self, world: &World, node: NodeId) -> Result<(), String> {
        let n = &world.nodes[node.0];
        let believed = n.postgres_state().and_then(|state| state.membership().lease(n.clock.local(world.now)));
        let there = believed.is_none_or(|lease| n.frozen.holds_bot() || world.store.lease_lives(lease));
        if self.expired.note(world, node, there) {
            return Err(format!("{} believes in a lease that etcd does not have", n.name));
        }
        Ok(())
    }
}

impl Check for LeaseDeadline {
    fn requirement(&self) -> &'static str {
        "S6 nobody acts on a lease past its deadline"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let leader = Node::scope_of(bots_core::wire::Kind::Postgres).leader();
        let holder = world.store.value(&leader).and_then(|name| world.named(name));
        match seen {
            Seen::Moment => {
                for node in world.ids().filter(|node| world.nodes[node.0].postgres().is_some()) {
                    self.check_belief(world, node)?;
                    let unlocked = self.unlocked.note(world, node, holder == Some(node));
                    let n = &world.nodes[node.0];
                    let moved = self.moving.entry(node).or_default();
                    *moved = if n.frozen == Frozen::Machine { None } else { moved.or(Some(world.now)) };
                    let moves_again = moved.is_none_or(|at| world.now < at + GUARD_LATE);
                    let writable = n.postgres().is_some_and(|body| {
                        body.accepts_writes() && body.disk.contents == Contents::Present && n.frozen != Frozen::Machine
                    });
                    let able = !world.plan.takeover || world.can_acknowledge(node);
                    // Without the key it may go on by the word of members, for as long as its guard's fence stands: whether
                    // nobody else does is S1's to see.
                    let vouched = world.plan.failsafe
                        && n.postgres()
                            .and_then(PostgresBody::fence_wanted)
                            .is_some_and(|fence| moves_again || n.clock.local(world.now) < fence + GUARD_LATE);
                    if writable && unlocked && able && !vouched && !world.is_overdue(node) {
                        return Err(format!("{} accepts writes without the leader key in etcd", n.name));
                    }
                }
                Ok(())
            }
            Seen::PostgresStep { node, actions, .. } => {
                let promotes = |action: &Action| matches!(action, Action::Run { job: Job::Promote { .. }, .. });
                let unlocked = self.unlocked.note(world, *node, holder == Some(*node));
                if actions.iter().any(promotes) && unlocked {
                    return Err(format!("{} promotes without the leader key in etcd", world.nodes[node.0].name));
                }
                Ok(())
            }
            Seen::Applied(_)
            | Seen::TimerFired { .. }
            | Seen::JobStarted { .. }
            | Seen::Writable { .. }
            | Seen::SetAside { .. }
            | Seen::Response { .. } => Ok(()),
        }
    }
}
