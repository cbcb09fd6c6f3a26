//! The cluster's pause: the bots look on. Nobody takes the lead, and no server is started, stopped, rewound or copied over,
//! but on an operator's word. What keeps two servers from taking writes is never paused.

use serde::Serialize;

use super::{event::Action, phase::Phase, turn::Turn};

/// What a pause must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Pause {
    /// The server ended by itself in a pause: it is left so until the pause ends, or an operator restarts it.
    pub(super) left_down: bool,
    /// This member led last, as far as it knows: it may take back what it lost, for nobody else may take it.
    pub(super) led_last: bool,
}

impl Turn {
    /// The server of a primary has ended in a pause: it is not ours to start again, and the lock is of no use without it.
    pub(super) fn rests_in_pause(&mut self, how: &str) -> bool {
        if !self.s.dynamic.pause {
            return false;
        }
        self.s.pause.left_down = true;
        self.unfit(&format!("Postgres ended while the cluster is paused, and is left so until a restart: {how}"));
        true
    }

    /// The process was asked to stop in a pause, which is how a bot is replaced by another version of it: no server is stopped, no
    /// lock, lease or key given back. The next life of the bot takes the server over as it runs; until then its guard
    /// has it. What is neither a primary nor a replica at this moment is stopped as ever. Says whether it has left.
    pub(super) fn leaves_server_in_pause(&mut self) -> bool {
        let settled = matches!(self.s.phase, Phase::Primary(_) | Phase::Replica { .. });
        if !self.s.dynamic.pause || !settled || !self.s.postgres.is_alive() {
            return false;
        }
        self.s.exited = true;
        let message = String::from("stopped in a pause of the cluster: Postgres runs on in the care of its guard");
        self.out.push(Action::Exit { code: 0, message });
        true
    }

    /// Keeps the pause's knowledge up to date.
    pub(super) fn note_pause(&mut self) {
        if !self.s.dynamic.pause {
            self.s.pause.left_down = false;
        }
        let me = self.s.settings.name.as_str();
        match self.s.leader() {
            Some(leader) if leader == me => self.s.pause.led_last = true,
            Some(_another) => self.s.pause.led_last = false,
            None => {}
        }
    }
}
