//! Failsafe mode: etcd is gone, and the primary leads on for as long as so many members vouch for it that no other could have
//! been elected. It keeps the `failsafe` key, asks the members in it, moves the fence with their word, and takes its lock
//! back when etcd is there again. A candidate asks the same members for their support.
//!
//! **The word of members only ever lengthens a time of leading that began under the lock and has not lapsed for a moment.**

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use bots_core::{
    dcs::{Compare, Outcome, RequestId, Revision, Write},
    machine::{Deadline, Span, Time},
    membership::RETRY_AFTER,
};
use serde::Serialize;

use super::{
    event::{Action, Ask, AskId},
    phase::{Phase, Recovery},
    promise::{PROMISE, SUPPORT},
    roll::Roll,
    state::{State, Timer},
    turn::Turn,
};

/// A primary without etcd asks this often. Its last yes is then at most so old when a member is restarted, and what that leaves
/// of the time in which a promise can be used (4 s) outlasts the restart and the member's silence after it ([`SUPPORT`]).
const ASK_EVERY: Span = Span::from_millis(500);

/// A member gets at most this long to answer, so that one that is silent does not hold up the next question; on a healthy
/// network it needs a thousandth of it.
const ANSWER_DEADLINE_MAX: Span = ASK_EVERY;

/// A member that is absent from etcd for this long is taken off the roll: what it would say is missed no more. A bot that is
/// restarted, or a machine that reboots, comes back sooner.
const LEAVES_AFTER: Span = Span::from_secs(60);

/// A candidate uses the support that it has this much shorter than the members hold to it, for clocks that run apart.
const SUPPORT_MARGIN: Span = Span::from_millis(100);

/// A question to the members that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Round {
    id: AskId,
    sent: Time,
    /// Those that have not answered.
    waiting: BTreeSet<String>,
    /// Those that said yes, ourselves included.
    yes: BTreeSet<String>,
    /// Why others said no.
    no: BTreeMap<String, String>,
}

/// What members' word is good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Cover {
    /// No other can be elected before.
    until: Time,
    by: BTreeSet<String>,
}

/// A write of the `failsafe` key that etcd may or may not have carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Pending {
    /// The question under way; nothing while the last answer is lost.
    request: Option<RequestId>,
    retry_at: Time,
    /// What it would stand there; nothing for a deletion.
    roll: Option<Roll>,
}

/// What a primary and a candidate keep track of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Failsafe {
    asks: u64,
    /// What stands in the `failsafe` key, and since which revision: exact while we hold the lock, but for `pending`.
    roll: Option<Roll>,
    since: Revision,
    pending: Option<Pending>,
    /// Members of the roll that have no member key, and since when.
    absent: BTreeMap<String, Time>,
    /// The question of a primary.
    round: Option<Round>,
    last_asked: Option<Time>,
    /// The creation of the lock that we held last.
    generation: Revision,
    /// A lock that is lost is asked for again no sooner.
    retake_at: Time,
    cover: Option<Cover>,
    /// The question of a candidate, with the revision of the roll that it is asked by.
    support: Option<(Revision, Round)>,
}

impl State {
    /// The roll in etcd, as far as the view shows it, with its revision.
    fn shown_roll(&self) -> Option<(Roll, Revision)> {
        let kv = self.view.get(&self.settings.scope.failsafe())?;
        Some((Roll::from_json(&kv.value)?, kv.modified))
    }

    /// The condition that the roll is still the one that we see.
    pub(super) fn same_roll(&self) -> Compare {
        let key = self.settings.scope.failsafe();
        match self.view.get(&key) {
            Some(kv) => Compare::ModifiedAt(key, kv.modified),
            None => Compare::Absent(key),
        }
    }

    /// When a server that takes writes on the members' word must be stopped unless they give it again; nothing if it does not.
    pub(super) fn word_ends(&self) -> Option<Time> {
        self.failsafe.cover.as_ref().map(|cover| cover.until - PROMISE.divided_by(5))
    }

    /// Until when no other can be elected by the members' word.
    pub(super) fn promised_until(&self) -> Option<Time> {
        self.failsafe.cover.as_ref().map(|cover| cover.until)
    }

    /// Where the guard's fence belongs on the members' word.
    pub(super) fn guard_by_word(&self) -> Option<Time> {
        self.failsafe.cover.as_ref().map(|cover| cover.until - PROMISE.divided_by(10))
    }

    /// Whether enough members vouch for this primary at `now` for it to take writes without etcd.
    #[must_use]
    pub fn is_vouched_for(&self, now: Time) -> bool {
        self.word_ends().is_some_and(|ends| now < ends) && self.may_be_writable()
    }

    /// Whether it takes writes on the word of members alone: its lease has run out, or its lock is gone.
    #[must_use]
    pub fn leads_by_word(&self, now: Time) -> bool {
        self.is_vouched_for(now) && self.leadership.fence(now, &self.membership).is_none()
    }

    /// Who vouches for this primary.
    #[must_use]
    pub fn vouchers(&self) -> Vec<&str> {
        let me = self.settings.name.as_str();
        let by = self.failsafe.cover.iter().flat_map(|cover| &cover.by);
        by.map(String::as_str).filter(|name| *name != me).collect()
    }

    /// The phases in which a primary goes on as one. On its way down it is let fall.
    const fn leads_on(&self) -> bool {
        match &self.phase {
            Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { step: Recovery::Starting | Recovery::Adopting } => true,
            Phase::Restarting { primary, .. } => *primary,
            Phase::Recovering { step: Recovery::Reclaiming }
            | Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Cloning { .. }
            | Phase::Starting { .. }
            | Phase::Replica { .. }
            | Phase::Candidate(_)
            | Phase::Demoting { .. }
            | Phase::Rejoining { .. }
            | Phase::Stopping { .. } => false,
        }
    }

    /// How long members get to answer.
    fn answer_deadline(&self) -> Span {
        self.dynamic.ttl.divided_by(5).min(ANSWER_DEADLINE_MAX)
    }

    /// When a primary asks the members next; nothing if it does not.
    fn asks_at(&self) -> Option<Time> {
        if !self.dynamic.failsafe_mode || self.failsafe.roll.is_none() || !self.leads_on() || self.fence_set.is_none() {
            return None;
        }
        // Half of the lease is left: a renewal is late by a good part of it.
        let late = match self.membership.valid_until() {
            Some(until) if self.leadership.is_held() => until - self.membership.lease_ttl().divided_by(2),
            Some(_) | None => Time::ZERO,
        };
        let again = match (&self.failsafe.round, self.failsafe.last_asked) {
            // An answer or a failure comes for each within the deadline; this is for those that got lost.
            (Some(round), _) => round.sent + self.answer_deadline().times(2),
            (None, Some(last)) => last + ASK_EVERY,
            (None, None) => Time::ZERO,
        };
        Some(late.max(again))
    }

    /// When the lock is to be asked for again: a primary without etcd looks now and then whether it can.
    pub(super) fn asks_for_lock_at(&self) -> Option<Deadline> {
        let ask_again = self.leadership.deadline()?;
        Some(Deadline { at: ask_again.at.max(self.failsafe.retake_at), ..ask_again })
    }

    /// When failsafe mode wants a step.
    pub(super) fn failsafe_deadline(&self) -> Option<Deadline> {
        let ask = self.asks_at().map(|at| Deadline {
            at,
            reason: String::from("ask the members whether to lead on: the lease was not renewed"),
        });
        let freed = match (&self.phase, self.shown_roll()) {
            (Phase::Replica { .. }, Some(_)) if self.leader().is_none() => self.word.bound_until(),
            _any_other => None,
        };
        let freed =
            freed.map(|at| Deadline { at, reason: String::from("stand for leader: what was promised is over") });
        Deadline::earliest([ask, freed])
    }

    /// Why the members of the roll do not let this member stand yet.
    pub(super) fn bar_by_word(&self, now: Time) -> Option<String> {
        self.shown_roll()?;
        self.word.bar_to_candidates(now)
    }

    /// Whether a candidate may be promoted at `now`: it has the support that the roll asks for, or there is no roll.
    pub(super) fn is_supported(&self, now: Time) -> bool {
        let Some((roll, since)) = self.shown_roll() else { return true };
        self.failsafe.support.as_ref().is_some_and(|(asked_by, round)| {
            *asked_by == since && roll.lets_elect(&round.yes) && now < round.sent + SUPPORT - SUPPORT_MARGIN
        })
    }
}

impl Turn {
    /// An answer of a member, to a question of ours.
    pub(super) fn member_answered(&mut self, id: AskId, member: String, answer: Result<(), String>) {
        let candidates = self.s.failsafe.support.as_mut().map(|(_, round)| round);
        let round = candidates.into_iter().chain(self.s.failsafe.round.as_mut()).find(|round| round.id == id);
        let Some(round) = round else { return };
        if !round.waiting.remove(&member) {
            return;
        }
        match answer {
            Ok(()) => _ = round.yes.insert(member),
            Err(why) => _ = round.no.insert(member, why),
        }
        if self.s.failsafe.round.as_ref().is_some_and(|round| round.id == id) {
            self.take_cover();
            self.s.failsafe.round.take_if(|round| round.waiting.is_empty());
        }
    }

    /// Enough members vouch for us: the time of leading is lengthened, if it has not lapsed meanwhile.
    fn take_cover(&mut self) {
        let Some(round) = &self.s.failsafe.round else { return };
        let known = self.s.failsafe.roll.as_ref();
        let possible = self.s.failsafe.pending.as_ref().map(|pending| pending.roll.as_ref());
        // While nobody knows which of two rolls stands in etcd, both must let us.
        let lets = |roll: Option<&Roll>| roll.is_some_and(|roll| roll.lets_lead(&round.yes));
        if !lets(known) || !possible.is_none_or(lets) || !self.s.leads_on() {
            return;
        }
        let unbroken = self.s.fence_at().is_some_and(|fence| self.now < fence);
        let until = round.sent + PROMISE;
        if unbroken && self.s.failsafe.cover.as_ref().is_none_or(|cover| cover.until < until) {
            let by = round.yes.clone();
            self.s.failsafe.cover = Some(Cover { until, by });
            let me = self.s.settings.name.clone();
            self.s.word.promise(&me, until);
        }
    }

    /// Keeps the roll, asks the members when the lease is not renewed, takes a lost lock back.
    pub(super) fn mind_failsafe(&mut self) {
        self.see_roll();
        if !self.s.may_be_writable() {
            (self.s.failsafe.cover, self.s.failsafe.round) = (None, None);
        }
        self.s.failsafe.cover.take_if(|cover| cover.until <= self.now);
        if let Some(fence) = self.s.leadership.fence(self.now, &self.s.membership) {
            self.s.failsafe.generation = fence.created;
        }
        self.write_roll();
        self.ask_to_lead();
        self.retake_lock();
    }

    /// Takes over what the view shows of the roll, unless we know newer.
    fn see_roll(&mut self) {
        let shown = self.shown_since();
        if shown <= self.s.failsafe.since {
            return;
        }
        let kv = self.s.view.get(&self.s.settings.scope.failsafe());
        let roll = kv.and_then(|kv| Roll::from_json(&kv.value));
        let failsafe = &mut self.s.failsafe;
        if roll.is_some() || failsafe.roll.is_some() {
            (failsafe.roll, failsafe.since) = (roll, shown);
            // It is what shows, or it was refused, or it will be: it had the earlier roll for a condition.
            failsafe.pending = None;
        }
    }

    /// Since when what the view shows of the roll has stood there, at the latest.
    fn shown_since(&self) -> Revision {
        let scope = &self.s.settings.scope;
        self.s.view.get(&scope.failsafe()).map_or_else(|| self.s.view.revision(&scope.prefix()), |kv| kv.modified)
    }

    /// Under the lock, the roll is what the members are: who comes is added at once, who is gone for long is taken off.
    fn write_roll(&mut self) {
        let leads = matches!(self.s.phase, Phase::Primary(_));
        let Some(fence) = self.s.leadership.fence(self.now, &self.s.membership).filter(|_| leads) else { return };
        // What members said, they said by the present roll; and the guard may have its fence there.
        let lags = self.shown_since() < self.s.failsafe.since;
        if self.s.failsafe.cover.is_some() || !self.s.view.is_watched() || lags {
            return;
        }
        let wanted = match &self.s.failsafe.pending {
            Some(Pending { request: Some(_), .. }) => return,
            Some(pending) if self.now < pending.retry_at => return,
            // One that may have been carried out is made sure of before anything else is written.
            Some(pending) => pending.roll.clone(),
            None => self.wanted_roll(),
        };
        if wanted == self.s.failsafe.roll && self.s.failsafe.pending.is_none() {
            return;
        }
        let key = self.s.settings.scope.failsafe();
        let write =
            wanted.as_ref().map_or_else(|| Write::delete(key.clone()), |roll| Write::put(key.clone(), roll.to_json()));
        let mut compare = self.s.leadership.guard(fence).to_vec();
        compare.push(self.s.same_roll());
        let request = Some(self.transact(compare, vec![write]));
        self.s.failsafe.pending = Some(Pending { request, retry_at: self.now, roll: wanted });
    }

    fn wanted_roll(&mut self) -> Option<Roll> {
        if !self.s.dynamic.failsafe_mode {
            self.s.failsafe.absent.clear();
            return None;
        }
        let mut roll: BTreeMap<String, String> =
            self.s.peers().map(|(name, member)| (name.to_owned(), member.head.api_url)).collect();
        roll.insert(self.s.settings.name.clone(), self.s.settings.api_url.clone());
        let listed = self.s.failsafe.roll.clone().unwrap_or_default().0;
        self.s.failsafe.absent.retain(|name, _| listed.contains_key(name) && !roll.contains_key(name));
        for (name, api_url) in listed {
            let Entry::Vacant(absent) = roll.entry(name) else { continue };
            let since = *self.s.failsafe.absent.entry(absent.key().clone()).or_insert(self.now);
            if self.now < since + LEAVES_AFTER {
                absent.insert(api_url);
            }
        }
        Some(Roll(roll))
    }

    /// How a write of the roll ended.
    pub(super) fn roll_written(&mut self, id: RequestId, outcome: &Outcome) {
        let failsafe = &mut self.s.failsafe;
        let Some(pending) = failsafe.pending.as_mut().filter(|pending| pending.request == Some(id)) else { return };
        match outcome {
            Outcome::Done(revision) => {
                if *revision > failsafe.since {
                    (failsafe.roll, failsafe.since) = (pending.roll.clone(), *revision);
                }
                failsafe.pending = None;
            }
            // An earlier try of the same write may have been carried out: the watch will show it.
            Outcome::Refused { .. } | Outcome::Unknown(_) => {
                (pending.request, pending.retry_at) = (None, self.now + RETRY_AFTER);
            }
        }
    }

    /// Asks the members for their word, when it is time.
    fn ask_to_lead(&mut self) {
        if self.s.asks_at().is_none_or(|at| self.now < at) || self.s.fence_at().is_none_or(|fence| fence <= self.now) {
            return;
        }
        let Some(roll) = self.s.failsafe.roll.clone() else { return };
        let generation = self.s.failsafe.generation;
        let leader = self.s.settings.name.clone();
        let round = self.ask_members(&roll, Ask::Lead { leader, generation });
        self.s.failsafe.last_asked = Some(self.now);
        self.s.failsafe.round = Some(round);
        self.take_cover();
        self.s.failsafe.round.take_if(|round| round.waiting.is_empty());
    }

    /// Asks everybody on the roll but ourselves, at once.
    fn ask_members(&mut self, roll: &Roll, ask: Ask) -> Round {
        self.s.failsafe.asks += 1;
        let id = AskId(self.s.failsafe.asks);
        let me = self.s.settings.name.clone();
        let mut members = roll.0.clone();
        members.remove(&me);
        let waiting = members.keys().cloned().collect();
        let deadline = self.s.answer_deadline();
        self.out.push(Action::AskMembers { id, ask, members, deadline });
        Round { id, sent: self.now, waiting, yes: BTreeSet::from([me]), no: BTreeMap::new() }
    }

    /// etcd is back, and the lock went with the lease: it is taken again before anybody else can have it, for they have all
    /// promised not to.
    fn retake_lock(&mut self) {
        let due = self.s.leadership.deadline().is_none_or(|ask_again| ask_again.at <= self.now);
        let due = due
            && self.s.failsafe.retake_at <= self.now
            && self.s.membership.lease(self.now).is_some()
            && !self.s.membership.is_resting();
        let free = self.s.leadership.looks_free(&self.s.view) && self.s.view.is_watched();
        if !self.s.leads_on() || !self.s.is_vouched_for(self.now) || self.s.leadership.is_held() {
            return;
        }
        let waits = self.s.leadership.deadline().is_some_and(|ask_again| ask_again.at <= self.now);
        if self.s.failsafe.retake_at <= self.now && (due && free || waits) {
            self.s.failsafe.retake_at = self.now + super::election::LOOK_AGAIN;
            if due && free {
                self.ask_for_the_lock();
            }
        }
    }

    /// A candidate that goes by its peers' positions asks the roll for its support; without a roll, it needs none.
    pub(super) fn seek_support(&mut self) {
        let Some((roll, since)) = self.s.shown_roll() else { return self.ask_for_the_lock() };
        let me = self.s.settings.name.clone();
        self.s.word.support(&me, self.now + SUPPORT);
        let round = self.ask_members(&roll, Ask::Stand { candidate: me });
        self.s.failsafe.support = Some((since, round));
        if let Phase::Candidate(candidate) = &mut self.s.phase {
            candidate.seeking = true;
        }
        self.mind_support();
    }

    /// Goes on with the election once enough members support us, and gives it up for a while when too few do.
    pub(super) fn mind_support(&mut self) {
        let Some((_, round)) = &self.s.failsafe.support else { return };
        if self.s.is_supported(self.now) {
            self.seeks_no_more();
            if !self.s.leadership.is_held() {
                self.ask_for_the_lock();
            }
            return;
        }
        let lapsed = round.sent + SUPPORT <= self.now;
        if !round.waiting.is_empty() && !lapsed {
            return;
        }
        let refused: Vec<String> = round.no.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        self.s.failsafe.support = None;
        self.seeks_no_more();
        if let Phase::Candidate(candidate) = &mut self.s.phase {
            candidate.behind = Some(format!("too few members in the failsafe key support it ({})", refused.join("; ")));
        }
        if self.s.leadership.is_held() {
            return self.yield_after_stop(None);
        }
        self.s.timers.arm(Timer::Retry, self.now + super::election::LOOK_AGAIN);
    }

    const fn seeks_no_more(&mut self) {
        if let Phase::Candidate(candidate) = &mut self.s.phase {
            candidate.seeking = false;
        }
    }

    /// A candidate with the lock whose support has lapsed while etcd took its time.
    pub(super) fn renew_support(&mut self) {
        match &self.s.failsafe.support {
            Some((_, round)) if self.now < round.sent + SUPPORT && !round.waiting.is_empty() => {}
            Some((_, round)) if self.now < round.sent + SUPPORT - SUPPORT_MARGIN => self.mind_support(),
            Some(_) | None => self.seek_support(),
        }
    }
}
