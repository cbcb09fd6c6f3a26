//! The bot's place in the serving set: claim a load message, hold it, lose it, win it back, give it back (S5).
//!
//! A claim is one transaction: the message is as we saw it, nobody has claimed it, write the claim under our lease. First
//! come, first served; the loser tries the next message. An answer that was lost is asked for again, never assumed.

use std::collections::BTreeMap;

use bots_core::{
    dcs::{Compare, DcsAction, LeaseId, Outcome, RequestId, Revision, Scope, Transaction, Write},
    machine::{Deadline, Span, Time},
    membership::{Membership, RETRY_AFTER},
};
use serde::Serialize;

use super::{Action, board::Board};

/// How long an idle bot that has just regained its lease leaves the messages to those that serve: after an outage of the
/// store all claims are gone at once, and the bots that kept serving should win theirs back.
pub const RECLAIM_GRACE: Span = Span::from_secs(2);

/// What the bot has of the serving set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Hold {
    Free,
    /// A claim is under way; `lost` is the slot to fall back to wanting.
    Claiming {
        slot: u32,
        request: RequestId,
        lease: LeaseId,
        lost: Option<u32>,
    },
    /// The answer was lost: ask again.
    Uncertain {
        slot: u32,
        retry_at: Time,
        lost: Option<u32>,
    },
    Held {
        slot: u32,
        lease: LeaseId,
        created: Revision,
    },
    /// The claim went with the lease; whoever serves goes on and wants a place again.
    Lost {
        slot: u32,
    },
}

/// A claim that is being given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Release {
    slot: u32,
    lease: LeaseId,
    /// The claim that is meant: the same bot may have another one on the slot when a late question arrives.
    created: Revision,
    request: Option<RequestId>,
    retry_at: Time,
}

/// A slot that somebody else won, and until when that is believed although the view does not show it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct PassedOver {
    view: Revision,
    until: Time,
}

/// The sub-machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Slots {
    scope: Scope,
    hold: Hold,
    release: Option<Release>,
    passed_over: BTreeMap<u32, PassedOver>,
    not_before: Time,
    strays_not_before: Time,
}

/// What a serving bot finds when it looks for its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The message is there and ours, or will be told soon.
    Keep,
    /// The leader has withdrawn the message.
    Withdrawn,
    /// Ours was lost and every message is taken.
    NoPlace,
}

/// What the sub-machine looks at: the time, the store as known, and how far that knowledge reaches.
pub(super) struct Sight<'v> {
    pub(super) now: Time,
    pub(super) board: &'v Board,
    pub(super) view: Revision,
    /// The watch is whole: what is absent in the view is absent in the store, or was a moment ago.
    pub(super) watched: bool,
    pub(super) max: u32,
    /// A place that is given back may be another's: nothing of ours that was started for it is left.
    pub(super) vacated: bool,
}

impl Slots {
    pub(super) fn new(scope: Scope) -> Self {
        Self {
            scope,
            hold: Hold::Free,
            release: None,
            passed_over: BTreeMap::new(),
            not_before: Time::ZERO,
            strays_not_before: Time::ZERO,
        }
    }

    /// The slot that is ours under a lease that we have not heard to be lost.
    pub(super) const fn held(&self) -> Option<u32> {
        match self.hold {
            Hold::Held { slot, .. } => Some(slot),
            Hold::Free | Hold::Claiming { .. } | Hold::Uncertain { .. } | Hold::Lost { .. } => None,
        }
    }

    /// The slot that we serve for: held, or lost and wanted back.
    pub(super) const fn serving_for(&self) -> Option<u32> {
        match self.hold {
            Hold::Held { slot, .. } | Hold::Lost { slot } => Some(slot),
            Hold::Claiming { lost, .. } | Hold::Uncertain { lost, .. } => lost,
            Hold::Free => None,
        }
    }

    /// The slot that is asked for at the moment.
    pub(super) const fn asking_for(&self) -> Option<u32> {
        match self.hold {
            Hold::Claiming { slot, .. } | Hold::Uncertain { slot, .. } => Some(slot),
            Hold::Free | Hold::Held { .. } | Hold::Lost { .. } => None,
        }
    }

    /// Until when the bot leaves messages to others.
    pub(super) const fn not_before(&self) -> Time {
        self.not_before
    }

    /// Leaves messages to others until `at`.
    pub(super) fn hold_off_until(&mut self, at: Time) {
        self.not_before = self.not_before.max(at);
    }

    /// The lease is gone and every claim with it.
    pub(super) fn lease_lost(&mut self) {
        self.release = None;
        self.hold = match self.hold {
            Hold::Held { slot, .. } | Hold::Lost { slot } => Hold::Lost { slot },
            Hold::Claiming { lost: Some(slot), .. } | Hold::Uncertain { lost: Some(slot), .. } => Hold::Lost { slot },
            Hold::Claiming { lost: None, .. } | Hold::Uncertain { lost: None, .. } | Hold::Free => Hold::Free,
        };
    }

    /// Takes in the answer to a transaction, if it is one of ours.
    pub(super) fn answered(&mut self, now: Time, id: RequestId, outcome: &Outcome, view: Revision) {
        if self.release.as_ref().is_some_and(|r| r.request == Some(id)) {
            self.released(now, outcome);
            return;
        }
        let Hold::Claiming { slot, request, lease, lost } = self.hold else { return };
        if request != id {
            return;
        }
        let key = self.scope.load_claim(slot);
        self.hold = match outcome {
            Outcome::Done(created) => Hold::Held { slot, lease, created: *created },
            Outcome::Unknown(_) => Hold::Uncertain { slot, retry_at: now + RETRY_AFTER, lost },
            Outcome::Refused { found, .. } => {
                match found.iter().find(|kv| kv.key == key && kv.lease == Some(lease)) {
                    // An earlier try of ours whose answer was lost had gone through.
                    Some(ours) => Hold::Held { slot, lease, created: ours.created },
                    None => {
                        self.passed_over.insert(slot, PassedOver { view, until: now + RETRY_AFTER });
                        lost.map_or(Hold::Free, |slot| Hold::Lost { slot })
                    }
                }
            }
        };
    }

    fn released(&mut self, now: Time, outcome: &Outcome) {
        match outcome {
            Outcome::Done(_) | Outcome::Refused { .. } => {
                self.release = None;
                self.strays_not_before = now + RETRY_AFTER;
            }
            Outcome::Unknown(_) => {
                if let Some(release) = &mut self.release {
                    release.request = None;
                    release.retry_at = now + RETRY_AFTER;
                }
            }
        }
    }

    /// Compares what we believe with what the view shows.
    pub(super) fn observe(&mut self, sight: &Sight<'_>, membership: &Membership) {
        self.passed_over.retain(|_, p| p.view >= sight.view && p.until > sight.now);
        let ours = |slot: u32, lease: LeaseId| sight.board.claim(slot).is_some_and(|c| c.lease == Some(lease));
        match self.hold {
            Hold::Held { slot, lease, created } if sight.view >= created && !ours(slot, lease) => {
                self.hold = Hold::Lost { slot };
            }
            Hold::Uncertain { slot, lost, .. } => {
                if let (Some(claim), Some(lease)) = (sight.board.claim(slot), membership.lease_id()) {
                    self.hold = match lost {
                        _ if claim.lease == Some(lease) => Hold::Held { slot, lease, created: claim.created },
                        Some(slot) => Hold::Lost { slot },
                        None => Hold::Free,
                    };
                }
            }
            Hold::Held { .. } | Hold::Free | Hold::Claiming { .. } | Hold::Lost { .. } => {}
        }
    }

    /// An idle bot looks for a message and claims the lowest that nobody has.
    pub(super) fn seek(&mut self, sight: &Sight<'_>, membership: &mut Membership, out: &mut Vec<Action>) {
        match self.hold {
            Hold::Free if self.release.is_none() && sight.now >= self.not_before => {
                if let Some(slot) = self.best(sight, None) {
                    self.claim(slot, None, sight, membership, out);
                }
            }
            Hold::Uncertain { slot, retry_at, lost } if retry_at <= sight.now => {
                self.claim(slot, lost, sight, membership, out);
            }
            Hold::Free | Hold::Uncertain { .. } | Hold::Claiming { .. } | Hold::Held { .. } | Hold::Lost { .. } => {}
        }
    }

    /// A serving bot looks whether its place is still its own, and wins it back if the lease had gone.
    pub(super) fn keep(&mut self, sight: &Sight<'_>, membership: &mut Membership, out: &mut Vec<Action>) -> Standing {
        match self.hold {
            Hold::Held { slot, created, .. } => {
                let gone = sight.view >= created && sight.board.message(slot).is_none();
                if gone { Standing::Withdrawn } else { Standing::Keep }
            }
            Hold::Uncertain { slot, retry_at, lost } => {
                if retry_at <= sight.now {
                    self.claim(slot, lost, sight, membership, out);
                }
                Standing::Keep
            }
            Hold::Lost { slot } => self.win_back(slot, sight, membership, out),
            Hold::Claiming { .. } => Standing::Keep,
            Hold::Free => Standing::NoPlace,
        }
    }

    fn win_back(
        &mut self,
        lost: u32,
        sight: &Sight<'_>,
        membership: &mut Membership,
        out: &mut Vec<Action>,
    ) -> Standing {
        if !sight.watched || !membership.is_registered() || membership.lease(sight.now).is_none() {
            return Standing::Keep;
        }
        if let Some(slot) = self.best(sight, Some(lost)) {
            self.claim(slot, Some(lost), sight, membership, out);
            return Standing::Keep;
        }
        // A claim of our own under the old lease still has to run out: the place is as good as free.
        let own_remains = |slot: u32| sight.board.claim(slot).is_some_and(|c| c.name == membership.name());
        let waits = self.passed_over.keys().any(|slot| *slot < sight.max && sight.board.message(*slot).is_some());
        if waits || sight.board.posted().any(own_remains) { Standing::Keep } else { Standing::NoPlace }
    }

    /// The slot to claim: the preferred one if it is to be had, else the lowest.
    fn best(&self, sight: &Sight<'_>, preferred: Option<u32>) -> Option<u32> {
        let open = || {
            let slots = sight.board.unclaimed().map(|(slot, _)| slot);
            slots.filter(|slot| *slot < sight.max && !self.passed_over.contains_key(slot))
        };
        open().find(|slot| Some(*slot) == preferred).or_else(|| open().next())
    }

    fn claim(
        &mut self,
        slot: u32,
        lost: Option<u32>,
        sight: &Sight<'_>,
        membership: &mut Membership,
        out: &mut Vec<Action>,
    ) {
        let Some(lease) = membership.lease(sight.now).filter(|_| membership.is_registered()) else {
            if let Hold::Uncertain { retry_at, .. } = &mut self.hold {
                *retry_at = sight.now + RETRY_AFTER;
            }
            return;
        };
        let Some(modified) = sight.board.message(slot) else {
            // Asked for, answer lost, message gone since: the stray claim, if it exists, is given back.
            self.hold = lost.map_or(Hold::Free, |slot| Hold::Lost { slot });
            return;
        };
        let claim = self.scope.load_claim(slot);
        let compare = vec![Compare::ModifiedAt(self.scope.load(slot), modified), Compare::Absent(claim.clone())];
        let then = vec![Write::put_leased(claim, membership.name(), lease)];
        let request = membership.next_request();
        out.push(Action::Dcs(DcsAction::Transact { id: request, transaction: Transaction::new(compare, then) }));
        self.hold = Hold::Claiming { slot, request, lease, lost };
    }

    /// Stops asking for a place; one that is held stays held until it is given back.
    pub(super) fn stop_asking(&mut self) {
        if self.held().is_none() {
            self.hold = Hold::Free;
        }
    }

    /// Gives the place back; nothing must be served for it any more.
    pub(super) fn give_back(&mut self, now: Time) {
        if let Hold::Held { slot, lease, created } = self.hold {
            self.release = Some(Release { slot, lease, created, request: None, retry_at: now });
        }
        self.hold = Hold::Free;
    }

    /// Sends what is to be given back, also claims of ours that nobody serves for: a claim whose answer was lost may be
    /// made long after we stopped wanting it.
    pub(super) fn tidy(&mut self, sight: &Sight<'_>, membership: &mut Membership, out: &mut Vec<Action>) {
        if self.release.is_none() && sight.now >= self.strays_not_before {
            self.release = self.stray(sight, membership).map(|(slot, lease, created)| Release {
                slot,
                lease,
                created,
                request: None,
                retry_at: sight.now,
            });
        }
        let Some(release) = &mut self.release else { return };
        if release.request.is_some() || release.retry_at > sight.now || !sight.vacated {
            return;
        }
        if membership.lease(sight.now) != Some(release.lease) {
            // It may be gone already; then the claim goes with it.
            release.retry_at = sight.now + RETRY_AFTER;
            return;
        }
        let key = self.scope.load_claim(release.slot);
        let request = membership.next_request();
        release.request = Some(request);
        let same_claim =
            vec![Compare::LeaseIs(key.clone(), release.lease), Compare::CreatedAt(key.clone(), release.created)];
        let transaction = Transaction::new(same_claim, vec![Write::delete(key)]);
        out.push(Action::Dcs(DcsAction::Transact { id: request, transaction }));
    }

    fn stray(&self, sight: &Sight<'_>, membership: &Membership) -> Option<(u32, LeaseId, Revision)> {
        let lease = membership.lease(sight.now)?;
        let wanted = [self.held(), self.asking_for()];
        let (slot, created) = sight.board.claimed_under(lease).find(|(slot, _)| !wanted.contains(&Some(*slot)))?;
        Some((slot, lease, created))
    }

    /// When the sub-machine wants a step of its own accord.
    pub(super) fn deadline(&self, sight: &Sight<'_>, membership: &Membership) -> Option<Deadline> {
        let due = |at, reason: &str| Some(Deadline { at, reason: reason.to_owned() });
        let retry = match self.hold {
            Hold::Uncertain { retry_at, .. } => due(retry_at, "ask again for the load message"),
            Hold::Free if sight.now < self.not_before && sight.board.unclaimed().next().is_some() => {
                due(self.not_before, "look for a load message again")
            }
            Hold::Free | Hold::Claiming { .. } | Hold::Held { .. } | Hold::Lost { .. } => None,
        };
        let release = self.release.as_ref().filter(|r| r.request.is_none() && sight.vacated);
        let stray = self.release.is_none().then(|| self.stray(sight, membership)).flatten();
        Deadline::earliest([
            retry,
            release.and_then(|r| due(r.retry_at, "give the load message back")),
            stray.and_then(|_| due(self.strays_not_before, "give back a claim that nobody serves for")),
            self.passed_over.values().map(|p| p.until).min().and_then(|at| due(at, "look for a load message again")),
        ])
    }
}
