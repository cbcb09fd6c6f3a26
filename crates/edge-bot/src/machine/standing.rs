//! The bot's key below the Postgres scope that it routes to: there the primary sees that an edge stands before it, and how
//! far it has come with a switchover. Bound to the bot's lease, so that nobody waits for a dead edge for longer.

use bots_core::{
    dcs::{Compare, DcsAction, DcsEvent, LeaseId, Outcome, RequestId, Revision, Transaction, Write},
    machine::{Deadline, Time},
    membership::{Membership, RETRY_AFTER},
};
use serde::Serialize;

/// What stands there, as far as we know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Standing {
    key: String,
    /// When it was last written. The next value is written over this one only, so that a write whose answer was lost
    /// cannot come back over a newer one: the primary goes by it.
    modified: Option<Revision>,
    /// What we wrote last, and under which lease.
    written: Option<(LeaseId, String)>,
    asked: Option<(RequestId, LeaseId, String)>,
    retry_at: Option<Time>,
}

impl Standing {
    pub(super) const fn new(key: String) -> Self {
        Self { key, modified: None, written: None, asked: None, retry_at: None }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Whether something stands there.
    pub(super) const fn is_there(&self) -> bool {
        self.modified.is_some()
    }

    /// Has `value` stand there, one write at a time.
    pub(super) fn share(&mut self, now: Time, value: String, membership: &mut Membership, out: &mut Vec<DcsAction>) {
        let Some(lease) = membership.lease(now) else { return };
        let wanted = (lease, value);
        if self.asked.is_some() || self.written.as_ref() == Some(&wanted) || self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        let (lease, value) = wanted;
        let unchanged = match self.modified {
            Some(modified) => Compare::ModifiedAt(self.key.clone(), modified),
            None => Compare::Absent(self.key.clone()),
        };
        let id = membership.next_request();
        let put = Write::put_leased(self.key.clone(), value.clone(), lease);
        out.push(DcsAction::Transact { id, transaction: Transaction::new(vec![unchanged], vec![put]) });
        self.asked = Some((id, lease, value));
        self.retry_at = None;
    }

    /// Takes in an event that the view has already seen.
    pub(super) fn on_event(&mut self, now: Time, event: &DcsEvent) {
        match event {
            DcsEvent::Answered { id, outcome } => self.answered(now, *id, outcome),
            DcsEvent::LeaseLost { .. } => {
                // The key goes with the lease, now or soon: the next write finds out.
                self.written = None;
            }
            DcsEvent::Listed { .. }
            | DcsEvent::Changed { .. }
            | DcsEvent::WatchLost { .. }
            | DcsEvent::LeaseGranted { .. }
            | DcsEvent::LeaseRenewed { .. } => {}
        }
    }

    /// The store shows this at our key; it may lag behind our own writes.
    pub(super) fn shown(&mut self, modified: Option<Revision>, seen: Revision) {
        let known = self.modified.unwrap_or(Revision(0));
        if self.asked.is_none() && modified != self.modified && seen > known {
            self.modified = modified;
            self.written = None;
        }
    }

    fn answered(&mut self, now: Time, id: RequestId, outcome: &Outcome) {
        let Some((_, lease, value)) = self.asked.take_if(|(asked, _, _)| *asked == id) else { return };
        match outcome {
            Outcome::Done(revision) => {
                self.modified = Some(*revision);
                self.written = Some((lease, value));
            }
            Outcome::Refused { found, .. } => {
                // Our own of an earlier life, or one whose answer was lost.
                self.modified = found.iter().find(|kv| kv.key == self.key).map(|kv| kv.modified);
                self.written = None;
            }
            Outcome::Unknown(_) => self.retry_at = Some(now + RETRY_AFTER),
        }
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        self.retry_at.map(|at| Deadline { at, reason: String::from("write again where the edge stands") })
    }
}
