//! After the last fault the fleet converges: one primary that accepts writes, all others streaming from it; the branch's
//! commit live on every serving bot; as many bots serving as the load asks for.

use bots_core::wire::{ContentRevision, Kind, SyncRecord, config::SyncMode};
use postgres_bot::machine::Role;
use web_bot::machine as web;

use crate::world::{Body, Node, World, mode_in, node_count_in};

pub(super) const REQUIREMENT: &str = "after the last fault the fleet converges within the stated bound";

/// The first thing that is not as it should be.
#[must_use]
pub fn unmet(world: &World) -> Option<String> {
    let absent = world.nodes.iter().find(|node| !node.bot_moves());
    absent.map(|node| format!("{} does not run", node.name)).or_else(|| postgres(world)).or_else(|| content(world))
}

fn postgres(world: &World) -> Option<String> {
    let scope = Node::scope_of(Kind::Postgres);
    let members: Vec<&Node> = world.nodes.iter().filter(|node| node.kind == Kind::Postgres).collect();
    if members.is_empty() {
        return None;
    }
    let Some(leader) = world.store.value(&scope.leader()) else { return Some(String::from("nobody leads")) };
    let mut primary = None;
    for node in &members {
        let (state, body) = (node.postgres_state()?, node.postgres()?);
        let role = state.role();
        if node.name == leader {
            if role != Role::Primary || !body.accepts_writes() || !state.accepts_writes(node.clock.local(world.now)) {
                return Some(format!("{leader} leads and is {role}, accepting writes: {}", body.accepts_writes()));
            }
            primary = Some(body);
        }
    }
    let primary = primary?;
    let key = world.store.value(&scope.sync()).and_then(|text| serde_json::from_str::<SyncRecord>(text).ok());
    let config = world.store.value(&scope.config()).unwrap_or_default();
    let mode = mode_in(config);
    if mode == SyncMode::Off {
        if let Some(key) = key.filter(SyncRecord::binds) {
            return Some(format!("without a synchronous mode there is the key {key:?}"));
        }
    } else if members.len() > 1 {
        let key = key.unwrap_or_default();
        if key.leader.as_deref() != Some(leader) || key.voters().is_empty() {
            return Some(format!("no commit of {leader} waits for a standby: {key:?}"));
        }
        let others = members.len() - 1;
        let count = node_count_in(config).min(others);
        let voters = if mode == SyncMode::On { count } else { others };
        if key.voters().len() != voters || key.quorum != voters - count {
            return Some(format!("commits of {leader} shall wait for {count} of {others} standbys: {key:?}"));
        }
    }
    for node in members.iter().filter(|node| node.name != leader) {
        let (state, body) = (node.postgres_state()?, node.postgres()?);
        if state.role() != Role::Replica {
            return Some(format!("{} is {}", node.name, state.role()));
        }
        let follows_leader = body.link.is_some_and(|link| world.nodes[link.to.0].name == leader);
        if !follows_leader || !body.disk.wal.is_part_of(&primary.disk.wal) {
            return Some(format!("{} does not stream from {leader}", node.name));
        }
        if body.disk.wal.timeline() != primary.disk.wal.timeline() {
            return Some(format!("{} is on timeline {}", node.name, body.disk.wal.timeline()));
        }
        if !state.server().is_some_and(|server| server.streaming) {
            return Some(format!("{} does not know that it streams", node.name));
        }
    }
    None
}

fn content(world: &World) -> Option<String> {
    if world.plan.cast.content == 0 {
        return None;
    }
    let live = world.store.value(&Node::scope_of(Kind::Content).revision_live());
    let live: Option<ContentRevision> = live.and_then(|text| serde_json::from_str(text).ok());
    let live = live.map_or_else(String::new, |revision| revision.sha);
    if live != world.origin.head() {
        return Some(format!("`{live}` is live, and the branch is at {}", world.origin.head()));
    }
    let mut serving = 0;
    for node in world.nodes.iter().filter(|node| node.kind == Kind::Web) {
        let (Some(state), Body::Web(body)) = (node.web_state(), &node.body) else { continue };
        match (state.role(), body.served()) {
            (web::Role::Serving, Some(sha)) if sha == live => serving += 1,
            (web::Role::Serving, other) => return Some(format!("{} serves {other:?}, live is {live}", node.name)),
            (web::Role::Idle, _) => {}
            (role, _) => return Some(format!("{} is {role}", node.name)),
        }
        if state.role() == web::Role::Serving && state.slot_for_sure(node.clock.local(world.now)).is_none() {
            return Some(format!("{} serves without a claim", node.name));
        }
    }
    let wanted = world.load.bots_wanted().min(world.plan.cast.web);
    (serving != wanted).then(|| format!("{serving} bots serve, the load asks for {wanted}"))
}
