//! What an edge bot says of itself: where clients connect, and which leader they are routed to.

use serde::{Deserialize, Serialize};

use crate::dcs::Revision;

/// The key of an edge bot below the Postgres scope that it routes to: how far it has come with what the primary asks for
/// by [`super::PostgresFacts::handing_over`]. Generations are those of [`crate::leadership::generation`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EdgeStand {
    /// No new connection reaches the leader of this generation, nor any other member: they are held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<Revision>,
    /// Besides, no session with that leader is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained: Option<Revision>,
}

impl EdgeStand {
    /// The value of the key. What cannot be read stands nowhere yet.
    #[must_use]
    pub fn from_json(value: &str) -> Self {
        serde_json::from_str(value).unwrap_or_default()
    }

    /// The value of the key.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// What an edge member says beyond the common part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EdgeFacts {
    /// The Postgres scope that it routes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres_scope: Option<String>,
    /// The leader to whom new connections for the primary go; absent while they are held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// The generation of that leader ([`crate::leadership::generation`]). It stands here once the proxy has been
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
