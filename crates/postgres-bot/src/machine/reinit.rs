//! A member's data made anew on an operator's word: it is deleted only while there is somebody to copy, and kept if he goes
//! before that.

use bots_core::wire::CopyProgress;

use super::{
    event::{Action, Job},
    operator::{Answer, Refusal, Reinit},
    phase::{Phase, Suspect},
    state::Timer,
    turn::Turn,
};

impl Turn {
    /// Throws the data away for a new copy, if there is somebody to copy.
    pub(super) fn reinitialize(&mut self, force: bool, from_leader: bool) -> Answer {
        let refuse = |why: String| Answer::Refused(Refusal::Unfit, why);
        let Some(leader) = self.s.leader().map(str::to_owned) else {
            return refuse(String::from("Cluster has no leader, can not reinitialize"));
        };
        if leader == self.s.settings.name || self.s.leadership.is_held() {
            return refuse(String::from("I am the leader, can not reinitialize"));
        }
        if !self.s.view.is_watched() || self.s.upstream().is_none() {
            return refuse(format!("{leader} leads and takes no connections yet, can not reinitialize"));
        }
        let busy = self.s.is_reinitializing() || matches!(self.s.phase, Phase::Cloning { .. });
        if busy && !force {
            return refuse(String::from("reinitialize already in progress"));
        }
        let before = match self.s.phase {
            Phase::Replica { .. } | Phase::Starting { .. } => Some((Suspect::No, 0)),
            Phase::Rejoining { suspect, failures } => Some((suspect, failures)),
            Phase::Waiting | Phase::Cloning { .. } => None,
            Phase::Initializing
            | Phase::Bootstrapping(_)
            | Phase::Candidate(_)
            | Phase::Promoting { .. }
            | Phase::Primary(_)
            | Phase::Restarting { .. }
            | Phase::Recovering { .. }
            | Phase::Demoting { .. }
            | Phase::Stopping { .. } => {
                return refuse(format!("the member is {}, can not reinitialize", self.s.role()));
            }
        };
        // A rewind that is cut off leaves nothing to go back to.
        let rewinding = self.s.job.as_ref().is_some_and(|running| matches!(running.job, Job::Rewind { .. }));
        let before = if busy || rewinding { None } else { before };
        self.s.operator.reinit = Some(Reinit { from_leader, before });
        if matches!(self.s.phase, Phase::Cloning { .. }) {
            self.clone_over();
        } else if !matches!(self.s.phase, Phase::Waiting) {
            // One that waits is about to be copied anyway.
            self.give_data_up();
        }
        Answer::Done(String::from("reinitialize started"))
    }

    fn give_data_up(&mut self) {
        let hopeless = Phase::Rejoining { suspect: Suspect::Hopeless, failures: 0 };
        if matches!(self.s.phase, Phase::Rejoining { .. }) {
            self.s.phase = hopeless;
        } else {
            self.become_phase(hopeless);
        }
        self.s.timers.disarm(Timer::Retry);
        if self.s.job.is_some() || self.s.postgres.is_alive() {
            let mode = self.stop_at_once();
            self.stop_once_released(mode);
        }
    }

    /// A copy that is under way is given up for another.
    fn clone_over(&mut self) {
        if let Some(running) = self.s.job.take() {
            self.out.push(Action::Cancel { id: running.id });
        }
        self.s.data = None;
        self.become_phase(Phase::Waiting);
        self.inspect();
    }

    /// The data is touched now: there is no way back.
    pub(super) fn commit_to_reinit(&mut self) {
        if let Some(reinit) = &mut self.s.operator.reinit {
            reinit.before = None;
        }
    }

    /// Nobody is left to copy before the data was touched: it is kept, and goes on as what it was.
    pub(super) fn give_reinit_up(&mut self) -> bool {
        let Some(Reinit { before: Some((suspect, failures)), .. }) = self.s.operator.reinit else { return false };
        self.s.operator.reinit = None;
        self.s.trouble = Some(String::from("the data was not made anew: nobody leads who could be copied"));
        self.s.phase = Phase::Rejoining { suspect, failures };
        true
    }

    /// The copy is there.
    pub(super) fn reinit_done(&mut self) {
        self.s.operator.reinit = None;
        self.s.operator.copying = None;
    }

    /// The copy comes on.
    pub(super) fn copy_progressed(&mut self, bytes_done: u64, bytes_total: u64) {
        if matches!(self.s.phase, Phase::Cloning { .. }) {
            let percent = (bytes_done.saturating_mul(100)).checked_div(bytes_total).unwrap_or(0).min(100);
            self.s.operator.copying = Some(CopyProgress { bytes_done, bytes_total, percent });
        }
    }
}
