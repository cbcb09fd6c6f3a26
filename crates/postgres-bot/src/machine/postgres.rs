//! What the machine knows of its server and its data directory: facts, as the shell observed them.

use std::collections::BTreeMap;

use bots_core::{
    machine::Time,
    wire::{Connections, Lsn, ParameterChange, Timeline},
};
use serde::{Deserialize, Serialize};

/// The data directory as last inspected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DataDir {
    /// Nothing there, or not even the folder.
    Empty,
    /// A bootstrap or a clone of ours that did not come to its end (our marker file is in it). Ours to discard.
    Unfinished {
        /// The system identifier; nothing while there is no control file. Of a copy, also if nobody can make it out.
        system_id: Option<String>,
        /// It was being copied; otherwise it was being made new.
        cloning: bool,
        /// A server runs on it, from before our own start.
        running: Running,
    },
    /// A Postgres cluster.
    Present {
        /// The system identifier.
        system_id: String,
        /// The timeline of the last checkpoint.
        timeline: Timeline,
        /// It last ran as a primary: there is no `standby.signal`.
        was_primary: bool,
        /// It was rewound, and is of no use before it has the log of the server that it was rewound to.
        rewound: bool,
        /// A server runs on it, from before our own start.
        running: Running,
    },
}

/// A server from before our own start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Running {
    /// There is none.
    No,
    /// There is one that nobody looks after, or one that cannot be taken over as it is.
    LeftBehind {
        /// When its guard stops it, as far as that says so.
        fence: Option<Time>,
    },
    /// There is one in its guard's care.
    Guarded {
        /// When its guard stops it, on this machine's clock; nothing if it was not told to take writes.
        fence: Option<Time>,
    },
}

impl Running {
    /// Whether any does.
    #[must_use]
    pub const fn is_any(self) -> bool {
        !matches!(self, Self::No)
    }
}

/// The server process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Postgres {
    /// No process of it is alive.
    #[default]
    Down,
    /// The postmaster lives and does not take queries yet.
    Starting,
    /// It answers.
    Up(Server),
    /// It lives and does not answer within the deadline.
    Silent,
}

/// The disk of the data directory, or the worse of two if `pg_wal` has one of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub enum Disk {
    /// It takes writes, as far as anybody knows.
    #[default]
    Good,
    /// There is next to no room.
    Full {
        /// Which directory is on it, in words.
        dir: String,
        /// What is left.
        bytes_free: u64,
    },
    /// A write failed.
    Failing {
        /// One line.
        why: String,
    },
    /// A write does not come to its end.
    Stalled,
}

/// What a live server says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Server {
    /// Read-only: recovering or following.
    pub in_recovery: bool,
    /// The timeline it is on.
    pub timeline: Timeline,
    /// Primary: written up to. Replica: the greater of received and replayed.
    pub position: Lsn,
    /// Replica: received up to.
    pub received: Lsn,
    /// Replica: replayed up to.
    pub replayed: Lsn,
    /// Replica: a WAL receiver is connected.
    pub streaming: bool,
    /// Replica: it has a command that fetches the log from an archive.
    #[serde(default)]
    pub restores: bool,
    /// Replica: it has replayed all that it had on disk when it came up. Before that, its position may be less than what it has
    /// acknowledged in an earlier run, and its timeline an older one.
    pub settled: bool,
    /// Primary: which standbys commits wait for.
    pub waits_for: WaitsFor,
    /// Primary: who streams from it, by name.
    pub standbys: BTreeMap<String, Standby>,
    /// The parameters that wait for a restart.
    pub pending_restart: BTreeMap<String, ParameterChange>,
    /// Its replication slots by name, without temporary ones; nothing while it has not been asked for them.
    pub slots: Option<BTreeMap<String, ReplicationSlot>>,
    /// The version that runs, as Postgres counts: 150002 for 15.2; zero if not known.
    pub version: u32,
    /// How many connections it takes, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<Connections>,
}

impl Server {
    /// Patroni's words for where a replica has its log from; nothing if it is none, or has nowhere to have it from.
    #[must_use]
    pub const fn replication_state(&self) -> Option<&'static str> {
        match (self.in_recovery, self.streaming, self.restores) {
            (true, true, _) => Some("streaming"),
            (true, false, true) => Some("in archive recovery"),
            (true, false, false) | (false, _, _) => None,
        }
    }
}

/// A replication slot as the server shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReplicationSlot {
    /// What it is for.
    pub kind: SlotKind,
    /// Somebody uses it at the moment.
    pub active: bool,
    /// The log is kept from here on.
    pub restart: Option<Lsn>,
    /// Logical: the consumer has everything up to here.
    pub confirmed: Option<Lsn>,
    /// The log that it should have kept is gone: it is of no use any more.
    pub lost: bool,
    /// The catalog's rows are kept as of this transaction, for the slot itself or for those of the standby that uses it.
    #[serde(default)]
    pub catalog_xmin: Option<Xid>,
}

/// A transaction's number. They go round: one is older than another if it is less than half the way behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Xid(pub u32);

impl Xid {
    /// Whether this one is older than `other`.
    #[must_use]
    pub const fn precedes(self, other: Self) -> bool {
        self.0.wrapping_sub(other.0).cast_signed() < 0
    }
}

/// What a leader has of logical slots, for a replica that keeps copies of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeaderSlots {
    /// The leader keeps the catalog's rows for the replica's copies as of this transaction; nothing if it does not.
    pub feedback: Option<Xid>,
    /// The slots, looked at later than the feedback.
    pub slots: BTreeMap<String, LeaderSlot>,
    /// The slots whose files are here now.
    pub fetched: Vec<String>,
}

/// A logical slot of a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderSlot {
    /// The consumer has everything up to here.
    pub confirmed: Lsn,
    /// The catalog's rows are kept as of this transaction.
    pub catalog_xmin: Xid,
}

/// What a replication slot is for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SlotKind {
    /// A copy of the log.
    #[default]
    Physical,
    /// Decoded changes of one database.
    Logical {
        /// The database.
        database: String,
        /// What decodes.
        plugin: String,
    },
}

/// `synchronous_standby_names` as the server has it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WaitsFor {
    /// Its text.
    pub names: String,
    /// It was seen for so long that every process of the server goes by it: nothing is acknowledged by an earlier one.
    pub in_force: bool,
}

/// Somebody who streams from a primary.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Standby {
    /// It has caught up once and streams.
    pub streams: bool,
    /// It has so much on disk.
    pub flushed: Lsn,
}

impl Postgres {
    /// The live server's facts.
    #[must_use]
    pub const fn server(&self) -> Option<&Server> {
        match self {
            Self::Up(server) => Some(server),
            Self::Down | Self::Starting | Self::Silent => None,
        }
    }

    /// Whether any process of the server may be alive.
    #[must_use]
    pub const fn is_alive(&self) -> bool {
        !matches!(self, Self::Down)
    }
}

/// A server to copy or follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// The member's name.
    pub name: String,
    /// Its connection URL, without a password.
    pub conn_url: String,
}
