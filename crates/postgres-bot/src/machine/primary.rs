//! Holding the lock with a writable server: keep the keys of the cluster true, restart a crashed server in place, hear
//! the operator. Every write to etcd here carries the lock's revision (S3).

use bots_core::{
    dcs::{Compare, DcsAction, Outcome, RequestId, Revision, Transaction, Write},
    machine::{Span, Time},
    membership::RETRY_AFTER,
    wire::{FailoverRequest, HistoryLine, Lsn, Timeline, TimelineRecord, rfc3339_from_unix_ms, tags},
};

use super::{
    event::{Job, JobResult},
    phase::{DemoteStep, DemoteWhy, Phase, Primary, Recovery, Suspect, Writing},
    postgres::{DataDir, Postgres},
    state::Timer,
    turn::{Happened, STOP_PATIENCE, Turn},
};

/// The `status` key is written at most this often: it bounds what `maximum_lag_on_failover` cannot see.
const SHARE_STATUS_EVERY: Span = Span::from_secs(2);

/// A server that crashes more often than this within [`CRASH_WINDOW`] is not restarted in place once more: no
/// sorcerer's apprentice.
const CRASHES_MAX: usize = 5;
/// See [`CRASHES_MAX`].
const CRASH_WINDOW: Span = Span::from_secs(600);

/// A switchover for which no replica is ready yet waits this long for one: after a failover, connecting to the new leader
/// and telling of it takes a second or two.
const SWITCHOVER_PATIENCE: Span = Span::from_secs(5);

/// Why a switchover is not possible.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Bar {
    /// It may be in a moment.
    NotYet(String),
    /// Waiting does not help.
    No(String),
}

impl Turn {
    /// Serving writes.
    pub(super) fn drive_primary(&mut self, happened: &Happened) {
        let ended = match happened {
            Happened::Exited { how } => Some(how.as_str()),
            _other => (self.s.postgres == Postgres::Down).then_some("the server is down"),
        };
        if let Some(how) = ended {
            if self.rests_in_pause(how) {
                return;
            }
            return self.crashed(how);
        }
        let Phase::Primary(primary) = &mut self.s.phase else { return };
        match happened {
            Happened::JobEnded { job: Job::Checkpoint, result } => match result {
                Ok(_) => primary.checkpoint_due = false,
                Err(_) => self.s.timers.arm(Timer::Retry, self.now + Self::backoff(0)),
            },
            Happened::Answered { id, outcome } => {
                if let Some((_, writing)) = primary.writing.take_if(|(request, _)| request == id) {
                    if writing == Writing::History && matches!(outcome, Outcome::Done(_)) {
                        self.s.unrecorded.clear();
                    }
                    // Until the watch shows the key, it still looks as if nobody had written it.
                    let unseen = writing == Writing::Initialize;
                    primary.written(writing, outcome);
                    if unseen || !matches!(outcome, Outcome::Done(_)) {
                        self.s.timers.arm(Timer::Rewrite, self.now + RETRY_AFTER);
                    }
                }
            }
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Due(_) => {}
        }
        let checkpoint_due = primary.checkpoint_due;
        if self.s.server().is_some_and(|server| server.in_recovery) && self.s.job.is_none() {
            return self.unfit("the server is in recovery though it was started as a primary");
        }
        if self.lacks_watchdog() || self.gives_up_hung() || self.heed_operator() || self.renews_guard() {
            return;
        }
        if checkpoint_due && self.s.job.is_none() && self.s.timers.armed(Timer::Retry).is_none() {
            self.run(Job::Checkpoint);
        }
        self.drive_synchrony(happened);
        self.write_keys();
    }

    /// The server died under us: back in place if that can succeed in time, for a failover could lose writes.
    pub(super) fn crashed(&mut self, how: &str) {
        self.s.trouble = Some(format!("Postgres crashed: {how}"));
        self.s.crashes.retain(|at| self.now.since(*at) < CRASH_WINDOW);
        self.s.crashes.push(self.now);
        if let Some(running) = self.s.job.take() {
            self.out.push(super::event::Action::Cancel { id: running.id });
        }
        if self.s.dynamic.primary_start_timeout == Span::ZERO {
            return self.unfit("Postgres crashed and primary_start_timeout is 0");
        }
        if self.s.crashes.len() > CRASHES_MAX {
            return self.unfit("Postgres crashes again and again: letting another member lead");
        }
        self.become_phase(Phase::Recovering { step: Recovery::Starting });
        self.s.timers.arm(Timer::Patience, self.now + self.s.dynamic.primary_start_timeout);
        self.run(Job::StartPrimary);
    }

    /// Bringing a crashed primary back, or one whose bot was restarted.
    pub(super) fn drive_recovering(&mut self, happened: &Happened) {
        let Phase::Recovering { step } = self.s.phase else { return };
        match step {
            Recovery::Reclaiming => self.reclaim(),
            Recovery::Starting | Recovery::Adopting => match happened {
                Happened::JobEnded { job: Job::StartPrimary, result: Ok(JobResult::Started(_)) } => {
                    self.become_phase(Phase::Primary(Primary {
                        checkpoint_due: true,
                        restarted: true,
                        ..Primary::default()
                    }));
                }
                Happened::JobEnded { job: Job::StartPrimary, result: Err(error) }
                    if step == Recovery::Adopting && !self.s.postgres.is_alive() =>
                {
                    let how = error.why.clone();
                    self.crashed(&how);
                }
                Happened::JobEnded { job: Job::StartPrimary, result } => {
                    let why = result.as_ref().err().map_or("", |error| &error.why);
                    self.unfit(&format!("Postgres could not be restarted in place: {why}"));
                }
                Happened::Due(Timer::Patience) => {
                    self.unfit("Postgres did not come back within primary_start_timeout");
                }
                Happened::JobEnded { .. }
                | Happened::Nothing
                | Happened::Exited { .. }
                | Happened::Observed
                | Happened::Probed { .. }
                | Happened::Answered { .. }
                | Happened::Due(_) => {}
            },
        }
    }

    /// The lock bears our name: bind it to the lease that we have now, then start in place.
    fn reclaim(&mut self) {
        // Killed for its fence, it is started again, if the lock is ours still.
        let dying = self.s.is_stopping_at_once();
        if !dying && self.s.may_use_lock(self.now) && self.takes_over_synchrony() {
            let step = if self.s.postgres.is_alive() { Recovery::Adopting } else { Recovery::Starting };
            self.s.phase = Phase::Recovering { step };
            self.s.timers.arm(Timer::Patience, self.now + self.s.dynamic.primary_start_timeout.max(Span::from_secs(1)));
            return self.run(Job::StartPrimary);
        }
        if self.s.kept_until().is_some_and(|until| until <= self.now) {
            return self.kill_kept();
        }
        let ours = self.s.leader() == Some(self.s.settings.name.as_str());
        let watched = self.s.view.is_watched();
        if !ours && self.s.leadership.is_uncertain() {
            // The lock that the question was about is gone: so is the question.
            self.s.leadership.abandon();
        }
        let gone = watched && !ours && !self.s.leadership.is_busy() && !self.s.leadership.is_held();
        let cut_off = !watched && self.s.membership.lease(self.now).is_none();
        if dying && (gone || cut_off) {
            return;
        }
        if (gone || cut_off) && self.s.postgres.is_alive() {
            let why = if gone { "the leader lock is gone or another's" } else { "etcd is out of reach" };
            self.s.trouble = Some(format!("Postgres was stopped: {why}"));
            return self.fence_now(why.to_owned());
        }
        if gone || cut_off {
            return self.become_phase(Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 });
        }
        if ours {
            let mut out = Vec::new();
            let same_roll = self.s.same_roll();
            let (membership, view) = (&mut self.s.membership, &self.s.view);
            self.s.leadership.acquire(self.now, membership, view, vec![same_roll], &mut out);
            self.push_dcs(out);
        }
    }

    /// Acts on the `failover` key; says whether the role has changed.
    fn heed_operator(&mut self) -> bool {
        // Without the lock there is nothing to hand over.
        if self.s.leadership.fence(self.now, &self.s.membership).is_none() {
            return false;
        }
        let scope = self.s.settings.scope.clone();
        let Some(asked_at) = self.s.view.get(&scope.failover()).map(|kv| kv.modified) else { return false };
        let Some(request) = self.s.view.json::<FailoverRequest>(&scope.failover()) else { return false };
        let answered = matches!(&self.s.phase, Phase::Primary(primary) if primary.answered == Some(asked_at));
        if request.is_empty() || answered {
            return false;
        }
        let me = self.s.settings.name.clone();
        let done = request.member.as_ref() == Some(&me) || request.leader.as_ref().is_some_and(|leader| *leader != me);
        if !done && !self.is_due(&request) {
            return false;
        }
        let refusal = if done { None } else { self.bar_to_switchover(&request, asked_at) };
        if let Some(Bar::NotYet(_)) = &refusal
            && self.waits_for_replica(asked_at)
        {
            return false;
        }
        if done || refusal.is_some() {
            if let Some(why) = refusal {
                let (Bar::NotYet(why) | Bar::No(why)) = why;
                self.s.trouble = Some(format!("switchover refused: {why}"));
            }
            self.clear_request(asked_at);
            return false;
        }
        self.s.tried = Some(asked_at);
        self.become_phase(Phase::Demoting {
            why: DemoteWhy::Switchover { to: request.member },
            step: DemoteStep::Checkpointing,
            shutdown_checkpoint: None,
        });
        self.s.timers.arm(Timer::Patience, self.now + STOP_PATIENCE);
        self.run(Job::Checkpoint);
        true
    }

    /// Whether the request is young enough to wait for a replica that is not ready yet.
    fn waits_for_replica(&mut self, asked_at: Revision) -> bool {
        let Phase::Primary(primary) = &mut self.s.phase else { return false };
        if primary.unready.is_none_or(|(request, _)| request != asked_at) {
            primary.unready = Some((asked_at, self.now + SWITCHOVER_PATIENCE));
        }
        let Some((_, until)) = primary.unready.filter(|(_, until)| self.now < *until) else { return false };
        self.s.timers.arm(Timer::Scheduled, until);
        true
    }

    /// Wipes the request away, unless the operator has asked for something else meanwhile. The history goes first: who
    /// rewinds goes by it.
    fn clear_request(&mut self, asked_at: Revision) {
        let Phase::Primary(Primary { writing: None, .. }) = self.s.phase else { return };
        if self.s.timers.armed(Timer::Rewrite).is_some() || !self.s.unrecorded.is_empty() {
            return;
        }
        let failover = self.s.settings.scope.failover();
        let unchanged = Compare::ModifiedAt(failover.clone(), asked_at);
        self.write_under_lock(Writing::Failover(asked_at), vec![unchanged], vec![Write::put(failover, "{}")]);
    }

    fn is_due(&mut self, request: &FailoverRequest) -> bool {
        let Some(at) = request.scheduled_at.as_deref().and_then(bots_core::wire::unix_ms_from_rfc3339) else {
            return true;
        };
        let at = Time::from_millis(at.saturating_sub(self.s.settings.epoch_unix_ms));
        if self.now < at {
            self.s.timers.arm(Timer::Scheduled, at);
            return false;
        }
        true
    }

    /// Why a switchover is not possible now.
    fn bar_to_switchover(&self, request: &FailoverRequest, asked_at: Revision) -> Option<Bar> {
        let fence = self.s.leadership.fence(self.now, &self.s.membership);
        if self.s.tried == Some(asked_at) || fence.is_some_and(|fence| asked_at < fence.created) {
            return Some(Bar::No(String::from("it was tried, and this member leads again")));
        }
        if self.s.dynamic.pause && request.scheduled_at.is_some() {
            return Some(Bar::No(String::from("the cluster is paused")));
        }
        if self.s.dynamic.pause && request.member.is_none() {
            return Some(Bar::No(String::from("in a pause, a member must be named")));
        }
        let ours = self.s.server()?.timeline;
        let fit = |name: &str| -> Option<Bar> {
            let Some((member, facts)) = self.s.member(name) else {
                return Some(Bar::No(format!("{name} is not a member")));
            };
            let nofailover = tags::nofailover(&facts.tags);
            let streaming = facts.replication_state.as_deref() == Some("streaming");
            if nofailover {
                Some(Bar::No(format!("{name} has the tag nofailover")))
            } else if self.s.sync_record().is_some() && !self.s.is_voter(name) {
                Some(Bar::NotYet(format!("{name} is not a synchronous standby")))
            } else if member.head.state != "running" {
                Some(Bar::NotYet(format!("{name} is {}, not running", member.head.state)))
            } else if !streaming || facts.timeline.is_some_and(|t| t != ours) {
                Some(Bar::NotYet(format!("{name} is not streaming from us")))
            } else {
                None
            }
        };
        if let Some(text) = &request.scheduled_at
            && bots_core::wire::unix_ms_from_rfc3339(text).is_none()
        {
            return Some(Bar::No(format!("scheduled_at `{text}` is not a time such as 2026-07-24T12:00:00+00:00")));
        }
        match &request.member {
            Some(name) => fit(name),
            None => {
                let bars: Vec<Option<Bar>> = self.s.peers().map(|(name, _)| fit(name)).collect();
                let why = String::from("no member is streaming from us and may lead");
                if bars.iter().any(Option::is_none) {
                    None
                } else if bars.iter().flatten().any(|bar| matches!(bar, Bar::NotYet(_))) {
                    Some(Bar::NotYet(why))
                } else {
                    Some(Bar::No(why))
                }
            }
        }
    }

    /// Brings the cluster's keys up to date, one write at a time.
    fn write_keys(&mut self) {
        let Phase::Primary(primary) = &self.s.phase else { return };
        if primary.writing.is_some() || self.s.timers.armed(Timer::Rewrite).is_some() {
            return;
        }
        let scope = self.s.settings.scope.clone();
        let shared = primary.shared.clone();
        let Some((timeline, position)) = self.s.server().map(|server| (server.timeline, server.position)) else {
            return;
        };
        if primary.restarted && self.s.unrecorded.is_empty() {
            self.s.unrecorded = self.unrecorded_promotion(timeline);
        }
        if let Some(DataDir::Present { system_id, .. }) = &self.s.data
            && self.s.view.value(&scope.initialize()).is_none_or(str::is_empty)
        {
            let put = Write::put(scope.initialize(), system_id.clone());
            return self.write_under_lock(Writing::Initialize, Vec::new(), vec![put]);
        }
        let mut puts = self.record_of_promotion(timeline);
        if !puts.is_empty() {
            let unchanged = match self.s.view.get(&scope.history()) {
                Some(kv) => Compare::ModifiedAt(kv.key.clone(), kv.modified),
                None => Compare::Absent(scope.history()),
            };
            // With the promotion, what an earlier leader has handed over is history too: nobody waits for it to come back.
            puts.push(Write::put(scope.status(), self.s.status_text(position)));
            return self.write_under_lock(Writing::History, vec![unchanged], puts);
        }
        if self.s.timers.armed(Timer::ShareStatus).is_some() {
            return;
        }
        let status = self.s.status_text(position);
        if shared.as_ref() != Some(&status) {
            self.s.timers.arm(Timer::ShareStatus, self.now + SHARE_STATUS_EVERY);
            // One that is carried out late must not put an older position back.
            let unchanged = match self.s.view.get(&scope.status()) {
                Some(kv) => Compare::ModifiedAt(kv.key.clone(), kv.modified),
                None => Compare::Absent(scope.status()),
            };
            let put = Write::put(scope.status(), status.clone());
            self.write_under_lock(Writing::Status(status), vec![unchanged], vec![put]);
        }
    }

    /// The writes that record the promotion to `timeline`, if it is not recorded yet.
    pub(super) fn record_of_promotion(&self, timeline: Timeline) -> Vec<Write> {
        let scope = &self.s.settings.scope;
        let (Some(first), Some(last)) = (self.s.unrecorded.first(), self.s.unrecorded.last()) else {
            return Vec::new();
        };
        let mut history = self.s.history();
        if first.1 == Lsn(0) {
            // Without the file that tells all, what was recorded before is kept.
            history.0.retain(|known| known.0 < first.0);
            history.0.push(first.clone());
        } else {
            // A line that is known already has its own time and name.
            let known = |line: &HistoryLine| history.0.iter().find(|old| (old.0, old.1) == (line.0, line.1)).cloned();
            history.0 = self.s.unrecorded.iter().map(|line| known(line).unwrap_or_else(|| line.clone())).collect();
        }
        let surplus = history.0.len().saturating_sub(self.s.dynamic.max_timelines_history);
        history.0.drain(..surplus);
        let by = self.s.settings.name.clone();
        let record = TimelineRecord { current: timeline, reserved: timeline, parent: last.0, by };
        vec![
            Write::put(scope.history(), serde_json::to_string(&history).unwrap_or_default()),
            Write::put(scope.timelines(), serde_json::to_string(&record).unwrap_or_default()),
        ]
    }

    fn write_under_lock(&mut self, writing: Writing, also: Vec<Compare>, writes: Vec<Write>) {
        let Some(fence) = self.s.leadership.fence(self.now, &self.s.membership) else { return };
        let mut compare = self.s.leadership.guard(fence).to_vec();
        compare.extend(also);
        let id = self.transact(compare, writes);
        if let Phase::Primary(primary) = &mut self.s.phase {
            primary.writing = Some((id, writing));
        }
    }

    /// Asks etcd; the number of the question.
    pub(super) fn transact(&mut self, compare: Vec<Compare>, writes: Vec<Write>) -> RequestId {
        let id = self.s.membership.next_request();
        self.push_dcs(vec![DcsAction::Transact { id, transaction: Transaction::new(compare, writes) }]);
        id
    }

    /// The line that the `history` key gets for a timeline that ended at `switched_at`.
    pub(super) fn history_line(&self, ended: Timeline, switched_at: Lsn) -> HistoryLine {
        let at = rfc3339_from_unix_ms(self.s.settings.epoch_unix_ms + self.now.as_millis());
        HistoryLine(ended, switched_at, String::from("no recovery target specified"), at, self.s.settings.name.clone())
    }
}

impl Primary {
    /// Takes note of how a write ended; what was not written stays due and is tried again.
    fn written(&mut self, writing: Writing, outcome: &Outcome) {
        match (writing, outcome) {
            (Writing::History, Outcome::Done(_)) => self.restarted = false,
            (Writing::Status(status), Outcome::Done(_)) => self.shared = Some(status),
            (Writing::Failover(asked_at), Outcome::Done(_)) => self.answered = Some(asked_at),
            (
                Writing::Failover(_) | Writing::Initialize | Writing::History | Writing::Status(_),
                Outcome::Done(_) | Outcome::Refused { .. } | Outcome::Unknown(_),
            ) => {}
        }
    }
}
