//! One owner for every timeline. Its number is taken in etcd, under the lock, before the promotion: data on one timeline
//! is then one history, and who is on a timeline that the leader's does not come from has left its path.

use bots_core::{
    dcs::{Compare, Outcome, Write},
    membership::RETRY_AFTER,
    wire::{HistoryLine, Lsn, Timeline, TimelineHistory, TimelineRecord},
};

use super::{
    phase::{Phase, Reservation},
    state::{State, Timer},
    synchrony::Synchrony,
    turn::{Happened, Turn},
};

/// Where a position stands beside the cluster's recorded history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// On the newest timeline, or on one whose promotion was not recorded.
    Newest,
    /// On an ancestor, which the cluster has left there.
    Left(Lsn),
    /// On an ancestor, which the cluster has left nobody knows where.
    LeftSomewhere,
    /// On a timeline that the cluster's newest does not come from.
    Astray,
}

impl State {
    /// The recorded timelines: what the newest one comes from.
    pub(super) fn history(&self) -> TimelineHistory {
        self.view.json(&self.settings.scope.history()).unwrap_or_default()
    }

    /// Which numbers are taken. Where nobody has recorded it, another tool led, or nobody was ever promoted.
    pub(super) fn timelines(&self) -> TimelineRecord {
        let mut record: TimelineRecord = self.view.json(&self.settings.scope.timelines()).unwrap_or_default();
        // Another tool may have led since, or always: it records the ends of timelines alone.
        let ended = self.history().0.iter().map(|line| line.0.0).max().unwrap_or(0);
        record.current = record.current.max(Timeline(ended + 1));
        record.reserved = record.reserved.max(record.current);
        record
    }

    /// A promotion of ours was begun, and nobody knows how far it came: data without `standby.signal` is then not proof of a
    /// primary on a timeline of its own, and must not be made writable in place.
    pub(super) fn is_half_promoted(&self) -> bool {
        let record = self.timelines();
        record.reserved > record.current && record.by == self.settings.name
    }

    /// How far data goes along the cluster's history; nothing if it does not lie on it. What was written past the point
    /// where the cluster left a timeline does not count, where that point is known.
    pub(super) fn place(&self, timeline: Timeline, position: Lsn) -> Option<(Timeline, Lsn)> {
        match self.standing(timeline) {
            Standing::Newest | Standing::LeftSomewhere => Some((timeline, position)),
            Standing::Left(at) => Some((timeline, position.min(at))),
            Standing::Astray => None,
        }
    }

    /// Where data on `timeline` stands.
    pub(super) fn standing(&self, timeline: Timeline) -> Standing {
        if timeline >= self.timelines().current {
            return Standing::Newest;
        }
        match self.history().0.iter().find(|line| line.0 == timeline) {
            None => Standing::Astray,
            Some(line) if line.1 == Lsn(0) => Standing::LeftSomewhere,
            Some(line) => Standing::Left(line.1),
        }
    }

    /// A number that nobody has, and nobody had.
    fn free_timeline(&self, own: Timeline) -> Timeline {
        let record = self.timelines();
        let of_peers =
            self.peers().filter_map(|(_, member)| member.facts::<bots_core::wire::PostgresFacts>()?.timeline);
        let highest = of_peers.chain([own, record.current, record.reserved]).max();
        Timeline(highest.unwrap_or_default().0 + 1)
    }
}

impl Turn {
    /// The reservation that was just answered, if etcd has made it; the question is closed either way.
    pub(super) fn take_reservation(&mut self, happened: &Happened) -> Option<Reservation> {
        let Happened::Answered { id, outcome } = happened else { return None };
        let Phase::Candidate(candidate) = &mut self.s.phase else { return None };
        let asked = candidate.reservation.take_if(|asked| asked.request == *id)?;
        if let Outcome::Done(revision) = outcome {
            if asked.forgets_key {
                self.s.synchrony.removed = *revision;
            }
            if let Some(voters) = &asked.voters {
                let strict = self.s.dynamic.synchronous_mode_strict;
                self.s.synchrony = Synchrony::reign(voters.clone(), strict, *revision);
            }
            return Some(asked);
        }
        self.s.timers.arm(Timer::Rewrite, self.now + RETRY_AFTER);
        None
    }

    /// Holding the lock: takes a number for the timeline to be, and then leaves recovery.
    pub(super) fn reserve_and_promote(&mut self, reserved: Option<Reservation>) {
        let Some(fence) = self.s.leadership.fence(self.now, &self.s.membership) else { return };
        // One that was made under an earlier lock may have been overtaken since.
        if let Some(made) = reserved.filter(|made| made.fence == fence) {
            return self.promote(made.timeline);
        }
        let Phase::Candidate(candidate) = &self.s.phase else { return };
        if candidate.reservation.is_some() || self.s.timers.armed(Timer::Rewrite).is_some() {
            return;
        }
        let Some(parent) = self.s.server().map(|server| server.timeline) else { return };
        let timeline = self.s.free_timeline(parent);
        let key = self.s.settings.scope.timelines();
        let mut compare = self.s.leadership.guard(fence).to_vec();
        compare.push(match self.s.view.get(&key) {
            Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
            None => Compare::Absent(key.clone()),
        });
        let by = self.s.settings.name.clone();
        let record = TimelineRecord { current: self.s.timelines().current, reserved: timeline, parent, by };
        let mut puts = vec![Write::put(key, serde_json::to_string(&record).unwrap_or_default())];
        let voters = self.key_for_reign();
        if let Some(voters) = &voters {
            // With the number: whoever dies from here on leaves a key by which the right ones may lead.
            puts.push(self.sync_put(voters));
        }
        let forgets_key = voters.is_none() && self.s.view.get(&self.s.settings.scope.sync()).is_some();
        if forgets_key {
            // Its voters know nothing of this reign, and the mode may be switched on again at any moment.
            puts.push(Write::delete(self.s.settings.scope.sync()));
        }
        compare.extend(self.s.mode_unchanged());
        let request = self.transact(compare, puts);
        if let Phase::Candidate(candidate) = &mut self.s.phase {
            candidate.reservation = Some(Reservation { request, fence, timeline, voters, forgets_key });
        }
    }

    /// Whether our WAL has left the leader's path: following is not possible. Known once the leader's promotion is recorded.
    pub(super) fn diverged_from(&self, leader: &str) -> bool {
        let facts = self.s.member(leader).map(|(_, facts)| facts);
        let Some(leaders) = facts.and_then(|facts| facts.timeline) else { return false };
        let Some(server) = self.s.server() else { return false };
        if server.timeline == Timeline(0) || leaders <= server.timeline || leaders != self.s.timelines().current {
            return false;
        }
        match self.s.standing(server.timeline) {
            Standing::Newest | Standing::LeftSomewhere => false,
            Standing::Left(at) => server.position > at,
            Standing::Astray => true,
        }
    }

    /// A promotion that nobody has recorded: another tool's, or by hand. Where it was is not known: zero.
    pub(super) fn unrecorded_promotion(&self, ours: Timeline) -> Vec<HistoryLine> {
        if ours <= self.s.timelines().current || !self.s.view.is_watched() {
            return Vec::new();
        }
        vec![self.history_line(Timeline(ours.0.saturating_sub(1)), Lsn(0))]
    }
}
