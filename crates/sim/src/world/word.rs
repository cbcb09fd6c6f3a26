//! What members ask of each other in failsafe mode, on its way between them.

use std::collections::BTreeMap;

use bots_core::machine::Span;
use postgres_bot::machine::{Ask, AskId, AskedId, Event};

use super::{BotEvent, Item, NodeId, World};
use crate::plant::Plant;

/// A question on its way, or its answer.
#[derive(Debug, Clone)]
pub struct Question {
    from: NodeId,
    life: u64,
    id: AskId,
    /// Who is asked.
    pub member: NodeId,
    /// What.
    pub ask: Ask,
}

/// All questions without an answer.
#[derive(Debug, Default)]
pub struct Questions {
    count: u64,
    open: BTreeMap<u64, Question>,
}

impl Questions {
    /// The question that a member answers.
    #[must_use]
    pub fn get(&self, id: AskedId) -> Option<&Question> {
        self.open.get(&id.0)
    }
}

impl World {
    /// A bot asks members, each by itself.
    pub(crate) fn ask_members(
        &mut self,
        node: NodeId,
        id: AskId,
        ask: &Ask,
        members: &BTreeMap<String, String>,
        deadline: Span,
    ) {
        for (name, url) in members {
            let Some(member) = self.host_in(url) else { continue };
            self.questions.count += 1;
            let serial = self.questions.count;
            let life = self.nodes[node.0].life;
            self.questions.open.insert(serial, Question { from: node, life, id, member, ask: ask.clone() });
            let silence = Err(format!("{name} does not answer"));
            self.after(deadline, Item::Word { serial, answer: silence });
            let delay = self.peer_delay();
            let unasked = match ask {
                Ask::Lead { .. } => self.plant == Some(Plant::PromiseByShell),
                Ask::Stand { .. } => self.plant == Some(Plant::CandidateDoesNotAsk),
            };
            if unasked {
                self.after(delay, Item::Word { serial, answer: Ok(()) });
            } else if self.network.peers_meet(node, member) && self.nodes[member.0].brain.is_some() {
                let event = Event::MemberAsked { id: AskedId(serial), ask: ask.clone() };
                self.tell(member, delay, BotEvent::Postgres(event));
            }
        }
    }

    /// A member has answered.
    pub(crate) fn answer_member(&mut self, node: NodeId, id: AskedId, answer: Result<(), String>) {
        let Some(question) = self.questions.get(id) else { return };
        if self.network.peers_meet(node, question.from) {
            let delay = self.peer_delay();
            self.after(delay, Item::Word { serial: id.0, answer });
        }
    }

    /// The answer, or the end of the patience.
    pub(super) fn word(&mut self, serial: u64, answer: Result<(), String>) {
        let Some(question) = self.questions.open.remove(&serial) else { return };
        let answer = if self.plant == Some(Plant::SilenceIsYes) { Ok(()) } else { answer };
        if self.nodes[question.from.0].life == question.life {
            let member = self.nodes[question.member.0].name.clone();
            let event = Event::MemberAnswered { id: question.id, member, answer };
            self.tell(question.from, Span::ZERO, BotEvent::Postgres(event));
        }
    }
}
