//! The values of a content scope: which commit is prepared, which one is live, which one must never be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The `revision/candidate` and `revision/live` keys: one pinned commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// The commit, 40 hex digits; never resolved again.
    pub sha: String,
    /// Counts the publications of this scope, from 1; a greater one is newer, also after a rollback.
    pub generation: u64,
    /// The branch or tag that it was found at.
    #[serde(rename = "ref")]
    pub reference: String,
    /// The repository, without credentials: where a web bot fetches if no content bot answers.
    pub origin: String,
    /// The first line of the commit message, shortened.
    #[serde(default)]
    pub subject: String,
    /// When the content bot learnt of it: milliseconds since 1970, to measure by, never to decide by.
    #[serde(default)]
    pub detected_unix_ms: u64,
}

/// A `revision/quarantine/<sha>` key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// One line: what was wrong with the commit and how to mend it.
    pub reason: String,
    /// Milliseconds since 1970.
    #[serde(default)]
    pub since_unix_ms: u64,
}

/// One publication of the past.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// The commit.
    pub sha: String,
    /// Its number.
    pub generation: u64,
    /// The first line of the commit message, shortened.
    #[serde(default)]
    pub subject: String,
    /// When it went live: milliseconds since 1970.
    #[serde(default)]
    pub since_unix_ms: u64,
}

/// The `revision/history` key: the last publications, oldest first; the last one is live.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PublicationHistory(pub Vec<Published>);

/// The `revision/pin` key, an operator's: this commit is published, wherever the branch points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The commit, 40 hex digits.
    pub sha: String,
    /// Milliseconds since 1970.
    #[serde(default)]
    pub since_unix_ms: u64,
}

/// The `revision/promote` key, an operator's: the candidate goes live as it is, if it is this commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// The commit, 40 hex digits.
    pub sha: String,
}

/// The `revision/canary` key: one serving web bot serves the candidate before all others do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// The candidate, 40 hex digits.
    pub sha: String,
    /// The bot, as `scope/name`.
    pub member: String,
    /// Milliseconds since 1970.
    #[serde(default)]
    pub since_unix_ms: u64,
}

/// The `revision/purged` key: how far the caches in front know of the live revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Purged {
    /// The generation of the live revision that was purged for.
    pub generation: u64,
    /// How often: the second time catches what was cached while the first went round.
    pub rounds: u32,
}

/// The `push` key: the newest announcement of a push, and which deliveries were taken. It says "look", never "publish this".
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PushHint {
    /// The bot that wrote it.
    pub by: String,
    /// Milliseconds since 1970.
    #[serde(default)]
    pub at_unix_ms: u64,
    /// The commit that the announcement names: an origin that does not show it yet lags behind its own word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tip: Option<String>,
    /// The deliveries that were taken, and when, in milliseconds since 1970: one that comes again is a replay.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub deliveries: BTreeMap<String, u64>,
}

/// What a content member says beyond the common part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ContentFacts {
    /// Where web bots fetch packs: the base URL; they add `/pack/<sha>`.
    #[serde(default)]
    pub pack_url: String,
    /// The newest commit that this bot holds in full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<String>,
    /// Trouble with the origin, one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}
