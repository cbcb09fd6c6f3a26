//! The nodes of the state diagram and its edges, declared once.

use std::fmt;

use bots_core::machine::{Edge, TransitionTable};
use serde::{Deserialize, Serialize};

/// Where in its life the bot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Getting a lease and a first look at etcd and at the data directory.
    Initializing,
    /// No data yet, and nothing to make it from: another member bootstraps, or the leader is not up.
    Waiting,
    /// Making a new cluster: the only member that may.
    Bootstrapping,
    /// Copying the leader's data directory.
    Cloning,
    /// Starting Postgres read-only.
    Starting,
    /// Following the leader.
    Replica,
    /// The leader is gone: asking the others who is ahead, and asking for the lock.
    Candidate,
    /// Holding the lock, making Postgres writable.
    Promoting,
    /// Holding the lock, Postgres writable.
    Primary,
    /// Stopping Postgres on an operator's word or for want of a guard, to start it again.
    Restarting,
    /// Holding the lock, Postgres crashed: restarting it in place.
    Recovering,
    /// Making Postgres unwritable: handing over, or the lock is lost.
    Demoting,
    /// Stopped, with data that may have diverged: making it follow again.
    Rejoining,
    /// Going away.
    Stopping,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Initializing => "initializing",
            Self::Waiting => "waiting",
            Self::Bootstrapping => "bootstrapping",
            Self::Cloning => "cloning",
            Self::Starting => "starting",
            Self::Replica => "replica",
            Self::Candidate => "candidate",
            Self::Promoting => "promoting",
            Self::Primary => "primary",
            Self::Restarting => "restarting",
            Self::Recovering => "recovering",
            Self::Demoting => "demoting",
            Self::Rejoining => "rejoining",
            Self::Stopping => "stopping",
        })
    }
}

impl Role {
    /// One line for people.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Initializing => "getting a lease and a first look at etcd and at the data directory",
            Self::Waiting => "no data yet, and nothing to make it from",
            Self::Bootstrapping => "making a new cluster, as the only member that may",
            Self::Cloning => "copying the leader's data directory",
            Self::Starting => "starting Postgres read-only",
            Self::Replica => "following the leader",
            Self::Candidate => "the leader is gone: finding out who is ahead, and asking for the lock",
            Self::Promoting => "holding the lock, making Postgres writable",
            Self::Primary => "holding the lock, Postgres writable",
            Self::Restarting => "stopping Postgres on an operator's word or for want of a guard, to start it again",
            Self::Recovering => "holding the lock, Postgres crashed: restarting it in place",
            Self::Demoting => "making Postgres unwritable: handing over, or the lock is lost",
            Self::Rejoining => "stopped, with data that may have left the leader's path: making it follow again",
            Self::Stopping => "going away",
        }
    }
}

/// Every edge the role may take.
pub const TRANSITIONS: TransitionTable<Role> = TransitionTable {
    initial: Role::Initializing,
    edges: &[
        Edge::new(Role::Initializing, Role::Waiting, "no usable data"),
        Edge::new(Role::Initializing, Role::Recovering, "own lock, own primary data"),
        Edge::new(Role::Initializing, Role::Starting, "replica data"),
        Edge::new(Role::Initializing, Role::Rejoining, "primary data, another leads or nobody"),
        Edge::new(Role::Waiting, Role::Bootstrapping, "nobody has initialised the cluster"),
        Edge::new(Role::Waiting, Role::Cloning, "the leader is up"),
        Edge::new(Role::Waiting, Role::Rejoining, "a cut-off bootstrap turned out to be recorded"),
        Edge::new(Role::Bootstrapping, Role::Primary, "cluster recorded, lock held"),
        Edge::new(Role::Bootstrapping, Role::Waiting, "race lost or bootstrap failed"),
        Edge::new(Role::Cloning, Role::Starting, "copied"),
        Edge::new(Role::Cloning, Role::Waiting, "copy failed, or to be begun anew"),
        Edge::new(Role::Starting, Role::Replica, "server up"),
        Edge::new(Role::Starting, Role::Rejoining, "start failed, or data to be made anew"),
        Edge::new(Role::Starting, Role::Demoting, "server writable without the lock"),
        Edge::new(Role::Replica, Role::Candidate, "leader key gone"),
        Edge::new(Role::Replica, Role::Starting, "server exited"),
        Edge::new(Role::Replica, Role::Rejoining, "diverged from the leader, or data to be made anew"),
        Edge::new(Role::Replica, Role::Demoting, "server writable without the lock"),
        Edge::new(Role::Candidate, Role::Demoting, "server writable without the lock"),
        Edge::new(Role::Candidate, Role::Replica, "another leads, or not eligible"),
        Edge::new(Role::Candidate, Role::Promoting, "lock won"),
        Edge::new(Role::Candidate, Role::Starting, "server exited"),
        Edge::new(Role::Promoting, Role::Primary, "promoted"),
        Edge::new(Role::Promoting, Role::Demoting, "lock lost or promotion failed"),
        Edge::new(Role::Primary, Role::Recovering, "server exited"),
        Edge::new(Role::Primary, Role::Demoting, "lock lost, lease running out or switchover"),
        Edge::new(Role::Replica, Role::Restarting, "an operator asked for a restart"),
        Edge::new(Role::Primary, Role::Restarting, "an operator asked for a restart, or the guard stands still"),
        Edge::new(Role::Restarting, Role::Starting, "server of a replica stopped"),
        Edge::new(Role::Restarting, Role::Recovering, "server of the primary stopped"),
        Edge::new(Role::Restarting, Role::Demoting, "lock lost, lease running out or server writable without the lock"),
        Edge::new(Role::Recovering, Role::Primary, "server up again"),
        Edge::new(Role::Recovering, Role::Demoting, "lock lost or restart failed"),
        Edge::new(Role::Recovering, Role::Rejoining, "lock refused"),
        Edge::new(Role::Demoting, Role::Rejoining, "server stopped"),
        Edge::new(Role::Demoting, Role::Recovering, "switchover given up: server ended uncleanly"),
        Edge::new(Role::Rejoining, Role::Starting, "data follows the leader"),
        Edge::new(Role::Rejoining, Role::Recovering, "the lock is still ours"),
        Edge::new(Role::Rejoining, Role::Waiting, "data set aside for a new clone"),
        Edge::new(Role::Initializing, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Waiting, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Bootstrapping, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Cloning, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Starting, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Replica, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Candidate, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Promoting, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Primary, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Restarting, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Recovering, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Demoting, Role::Stopping, "asked to stop, or must not run"),
        Edge::new(Role::Rejoining, Role::Stopping, "asked to stop, or must not run"),
    ],
};
