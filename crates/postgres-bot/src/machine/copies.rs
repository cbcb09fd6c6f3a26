//! Copies of the leader's permanent logical slots on a replica, so that after a failover their consumers miss nothing.
//!
//! Postgres makes no such slot on a standby at a position of the past. So the slot's file is fetched from the leader, put in place while
//! the replica is down, and moved on behind what the consumer confirms. A copy is not good by itself: it becomes good, and this file
//! says when ([decision 0020](../../../docs/decisions/0020-logical-slots-follow-a-failover.md) says why). A replica that is promoted
//! keeps the copies that are good, and no other: a consumer that finds nothing knows that it has missed something.

use std::collections::BTreeMap;

use bots_core::{
    dcs::Revision,
    machine::{Span, Time},
    wire::{Lsn, PostgresStatus},
};
use serde::Serialize;

use super::{
    dynamic::effective_parameters,
    event::{Action, ProbeId, SlotChange},
    operator::Restart,
    phase::Phase,
    postgres::{LeaderSlots, ReplicationSlot, Server, SlotKind, Upstream, Xid},
    slots::slot_of,
    state::{State, Timer},
    turn::Turn,
};

/// The leader is asked again after this long while a copy is missing or not good; then later and later, for some consumers confirm
/// nothing for hours.
const LOOK_AGAIN_MIN: Span = Span::from_secs(2);
/// See [`LOOK_AGAIN_MIN`].
const LOOK_AGAIN_MAX: Span = Span::from_secs(60);

/// A replica is restarted for new copies at most so often, whatever becomes of them.
const RESTART_AGAIN: Span = Span::from_secs(600);

/// Replicas that need a restart for the same new slot take turns of this length, by their names: some are to serve meanwhile.
const RESTART_TURN: Span = Span::from_secs(20);

/// What is known of the copies.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Copies {
    /// The leader's lock that the proofs are about.
    reign: Option<Revision>,
    /// The log was being received when it was looked at last.
    streaming: bool,
    /// By slot, for those that are there.
    proofs: BTreeMap<String, Proof>,
    /// The question to the leader that is under way.
    asked: Option<ProbeId>,
    /// Nothing is asked before, and how often it was in a row.
    look: (Time, u32),
    /// Files were fetched from this leader at this time, for the next start.
    fetched: Option<(String, Time)>,
    /// No restart for new copies before.
    restart_not_before: Time,
}

/// What proves that a copy is good: that its consumer misses nothing if it goes on from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Proof {
    /// Where it kept the log from when it was seen first. Once it has moved on by itself, a consistent snapshot to decode with has
    /// been written here, and no transaction is left that had begun before and could be passed over.
    begun: Option<Lsn>,
    /// The leader kept the catalog for the slot as of this transaction at a moment when it kept it for our copy, too. A copy that
    /// has come to it lacks no row: what was removed before was older, what is removed since is held back by us.
    reach: Option<Xid>,
    good: bool,
}

impl State {
    /// The permanent logical slots that this member keeps copies of while it follows: those that the leader has. The copies of a
    /// member that may not lead would only keep the log, and without a slot of our own the leader would not keep the catalog.
    pub(super) fn wanted_copies(&self) -> BTreeMap<String, String> {
        let rules = &self.dynamic.slots;
        if !rules.members || self.settings.tags.nofailover() || !self.decodes() {
            return BTreeMap::new();
        }
        let status: PostgresStatus = self.view.json(&self.settings.scope.status()).unwrap_or_default();
        let logical = rules.permanent.iter().filter_map(|(name, kind)| match kind {
            SlotKind::Logical { database, plugin: _ } => Some((name.clone(), database.clone())),
            SlotKind::Physical => None,
        });
        logical.filter(|(name, _)| status.slots.contains_key(name)).collect()
    }

    /// The server is configured for decoding: with less, it does not even start beside a logical slot.
    fn decodes(&self) -> bool {
        let parameters = effective_parameters(&self.settings, &self.dynamic, None);
        parameters.get("wal_level").is_some_and(|level| level.eq_ignore_ascii_case("logical"))
    }

    /// By this parameter, the leader keeps the catalog for the copies.
    pub(super) fn feedback_parameter(&self) -> Option<(String, String)> {
        let wanted = !self.wanted_copies().is_empty();
        wanted.then(|| (String::from("hot_standby_feedback"), String::from("on")))
    }

    /// The copies that a promotion must not keep. A logical slot that nobody has configured is what is left of an earlier reign.
    pub(super) fn copies_to_drop(&self) -> Vec<String> {
        let Some(slots) = self.server().and_then(|server| server.slots.as_ref()) else { return Vec::new() };
        let is_good = |name: &String| self.copies.proofs.get(name).is_some_and(|proof| proof.good);
        let logical = slots.iter().filter(|(_, slot)| matches!(slot.kind, SlotKind::Logical { .. }));
        let bad = logical.filter(|(name, slot)| !is_good(name) && !self.dynamic.slots.ignores(name, slot));
        bad.map(|(name, _)| name.clone()).collect()
    }

    /// The slots whose consumers would have to begin anew if this member led now.
    pub(super) fn copies_trouble(&self) -> Option<String> {
        if !matches!(self.phase, Phase::Replica { .. }) {
            return None;
        }
        let good = |name: &String| self.copies.proofs.get(name).is_some_and(|proof| proof.good);
        let names: Vec<String> = self.wanted_copies().into_keys().filter(|name| !good(name)).collect();
        (!names.is_empty()).then(|| {
            format!("the logical slots [{}] would not outlive a failover to this member yet", names.join(", "))
        })
    }
}

impl Turn {
    /// The server is down, or was just now: what a copy had become may be lost.
    pub(super) fn forget_copies(&mut self) {
        let restart_not_before = self.s.copies.restart_not_before;
        self.s.copies = Copies { restart_not_before, ..Copies::default() };
    }

    /// Looks after the copies of a replica.
    pub(super) fn mind_copies(&mut self, found: &BTreeMap<String, ReplicationSlot>, server: &Server) {
        let wanted = self.s.wanted_copies();
        let leader = self.s.upstream();
        let reign = leader.as_ref().and(self.s.view.get(&self.s.settings.scope.leader())).map(|kv| kv.created);
        let resumed = server.streaming && !self.s.copies.streaming;
        self.s.copies.streaming = server.streaming;
        // Another leader keeps the catalog as it likes until it hears of us, and so does one that we were away from.
        if resumed || (reign.is_some() && self.s.copies.reign != reign) {
            self.s.copies.reign = reign;
            self.s.copies.proofs.clear();
            (self.s.copies.asked, self.s.copies.fetched) = (None, None);
            self.s.copies.look = (self.now, 0);
        }
        self.s.copies.proofs.retain(|name, _| found.contains_key(name) && wanted.contains_key(name));
        let mut missing = Vec::new();
        let mut is_done = true;
        for name in wanted.keys() {
            let Some(slot) = found.get(name) else {
                missing.push(name.clone());
                continue;
            };
            let proof = self.s.copies.proofs.entry(name.clone());
            let proof = proof.or_insert(Proof { begun: slot.restart, reach: None, good: false });
            proof.advance(slot);
            is_done &= proof.good;
        }
        let Some(leader) = leader.filter(|_| server.streaming && !(is_done && missing.is_empty())) else { return };
        if self.restart_for_copies(&leader) {
            return;
        }
        if self.s.copies.asked.is_some() {
            return;
        }
        if self.now < self.s.copies.look.0 {
            return self.look_at_slots_at(self.s.copies.look.0);
        }
        let pause = LOOK_AGAIN_MIN.times(1 << self.s.copies.look.1.min(5)).min(LOOK_AGAIN_MAX);
        self.s.copies.look = (self.now + pause, self.s.copies.look.1.saturating_add(1));
        self.s.probes += 1;
        let id = ProbeId(self.s.probes);
        self.s.copies.asked = Some(id);
        let fetch = if self.may_restart_for_copies() { missing } else { Vec::new() };
        let (own, names) = (slot_of(&self.s.settings.name), wanted.into_keys().collect());
        self.out.push(Action::LookAtSlots { id, leader, own, names, fetch });
    }

    /// The leader has told what it has, or has not.
    pub(super) fn leader_slots_seen(&mut self, id: ProbeId, seen: Result<LeaderSlots, String>) {
        if self.s.copies.asked.take_if(|asked| *asked == id).is_none() {
            return;
        }
        self.look_at_slots_at(self.s.copies.look.0);
        let Ok(seen) = seen else { return };
        let (Some(leader), Some(server)) = (self.s.upstream(), self.s.server().cloned()) else { return };
        if !server.streaming || !matches!(self.s.phase, Phase::Replica { .. }) {
            return;
        }
        if !seen.fetched.is_empty() {
            // Fetched anew, the files are younger; the turn to restart stays.
            let since = self.s.copies.fetched.take().filter(|(from, _)| *from == leader.name).map(|(_, since)| since);
            self.s.copies.fetched = Some((leader.name, since.unwrap_or(self.now)));
        }
        let wanted = self.s.wanted_copies();
        let mut changes = Vec::new();
        for (name, there) in &seen.slots {
            let here = server.slots.as_ref().and_then(|slots| slots.get(name));
            let (Some(slot), Some(database)) = (here, wanted.get(name)) else { continue };
            let Some(proof) = self.s.copies.proofs.get_mut(name).filter(|proof| !proof.good) else { continue };
            // Ours alone decides what is kept only while it is not younger than the copy.
            let heeded = matches!((seen.feedback, slot.catalog_xmin), (Some(kept), Some(own)) if !own.precedes(kept));
            if heeded {
                proof.reach.get_or_insert(there.catalog_xmin);
            }
            let to = there.confirmed.min(server.replayed);
            if slot.confirmed.is_some_and(|confirmed| confirmed <= to) && !slot.active {
                changes.push(SlotChange::Follow { name: name.clone(), database: database.clone(), to });
            }
        }
        if !changes.is_empty() {
            self.out.push(Action::ChangeSlots { changes });
        }
    }

    /// Restarts the server if files for it were fetched and its turn has come; says whether it does.
    fn restart_for_copies(&mut self, leader: &Upstream) -> bool {
        let Some((from, since)) = self.s.copies.fetched.clone() else { return false };
        if from != leader.name || !self.may_restart_for_copies() {
            return false;
        }
        let me = self.s.settings.name.clone();
        let rank = self.s.peers().filter(|(name, _)| *name < me.as_str() && *name != leader.name).count();
        let due = since + RESTART_TURN.times(u64::try_from(rank).unwrap_or(u64::MAX));
        if self.now < due {
            self.look_at_slots_at(due);
            return false;
        }
        let others_serve = self.s.peers().all(|(_, member)| member.head.state == "running");
        if !others_serve || self.s.job.is_some() {
            // Asked again when they have changed, which is a turn of its own.
            return false;
        }
        self.s.copies.restart_not_before = self.now + RESTART_AGAIN;
        self.begin_restart(None, &Restart::default()).is_ok()
    }

    fn may_restart_for_copies(&self) -> bool {
        self.now >= self.s.copies.restart_not_before && !self.s.dynamic.pause
    }

    /// Looks at the slots at this time, if not sooner.
    fn look_at_slots_at(&mut self, at: Time) {
        let at = self.s.timers.armed(Timer::Slots).map_or(at, |armed| armed.min(at));
        self.s.timers.arm(Timer::Slots, at);
    }
}

impl Proof {
    fn advance(&mut self, slot: &ReplicationSlot) {
        let lacks_no_row = matches!((self.reach, slot.catalog_xmin), (Some(reach), Some(own)) if !own.precedes(reach));
        let has_moved = matches!((self.begun, slot.restart), (Some(begun), Some(now)) if now > begun);
        self.good |= lacks_no_row && has_moved && !slot.lost;
    }
}
