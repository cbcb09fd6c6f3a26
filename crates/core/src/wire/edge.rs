//! What an edge bot says of itself: where clients connect, and which leader they are routed to.

use serde::{Deserialize, Serialize};

use crate::dcs::Revision;

/// What an edge member says beyond the common part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EdgeFacts {
    /// The Postgres scope that it routes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres_scope: Option<String>,
    /// The leader to whom new connections for the primary go; absent while they are held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// The generation of that leader: the creation revision of its leader key. It stands here once the proxy has been
    /// *seen* to route there and no session to any other member is left, so whoever waits for a switchover to reach the
    /// clients waits for its own generation in every edge member of its scope.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Revision>,
    /// The web scope that it routes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_scope: Option<String>,
    /// Trouble with the proxy or the routes, one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}
