//! One turn of the machine: take in the event, let the role do what is due, share what has changed.
//!
//! Roles are level-triggered: each looks at the facts and does what they call for, so that a lost or repeated event
//! changes nothing. What cannot be a fact (a job's end, an answer) comes along as [`Happened`].

use std::collections::BTreeMap;

use bots_core::{
    dcs::{DcsAction, DcsEvent, Outcome, RequestId},
    machine::{Machine, Span, Step, Time},
    membership::{MembershipAction, MembershipChange, MembershipEvent},
};

use super::{
    PostgresBot,
    dynamic::{STANDBY_NAMES, effective_parameters, effective_rules},
    event::{Action, Event, Job, JobError, JobId, JobResult, PeerAnswer, ProbeId, StopMode},
    phase::{Bootstrap, DemoteStep, DemoteWhy, Phase},
    postgres::{DataDir, Postgres, Running as Runs, Server},
    share,
    state::{Running, Stall, State, Timer},
};

/// A turn may pass through this many roles; more is a loop, which the tests would show.
const ROLES_PER_TURN_MAX: usize = 8;

/// How long a stop may take before it is made immediate.
pub(super) const STOP_PATIENCE: Span = Span::from_secs(60);

/// So long after every process of a server has been killed, what is left of them is stuck in the kernel, in a disk that does not
/// answer: it runs no more, and cannot be waited for either.
pub(super) const DYING_MAX: Span = Span::from_secs(5);

/// A server that is told to stop at once takes milliseconds; one that has not by then hangs.
pub(super) const KILL_AFTER_MAX: Span = Span::from_millis(500);

/// What cannot be read off the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Happened {
    Nothing,
    JobEnded { job: Job, result: Result<JobResult, JobError> },
    Exited { how: String },
    Observed,
    Probed { id: ProbeId, answers: BTreeMap<String, PeerAnswer> },
    Answered { id: RequestId, outcome: Outcome },
    Due(Timer),
}

/// A state in the making, with the actions so far.
pub(super) struct Turn {
    pub(super) s: State,
    pub(super) now: Time,
    pub(super) out: Vec<Action>,
}

impl Turn {
    pub(super) fn new(mut s: State, now: Time) -> Self {
        s.passed.clear();
        s.word.note(now);
        Self { s, now, out: Vec::new() }
    }

    pub(super) fn take(&mut self, event: Event) {
        if self.s.exited {
            return;
        }
        let happened = match event {
            Event::Dcs(event) => self.dcs(event),
            Event::NameProbed { instance } => {
                self.membership_event(&MembershipEvent::NameProbed { instance });
                Happened::Nothing
            }
            Event::TimerFired => Happened::Nothing,
            Event::ShutdownRequested if self.leaves_server_in_pause() => return,
            Event::ShutdownRequested => {
                self.shut_down();
                Happened::Nothing
            }
            Event::DataInspected(found) => {
                self.s.inspecting = false;
                if matches!((&self.s.phase, &found), (Phase::Initializing, DataDir::Present { was_primary: true, .. }))
                {
                    self.s.pause.led_last = true;
                }
                self.s.data = Some(found);
                Happened::Nothing
            }
            Event::DataUnusable { why, code } => {
                self.s.inspecting = false;
                self.give_up(code, why);
                Happened::Nothing
            }
            Event::PostgresObserved(postgres) => {
                // An observation from before the end of the server is old news.
                if self.s.postgres.is_alive() {
                    self.s.postgres = postgres;
                }
                // Also when its promotion was given up, or made by hand.
                if self.s.server().is_some_and(|server| !server.in_recovery) {
                    self.note_primary(true);
                }
                Happened::Observed
            }
            Event::DiskObserved(disk) => {
                self.s.health.disk = disk;
                Happened::Nothing
            }
            Event::WatchdogSeen(seen) => {
                self.watchdog_seen(seen);
                Happened::Nothing
            }
            Event::WatchdogUsed(used) => {
                self.watchdog_used(used);
                Happened::Nothing
            }
            Event::GuardObserved { answers } => {
                self.guard_observed(answers);
                Happened::Nothing
            }
            Event::ParametersRefused(refused) => {
                self.s.refused = refused;
                Happened::Nothing
            }
            Event::PostgresClosed { shutdown_checkpoint } => {
                self.closed(shutdown_checkpoint);
                Happened::Nothing
            }
            Event::PostgresExited { how } => {
                self.s.postgres = Postgres::Down;
                self.nothing_runs();
                Happened::Exited { how }
            }
            Event::PeersProbed { id, answers } => Happened::Probed { id, answers },
            Event::LeaderSlotsSeen { id, seen } => {
                self.leader_slots_seen(id, seen);
                Happened::Nothing
            }
            Event::JobEnded { id, result } => self.job_ended(id, result),
            Event::MemberAsked { id, ask } => {
                self.answer_member(id, &ask);
                Happened::Nothing
            }
            Event::MemberAnswered { id, member, answer } => {
                self.member_answered(id, member, answer);
                Happened::Nothing
            }
            Event::Commanded { id, command } => {
                self.take_command(id, command);
                Happened::Nothing
            }
            Event::CopyProgressed { bytes_done, bytes_total } => {
                self.copy_progressed(bytes_done, bytes_total);
                Happened::Nothing
            }
        };
        self.settle(happened);
    }

    pub(super) fn finish(self) -> Step<State, Action> {
        Step { state: self.s, actions: self.out }
    }

    fn settle(&mut self, happened: Happened) {
        self.note_leader();
        self.note_health();
        self.configure();
        self.note_pause();
        self.take_sync_answer(&happened);
        self.drive(happened);
        while !self.s.exited
            && let Some(timer) = self.s.timers.take_due(self.now)
        {
            match timer {
                Timer::ScheduledRestart => self.restart_is_due(),
                Timer::RestartPatience => self.restart_takes_long(),
                Timer::Slots | Timer::Release => {}
                of_the_role => self.drive(Happened::Due(of_the_role)),
            }
        }
        self.mind_release();
        self.mind_restart();
        if !self.s.exited {
            self.mind_slots();
            self.mind_failsafe();
            self.move_fence();
            self.let_go_of_the_lock();
            let mut out = Vec::new();
            self.s.membership.hold_lock(self.s.leadership.is_held(), &mut out);
            self.s.membership.lapse(self.s.will_not_die(self.now), &mut out);
            // A question about the lock is about the lease that it was asked with.
            if !self.s.leadership.is_busy()
                && let Some(rests) = self.s.rests(self.now)
            {
                self.s.membership.rest(self.now, rests, &mut out);
            }
            self.s.membership.advance(self.now, &mut out);
            self.tell_standby_names();
            share::publish(&mut self.s, self.now, &mut out);
            self.push_membership(out);
        }
    }

    /// Lets the role act, and every role that it leads to.
    fn drive(&mut self, happened: Happened) {
        let mut happened = happened;
        for _ in 0..ROLES_PER_TURN_MAX {
            let before = self.s.role();
            if self.s.exited {
                return;
            }
            self.fence();
            match &self.s.phase {
                Phase::Initializing => self.drive_initializing(&happened),
                Phase::Waiting => self.drive_waiting(&happened),
                Phase::Bootstrapping(_) => self.drive_bootstrapping(&happened),
                Phase::Cloning { .. } => self.drive_cloning(&happened),
                Phase::Starting { .. } => self.drive_starting(&happened),
                Phase::Replica { .. } => self.drive_replica(&happened),
                Phase::Candidate(_) => self.drive_candidate(&happened),
                Phase::Promoting { .. } => self.drive_promoting(&happened),
                Phase::Primary(_) => self.drive_primary(&happened),
                Phase::Restarting { .. } => self.drive_restarting(&happened),
                Phase::Recovering { .. } => self.drive_recovering(&happened),
                Phase::Demoting { .. } => self.drive_demoting(&happened),
                Phase::Rejoining { .. } => self.drive_rejoining(&happened),
                Phase::Stopping { .. } => self.drive_stopping(&happened),
            }
            if self.s.role() == before {
                return;
            }
            happened = Happened::Nothing;
        }
    }

    /// The only way to change role.
    pub(super) fn become_phase(&mut self, phase: Phase) {
        let before = self.s.role();
        self.s.phase = phase;
        let after = self.s.role();
        PostgresBot::TRANSITIONS.assert_allows(before, after);
        if before != after {
            self.s.passed.push(after);
            self.s.since = self.now;
            let of_the_role = [
                Timer::Retry,
                Timer::Patience,
                Timer::ShareStatus,
                Timer::Scheduled,
                Timer::Rewrite,
                Timer::Stalled,
                Timer::Sync,
                Timer::Takeover,
                Timer::Hung,
                Timer::Guard,
            ];
            for timer in of_the_role {
                self.s.timers.disarm(timer);
            }
            self.s.forget_takeover_questions();
            if !self.s.may_have_reigned() {
                self.s.synchrony.lay_down();
            }
            self.s.stall = Stall { rewound: self.s.stall.rewound, ..Stall::default() };
        }
    }

    /// A server that may accept writes is stopped before its lease can run out, and at once when the lock is gone (S1, S6).
    fn fence(&mut self) {
        let Some(at) = self.s.fence_at() else { return };
        let unlocked =
            !self.s.leadership.is_held() && (!self.s.leadership.is_busy() || self.s.leadership.is_yielding());
        // Vouched for, it leads on without a lock, but never beside one of another's.
        let vouched = self.s.is_vouched_for(self.now) && self.s.leadership.looks_free(&self.s.view);
        let why = if self.now >= at {
            String::from("the lease was not renewed in time")
        } else if unlocked && !vouched {
            String::from("the leader lock is gone or another's")
        } else {
            return;
        };
        self.s.trouble = Some(format!("Postgres was stopped: {why}"));
        self.fence_now(why);
    }

    pub(super) fn fence_now(&mut self, why: String) {
        let mode = self.stop_at_once();
        if matches!(self.s.phase, Phase::Stopping { .. }) {
            return self.run(Job::Stop { mode });
        }
        self.become_phase(Phase::Demoting {
            why: DemoteWhy::Fenced(why),
            step: DemoteStep::Stopping,
            shutdown_checkpoint: None,
        });
        self.run(Job::Stop { mode });
    }

    /// The stop that is sure to end within the fence margin.
    pub(super) fn stop_at_once(&self) -> StopMode {
        StopMode::Immediate { kill_after: self.s.grace(self.now) }
    }

    fn dcs(&mut self, event: DcsEvent) -> Happened {
        self.s.view.apply(&event);
        let answered = match &event {
            DcsEvent::Answered { id, outcome } => {
                self.roll_written(*id, outcome);
                Happened::Answered { id: *id, outcome: outcome.clone() }
            }
            DcsEvent::Listed { .. }
            | DcsEvent::Changed { .. }
            | DcsEvent::WatchLost { .. }
            | DcsEvent::LeaseGranted { .. }
            | DcsEvent::LeaseRenewed { .. }
            | DcsEvent::LeaseLost { .. } => Happened::Nothing,
        };
        let event = MembershipEvent::Dcs(event);
        self.membership_event(&event);
        if let MembershipEvent::Dcs(event) = event {
            let _change = self.s.leadership.on_event(self.now, &event, &self.s.view, &self.s.membership);
        }
        answered
    }

    fn membership_event(&mut self, event: &MembershipEvent) {
        let mut out = Vec::new();
        let change = self.s.membership.on_event(self.now, event, &self.s.view, &mut out);
        self.push_membership(out);
        if let Some(MembershipChange::Duplicate { api_url }) = change {
            let name = self.s.settings.name.clone();
            let message = format!(
                "name: another live bot is called {name} in this scope (it answers at {api_url}): give this one another name"
            );
            self.give_up(3, message);
        }
    }

    fn push_membership(&mut self, out: Vec<MembershipAction>) {
        self.out.extend(out.into_iter().map(|action| match action {
            MembershipAction::Dcs(action) => Action::Dcs(action),
            MembershipAction::ProbeName { api_url } => Action::ProbeName { api_url },
        }));
    }

    pub(super) fn push_dcs(&mut self, out: Vec<DcsAction>) {
        self.out.extend(out.into_iter().map(Action::Dcs));
    }

    fn note_leader(&mut self) {
        let leaderless = self.s.view.is_complete() && self.s.view.is_watched() && self.s.leader().is_none();
        match (leaderless, self.s.leaderless_since) {
            (true, None) => {
                self.s.leaderless_since = Some(self.now);
                // What a replica received last from a leader that shut down decides whether it may lead: the figure from
                // the last look, perhaps half a second old, would make it stand back.
                if self.s.server().is_some() {
                    self.out.push(Action::Observe);
                }
            }
            (false, Some(_)) => self.s.leaderless_since = None,
            (true, Some(_)) | (false, None) => {}
        }
    }

    /// Takes over the cluster's settings, and tells the shell when the parameters have changed.
    fn configure(&mut self) {
        if let Some(config) = self.s.view.json(&self.s.settings.scope.config()) {
            self.s.dynamic = self.s.dynamic.changed_to(&config);
            self.s.membership.set_ttl(self.s.dynamic.ttl);
        }
        self.s.note_own_slot();
        self.tell_parameters();
    }

    pub(super) fn tell_parameters(&mut self) {
        let names = self.s.standby_names();
        let mut parameters = effective_parameters(&self.s.settings, &self.s.dynamic, names);
        parameters.extend(self.s.own_slot_parameter());
        parameters.extend(self.s.feedback_parameter());
        let rules = effective_rules(&self.s.settings, &self.s.dynamic);
        let wanted = (parameters, rules);
        if self.s.configured.as_ref() != Some(&wanted) {
            let (parameters, rules) = wanted.clone();
            self.s.configured = Some(wanted);
            self.out.push(Action::Configure { parameters, rules });
        }
    }

    /// Tells the shell which standbys commits wait for, if that has changed.
    fn tell_standby_names(&mut self) {
        let told = self.s.configured.as_ref().and_then(|(parameters, _)| parameters.get(STANDBY_NAMES));
        if self.s.standby_names().is_some_and(|names| told != Some(&names)) {
            self.tell_parameters();
        }
    }

    /// Starts a job; one that still runs is given up first.
    pub(super) fn run(&mut self, job: Job) {
        if let Some(running) = self.s.job.take() {
            self.out.push(Action::Cancel { id: running.id });
        }
        // A server goes by what is right for what it is about to be.
        self.tell_standby_names();
        if !self.s.is_restarting() && matches!(job, Job::StartPrimary | Job::StartStandby { .. }) {
            self.forget_scheduled_restart();
        }
        match job {
            Job::StartPrimary => {
                self.s.postgres = Postgres::Starting;
                self.set_fence();
            }
            Job::Promote { .. } => self.set_fence(),
            Job::StartStandby { .. } => {
                self.s.postgres = Postgres::Starting;
                self.s.fence_set = None;
                // What a stop has waited for is over: this server may be waited for.
                self.s.release = None;
                self.note_primary(false);
            }
            Job::Initialize
            | Job::CreateRoles
            | Job::Complete
            | Job::DiscardUnfinished { .. }
            | Job::SetAside { .. }
            | Job::Clone { .. }
            | Job::Follow { .. }
            | Job::Checkpoint
            | Job::Stop { mode: StopMode::Immediate { .. } }
            | Job::Drain
            | Job::Rewind { .. } => {}
            Job::Stop { mode: StopMode::Fast } => {
                if let Some(timeout) = self.s.dynamic.primary_stop_timeout.filter(|_| self.s.may_be_writable()) {
                    self.s.timers.arm(Timer::Patience, self.now + timeout);
                }
            }
        }
        self.s.jobs += 1;
        let id = JobId(self.s.jobs);
        self.s.job = Some(Running { id, job: job.clone(), since: self.now, closed: false });
        self.out.push(Action::Run { id, job });
    }

    /// Takes over what a job's end says of the server and the data directory.
    fn job_ended(&mut self, id: JobId, result: Result<JobResult, JobError>) -> Happened {
        if self.s.job.as_ref().is_none_or(|running| running.id != id) {
            return Happened::Nothing;
        }
        let Some(Running { job, .. }) = self.s.job.take() else { return Happened::Nothing };
        match (&job, &result) {
            (Job::StartPrimary | Job::StartStandby { .. }, Ok(JobResult::Started(server))) => {
                self.s.postgres = Postgres::Up(server.clone());
                if job == Job::StartPrimary {
                    self.note_primary(true);
                }
            }
            (Job::StartPrimary | Job::StartStandby { .. }, Err(_)) => self.s.postgres = Postgres::Down,
            (Job::Promote { .. }, Ok(JobResult::Promoted { server, .. })) => {
                // It has the slots that it had.
                let slots = server.slots.clone().or_else(|| self.s.server()?.slots.clone());
                self.s.postgres = Postgres::Up(Server { slots, ..server.clone() });
                self.note_primary(true);
            }
            (Job::Stop { .. }, Ok(JobResult::Stopped { .. })) => {
                self.s.postgres = Postgres::Down;
                self.nothing_runs();
            }
            (Job::DiscardUnfinished { .. } | Job::SetAside { .. }, Ok(_)) => self.s.data = Some(DataDir::Empty),
            (Job::Rewind { .. }, Ok(_)) => self.note_primary(false),
            (Job::Complete, Ok(_)) => self.s.data = None,
            (Job::Clone { .. }, Ok(_)) => {
                self.s.data = None;
                self.s.copy_leader = false;
                self.reinit_done();
            }
            (Job::Clone { source }, Err(_)) => {
                self.s.copy_leader = self.s.leader() != Some(source.name.as_str());
                self.s.operator.copying = None;
            }
            (_any_other_job, _its_end) => {}
        }
        match (&job, &result) {
            (_, Err(error)) => self.s.trouble = Some(error.why.clone()),
            // On the way down, or beside the way: what went wrong before is still the news.
            (Job::Stop { .. } | Job::SetAside { .. } | Job::Checkpoint | Job::Drain | Job::Follow { .. }, Ok(_)) => {}
            (
                Job::Initialize
                | Job::CreateRoles
                | Job::Complete
                | Job::DiscardUnfinished { .. }
                | Job::Clone { .. }
                | Job::StartPrimary
                | Job::StartStandby { .. }
                | Job::Promote { .. }
                | Job::Rewind { .. },
                Ok(_),
            ) => self.s.trouble = None,
        }
        Happened::JobEnded { job, result }
    }

    /// No server that was there before our start is there any more, and no guard.
    const fn nothing_runs(&mut self) {
        self.s.guard.silent_since = None;
        if let Some(DataDir::Present { running, .. } | DataDir::Unfinished { running, .. }) = &mut self.s.data {
            *running = Runs::No;
        }
    }

    /// Has the guard's fence where the lease allows it.
    fn set_fence(&mut self) {
        let at = self.s.guard_at();
        if self.s.fence_set != Some(at) {
            self.s.fence_set = Some(at);
            self.out.push(Action::SetFence { at, watchdog: self.s.watchdog_order() });
        }
    }

    /// Moves the fence on with the lease, for as long as the server may take writes under it.
    fn move_fence(&mut self) {
        let bootstrapping =
            matches!(&self.s.phase, Phase::Bootstrapping(step) if !matches!(step, Bootstrap::Racing(_)));
        let locked = self.s.leadership.fence(self.now, &self.s.membership).is_some();
        let fenced = matches!(&self.s.phase, Phase::Demoting { why: DemoteWhy::Fenced(_), .. });
        let ours = bootstrapping || locked && !fenced && self.s.may_be_writable();
        let leased = ours && self.s.membership.lease(self.now).is_some();
        let vouched = !fenced && self.s.is_vouched_for(self.now);
        if self.s.fence_set.is_some() && self.s.postgres.is_alive() && (leased || vouched) {
            self.set_fence();
        }
    }

    /// Whether the data is a primary's from now on.
    const fn note_primary(&mut self, is_primary: bool) {
        if let Some(DataDir::Present { was_primary, .. }) = &mut self.s.data {
            *was_primary = is_primary;
        }
    }

    /// This bot must not run: whatever it started is stopped first.
    pub(super) fn give_up(&mut self, code: u8, message: String) {
        self.s.trouble = Some(message.clone());
        self.s.farewell = Some((code, message));
        self.shut_down();
    }

    /// Looks at the data directory, unless that is under way.
    pub(super) fn inspect(&mut self) {
        if !self.s.inspecting {
            self.s.inspecting = true;
            self.out.push(Action::InspectData);
        }
    }

    /// A delay that doubles with every failure, between a second and half a minute.
    pub(super) fn backoff(failures: u32) -> Span {
        Span::from_secs(1 << failures.min(5)).min(Span::from_secs(30))
    }
}
