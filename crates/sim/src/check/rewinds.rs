//! A rewind that is said to have ended well leaves data that follows: it is not copied anew for want of another try.

use std::collections::BTreeMap;

use postgres_bot::machine::{Action, Job, Role};

use super::{Check, Seen};
use crate::world::{NodeId, World};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rewind {
    Asked,
    /// It is said to have ended well.
    Ended,
    /// The server has come up on it.
    Up,
}

#[derive(Debug, Default)]
pub(super) struct Rewinds {
    last: BTreeMap<NodeId, Rewind>,
}

impl Check for Rewinds {
    fn requirement(&self) -> &'static str {
        "what was rewound well is not copied anew"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::PostgresStep { node, from, to, actions } => {
                let rewind = match (*from, *to, self.last.get(node)) {
                    (Role::Rejoining, Role::Starting, Some(_)) => Some(Rewind::Ended),
                    (Role::Starting, Role::Replica, Some(Rewind::Ended)) => Some(Rewind::Up),
                    (_, Role::Starting | Role::Replica | Role::Candidate | Role::Rejoining, last) => last.copied(),
                    (_, _any_other, _) => None,
                };
                match rewind {
                    Some(rewind) => _ = self.last.insert(*node, rewind),
                    None => _ = self.last.remove(node),
                }
                let rewinds = |action: &Action| matches!(action, Action::Run { job: Job::Rewind { .. }, .. });
                if actions.iter().any(rewinds) {
                    self.last.insert(*node, Rewind::Asked);
                }
                Ok(())
            }
            Seen::SetAside { node } => match self.last.remove(node) {
                Some(Rewind::Up) => Err(format!("{} gives rewound data up", world.nodes[node.0].name)),
                Some(Rewind::Asked | Rewind::Ended) | None => Ok(()),
            },
            Seen::Moment
            | Seen::Applied(_)
            | Seen::TimerFired { .. }
            | Seen::JobStarted { .. }
            | Seen::Writable { .. }
            | Seen::Response { .. } => Ok(()),
        }
    }
}
