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
use crate::machine::{State, parameter_text};

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// Writes are accepted here.
    Primary,
    /// The leader lock is held here.
    Leader,
    /// Reads are served here, and not writes.
    Replica,
    /// Reads are served here.
    ReadOnly,
    /// Never true: there is no cluster that follows another yet.
    StandbyLeader,
}

/// Patroni's paths.
pub(super) const CHECKS: &[(&str, Check)] = &[
    ("/", Check::Primary),
    ("/primary", Check::Primary),
    ("/master", Check::Primary),
    ("/read-write", Check::Primary),
    ("/leader", Check::Leader),
    ("/replica", Check::Replica),
    ("/async", Check::Replica),
    ("/asynchronous", Check::Replica),
    ("/read-only", Check::ReadOnly),
    ("/standby-leader", Check::StandbyLeader),
    ("/standby_leader", Check::StandbyLeader),
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

fn holds(state: &State, now: Time, check: Check, query: &Parameters) -> Result<bool, String> {
    let writable = state.accepts_writes(now);
    Ok(match check {
        Check::Primary => writable,
        Check::Leader => state.leadership().fence(now, state.membership()).is_some(),
        Check::Replica => is_replica(state, query)?,
        Check::ReadOnly => writable || is_replica(state, query)?,
        Check::StandbyLeader => false,
    })
}

fn is_replica(state: &State, query: &Parameters) -> Result<bool, String> {
    let tags = &state.settings().tags;
    let Some(server) = state.server().filter(|server| server.in_recovery) else { return Ok(false) };
    if tags.other.get("noloadbalance").is_some_and(|v| *v == true) {
        return Ok(false);
    }
    for (name, wanted) in query {
        let fits = match name.as_str() {
            "lag" => {
                let limit =
                    bytes(wanted).ok_or_else(|| format!("lag: `{wanted}` is not a size: write it like 16MB"))?;
                lag(state, server.replayed) <= limit
            }
            "replication_state" => wanted == "streaming" && server.streaming,
            tag => match tag.strip_prefix("tag_") {
                Some(tag) => tags.other.get(tag).and_then(parameter_text).as_ref() == Some(wanted),
                None => true,
            },
        };
        if !fits {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How far `position` is behind what is known of the leader.
fn lag(state: &State, position: Lsn) -> u64 {
    let status: PostgresStatus = state.view().json(&state.settings().scope.status()).unwrap_or_default();
    status.optime.0.saturating_sub(position.0)
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
