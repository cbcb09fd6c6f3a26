//! Leadership: the sub-machine of one lock, used by every bot. Acquire, hold, yield, lose.
//!
//! The lock is a key bound to the holder's lease. It is *held* only while the view shows it as ours **and** the lease
//! is sure to live; the revision that created it is the fencing number of everything done under it.

use serde::{Deserialize, Serialize};

use crate::{
    dcs::{Compare, DcsAction, DcsEvent, KeyValue, LeaseId, Outcome, RequestId, Revision, Transaction, View, Write},
    machine::{Deadline, Time},
    membership::{Membership, RETRY_AFTER},
};

/// A proof of leadership at one moment: what steps under the lock carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The revision that created the lock.
    pub created: Revision,
    /// The lease that holds it.
    pub lease: LeaseId,
}

/// The generation of a leader key: it tells one term of leading from the next, for whoever only reads the key. It is when
/// the key was last written, not when it was created: one that is put over names another leader and keeps its creation.
#[must_use]
pub const fn generation(leader: &KeyValue) -> Revision {
    leader.modified
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Phase {
    Out {
        /// We know that the lock was not ours by then: an older view that still shows it as ours proves nothing.
        since: Revision,
    },
    Acquiring {
        request: RequestId,
        /// The creation of our own lock from before a restart, which the new lease takes over.
        rebound: Option<Revision>,
    },
    /// The answer was lost; the same question is asked again.
    Uncertain { retry_at: Time },
    Held {
        fence: Fence,
        /// The lock was bound to our lease by then: an older view that does not show it proves nothing.
        since: Revision,
    },
    /// On its way back. There is no way from here to `Held`: a lost request may yet be carried out, and would take the
    /// lock away from under whoever uses it again.
    Yielding {
        /// The question under way; nothing while the last answer is lost.
        request: Option<RequestId>,
        fence: Fence,
        since: Revision,
        retry_at: Time,
    },
}

impl Phase {
    const OUT: Self = Self::Out { since: Revision(0) };
}

/// A change that the machine around must know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeadershipChange {
    /// The lock is ours.
    Won(Fence),
    /// Somebody else has it, or had it when we asked.
    Refused,
    /// It was ours and is not any more.
    Lost(String),
    /// We gave it back.
    Yielded,
}

/// The sub-machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leadership {
    key: String,
    me: String,
    phase: Phase,
}

impl Leadership {
    /// The lock at `key` for the bot called `me`.
    #[must_use]
    pub fn new(key: impl Into<String>, me: impl Into<String>) -> Self {
        Self { key: key.into(), me: me.into(), phase: Phase::OUT }
    }

    /// The key of the lock.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Proof that the lock is held at `now`; nothing once the lease may have run out.
    #[must_use]
    pub fn fence(&self, now: Time, membership: &Membership) -> Option<Fence> {
        match &self.phase {
            Phase::Held { fence, .. } if membership.lease(now) == Some(fence.lease) => Some(*fence),
            Phase::Held { .. }
            | Phase::Out { .. }
            | Phase::Acquiring { .. }
            | Phase::Uncertain { .. }
            | Phase::Yielding { .. } => None,
        }
    }

    /// Whether the lock is ours as far as we know, be the lease still sure or not.
    #[must_use]
    pub const fn is_held(&self) -> bool {
        matches!(self.phase, Phase::Held { .. })
    }

    /// The condition that makes a transaction a step under this lock (S3): refused once the lock is another's.
    #[must_use]
    pub fn guard(&self, fence: Fence) -> [Compare; 2] {
        [Compare::CreatedAt(self.key.clone(), fence.created), Compare::LeaseIs(self.key.clone(), fence.lease)]
    }

    /// Whether a question about the lock is under way.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Acquiring { .. } | Phase::Uncertain { .. } | Phase::Yielding { .. })
    }

    /// Whether the lock was given back, and etcd has not said yet that it is gone. It is never used again before that.
    #[must_use]
    pub const fn is_yielding(&self) -> bool {
        matches!(self.phase, Phase::Yielding { .. })
    }

    /// Whether [`Leadership::yield_lock`] has something to ask at `now`: the lock is held, or was given back and the answer
    /// is lost.
    #[must_use]
    pub fn may_yield(&self, now: Time, membership: &Membership) -> bool {
        self.to_yield(now, membership).is_some()
    }

    fn to_yield(&self, now: Time, membership: &Membership) -> Option<(Fence, Revision)> {
        let (fence, since) = match &self.phase {
            Phase::Held { fence, since } => (*fence, *since),
            Phase::Yielding { request: None, fence, since, retry_at } if *retry_at <= now => (*fence, *since),
            Phase::Out { .. } | Phase::Acquiring { .. } | Phase::Uncertain { .. } | Phase::Yielding { .. } => {
                return None;
            }
        };
        (membership.lease(now) == Some(fence.lease)).then_some((fence, since))
    }

    /// Whether an answer was lost, so that nobody knows yet whether the lock is ours.
    #[must_use]
    pub const fn is_uncertain(&self) -> bool {
        matches!(self.phase, Phase::Uncertain { .. })
    }

    /// Who holds the lock, as far as the view knows.
    #[must_use]
    pub fn holder<'v>(&self, view: &'v View) -> Option<&'v str> {
        view.value(&self.key)
    }

    /// Whether the lock looks free, or is our own from before a restart.
    #[must_use]
    pub fn looks_free(&self, view: &View) -> bool {
        view.value(&self.key).is_none_or(|holder| holder == self.me)
    }

    /// Asks for the lock, with `extra` conditions that must hold at that very revision. Does nothing while a question
    /// is under way or without a live lease.
    pub fn acquire(
        &mut self,
        now: Time,
        membership: &mut Membership,
        view: &View,
        extra: Vec<Compare>,
        out: &mut Vec<DcsAction>,
    ) {
        let due = match &self.phase {
            Phase::Out { .. } => true,
            Phase::Uncertain { retry_at } => *retry_at <= now,
            Phase::Acquiring { .. } | Phase::Held { .. } | Phase::Yielding { .. } => false,
        };
        if !due {
            return;
        }
        let Some(lease) = membership.lease(now) else {
            if let Phase::Uncertain { retry_at } = &mut self.phase {
                *retry_at = now + RETRY_AFTER;
            }
            return;
        };
        let mine = view.get(&self.key).filter(|kv| kv.value == self.me);
        let mut compare = vec![match mine {
            Some(kv) => Compare::ModifiedAt(self.key.clone(), kv.modified),
            None => Compare::Absent(self.key.clone()),
        }];
        let rebound = mine.map(|kv| kv.created);
        compare.extend(extra);
        let request = membership.next_request();
        let put = Write::put_leased(self.key.clone(), self.me.clone(), lease);
        out.push(DcsAction::Transact { id: request, transaction: Transaction::new(compare, vec![put]) });
        self.phase = Phase::Acquiring { request, rebound };
    }

    /// Gives the lock back in one transaction, together with `also`; only if it is still ours. To be called again while
    /// [`Leadership::may_yield`]: a lost answer is asked for once more.
    pub fn yield_lock(&mut self, now: Time, membership: &mut Membership, also: Vec<Write>, out: &mut Vec<DcsAction>) {
        let Some((fence, since)) = self.to_yield(now, membership) else {
            // Without a lease: with its next renewal, or when it is due again.
            if let Phase::Yielding { request: None, retry_at, .. } = &mut self.phase
                && *retry_at <= now
            {
                *retry_at = now + RETRY_AFTER;
            }
            return;
        };
        let request = membership.next_request();
        let mut then = vec![Write::delete(self.key.clone())];
        then.extend(also);
        let transaction = Transaction::new(self.guard(fence).to_vec(), then);
        out.push(DcsAction::Transact { id: request, transaction });
        self.phase = Phase::Yielding { request: Some(request), fence, since, retry_at: now };
    }

    /// Takes in an event that the view and the membership have already seen.
    pub fn on_event(
        &mut self,
        now: Time,
        event: &DcsEvent,
        view: &View,
        membership: &Membership,
    ) -> Option<LeadershipChange> {
        match event {
            DcsEvent::Answered { id, outcome } => self.answered(now, *id, outcome, membership),
            DcsEvent::Listed { .. } | DcsEvent::Changed { .. } => self.seen(view, membership),
            DcsEvent::LeaseLost { lease, why } => self.lease_lost(*lease, why),
            DcsEvent::LeaseRenewed { lease, valid_until: _ } => {
                // Who leads next waits for it.
                if let Phase::Yielding { request: None, fence, retry_at, .. } = &mut self.phase
                    && fence.lease == *lease
                {
                    *retry_at = now;
                }
                None
            }
            DcsEvent::WatchLost { .. } | DcsEvent::LeaseGranted { .. } => None,
        }
    }

    /// Gives the lock up without a word to the store: for a holder whose lease may have run out.
    pub fn abandon(&mut self) {
        self.phase = Phase::OUT;
    }

    /// When leadership wants a step of its own accord.
    #[must_use]
    pub fn deadline(&self) -> Option<Deadline> {
        match &self.phase {
            Phase::Uncertain { retry_at } => {
                Some(Deadline { at: *retry_at, reason: String::from("ask again for the lock") })
            }
            Phase::Yielding { request: None, retry_at, .. } => {
                Some(Deadline { at: *retry_at, reason: String::from("give the lock back again") })
            }
            Phase::Out { .. } | Phase::Acquiring { .. } | Phase::Held { .. } | Phase::Yielding { .. } => None,
        }
    }

    fn answered(
        &mut self,
        now: Time,
        id: RequestId,
        outcome: &Outcome,
        membership: &Membership,
    ) -> Option<LeadershipChange> {
        match (&self.phase, outcome) {
            (Phase::Acquiring { request, rebound }, Outcome::Done(revision)) if *request == id => {
                let lease = membership.lease_id()?;
                Some(self.won(Fence { created: rebound.unwrap_or(*revision), lease }, *revision))
            }
            (Phase::Acquiring { request, .. }, Outcome::Refused { revision, found }) if *request == id => {
                match found.iter().find(|kv| self.is_ours(kv, membership)) {
                    Some(ours) => {
                        let lease = ours.lease?;
                        Some(self.won(Fence { created: ours.created, lease }, *revision))
                    }
                    None => {
                        // A view that lags may still show it as ours.
                        self.phase = Phase::Out { since: *revision };
                        Some(LeadershipChange::Refused)
                    }
                }
            }
            (Phase::Acquiring { request, .. }, Outcome::Unknown(_)) if *request == id => {
                self.phase = Phase::Uncertain { retry_at: now + RETRY_AFTER };
                None
            }
            (
                Phase::Yielding { request: Some(request), .. },
                Outcome::Done(revision) | Outcome::Refused { revision, found: _ },
            ) if *request == id => {
                self.phase = Phase::Out { since: *revision };
                Some(LeadershipChange::Yielded)
            }
            (Phase::Yielding { request: Some(request), fence, since, .. }, Outcome::Unknown(_)) if *request == id => {
                let (fence, since, retry_at) = (*fence, *since, now + RETRY_AFTER);
                self.phase = Phase::Yielding { request: None, fence, since, retry_at };
                None
            }
            _other_request => None,
        }
    }

    fn seen(&mut self, view: &View, membership: &Membership) -> Option<LeadershipChange> {
        let found = view.get(&self.key);
        let ours = found.filter(|kv| self.is_ours(kv, membership));
        let seen = view.revision(self.key.trim_end_matches("leader"));
        match (&self.phase, ours) {
            (Phase::Held { fence, since }, Some(kv)) => {
                if fence.created != kv.created {
                    let fence = Fence { created: kv.created, lease: fence.lease };
                    self.phase = Phase::Held { fence, since: *since };
                }
                None
            }
            // The view may still lag behind the transaction that gave us the lock.
            (Phase::Held { since, .. }, None) if seen < *since => None,
            (Phase::Held { .. }, None) => Some(self.lost("the leader key is gone or another's")),
            // Or behind the one that gave it back.
            (Phase::Out { since }, Some(_)) if seen < *since => None,
            (Phase::Uncertain { .. } | Phase::Out { .. }, Some(kv)) => {
                let (lease, created, since) = (kv.lease?, kv.created, kv.modified);
                Some(self.won(Fence { created, lease }, since))
            }
            (Phase::Uncertain { .. }, None) if found.is_some_and(|kv| kv.value != self.me) => {
                self.phase = Phase::OUT;
                Some(LeadershipChange::Refused)
            }
            (Phase::Yielding { since, .. }, None) if seen >= *since => {
                self.phase = Phase::Out { since: seen };
                Some(LeadershipChange::Yielded)
            }
            (
                Phase::Out { .. } | Phase::Acquiring { .. } | Phase::Uncertain { .. } | Phase::Yielding { .. },
                None | Some(_),
            ) => None,
        }
    }

    fn lease_lost(&mut self, lease: LeaseId, why: &str) -> Option<LeadershipChange> {
        match &self.phase {
            Phase::Held { fence, .. } if fence.lease == lease => Some(self.lost(why)),
            Phase::Yielding { .. } => {
                self.phase = Phase::OUT;
                Some(LeadershipChange::Yielded)
            }
            Phase::Acquiring { .. } | Phase::Uncertain { .. } => {
                self.phase = Phase::OUT;
                Some(LeadershipChange::Refused)
            }
            Phase::Held { .. } | Phase::Out { .. } => None,
        }
    }

    fn is_ours(&self, kv: &KeyValue, membership: &Membership) -> bool {
        kv.key == self.key && kv.value == self.me && kv.lease.is_some() && kv.lease == membership.lease_id()
    }

    fn won(&mut self, fence: Fence, since: Revision) -> LeadershipChange {
        self.phase = Phase::Held { fence, since };
        LeadershipChange::Won(fence)
    }

    fn lost(&mut self, why: &str) -> LeadershipChange {
        self.phase = Phase::OUT;
        LeadershipChange::Lost(why.to_owned())
    }
}
