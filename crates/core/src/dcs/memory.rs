//! A synchronous model of etcd, for the simulator and the tests: revisions, leases, transactions, history, compaction.
//! It passes the same conformance suite as the real one. It knows nothing of networks: delays are the simulator's.

use std::collections::{BTreeMap, BTreeSet};

use super::{Change, KeyValue, LeaseId, Outcome, Revision, Transaction, Write};
use crate::machine::{Span, Time};

/// How many conditions one transaction may have, and how many changes: etcd's own bound (`--max-txn-ops`), unless its operator has
/// moved it.
pub const TRANSACTION_OPS_MAX: usize = 128;

/// A whole store in memory, on the caller's clock.
#[derive(Debug, Clone, Default)]
pub struct MemoryDcs {
    revision: Revision,
    compacted: Revision,
    entries: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: i64,
    history: Vec<(Revision, Change)>,
}

#[derive(Debug, Clone)]
struct Lease {
    ttl: Span,
    expires: Time,
    keys: BTreeSet<String>,
}

impl MemoryDcs {
    /// An empty store; like etcd's, its first revision is 1.
    #[must_use]
    pub fn new() -> Self {
        Self { revision: Revision(1), ..Self::default() }
    }

    /// The revision of the last change.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Grants a lease; it expires `ttl` after `now` unless it is kept alive.
    pub fn grant(&mut self, now: Time, ttl: Span) -> LeaseId {
        self.last_lease += 1;
        let id = LeaseId(self.last_lease);
        self.leases.insert(id, Lease { ttl, expires: now + ttl, keys: BTreeSet::new() });
        id
    }

    /// Renews a lease; `false` if it is gone.
    #[must_use]
    pub fn keep_alive(&mut self, now: Time, lease: LeaseId) -> bool {
        self.expire(now);
        self.leases.get_mut(&lease).is_some_and(|l| {
            l.expires = now + l.ttl;
            true
        })
    }

    /// Gives a lease back and deletes its keys; `false` if it was gone.
    pub fn revoke(&mut self, lease: LeaseId) -> bool {
        let Some(gone) = self.leases.remove(&lease) else { return false };
        if !gone.keys.is_empty() {
            self.revision.0 += 1;
            for key in gone.keys {
                self.delete(&key);
            }
        }
        true
    }

    /// Drops every lease that has run out, with its keys.
    pub fn expire(&mut self, now: Time) {
        let gone: Vec<LeaseId> = self.leases.iter().filter(|(_, l)| l.expires <= now).map(|(id, _)| *id).collect();
        for id in gone {
            self.revoke(id);
        }
    }

    /// When the next lease runs out.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Time> {
        self.leases.values().map(|l| l.expires).min()
    }

    /// Whether the lease lives.
    #[must_use]
    pub fn lease_lives(&self, lease: LeaseId) -> bool {
        self.leases.contains_key(&lease)
    }

    /// Runs a transaction. A put under a lease that is gone refuses the whole transaction, as etcd's error does; one that is too
    /// large is not carried out, however often it is asked for.
    pub fn transact(&mut self, now: Time, transaction: &Transaction) -> Outcome {
        self.expire(now);
        if transaction.compare.len().max(transaction.then.len()) > TRANSACTION_OPS_MAX {
            return Outcome::Unknown(String::from("etcdserver: too many operations in txn request"));
        }
        let held = transaction.compare.iter().all(|c| c.holds(self.entries.get(c.key())));
        let leases_live = transaction.then.iter().all(|w| match w {
            Write::Put { lease: Some(lease), .. } => self.leases.contains_key(lease),
            Write::Put { lease: None, .. } | Write::Delete { .. } => true,
        });
        if !held || !leases_live {
            let keys: BTreeSet<&str> = transaction.compare.iter().map(super::Compare::key).collect();
            let found = keys.into_iter().filter_map(|k| self.entries.get(k).cloned()).collect();
            return Outcome::Refused { revision: self.revision, found };
        }
        if transaction.then.iter().any(|w| match w {
            Write::Put { .. } => true,
            Write::Delete { key } => self.entries.contains_key(key),
        }) {
            self.revision.0 += 1;
        }
        for write in &transaction.then {
            match write {
                Write::Put { key, value, lease } => self.put(key, value, *lease),
                Write::Delete { key } => self.delete(key),
            }
        }
        Outcome::Done(self.revision)
    }

    /// Everything below `prefix`.
    #[must_use]
    pub fn list(&self, prefix: &str) -> (Revision, Vec<KeyValue>) {
        let found = self.entries.range(prefix.to_owned()..).take_while(|(k, _)| k.starts_with(prefix));
        (self.revision, found.map(|(_, kv)| kv.clone()).collect())
    }

    /// What stands at `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.entries.get(key)
    }

    /// All changes below `prefix` after `revision`, in order.
    ///
    /// # Errors
    /// The revision up to which history was compacted away, if `revision` lies before it: list again.
    pub fn changes_after(&self, prefix: &str, revision: Revision) -> Result<Vec<Change>, Revision> {
        if revision < self.compacted {
            return Err(self.compacted);
        }
        let start = self.history.partition_point(|(r, _)| *r <= revision);
        let below = |change: &Change| match change {
            Change::Put(kv) => kv.key.starts_with(prefix),
            Change::Deleted { key, .. } => key.starts_with(prefix),
        };
        Ok(self.history.iter().skip(start).map(|(_, c)| c).filter(|c| below(c)).cloned().collect())
    }

    /// Forgets history up to and including `revision`.
    pub fn compact(&mut self, revision: Revision) {
        self.compacted = self.compacted.max(revision);
        let keep = self.history.partition_point(|(r, _)| *r <= revision);
        self.history.drain(..keep);
    }

    fn put(&mut self, key: &str, value: &str, lease: Option<LeaseId>) {
        let created = self.entries.get(key).map_or(self.revision, |old| old.created);
        self.unbind(key);
        if let Some(lease) = lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.insert(key.to_owned());
        }
        let kv = KeyValue { key: key.to_owned(), value: value.to_owned(), created, modified: self.revision, lease };
        self.entries.insert(key.to_owned(), kv.clone());
        self.history.push((self.revision, Change::Put(kv)));
    }

    fn delete(&mut self, key: &str) {
        self.unbind(key);
        if self.entries.remove(key).is_some() {
            let change = Change::Deleted { key: key.to_owned(), revision: self.revision };
            self.history.push((self.revision, change));
        }
    }

    fn unbind(&mut self, key: &str) {
        let lease = self.entries.get(key).and_then(|kv| kv.lease);
        if let Some(lease) = lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.remove(key);
        }
    }
}
