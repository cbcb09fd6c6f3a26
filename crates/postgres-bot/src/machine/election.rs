//! The leader is gone: who is the most advanced, and may it lead? Ask all peers at once, then let one transaction decide.

use std::collections::BTreeMap;

use bots_core::{
    dcs::Compare,
    machine::{Span, Time},
    wire::{FailoverRequest, Lsn, Member, PostgresFacts, PostgresStatus, Timeline, tags},
};

use super::{
    event::{Action, Job, JobResult, PeerAnswer, ProbeId},
    phase::{DemoteStep, DemoteWhy, Phase, Primary},
    state::Timer,
    turn::{Happened, Turn},
};

/// A candidate that is behind, or that lost, looks again after this time: the one ahead should have taken the lock.
pub(super) const LOOK_AGAIN: Span = Span::from_millis(250);

/// A promotion gets at least this long, however impatient the cluster is with crashed primaries: all that was received is to be
/// replayed first.
const PROMOTION_PATIENCE_MIN: Span = Span::from_secs(60);

/// Peers get at most this long to answer; on a healthy network they need a thousandth of it.
const PROBE_DEADLINE_MAX: Span = Span::from_millis(1_000);

impl Turn {
    /// Why this member does not stand for leader at the moment; nothing if it may.
    pub(super) fn bar_to_standing(&self) -> Option<String> {
        let s = &self.s;
        if s.settings.tags.nofailover() {
            return Some(String::from("its tag nofailover is set"));
        }
        if !s.view.is_complete() || !s.view.is_watched() {
            return Some(String::from("etcd cannot be watched: the leader may live"));
        }
        if let Some(leader) = s.leader().filter(|leader| *leader != s.settings.name) {
            return Some(format!("{leader} holds the leader lock"));
        }
        if s.membership.lease(self.now).is_none() || !s.membership.is_registered() {
            return Some(String::from("it has no lease from etcd"));
        }
        let Some(server) = s.server() else { return Some(String::from("its server does not answer")) };
        if let Some(why) = s.disk_trouble() {
            return Some(why);
        }
        if let Some(why) = s.bar_by_watchdog(self.now) {
            return Some(why);
        }
        if let Some(why) = s.bar_by_word(self.now) {
            return Some(why);
        }
        if let Some(named) = self.named_first() {
            return Some(format!("a switchover names {named}, which goes first"));
        }
        if s.dynamic.pause && !s.pause.led_last && !self.is_named() {
            return Some(String::from("the cluster is paused, and no operator has named it"));
        }
        if s.is_foreign() {
            return Some(String::from("its data belongs to another cluster"));
        }
        if self.is_told_to_lead() {
            return None;
        }
        if let Some(bar) = self.bar_by_sync() {
            return Some(bar);
        }
        let Some(position) = self.position_in_history() else {
            let (own, newest) = (server.timeline, s.timelines().current);
            return Some(format!(
                "it is on timeline {own}, and the cluster's timeline {newest} does not go on from there"
            ));
        };
        if s.sync_record().is_some() {
            // The votes tell whether anything is missing that anybody was told of.
            return None;
        }
        let newest = s.timelines().current;
        if s.dynamic.check_timeline && server.timeline < newest {
            let own = server.timeline;
            return Some(format!("it is on timeline {own} and the cluster on {newest}; check_timeline is set"));
        }
        let status: PostgresStatus = s.view.json(&s.settings.scope.status()).unwrap_or_default();
        let lag = status.optime.0.saturating_sub(position.0);
        if let Some((old, _)) = self.handed_over_first() {
            return Some(format!("it lacks {lag} bytes that {old} has shut down with: {old} goes first"));
        }
        if lag > s.dynamic.maximum_lag_on_failover {
            return Some(format!(
                "it lacks {lag} bytes of the last leader's log; maximum_lag_on_failover is {}",
                s.dynamic.maximum_lag_on_failover
            ));
        }
        None
    }

    pub(super) fn may_stand(&self) -> bool {
        self.bar_to_standing().is_none()
    }

    /// An operator named this member, and no leader: a failover by hand, which takes the losses.
    pub(super) fn is_told_to_lead(&self) -> bool {
        let request: Option<FailoverRequest> = self.s.view.json(&self.s.settings.scope.failover());
        request.is_some_and(|r| r.leader.is_none() && r.member.as_ref() == Some(&self.s.settings.name))
    }

    /// An operator's request that is due names this member.
    fn is_named(&self) -> bool {
        let request: Option<FailoverRequest> = self.s.view.json(&self.s.settings.scope.failover());
        request.is_some_and(|r| r.member.as_ref() == Some(&self.s.settings.name) && self.has_come(&r))
    }

    /// Whether a request is not for later.
    fn has_come(&self, request: &FailoverRequest) -> bool {
        let at = request.scheduled_at.as_deref().and_then(bots_core::wire::unix_ms_from_rfc3339);
        at.is_none_or(|at| at <= self.s.settings.epoch_unix_ms + self.now.as_millis())
    }

    /// How far our data goes along the cluster's history; nothing if it does not lie on it.
    fn position_in_history(&self) -> Option<Lsn> {
        let server = self.s.server()?;
        self.s.place(server.timeline, server.position).map(|(_, position)| position)
    }

    /// The member that a switchover names, while it has the first go.
    fn named_first(&self) -> Option<String> {
        self.named_first_until()?;
        self.s.view.json::<FailoverRequest>(&self.s.settings.scope.failover())?.member
    }

    /// Until when another member, named by a switchover, has the first go; nothing if none has.
    fn named_first_until(&self) -> Option<Time> {
        let request: FailoverRequest = self.s.view.json(&self.s.settings.scope.failover())?;
        let named = request
            .member
            .clone()
            .filter(|_| self.has_come(&request))
            .filter(|member| *member != self.s.settings.name)?;
        let until = self.s.leaderless_since? + self.s.dynamic.ttl;
        (self.now < until && self.s.member(&named).is_some()).then_some(until)
    }

    /// The last leader, while it has the first go because it handed over in good order what this member lacks, and until
    /// when: a planned end loses nothing as long as the old leader can come back. Nothing if nobody has.
    fn handed_over_first(&self) -> Option<(String, Time)> {
        if self.s.sync_record().is_some() {
            return None;
        }
        let status: PostgresStatus = self.s.view.json(&self.s.settings.scope.status())?;
        let old = status.handed_over_by.filter(|old| *old != self.s.settings.name)?;
        let behind = self.position_in_history()? < status.optime;
        let lives = self.s.member(&old).is_some();
        let patience = if lives { self.s.dynamic.primary_start_timeout } else { Span::ZERO };
        let until = self.s.leaderless_since? + patience.max(self.s.dynamic.ttl);
        (behind && self.now < until).then_some((old, until))
    }

    /// Until when somebody else has the first go; nothing if nobody has.
    pub(super) fn others_first_until(&self) -> Option<Time> {
        let handed_over = self.handed_over_first().map(|(_, until)| until);
        self.named_first_until().into_iter().chain(handed_over).min()
    }

    /// Asks everybody, ourselves included: positions are final only once the leader is gone. Who has just not answered is not
    /// waited for once more.
    pub(super) fn open_candidacy(&mut self) {
        let mode = self.s.dynamic.synchronous_mode;
        let Phase::Candidate(candidate) = &mut self.s.phase else { return };
        self.s.probes += 1;
        let id = ProbeId(self.s.probes);
        candidate.probe = Some(id);
        candidate.answers = None;
        candidate.observed = false;
        candidate.mode = mode;
        self.s.silent.take_if(|(_, until)| *until <= self.now);
        let silent = self.s.silent.as_ref().map(|(name, _)| name.as_str());
        let asked = self.s.peers().filter(|(name, _)| Some(*name) != silent);
        let peers: BTreeMap<String, String> =
            asked.map(|(name, member)| (name.to_owned(), member.head.api_url)).collect();
        let deadline = self.s.dynamic.ttl.divided_by(5).min(PROBE_DEADLINE_MAX);
        self.out.push(Action::Observe);
        self.out.push(Action::ProbePeers { id, peers, deadline });
    }

    /// Standing for leader.
    pub(super) fn drive_candidate(&mut self, happened: &Happened) {
        if self.server_gone(happened) {
            return self.become_phase(Phase::Starting { attempts: 0 });
        }
        if self.stop_unlocked_writer() {
            return;
        }
        self.take_positions(happened);
        let reserved = self.take_reservation(happened);
        if self.s.may_use_lock(self.now) {
            if self.ails_for_too_long().is_some() {
                // The lock goes to who can use it.
                return self.become_phase(Phase::Replica { following: None });
            }
            if self.s.asked_in != self.s.dynamic.synchronous_mode {
                // The lock was not won by the rules that hold now.
                return self.yield_after_stop(None);
            }
            if !self.s.is_supported(self.now) {
                return self.renew_support();
            }
            return self.reserve_and_promote(reserved);
        }
        if self.s.leadership.is_held() {
            // Won late: the next renewal makes it good, or the lease runs out.
            return;
        }
        if !self.may_stand() {
            return self.become_phase(Phase::Replica { following: None });
        }
        if self.s.leadership.deadline().is_some_and(|ask_again| ask_again.at <= self.now) {
            return self.ask_for_the_lock();
        }
        let mode = self.s.dynamic.synchronous_mode;
        let Phase::Candidate(candidate) = &mut self.s.phase else { return };
        if candidate.mode != mode && !self.s.leadership.is_busy() {
            candidate.seeking = false;
            return self.open_candidacy();
        }
        if candidate.seeking {
            return self.mind_support();
        }
        if *happened == Happened::Due(Timer::Retry) {
            return self.open_candidacy();
        }
        if !candidate.observed || self.s.timers.armed(Timer::Retry).is_some() || self.s.leadership.is_busy() {
            return;
        }
        if self.s.membership.is_resting() {
            // The lock shall hang on a lease of its length, which was asked for along with the peers.
            return;
        }
        if candidate.probe.is_some() && (self.holds_all() || self.is_sole_heir()) {
            return self.seek_support();
        }
        let Phase::Candidate(candidate) = &mut self.s.phase else { return };
        let Some(answers) = candidate.answers.take() else {
            // Asked for the lock and refused: look again, unless the winner shows first.
            if candidate.probe.is_none() {
                self.s.timers.arm(Timer::Retry, self.now + LOOK_AGAIN);
            }
            return;
        };
        let behind = self.stands_behind(&answers).or_else(|| self.lacks_votes(&answers));
        let stands = behind.is_none();
        if let Phase::Candidate(candidate) = &mut self.s.phase {
            candidate.behind = behind;
        }
        if stands {
            self.seek_support();
        } else {
            self.s.timers.arm(Timer::Retry, self.now + LOOK_AGAIN);
        }
    }

    /// Takes in what a candidate waits for, also while it holds a lock that it will have to give back.
    fn take_positions(&mut self, happened: &Happened) {
        let Phase::Candidate(candidate) = &mut self.s.phase else { return };
        match happened {
            Happened::Observed => candidate.observed = true,
            Happened::Probed { id, answers } if candidate.probe == Some(*id) => {
                candidate.probe = None;
                candidate.answers = Some(answers.clone());
            }
            Happened::Probed { .. }
            | Happened::Nothing
            | Happened::JobEnded { .. }
            | Happened::Exited { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
    }

    /// The last leader has shut its server down and handed over, nobody has begun a promotion since, and we hold all that it
    /// had: nobody can be ahead, whatever the peers might say. The lock is asked for on the condition that this is so still.
    fn holds_all(&self) -> bool {
        let status: PostgresStatus = self.s.view.json(&self.s.settings.scope.status()).unwrap_or_default();
        let record = self.s.timelines();
        let own_priority = self.s.settings.tags.failover_priority();
        let preferred = |(name, member): (&str, Member)| {
            let facts = member.facts::<PostgresFacts>().filter(|_| status.handed_over_by.as_deref() != Some(name));
            facts.is_some_and(|facts| tags::failover_priority(&facts.tags) > own_priority)
        };
        status.handed_over_by.is_some()
            && record.reserved == record.current
            && self.s.server().is_some_and(|server| server.timeline == record.current)
            && self.position_in_history() >= Some(status.optime)
            && !self.s.peers().any(preferred)
    }

    /// The peer that must lead rather than we.
    fn stands_behind(&self, answers: &BTreeMap<String, PeerAnswer>) -> Option<String> {
        let server = self.s.server()?;
        let ours = self.s.place(server.timeline, server.position);
        let priority = self.s.settings.tags.failover_priority();
        // A preference, not a condition: who cannot take the lock in time has had the chance. And no chance to come back
        // at once for the leader that has just given it away.
        let until = self.s.leaderless_since.map(|since| since + self.s.dynamic.ttl);
        let in_time = until.is_some_and(|until| self.now < until);
        let status: PostgresStatus = self.s.view.json(&self.s.settings.scope.status()).unwrap_or_default();
        let preferred = |name: &String| in_time && status.handed_over_by.as_ref() != Some(name);
        answers.iter().find_map(|(name, peer)| {
            if peer.is_primary {
                return Some(format!("{name} still accepts writes"));
            }
            // Data that does not lie on the cluster's history is ahead of nothing, however far it goes.
            let theirs = self.s.place(peer.timeline, peer.position);
            if peer.may_lead && theirs > ours && self.counts_as_rival(name) {
                return Some(format!("{name} is ahead: {} on timeline {}", peer.position, peer.timeline));
            }
            let goes_first = peer.may_lead
                && self.counts_as_rival(name)
                && theirs == ours
                && peer.priority > priority
                && preferred(name);
            goes_first.then(|| format!("{name} holds the same and has the failover_priority {}", peer.priority))
        })
    }

    pub(super) fn ask_for_the_lock(&mut self) {
        // That an earlier lock was given back, or was of no use, holds nothing up under this one.
        self.s.timers.disarm(Timer::Rewrite);
        let mut out = Vec::new();
        let mut extra = Vec::new();
        let initialize = self.s.settings.scope.initialize();
        match (self.s.view.get(&initialize), self.s.own_system_id()) {
            (Some(_), Some(own)) if self.s.cluster_system_id().is_some() => {
                extra.push(Compare::ValueIs(initialize, own.to_owned()));
            }
            (Some(kv), _) => extra.push(Compare::ModifiedAt(initialize, kv.modified)),
            // By the time that this is carried out, another cluster may stand.
            (None, _) => extra.push(Compare::Absent(initialize)),
        }
        // Whoever has led since we looked has changed one of these, and may have written what we lack.
        for key in [self.s.settings.scope.status(), self.s.settings.scope.timelines()] {
            extra.push(match self.s.view.get(&key) {
                Some(kv) => Compare::ModifiedAt(key, kv.modified),
                None => Compare::Absent(key),
            });
        }
        // Another mode or another key asks for more, or for less.
        extra.extend(self.s.mode_unchanged());
        self.s.asked_in = self.s.dynamic.synchronous_mode;
        // The members that vouch for a primary, or support us, are counted by this roll.
        extra.push(self.s.same_roll());
        self.s.leadership.acquire(self.now, &mut self.s.membership, &self.s.view, extra, &mut out);
        self.push_dcs(out);
    }

    /// The lock is ours, and enough of the lease is left to act on.
    pub(super) fn promote(&mut self, timeline: Timeline) {
        let from = self.s.server().map_or(Lsn(0), |server| server.position);
        self.s.unrecorded = Vec::new();
        let replayed = self.s.server().map_or(Lsn(0), |server| server.replayed);
        self.become_phase(Phase::Promoting { from, timeline, replayed });
        self.s.timers.arm(Timer::Patience, self.now + self.promotion_patience());
        let heeds = self.s.standby_names().is_some();
        let without_slots = self.s.condemn_copies();
        self.run(Job::Promote { timeline, heeds, without_slots });
    }

    /// Making the server writable.
    pub(super) fn drive_promoting(&mut self, happened: &Happened) {
        let Phase::Promoting { timeline, .. } = self.s.phase else { return };
        match happened {
            Happened::JobEnded { job: Job::Promote { .. }, result: Ok(JobResult::Promoted { server, ancestry }) } => {
                if server.timeline != timeline {
                    let why = format!("it is on timeline {} now; {timeline} is the one it may have", server.timeline);
                    return self.unfit(&why);
                }
                self.s.unrecorded = ancestry.iter().map(|(ended, at)| self.history_line(*ended, *at)).collect();
                self.become_phase(Phase::Primary(Primary { checkpoint_due: true, ..Primary::default() }));
                self.run(Job::Checkpoint);
            }
            Happened::JobEnded { job: Job::Promote { .. }, result } => {
                let why = result.as_ref().err().map_or("", |error| &error.why);
                self.unfit(&format!("the promotion failed: {why}"));
            }
            Happened::Exited { how } => self.unfit(&format!("Postgres exited while it was promoted: {how}")),
            Happened::Due(Timer::Patience) => self.promotion_takes_long(),
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => _ = self.gives_up_hung(),
        }
    }

    /// A server that has much to replay first, and gets on with it, would have no less to replay the next time.
    fn promotion_takes_long(&mut self) {
        let now = self.s.server().map_or(Lsn(0), |server| server.replayed);
        match &mut self.s.phase {
            Phase::Promoting { replayed, .. } if now > *replayed => {
                *replayed = now;
                self.s.timers.arm(Timer::Patience, self.now + self.promotion_patience());
            }
            _stands_still => {
                self.unfit("the promotion has not ended within primary_start_timeout, and replays nothing")
            }
        }
    }

    fn promotion_patience(&self) -> Span {
        self.s.dynamic.primary_start_timeout.max(PROMOTION_PATIENCE_MIN)
    }

    /// This member cannot be made to run as primary: stop whatever is left of it, and let another lead.
    pub(super) fn unfit(&mut self, why: &str) {
        self.s.trouble = Some(why.to_owned());
        self.become_phase(Phase::Demoting {
            why: DemoteWhy::Unfit(why.to_owned()),
            step: DemoteStep::Stopping,
            shutdown_checkpoint: None,
        });
        let mode = self.stop_at_once();
        self.run(Job::Stop { mode });
    }
}
