//! The postgres bot's machine: pure, total, deterministic. It decides everything and performs nothing.
//!
//! ```text
//!                      ┌────────────► waiting ◄──────────┐
//!                      │               │  │              │ clone failed
//!   initializing ──────┤ race won      │  └─► cloning ───┤
//!     │      │         ▼               ▼        │        │
//!     │      │    bootstrapping ◄──────┘        │ cloned │
//!     │      │         │ recorded               ▼        │
//!     │      └─────────┼───────────────────► starting ◄──┼──── rejoining ◄─┐
//!     │ lock is ours   │                        │ up     │        ▲        │
//!     ▼                ▼   promoted             ▼        │        │ stopped│
//!   recovering ────► primary ◄── promoting ◄─ candidate ◄─► replica        │
//!     ▲                │  │         └────────────────┬────────────────► demoting
//!     └── crashed ─────┘  └──── lock lost, fenced, switchover ─────────────┘
//!
//!   an operator's restart: replica ──► restarting ──► starting, primary ──► restarting ──► recovering
//!
//!   every role ──► stopping ──► (exit)
//! ```
//!
//! The exact edges are [`TRANSITIONS`]; `docs/machines/postgres.md` is drawn from them.

mod bootstrap;
mod copies;
mod demotion;
mod dynamic;
mod election;
mod event;
mod failsafe;
mod fence;
mod guard;
mod handover;
mod hung;
mod operator;
mod pause;
mod phase;
mod postgres;
mod primary;
mod promise;
mod quorum;
mod reinit;
mod rejoin;
mod release;
mod replica;
mod restart;
mod role;
mod roll;
mod settings;
mod share;
mod slots;
mod state;
mod synchrony;
mod takeover;
mod timelines;
mod turn;
mod vote;
mod watchdog;

use bots_core::machine::{Deadline, Machine, Report, Step, Time, TransitionTable};

use self::turn::Turn;
pub use self::{
    dynamic::{Dynamic, IN_DOUBT, STANDBY_NAMES},
    event::{
        Action, Ask, AskId, AskedId, Event, Job, JobError, JobId, JobResult, PeerAnswer, ProbeId, SlotChange, StopMode,
    },
    operator::{Answer, Command, CommandId, Refusal, Restart},
    postgres::{
        DataDir, Disk, LeaderSlot, LeaderSlots, Postgres, ReplicationSlot, Running, Server, SlotKind, Standby,
        Upstream, WaitsFor, Xid,
    },
    quorum::{Acks, Voters},
    role::{Role, TRANSITIONS},
    settings::{Live, RemoveData, Rules, Settings, TTL_DEFAULT, TTL_MIN, Tags, parameter_text},
    state::State,
    synchrony::BLOCKED,
    watchdog::{Watchdog, WatchdogMode, WatchdogOrder},
};

/// The postgres bot as a [`Machine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostgresBot;

impl Machine for PostgresBot {
    const KIND: &'static str = "postgres";
    const TRANSITIONS: TransitionTable<Role> = TRANSITIONS;

    type State = State;
    type Event = Event;
    type Action = Action;
    type Role = Role;

    fn step(state: State, now: Time, event: Event) -> Step<State, Action> {
        let mut turn = Turn::new(state, now);
        turn.take(event);
        turn.finish()
    }

    fn timer_fired() -> Event {
        Event::TimerFired
    }

    fn deadline(state: &State) -> Option<Deadline> {
        state.deadline()
    }

    fn role(state: &State) -> Role {
        state.role()
    }

    fn report(state: &State, now: Time) -> Report {
        share::report(state, now)
    }

    fn invariants(state: &State) -> Result<(), String> {
        state.invariants()
    }
}
