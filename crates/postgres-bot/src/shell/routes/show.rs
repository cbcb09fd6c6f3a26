//! What the bot and its cluster are, in Patroni's JSON.

use std::time::Duration;

use axum::{
    Json,
    extract::State as Extract,
    http::header,
    response::{IntoResponse, Response},
};
use bots_core::{
    machine::Time,
    shell::Clock,
    wire::{Lsn, Member, PostgresFacts, PostgresStatus, Timeline},
};
use serde_json::{Map, Value, json};

use super::Site;
use crate::{
    machine::{DataDir, Postgres, Role, Server, State},
    shell::{conninfo, postmaster::Life, server::Connection},
};

/// A peer that stands for leader waits for this answer: better an older one than none.
const FRESH_DEADLINE: Duration = Duration::from_millis(200);

/// `GET /patroni`: this member, with what its server says right now.
pub(super) async fn patroni(Extract(site): Extract<Site>) -> Json<Value> {
    let fresh = tokio::time::timeout(FRESH_DEADLINE, fresh(&site)).await.ok().flatten();
    let state = site.state();
    let server = fresh.as_ref().filter(|_| state.server().is_some()).or(state.server());
    Json(body(&site, &state, server, Clock::now()))
}

/// What the server says now; nothing if it does not answer.
async fn fresh(site: &Site) -> Option<Server> {
    if !matches!(site.inner.hands.postmaster.life(), Life::Alive { ready: true, .. }) {
        return None;
    }
    let known = site.state().server().map_or(Timeline::default(), |server| server.timeline);
    let mut kept = site.inner.connection.lock().await;
    if let Some(connection) = kept.take()
        && let Ok(server) = connection.facts(known).await
    {
        *kept = Some(connection);
        return Some(server);
    }
    let connection = Connection::open(&site.inner.hands.node, FRESH_DEADLINE).await.ok()?;
    let server = connection.facts(known).await.ok()?;
    *kept = Some(connection);
    Some(server)
}

/// The body of `/patroni` and of every health check.
pub(super) fn body(site: &Site, state: &State, server: Option<&Server>, now: Time) -> Value {
    let settings = state.settings();
    let mut out = Map::new();
    let mut put = |name: &str, value: Value| {
        out.insert(name.to_owned(), value);
    };
    put("state", json!(word(state)));
    put("role", json!(if server.is_some_and(|s| !s.in_recovery) { "primary" } else { "replica" }));
    put("node", json!(state.role()));
    put("server_version", json!(site.inner.hands.node.binaries.version().number()));
    if let Some(server) = server {
        put("timeline", json!(server.timeline));
        put(
            "xlog",
            if server.in_recovery {
                json!({"received_location": server.received, "replayed_location": server.replayed, "paused": false})
            } else {
                json!({"location": server.position})
            },
        );
        if server.streaming {
            put("replication_state", json!("streaming"));
        }
        if server.pending_restart {
            put("pending_restart", json!(true));
        }
    }
    if let Some(DataDir::Present { system_id, .. }) = state.data() {
        put("database_system_identifier", json!(system_id));
    }
    if state.leadership().holder(state.view()).is_none() {
        put("cluster_unlocked", json!(true));
    }
    if let Some(valid_until) = state.membership().valid_until() {
        // Counted from the last answered renewal.
        let seen = valid_until - state.membership().ttl();
        put("dcs_last_seen", json!((settings.epoch_unix_ms + seen.as_millis()) / 1_000));
        put("lease_left_ms", json!(valid_until.since(now).as_millis()));
    }
    let tags = state.tags();
    if !tags.is_empty() {
        put("tags", Value::Object(tags));
    }
    put("patroni", json!({"version": settings.version, "scope": settings.scope.name(), "name": settings.name}));
    Value::Object(out)
}

/// Patroni's word for the state of the server.
fn word(state: &State) -> &'static str {
    match (state.role(), state.postgres()) {
        (Role::Demoting | Role::Stopping, Postgres::Up(_) | Postgres::Silent | Postgres::Starting) => "stopping",
        (_, Postgres::Up(_)) => "running",
        (_, Postgres::Silent) => "unknown",
        (Role::Bootstrapping, _) => "initializing new cluster",
        (Role::Cloning, _) => "creating replica",
        (_, Postgres::Starting) => "starting",
        (Role::Recovering | Role::Primary | Role::Promoting, Postgres::Down) => "crashed",
        (_, Postgres::Down) => "stopped",
    }
}

/// `GET /cluster`: all members, from the keys that this bot watches.
pub(super) async fn cluster(Extract(site): Extract<Site>) -> Json<Value> {
    Json(cluster_body(&site.state()))
}

fn cluster_body(state: &State) -> Value {
    let (view, scope) = (state.view(), &state.settings().scope);
    let leader = state.leadership().holder(view);
    let prefix = scope.members_prefix();
    let members: Vec<(&str, Member, PostgresFacts)> = view
        .entries_below(&prefix)
        .into_iter()
        .filter_map(|(name, kv)| {
            let member = Member::from_json(&kv.value)?;
            let facts = member.facts()?;
            Some((name, member, facts))
        })
        .collect();
    let status: PostgresStatus = view.json(&scope.status()).unwrap_or_default();
    let of_leader =
        members.iter().find(|(name, ..)| leader == Some(*name)).and_then(|(_, _, facts)| facts.xlog_location);
    let head = of_leader.unwrap_or_default().max(status.optime);
    let members: Vec<Value> =
        members.iter().map(|(name, m, facts)| member_body(name, m, facts, leader, head)).collect();
    json!({"members": members, "scope": scope.name()})
}

fn member_body(name: &str, member: &Member, facts: &PostgresFacts, leader: Option<&str>, head: Lsn) -> Value {
    let leads = leader == Some(name);
    let state = facts.replication_state.as_deref().filter(|_| !leads).unwrap_or(&member.head.state);
    let mut out = json!({
        "name": name,
        "role": if leads { "leader" } else { "replica" },
        "state": state,
        "api_url": member.head.api_url,
    });
    if let Ok((host, port)) = conninfo::address(&facts.conn_url) {
        out["host"] = json!(host);
        out["port"] = json!(port);
    }
    if let Some(timeline) = facts.timeline {
        out["timeline"] = json!(timeline);
    }
    if facts.pending_restart {
        out["pending_restart"] = json!(true);
    }
    if !facts.tags.is_empty() {
        out["tags"] = json!(facts.tags);
    }
    if !leads {
        for (what, at) in [("receive_", facts.receive_lsn), ("replay_", facts.replay_lsn), ("", facts.xlog_location)] {
            out[format!("{what}lsn")] = at.map_or(json!("unknown"), |at| json!(at.to_string()));
            out[format!("{what}lag")] = at.map_or(json!("unknown"), |at| json!(head.0.saturating_sub(at.0)));
        }
    }
    out
}

/// `GET /history`: the timelines.
pub(super) async fn history(Extract(site): Extract<Site>) -> Response {
    let state = site.state();
    raw_json(state.view().value(&state.settings().scope.history()).unwrap_or("[]").to_owned())
}

/// A value of etcd that is JSON already.
pub(super) fn raw_json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}
