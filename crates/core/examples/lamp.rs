//! The smallest bot: of all lamps in a scope, one is lit. Run several, kill the lit one, and another lights up.
//!
//! ```text
//! BOT_SCOPE=lamps BOT_NAME=a BOT_ETCD3_HOSTS=127.0.0.1:2379 cargo run -p bots-core --example lamp
//! ```

use std::ops::ControlFlow;

use bots_core::{
    dcs::{DcsAction, DcsEvent, Scope, View},
    leadership::Leadership,
    machine::{Deadline, Edge, Machine, Report, Span, Step, Time, TransitionTable},
    membership::{Membership, MembershipAction, MembershipChange, MembershipEvent},
    shell::{Assembled, Bot, Clock, Common, Context, DcsHandle, Events, Exit, Health, Shell, probe_instance, run},
    wire::{Kind, MemberHead},
};
use serde::{Deserialize, Serialize};

fn main() -> std::process::ExitCode {
    run::<Lamp>()
}

/// A lamp's brain.
#[derive(Debug)]
pub struct Lamp;

/// The nodes of the diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Role {
    /// No member key yet.
    Initializing,
    /// Another lamp is lit.
    Dark,
    /// This one is.
    Lit,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}

/// What a lamp knows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    role: Role,
    since: Time,
    api_url: String,
    view: View,
    membership: Membership,
    leadership: Leadership,
}

/// What can happen to a lamp.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// From the store.
    Dcs(DcsEvent),
    /// Who answers where our name is used.
    NameProbed(Option<String>),
    /// The deadline has passed.
    TimerFired,
    /// SIGTERM or SIGINT.
    ShutdownRequested,
}

/// What a lamp asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Ask the store.
    Dcs(DcsAction),
    /// Ask who answers there.
    ProbeName(String),
    /// End.
    Exit(Exit),
}

impl State {
    /// A lamp at rest.
    #[must_use]
    pub fn new(scope: &Scope, name: &str, instance: &str, api_url: &str) -> Self {
        Self {
            role: Role::Initializing,
            since: Time::ZERO,
            api_url: api_url.to_owned(),
            view: View::of([scope.prefix()]),
            membership: Membership::new(scope.clone(), name, instance, Span::from_secs(3)),
            leadership: Leadership::new(scope.leader(), name),
        }
    }

    fn change_role(&mut self, now: Time, to: Role) {
        if self.role != to {
            Lamp::TRANSITIONS.assert_allows(self.role, to);
            (self.role, self.since) = (to, now);
        }
    }

    fn member_value(&self) -> String {
        let head = MemberHead {
            kind: Kind::Edge,
            state: self.role.to_string(),
            role: String::from(if self.role == Role::Lit { "leader" } else { "member" }),
            version: String::from("1"),
            api_url: self.api_url.clone(),
            instance: self.membership.instance().to_owned(),
            node: self.role.to_string(),
            since_unix_ms: 0,
        };
        serde_json::to_string(&head).unwrap_or_default()
    }
}

impl Machine for Lamp {
    const KIND: &'static str = "lamp";
    const TRANSITIONS: TransitionTable<Role> = TransitionTable {
        initial: Role::Initializing,
        edges: &[
            Edge::new(Role::Initializing, Role::Dark, "joined"),
            Edge::new(Role::Dark, Role::Lit, "took the lock"),
            Edge::new(Role::Lit, Role::Dark, "lost the lock"),
            Edge::new(Role::Dark, Role::Initializing, "lost the lease"),
        ],
    };
    type State = State;
    type Event = Event;
    type Action = Action;
    type Role = Role;

    fn step(mut state: State, now: Time, event: Event) -> Step<State, Action> {
        let (mut out, mut asked, mut actions) = (Vec::new(), Vec::new(), Vec::new());
        let change = match &event {
            Event::Dcs(dcs) => {
                state.view.apply(dcs);
                let heard = MembershipEvent::Dcs(dcs.clone());
                let change = state.membership.on_event(now, &heard, &state.view, &mut out);
                state.leadership.on_event(now, dcs, &state.view, &state.membership);
                change
            }
            Event::NameProbed(instance) => {
                let heard = MembershipEvent::NameProbed { instance: instance.clone() };
                state.membership.on_event(now, &heard, &state.view, &mut out)
            }
            Event::TimerFired => {
                state.membership.advance(now, &mut out);
                None
            }
            Event::ShutdownRequested => {
                state.membership.leave(&mut out);
                actions.push(Action::Exit(Exit::clean("asked to end")));
                None
            }
        };
        let lit = state.leadership.fence(now, &state.membership).is_some();
        match change {
            Some(MembershipChange::Duplicate { api_url }) => {
                let message = format!("the name is taken by the lamp at {api_url}: choose another `name`");
                actions.push(Action::Exit(Exit::conflict(message)));
            }
            Some(MembershipChange::Lost(_)) => {
                if state.role == Role::Lit {
                    state.change_role(now, Role::Dark);
                }
                state.change_role(now, Role::Initializing);
            }
            Some(MembershipChange::Joined) if state.role == Role::Initializing => state.change_role(now, Role::Dark),
            Some(MembershipChange::Joined) | None => match (state.role, lit) {
                (Role::Dark, true) => state.change_role(now, Role::Lit),
                (Role::Lit, false) => state.change_role(now, Role::Dark),
                (Role::Dark, false) | (Role::Lit, true) | (Role::Initializing, _) => {}
            },
        }
        if !matches!(event, Event::ShutdownRequested) {
            if state.role == Role::Dark && state.view.is_complete() && state.leadership.looks_free(&state.view) {
                let State { leadership, membership, view, .. } = &mut state;
                leadership.acquire(now, membership, view, Vec::new(), &mut asked);
            }
            let value = state.member_value();
            state.membership.publish(now, value, &mut out);
        }
        let membership = out.into_iter().map(|action| match action {
            MembershipAction::Dcs(action) => Action::Dcs(action),
            MembershipAction::ProbeName { api_url } => Action::ProbeName(api_url),
        });
        let actions = membership.chain(asked.into_iter().map(Action::Dcs)).chain(actions).collect();
        Step { state, actions }
    }

    fn timer_fired() -> Event {
        Event::TimerFired
    }

    fn deadline(state: &State) -> Option<Deadline> {
        let valid = state.membership.valid_until().filter(|_| state.role == Role::Lit);
        Deadline::earliest([
            state.membership.deadline(),
            state.leadership.deadline(),
            valid.map(|at| Deadline { at, reason: String::from("the lease runs out") }),
        ])
    }

    fn role(state: &State) -> Role {
        state.role
    }

    fn report(state: &State, now: Time) -> Report {
        let mut report = Report::new(state.role, state.since, now).next(Self::deadline(state), now);
        report.troubles.extend(state.membership.trouble());
        match state.role {
            Role::Initializing => report.waiting_for("a lease"),
            Role::Dark => report.waiting_for("the lock").why_not("shine", "another lamp is lit"),
            Role::Lit => report.doing("shines"),
        }
    }

    fn invariants(state: &State) -> Result<(), String> {
        let held = state.leadership.is_held();
        if state.role == Role::Lit && !held { Err(String::from("lit without the lock")) } else { Ok(()) }
    }
}

/// A lamp's hands.
#[derive(Clone)]
pub struct Hands {
    dcs: DcsHandle,
    events: Events<Event>,
}

impl Shell for Hands {
    type Machine = Lamp;

    fn perform(&mut self, action: Action) -> ControlFlow<Exit> {
        match action {
            Action::Dcs(action) => self.dcs.perform(action),
            Action::ProbeName(api_url) => {
                let (events, ours) = (self.events.clone(), self.dcs.identity().clone());
                tokio::spawn(
                    async move { events.send(Event::NameProbed(probe_instance(&api_url, &ours).await)).await },
                );
            }
            Action::Exit(exit) => return ControlFlow::Break(exit),
        }
        ControlFlow::Continue(())
    }
}

/// A lamp's configuration.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    #[serde(flatten)]
    common: Common,
}

impl Bot for Lamp {
    const PROGRAM: &'static str = "lamp";
    const VERSION: &'static str = "1";
    type Config = Config;
    type Machine = Self;
    type Shell = Hands;

    fn common(config: &Config) -> &Common {
        &config.common
    }

    fn dcs_event(event: DcsEvent) -> Event {
        Event::Dcs(event)
    }

    fn shutdown_requested() -> Event {
        Event::ShutdownRequested
    }

    async fn assemble(config: Config, context: Context<Event>) -> Result<Assembled<Self>, Exit> {
        let scope = config.common.scope();
        let state = State::new(&scope, &config.common.name, &context.instance, &config.common.api_url());
        let hands = Hands { dcs: context.dcs, events: context.events.clone() };
        // The first step asks for a lease.
        context.events.send(Event::TimerFired).await;
        tracing::debug!(now = %Clock::now(), "assembled");
        Ok(Assembled::new(state, hands, vec![scope.prefix()], |state: &State, _now| Health {
            healthy: state.role == Role::Lit,
            alive: true,
            ready: state.role != Role::Initializing,
        }))
    }
}
