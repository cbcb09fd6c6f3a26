//! Elections in the synchronous modes: only a member that is sure to hold every acknowledged commit may lead, and the key for
//! its reign is written before it can acknowledge anything.

use std::collections::BTreeMap;

use bots_core::wire::{SyncRecord, config::SyncMode};

use super::{event::PeerAnswer, quorum::Voters, turn::Turn};

impl Turn {
    /// Why the `sync` key does not let this member stand.
    pub(super) fn bar_by_sync(&self) -> Option<String> {
        let record = self.s.sync_record()?;
        if self.s.is_voter(&self.s.settings.name) {
            return None;
        }
        let others = record.sync_standby.map(|names| format!(" or one of {names}")).unwrap_or_default();
        let leader = record.leader.unwrap_or_default();
        Some(format!("it may lack what was acknowledged: only {leader}{others} may lead"))
    }

    /// Why those who were asked are not enough to be sure that nothing which was acknowledged is missing here.
    pub(super) fn lacks_votes(&self, answers: &BTreeMap<String, PeerAnswer>) -> Option<String> {
        let record = self.s.sync_record()?;
        // The key's leader has acknowledged everything itself.
        if self.takes_losses() || record.leader.as_ref() == Some(&self.s.settings.name) {
            return None;
        }
        let server = self.s.server()?;
        let ours = self.s.place(server.timeline, server.position);
        let voters = record.voters();
        let votes = answers.iter().filter(|(name, peer)| {
            let theirs = self.s.place(peer.timeline, peer.position);
            voters.contains(*name) && peer.sure && theirs.is_some() && theirs <= ours
        });
        let missing = record.quorum.saturating_sub(votes.count());
        let of = record.sync_standby.unwrap_or_default();
        (missing > 0).then(|| format!("{missing} more of {of} must say that they have nothing which it lacks"))
    }

    /// Whether a member that is ahead stands in the way: not one that may not lead.
    pub(super) fn counts_as_rival(&self, name: &str) -> bool {
        self.s.sync_record().is_none() || self.s.is_voter(name) && !self.takes_losses()
    }

    /// The key names this member alone besides a leader that is gone, and asks for no votes: it has all that was acknowledged, and no
    /// answer could put another before it.
    pub(super) fn is_sole_heir(&self) -> bool {
        let heir = |record: SyncRecord| record.quorum == 0 && self.s.is_voter(&self.s.settings.name);
        self.s.sync_record().is_some_and(heir) && !self.s.peers().any(|(name, _)| self.s.is_voter(name))
    }

    /// An operator has named this member, whatever it lacks: at once if the key does not name it, and else once the voters have
    /// had the time to tell whether it lacks anything.
    fn takes_losses(&self) -> bool {
        let waited = self.s.leaderless_since.is_some_and(|since| since + self.s.dynamic.ttl <= self.now);
        self.is_told_to_lead() && (waited || !self.s.is_voter(&self.s.settings.name))
    }

    /// The key for a reign of this member that begins now. Whoever may lead by it has what was acknowledged before: in its place
    /// among the voters stands the last leader, which has everything. Nothing without a synchronous mode.
    pub(super) fn key_for_reign(&self) -> Option<Voters> {
        if self.s.dynamic.synchronous_mode == SyncMode::Off {
            return None;
        }
        let me = &self.s.settings.name;
        let Some(record) = self.s.sync_record() else { return Some(Voters::default()) };
        let mut members = record.voters();
        if record.leader.as_ref() == Some(me) {
            return Some(Voters { members, quorum: record.quorum });
        }
        // Made to lead by an operator, it may lack what the voters have.
        if !members.remove(me) {
            return Some(Voters::default());
        }
        members.extend(record.leader);
        Some(Voters { members, quorum: record.quorum })
    }
}
