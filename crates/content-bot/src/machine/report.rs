//! What the bot says of itself: the report for operators and the member key for its peers. Decides nothing.

use bots_core::{
    machine::{Report, Time},
    wire::{ContentFacts, ContentRevision, Kind, Member, MemberHead, Quarantined},
};

use super::{
    Role, State, leader,
    mirror::short,
    operator,
    publication::{Pointers, Readiness},
};

/// The report.
pub(super) fn report(state: &State, now: Time) -> Report {
    let pointers = state.pointers();
    let mut report = Report::new(state.role(), state.since(), now)
        .doing(doing(state, &pointers))
        .waiting_for(waiting_for(state, &pointers))
        .next(state.plan(), now);
    if state.role() == Role::Follower
        && let Some(holder) = state.leadership.holder(&state.view)
    {
        report = report.why_not("lead", format!("{holder} holds the leader key"));
    }
    if state.role().leads() {
        for (alternative, because) in why_not(state, &pointers, now) {
            report = report.why_not(alternative, because);
        }
    }
    for trouble in troubles(state, &pointers, now) {
        report = report.trouble(trouble);
    }
    report
}

/// The member key's value.
pub(super) fn member(state: &State, now: Time) -> Member {
    let word = match state.role() {
        Role::Initializing => "starting",
        Role::Follower => "standby",
        Role::Watching => "watching",
        Role::Fetching => "fetching",
        Role::Preparing => "preparing",
        Role::Detached => "detached",
        Role::Stopped => "stopped",
    };
    let head = MemberHead {
        kind: Kind::Content,
        state: word.to_owned(),
        role: if state.role().leads() { "leader" } else { "member" }.to_owned(),
        version: state.settings.version.clone(),
        api_url: state.settings.api_url.clone(),
        instance: state.settings.instance.clone(),
        node: state.role().to_string(),
        since_unix_ms: state.unix_ms(state.since()),
    };
    let pointers = state.pointers();
    let asked_for = [pointers.candidate(), pointers.live()].into_iter().flatten().map(|r| r.sha.as_str());
    let holds = asked_for.filter(|sha| state.mirror.holds(sha)).chain(state.mirror.newest().map(|c| c.sha.as_str()));
    let facts = ContentFacts {
        pack_url: state.settings.pack_url.clone(),
        holds: holds.map(str::to_owned).next(),
        trouble: lasting_troubles(state, &pointers, now).into_iter().next(),
    };
    Member::new(head, &facts)
}

fn doing(state: &State, pointers: &Pointers) -> String {
    let (what, origin) = (state.settings.reference.as_str(), &state.settings.origin);
    let pinned = state.pin.as_ref().map(|pin| format!("commit {}, which is pinned,", short(&pin.sha)));
    let what = pinned.as_deref().unwrap_or(what);
    let live = match pointers.live() {
        Some(live) => format!("{} is live", name(live)),
        None => String::from("nothing is live yet"),
    };
    match state.role() {
        Role::Initializing => String::from("reads etcd and takes its name"),
        Role::Follower => format!("stands by; {live}"),
        Role::Watching => format!("publishes {what} of {origin}; {live}"),
        Role::Fetching => {
            format!("fetches commit {} of {origin}; {live}", state.mirror.fetching().map_or("", short))
        }
        Role::Preparing => match pointers.candidate() {
            Some(candidate) => format!("lets the web bots prepare {}; {live}", name(candidate)),
            None => format!("replaces a candidate that it cannot read; {live}"),
        },
        Role::Detached => format!("cannot reach etcd and decides nothing; {live}"),
        Role::Stopped => String::from("has stopped"),
    }
}

fn waiting_for(state: &State, pointers: &Pointers) -> String {
    match state.role() {
        Role::Initializing | Role::Detached => match state.membership.trouble() {
            Some(trouble) => trouble,
            None => String::from("etcd"),
        },
        Role::Follower => String::from("the lock to fall free, or a push to hand on"),
        Role::Watching if state.origin.is_looking() => String::from("the origin's answer"),
        Role::Watching => String::from("a push, or the next look at the origin"),
        Role::Fetching => String::from("the end of the fetch"),
        Role::Preparing => match pointers.candidate() {
            Some(candidate) if !state.mirror.holds(&candidate.sha) => {
                format!("commit {} to be fetched", short(&candidate.sha))
            }
            Some(candidate) => {
                let late = Readiness::of(&state.view, &state.settings.web_scopes, &candidate.sha).late;
                match state.trial.shown() {
                    Some(trial) => trial,
                    None if late.is_empty() => String::from("etcd"),
                    None => format!("{} to prepare it", late.join(", ")),
                }
            }
            None => String::from("etcd"),
        },
        Role::Stopped => String::from("nothing"),
    }
}

fn why_not(state: &State, pointers: &Pointers, now: Time) -> Vec<(String, String)> {
    let mut found = Vec::new();
    if let Some(tip) = state.goal()
        && leader::is_quarantined(state, &tip.sha)
    {
        found.push((format!("publish {}", short(&tip.sha)), format!("it is quarantined: {}", reason(state, &tip.sha))));
    }
    if let Some(candidate) = pointers.candidate()
        && state.mirror.holds(&candidate.sha)
    {
        let late = Readiness::of(&state.view, &state.settings.web_scopes, &candidate.sha).late.join(", ");
        let timeout = state.settings.prepare_timeout;
        let because = if let Some((_, readiness)) = leader::held(state, pointers, now) {
            Some(format!("{timeout} are over, and {} has prepared it", nobody(&readiness)))
        } else {
            (!late.is_empty()).then(|| format!("{late} may take up to {timeout} to prepare it"))
        };
        found.extend(because.map(|because| (format!("publish {} now", short(&candidate.sha)), because)));
    }
    found
}

/// Troubles with their figures, which change all the time.
fn troubles(state: &State, pointers: &Pointers, now: Time) -> Vec<String> {
    let mut found: Vec<String> = state.membership.trouble().into_iter().collect();
    found.extend(state.export.troubles(now));
    if state.role() == Role::Follower {
        found.extend(state.mirror.backoff().trouble(now));
    }
    if state.role().leads() {
        found.extend(state.origin.backoff().trouble(now));
        found.extend(state.mirror.backoff().trouble(now));
        found.extend(state.purge.backoff().trouble(now));
        found.extend(state.publication.setback().map(str::to_owned));
    }
    let plain = [state.origin.backoff().why(), state.mirror.backoff().why(), state.purge.backoff().why()];
    found.extend(lasting_troubles(state, pointers, now).into_iter().filter(|t| !plain.contains(&Some(t.as_str()))));
    found
}

/// Troubles without figures, for the member key.
fn lasting_troubles(state: &State, pointers: &Pointers, now: Time) -> Vec<String> {
    let mut found = Vec::new();
    if !state.role().leads() {
        return found;
    }
    let (what, origin) = (state.settings.reference.as_str(), &state.settings.origin);
    if state.origin.is_missing() {
        found.push(format!("{origin} has no branch or tag `{what}`: push it, or correct git.ref"));
    }
    if let Some(tip) = state.goal()
        && leader::is_quarantined(state, &tip.sha)
    {
        let (sha, reason) = (short(&tip.sha), reason(state, &tip.sha));
        let key = state.settings.scope.quarantine(&tip.sha);
        found.push(format!("commit {sha} is quarantined: {reason} (to try it again, `botctl content unquarantine`, or delete the key {key})"));
    }
    if let Some((candidate, readiness)) = leader::held(state, pointers, now) {
        found.push(held(candidate, &readiness));
    }
    found.extend(operator::trouble(&state.settings.scope, &state.view));
    let failures = [state.origin.backoff().why(), state.mirror.backoff().why(), state.purge.backoff().why()];
    found.extend(failures.into_iter().flatten().map(str::to_owned));
    for sha in state.mirror.vanished().filter(|sha| state.goal().is_none_or(|tip| tip.sha != **sha)) {
        let role = if pointers.live_is(sha) { "live " } else { "" };
        found.push(format!(
            "{role}commit {} is gone from the origin (force-push?) and not in this mirror: push it again, or a new one",
            short(sha)
        ));
    }
    if let Some(late) = state.publication.late()
        && pointers.live_is(&late.sha)
    {
        let still = Readiness::of(&state.view, &state.settings.web_scopes, &late.sha).late;
        let names: Vec<&str> = late.names.iter().filter(|n| still.contains(n)).map(String::as_str).collect();
        if !names.is_empty() {
            let timeout = state.settings.prepare_timeout;
            let sha = short(&late.sha);
            found.push(format!(
                "{} had not prepared {sha} after {timeout}: it went live without them",
                names.join(", ")
            ));
        }
    }
    found
}

/// Why a candidate waits beyond its time, without figures.
fn held(candidate: &ContentRevision, readiness: &Readiness) -> String {
    let (sha, who) = (short(&candidate.sha), nobody(readiness));
    let why = readiness.trouble.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    format!("commit {sha} does not go live before somebody could serve it: {who} has prepared it{why}")
}

fn nobody(readiness: &Readiness) -> String {
    if readiness.late.is_empty() {
        String::from("no web bot")
    } else {
        format!("none of {}", readiness.late.join(", "))
    }
}

fn reason(state: &State, sha: &str) -> String {
    let pending = state.publication.unfit().filter(|u| u.sha == sha).map(|u| u.reason.clone());
    let key = state.settings.scope.quarantine(sha);
    let marked = || state.view.json::<Quarantined>(&key).map(|q| q.reason);
    pending.or_else(marked).unwrap_or_else(|| format!("see the key {key}"))
}

fn name(revision: &ContentRevision) -> String {
    format!("{} (generation {})", short(&revision.sha), revision.generation)
}
