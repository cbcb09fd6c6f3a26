//! The health checks by role. They tell the truth of this very moment: the lease is looked at on the clock.

use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{Query, State as Extract},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bots_core::{
    machine::Time,
    shell::Clock,
    wire::{Lsn, PostgresStatus},
};

use super::{Site, show};
use crate::machine::State;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// Writes are accepted here.
    Primary,
    /// The leader lock is held here.
    Leader,
    /// Reads are served here, and not writes.
    Replica(Standing),
    /// Reads are served here.
    ReadOnly(Standing),
    /// Never true: there is no cluster that follows another yet.
    StandbyLeader,
    /// A server runs here, in whatever role.
    Health,
}

/// How a replica stands to the primary's commits, as the `sync` key says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It does not matter.
    Any,
    /// Every commit waits for it.
    Sync,
    /// Commits wait for some of several, it among them.
    Quorum,
    /// No commit waits for it.
    Async,
}

/// Patroni's paths.
pub(super) const CHECKS: &[(&str, Check)] = &[
    ("/", Check::Primary),
    ("/primary", Check::Primary),
    ("/master", Check::Primary),
    ("/read-write", Check::Primary),
    ("/leader", Check::Leader),
    ("/replica", Check::Replica(Standing::Any)),
    ("/read-only", Check::ReadOnly(Standing::Any)),
    ("/sync", Check::Replica(Standing::Sync)),
    ("/synchronous", Check::Replica(Standing::Sync)),
    ("/read-only-sync", Check::ReadOnly(Standing::Sync)),
    ("/read-only-synchronous", Check::ReadOnly(Standing::Sync)),
    ("/quorum", Check::Replica(Standing::Quorum)),
    ("/read-only-quorum", Check::ReadOnly(Standing::Quorum)),
    ("/async", Check::Replica(Standing::Async)),
    ("/asynchronous", Check::Replica(Standing::Async)),
    ("/standby-leader", Check::StandbyLeader),
    ("/standby_leader", Check::StandbyLeader),
    ("/health", Check::Health),
];

type Parameters = BTreeMap<String, String>;

/// 200 or 503; the body is that of `/patroni`.
pub(super) async fn answer(Extract(site): Extract<Site>, Query(query): Query<Parameters>, check: Check) -> Response {
    let (state, now) = (site.state(), Clock::now());
    let good = match holds(&state, now, check, &query) {
        Ok(good) => good,
        Err(why) => return super::say(StatusCode::BAD_REQUEST, why),
    };
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(show::body(&site, &state, state.server(), now))).into_response()
}

/// `GET /readiness`: fit to be counted on. The leader is; a replica is if it streams and lags by no more than `lag`, which
/// is `maximum_lag_on_failover` unless given, in what it has replayed, or received with `mode=write`.
pub(super) async fn readiness(Extract(site): Extract<Site>, Query(query): Query<Parameters>) -> Response {
    let (state, now) = (site.state(), Clock::now());
    let limit = match query.get("lag").map(|text| size(text)) {
        None => state.dynamic().maximum_lag_on_failover,
        Some(Ok(limit)) => limit,
        Some(Err(why)) => return super::say(StatusCode::BAD_REQUEST, why),
    };
    let writes = query.get("mode").is_some_and(|mode| mode == "write");
    let follows = state.server().is_some_and(|server| {
        let position = if writes { server.received } else { server.replayed };
        server.in_recovery && server.streaming && lag(&state, position) <= limit
    });
    let good = state.accepts_writes(now) || follows;
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(show::body(&site, &state, state.server(), now))).into_response()
}

fn holds(state: &State, now: Time, check: Check, query: &Parameters) -> Result<bool, String> {
    Ok(match check {
        Check::Primary => state.accepts_writes(now),
        Check::Leader => state.leads(now),
        Check::Replica(standing) => is_replica(state, standing, query)?,
        // A tag that is asked for must be there on the primary, too.
        Check::ReadOnly(standing) => {
            state.serves_as_primary(now) && has_tags(state, query) || is_replica(state, standing, query)?
        }
        Check::StandbyLeader => false,
        Check::Health => state.server().is_some() && has_tags(state, query),
    })
}

fn is_replica(state: &State, standing: Standing, query: &Parameters) -> Result<bool, String> {
    let limit = query.get("lag").map(|text| size(text)).transpose()?;
    let Some(server) = state.server().filter(|server| server.in_recovery) else { return Ok(false) };
    let counted = show::standing(state, &state.settings().name);
    let stands = match standing {
        Standing::Any => true,
        Standing::Sync | Standing::Quorum | Standing::Async => counted == standing,
    };
    let streams = query.get("replication_state").is_none_or(|wanted| server.replication_state() == Some(wanted));
    let near = limit.is_none_or(|limit| lag(state, server.replayed) <= limit);
    Ok(stands && streams && near && state.serves_as_replica() && has_tags(state, query))
}

/// Whether the member has every tag that the query names, with that value.
fn has_tags(state: &State, query: &Parameters) -> bool {
    let tags = state.tags();
    let text = |tag: &str| {
        tags.get(tag).map(|value| value.as_str().map_or_else(|| value.to_string().to_lowercase(), str::to_owned))
    };
    let wanted = query.iter().filter_map(|(name, value)| Some((name.strip_prefix("tag_")?, value)));
    wanted.into_iter().all(|(tag, value)| text(tag).as_ref() == Some(value))
}

/// How far `position` is behind what is known of the leader.
fn lag(state: &State, position: Lsn) -> u64 {
    let status: PostgresStatus = state.view().json(&state.settings().scope.status()).unwrap_or_default();
    status.optime.0.saturating_sub(position.0)
}

fn size(text: &str) -> Result<u64, String> {
    bytes(text).ok_or_else(|| format!("lag: `{text}` is not a size: write it like 16MB"))
}

/// `16MB`, `1 GB`, `4096`.
fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1 << 10,
        "mb" => 1 << 20,
        "gb" => 1 << 30,
        "tb" => 1_u64 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read() {
        assert_eq!(bytes("16MB"), Some(16 << 20));
        assert_eq!(bytes(" 1 kB "), Some(1024));
        assert_eq!(bytes("4096"), Some(4096));
        for bad in ["", "x", "1 parsec", "-1", "99999999999999999999"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }
}
