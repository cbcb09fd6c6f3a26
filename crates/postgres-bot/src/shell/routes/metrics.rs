//! `GET /metrics`: what Patroni's dashboards and alerts ask for, by its names, and then the bot's own figures.

use axum::{
    extract::State as Extract,
    http::header,
    response::{IntoResponse, Response},
};
use bots_core::shell::Clock;
use serde_json::Value;

use super::{
    Site,
    health::Standing,
    show::{self, Fresh},
};
use crate::machine::State;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Patroni's words for the state of a server, each at the place that its metric counts it by.
const STATES: [&str; 15] = [
    "initializing new cluster",
    "initdb failed",
    "running custom bootstrap script",
    "custom bootstrap failed",
    "creating replica",
    "running",
    "starting",
    "starting after custom bootstrap",
    "start failed",
    "restarting",
    "restart failed",
    "stopping",
    "stopped",
    "stop failed",
    "crashed",
];

/// Both sets in one text. Patroni's are gauges throughout: a counter's name would have to end in `_total` here.
pub(super) async fn all(Extract(site): Extract<Site>) -> Response {
    let (state, fresh) = show::looked_at(&site).await;
    let mut text = String::new();
    let settings = state.settings();
    let labels = format!("scope=\"{}\",name=\"{}\"", settings.scope.name(), settings.name);
    for (name, help, value) in figures(&site, &state, fresh.as_ref()) {
        text += &format!(
            "# HELP patroni_{name} {help}.\n# TYPE patroni_{name} gauge\npatroni_{name}{{{labels}}} {value}\n"
        );
    }
    text += &site.inner.metrics.text();
    ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response()
}

fn figures(site: &Site, state: &State, fresh: Option<&Fresh>) -> Vec<(&'static str, &'static str, String)> {
    let yes = |is: bool| String::from(if is { "1" } else { "0" });
    let server = fresh.map(|fresh| &fresh.server).or(state.server());
    let standby = server.filter(|server| server.in_recovery);
    let primary = server.filter(|server| !server.in_recovery);
    let detail = |field: &str| fresh.and_then(|fresh| fresh.details[field].as_f64()).unwrap_or(0.0).to_string();
    let word = show::word(state);
    let index = STATES.iter().position(|known| *known == word).map_or_else(|| String::from("-1"), |at| at.to_string());
    let standing = show::standing(state, &state.settings().name);
    let shared = state.facts();
    let version = site.inner.hands.node.binaries.version().number();
    let server_version = server.map_or(0, |server| if server.version > 0 { server.version } else { version });
    let replay_paused = fresh.is_some_and(|fresh| fresh.details["paused"] == Value::Bool(true));
    vec![
        ("version", "The version of the bot without periods", padded(&state.settings().version)),
        ("postgres_running", "Value is 1 if Postgres is running, 0 otherwise", yes(word == "running")),
        ("postmaster_start_time", "Epoch seconds since Postgres started", detail("postmaster_start_epoch")),
        ("primary", "Value is 1 if this node is the leader, 0 otherwise", yes(primary.is_some())),
        (
            "xlog_location",
            "Position of the log, 0 if this node is not the leader",
            primary.map_or(0, |server| server.position.0).to_string(),
        ),
        ("standby_leader", "Value is 1 if this node is the standby_leader, 0 otherwise", yes(false)),
        ("replica", "Value is 1 if this node is a replica, 0 otherwise", yes(primary.is_none())),
        (
            "sync_standby",
            "Value is 1 if this node is a sync standby, 0 otherwise",
            yes(standby.is_some() && standing == Standing::Sync),
        ),
        (
            "quorum_standby",
            "Value is 1 if this node is a quorum standby, 0 otherwise",
            yes(standby.is_some() && standing == Standing::Quorum),
        ),
        (
            "xlog_received_location",
            "Position up to which the log was received, 0 if this node is not a replica",
            standby.map_or(0, |server| server.received.0).to_string(),
        ),
        (
            "xlog_replayed_location",
            "Position up to which the log was replayed, 0 if this node is not a replica",
            standby.map_or(0, |server| server.replayed.0).to_string(),
        ),
        ("xlog_replayed_timestamp", "Time of the last transaction replayed, 0 if null", detail("replayed_epoch")),
        ("xlog_paused", "Value is 1 if the replay of the log is paused, 0 otherwise", yes(replay_paused)),
        (
            "postgres_streaming",
            "Value is 1 if Postgres is streaming, 0 otherwise",
            yes(standby.is_some_and(|server| server.streaming)),
        ),
        (
            "postgres_in_archive_recovery",
            "Value is 1 if Postgres is replicating from archive, 0 otherwise",
            yes(standby.is_some_and(|server| server.restores && !server.streaming)),
        ),
        ("postgres_server_version", "Version of Postgres (if running), 0 otherwise", server_version.to_string()),
        (
            "cluster_unlocked",
            "Value is 1 if the cluster is unlocked, 0 if locked",
            yes(state.leadership().holder(state.view()).is_none()),
        ),
        (
            "failsafe_mode_is_active",
            "Value is 1 if failsafe mode is active, 0 if inactive",
            yes(state.leads_by_word(Clock::now())),
        ),
        (
            "postgres_timeline",
            "Postgres timeline of this node (if running), 0 otherwise",
            server.map_or(0, |server| server.timeline.0).to_string(),
        ),
        ("dcs_last_seen", "Epoch timestamp when etcd was last heard of", show::dcs_last_seen(state).to_string()),
        ("pending_restart", "Value is 1 if the node needs a restart, 0 otherwise", yes(shared.pending_restart)),
        ("is_paused", "Value is 1 if auto failover is disabled, 0 otherwise", yes(state.dynamic().pause)),
        ("postgres_state", "Numeric representation of the state of Postgres", index),
    ]
}

/// `4.1.5` as `040105`.
fn padded(version: &str) -> String {
    version.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok()).map(|part| format!("{part:02}")).collect()
}

#[cfg(test)]
mod tests {
    use super::padded;

    #[test]
    fn versions_are_padded_as_patroni_does() {
        assert_eq!(padded("4.1.5"), "040105");
        assert_eq!(padded("0.1.0-dev"), "000100");
    }
}
