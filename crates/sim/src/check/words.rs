//! A member's word holds: who vouches for a primary supports no candidate and does not stand while that is worth anything, and
//! who supports a candidate vouches for no other. Looked at from outside, so that no restart forgets it.

use std::collections::BTreeMap;

use bots_core::{
    dcs::DcsAction,
    machine::{Span, Time},
};
use postgres_bot::machine::{Action, Ask, Role};

use super::{Check, Seen};
use crate::{
    plant::takes_lock,
    world::{NodeId, World},
};

/// What the machines promise, less what clocks may run apart meanwhile.
const PROMISE: Span = Span::from_millis(5_000 - 10);
/// The same of support.
const SUPPORT: Span = Span::from_millis(2_000 - 5);

#[derive(Debug, Default)]
pub(super) struct Words {
    promised: BTreeMap<NodeId, (String, Time)>,
    supports: BTreeMap<NodeId, (String, Time)>,
}

impl Check for Words {
    fn requirement(&self) -> &'static str {
        "a member that vouches for a primary lets nobody be elected, and the other way round"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::PostgresStep { node, to, actions, .. } = seen else { return Ok(()) };
        let (now, name) = (world.now, &world.nodes[node.0].name);
        let promised = self.promised.get(node).filter(|(_, until)| now < *until).map(|(to, _)| to.clone());
        for action in *actions {
            match action {
                Action::AnswerMember { id, answer: Ok(()) } => match world.questions.get(*id).map(|asked| &asked.ask) {
                    Some(Ask::Lead { leader, .. }) => {
                        let supports = self.supports.get(node).filter(|(_, until)| now < *until);
                        if let Some((other, _)) = supports.filter(|(other, _)| other != leader) {
                            return Err(format!("{name} vouches for {leader}, and supports {other}"));
                        }
                        self.promised.insert(*node, (leader.clone(), now + PROMISE));
                    }
                    Some(Ask::Stand { candidate }) => {
                        if let Some(leader) = &promised {
                            return Err(format!("{name} supports {candidate}, and has vouched for {leader}"));
                        }
                        self.supports.insert(*node, (candidate.clone(), now + SUPPORT));
                    }
                    None => {}
                },
                Action::Dcs(DcsAction::Transact { transaction, .. })
                    if *to == Role::Candidate && takes_lock(transaction) =>
                {
                    if let Some(leader) = &promised {
                        return Err(format!("{name} stands for leader, and has vouched for {leader}"));
                    }
                }
                _any_other => {}
            }
        }
        Ok(())
    }
}
