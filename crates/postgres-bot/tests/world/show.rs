//! Actions as a transcript shows them: short, without numbers that say nothing.

use std::fmt::Write as _;

use bots_core::{
    dcs::{Compare, DcsAction, Transaction, Write},
    wire::Member,
};
use postgres_bot::machine::{Action, Ask, SlotChange, SlotKind};

use super::{World, scope};

pub(crate) fn action(action: &Action, world: &World) -> String {
    match action {
        Action::Dcs(DcsAction::GrantLease { ttl }) => format!("ask etcd for a lease of {ttl}"),
        Action::Dcs(DcsAction::PaceLease { every, .. }) => format!("renew the lease every {every}"),
        Action::Dcs(DcsAction::RevokeLease { .. }) => String::from("give the lease back"),
        Action::Dcs(DcsAction::Transact { transaction, .. }) => self::transaction(transaction),
        Action::ProbeName { api_url } => format!("ask {api_url} who it is"),
        Action::InspectData => String::from("inspect the data directory"),
        Action::Observe => String::from("observe the server"),
        Action::Configure { parameters, .. } if world.configured().is_empty() => {
            format!("configure {} parameters", parameters.len())
        }
        Action::Configure { parameters, rules } => {
            let known = world.configured();
            let news = parameters.iter().filter(|(k, v)| known.get(*k) != Some(v)).map(|(k, v)| format!(" {k}={v}"));
            let gone = known.keys().filter(|k| !parameters.contains_key(*k)).map(|k| format!(" {k} unset"));
            let rules = (!rules.hba.is_empty()).then(|| format!(" hba {:?}", rules.hba));
            format!("configure{}", news.chain(gone).chain(rules).collect::<String>())
        }
        Action::SetFence { at, watchdog } => {
            let device = watchdog.map(|order| {
                let bound = if order.required { " or not at all" } else { "" };
                format!(
                    "; the device waits {} s, until {} from now{bound}",
                    order.timeout_s,
                    order.until.since(world.now)
                )
            });
            format!("the guard's fence: {} from now{}", at.since(world.now), device.unwrap_or_default())
        }
        Action::Run { job, .. } => format!("run: {job}"),
        Action::Cancel { .. } => {
            format!("give up: {}", world.job.as_ref().map_or_else(String::new, |(_, job)| job.to_string()))
        }
        Action::ProbePeers { peers, deadline, .. } => {
            let names: Vec<&str> = peers.keys().map(String::as_str).collect();
            format!("ask the peers [{}] within {deadline}", names.join(", "))
        }
        Action::ChangeSlots { changes } => {
            let change = |change: &SlotChange| match change {
                SlotChange::Create { name, kind: SlotKind::Physical } => format!("create {name}"),
                SlotChange::Create { name, kind: SlotKind::Logical { database, plugin } } => {
                    format!("create {name} for {plugin} in {database}")
                }
                SlotChange::Advance { name, to } => format!("advance {name} to {to}"),
                SlotChange::Follow { name, database, to } => format!("move the copy {name} in {database} to {to}"),
                SlotChange::Drop { name } => format!("drop {name}"),
            };
            format!("replication slots: {}", changes.iter().map(change).collect::<Vec<_>>().join(", "))
        }
        Action::LookAtSlots { leader, own, names, fetch, .. } => {
            let fetch = if fetch.is_empty() { String::new() } else { format!(", fetch [{}]", fetch.join(", ")) };
            format!("ask {} how it heeds {own}, and for the slots [{}]{fetch}", leader.name, names.join(", "))
        }
        Action::AskMembers { ask, members, deadline, .. } => {
            let names: Vec<&str> = members.keys().map(String::as_str).collect();
            format!("ask [{}] within {deadline}: {}", names.join(", "), self::ask(ask))
        }
        Action::AnswerMember { answer: Ok(()), .. } => String::from("answer: yes"),
        Action::AnswerMember { answer: Err(why), .. } => format!("answer: no, {why}"),
        Action::Exit { code, message } => format!("exit {code}: {message}"),
    }
}

fn ask(ask: &Ask) -> String {
    match ask {
        Ask::Lead { leader, generation } => format!("may {leader} lead on, with the lock of r{}?", generation.0),
        Ask::Stand { candidate } => format!("may {candidate} be elected?"),
    }
}

/// A write of the bot's own member key.
pub(crate) fn share(transaction: &Transaction) -> String {
    let value = transaction.then.iter().find_map(|write| match write {
        Write::Put { value, .. } => Some(value.as_str()),
        Write::Delete { .. } => None,
    });
    format!("share {}", member(value.unwrap_or_default()))
}

/// A member value on one line.
pub(crate) fn member(value: &str) -> String {
    let Some(Member { head, rest }) = Member::from_json(value) else { return value.to_owned() };
    let mut out = format!("{} ({}, node {}", head.role, head.state, head.node);
    for (field, value) in &rest {
        match field.as_str() {
            "conn_url" | "receive_lsn" | "replay_lsn" => {}
            "xlog_location" => {
                let _infallible = write!(out, ", at {}", bots_core::wire::Lsn(value.as_u64().unwrap_or_default()));
            }
            _other => {
                let _infallible = write!(out, ", {field} {}", value.to_string().trim_matches('"'));
            }
        }
    }
    out + ")"
}

pub(crate) fn transaction(transaction: &Transaction) -> String {
    let scope = scope();
    let short = |key: &str| scope.strip(key).unwrap_or(key).to_owned();
    let compare = transaction.compare.iter().map(|compare| match compare {
        Compare::Absent(k) => format!("no {}", short(k)),
        Compare::Present(k) => format!("some {}", short(k)),
        Compare::ValueIs(k, v) => format!("{} is `{v}`", short(k)),
        Compare::ModifiedAt(k, r) => format!("{} unchanged since r{}", short(k), r.0),
        Compare::CreatedAt(k, r) => format!("{} of r{}", short(k), r.0),
        Compare::LeaseIs(k, _) => format!("{} under our lease", short(k)),
    });
    let then = transaction.then.iter().map(|write| match write {
        Write::Put { key, value, .. } if key.contains("/members/") => format!("{} := {}", short(key), member(value)),
        Write::Put { key, value, lease: Some(_) } => format!("{} := `{value}` while the lease lasts", short(key)),
        Write::Put { key, value, lease: None } => format!("{} := `{value}`", short(key)),
        Write::Delete { key } => format!("delete {}", short(key)),
    });
    let (compare, then) = (compare.collect::<Vec<_>>().join(", "), then.collect::<Vec<_>>().join("; "));
    format!("ask etcd: if {compare} then {then}")
}
