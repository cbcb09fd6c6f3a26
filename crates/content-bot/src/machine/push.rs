//! A push notification that came to a bot that does not lead: kept until it stands in etcd, where the leader sees it.
//!
//! The hint is a key of the content scope that only content bots read. It says "look", never "publish this".

use bots_core::{
    dcs::{DcsAction, Outcome, RequestId, Scope, Transaction, Write},
    machine::Time,
    membership::{Membership, RETRY_AFTER},
};
use serde::Serialize;

/// Where the newest hint stands.
pub(super) fn hint_key(scope: &Scope) -> String {
    scope.key("push")
}

#[derive(Serialize)]
struct Hint<'h> {
    by: &'h str,
    at_unix_ms: u64,
}

/// A push that nobody has looked into yet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Push {
    pending: bool,
    request: Option<RequestId>,
    retry_at: Option<Time>,
}

impl Push {
    pub(super) const fn received(&mut self) {
        self.pending = true;
    }

    /// Takes the push for ourselves.
    pub(super) const fn take(&mut self) -> bool {
        self.request = None;
        self.retry_at = None;
        std::mem::replace(&mut self.pending, false)
    }

    /// Writes the hint for the leader to see.
    pub(super) fn forward(
        &mut self,
        now: Time,
        now_unix_ms: u64,
        membership: &mut Membership,
        out: &mut Vec<DcsAction>,
    ) {
        if !self.pending || self.request.is_some() || self.retry_at.is_some_and(|at| at > now) {
            return;
        }
        let id = membership.next_request();
        let hint = Hint { by: membership.name(), at_unix_ms: now_unix_ms };
        let value = serde_json::to_string(&hint).unwrap_or_default();
        let put = Write::put(hint_key(membership.scope()), value);
        out.push(DcsAction::Transact { id, transaction: Transaction::new(Vec::new(), vec![put]) });
        // A push that comes in from here on is news again.
        self.pending = false;
        self.request = Some(id);
        self.retry_at = None;
    }

    pub(super) fn answered(&mut self, now: Time, id: RequestId, outcome: &Outcome) {
        if self.request.take_if(|request| *request == id).is_none() {
            return;
        }
        match outcome {
            Outcome::Done(_) => {}
            // Once too often is harmless, once too seldom is not.
            Outcome::Refused { .. } | Outcome::Unknown(_) => {
                self.pending = true;
                self.retry_at = Some(now + RETRY_AFTER);
            }
        }
    }

    pub(super) const fn is_pending(&self) -> bool {
        self.pending || self.request.is_some()
    }

    pub(super) const fn retry_at(&self) -> Option<Time> {
        self.retry_at
    }
}
