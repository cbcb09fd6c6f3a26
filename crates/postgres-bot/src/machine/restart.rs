//! A restart on an operator's word, now or when its time has come. A primary keeps the lock all the while: nobody else leads
//! meanwhile, unless it does not come back in time.

use bots_core::machine::{Span, Time};

use super::{
    event::{Job, JobResult, StopMode},
    operator::{Answer, CommandId, Ongoing, Refusal, Restart},
    phase::{Phase, Recovery, RestartStep},
    state::Timer,
    turn::{Happened, STOP_PATIENCE, Turn},
};

/// A restart on an operator's word has this long if neither he nor the cluster says otherwise.
const RESTART_PATIENCE: Span = Span::from_secs(60);

impl Turn {
    pub(super) fn schedule(&mut self, restart: Restart) -> Answer {
        if self.s.dynamic.pause {
            return Answer::Refused(Refusal::Paused, String::from("Can't schedule restart in the paused state"));
        }
        if self.s.operator.scheduled.is_some() {
            let why = String::from("Another restart is already scheduled");
            return Answer::Refused(Refusal::AlreadyScheduled, why);
        }
        let at = restart.at_unix_ms.unwrap_or_default().saturating_sub(self.s.settings.epoch_unix_ms);
        self.s.timers.arm(Timer::ScheduledRestart, Time::from_millis(at));
        self.s.operator.scheduled = Some(restart);
        Answer::Scheduled
    }

    /// The time of a scheduled restart has come.
    pub(super) fn restart_is_due(&mut self) {
        let Some(restart) = self.s.operator.scheduled.take() else { return };
        let refusal = if self.s.dynamic.pause {
            Some(String::from("the cluster is paused"))
        } else {
            match self.begin_restart(None, &restart) {
                Err(Answer::Refused(_, why)) => Some(why),
                Err(Answer::Done(_) | Answer::Scheduled) | Ok(()) => None,
            }
        };
        if let Some(why) = refusal {
            self.s.trouble = Some(format!("the scheduled restart was not made: {why}"));
        }
    }

    /// A server that was restarted meanwhile, for whatever reason, needs no restart that was scheduled before.
    pub(super) fn forget_scheduled_restart(&mut self) {
        if self.s.operator.scheduled.take().is_some() {
            self.s.timers.disarm(Timer::ScheduledRestart);
        }
    }

    pub(super) fn begin_restart(&mut self, id: Option<CommandId>, restart: &Restart) -> Result<(), Answer> {
        let unfit = |why: String| Err(Answer::Refused(Refusal::Unfit, why));
        if self.s.is_restarting() {
            return unfit(String::from("restart already in progress"));
        }
        if !self.fits(restart) {
            return unfit(String::from("restart conditions are not satisfied"));
        }
        let given = restart.wish.timeout.map(Span::from_secs);
        let usual = self.s.dynamic.primary_start_timeout;
        let timeout = given.unwrap_or(if usual == Span::ZERO { RESTART_PATIENCE } else { usual });
        let ongoing = Some(Ongoing { id, timeout });
        match &self.s.phase {
            Phase::Replica { .. } => {
                self.become_phase(Phase::Restarting { primary: false, step: RestartStep::Stopping });
                self.stop_once_released(StopMode::Fast);
            }
            Phase::Primary(_) => {
                self.become_phase(Phase::Restarting { primary: true, step: RestartStep::Checkpointing });
                self.run(Job::Checkpoint);
            }
            Phase::Starting { .. } if self.s.pause.left_down => self.s.pause.left_down = false,
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Cloning { .. }
            | Phase::Starting { .. }
            | Phase::Candidate(_)
            | Phase::Promoting { .. }
            | Phase::Restarting { .. }
            | Phase::Recovering { .. }
            | Phase::Demoting { .. }
            | Phase::Rejoining { .. }
            | Phase::Stopping { .. } => {
                return unfit(format!("the member is {}: restart it once it runs", self.s.role()));
            }
        }
        self.s.operator.restart = ongoing;
        self.s.timers.arm(Timer::Patience, self.now + STOP_PATIENCE);
        self.s.timers.arm(Timer::RestartPatience, self.now + timeout);
        Ok(())
    }

    fn fits(&self, restart: &Restart) -> bool {
        let primary = matches!(self.s.phase, Phase::Primary(_));
        let role = restart.wish.role.as_deref().is_none_or(|role| role == if primary { "primary" } else { "replica" });
        let server = self.s.server();
        let older = restart.below_version.is_none_or(|below| server.is_some_and(|s| (1..below).contains(&s.version)));
        let pending = server.is_some_and(|server| !server.pending_restart.is_empty());
        role && older && (pending || !restart.wish.restart_pending)
    }

    /// Stopping the server on an operator's word, to start it again.
    pub(super) fn drive_restarting(&mut self, happened: &Happened) {
        let Phase::Restarting { primary, step } = self.s.phase else { return };
        if !primary && self.stop_unlocked_writer() {
            return;
        }
        let stop = |turn: &mut Self, mode: StopMode| {
            turn.s.phase = Phase::Restarting { primary, step: RestartStep::Stopping };
            turn.run(Job::Stop { mode });
        };
        match happened {
            Happened::JobEnded { job: Job::Checkpoint, .. } if step == RestartStep::Checkpointing => {
                // Failed or not: the stop makes a checkpoint of its own.
                stop(self, StopMode::Fast);
            }
            Happened::Due(Timer::Patience) if step == RestartStep::Checkpointing => {
                self.s.timers.arm(Timer::Patience, self.now + STOP_PATIENCE);
                stop(self, StopMode::Fast);
            }
            Happened::JobEnded { job: Job::Stop { .. }, result: Ok(JobResult::Stopped { .. }) } => {
                self.start_again(primary);
            }
            Happened::JobEnded { job: Job::Stop { .. }, .. } | Happened::Due(Timer::Patience) => {
                let mode = self.stop_at_once();
                stop(self, mode);
            }
            Happened::Exited { .. } if step == RestartStep::Checkpointing => self.start_again(primary),
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
    }

    /// The server is down, and what it was decides what it becomes. A primary whose lock is gone meets the fence.
    fn start_again(&mut self, primary: bool) {
        if !primary {
            return self.become_phase(Phase::Starting { attempts: 0 });
        }
        if !self.s.may_use_lock(self.now) {
            return self.fence_now(String::from("the leader lock was lost while it was restarted"));
        }
        let timeout = self.s.operator.restart.as_ref().map_or(RESTART_PATIENCE, |restart| restart.timeout);
        self.become_phase(Phase::Recovering { step: Recovery::Starting });
        self.s.timers.arm(Timer::Patience, self.now + timeout);
        self.run(Job::StartPrimary);
    }

    /// Tells how a restart went, once that shows.
    pub(super) fn mind_restart(&mut self) {
        if matches!(self.s.phase, Phase::Primary(_) | Phase::Replica { .. }) {
            // Whatever has come of it, this data is good.
            self.s.operator.reinit = None;
        }
        let Some(Ongoing { id, .. }) = self.s.operator.restart.clone() else { return };
        let up = self.s.server().is_some();
        let why = || self.s.trouble.clone().unwrap_or_else(|| format!("the member is {}", self.s.role()));
        let answer = match &self.s.phase {
            Phase::Primary(_) | Phase::Replica { .. } | Phase::Candidate(_) if up => {
                Answer::Done(String::from("restarted successfully"))
            }
            Phase::Starting { attempts: 0 } if !self.s.pause.left_down => return,
            Phase::Restarting { .. }
            | Phase::Recovering { .. }
            | Phase::Candidate(_)
            | Phase::Primary(_)
            | Phase::Replica { .. } => return,
            Phase::Initializing
            | Phase::Waiting
            | Phase::Bootstrapping(_)
            | Phase::Cloning { .. }
            | Phase::Starting { .. }
            | Phase::Promoting { .. }
            | Phase::Demoting { .. }
            | Phase::Rejoining { .. }
            | Phase::Stopping { .. } => Answer::Refused(Refusal::Failed, format!("restart failed: {}", why())),
        };
        self.end_restart(id, answer);
    }

    /// The server is not up in time: whoever waits is told; a primary's own patience ends at the same moment.
    pub(super) fn restart_takes_long(&mut self) {
        if let Some(Ongoing { id, .. }) = self.s.operator.restart.clone() {
            self.end_restart(id, Answer::Refused(Refusal::Failed, String::from("postgres is still starting")));
        }
    }

    fn end_restart(&mut self, id: Option<CommandId>, answer: Answer) {
        self.s.operator.restart = None;
        self.s.timers.disarm(Timer::RestartPatience);
        if let Some(id) = id {
            self.answer(id, answer);
        }
    }
}
