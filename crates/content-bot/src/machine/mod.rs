//! The content machine: many bots watch over one site, one of them at a time looks at git and publishes. Pure.
//!
//! ```text
//!                 name is ours              lock won: nothing on its way
//!  initializing ───────────────▶ follower ───────────────────────────────▶ watching ◀──────────┐
//!                                ▲ ▲ │ │                                    │  ▲  │            │
//!                   joined again │ │ │ │ lock won: a needed       ref moved │  │  │ commit is   │ live moved,
//!                                │ │ │ │ commit is not here                ▼  │  │ here        │ or withdrawn
//!                                │ │ │ └──────────────────────────────▶ fetching │            │
//!                                │ │ │                                   ▲  │    │            │
//!                         detached │ │ lock won: in the middle  newer one │  │    │            │
//!                             ▲    │ │ of a publication         is fetched│  ▼    ▼            │
//!                             │    │ └─────────────────────────────────▶ preparing ────────────┘
//!       lease may have run out│    │ lock lost
//!                             └────┴── watching, fetching, preparing
//!
//!  every node ──▶ stopped: asked to stop; initializing, detached ──▶ stopped: another live bot has our name
//! ```
//!
//! The truth is in etcd: `revision/candidate` and `revision/live`. The machine looks at it after every event and does
//! what is missing, so a new leader goes on in the middle of a publication. Every change is one transaction under the
//! leader's lock. Nothing is published that this bot does not hold whole and verified.

#![warn(clippy::wildcard_enum_match_arm)]

mod backoff;
mod canary;
mod export;
mod flip;
mod follower;
mod leader;
mod mirror;
mod operator;
mod origin;
mod publication;
mod purge;
mod push;
mod report;
mod state;

use bots_core::{
    dcs::{DcsAction, DcsEvent},
    machine::{Deadline, Edge, Machine, Report, Step, Time, TransitionTable},
};
use serde::{Deserialize, Serialize};

pub use self::{
    backoff::{BACKOFF_MAX, BACKOFF_MIN},
    canary::{CANARY_EVERY, CanarySettings, FAILOVER_SHOWS, LOSSES_MAX},
    export::{ExportSettings, Trees},
    flip::Flipped,
    mirror::{Commit, DOUBTS_MAX, KEPT_MAX},
    origin::{LOOK_SPACING, MISSED_GRACE, Reference},
    publication::{HISTORY_MAX, QUARANTINE_MAX},
    purge::{PURGE_ROUNDS, PurgeSettings},
    push::{Announcement, DELIVERIES_MAX, REPLAY_WINDOW},
    state::{Settings, State},
};

/// A node of the state diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads etcd and takes its name.
    Initializing,
    /// Another bot leads, or the lock is being asked for. Serves the packs that it holds.
    Follower,
    /// Leads; nothing is on its way: waits for a push or for the next look at the origin.
    Watching,
    /// Leads; a commit is being fetched and verified.
    Fetching,
    /// Leads; a candidate is posted and the web bots prepare it.
    Preparing,
    /// The lease may have run out: decides nothing until etcd answers again. Serves the packs that it holds.
    Detached,
    /// The end.
    Stopped,
}

impl Role {
    /// Whether a bot in this role acts under the lock.
    #[must_use]
    pub const fn leads(self) -> bool {
        matches!(self, Self::Watching | Self::Fetching | Self::Preparing)
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Initializing => "initializing",
            Self::Follower => "follower",
            Self::Watching => "watching",
            Self::Fetching => "fetching",
            Self::Preparing => "preparing",
            Self::Detached => "detached",
            Self::Stopped => "stopped",
        })
    }
}

/// Ties the end of long work to its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

/// What can happen to a content bot.
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
    /// A push notification came in and passed its checks. A hint: it says when to look, not what to publish.
    PushReceived(Announcement),
    /// A look at the origin ended.
    Polled {
        /// The job of [`Action::PollOrigin`].
        job: JobId,
        /// How.
        result: PollResult,
    },
    /// A fetch ended.
    FetchEnded {
        /// The job of [`Action::FetchCommit`].
        job: JobId,
        /// Everything that the mirror holds whole after the job, oldest first.
        holds: Vec<Commit>,
        /// How.
        result: FetchResult,
    },
    /// A commit that the mirror held turned out to be damaged when it was read.
    CommitDamaged {
        /// The commit.
        sha: String,
    },
    /// The pages of the canary were read once.
    CanaryRead {
        /// The job of [`Action::ReadCanary`].
        job: JobId,
        /// How many pages were asked for.
        asked: u64,
        /// How many of them were not given, or not well.
        failed: u64,
        /// What was wrong with one of them.
        why: Option<String>,
    },
    /// The work on an exported tree ended.
    TreeExported {
        /// The job of [`Action::ExportTree`].
        job: JobId,
        /// What went wrong, if anything: the link is as it was.
        result: Result<(), String>,
    },
    /// Those who are to know of an exported tree were told.
    ToldOfTree {
        /// The job of [`Action::TellOfTree`].
        job: JobId,
        /// What went wrong, if anything: all are told again.
        result: Result<(), String>,
    },
    /// A round of purging ended.
    Purged {
        /// The job of [`Action::PurgeCaches`].
        job: JobId,
        /// What went wrong, if anything: the round is done again.
        result: Result<(), String>,
    },
}

/// What a look at the origin saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PollResult {
    /// The reference points at this commit; an annotated tag is peeled.
    Found {
        /// The commit: pinned from now on, never resolved again.
        sha: String,
    },
    /// The origin answered, and has no such reference.
    Missing,
    /// The origin did not answer, or not in a way that we can use.
    Failed {
        /// One line.
        why: String,
    },
}

/// How a fetch ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FetchResult {
    /// The commit is in the mirror, whole and verified, and is kept there.
    Complete,
    /// The commit breaks a rule for content: too large, incomplete, or a path that leaves the site.
    Unfit {
        /// One line: what is wrong and how to mend it.
        reason: String,
    },
    /// The commit seems to be unfit, but what was asked could answer otherwise another time: a submodule that is pushed a
    /// moment later, a check that was too slow on a busy machine.
    Doubtful {
        /// One line: what is wrong and how to mend it.
        reason: String,
    },
    /// The origin answered, and does not give out this commit (any more).
    Vanished,
    /// The network, the origin or the disk failed; the commit may be good.
    Failed {
        /// One line.
        why: String,
    },
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
    /// Ask the origin what the reference points at. Ends as [`Event::Polled`], also when its deadline passes.
    PollOrigin {
        /// Ties the end to the start.
        job: JobId,
    },
    /// Bring one commit into the mirror, verify it and keep it from then on, whatever the origin does. It is durable
    /// before [`Event::FetchEnded`] says so. Ends also when its deadline passes.
    FetchCommit {
        /// Ties the end to the start.
        job: JobId,
        /// The pinned commit.
        sha: String,
    },
    /// Stop keeping a commit; it and its pack may be removed from disk.
    ForgetCommit {
        /// The commit.
        sha: String,
    },
    /// Read the pages of the web bot at this address, which serves the candidate before the others. Ends as
    /// [`Event::CanaryRead`], also when its deadline passes.
    ReadCanary {
        /// Ties the end to the start.
        job: JobId,
        /// The web bot.
        url: String,
        /// The commit that its pages must be of.
        sha: String,
    },
    /// Tell the caches in front of the site to forget what they have, and see that they do. Ends as [`Event::Purged`].
    PurgeCaches {
        /// Ties the end to the start.
        job: JobId,
        /// The live commit.
        sha: String,
    },
    /// Put the files of a commit on disk, whole and durable, and let the link name them, by one rename. A tree that stands
    /// there is looked through, and made anew if it is damaged. Ends as [`Event::TreeExported`].
    ExportTree {
        /// Ties the end to the start.
        job: JobId,
        /// The commit.
        sha: String,
    },
    /// Tell those who are to know which tree the link names. Ends as [`Event::ToldOfTree`].
    TellOfTree {
        /// Ties the end to the start.
        job: JobId,
        /// The commit.
        sha: String,
    },
    /// Remove a tree, unless the link names it.
    RemoveTree {
        /// The commit.
        sha: String,
    },
    /// End the process. Always last.
    Exit {
        /// The exit code.
        code: u8,
        /// One line.
        message: String,
    },
}

/// The content machine.
#[derive(Debug, Clone, Copy)]
pub struct ContentMachine;

impl Machine for ContentMachine {
    const KIND: &'static str = "content";
    const TRANSITIONS: TransitionTable<Role> = TransitionTable {
        initial: Role::Initializing,
        edges: &[
            Edge::new(Role::Initializing, Role::Follower, "etcd is read and the name is ours"),
            Edge::new(Role::Initializing, Role::Stopped, "asked to stop, or the name is another's"),
            Edge::new(Role::Follower, Role::Watching, "lock won, nothing on its way"),
            Edge::new(Role::Follower, Role::Fetching, "lock won, a needed commit is not in the mirror"),
            Edge::new(Role::Follower, Role::Preparing, "lock won in the middle of a publication"),
            Edge::new(Role::Follower, Role::Detached, "lease may have run out"),
            Edge::new(Role::Follower, Role::Stopped, "asked to stop"),
            Edge::new(Role::Watching, Role::Fetching, "ref moved, or a needed commit is not in the mirror"),
            Edge::new(Role::Watching, Role::Preparing, "ref moved to a commit that is in the mirror"),
            Edge::new(Role::Watching, Role::Follower, "lock lost"),
            Edge::new(Role::Watching, Role::Detached, "lease may have run out"),
            Edge::new(Role::Watching, Role::Stopped, "asked to stop"),
            Edge::new(Role::Fetching, Role::Preparing, "commit is whole, candidate posted"),
            Edge::new(Role::Fetching, Role::Watching, "commit quarantined, not needed, or to be tried again"),
            Edge::new(Role::Fetching, Role::Follower, "lock lost"),
            Edge::new(Role::Fetching, Role::Detached, "lease may have run out"),
            Edge::new(Role::Fetching, Role::Stopped, "asked to stop"),
            Edge::new(Role::Preparing, Role::Watching, "live moved, or candidate withdrawn"),
            Edge::new(Role::Preparing, Role::Fetching, "live moved while a newer commit is fetched"),
            Edge::new(Role::Preparing, Role::Follower, "lock lost"),
            Edge::new(Role::Preparing, Role::Detached, "lease may have run out"),
            Edge::new(Role::Preparing, Role::Stopped, "asked to stop"),
            Edge::new(Role::Detached, Role::Follower, "etcd answers again and the name is ours"),
            Edge::new(Role::Detached, Role::Stopped, "asked to stop, or the name is another's"),
        ],
    };

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
