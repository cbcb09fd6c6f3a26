//! S2, in a synchronous mode: no acknowledged write is ever lost ([`super::protection`] says which ones that are while the mode changes).
//! Asynchronous: a planned switchover loses no acknowledged write. A failover loses none that lay further back than
//! `maximum_lag_on_failover` behind the last position that the old leader shared.

use std::collections::BTreeSet;

use bots_core::{
    dcs::{Outcome, Write},
    machine::{Span, Time},
    wire::{Kind, Lsn, PostgresStatus},
};

use super::{Check, Seen, protection::Protection};
use crate::world::{Applied, Node, NodeId, World};

#[derive(Debug, Clone)]
struct HandOver {
    by: NodeId,
    at: Time,
}

#[derive(Debug, Default)]
pub(super) struct AcknowledgedWrites {
    /// The last leader gave the lock away with its last position, and has been there or thereabouts since.
    handed_over: Option<HandOver>,
    /// Acknowledged writes that an asynchronous failover was allowed to lose, by their place in the ledger.
    lost: BTreeSet<usize>,
    /// Which ones it was not.
    protection: Protection,
}

impl AcknowledgedWrites {
    /// An old leader that leaves for good, or cannot start for too long, is not waited for: then it is a failover.
    fn look_after_old_leader(&mut self, world: &World) {
        let patience = Span::from_secs(world.plan.start_timeout_s.max(world.plan.ttl_s));
        let scope = Node::scope_of(Kind::Postgres);
        self.handed_over.take_if(|hand_over| {
            let gone = world.store.get(&scope.member(&world.nodes[hand_over.by.0].name)).is_none();
            gone || world.now.since(hand_over.at) > patience
        });
    }

    fn applied(&mut self, world: &World, applied: &Applied<'_>) {
        let scope = Node::scope_of(Kind::Postgres);
        if !matches!(applied.outcome, Outcome::Done(_)) {
            return;
        }
        for write in &applied.transaction.then {
            match write {
                Write::Delete { key } if *key == scope.leader() => {
                    let shares = |w: &Write| matches!(w, Write::Put { key, .. } if *key == scope.status());
                    let clean = applied.transaction.then.iter().any(shares);
                    self.handed_over = clean.then_some(HandOver { by: applied.node, at: world.now });
                }
                Write::Delete { .. } | Write::Put { .. } => {}
            }
        }
    }

    /// What a member lacks that takes the lead: whether it may lack that is decided by the election that it won, also if it dies before
    /// its server takes writes.
    fn begins_to_reign(&mut self, world: &World, node: NodeId) -> Result<(), String> {
        let n = &world.nodes[node.0];
        let Some(body) = n.postgres() else { return Ok(()) };
        let status = world.store.value(&Node::scope_of(Kind::Postgres).status());
        let shared: PostgresStatus = status.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let needed = Lsn(shared.optime.0.saturating_sub(world.plan.lag_max));
        let handed_over = self.handed_over.take();
        for (at, ack) in world.ledger.acks.iter().enumerate() {
            if ack.overdue || self.lost.contains(&at) || body.disk.wal.has(ack.index, ack.serial) {
                continue;
            }
            if self.protection.demands(node, at) {
                let (by, end) = (&world.nodes[ack.node.0].name, ack.end);
                return Err(format!("{} takes over without the write that {by} acknowledged up to {end}", n.name));
            }
            let write = format!("the write that {} acknowledged up to {}", world.nodes[ack.node.0].name, ack.end);
            if let Some(old) = &handed_over {
                let old = &world.nodes[old.by.0].name;
                return Err(format!(
                    "{} takes over from {old}, which handed over in good order, without {write}",
                    n.name
                ));
            }
            if ack.end <= needed {
                return Err(format!(
                    "{} takes over without {write}; the old leader had shared {}, and {} bytes may be lost",
                    n.name, shared.optime, world.plan.lag_max
                ));
            }
            self.lost.insert(at);
        }
        Ok(())
    }
}

/// Whether a number for a new timeline was taken, and with it the key written by which whoever took it may lead again, if it dies
/// before its promotion.
fn begins_with_key(applied: &Applied<'_>) -> bool {
    let scope = Node::scope_of(Kind::Postgres);
    let puts = |wanted: &str| {
        applied.transaction.then.iter().any(|write| matches!(write, Write::Put { key, .. } if key == wanted))
    };
    matches!(applied.outcome, Outcome::Done(_)) && puts(&scope.timelines()) && puts(&scope.sync())
}

impl Check for AcknowledgedWrites {
    fn requirement(&self) -> &'static str {
        "S2 no acknowledged write is lost: none at all in a synchronous mode or a switchover, else none beyond the lag allowed"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        self.protection.note(world);
        let node = match seen {
            Seen::Applied(applied) => {
                self.protection.applied(applied);
                self.applied(world, applied);
                if begins_with_key(applied) {
                    return self.begins_to_reign(world, applied.node);
                }
                return Ok(());
            }
            Seen::Moment => {
                self.look_after_old_leader(world);
                return Ok(());
            }
            // Its guard is about to kill it, and what it acknowledges until then counts for nothing: it takes nothing over.
            Seen::Writable { node } if world.is_overdue(*node) => return Ok(()),
            Seen::Writable { node } => *node,
            Seen::TimerFired { .. }
            | Seen::PostgresStep { .. }
            | Seen::JobStarted { .. }
            | Seen::SetAside { .. }
            | Seen::Response { .. } => return Ok(()),
        };
        let holder = world.store.value(&Node::scope_of(Kind::Postgres).leader()).and_then(|name| world.named(name));
        if world.plan.takeover && holder != Some(node) && !world.can_acknowledge(node) {
            // Deposed while it was on its way up: it takes nothing over. That it acknowledges nothing is S6's to see.
            return Ok(());
        }
        self.begins_to_reign(world, node)
    }
}
