//! The runtime of every bot: next event, step, check, perform, arm the timer. As `bots_core::shell::runtime` does it.

use bots_core::{
    machine::{Deadline, Machine, Span, Step, Time},
    wire::Kind,
};
use content_bot::machine::ContentMachine;
use postgres_bot::machine::PostgresBot;
use web_bot::machine::WebMachine;

use super::{BotEvent, Brain, Item, NodeId, World};
use crate::{
    check::{Seen, Violation},
    plant::{self, Plant},
};

/// A timer that has fired is not armed again before this.
const TIMER_PAUSE_MIN: Span = Span::from_millis(5);

/// A bot that takes itself to be this much older than it is waits for nothing that it may have promised before.
const FORGOTTEN: Span = Span::from_secs(6);

/// What a step leaves behind beside the state.
struct Turned<M: Machine> {
    state: M::State,
    actions: Vec<M::Action>,
    from: M::Role,
    to: M::Role,
    deadline: Option<Deadline>,
    broken: Option<String>,
}

fn turn<M: Machine>(state: M::State, now: Time, event: M::Event) -> Turned<M> {
    let from = M::role(&state);
    let Step { state, actions } = M::step(state, now, event);
    let to = M::role(&state);
    let (deadline, broken) = (M::deadline(&state), M::invariants(&state).err());
    Turned { state, actions, from, to, deadline, broken }
}

impl World {
    /// What the clock of a machine shows.
    pub(crate) fn local(&self, node: NodeId) -> Time {
        self.nodes[node.0].clock.local(self.now)
    }

    /// A bot is told something; it looks at it when it gets to it, in order.
    pub(super) fn step(&mut self, node: NodeId, event: BotEvent) {
        self.nodes[node.0].inbox.push_back(event);
        while self.nodes[node.0].busy_until <= self.now
            && let Some(event) = self.nodes[node.0].inbox.pop_front()
        {
            self.step_now(node, event);
            self.maybe_stall(node);
        }
    }

    /// Now and then a bot gets no processor for a while.
    fn maybe_stall(&mut self, node: NodeId) {
        if self.is_healed() || !self.rng.chance(self.plan.stalls) {
            return;
        }
        let stall = self.rng.span(1, 120);
        let (until, life) = (self.now + stall, self.nodes[node.0].life);
        self.nodes[node.0].busy_until = until;
        let event = BotEvent::timer(self.nodes[node.0].kind);
        self.at(until, Item::Event { node, life, event });
    }

    pub(super) fn timer(&mut self, node: NodeId, armed: u64) {
        let n = &mut self.nodes[node.0];
        if n.armed != armed || n.brain.is_none() {
            return;
        }
        if n.busy_until > self.now {
            let (at, life) = (n.busy_until, n.life);
            return self.at(at, Item::Timer { node, life, armed });
        }
        n.timer = None;
        n.fired = Some(self.now);
        let event = BotEvent::timer(n.kind);
        self.see(&Seen::TimerFired { node });
        self.step(node, event);
    }

    fn step_now(&mut self, node: NodeId, event: BotEvent) {
        let leads = self.nodes[node.0].postgres_state().is_some_and(|state| state.leadership().is_held());
        let mut now = self.local(node);
        if self.plant == Some(Plant::PromiseForgotten) && self.nodes[node.0].stepped != self.nodes[node.0].life {
            now = now - FORGOTTEN;
        }
        self.nodes[node.0].stepped = self.nodes[node.0].life;
        let event = plant::alter_event(self.plant, leads, event);
        let Some(brain) = self.nodes[node.0].brain.take() else { return };
        self.trace.mix(self.now.as_millis() ^ (u64::try_from(node.0).unwrap_or(0) << 56));
        match (brain, event) {
            (Brain::Postgres(state), BotEvent::Postgres(event)) => {
                self.say_event(node, &event);
                let turned = turn::<PostgresBot>(*state, now, event);
                let path: Vec<_> = std::iter::once(turned.from).chain(turned.state.passed().iter().copied()).collect();
                let actions = self.turned(node, &turned, &path);
                self.nodes[node.0].brain = Some(Brain::Postgres(Box::new(turned.state)));
                self.arm(node, turned.deadline);
                let mut actions = plant::alter_actions(self, node, turned.from, actions);
                let dies = self.cut_short(&mut actions);
                self.see(&Seen::PostgresStep { node, from: turned.from, to: turned.to, actions: &actions });
                for action in actions {
                    self.perform_postgres(node, action);
                }
                self.end_if(node, dies);
            }
            (Brain::Content(state), BotEvent::Content(event)) => {
                self.say_event(node, &event);
                let turned = turn::<ContentMachine>(*state, now, event);
                let path = [turned.from, turned.to];
                let mut actions = self.turned(node, &turned, &path);
                self.nodes[node.0].brain = Some(Brain::Content(Box::new(turned.state)));
                self.arm(node, turned.deadline);
                let dies = self.cut_short(&mut actions);
                for action in actions {
                    self.perform_content(node, action);
                }
                self.end_if(node, dies);
            }
            (Brain::Web(state), BotEvent::Web(event)) => {
                self.say_event(node, &event);
                let turned = turn::<WebMachine>(*state, now, event);
                let path = turned.state.path().to_vec();
                let mut actions = self.turned(node, &turned, &path);
                self.nodes[node.0].brain = Some(Brain::Web(Box::new(turned.state)));
                self.arm(node, turned.deadline);
                let dies = self.cut_short(&mut actions);
                for action in actions {
                    self.perform_web(node, action);
                }
                self.end_if(node, dies);
            }
            (brain, event) => unreachable!("{brain:?} is told {event:?}"),
        }
    }

    /// Now and then a bot dies between two actions of a step: leaves those that it comes to, and says whether it does.
    fn cut_short<A>(&mut self, actions: &mut Vec<A>) -> bool {
        if actions.is_empty() || !self.happens(self.plan.cut_short) {
            return false;
        }
        let most = u64::try_from(actions.len()).unwrap_or(u64::MAX);
        let done = usize::try_from(self.rng.below(most)).unwrap_or(0);
        self.say(format_args!("only the first {done} of {most} actions are carried out"));
        actions.truncate(done);
        true
    }

    fn end_if(&mut self, node: NodeId, dies: bool) {
        if dies {
            self.kill_bot(node);
        }
    }

    fn say_event(&mut self, node: NodeId, event: &impl std::fmt::Debug) {
        if self.trace.is_kept() {
            let name = self.nodes[node.0].name.clone();
            let text: String = format!("{event:?}").chars().take(220).collect();
            self.say(format_args!("{name} < {text}"));
        }
    }

    /// Takes note of a step: edges, invariants, the record.
    fn turned<M: Machine>(&mut self, node: NodeId, turned: &Turned<M>, path: &[M::Role]) -> Vec<M::Action> {
        for pair in path.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            if !M::TRANSITIONS.allows(from, to) {
                self.broken(Violation::edge(M::KIND, &from.to_string(), &to.to_string()));
            }
            if from != to {
                self.coverage.took(M::KIND, from, to);
            }
        }
        if self.trace.is_kept() {
            let name = self.nodes[node.0].name.clone();
            if turned.from != turned.to {
                self.say(format_args!("{name}   {} -> {}", turned.from, turned.to));
            }
            for action in &turned.actions {
                let text: String = format!("{action:?}").chars().take(220).collect();
                self.say(format_args!("{name} > {text}"));
            }
        }
        if let Some(broken) = &turned.broken {
            let name = self.nodes[node.0].name.clone();
            self.broken(Violation::invariant(&name, broken));
        }
        turned.actions.clone()
    }

    fn arm(&mut self, node: NodeId, deadline: Option<Deadline>) {
        let n = &mut self.nodes[node.0];
        let Some(deadline) = deadline else {
            n.timer = None;
            n.armed += 1;
            return;
        };
        if n.timer == Some(deadline.at) {
            return;
        }
        n.timer = Some(deadline.at);
        n.armed += 1;
        let earliest = n.fired.map_or(Time::ZERO, |at| at + TIMER_PAUSE_MIN);
        let (life, armed, at) = (n.life, n.armed, n.clock.global(deadline.at).max(earliest));
        // Timers are never early and often a little late.
        let late = self.rng.span(0, 3);
        self.at(at.max(self.now) + late, Item::Timer { node, life, armed });
    }

    /// The first deadline of a bot that has just been started.
    pub(super) fn arm_first(&mut self, node: NodeId) {
        let deadline = match &self.nodes[node.0].brain {
            Some(Brain::Postgres(state)) => PostgresBot::deadline(state),
            Some(Brain::Content(state)) => ContentMachine::deadline(state),
            Some(Brain::Web(state)) => WebMachine::deadline(state),
            None => None,
        };
        self.arm(node, deadline);
    }

    /// Every bot says what it does and what it waits for, as `botctl why` would show it.
    pub(super) fn say_reports(&mut self) {
        for node in self.ids() {
            let now = self.local(node);
            let report = match &self.nodes[node.0].brain {
                Some(Brain::Postgres(state)) => PostgresBot::report(state, now),
                Some(Brain::Content(state)) => ContentMachine::report(state, now),
                Some(Brain::Web(state)) => WebMachine::report(state, now),
                None => continue,
            };
            let name = self.nodes[node.0].name.clone();
            self.say(format_args!("{name} says {report:?}"));
        }
        for kv in self.store.list("/") {
            self.say(format_args!("etcd has {} = {} ({})", kv.key, kv.value, kv.modified.0));
        }
    }

    /// Asks the bot that answers at `api_url` who it is.
    pub(crate) fn probe_name(&mut self, node: NodeId, api_url: &str) {
        let found = self.host_in(api_url).filter(|peer| self.network.peers_meet(node, *peer));
        let instance = found.map(|peer| &self.nodes[peer.0]).filter(|n| n.bot_moves()).map(|n| n.instance.clone());
        let delay = if instance.is_some() { self.rng.span(1, 50) } else { Span::from_secs(1) };
        let kind: Kind = self.nodes[node.0].kind;
        self.tell(node, delay, BotEvent::name_probed(kind, instance));
    }
}
