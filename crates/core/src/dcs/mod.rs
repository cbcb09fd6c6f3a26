//! The distributed configuration store (DCS) as data: what can be asked, what can be answered, what can be seen.
//!
//! No I/O. The real store is `shell::dcs` (etcd); [`MemoryDcs`] is a synchronous model of it. Both pass one conformance
//! suite. A watch is a hint to look; a transaction with a compare is the truth.

mod keys;
mod memory;
mod view;

use serde::{Deserialize, Serialize};

pub use self::{
    keys::{DEFAULT_NAMESPACE, NAME_LEN_MAX, NameError, Scope, check_name},
    memory::{MemoryDcs, TRANSACTION_OPS_MAX},
    view::View,
};
use crate::machine::{Span, Time};

/// A revision of the whole store; grows with every change, never shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// The identity of a lease, as the store gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub i64);

/// The number that ties an answer to its question; counted by the machine that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u64);

impl RequestId {
    /// Takes the next number from `counter`.
    pub fn next(counter: &mut u64) -> Self {
        *counter += 1;
        Self(*counter)
    }
}

/// A key with its value and its history in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyValue {
    /// The full key.
    pub key: String,
    /// The value; all values of ours are UTF-8.
    pub value: String,
    /// The revision that created it: the fencing number of a lock.
    pub created: Revision,
    /// The revision that changed it last.
    pub modified: Revision,
    /// The lease that it dies with.
    pub lease: Option<LeaseId>,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key exists.
    Present(String),
    /// The key exists with exactly this value.
    ValueIs(String, String),
    /// The key was last changed at this revision.
    ModifiedAt(String, Revision),
    /// The key was created at this revision: the lock is still the one that we took.
    CreatedAt(String, Revision),
    /// The key is bound to this lease.
    LeaseIs(String, LeaseId),
}

impl Compare {
    /// The key that the condition looks at.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(k)
            | Self::Present(k)
            | Self::ValueIs(k, _)
            | Self::ModifiedAt(k, _)
            | Self::CreatedAt(k, _)
            | Self::LeaseIs(k, _) => k,
        }
    }

    /// Whether the condition holds for what stands at its key.
    #[must_use]
    pub fn holds(&self, found: Option<&KeyValue>) -> bool {
        match self {
            Self::Absent(_) => found.is_none(),
            Self::Present(_) => found.is_some(),
            Self::ValueIs(_, v) => found.is_some_and(|kv| kv.value == *v),
            Self::ModifiedAt(_, r) => found.is_some_and(|kv| kv.modified == *r),
            Self::CreatedAt(_, r) => found.is_some_and(|kv| kv.created == *r),
            Self::LeaseIs(_, l) => found.is_some_and(|kv| kv.lease == Some(*l)),
        }
    }
}

/// A change that a transaction makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Write {
    /// Sets the key, bound to the lease if there is one.
    Put {
        /// The full key.
        key: String,
        /// The new value.
        value: String,
        /// The lease that the key shall die with.
        lease: Option<LeaseId>,
    },
    /// Removes the key.
    Delete {
        /// The full key.
        key: String,
    },
}

impl Write {
    /// A put that outlives its writer.
    pub fn put(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// A put that dies with `lease`.
    pub fn put_leased(key: impl Into<String>, value: impl Into<String>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// A delete.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }
}

/// All or nothing: if every compare holds, every write is made. A key may be written once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Transaction {
    /// The conditions.
    pub compare: Vec<Compare>,
    /// The changes if all conditions hold. If one does not, the keys of the conditions are read instead.
    pub then: Vec<Write>,
}

impl Transaction {
    /// A transaction with these conditions and these changes.
    #[must_use]
    pub const fn new(compare: Vec<Compare>, then: Vec<Write>) -> Self {
        Self { compare, then }
    }
}

/// How a transaction ended. There is no fourth way, and *unknown* means just that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Every condition held and every change is durable, at this revision.
    Done(Revision),
    /// A condition did not hold; nothing changed. What stood at the compared keys, as far as they exist.
    Refused {
        /// The revision at which the conditions were looked at.
        revision: Revision,
        /// The compared keys that exist.
        found: Vec<KeyValue>,
    },
    /// No answer, or none to trust: the changes may or may not have been made, now or later.
    Unknown(String),
}

/// One change that a watch shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// The key was created or changed.
    Put(KeyValue),
    /// The key was deleted, by hand or with its lease.
    Deleted {
        /// The full key.
        key: String,
        /// The revision of the deletion.
        revision: Revision,
    },
}

/// What a machine asks of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DcsAction {
    /// Get a lease of this length and keep renewing it, until it is revoked or lost. Answered by
    /// [`DcsEvent::LeaseGranted`], sooner or later; asked again only after [`DcsEvent::LeaseLost`].
    GrantLease {
        /// Time to live; the store counts in whole seconds.
        ttl: Span,
    },
    /// Renew the lease this often from now on; at first it is renewed when half of it has passed. Never answered.
    PaceLease {
        /// The lease.
        lease: LeaseId,
        /// From one renewal to the next.
        every: Span,
    },
    /// Give the lease back; every key bound to it goes at once. Never answered.
    RevokeLease {
        /// The lease.
        lease: LeaseId,
    },
    /// Run the transaction once. Answered by [`DcsEvent::Answered`], exactly once.
    Transact {
        /// Ties the answer to the question.
        id: RequestId,
        /// What to run.
        transaction: Transaction,
    },
}

/// What the store tells a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DcsEvent {
    /// Everything under a watched prefix, at one revision: after start and after every broken watch.
    Listed {
        /// The watched prefix.
        prefix: String,
        /// The revision of the reading.
        revision: Revision,
        /// All keys below the prefix.
        entries: Vec<KeyValue>,
    },
    /// Changes under a watched prefix, in order.
    Changed {
        /// The watched prefix.
        prefix: String,
        /// The revision up to which the changes reach.
        revision: Revision,
        /// The changes.
        changes: Vec<Change>,
    },
    /// The watch of a prefix is broken; what we know of it grows old until the next `Listed`.
    WatchLost {
        /// The watched prefix.
        prefix: String,
        /// One line: what failed.
        why: String,
    },
    /// A lease was granted and is being renewed.
    LeaseGranted {
        /// The lease.
        lease: LeaseId,
        /// Until when it is sure to live: counted from when the request was *sent*.
        valid_until: Time,
    },
    /// The store answered a renewal.
    LeaseRenewed {
        /// The lease.
        lease: LeaseId,
        /// Until when it is sure to live: counted from when the renewal was *sent*.
        valid_until: Time,
    },
    /// The lease is gone, or renewal has ended for good. Renewal of it has stopped.
    LeaseLost {
        /// The lease.
        lease: LeaseId,
        /// One line: how we know.
        why: String,
    },
    /// A transaction ended.
    Answered {
        /// The question's number.
        id: RequestId,
        /// How it ended.
        outcome: Outcome,
    },
}
