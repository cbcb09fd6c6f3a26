//! The roles, and the edges between them that the machine may take. What a role does stands in `roles`.

use bots_core::machine::Edge;
use serde::Serialize;

/// The node of the state diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Waits for etcd: a lease, the name, a first look.
    Initializing,
    /// Waits for the live revision to stand ready.
    Preparing,
    /// Could serve, and need not.
    Idle,
    /// Has claimed a load message and brings the app up.
    Waking,
    /// Serves.
    Serving,
    /// Lets the requests in flight end.
    Draining,
    /// Was asked to end: drains, gives everything back, exits.
    Stopping,
    /// Must not run; has said why and exits.
    Failed,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Initializing => "initializing",
            Self::Preparing => "preparing",
            Self::Idle => "idle",
            Self::Waking => "waking",
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        })
    }
}

pub(super) const EDGES: &[Edge<Role>] = &[
    Edge::new(Role::Initializing, Role::Preparing, "etcd answered and the name is ours"),
    Edge::new(Role::Preparing, Role::Idle, "the content stands ready"),
    Edge::new(Role::Idle, Role::Waking, "a load message is claimed"),
    Edge::new(Role::Waking, Role::Serving, "content and app are ready"),
    Edge::new(
        Role::Waking,
        Role::Idle,
        "the app does not come up, or the message is gone, or the live commit is served by others alone",
    ),
    Edge::new(Role::Serving, Role::Waking, "the app died"),
    Edge::new(
        Role::Serving,
        Role::Draining,
        "the message is gone, or was lost and all are taken, or the live commit is served by others alone",
    ),
    Edge::new(Role::Draining, Role::Idle, "requests in flight are done"),
    Edge::new(Role::Initializing, Role::Stopping, "asked to stop"),
    Edge::new(Role::Preparing, Role::Stopping, "asked to stop"),
    Edge::new(Role::Idle, Role::Stopping, "asked to stop"),
    Edge::new(Role::Waking, Role::Stopping, "asked to stop"),
    Edge::new(Role::Serving, Role::Stopping, "asked to stop"),
    Edge::new(Role::Draining, Role::Stopping, "asked to stop"),
    Edge::new(Role::Initializing, Role::Failed, "another live bot has the name"),
    Edge::new(Role::Preparing, Role::Failed, "another live bot has the name"),
    Edge::new(Role::Idle, Role::Failed, "another live bot has the name"),
    Edge::new(Role::Waking, Role::Failed, "another live bot has the name"),
    Edge::new(Role::Serving, Role::Failed, "another live bot has the name"),
    Edge::new(Role::Draining, Role::Failed, "another live bot has the name"),
];
