//! The values of a Postgres scope, in Patroni's shapes, and the numbers that Postgres counts with.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A position in the write-ahead log, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// Not a position in the form `16/B374D848`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a WAL position such as 16/B374D848")]
pub struct LsnError(pub String);

impl FromStr for Lsn {
    type Err = LsnError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (high, low) = s.split_once('/')?;
            let high = u64::from(u32::from_str_radix(high, 16).ok()?);
            let low = u64::from(u32::from_str_radix(low, 16).ok()?);
            Some(Self(high << 32 | low))
        };
        parse().ok_or_else(|| LsnError(s.to_owned()))
    }
}

/// A Postgres timeline; grows with every promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a Postgres member says beyond the common part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PostgresFacts {
    /// Where the server takes connections; without a password.
    #[serde(default)]
    pub conn_url: String,
    /// The timeline, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
    /// Primary: the write position. Replica: the greater of received and replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xlog_location: Option<Lsn>,
    /// Replica: received up to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_lsn: Option<Lsn>,
    /// Replica: replayed up to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_lsn: Option<Lsn>,
    /// Replica: `streaming`, `in archive recovery`; absent if neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_state: Option<String>,
    /// A configuration change waits for a restart.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pending_restart: bool,
    /// Which parameters that change is about.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pending_restart_reason: BTreeMap<String, ParameterChange>,
    /// A restart that an operator has set a time for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_restart: Option<ScheduledRestart>,
    /// The member goes by the cluster's `pause`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pause: bool,
    /// How far the copy is that the member is being made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copying: Option<CopyProgress>,
    /// `false` until the first checkpoint after a promotion; absent otherwise. Who rewinds waits for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_after_promote: Option<bool>,
    /// The primary is about to hand over: edges hold new connections, and let the sessions that there are come to their end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub handing_over: bool,
    /// Primary: how many connections it takes, for those who share them out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<Connections>,
    /// The member's tags.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub tags: serde_json::Map<String, serde_json::Value>,
}

/// How many connections a server takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Connections {
    /// All of them: `max_connections`.
    pub max: u32,
    /// Those that are kept for superusers: `superuser_reserved_connections`.
    pub reserved: u32,
}

/// What a parameter is, and what it will be after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ParameterChange {
    /// The value that the server runs with.
    pub old_value: String,
    /// The value that its files hold.
    pub new_value: String,
}

/// A restart that an operator has set a time for, with the conditions that must hold by then.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScheduledRestart {
    /// When (RFC 3339).
    pub schedule: String,
    /// Only a member with this role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Only a server older than this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres_version: Option<String>,
    /// Only if a parameter waits for a restart.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart_pending: bool,
    /// How long the start may take, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
}

/// How far a copy of another member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CopyProgress {
    /// Bytes that have arrived.
    pub bytes_done: u64,
    /// Bytes that the source has announced; it may grow meanwhile.
    pub bytes_total: u64,
    /// The same as a percentage.
    pub percent: u64,
}

/// The `status` key.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PostgresStatus {
    /// The leader's last known write position.
    #[serde(default)]
    pub optime: Lsn,
    /// The leader that has shut its server down in good order at that position and given the lock away: until another
    /// leads, whoever lacks a part of that lets it go first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over_by: Option<String>,
    /// The leader's replication slots, each with the position from which it keeps the log.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slots: BTreeMap<String, Lsn>,
    /// Those among them that are kept for members that have gone, for a while.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retain_slots: Vec<String>,
}

/// The `failover` key: what an operator asked for. `{}` asks for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FailoverRequest {
    /// The present leader: a switchover, refused if somebody else leads by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// The member that shall lead; any healthy one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// Not before this moment (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_at: Option<String>,
}

impl FailoverRequest {
    /// Whether it asks for anything.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.leader.is_none() && self.member.is_none()
    }
}

/// One line of the `history` key: `[timeline, switch position, reason, time, new leader]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryLine(pub Timeline, pub Lsn, pub String, #[serde(default)] pub String, #[serde(default)] pub String);

/// The `history` key.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineHistory(pub Vec<HistoryLine>);

/// The `timelines` key: which numbers of timelines are taken. Postgres gives a new timeline the next number that it
/// knows of by itself, so two members could be promoted to one number with two histories; a number that is taken here
/// before the promotion has one owner for ever.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TimelineRecord {
    /// The timeline of the last promotion that was recorded in `history`.
    pub current: Timeline,
    /// The highest number that was ever taken; greater than `current` while, or if never, its promotion is recorded.
    pub reserved: Timeline,
    /// The timeline that `reserved` branches off from.
    pub parent: Timeline,
    /// Who took `reserved`.
    pub by: String,
}

#[cfg(test)]
mod tests {
    use super::{FailoverRequest, Lsn, TimelineHistory};

    #[test]
    fn positions_read_as_postgres_writes_them() {
        assert_eq!("16/B374D848".parse(), Ok(Lsn(0x16_B374_D848)));
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert!("B374D848".parse::<Lsn>().is_err());
    }

    #[test]
    fn patronis_values_are_read() {
        let history: TimelineHistory = serde_json::from_str(
            r#"[[1,67110576,"no recovery target specified","2026-07-24T12:00:00.123456+00:00","postgres-1"],[2,67110577,"x"]]"#,
        )
        .expect("history");
        assert_eq!(history.0.len(), 2);
        let request: FailoverRequest = serde_json::from_str(r#"{"leader":"a","member":"b"}"#).expect("failover");
        assert_eq!(request.member.as_deref(), Some("b"));
        assert!(serde_json::from_str::<FailoverRequest>("{}").expect("empty").is_empty());
    }
}
