//! Which acknowledged writes must be there whoever takes over, while the `synchronous_mode` may change at any moment. It is no
//! check of its own: S2 asks it.
//!
//! Two sentences, both about what stands in etcd. Who takes the lock while a mode is on and the `sync` key binds has all that was ever
//! acknowledged: the key says so of its voters, however it was acknowledged. And what was acknowledged under a key that was written since a
//! mode was switched on last is there until the mode is switched off, even if the key were gone.

use std::collections::BTreeMap;

use bots_core::{
    dcs::{Outcome, Revision},
    wire::{Kind, SyncRecord, config::SyncMode},
};

use crate::{
    plant::takes_lock,
    world::{Applied, Node, NodeId, World, mode_in},
};

/// Which leader's key binds, and the mode that it belongs to.
#[derive(Debug, Default)]
pub(super) struct Protection {
    config: Revision,
    is_on: bool,
    /// Since the mode was switched on last; before, it was off. Nothing if it has been on since the cluster began.
    on_since: Option<Revision>,
    key: Revision,
    /// Whose key it is, if it binds.
    leader: Option<String>,
    /// Acknowledged writes that are looked at already, each with whether it was protected.
    protected: Vec<bool>,
    /// So many of them were acknowledged before the mode was off for the last time.
    waived: usize,
    /// What is asked of those that took the lock.
    taken: BTreeMap<NodeId, Demand>,
}

/// What must not be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Demand {
    /// Nothing that was ever acknowledged.
    All,
    /// Nothing that was protected, from this place in the ledger on.
    ProtectedFrom(usize),
}

impl Protection {
    /// Takes note of what stands in etcd and of what was acknowledged; to be told of everything that happens.
    pub(super) fn note(&mut self, world: &World) {
        let scope = Node::scope_of(Kind::Postgres);
        if let Some(config) = world.store.get(&scope.config()).filter(|kv| kv.modified != self.config) {
            let began = self.config == Revision(0);
            let was_on = std::mem::replace(&mut self.is_on, mode_in(&config.value) != SyncMode::Off);
            self.config = config.modified;
            if self.is_on && !was_on && !began {
                self.on_since = Some(config.modified);
            }
        }
        let key = world.store.get(&scope.sync());
        let at = key.map_or(Revision(0), |kv| kv.modified);
        if at != self.key {
            self.key = at;
            let record = key.and_then(|kv| serde_json::from_str::<SyncRecord>(&kv.value).ok());
            self.leader = record.filter(SyncRecord::binds).and_then(|record| record.leader);
        }
        for ack in world.ledger.acks.iter().skip(self.protected.len()) {
            let by = &world.nodes[ack.node.0].name;
            let under_key = self.on_since.is_none_or(|since| self.key > since && self.leader.as_ref() == Some(by));
            self.protected.push(self.is_on && under_key);
        }
        if !self.is_on {
            self.waived = self.protected.len();
        }
    }

    /// A transaction was carried out, or refused.
    pub(super) fn applied(&mut self, applied: &Applied<'_>) {
        if matches!(applied.outcome, Outcome::Done(_)) && takes_lock(applied.transaction) {
            let binds = self.is_on && self.leader.is_some();
            let demand = if binds { Demand::All } else { Demand::ProtectedFrom(self.waived) };
            self.taken.insert(applied.node, demand);
        }
    }

    /// Whether a write, by its place in the ledger, must be on a server that takes over.
    pub(super) fn demands(&self, of: NodeId, write: usize) -> bool {
        match self.taken.get(&of) {
            Some(Demand::All) => true,
            Some(Demand::ProtectedFrom(first)) => write >= *first && self.protected.get(write) == Some(&true),
            None => self.is_on,
        }
    }
}
