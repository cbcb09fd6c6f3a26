//! The member key: what every bot says of itself (rule 3), and the part that is common to all kinds.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The kind of bot that wrote a member key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Keeps a Postgres server.
    Postgres,
    /// Publishes content.
    Content,
    /// Serves content.
    Web,
    /// Points the proxy.
    Edge,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Postgres => "postgres",
            Self::Content => "content",
            Self::Web => "web",
            Self::Edge => "edge",
        })
    }
}

/// What every member key begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberHead {
    /// The kind; a Patroni member has none and is a Postgres.
    #[serde(default = "postgres")]
    pub kind: Kind,
    /// Postgres: Patroni's word for the server's state (`running`, `starting`, `creating replica`, ...). Others: one word.
    pub state: String,
    /// Postgres: Patroni's word for the role (`primary`, `replica`, ...). Others: `leader` or `member`.
    pub role: String,
    /// The version of the bot.
    #[serde(default)]
    pub version: String,
    /// Where the bot's API answers, with the path that Patroni's tools expect for Postgres.
    #[serde(default)]
    pub api_url: String,
    /// Tells one process from another of the same name.
    #[serde(default)]
    pub instance: String,
    /// The node of the bot's state diagram.
    #[serde(default)]
    pub node: String,
    /// Since when the bot has been in that node: milliseconds since 1970, for people to read, never to decide by.
    #[serde(default)]
    pub since_unix_ms: u64,
}

const fn postgres() -> Kind {
    Kind::Postgres
}

/// A member key of any kind, as `botctl` and peers read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// The common part.
    #[serde(flatten)]
    pub head: MemberHead,
    /// The kind's own facts; read them with [`Member::facts`].
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Member {
    /// A member value of `head` and a kind's own `facts`, which must serialise to an object.
    #[must_use]
    pub fn new(head: MemberHead, facts: &impl Serialize) -> Self {
        let rest = match serde_json::to_value(facts) {
            Ok(Value::Object(map)) => map,
            Ok(_) | Err(_) => Map::new(),
        };
        Self { head, rest }
    }

    /// The kind's own facts; nothing if they have another shape.
    #[must_use]
    pub fn facts<T: serde::de::DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_value(Value::Object(self.rest.clone())).ok()
    }

    /// The value for the key.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a value; nothing if it is not a member's.
    #[must_use]
    pub fn from_json(value: &str) -> Option<Self> {
        serde_json::from_str(value).ok()
    }
}
