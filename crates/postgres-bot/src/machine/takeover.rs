//! Takeover without waiting for the lease, in quorum mode: voters who see the leader gone stop to receive from it, and promise so
//! in etcd. Once so many have that no commit of that leader can be acknowledged any more, its lock is taken away, and an
//! election follows as ever. A leader that lives on is told by the missing lock, and can have acknowledged nothing since.

use bots_core::{
    dcs::{Compare, KeyValue, Outcome, RequestId, Revision, Write},
    machine::{Span, Time},
    membership::RETRY_AFTER,
    wire::{SyncRecord, config::SyncMode},
};
use serde::{Deserialize, Serialize};

use super::{
    event::{Action, Job, ProbeId},
    phase::Phase,
    state::{State, Timer},
    turn::{Happened, Turn},
};

/// A leader that is silent, and not only gone, gets so long to answer: a fraction of the lease, as for a candidate's peers.
const SILENCE_MAX: Span = Span::from_millis(1_000);

/// A leader that did not answer is not waited for again so soon: not in the election that follows.
const SILENCE_COUNTS: Span = Span::from_millis(1_000);

/// A leader that answers though nothing is received from it, or one that is gone while too few see that, is asked again after this.
const ASK_AGAIN: Span = Span::from_millis(500);

/// One term of one leader: its lock, as it was when the promise was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Term {
    /// The revision that created the lock.
    created: Revision,
    /// The revision that changed it last: bound to another lease, it is another term.
    modified: Revision,
}

impl Term {
    const fn of(lock: &KeyValue) -> Self {
        Self { created: lock.created, modified: lock.modified }
    }
}

/// How far this member is on its way to a promise, or back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Promise {
    pub(super) term: Term,
    pub(super) step: Step,
}

/// See [`Promise`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Step {
    /// Asking the leader whether it is there. Nothing is promised.
    Asking(ProbeId),
    /// Ending the stream for good. Nothing is promised.
    Detaching,
    /// The promise is being written, or may have been.
    Promising(Option<RequestId>),
    /// The promise stands. The leader's lock is being taken away, or it is asked again whether it is there.
    Standing(Standing),
    /// The promise is being taken back.
    Withdrawing(Option<RequestId>),
}

/// A promise that stands: the leader's lock is being taken away, or it is asked again whether it is there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Standing {
    /// Since this revision.
    since: Revision,
    deposing: Option<RequestId>,
    /// The lock is not asked for before.
    not_before: Time,
    asking: Option<ProbeId>,
}

impl State {
    /// The present term, as far as we know.
    fn term(&self) -> Option<Term> {
        self.view.get(&self.settings.scope.leader()).map(Term::of)
    }

    /// What a member has promised, and the revision of its promise.
    fn promised(&self, name: &str) -> Option<(Term, Revision)> {
        let kv = self.view.get(&self.settings.scope.promise(name))?;
        Some((serde_json::from_str(&kv.value).ok()?, kv.modified))
    }

    /// This member has promised, or may have, not to receive from the present leader in its present term.
    pub(super) fn is_bound(&self) -> bool {
        let Some(term) = self.term() else { return false };
        let asking = |promise: &Promise| matches!(promise.step, Step::Asking(_));
        let meant = self.promise.as_ref().is_some_and(|promise| promise.term == term && !asking(promise));
        meant || self.promised(&self.settings.name).is_some_and(|(promised, _)| promised == term)
    }

    /// What the view shows was taken back, and the watch is yet to say so.
    fn has_withdrawn(&self) -> bool {
        self.promised(&self.settings.name).is_some_and(|(_, since)| since < self.withdrawn)
    }

    /// The view shows this life's own member key, and so whatever an earlier one has promised: nothing that is written under its lease can
    /// come later.
    pub(super) fn sees_itself(&self, now: Time) -> bool {
        let lease = self.membership.lease(now);
        let own = self.view.get(&self.settings.scope.member(&self.settings.name));
        lease.is_some() && own.is_some_and(|own| own.lease == lease)
    }

    /// What stood in etcd is gone, with the lease that it hung on: nobody can count it any more.
    fn is_promise_lost(&self, term: Term, since: Revision) -> bool {
        let promised = self.promised(&self.settings.name).is_some_and(|(of, _)| of == term);
        !promised && self.view.is_watched() && self.view.revision(&self.settings.scope.prefix()) >= since
    }

    /// Answers that come in another role are not heard: what was asked in this one is asked anew in the next.
    pub(super) fn forget_takeover_questions(&mut self) {
        let Some(promise) = &mut self.promise else { return };
        match &mut promise.step {
            Step::Asking(_) | Step::Detaching => self.promise = None,
            Step::Promising(request) | Step::Withdrawing(request) => *request = None,
            Step::Standing(standing) => *standing = Standing { since: standing.since, ..Standing::default() },
        }
    }

    /// The key of the leader's own term, if this member is a voter by it.
    fn key_to_take_over_by(&self) -> Option<SyncRecord> {
        let on = self.dynamic.takeover && self.dynamic.synchronous_mode == SyncMode::Quorum && !self.dynamic.pause;
        let record = self.sync_record().filter(|_| on && self.view.is_watched())?;
        let own = record.leader.as_deref() == self.leader() && self.leader() != Some(self.settings.name.as_str());
        (own && record.voters().contains(&self.settings.name)).then_some(record)
    }
}

impl Turn {
    /// A voter that does not receive anything looks whether the leader is gone. Says whether it must not follow it.
    pub(super) fn mind_takeover(&mut self, happened: &Happened) -> bool {
        let term = self.s.term();
        if self.s.promise.as_ref().is_some_and(|promise| Some(promise.term) != term) {
            // What was promised for a term that is over binds nobody, and what was lost on its way compares its lock.
            self.s.promise = None;
        }
        let Some(term) = term else { return false };
        let Some(Promise { step, .. }) = self.s.promise.clone() else {
            if self.s.is_bound() {
                if self.s.has_withdrawn() {
                    return true;
                }
                // By an earlier life of this bot.
                if matches!(self.s.phase, Phase::Replica { following: Some(_) }) {
                    if self.s.job.is_none() && self.s.timers.armed(Timer::Retry).is_none() {
                        self.end_stream(term);
                    }
                    return true;
                }
                return self.stand_by_promise(term, happened, Standing::default());
            }
            return self.look_for_leader(term);
        };
        match step {
            Step::Asking(id) => self.leader_was_asked(term, id, happened),
            Step::Detaching => self.detach(term, happened),
            Step::Promising(request) => self.promise(term, happened, request),
            Step::Standing(standing) => self.stand_by_promise(term, happened, standing),
            Step::Withdrawing(request) => self.withdraw(term, happened, request),
        }
    }

    fn promise_step(&mut self, term: Term, step: Step) {
        self.s.promise = Some(Promise { term, step });
    }

    /// Whether what was asked of etcd may be asked again.
    fn takeover_rests(&self) -> bool {
        self.s.timers.armed(Timer::Takeover).is_some_and(|at| at > self.now)
    }

    fn takeover_again(&mut self, after: Span) {
        self.s.timers.arm(Timer::Takeover, self.now + after);
    }

    /// Nothing is received: is the leader there?
    fn look_for_leader(&mut self, term: Term) -> bool {
        let receives = self.s.server().is_none_or(|server| server.streaming);
        if receives || self.s.job.is_some() || self.takeover_rests() || self.s.key_to_take_over_by().is_none() {
            return false;
        }
        if let Some(id) = self.ask_leader() {
            self.promise_step(term, Step::Asking(id));
        }
        false
    }

    fn ask_leader(&mut self) -> Option<ProbeId> {
        let leader = self.s.leader()?.to_owned();
        let (member, _) = self.s.member(&leader)?;
        self.s.probes += 1;
        let id = ProbeId(self.s.probes);
        let deadline = self.s.dynamic.ttl.divided_by(5).min(SILENCE_MAX);
        self.out.push(Action::ProbePeers { id, peers: [(leader, member.head.api_url)].into(), deadline });
        Some(id)
    }

    /// To a candidate it is all the same whether an answer is late or was not asked for.
    fn note_silence(&mut self, silent: bool) {
        let until = self.now + SILENCE_COUNTS;
        self.s.silent = self.s.leader().filter(|_| silent).map(|leader| (leader.to_owned(), until));
    }

    fn leader_was_asked(&mut self, term: Term, id: ProbeId, happened: &Happened) -> bool {
        let Happened::Probed { id: answered, answers } = happened else { return false };
        if *answered != id {
            return false;
        }
        self.s.promise = None;
        self.note_silence(answers.is_empty());
        let receives = self.s.server().is_none_or(|server| server.streaming);
        if !answers.is_empty() || receives || self.s.job.is_some() || self.s.key_to_take_over_by().is_none() {
            self.takeover_again(ASK_AGAIN);
            return false;
        }
        self.end_stream(term);
        true
    }

    fn end_stream(&mut self, term: Term) {
        self.promise_step(term, Step::Detaching);
        // However the job ends: whom it follows is to be said anew.
        if let Phase::Replica { following } = &mut self.s.phase {
            *following = None;
        }
        self.run(Job::Follow { upstream: None });
    }

    fn detach(&mut self, term: Term, happened: &Happened) -> bool {
        match happened {
            Happened::JobEnded { job: Job::Follow { upstream: None }, result: Ok(_) } => {
                self.ask_to_promise(term);
                true
            }
            _other if self.s.job.as_ref().is_some_and(|running| running.job == Job::Follow { upstream: None }) => true,
            _other => {
                self.s.promise = None;
                self.takeover_again(ASK_AGAIN);
                false
            }
        }
    }

    fn ask_to_promise(&mut self, term: Term) {
        let text = serde_json::to_string(&term).unwrap_or_default();
        let leader = self.s.settings.scope.leader();
        let same_term = [Compare::CreatedAt(leader.clone(), term.created), Compare::ModifiedAt(leader, term.modified)];
        let request = self.write_promise(&text, same_term.to_vec());
        self.promise_step(term, Step::Promising(request));
    }

    /// Writes this member's promise, in this life of its bot and no other.
    fn write_promise(&mut self, text: &str, mut compare: Vec<Compare>) -> Option<RequestId> {
        let (scope, me) = (self.s.settings.scope.clone(), self.s.settings.name.clone());
        let Some(lease) = self.s.membership.lease(self.now) else {
            self.takeover_again(RETRY_AFTER);
            return None;
        };
        let key = scope.promise(&me);
        compare.push(Compare::LeaseIs(scope.member(&me), lease));
        compare.push(match self.s.view.get(&key) {
            Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
            None => Compare::Absent(key.clone()),
        });
        Some(self.transact(compare, vec![Write::put_leased(key, text, lease)]))
    }

    fn promise(&mut self, term: Term, happened: &Happened, request: Option<RequestId>) -> bool {
        match (request, happened) {
            (Some(asked), Happened::Answered { id, outcome }) if asked == *id => match outcome {
                Outcome::Done(since) => {
                    self.promise_step(term, Step::Standing(Standing { since: *since, ..Standing::default() }));
                    self.takeover_again(ASK_AGAIN);
                }
                Outcome::Refused { .. } | Outcome::Unknown(_) => {
                    self.promise_step(term, Step::Promising(None));
                    self.takeover_again(RETRY_AFTER);
                }
            },
            (None, _) if !self.takeover_rests() => self.ask_to_promise(term),
            (_, _) => {}
        }
        true
    }

    /// Enough have promised: the lock goes. Too few, and the leader answers again: the promise goes.
    fn stand_by_promise(&mut self, term: Term, happened: &Happened, mut standing: Standing) -> bool {
        match happened {
            Happened::Answered { id, outcome } if standing.deposing == Some(*id) => {
                standing.deposing = None;
                if !matches!(outcome, Outcome::Done(_)) {
                    standing.not_before = self.now + RETRY_AFTER;
                }
            }
            Happened::Probed { id, answers } if standing.asking == Some(*id) => {
                standing.asking = None;
                self.note_silence(answers.is_empty());
                if !answers.is_empty() && standing.deposing.is_none() {
                    return self.ask_to_withdraw(term);
                }
                self.takeover_again(ASK_AGAIN);
            }
            Happened::Due(Timer::Takeover) if standing.asking.is_none() => standing.asking = self.ask_leader(),
            Happened::Nothing
            | Happened::JobEnded { .. }
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
        if standing.deposing.is_none() && self.s.key_to_take_over_by().is_none() {
            return self.ask_to_withdraw(term);
        }
        if self.s.is_promise_lost(term, standing.since) {
            self.ask_to_promise(term);
            return true;
        }
        if standing.deposing.is_none() && standing.not_before <= self.now {
            standing.deposing = self.depose(term);
        }
        if standing.asking.is_none() && self.s.timers.armed(Timer::Takeover).is_none() {
            self.takeover_again(ASK_AGAIN);
        }
        self.promise_step(term, Step::Standing(standing));
        true
    }

    /// Takes the lock away from a leader that can have nothing acknowledged any more: any `quorum + 1` voters have among them one
    /// of those that each of its commits waits for.
    fn depose(&mut self, term: Term) -> Option<RequestId> {
        let record = self.s.key_to_take_over_by()?;
        let scope = self.s.settings.scope.clone();
        let promised = record.voters().into_iter().filter_map(|name| {
            let (of, revision) = self.s.promised(&name)?;
            (of == term).then(|| Compare::ModifiedAt(scope.promise(&name), revision))
        });
        let promised: Vec<Compare> = promised.take(record.quorum + 1).collect();
        if promised.len() <= record.quorum {
            return None;
        }
        let lease = self.s.view.get(&scope.leader())?.lease?;
        let mut compare = vec![
            Compare::CreatedAt(scope.leader(), term.created),
            Compare::ModifiedAt(scope.leader(), term.modified),
            Compare::LeaseIs(scope.leader(), lease),
            self.s.sync_unchanged(),
        ];
        compare.extend(promised);
        Some(self.transact(compare, vec![Write::delete(scope.leader())]))
    }

    fn ask_to_withdraw(&mut self, term: Term) -> bool {
        let request = self.write_promise("{}", Vec::new());
        self.promise_step(term, Step::Withdrawing(request));
        true
    }

    /// Only what is taken back for sure does not bind any more.
    fn withdraw(&mut self, term: Term, happened: &Happened, request: Option<RequestId>) -> bool {
        match (request, happened) {
            (Some(asked), Happened::Answered { id, outcome }) if asked == *id => match outcome {
                Outcome::Done(withdrawn) => {
                    (self.s.promise, self.s.withdrawn) = (None, *withdrawn);
                    self.takeover_again(ASK_AGAIN);
                    // The watch may still show the promise.
                    return self.s.is_bound();
                }
                Outcome::Refused { .. } | Outcome::Unknown(_) => {
                    self.promise_step(term, Step::Withdrawing(None));
                    self.takeover_again(RETRY_AFTER);
                }
            },
            (None, _) if !self.takeover_rests() => return self.ask_to_withdraw(term),
            (_, _) => {}
        }
        true
    }
}
