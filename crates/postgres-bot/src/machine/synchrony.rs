//! The synchronous modes of a primary: which standbys its commits wait for, and the `sync` key that says who may lead because
//! of that. One change at a time, each safe with all that may be in force on the other side ([`super::quorum`]).
//!
//! Whoever does not lead has its server wait for nobody that there is: a server that is started or promoted acknowledges
//! nothing before its machine knows what goes with the key.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    dcs::{Compare, Outcome, RequestId, Revision, Write},
    machine::{Span, Time},
    membership::RETRY_AFTER,
    wire::{Lsn, SyncRecord, config::SyncMode, tags},
};
use serde::Serialize;

use super::{
    event::Action,
    phase::Phase,
    postgres::{Server, Standby},
    quorum::{Acks, Change, Known, Past, Voters, is_safe},
    state::{State, Timer},
    turn::{Happened, Turn},
};

/// A standby that breaks its stream off is waited for this long, if there is no other: one that turns to a new primary, or
/// is started anew, is back by then.
const PATIENCE: Span = Span::from_millis(1_000);

/// While commits wait for a standby that is not there, the server is asked this often whether one is: this is time in which nobody
/// can write, and lasts [`PATIENCE`] at most.
const HURRY: Span = Span::from_millis(25);

/// While a change waits for more to be known, the server is asked this often.
const LOOK_AGAIN: Span = Span::from_millis(100);

/// So many ways of acknowledging are remembered; older ones become one that nobody knows.
const PAST_MAX: usize = 16;

/// A running server takes its files in within milliseconds. One that goes by other names for so long was told so by somebody else.
const FOREIGN_AFTER: Span = Span::from_secs(2);

/// The `synchronous_standby_names` of a server that shall acknowledge nothing. No member can have this name: theirs begin with a letter
/// or a digit.
pub const BLOCKED: &str = "1 (\"__nobody__\")";

/// What a primary knows of its own synchronous replication. Its default acknowledges nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Synchrony {
    /// What Postgres is told.
    pub(super) acks: Acks,
    /// What it was told before.
    pub(super) past: Vec<Past>,
    /// The key that is being written, and the revision that it replaces.
    pub(super) asked: Option<(RequestId, Revision, Voters)>,
    /// Keys that were asked for with the answer lost, and the revision that each replaces.
    pub(super) lost: Vec<(Revision, Voters)>,
    /// The key that was written last, which the watch may not show yet.
    pub(super) written: Option<(Revision, Voters)>,
    /// The deletion of the key that is being asked for, or whose answer is lost, and the revision that it compares.
    pub(super) removal: Option<(Option<RequestId>, Revision)>,
    /// When the key was deleted last, which the watch may not show yet.
    pub(super) removed: Revision,
    /// No key is asked for before.
    pub(super) not_before: Time,
    /// Since when the server goes by names that it was not told.
    pub(super) foreign_since: Option<Time>,
    /// Since when standbys that are waited for have not been there.
    pub(super) missing: BTreeMap<String, Time>,
    /// What Postgres is told goes with the key: not so before a reign, or since one has ended.
    pub(super) taken_up: bool,
}

impl Synchrony {
    /// Commits were acknowledged before in a way that nobody knows.
    pub(super) fn after_the_unknown(acks: Acks) -> Self {
        Self { acks, past: vec![Past { acks: None, until: None }], taken_up: true, ..Self::default() }
    }

    /// The server does not take writes any more. What was asked of etcd may be carried out yet, under the same lock.
    pub(super) fn lay_down(&mut self) {
        let Self { asked, lost, written, removal, removed, not_before, .. } = std::mem::take(self);
        *self = Self { asked, lost, written, removal, removed, not_before, ..Self::default() };
    }

    /// Takes up a new reign, for which this key was written.
    pub(super) fn reign(voters: Voters, strict: bool, revision: Revision) -> Self {
        let acks = if strict && voters.members.is_empty() { Acks::default() } else { voters.acks() };
        Self { written: Some((revision, voters)), ..Self::after_the_unknown(acks) }
    }

    fn tell(&mut self, acks: Acks) {
        self.foreign_since = None;
        self.past.push(Past { acks: Some(std::mem::replace(&mut self.acks, acks)), until: None });
        if self.past.len() > PAST_MAX {
            let until = self.past.remove(0).until.and(self.past[0].until);
            self.past[0] = Past { acks: None, until };
        }
    }

    /// Told before, and perhaps still in force here and there: to tell it again would be mistaken for having been heard.
    fn may_linger(&self, acks: &Acks) -> bool {
        self.past.iter().any(|era| era.until.is_none() && era.acks.as_ref() == Some(acks))
    }
}

impl State {
    /// `synchronous_standby_names`, where the cluster's mode decides it. A primary goes by the last mode until the key of that is gone.
    pub(super) fn standby_names(&self) -> Option<String> {
        let mode = self.dynamic.synchronous_mode;
        let leaving = self.synchrony.taken_up && self.synchrony.acks != Acks::alone() && self.may_have_reigned();
        (mode != SyncMode::Off || leaving).then(|| text(&self.synchrony.acks, mode))
    }

    /// What is known of the standbys is of use yet: the server takes writes, did so a moment ago, or will in a moment.
    pub(super) const fn may_have_reigned(&self) -> bool {
        match &self.phase {
            Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { .. }
            | Phase::Demoting { .. }
            | Phase::Stopping { .. } => true,
            Phase::Restarting { primary, .. } => *primary,
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Cloning { .. }
            | Phase::Starting { .. }
            | Phase::Replica { .. }
            | Phase::Candidate(_)
            | Phase::Rejoining { .. } => false,
        }
    }

    /// The `sync` key, if it says who may lead.
    pub(super) fn sync_record(&self) -> Option<SyncRecord> {
        if self.dynamic.synchronous_mode == SyncMode::Off {
            return None;
        }
        self.view.json::<SyncRecord>(&self.settings.scope.sync()).filter(SyncRecord::binds)
    }

    /// The condition that the `sync` key is as the view shows it.
    pub(super) fn sync_unchanged(&self) -> Compare {
        let key = self.settings.scope.sync();
        match self.view.get(&key) {
            Some(kv) => Compare::ModifiedAt(key, kv.modified),
            None => Compare::Absent(key),
        }
    }

    /// The condition that the mode and the key are as the view shows them: what an election goes by. Without either there is none:
    /// who brings a key leads.
    pub(super) fn mode_unchanged(&self) -> Vec<Compare> {
        if self.dynamic.synchronous_mode == SyncMode::Off && self.view.get(&self.settings.scope.sync()).is_none() {
            return Vec::new();
        }
        let config = self.settings.scope.config();
        let config = match self.view.get(&config) {
            Some(kv) => Compare::ModifiedAt(config, kv.modified),
            None => Compare::Absent(config),
        };
        vec![self.sync_unchanged(), config]
    }

    /// Whether losing the leader loses nothing if `name` leads: the key names it.
    pub(super) fn is_voter(&self, name: &str) -> bool {
        self.sync_record()
            .is_some_and(|record| record.leader.as_deref() == Some(name) || record.voters().contains(name))
    }

    /// Whether a member may lead after the present leader, as far as acknowledged commits matter.
    #[must_use]
    pub fn loses_nothing_by(&self, name: &str) -> bool {
        self.sync_record().is_none() || self.is_voter(name)
    }

    /// What we have done to the key last is not in the view yet.
    fn key_is_about_to_show(&self) -> bool {
        let written = self.synchrony.written.as_ref().map_or(Revision(0), |(at, _)| *at);
        self.view.revision(&self.settings.scope.prefix()) < written.max(self.synchrony.removed)
    }

    /// The keys of ours that may be in force, the one that most likely is last. None if the key is not ours.
    fn own_keys(&self) -> Vec<Voters> {
        let kv = self.view.get(&self.settings.scope.sync());
        let shown = kv.map_or(Revision(0), |kv| kv.modified);
        let record: Option<SyncRecord> = self.view.json(&self.settings.scope.sync());
        let own = |record: &SyncRecord| record.binds() && record.leader.as_ref() == Some(&self.settings.name);
        let shown_key = record.filter(own).map(|record| Voters { members: record.voters(), quorum: record.quorum });
        let newest = match &self.synchrony.written {
            _hidden if !self.key_is_about_to_show() => shown_key,
            Some((at, key)) if *at > self.synchrony.removed => Some(key.clone()),
            Some(_) | None => None,
        };
        let Some(newest) = newest else { return Vec::new() };
        let lost = self.synchrony.lost.iter().filter(|(replaces, _)| *replaces >= shown).map(|(_, key)| key.clone());
        let asked = self.synchrony.asked.iter().map(|(_, _, key)| key.clone());
        lost.chain(asked).chain([newest]).collect()
    }

    /// Every key that may be in force goes with what Postgres is told.
    pub(super) fn check_synchrony(&self) -> Result<(), String> {
        let ruling = matches!(self.phase, Phase::Primary(_)) && self.dynamic.synchronous_mode != SyncMode::Off;
        let unsafe_key = self.own_keys().into_iter().find(|key| ruling && !is_safe(key, &self.synchrony.acks));
        unsafe_key.map_or(Ok(()), |key| Err(format!("{:?} is acknowledged beside {key:?}", self.synchrony.acks)))
    }
}

impl Turn {
    /// Keeps key and setting at what the standbys allow.
    pub(super) fn drive_synchrony(&mut self, happened: &Happened) {
        if *happened == Happened::Due(Timer::Sync) {
            self.out.push(Action::Observe);
        }
        if self.s.dynamic.synchronous_mode == SyncMode::Off {
            return self.leave_synchrony();
        }
        let Some(server) = self.s.server().filter(|server| !server.in_recovery).cloned() else { return };
        // The leader of a new cluster has taken nothing over: from here on, it goes by its own key like any other.
        self.s.synchrony.taken_up = true;
        self.note_in_force(&server);
        self.mind_foreign_names(&server);
        self.note_missing(&server);
        if self.s.synchrony.asked.is_some() || self.is_removing() {
            return;
        }
        let keys = self.s.own_keys();
        let Some(now) = keys.last() else { return self.write_sync_key(Voters::default()) };
        if self.s.synchrony.removal.is_some() {
            // A deletion whose answer is lost may come yet: it compares what is written over here.
            return self.write_sync_key(now.clone());
        }
        let (key, acks) = self.wanted(&server, now);
        let flushed: BTreeMap<String, Lsn> =
            server.standbys.iter().filter(|(_, s)| s.streams).map(|(name, s)| (name.clone(), s.flushed)).collect();
        let synchrony = &self.s.synchrony;
        let known = Known { keys: &keys, acks: &synchrony.acks, past: &synchrony.past, flushed: &flushed };
        match known.towards(&key, &acks) {
            Change::None => {}
            Change::Key(key) => self.write_sync_key(key),
            Change::Acks(acks) if !synchrony.may_linger(&acks) => {
                self.s.synchrony.tell(acks);
                self.sync_timer(self.now + LOOK_AGAIN);
            }
            // What is told comes into force within moments. How far standbys are, the eye tells by itself.
            Change::Acks(_) | Change::Wait if self.s.synchrony.past.iter().any(|era| era.until.is_none()) => {
                self.sync_timer(self.now + LOOK_AGAIN);
            }
            Change::Acks(_) | Change::Wait => {}
        }
    }

    /// Takes over what an earlier life of the bot has left in force, before its server goes on or is started again. The key says
    /// what is safe; how commits were acknowledged before, nobody knows. Not before the watch shows the lock under our lease:
    /// then it shows the last key that was written under the old one, too.
    pub(super) fn takes_over_synchrony(&mut self) -> bool {
        if self.s.synchrony.taken_up {
            return true;
        }
        let off = self.s.dynamic.synchronous_mode == SyncMode::Off;
        if off && self.s.own_keys().is_empty() {
            return true;
        }
        if !self.s.shows_our_lock() {
            return false;
        }
        let keys = self.s.own_keys();
        let strict = self.s.dynamic.synchronous_mode_strict;
        let acks = match (keys.last(), self.s.sync_record()) {
            (Some(key), _) if strict && key.members.is_empty() => Acks::default(),
            (Some(key), _) if keys.iter().all(|other| is_safe(other, &key.acks())) => key.acks(),
            // Which key is in force is not known: nothing is acknowledged before it is.
            (Some(_), _) => Acks::default(),
            // Another's key, or none at all, from which nobody could tell who may lead: nothing is acknowledged before there is one of ours.
            (None, _) if !off => Acks::default(),
            (None, _) => Acks::alone(),
        };
        self.s.synchrony.lay_down();
        let known = std::mem::take(&mut self.s.synchrony);
        let Synchrony { acks, past, taken_up, .. } = Synchrony::after_the_unknown(acks);
        self.s.synchrony = Synchrony { acks, past, taken_up, ..known };
        true
    }

    /// What is due and not told yet stays: put off by each turn, it would never be.
    fn sync_timer(&mut self, at: Time) {
        let earlier = self.s.timers.armed(Timer::Sync).is_some_and(|armed| armed <= at);
        if !earlier {
            self.s.timers.arm(Timer::Sync, at);
        }
    }

    /// Takes in how a write of the key went, whoever this member is by then.
    pub(super) fn take_sync_answer(&mut self, happened: &Happened) {
        let Happened::Answered { id, outcome } = happened else { return };
        self.take_removal(*id, outcome);
        let Some((_, replaces, key)) = self.s.synchrony.asked.take_if(|(asked, ..)| asked == id) else { return };
        match outcome {
            Outcome::Done(revision) => {
                // Whatever was lost on its way compares a revision that is gone.
                self.s.synchrony.lost.clear();
                self.s.synchrony.removal = None;
                self.s.synchrony.written = Some((*revision, key));
                return;
            }
            Outcome::Unknown(_) => self.s.synchrony.lost.push((replaces, key)),
            Outcome::Refused { .. } => {}
        }
        self.s.synchrony.not_before = self.now + RETRY_AFTER;
        self.sync_timer(self.now + RETRY_AFTER);
    }

    fn write_sync_key(&mut self, voters: Voters) {
        if self.now < self.s.synchrony.not_before {
            return self.sync_timer(self.s.synchrony.not_before);
        }
        let Some(fence) = self.s.leadership.fence(self.now, &self.s.membership) else { return };
        let replaces = self.s.view.get(&self.s.settings.scope.sync()).map_or(Revision(0), |kv| kv.modified);
        if self.s.key_is_about_to_show() {
            return;
        }
        let mut compare = self.s.leadership.guard(fence).to_vec();
        compare.push(self.s.sync_unchanged());
        let put = self.sync_put(&voters);
        let id = self.transact(compare, vec![put]);
        self.s.synchrony.asked = Some((id, replaces, voters));
    }

    /// The write of the key for a leader that is this member.
    pub(super) fn sync_put(&self, voters: &Voters) -> Write {
        let record = SyncRecord::new(&self.s.settings.name, &voters.members, voters.quorum);
        Write::put(self.s.settings.scope.sync(), serde_json::to_string(&record).unwrap_or_default())
    }

    /// Without a synchronous mode the key goes; only then commits wait for nobody. While the watch is late to show somebody that the
    /// mode has changed, the key says to him that he may lead, and it must be true.
    fn leave_synchrony(&mut self) {
        if self.s.synchrony.asked.is_some() || self.is_removing() || self.s.key_is_about_to_show() {
            return;
        }
        let key = self.s.settings.scope.sync();
        let Some(replaces) = self.s.view.get(&key).map(|kv| kv.modified) else { return self.wait_for_nobody() };
        if self.now < self.s.synchrony.not_before {
            return self.sync_timer(self.s.synchrony.not_before);
        }
        let Some(fence) = self.s.leadership.fence(self.now, &self.s.membership) else { return };
        let mut compare = self.s.leadership.guard(fence).to_vec();
        compare.push(self.s.sync_unchanged());
        let id = self.transact(compare, vec![Write::delete(key)]);
        self.s.synchrony.removal = Some((Some(id), replaces));
    }

    /// There is no key. How commits were acknowledged is remembered, for a mode that is switched on again.
    fn wait_for_nobody(&mut self) {
        if let Some(server) = self.s.server().filter(|server| !server.in_recovery).cloned() {
            self.note_in_force(&server);
        }
        let synchrony = &mut self.s.synchrony;
        synchrony.lost.clear();
        (synchrony.written, synchrony.removal) = (None, None);
        if !synchrony.taken_up {
            let Synchrony { not_before, removed, .. } = *synchrony;
            *synchrony = Synchrony { not_before, removed, ..Synchrony::after_the_unknown(Acks::alone()) };
        } else if synchrony.acks != Acks::alone() && !synchrony.may_linger(&Acks::alone()) {
            synchrony.tell(Acks::alone());
        } else if synchrony.acks != Acks::alone() {
            self.sync_timer(self.now + LOOK_AGAIN);
        }
    }

    /// The deletion of the key is under way.
    const fn is_removing(&self) -> bool {
        matches!(self.s.synchrony.removal, Some((Some(_), _)))
    }

    fn take_removal(&mut self, answered: RequestId, outcome: &Outcome) {
        let Some((Some(id), replaces)) = self.s.synchrony.removal else { return };
        if id != answered {
            return;
        }
        self.s.synchrony.removal = None;
        match outcome {
            Outcome::Done(revision) => return self.s.synchrony.removed = *revision,
            Outcome::Unknown(_) => self.s.synchrony.removal = Some((None, replaces)),
            Outcome::Refused { .. } => {}
        }
        self.s.synchrony.not_before = self.now + RETRY_AFTER;
        self.sync_timer(self.now + RETRY_AFTER);
    }

    /// Somebody has told the server to wait for others, or for nobody: it is told again, for the key goes with what it was told.
    fn mind_foreign_names(&mut self, server: &Server) {
        let told = text(&self.s.synchrony.acks, self.s.dynamic.synchronous_mode);
        let found = &server.waits_for.names;
        if *found == told {
            self.s.synchrony.foreign_since = None;
            return;
        }
        let since = *self.s.synchrony.foreign_since.get_or_insert(self.now);
        if self.now < since + FOREIGN_AFTER {
            return self.sync_timer(since + FOREIGN_AFTER);
        }
        self.s.trouble = Some(format!("synchronous_standby_names is `{found}` though `{told}` was written: set back"));
        self.s.synchrony.foreign_since = None;
        self.s.configured = None;
        self.tell_parameters();
    }

    /// What Postgres was told is in force everywhere: no later commit was acknowledged in an earlier way.
    fn note_in_force(&mut self, server: &Server) {
        let told = text(&self.s.synchrony.acks, self.s.dynamic.synchronous_mode);
        if !server.waits_for.in_force || server.waits_for.names != told {
            return;
        }
        let synchrony = &mut self.s.synchrony;
        for era in synchrony.past.iter_mut().filter(|era| era.until.is_none()) {
            era.until = Some(server.position);
        }
        let Some(until) = synchrony.past.last().and_then(|era| era.until) else { return };
        let acks = &synchrony.acks;
        let has_all = |name: &String| server.standbys.get(name).is_some_and(|s| s.streams && s.flushed >= until);
        if acks.needed > 0 && !acks.of.is_empty() && acks.of.iter().all(has_all) {
            // Whoever asks one of those has all that was acknowledged before.
            synchrony.past.clear();
        }
    }

    fn note_missing(&mut self, server: &Server) {
        let keys = self.s.own_keys();
        let counted: BTreeSet<String> =
            keys.into_iter().flat_map(|key| key.members).chain(self.s.synchrony.acks.of.iter().cloned()).collect();
        let there = |name: &String| server.standbys.get(name).is_some_and(|standby| standby.streams);
        let gone: BTreeSet<String> = counted.into_iter().filter(|name| !there(name)).collect();
        let now = self.now;
        self.s.synchrony.missing.retain(|name, _| gone.contains(name));
        for name in gone {
            self.s.synchrony.missing.entry(name).or_insert(now);
        }
        let patience_ends =
            self.s.synchrony.missing.values().map(|since| *since + PATIENCE).filter(|at| *at > now).min();
        if let Some(at) = patience_ends {
            let acks = &self.s.synchrony.acks;
            let stalled = acks.of.iter().filter(|name| there(name)).count() < acks.needed;
            self.sync_timer(if stalled { at.min(now + HURRY) } else { at });
        }
    }

    /// What the key and the setting shall be, as things are: safe together.
    fn wanted(&self, server: &Server, now: &Voters) -> (Voters, Acks) {
        let s = &self.s;
        let mut fit: Vec<(&String, &Standby)> =
            server.standbys.iter().filter(|(n, s)| self.is_fit(server, n, s)).collect();
        // A voter that must not lead is better than none.
        if fit.iter().any(|(name, _)| self.may_lead(name)) {
            fit.retain(|(name, _)| self.may_lead(name));
        }
        let patient = s
            .synchrony
            .missing
            .iter()
            .filter(|(name, since)| self.now.since(**since) < PATIENCE && self.sync_priority(name).is_some());
        let patient: Vec<String> = patient.map(|(name, _)| name.clone()).collect();
        let (members, count) = match s.dynamic.synchronous_mode {
            SyncMode::Quorum | SyncMode::Off => {
                let all: BTreeSet<String> = fit.iter().map(|(name, _)| (*name).clone()).chain(patient).collect();
                let needed = s.dynamic.synchronous_node_count.min(all.len());
                (all, needed)
            }
            SyncMode::On => {
                fit.sort_by_key(|(name, standby)| {
                    let chosen = s.synchrony.acks.of.contains(*name);
                    std::cmp::Reverse((self.sync_priority(name), chosen, standby.flushed))
                });
                let names = fit.into_iter().map(|(name, _)| name.clone()).chain(patient);
                let chosen: BTreeSet<String> = names.take(s.dynamic.synchronous_node_count).collect();
                let needed = chosen.len();
                (chosen, needed)
            }
        };
        if members.is_empty() && s.dynamic.synchronous_mode_strict {
            let acks = if s.synchrony.acks.needed == 0 { Acks::default() } else { s.synchrony.acks.clone() };
            return (now.clone(), acks);
        }
        let quorum = members.len() - count;
        (Voters { members: members.clone(), quorum }, Acks { needed: count, of: members })
    }

    fn is_fit(&self, server: &Server, name: &str, standby: &Standby) -> bool {
        let lag = server.position.0.saturating_sub(standby.flushed.0);
        let near = self.s.dynamic.maximum_lag_on_syncnode.is_none_or(|most| lag <= most);
        standby.streams && standby.flushed > Lsn(0) && near && self.sync_priority(name).is_some()
    }

    /// How much rather than others it is waited for; nothing if it is no member, or must not be waited for.
    fn sync_priority(&self, name: &str) -> Option<i64> {
        let (_, facts) = self.s.member(name).filter(|_| name != self.s.settings.name)?;
        tags::sync_priority(&facts.tags)
    }

    fn may_lead(&self, name: &str) -> bool {
        self.s.member(name).is_some_and(|(_, facts)| !tags::nofailover(&facts.tags))
    }
}

/// `synchronous_standby_names`. Names are quoted: they may have dots and dashes.
fn text(acks: &Acks, mode: SyncMode) -> String {
    if acks.needed == 0 {
        return String::new();
    }
    if acks.is_blocked() {
        return String::from(BLOCKED);
    }
    let names: Vec<String> = acks.of.iter().map(|name| format!("\"{name}\"")).collect();
    let how = if mode == SyncMode::On && acks.needed == acks.of.len() { "FIRST" } else { "ANY" };
    format!("{how} {} ({})", acks.needed, names.join(", "))
}
