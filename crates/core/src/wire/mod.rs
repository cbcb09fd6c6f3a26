//! What two programs must agree on: the values of the keys, as they stand in the store. Not the machines' own types.
//!
//! Every type reads what older and newer versions wrote: unknown fields are kept or ignored, absent ones have defaults.

pub mod config;
mod content;
mod edge;
mod member;
mod postgres;
mod sync;
pub mod tags;
mod time;
mod web;

pub use content::{
    Canary, ContentFacts, Pin, Promotion, PublicationHistory, Published, Purged, PushHint, Quarantined,
    Revision as ContentRevision,
};
pub use edge::{EdgeFacts, EdgeStand};
pub use member::{Kind, Member, MemberHead};
pub use postgres::{
    Connections, CopyProgress, FailoverRequest, HistoryLine, Lsn, ParameterChange, PostgresFacts, PostgresStatus,
    ScheduledRestart, Timeline, TimelineHistory, TimelineRecord,
};
pub use sync::SyncRecord;
pub use time::{rfc3339_from_unix_ms, unix_ms_from_rfc3339};
pub use web::{
    ACTIONS_PER_HOUR_MAX, DATABASE_FAILS_OVER, LoadChange, LoadHistory, LoadMessage, Refused, SLOTS_MAX, WebFacts,
    WebLoad,
};
