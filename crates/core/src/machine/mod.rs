//! The machine contract: a bot is a pure, total function from state and event to state and actions.
//!
//! A machine decides everything and performs nothing. The same machine runs under the real runtime
//! (`shell::runtime`), under the simulator (`bots-sim`) and under the transcript tests, and cannot tell them apart.

mod report;
mod time;
mod timers;
mod transitions;

use std::fmt::Debug;

pub use report::{Report, WhyNot};
use serde::Serialize;
pub use time::{Span, Time};
pub use timers::{Deadline, Timers};
pub use transitions::{Edge, RoleName, TransitionTable};

/// What one step yields: the state that follows and the actions to perform, in this order.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[must_use]
pub struct Step<S, A> {
    /// The state after the event.
    pub state: S,
    /// What the shell must do, strictly in this order. Long work is started by an action and ends as an event.
    pub actions: Vec<A>,
}

/// A bot's brain: synchronous, deterministic, total.
///
/// `step` takes every event in every state and returns no `Result`: a refusal is an action or a state. Time arrives as
/// an argument. Implementations assert that every change of role is declared in [`Machine::TRANSITIONS`].
pub trait Machine {
    /// The kind of bot, as it stands in the member key: `postgres`, `content`, `web`.
    const KIND: &'static str;
    /// Every edge the role may take, declared once: asserted at run time, explored in tests, drawn into the docs.
    const TRANSITIONS: TransitionTable<Self::Role>;

    /// Everything the bot knows. Plain data.
    type State: Clone + Debug + PartialEq + Serialize;
    /// Everything that can happen to it. Plain data, one closed enum.
    type Event: Clone + Debug + PartialEq + Serialize;
    /// Everything it can ask of the world. Plain data, idempotent.
    type Action: Clone + Debug + PartialEq + Serialize;
    /// The named node of the state diagram that a state is in.
    type Role: RoleName;

    /// The only place where anything is decided.
    fn step(state: Self::State, now: Time, event: Self::Event) -> Step<Self::State, Self::Action>;

    /// The event that the runtime feeds in when [`Machine::deadline`] has passed.
    fn timer_fired() -> Self::Event;

    /// The next moment at which the machine wants a step even if nothing happens, and why.
    fn deadline(state: &Self::State) -> Option<Deadline>;

    /// The node of the diagram.
    fn role(state: &Self::State) -> Self::Role;

    /// What am I, what do I wait for, since when, and why not the alternative.
    fn report(state: &Self::State, now: Time) -> Report;

    /// What must hold in every reachable state; checked after every step in tests and simulation.
    ///
    /// # Errors
    /// The sentence that names the broken invariant.
    fn invariants(state: &Self::State) -> Result<(), String>;
}
