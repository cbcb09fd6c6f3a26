//! The values of a web scope: load messages, and what a web bot says of itself.

use serde::{Deserialize, Serialize};

/// The most load messages that a scope can have, and so the most bots that serve: the keys count with four digits, and more bots
/// than this in one scope would crowd the store with figures.
pub const SLOTS_MAX: u32 = 1_000;

/// How many changes of the number of load messages may be made within an hour, beside those that a lower maximum forces. Whatever the
/// figures say, a scaler that wants more than one a minute is swinging, or somebody works against it: it stops and says so.
pub const ACTIONS_PER_HOUR_MAX: usize = 60;

/// A `load/<slot>` key: one place in the serving set that wants a bot.
///
/// The scope's leader writes it when load asks for one more bot and deletes it when load is gone. An idle bot claims it
/// (`load/<slot>/claim`, bound to its lease) and holds the claim for as long as it serves: a claimant that dies gives
/// the message back by dying. Slots are numbered from zero below the maximum, so that no number of leaders, stale or
/// mistaken, can ask for more than the maximum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadMessage {
    /// Why it was posted, one line with figures.
    pub reason: String,
    /// The leader that posted it.
    pub posted_by: String,
    /// Milliseconds since 1970, to measure by, never to decide by.
    #[serde(default)]
    pub posted_unix_ms: u64,
}

/// The `load/history` key: the changes of the number of load messages within the last hour, whoever made them. Written
/// together with each change, so that the budget of changes is one for all leaders.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadHistory {
    /// Oldest first.
    #[serde(default)]
    pub changes: Vec<LoadChange>,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadChange {
    /// When it was made, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Whether messages were withdrawn.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lowered: bool,
    /// Whether a lower maximum took them away: an operator's word and the database's, which the budget is not for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forced: bool,
}

/// How busy a serving bot is, averaged over the last publishing interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WebLoad {
    /// Requests in flight, in thousandths, time-weighted mean.
    #[serde(default)]
    pub in_flight_milli: u64,
    /// Requests a second.
    #[serde(default)]
    pub rps: u64,
    /// The 99th percentile of response times, in microseconds.
    #[serde(default)]
    pub p99_us: u64,
    /// Requests since the bot began to serve the commit that it serves, the content bot's own among them.
    #[serde(default)]
    pub requests: u64,
    /// How many of them were answered with a status of 500 or above.
    #[serde(default)]
    pub errors: u64,
}

/// A commit that a web bot can never serve as it is set up, whoever gives it the commit and however often it tries.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Refused {
    /// The commit, 40 hex digits.
    pub sha: String,
    /// One line: what is wrong with it and how to mend it.
    #[serde(default)]
    pub why: String,
}

/// What the trouble of a web bot begins with while its database fails over. Content bots read it: whatever such a bot answers
/// then says nothing of the commit that it serves.
pub const DATABASE_FAILS_OVER: &str = "the database fails over";

/// What a web member says beyond the common part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WebFacts {
    /// Where clients reach it.
    #[serde(default)]
    pub url: String,
    /// The commit that every response comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<String>,
    /// The newest commit that stands ready to be served: the acknowledgement that the content bot waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<String>,
    /// The candidate, if it can never be served here: the content bot quarantines it when a serving bot says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// The load message that it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u32>,
    /// How busy it is; absent while idle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<WebLoad>,
    /// Its requests wait for a processor, and weigh more than where they do not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stalled: bool,
    /// Trouble with content or the app, one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

impl WebFacts {
    /// Whether it holds still because its database fails over.
    #[must_use]
    pub fn database_fails_over(&self) -> bool {
        self.trouble.as_ref().is_some_and(|trouble| trouble.starts_with(DATABASE_FAILS_OVER))
    }
}
