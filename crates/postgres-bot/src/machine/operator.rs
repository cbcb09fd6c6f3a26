//! What operators ask of this member alone: restart the server now or later, make its data anew, take its configuration in
//! again. Every wish is a command with a number; its answer bears the same number, and the last few are kept to be read.

use bots_core::{
    machine::Span,
    wire::{CopyProgress, ScheduledRestart},
};
use serde::{Deserialize, Serialize};

use super::{phase::Suspect, settings::Live, state::State, turn::Turn};

/// So many answers are kept for those who asked; an operator reads his at once.
const ANSWERS_MAX: usize = 16;

/// Ties an answer to its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CommandId(pub u64);

/// A wish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Restart the server, at once or when its time has come.
    Restart(Restart),
    /// Forget the restart that a time was set for.
    DropRestart,
    /// Throw the data away and copy it anew.
    Reinitialize {
        /// Also in the middle of something else.
        force: bool,
        /// From the leader, whatever member is there to be copied from.
        from_leader: bool,
    },
    /// Go by these settings, as far as they can change in a bot that runs.
    Reload(Live),
}

/// A restart, with what must hold for it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Restart {
    /// The conditions and the time as the operator wrote them.
    pub wish: ScheduledRestart,
    /// When: milliseconds since 1970; at once if there is none.
    pub at_unix_ms: Option<u64>,
    /// Only a server older than this, as Postgres counts its versions.
    pub below_version: Option<u32>,
}

/// What became of a wish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done, or well begun.
    Done(String),
    /// It will be done when its time has come.
    Scheduled,
    /// It will not.
    Refused(Refusal, String),
}

/// Why a wish is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Not now, or not here.
    Unfit,
    /// It was tried and failed.
    Failed,
    /// A time is set for another restart already.
    AlreadyScheduled,
    /// No restart has a time set for it.
    NothingScheduled,
    /// The cluster is paused.
    Paused,
}

/// What operators have asked for, as far as it is not at its end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Operator {
    /// The youngest last.
    answers: Vec<(CommandId, Answer)>,
    /// The restart under way.
    pub(super) restart: Option<Ongoing>,
    /// The restart that waits for its time.
    pub(super) scheduled: Option<Restart>,
    /// The data is to be made anew.
    pub(super) reinit: Option<Reinit>,
    /// How far the copy is.
    pub(super) copying: Option<CopyProgress>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Ongoing {
    /// Who waits for it.
    pub(super) id: Option<CommandId>,
    /// How long the start may take.
    pub(super) timeout: Span,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reinit {
    pub(super) from_leader: bool,
    /// The data as it was, until it is touched: the way back if nobody is left to copy.
    pub(super) before: Option<(Suspect, u32)>,
}

impl State {
    /// The answer to a command, if there is one yet.
    #[must_use]
    pub fn answer(&self, id: CommandId) -> Option<&Answer> {
        self.operator.answers.iter().find(|(of, _)| *of == id).map(|(_, answer)| answer)
    }

    /// The restart that waits for its time.
    pub(super) fn scheduled_restart(&self) -> Option<&ScheduledRestart> {
        self.operator.scheduled.as_ref().map(|restart| &restart.wish)
    }

    /// The server is down, or on its way down or up, on an operator's word.
    #[must_use]
    pub const fn is_restarting(&self) -> bool {
        self.operator.restart.is_some()
    }

    /// The data is to be made anew on an operator's word.
    pub(super) const fn is_reinitializing(&self) -> bool {
        self.operator.reinit.is_some()
    }

    /// The data is being made anew on an operator's word.
    #[must_use]
    pub const fn is_remade(&self) -> bool {
        self.is_reinitializing()
    }

    /// The copy shall come from the leader and nobody else.
    pub(super) fn copies_leader_only(&self) -> bool {
        self.operator.reinit.as_ref().is_some_and(|reinit| reinit.from_leader)
    }

    /// Data that is given up, after a rewind that failed or without one, is deleted: an operator allows it.
    pub(super) fn may_remove_data(&self, rewind_failed: bool) -> bool {
        let leave = self.settings.remove_data.or(self.dynamic.remove_data);
        self.is_reinitializing() || leave.allows(rewind_failed)
    }
}

impl Turn {
    pub(super) fn take_command(&mut self, id: CommandId, command: Command) {
        let answer = match command {
            Command::Restart(restart) if restart.at_unix_ms.is_some() => Some(self.schedule(restart)),
            Command::Restart(restart) => self.begin_restart(Some(id), &restart).err(),
            Command::DropRestart => Some(match self.s.operator.scheduled.take() {
                Some(_) => Answer::Done(String::from("scheduled restart deleted")),
                None => Answer::Refused(Refusal::NothingScheduled, String::from("no restarts are scheduled")),
            }),
            Command::Reinitialize { force, from_leader } => Some(self.reinitialize(force, from_leader)),
            Command::Reload(live) => {
                self.s.settings.go_by(live);
                Some(Answer::Done(String::from("reload scheduled")))
            }
        };
        if let Some(answer) = answer {
            self.answer(id, answer);
        }
    }

    pub(super) fn answer(&mut self, id: CommandId, answer: Answer) {
        let answers = &mut self.s.operator.answers;
        answers.push((id, answer));
        let surplus = answers.len().saturating_sub(ANSWERS_MAX);
        answers.drain(..surplus);
    }
}
