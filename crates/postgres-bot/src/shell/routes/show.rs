//! What the bot and its cluster are, in Patroni's JSON.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State as Extract,
    http::header,
    response::{IntoResponse, Response},
};
use bots_core::{
    machine::Time,
    shell::Clock,
    wire::{FailoverRequest, Lsn, Member, PostgresFacts, PostgresStatus, Timeline, tags::is_true},
};
use serde_json::{Map, Value, json};

use super::{Site, health::Standing};
use crate::{
    machine::{DataDir, Postgres, Role, Server, State},
    shell::{conninfo, postmaster::Life, server::Connection},
};

/// A peer that stands for leader waits for this answer: better an older one than none.
const FRESH_DEADLINE: Duration = Duration::from_millis(200);

/// `GET /patroni`: this member, with what its server says right now.
pub(super) async fn patroni(Extract(site): Extract<Site>) -> Json<Value> {
    let (state, fresh) = looked_at(&site).await;
    let server = fresh.as_ref().map(|fresh| &fresh.server).filter(|_| state.server().is_some()).or(state.server());
    let mut out = body(&site, &state, server, Clock::now());
    // What is asked here knows where the log ends; that its timeline is the newest, the eye has made sure of.
    let is_placed = state.server().is_some_and(|server| server.settled);
    if !fresh.as_ref().is_some_and(|fresh| fresh.server.settled && is_placed || !fresh.server.in_recovery) {
        // Who counts votes must not count this as one: there may be more on the disk than it shows.
        out["position_may_grow"] = json!(true);
    }
    let Some(details) = fresh.map(|fresh| fresh.details) else { return Json(out) };
    out["postmaster_start_time"] = details["postmaster_start_time"].clone();
    if out["xlog"].get("replayed_location").is_some() {
        out["xlog"]["replayed_timestamp"] = details["replayed_timestamp"].clone();
        out["xlog"]["paused"] = details["paused"].clone();
    }
    for optional in ["latest_end_lsn", "replication"] {
        if !details[optional].is_null() {
            out[optional] = details[optional].clone();
        }
    }
    Json(out)
}

/// What the server says at this moment.
pub(super) struct Fresh {
    pub(super) server: Server,
    /// See [`Connection::details`].
    pub(super) details: Value,
}

/// The state, with what the server says now if it answers in time.
pub(super) async fn looked_at(site: &Site) -> (Arc<State>, Option<Fresh>) {
    let fresh = tokio::time::timeout(FRESH_DEADLINE, fresh(site)).await.ok().flatten();
    (site.state(), fresh)
}

async fn fresh(site: &Site) -> Option<Fresh> {
    if !matches!(site.inner.hands.postmaster.life(), Life::Alive { ready: true, .. }) {
        return None;
    }
    let known = site.state().server().map_or(Timeline::default(), |server| server.timeline);
    let mut kept = site.inner.connection.lock().await;
    if let Some(connection) = kept.take()
        && let Ok(fresh) = ask(&connection, known).await
    {
        *kept = Some(connection);
        return Some(fresh);
    }
    let connection = Connection::open(&site.inner.hands.node, FRESH_DEADLINE).await.ok()?;
    let fresh = ask(&connection, known).await.ok()?;
    *kept = Some(connection);
    Some(fresh)
}

async fn ask(connection: &Connection, known: Timeline) -> anyhow::Result<Fresh> {
    Ok(Fresh { server: connection.facts(known).await?, details: connection.details().await? })
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
    let version = server.map(|server| server.version).filter(|version| *version > 0);
    put("server_version", json!(version.unwrap_or_else(|| site.inner.hands.node.binaries.version().number())));
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
        if let Some(replicates) = server.replication_state() {
            put("replication_state", json!(replicates));
        }
        if server.in_recovery {
            match standing(state, &settings.name) {
                Standing::Sync => put("sync_standby", json!(true)),
                Standing::Quorum => put("quorum_standby", json!(true)),
                Standing::Any | Standing::Async => {}
            }
        }
    }
    // What the member key says, so that the two never differ.
    let shared = state.facts();
    if shared.pending_restart {
        put("pending_restart", json!(true));
        put("pending_restart_reason", json!(shared.pending_restart_reason));
    }
    if let Some(scheduled) = &shared.scheduled_restart {
        put("scheduled_restart", json!(scheduled));
    }
    if let Some(copying) = &shared.copying {
        put("copying", json!(copying));
    }
    if shared.pause {
        put("pause", json!(true));
    }
    if let Some(DataDir::Present { system_id, .. }) = state.data() {
        put("database_system_identifier", json!(system_id));
    }
    if state.leadership().holder(state.view()).is_none() {
        put("cluster_unlocked", json!(true));
    }
    if let Some(valid_until) = state.membership().valid_until() {
        put("dcs_last_seen", json!(dcs_last_seen(state)));
        put("lease_left_ms", json!(valid_until.since(now).as_millis()));
    }
    if state.bar_by_watchdog(now).is_some() {
        put("watchdog_failed", json!(true));
    }
    if !state.is_well() {
        put("unfit", json!(true));
    }
    if state.leads_by_word(now) {
        put("failsafe_mode_is_active", json!(true));
    }
    let tags = state.tags();
    if !tags.is_empty() {
        put("tags", Value::Object(tags));
    }
    put("patroni", json!({"version": settings.version, "scope": settings.scope.name(), "name": settings.name}));
    Value::Object(out)
}

/// When etcd was last heard of, in seconds since 1970: counted from the last answered renewal.
pub(super) fn dcs_last_seen(state: &State) -> u64 {
    let Some(valid_until) = state.membership().valid_until() else { return 0 };
    let seen = valid_until - state.membership().lease_ttl();
    (state.settings().epoch_unix_ms + seen.as_millis()) / 1_000
}

/// How the `sync` key counts the member, as the cluster's configuration reads it.
pub(super) fn standing(state: &State, member: &str) -> Standing {
    let (view, scope) = (state.view(), &state.settings().scope);
    let sync: Value = view.json(&scope.sync()).unwrap_or_default();
    let named = sync["sync_standby"].as_str().is_some_and(|names| names.split(',').any(|name| name.trim() == member));
    let config: Value = view.json(&scope.config()).unwrap_or_default();
    match (&config["synchronous_mode"], named) {
        (Value::String(mode), true) if mode == "quorum" => Standing::Quorum,
        (mode, true) if is_true(mode) => Standing::Sync,
        _otherwise => Standing::Async,
    }
}

/// Patroni's word for the state of the server.
pub(super) fn word(state: &State) -> &'static str {
    match (state.role(), state.postgres()) {
        (Role::Demoting | Role::Stopping, Postgres::Up(_) | Postgres::Silent | Postgres::Starting) => "stopping",
        (Role::Restarting, _) => "restarting",
        (_, Postgres::Up(_)) => "running",
        (_, Postgres::Silent) => "unknown",
        (Role::Bootstrapping, _) => "initializing new cluster",
        (Role::Cloning, _) => "creating replica",
        (Role::Rejoining | Role::Waiting, _) if state.is_remade() => "creating replica",
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
    let leader = state.leadership().holder(view);
    let status: PostgresStatus = view.json(&scope.status()).unwrap_or_default();
    let of_leader =
        members.iter().find(|(name, ..)| leader == Some(*name)).and_then(|(_, _, facts)| facts.xlog_location);
    let head = of_leader.unwrap_or_default().max(status.optime);
    let members: Vec<Value> = members.iter().map(|(name, m, facts)| member_body(state, name, m, facts, head)).collect();
    let mut out = json!({"members": members, "scope": scope.name()});
    if state.dynamic().pause {
        out["pause"] = json!(true);
    }
    let request: FailoverRequest = view.json(&scope.failover()).unwrap_or_default();
    if let Some(at) = request.scheduled_at {
        out["scheduled_switchover"] = json!({"at": at});
        for (field, name) in [("from", request.leader), ("to", request.member)] {
            if let Some(name) = name {
                out["scheduled_switchover"][field] = json!(name);
            }
        }
    }
    out
}

fn member_body(state: &State, name: &str, member: &Member, facts: &PostgresFacts, head: Lsn) -> Value {
    let leads = state.leadership().holder(state.view()) == Some(name);
    let role = match standing(state, name) {
        _any if leads => "leader",
        Standing::Sync => "sync_standby",
        Standing::Quorum => "quorum_standby",
        Standing::Any | Standing::Async => "replica",
    };
    let word = facts.replication_state.as_deref().filter(|_| !leads).unwrap_or(&member.head.state);
    let mut out = json!({"name": name, "role": role, "state": word, "api_url": member.head.api_url});
    if let Ok((host, port)) = conninfo::address(&facts.conn_url) {
        out["host"] = json!(host);
        out["port"] = json!(port);
    }
    // Optional in the member key, and the same here.
    for field in ["timeline", "pending_restart", "pending_restart_reason", "scheduled_restart", "copying", "tags"] {
        if let Some(value) = member.rest.get(field) {
            out[field] = value.clone();
        }
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
