//! etcd: the synchronous model of it, on the true clock less the times at which it had no quorum. Leases do not run out
//! while nobody can renew them: a new etcd leader gives each its whole length again, and never less.

use bots_core::{
    dcs::{KeyValue, LeaseId, MemoryDcs, Outcome, Revision, Transaction, Write},
    machine::{Span, Time},
    wire::Kind,
};

use super::{Item, Node, NodeId, Reply, Request, World};
use crate::{check::Seen, plant::Plant};

/// etcd.
#[derive(Debug)]
pub struct Store {
    dcs: MemoryDcs,
    out_since: Option<Time>,
    out_for: Span,
    compacted: Revision,
    held: Vec<Item>,
}

/// A transaction that etcd has carried out or refused.
#[derive(Debug, Clone, Copy)]
pub struct Applied<'a> {
    /// Whose.
    pub node: NodeId,
    /// What was asked.
    pub transaction: &'a Transaction,
    /// What came of it.
    pub outcome: &'a Outcome,
    /// What stood at the written keys before, in the order of the writes.
    pub before: &'a [Option<KeyValue>],
}

impl Store {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { dcs: MemoryDcs::new(), out_since: None, out_for: Span::ZERO, compacted: Revision(0), held: Vec::new() }
    }

    /// The time as etcd's leases count it.
    fn clock(&self, now: Time) -> Time {
        self.out_since.unwrap_or(now) - self.out_for
    }

    /// Whether it has a quorum.
    #[must_use]
    pub const fn answers(&self) -> bool {
        self.out_since.is_none()
    }

    /// What stands at `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.dcs.get(key)
    }

    /// The value at `key`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        self.dcs.get(key).map(|kv| kv.value.as_str())
    }

    /// Everything below `prefix`.
    #[must_use]
    pub fn list(&self, prefix: &str) -> Vec<KeyValue> {
        self.dcs.list(prefix).1
    }

    /// Whether a lease lives.
    #[must_use]
    pub fn lease_lives(&self, lease: LeaseId) -> bool {
        self.dcs.lease_lives(lease)
    }

    pub(super) const fn dcs(&self) -> &MemoryDcs {
        &self.dcs
    }

    pub(super) const fn compacted(&self) -> Revision {
        self.compacted
    }

    /// Forgets history but for its newest part.
    pub(super) fn compact(&mut self) {
        self.compacted = self.dcs.revision();
        self.dcs.compact(self.compacted);
    }

    pub(super) fn begin_outage(&mut self, now: Time) {
        self.out_since.get_or_insert(now);
    }

    /// Has a quorum again; gives out the requests that waited for it.
    pub(super) fn end_outage(&mut self, now: Time) -> Vec<Item> {
        if let Some(since) = self.out_since.take() {
            self.out_for = self.out_for + now.since(since);
        }
        std::mem::take(&mut self.held)
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Lets the next lease run out, if it does so before `at`, at its moment; says whether one did.
    pub(super) fn expire_lease_before(&mut self, at: Time) -> bool {
        let Some(expiry) = self.store.dcs.next_expiry().filter(|_| self.store.answers()) else { return false };
        let due = (expiry + self.store.out_for).max(self.now);
        if due > at {
            return false;
        }
        self.now = due;
        let outlive = if self.plant == Some(Plant::ClaimOutlivesBot) { self.claims() } else { Vec::new() };
        self.store.dcs.expire(expiry);
        for claim in outlive {
            if self.store.get(&claim.key).is_none() {
                self.write_by_hand(claim.key, claim.value);
            }
        }
        self.say(format_args!("etcd: a lease has run out"));
        self.show_changes(None);
        self.see(&Seen::Moment);
        true
    }

    fn claims(&self) -> Vec<KeyValue> {
        let below = self.store.list(&Node::scope_of(Kind::Web).load_prefix());
        below.into_iter().filter(|kv| kv.key.ends_with("/claim")).collect()
    }

    /// A request reaches etcd.
    pub(super) fn arrive(&mut self, node: NodeId, life: u64, rpc: u64, request: Request) {
        if !self.store.answers() {
            // A member without quorum keeps what it cannot commit, or its client gives up first.
            if self.rng.chance(300) {
                self.store.held.push(Item::Arrive { node, life, rpc, request });
            }
            return;
        }
        let reply = self.carry_out(node, request);
        let lost = self.plan.replies_lost;
        if self.network.replies_pass(node) && (self.is_healed() || !self.rng.chance(lost)) {
            let delay = self.store_delay();
            self.after(delay, Item::Reply { node, life, rpc, reply });
        }
    }

    fn carry_out(&mut self, node: NodeId, request: Request) -> Reply {
        let now = self.store.clock(self.now);
        match request {
            Request::Grant { ttl } => Reply::Granted { lease: self.store.dcs.grant(now, ttl), ttl },
            Request::KeepAlive { lease } => Reply::Kept { lives: self.store.dcs.keep_alive(now, lease) },
            Request::Revoke { lease } => {
                let _was_gone = self.store.dcs.revoke(lease);
                self.show_changes(None);
                Reply::Revoked
            }
            Request::List { prefix } => {
                let (revision, entries) = self.store.dcs.list(&prefix);
                Reply::Listed { prefix, revision, entries }
            }
            Request::Transact { id, transaction } => {
                let outcome = self.transact(node, &transaction);
                Reply::Answered { id, outcome }
            }
        }
    }

    /// Carries out a transaction, as a bot's or an operator's.
    pub(super) fn transact(&mut self, node: NodeId, transaction: &Transaction) -> Outcome {
        let now = self.store.clock(self.now);
        let keys = transaction.then.iter().map(|write| match write {
            Write::Put { key, .. } | Write::Delete { key } => key,
        });
        let before: Vec<Option<KeyValue>> = keys.map(|key| self.store.get(key).cloned()).collect();
        let lease_gone = transaction.then.iter().any(|write| match write {
            Write::Put { lease: Some(lease), .. } => !self.store.dcs.lease_lives(*lease),
            Write::Put { lease: None, .. } | Write::Delete { .. } => false,
        });
        let outcome = match self.store.dcs.transact(now, transaction) {
            // etcd answers with an error then, and reads nothing.
            Outcome::Refused { .. } if lease_gone => Outcome::Refused { revision: Revision(0), found: Vec::new() },
            outcome => outcome,
        };
        if self.trace.is_kept() {
            let name = self.nodes[node.0].name.clone();
            self.say(format_args!("etcd: {name} {} -> {outcome:?}", short(transaction)));
        }
        if matches!(outcome, Outcome::Done(_)) {
            self.show_changes(Some(transaction));
        }
        self.see(&Seen::Applied(Applied { node, transaction, outcome: &outcome, before: &before }));
        outcome
    }

    /// An operator's write, which needs no network of its own.
    pub(crate) fn write_by_hand(&mut self, key: String, value: String) {
        self.say(format_args!("operator: {key} = {value}"));
        self.by_hand(Write::put(key, value));
    }

    /// The same, of a removal.
    pub(crate) fn remove_by_hand(&mut self, key: String) {
        self.say(format_args!("operator: {key} is removed"));
        self.by_hand(Write::delete(key));
    }

    fn by_hand(&mut self, write: Write) {
        let now = self.store.clock(self.now);
        let transaction = Transaction::new(Vec::new(), vec![write]);
        let _done = self.store.dcs.transact(now, &transaction);
        self.show_changes(Some(&transaction));
    }
}

fn short(transaction: &Transaction) -> String {
    let cut = |text: &str| text.chars().take(90).collect::<String>();
    let writes: Vec<String> = transaction
        .then
        .iter()
        .map(|write| match write {
            Write::Put { key, value, .. } => format!("{key}={}", cut(value)),
            Write::Delete { key } => format!("delete {key}"),
        })
        .collect();
    format!("{} if {:?}", writes.join(", "), transaction.compare)
}
