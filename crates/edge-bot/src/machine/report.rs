//! What the bot says of itself: the report for operators and the member key for its peers. Decides nothing.

use bots_core::{
    machine::{Report, Time},
    wire::{EdgeFacts, Kind, Member, MemberHead},
};

use super::{Admin, Backend, HOLD_MAX, Role, Server, State};

/// The report.
pub(super) fn report(state: &State, now: Time) -> Report {
    let mut report = Report::new(state.role(), state.since(), now)
        .doing(doing(state))
        .waiting_for(waiting_for(state))
        .next(state.deadline(), now);
    if state.role() == Role::Routing
        && let Some(why) = &state.wanted.held_because
    {
        report = report.why_not("route to a primary", why.clone());
    }
    if state.role() == Role::Keeping {
        report = report.why_not("change routes", "what is known of etcd may be old");
    }
    if let Some(leader) = state.wanted.leader.as_ref().filter(|_| state.is_hold_over(now)) {
        let name = &leader.name;
        report = report.trouble(format!(
            "{name} has been about to hand over for {HOLD_MAX}: connections go to it again; look at its report"
        ));
    }
    for trouble in troubles(state) {
        report = report.trouble(trouble);
    }
    report
}

/// The member key's value.
pub(super) fn member(state: &State) -> Member {
    let held = state.role() == Role::Routing && state.settings.postgres.is_some() && state.routed().is_none();
    let head = MemberHead {
        kind: Kind::Edge,
        state: if held { String::from("holding") } else { state.role().to_string() },
        role: String::from("member"),
        version: state.settings.version.clone(),
        api_url: state.settings.api_url.clone(),
        instance: state.settings.instance.clone(),
        node: state.role().to_string(),
        since_unix_ms: state.unix_ms(state.since()),
    };
    let routed = state.routed().filter(|_| state.role() == Role::Routing);
    let facts = EdgeFacts {
        postgres_scope: state.settings.postgres.as_ref().map(|s| s.name().to_owned()),
        leader: routed.map(|(name, _)| name.to_owned()),
        generation: routed.map(|(_, generation)| generation),
        web_scope: state.settings.web.as_ref().map(|s| s.name().to_owned()),
        trouble: troubles(state).into_iter().next(),
    };
    Member::new(head, &facts)
}

fn doing(state: &State) -> String {
    match state.role() {
        Role::Initializing => String::from("looks for a proxy that runs"),
        Role::Starting if state.settings.start_proxy => String::from("starts the proxy"),
        Role::Starting => String::from("has no proxy, and is not to start one"),
        Role::Keeping => format!("keeps the routes as they are: {}", routes(state)),
        Role::Routing => format!("routes: {}", routes(state)),
        Role::Stopping => String::from("lets the proxy finish its sessions"),
        Role::Stopped => String::from("has stopped"),
    }
}

/// What the proxy is seen to do.
fn routes(state: &State) -> String {
    let mut parts = Vec::new();
    let takes = |s: &&Server| s.admin == Admin::Ready && s.up;
    let count = |backend| state.proxy.snapshot().of(backend).filter(takes).count();
    if state.settings.postgres.is_some() {
        parts.push(match state.routed() {
            Some((name, generation)) => format!("primary is {name} (generation {})", generation.0),
            None if state.role() == Role::Keeping => format!("primary {}", count(Backend::Primary)),
            None => String::from("connections for the primary are held"),
        });
        if state.settings.replicas {
            parts.push(format!("replicas {}", count(Backend::Replicas)));
        }
    }
    if state.settings.web.is_some() {
        parts.push(format!("web {}", count(Backend::Web)));
    }
    let origin = if state.proxy.was_started() { "started" } else { "adopted" };
    format!("{} (proxy {origin})", parts.join(", "))
}

fn waiting_for(state: &State) -> String {
    match state.role() {
        Role::Initializing => String::from("the proxy's answer"),
        Role::Starting if state.proxy.is_starting() => String::from("the proxy to come up"),
        Role::Starting if state.settings.start_proxy => String::from("the next try to start the proxy"),
        Role::Starting => String::from("somebody to start the proxy"),
        Role::Keeping => String::from("etcd"),
        Role::Routing if state.wanted.leader.as_ref().is_some_and(|l| l.hands_over) => {
            String::from("the leader to hand over")
        }
        Role::Routing if state.wanted.held_because.is_some() => String::from("a leader that accepts writes"),
        Role::Routing => String::from("etcd or the proxy to change"),
        Role::Stopping => String::from("the proxy's end"),
        Role::Stopped => String::from("nothing"),
    }
}

fn troubles(state: &State) -> Vec<String> {
    let mut found: Vec<String> = state.membership.trouble().into_iter().collect();
    found.extend(state.proxy.trouble().map(str::to_owned));
    if state.role() == Role::Keeping {
        found.push(String::from("etcd is not watched: routes stay as they are"));
    }
    for (backend, name) in &state.homeless {
        found.push(format!(
            "{name} has no place in the proxy's backend {backend}: raise proxy.places and restart the proxy"
        ));
    }
    found.extend(state.names.unknown().map(|host| format!("the host name {host} has no address: correct it, or DNS")));
    if let Some((name, check)) = state.overruled.as_ref().filter(|_| state.role() == Role::Routing) {
        found.push(format!(
            "{name} leads, and the proxy's check of it at {check} fails: see to it that the proxy reaches its API"
        ));
    }
    found
}
