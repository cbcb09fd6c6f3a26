//! Making the server unwritable: gently for a switchover, at once when the lock is gone; then giving the lock away.

use bots_core::{dcs::Write, machine::Span, membership::RETRY_AFTER, wire::PostgresStatus};

use super::{
    event::{Action, Job, JobResult, StopMode},
    handover::ARCHIVING_MAX,
    phase::{DemoteStep, DemoteWhy, Phase, Suspect},
    postgres::DataDir,
    state::Timer,
    turn::{Happened, STOP_PATIENCE, Turn},
};

/// A goodbye waits this long for etcd's answer; the lease does the rest.
const GOODBYE: Span = Span::from_millis(1_000);

impl Turn {
    /// On the way down.
    pub(super) fn drive_demoting(&mut self, happened: &Happened) {
        let Phase::Demoting { why, mut step, mut shutdown_checkpoint } = self.s.phase.clone() else { return };
        if matches!(step, DemoteStep::Holding | DemoteStep::Draining) {
            return self.drive_handover(happened, step);
        }
        let stopped = match happened {
            Happened::JobEnded { job: Job::Checkpoint, .. } if step == DemoteStep::Checkpointing => {
                // Failed or not: the stop makes a checkpoint of its own.
                return self.hand_over();
            }
            Happened::JobEnded { job: Job::Stop { .. }, result: Ok(JobResult::Stopped { shutdown_checkpoint }) } => {
                Some(*shutdown_checkpoint)
            }
            Happened::JobEnded { job: Job::Stop { .. }, .. } => {
                let mode = self.stop_at_once();
                return self.run(Job::Stop { mode });
            }
            Happened::Exited { how } if step == DemoteStep::Checkpointing => return self.crashed(how),
            Happened::Due(Timer::Patience) if step == DemoteStep::Checkpointing => {
                // The stop makes a checkpoint of its own, and nothing that a client was told is lost by it.
                return self.hand_over();
            }
            Happened::Due(Timer::Patience) if step == DemoteStep::Stopping || self.s.is_closed() => {
                let mode = self.stop_at_once();
                return self.run(Job::Stop { mode });
            }
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => None,
        };
        if let Some(seen) = stopped {
            // What was heard before its archiver ended stands.
            let checkpoint = seen.or(shutdown_checkpoint);
            if let Some(running) = self.s.job.take() {
                self.out.push(Action::Cancel { id: running.id });
            }
            let clean = checkpoint.is_some();
            if matches!(why, DemoteWhy::Switchover { .. }) && !clean && self.s.may_use_lock(self.now) {
                // What the others lack is here: a switchover loses nothing, so it is given up.
                return self.crashed("it had to be stopped by force on the way to a switchover");
            }
            if matches!(why, DemoteWhy::Fenced(_)) {
                return self.become_phase(Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 });
            }
            (step, shutdown_checkpoint) = (DemoteStep::Yielding, checkpoint);
            self.demote_step(step, shutdown_checkpoint);
        }
        if step == DemoteStep::Yielding {
            let held = self.s.leadership.fence(self.now, &self.s.membership).is_some();
            self.yield_after_stop(shutdown_checkpoint);
            if held || self.s.leadership.is_busy() {
                return;
            }
            if self.s.shows_our_lock() {
                // Given back, and the watch is about to show it: not a lock to come back to.
                return;
            }
            if self.s.job.is_some() {
                return self.mind_archiver(happened);
            }
            // Stopped with its last word replicated: nothing of it can be missing from the next leader.
            let clean = matches!(why, DemoteWhy::Switchover { .. }) && shutdown_checkpoint.is_some();
            let suspect = if clean { Suspect::No } else { Suspect::Maybe };
            self.become_phase(Phase::Rejoining { suspect, failures: 0 });
        }
    }

    pub(super) fn demote_step(&mut self, to: DemoteStep, checkpoint: Option<bots_core::wire::Lsn>) {
        if let Phase::Demoting { step, shutdown_checkpoint, .. } = &mut self.s.phase {
            *step = to;
            *shutdown_checkpoint = checkpoint;
        }
    }

    /// The server is down: the lock goes, with the last position, so that the next leader knows what it must have.
    pub(super) fn yield_after_stop(&mut self, checkpoint: Option<bots_core::wire::Lsn>) {
        // One that is on its way back is asked for again in its own time.
        if self.s.timers.armed(Timer::Rewrite).is_some() && !self.s.leadership.is_yielding() {
            return;
        }
        if self.s.leadership.may_yield(self.now, &self.s.membership) {
            self.s.timers.arm(Timer::Rewrite, self.now + RETRY_AFTER);
        }
        let mut also = Vec::new();
        if let Some(optime) = checkpoint {
            let status = PostgresStatus {
                optime,
                handed_over_by: Some(self.s.settings.name.clone()),
                ..self.s.view.json(&self.s.settings.scope.status()).unwrap_or_default()
            };
            also.push(Write::put(self.s.settings.scope.status(), serde_json::to_string(&status).unwrap_or_default()));
            // Or who has left the path that leads here would seem to be far ahead. Nobody else writes this under our lock.
            let record = self.s.timelines();
            if record.by == self.s.settings.name && record.reserved > record.current {
                also.extend(self.record_of_promotion(record.reserved));
            }
        }
        let mut out = Vec::new();
        self.s.leadership.yield_lock(self.now, &mut self.s.membership, also, &mut out);
        self.push_dcs(out);
    }

    /// A lock that this member cannot use bars those who can: it goes back. One that may or may not have been won shows
    /// in the watch if it was.
    pub(super) fn let_go_of_the_lock(&mut self) {
        let was_primary = matches!(self.s.data, Some(DataDir::Present { was_primary: true, .. }));
        let useful = match &self.s.phase {
            // What is left of a bootstrap is writable until it is down.
            Phase::Waiting => self.s.postgres.is_alive(),
            Phase::Initializing | Phase::Cloning { .. } | Phase::Starting { .. } | Phase::Replica { .. } => false,
            Phase::Restarting { primary, .. } => *primary,
            Phase::Rejoining { .. } => was_primary && !self.s.is_half_promoted(),
            Phase::Bootstrapping(_)
            | Phase::Candidate(_)
            | Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Recovering { .. }
            | Phase::Demoting { .. }
            | Phase::Stopping { .. } => true,
        };
        let asking =
            matches!(self.s.phase, Phase::Candidate(_) | Phase::Recovering { .. }) || self.s.is_vouched_for(self.now);
        if !asking && self.s.leadership.is_uncertain() {
            self.s.leadership.abandon();
        }
        // One that was given back is not taken up again.
        if !useful || self.s.leadership.is_yielding() {
            self.yield_after_stop(None);
        }
    }

    /// The process was asked to stop.
    pub(super) fn shut_down(&mut self) {
        if matches!(self.s.phase, Phase::Stopping { .. }) {
            return;
        }
        let left =
            matches!(self.s.data, Some(DataDir::Present { running, .. }) if running.is_any()) && !self.s.is_foreign();
        let running = self.s.postgres.is_alive() || left;
        let busy = self.s.job.is_some();
        let (writable, archives) = (self.s.may_be_writable(), self.s.is_closed());
        let checkpoint = match &self.s.phase {
            Phase::Demoting { shutdown_checkpoint, .. } => *shutdown_checkpoint,
            _any_other => None,
        };
        self.become_phase(Phase::Stopping { yielded: false, writable, checkpoint });
        if running || busy {
            self.s.timers.arm(Timer::Patience, self.now + if archives { ARCHIVING_MAX } else { STOP_PATIENCE });
            // A fence that is falling falls on, and what only archives needs no other stop.
            if !self.s.is_stopping_at_once() && !self.s.is_closed() {
                self.stop_once_released(StopMode::Fast);
            }
        }
    }

    /// Down with the server, then the lock, then the lease: in this order, so that the next leader may start at once.
    pub(super) fn drive_stopping(&mut self, happened: &Happened) {
        let Phase::Stopping { yielded, writable, mut checkpoint } = self.s.phase else { return };
        match happened {
            Happened::JobEnded { job: Job::Stop { .. }, result: Ok(JobResult::Stopped { shutdown_checkpoint }) } => {
                checkpoint = shutdown_checkpoint.or(checkpoint);
                self.s.phase = Phase::Stopping { yielded, writable, checkpoint };
                if yielded {
                    self.s.timers.arm(Timer::Patience, self.now + GOODBYE);
                }
            }
            Happened::JobEnded { job: Job::Stop { .. }, .. } => {
                let mode = self.stop_at_once();
                return self.run(Job::Stop { mode });
            }
            Happened::Due(Timer::Patience) if !yielded || self.s.job.is_some() => {
                let mode = self.stop_at_once();
                return self.run(Job::Stop { mode });
            }
            Happened::Due(Timer::Patience) => return self.goodbye(),
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
        if self.s.kept_until().is_some_and(|until| until <= self.now) {
            return self.kill_kept();
        }
        let archives = self.s.is_closed();
        if self.s.job.is_some() && !archives || self.s.asks_for_release() {
            return;
        }
        if !yielded && self.s.leadership.fence(self.now, &self.s.membership).is_some() {
            self.s.phase = Phase::Stopping { yielded: true, writable, checkpoint };
            if !archives {
                self.s.timers.arm(Timer::Patience, self.now + GOODBYE);
            }
            return self.yield_after_stop(checkpoint);
        }
        if self.s.leadership.is_yielding() {
            // A lost answer is asked for again, with all that the next leader is to know.
            self.yield_after_stop(checkpoint);
        }
        if archives {
            return;
        }
        // A question for the lock that is still open needs no answer: without the lease, it comes to nothing.
        if !(yielded && self.s.leadership.is_busy()) {
            self.goodbye();
        }
    }

    fn goodbye(&mut self) {
        let mut out = Vec::new();
        self.s.membership.leave(&mut out);
        for action in out {
            if let bots_core::membership::MembershipAction::Dcs(action) = action {
                self.push_dcs(vec![action]);
            }
        }
        self.s.exited = true;
        let (code, message) = self.s.farewell.clone().unwrap_or_else(|| (0, String::from("stopped")));
        self.out.push(Action::Exit { code, message });
    }
}
