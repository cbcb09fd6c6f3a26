//! The phase that the bot is in: its role, with what belongs to that alone. How it moves from one to the next is told by role, in
//! the files beside this one.

use std::collections::BTreeMap;

use bots_core::{
    dcs::{RequestId, Revision},
    leadership::Fence,
    machine::Time,
    wire::{Lsn, Timeline, config::SyncMode},
};
use serde::Serialize;

use super::{
    event::{PeerAnswer, ProbeId},
    postgres::Upstream,
    quorum::Voters,
};

/// The steps of making a new cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Bootstrap {
    /// Asking for the `initialize` key.
    Racing(RequestId),
    /// `initdb`, first start, roles: in this order, one job after the other.
    Working { won: Revision, system_id: Option<String> },
    /// Recording identifier, configuration and lock in one transaction.
    Recording { won: Revision, request: RequestId, system_id: String },
    /// Recorded; taking the mark off the data directory.
    Completing,
}

/// Why Postgres is made unwritable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum DemoteWhy {
    /// The lock is gone, or its lease runs out: at once.
    Fenced(String),
    /// The server cannot be made to run here: another shall lead.
    Unfit(String),
    /// An operator asked for it.
    Switchover { to: Option<String> },
}

/// The steps of a demotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum DemoteStep {
    /// A checkpoint first, so that the stop is short.
    Checkpointing,
    /// Waiting for the edges to hold new connections.
    Holding,
    /// Waiting for running transactions to end.
    Draining,
    /// Stopping the server.
    Stopping,
    /// The server is down: giving the lock to whoever comes.
    Yielding,
}

/// The steps of restarting a crashed primary in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Recovery {
    /// The lock is our own from before a restart of the bot: binding it to the new lease. The server may run, in its
    /// guard's care, under the old one.
    Reclaiming,
    /// The server has run on since before the restart: taking it over as it is.
    Adopting,
    /// Starting the server.
    Starting,
}

/// What a stopped member with suspect data does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Suspect {
    /// Nothing: it was stopped cleanly and handed over.
    No,
    /// It may hold writes that the new leader lacks.
    Maybe,
    /// Rewinding failed: only a new clone helps.
    Hopeless,
}

/// The steps down of a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum RestartStep {
    /// A checkpoint first, so that the stop is short.
    Checkpointing,
    /// Stopping the server.
    Stopping,
}

/// The phase: the role, with what belongs to it alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Phase {
    Initializing,
    Waiting,
    Bootstrapping(Bootstrap),
    Cloning {
        source: String,
    },
    Starting {
        attempts: u32,
    },
    Replica {
        following: Option<Upstream>,
    },
    Candidate(Candidate),
    Promoting {
        from: Lsn,
        /// The timeline that it is promoted to.
        timeline: Timeline,
        /// How far it had replayed when it was last looked at whether that takes too long.
        replayed: Lsn,
    },
    Primary(Primary),
    Restarting {
        /// It holds the lock, and its server takes writes until it is down.
        primary: bool,
        step: RestartStep,
    },
    Recovering {
        step: Recovery,
    },
    Demoting {
        why: DemoteWhy,
        step: DemoteStep,
        shutdown_checkpoint: Option<Lsn>,
    },
    Rejoining {
        suspect: Suspect,
        failures: u32,
    },
    Stopping {
        /// The lock was given back; the answer is awaited for a moment.
        yielded: bool,
        /// The server may have accepted writes when the stop began.
        writable: bool,
        /// What it ended with.
        checkpoint: Option<Lsn>,
    },
}

/// What a candidate has found out so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Candidate {
    /// The question to the peers that is under way.
    pub(super) probe: Option<ProbeId>,
    /// Their answers.
    pub(super) answers: Option<BTreeMap<String, PeerAnswer>>,
    /// Our own server was asked after the leader was gone: its position is final.
    pub(super) observed: bool,
    /// Who stands in the way, for the report.
    pub(super) behind: Option<String>,
    /// The mode that the peers were asked in.
    pub(super) mode: SyncMode,
    /// The members of the failsafe key are being asked for their support.
    pub(super) seeking: bool,
    /// The lock is ours, and a number for the new timeline has been asked for.
    pub(super) reservation: Option<Reservation>,
}

/// A number that etcd was asked to keep for the timeline to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reservation {
    pub(super) request: RequestId,
    /// The lock that it was asked for under.
    pub(super) fence: Fence,
    pub(super) timeline: Timeline,
    /// The `sync` key that was written with it, if the mode wants one.
    pub(super) voters: Option<Voters>,
    /// The last leader's key was deleted with it: the mode is off.
    pub(super) forgets_key: bool,
}

/// What a primary keeps track of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Primary {
    /// The first checkpoint after the promotion is still to come: who rewinds must wait for it.
    pub(super) checkpoint_due: bool,
    /// The `status` key as we wrote it last.
    pub(super) shared: Option<String>,
    /// Started in place, perhaps after a promotion that nobody recorded.
    pub(super) restarted: bool,
    /// The key that a write under the lock is under way for.
    pub(super) writing: Option<(RequestId, Writing)>,
    /// The request of an operator that was answered last, by its revision: the watch may still show it.
    pub(super) answered: Option<Revision>,
    /// The request that waits for a replica to be ready, and until when.
    pub(super) unready: Option<(Revision, Time)>,
}

/// Which of a primary's keys is being written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) enum Writing {
    History,
    Status(String),
    Failover(Revision),
    Initialize,
}
