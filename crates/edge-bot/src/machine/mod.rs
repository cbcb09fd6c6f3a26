//! The edge machine: keeps a proxy's servers as etcd says that they should be. Pure.
//!
//! ```text
//!                 no proxy answers              the proxy answers, etcd is watched
//!  initializing ──────────────────▶ starting ◀──────────────────────────────────▶ routing
//!       │                              ▲      the proxy is gone                    ▲ ▲ │
//!       │                              │                                           │ │ │
//!       │              proxy gone      │ proxy answers, etcd is not watched        │ │ │
//!       │                              ▼                  etcd is watched          │ │ │
//!       ├─ a proxy answers ─────────▶ keeping ◀────────────────────────────────────┘ │ ▼
//!       │                                               the watch is broken          │
//!       └─ a proxy answers, etcd is watched ─────────────────────────────────────────┘
//!
//!  keeping, routing ──▶ stopping (the proxy is to go with the bot) ──▶ stopped
//!  every node ──▶ stopped: asked to stop, or another live bot has our name
//! ```
//!
//! The truth is in two places: etcd says where connections should go, the proxy says where they do go. After every event
//! the machine compares the two and asks for what is missing; it remembers hardly anything, so a restarted bot that finds
//! all in order changes nothing. While etcd is not watched nothing is changed at all: the routes live on, and the proxy's
//! own health checks look after them.
//!
//! Files: `wanted` (what etcd asks for), `proxy` (what the proxy shows, and the conversation with it), `plan` (the
//! difference), `names` (host names to addresses), `standing` (what the primary is told), `state`, `report`.

#![warn(clippy::wildcard_enum_match_arm)]

mod names;
mod plan;
mod proxy;
mod report;
mod standing;
mod state;
mod wanted;

use std::net::IpAddr;

use bots_core::{
    dcs::{DcsAction, DcsEvent},
    machine::{Deadline, Edge, Machine, Report, Step, Time, TransitionTable},
};
use serde::{Deserialize, Serialize};

pub use self::{
    names::{RESOLVE_AGAIN, RESOLVE_RETRY},
    proxy::{
        Admin, BATCHES_MAX, Backend, HOLD_LOOK_INTERVAL, LOOK_INTERVAL, Look, PROVEN_AFTER, REPEAT_MAX, REPEAT_MIN,
        START_RETRY_MAX, Server, Snapshot, Started,
    },
    state::{HOLD_MAX, Settings, State},
    wanted::{WEIGHT_FULL, WEIGHT_STEP},
};

/// A node of the state diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Looks for a proxy that runs already.
    Initializing,
    /// No proxy runs: it is being started, or its operator is waited for.
    Starting,
    /// The proxy runs, and etcd does not say where to route: the routes stay as they are.
    Keeping,
    /// The proxy is kept as etcd says.
    Routing,
    /// Asked to stop, and the proxy with it.
    Stopping,
    /// The end.
    Stopped,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Initializing => "initializing",
            Self::Starting => "starting",
            Self::Keeping => "keeping",
            Self::Routing => "routing",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        })
    }
}

/// Ties the end of a conversation with the proxy to its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

/// What can happen to an edge bot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// From etcd.
    Dcs(DcsEvent),
    /// The bot that seems to hold our name was asked who it is.
    NameProbed {
        /// Its instance; nothing if nobody answered.
        instance: Option<String>,
    },
    /// A deadline has passed.
    TimerFired,
    /// An operator or the system wants the bot to end.
    ShutdownRequested,
    /// The proxy was looked at, after the commands of the job if it had any.
    ProxyObserved {
        /// The job of [`Action::ObserveProxy`] or [`Action::ApplyRoutes`].
        job: JobId,
        /// What was seen.
        look: Look,
    },
    /// The start of the proxy ended.
    ProxyStarted {
        /// The job of [`Action::StartProxy`].
        job: JobId,
        /// How.
        result: Started,
    },
    /// The process that was watched has ended.
    ProxyExited {
        /// The process.
        pid: u32,
    },
    /// A host name was looked up.
    HostResolved {
        /// The name.
        host: String,
        /// Its address; nothing if there is none, or no answer.
        address: Option<IpAddr>,
    },
}

/// One change of the proxy's servers. All are idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Let the server stand for this address, and ask for its health at that one.
    SetAddress {
        /// The server's place.
        place: Place,
        /// Where connections go.
        serve: std::net::SocketAddr,
        /// Where its health is asked for.
        check: std::net::SocketAddr,
    },
    /// Let it take connections, drain, or rest.
    SetAdmin {
        /// The server's place.
        place: Place,
        /// What it shall do.
        admin: Admin,
    },
    /// Give it this share of new connections.
    SetWeight {
        /// The server's place.
        place: Place,
        /// The share, relative to the other servers of the backend; up to 256.
        weight: u32,
    },
    /// Take it for healthy until its check says otherwise.
    SetUp {
        /// The server's place.
        place: Place,
    },
    /// End every session that it has.
    ShutSessions {
        /// The server's place.
        place: Place,
    },
}

/// A server's place in the proxy: a slot of the configuration that stands for different servers in the course of time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The backend.
    pub backend: Backend,
    /// The name of the slot in it.
    pub slot: String,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.backend, self.slot)
    }
}

/// What the machine asks of the world. All are idempotent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Ask etcd.
    Dcs(DcsAction),
    /// Ask the bot at this address who it is. Ends as [`Event::NameProbed`].
    ProbeName {
        /// The `api_url` that stands in our member key.
        api_url: String,
    },
    /// Look at the proxy. Ends as [`Event::ProxyObserved`], also when its deadline passes.
    ObserveProxy {
        /// Ties the end to the start.
        job: JobId,
    },
    /// Run these commands in this order, in one conversation, and then look. Ends as [`Event::ProxyObserved`], also when
    /// its deadline passes: then any number of the commands may have been run. What closes a route stands before what
    /// opens one.
    ApplyRoutes {
        /// Ties the end to the start.
        job: JobId,
        /// The commands.
        commands: Vec<Command>,
    },
    /// Start a proxy that outlives the bot. Ends as [`Event::ProxyStarted`].
    StartProxy {
        /// Ties the end to the start.
        job: JobId,
    },
    /// Say by [`Event::ProxyExited`] when this process ends.
    WatchProxy {
        /// The process.
        pid: u32,
    },
    /// Ask the process to finish its sessions and end.
    StopProxy {
        /// The process.
        pid: u32,
    },
    /// End the process now.
    KillProxy {
        /// The process.
        pid: u32,
    },
    /// Look up a host name. Ends as [`Event::HostResolved`].
    ResolveHost {
        /// The name.
        host: String,
    },
    /// End the bot. Always last.
    Exit {
        /// The exit code.
        code: u8,
        /// One line.
        message: String,
    },
}

/// The edge machine.
#[derive(Debug, Clone, Copy)]
pub struct EdgeMachine;

const EDGES: &[Edge<Role>] = &[
    Edge::new(Role::Initializing, Role::Starting, "no proxy answers"),
    Edge::new(Role::Initializing, Role::Keeping, "a proxy answers: adopted"),
    Edge::new(Role::Initializing, Role::Routing, "a proxy answers: adopted, etcd is known"),
    Edge::new(Role::Initializing, Role::Stopped, "asked to stop, or the name is another's"),
    Edge::new(Role::Starting, Role::Keeping, "the proxy answers"),
    Edge::new(Role::Starting, Role::Routing, "the proxy answers, etcd is known"),
    Edge::new(Role::Starting, Role::Stopped, "asked to stop, or the name is another's"),
    Edge::new(Role::Keeping, Role::Routing, "etcd is known"),
    Edge::new(Role::Keeping, Role::Starting, "the proxy is gone"),
    Edge::new(Role::Keeping, Role::Stopping, "asked to stop, and the proxy with it"),
    Edge::new(Role::Keeping, Role::Stopped, "asked to stop, or the name is another's"),
    Edge::new(Role::Routing, Role::Keeping, "the watch of etcd is broken"),
    Edge::new(Role::Routing, Role::Starting, "the proxy is gone"),
    Edge::new(Role::Routing, Role::Stopping, "asked to stop, and the proxy with it"),
    Edge::new(Role::Routing, Role::Stopped, "asked to stop, or the name is another's"),
    Edge::new(Role::Stopping, Role::Stopped, "the proxy has ended"),
];

impl Machine for EdgeMachine {
    const KIND: &'static str = "edge";
    const TRANSITIONS: TransitionTable<Role> = TransitionTable { initial: Role::Initializing, edges: EDGES };

    type State = State;
    type Event = Event;
    type Action = Action;
    type Role = Role;

    fn step(mut state: State, now: Time, event: Event) -> Step<State, Action> {
        let mut actions = Vec::new();
        if state.role() != Role::Stopped {
            state.take(now, event, &mut actions);
        }
        Step { state, actions }
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
        report::report(state, now)
    }

    fn invariants(state: &State) -> Result<(), String> {
        state.invariants()
    }
}
