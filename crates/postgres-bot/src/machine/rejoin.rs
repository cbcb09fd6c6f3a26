//! Stopped, with data that may hold what the leader lacks: rewind it, or put it aside and copy anew. Never overwritten
//! without the setting that allows it.

use bots_core::machine::Span;

use super::{
    event::{Job, StopMode},
    phase::{Phase, Recovery, Suspect},
    postgres::{DataDir, Upstream},
    state::Timer,
    turn::{Happened, Turn},
};

/// So many rewinds are tried before the data is given up for a new clone: the first may meet a leader that moves on.
const REWINDS_MAX: u32 = 2;
/// What only an operator can mend is looked at again this often.
const HOPELESS_RETRY: Span = Span::from_secs(30);

impl Turn {
    /// Finding a way back.
    pub(super) fn drive_rejoining(&mut self, happened: &Happened) {
        let Phase::Rejoining { suspect, failures } = self.s.phase else { return };
        match happened {
            Happened::JobEnded { job: Job::Rewind { .. }, result: Ok(_) } => {
                self.s.stall.rewound = self.s.stall.rewinding.take();
                return self.become_phase(Phase::Starting { attempts: 0 });
            }
            Happened::JobEnded { job: Job::Rewind { .. }, result: Err(error) } => {
                return self.rewind_failed(failures, error.elsewhere);
            }
            Happened::JobEnded { job: Job::SetAside { .. }, result: Ok(_) } => {
                return self.become_phase(Phase::Waiting);
            }
            Happened::JobEnded { job: Job::SetAside { .. }, .. } => {
                return self.s.timers.arm(Timer::Retry, self.now + HOPELESS_RETRY);
            }
            Happened::JobEnded { job: Job::Stop { .. }, result: Err(_) } => {
                let mode = self.stop_at_once();
                return self.run(Job::Stop { mode });
            }
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
        let stops = self.s.job.as_ref().is_some_and(|running| running.job == Job::Stop { mode: StopMode::Fast });
        if stops && self.s.server().is_some_and(|server| !server.in_recovery) {
            // Somebody has promoted it meanwhile.
            let mode = self.stop_at_once();
            return self.run(Job::Stop { mode });
        }
        if self.s.job.is_some() || self.s.timers.armed(Timer::Retry).is_some() || self.s.asks_for_release() {
            return;
        }
        if self.s.postgres.is_alive()
            || matches!(self.s.data, Some(DataDir::Present { running, .. }) if running.is_any())
        {
            let mode = self.stop_at_once();
            return self.run(Job::Stop { mode });
        }
        if self.s.is_foreign() {
            return self.refuse_foreign();
        }
        let was_primary = matches!(self.s.data, Some(DataDir::Present { was_primary: true, .. }));
        let mine = self.s.leader() == Some(self.s.settings.name.as_str());
        let watched = self.s.view.is_watched();
        let leased = self.s.has_ample_lease(self.now);
        if was_primary && !self.s.is_half_promoted() && mine && watched && leased && !self.s.leadership.is_busy() {
            // Fenced in time, and the lock was not even lost: in place again.
            return self.become_phase(Phase::Recovering { step: Recovery::Reclaiming });
        }
        let leaderless = self.s.leader().is_none() || !watched;
        if leaderless && self.give_reinit_up() {
            return self.drive_rejoining(&Happened::Nothing);
        }
        let hands_off = self.s.dynamic.pause && !self.s.is_reinitializing();
        // Data is changed only for a leader that is known to lead.
        match (suspect, self.rewind_source().filter(|_| watched && !hands_off)) {
            // Nobody to differ from: stand for leader with what we have, which may be more than anybody has.
            // What a rewind has left half done bears a mark, and does not start.
            (Suspect::No, _) => self.become_phase(Phase::Starting { attempts: 0 }),
            (Suspect::Maybe | Suspect::Hopeless, None) if leaderless => {
                self.become_phase(Phase::Starting { attempts: 0 });
            }
            (Suspect::Maybe, Some(source)) if self.s.uses_rewind() => {
                self.s.stall.rewinding = Some(self.s.timelines().current);
                self.run(Job::Rewind { source });
            }
            (Suspect::Maybe | Suspect::Hopeless, Some(leader)) => {
                let remove = self.s.may_remove_data(suspect == Suspect::Hopeless || failures > 0);
                self.commit_to_reinit();
                self.run(Job::SetAside { remove, leader: Some(leader) });
            }
            (Suspect::Maybe | Suspect::Hopeless, _) => {}
        }
    }

    /// A source that went away meanwhile is no reason to give the data up.
    fn rewind_failed(&mut self, failures: u32, elsewhere: bool) {
        let backoff = Self::backoff(failures + 1);
        let failures = if elsewhere { failures } else { failures + 1 };
        let suspect = if failures < REWINDS_MAX { Suspect::Maybe } else { Suspect::Hopeless };
        self.s.phase = Phase::Rejoining { suspect, failures };
        self.s.timers.arm(Timer::Retry, self.now + backoff);
    }

    /// The leader, once its first checkpoint tells a rewind where its timeline began.
    fn rewind_source(&self) -> Option<Upstream> {
        let upstream = self.s.upstream()?;
        let (_, facts) = self.s.member(&upstream.name)?;
        (facts.checkpoint_after_promote != Some(false)).then_some(upstream)
    }
}
