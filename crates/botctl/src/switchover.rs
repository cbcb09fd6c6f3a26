//! `botctl switchover`: what may be asked, and how it goes on. Pure; `main.rs` writes the key and watches.

use bots_core::{
    dcs::{Compare, Scope, Transaction, Write},
    wire::{FailoverRequest, Kind, Member, PostgresFacts, tags},
};

use crate::{failure::Failure, fleet::ScopeView};

/// A switchover that may be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) leader: String,
    pub(crate) to: Option<String>,
    pub(crate) transaction: Transaction,
}

/// How a switchover stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Not at its end.
    Under,
    /// The new leader takes writes.
    Done(String),
    /// Another one than was asked for leads, and takes writes.
    Other(String),
    /// The request is gone, and nobody else leads.
    Refused,
}

impl Plan {
    /// Checks the request against what the store shows.
    pub(crate) fn new(scope: &Scope, view: &ScopeView, to: Option<&str>) -> Result<Self, Failure> {
        let name = scope.name();
        let Some(leader) = view.leader() else {
            return Err(Failure::failed(format!("{name} has no leader: there is nobody to hand over from")));
        };
        if view.members.get(leader).is_some_and(|m| m.head.kind != Kind::Postgres) {
            return Err(Failure::failed(format!(
                "{name} is no Postgres scope: its bots elect their leader themselves"
            )));
        }
        match to {
            Some(to) if to == leader => return Err(Failure::failed(format!("{to} leads {name} already"))),
            Some(to) => {
                let Some(member) = view.members.get(to) else {
                    let known = view.members.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                    return Err(Failure::not_found(format!("{name} has no member {to}: it has {known}")));
                };
                may_lead(to, member).map_err(Failure::failed)?;
            }
            None => {
                let others = view.members.iter().filter(|(n, _)| n.as_str() != leader);
                let refusals: Vec<String> = others.map(|(n, m)| may_lead(n, m)).filter_map(Result::err).collect();
                if refusals.len() + 1 >= view.members.len() {
                    let why = if refusals.is_empty() { String::from("it is alone") } else { refusals.join("; ") };
                    return Err(Failure::failed(format!("no replica of {name} can take over from {leader}: {why}")));
                }
            }
        }
        let pending = view.json::<FailoverRequest>("failover").filter(|r| !r.is_empty());
        if let Some(pending) = pending {
            let to = pending.member.as_deref().unwrap_or("any replica");
            return Err(Failure::failed(format!(
                "a switchover of {name} to {to} is under way already: wait for its end"
            )));
        }
        Ok(Self { leader: leader.to_owned(), to: to.map(str::to_owned), transaction: request(scope, view, leader, to) })
    }

    /// How the switchover stands, now that the store shows `view`. Only for views from after the request.
    pub(crate) fn progress(&self, view: &ScopeView) -> Progress {
        let waiting = view.json::<FailoverRequest>("failover").is_some_and(|r| !r.is_empty());
        match view.leader() {
            Some(leader) if leader == self.leader && !waiting => Progress::Refused,
            Some(leader) if leader != self.leader => match view.members.get(leader) {
                Some(member) if member.head.role == "primary" => match &self.to {
                    Some(to) if to != leader => Progress::Other(leader.to_owned()),
                    Some(_) | None => Progress::Done(leader.to_owned()),
                },
                Some(_) | None => Progress::Under,
            },
            Some(_) | None => Progress::Under,
        }
    }
}

/// The state of a member whose server runs, as Postgres bots write it.
const RUNNING: &str = "running";

fn may_lead(name: &str, member: &Member) -> Result<(), String> {
    let facts = member.facts::<PostgresFacts>().unwrap_or_default();
    if tags::nofailover(&facts.tags) {
        return Err(format!("{name} has the tag nofailover"));
    }
    match facts.replication_state.as_deref() {
        Some("streaming") => Ok(()),
        // Its primary has just been restarted, say: the leader waits for it for some seconds, and says what becomes of it.
        None if member.head.state == RUNNING => Ok(()),
        Some(other) => Err(format!("{name} is not streaming, it is {other}")),
        None => Err(format!("{name} is not streaming, it is {}", member.head.state)),
    }
}

fn request(scope: &Scope, view: &ScopeView, leader: &str, to: Option<&str>) -> Transaction {
    let key = scope.failover();
    let unchanged = match view.keys.get("failover") {
        Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
        None => Compare::Absent(key.clone()),
    };
    let request =
        FailoverRequest { leader: Some(leader.to_owned()), member: to.map(str::to_owned), scheduled_at: None };
    let value = serde_json::to_string(&request).unwrap_or_default();
    Transaction::new(vec![Compare::ValueIs(scope.leader(), leader.to_owned()), unchanged], vec![Write::put(key, value)])
}

#[cfg(test)]
mod tests {
    use bots_core::dcs::{Compare, Scope, Write};

    use super::{Plan, Progress};
    use crate::fleet::{Fleet, ScopeView, samples};

    fn view(scope: &str, changes: &[(&str, &str)]) -> ScopeView {
        let mut entries = samples::fleet();
        for (key, value) in changes {
            entries.retain(|kv| kv.key != format!("/service/{scope}/{key}"));
            if !value.is_empty() {
                entries.push(samples::entry(&format!("{scope}/{key}"), value));
            }
        }
        Fleet::of("service", &entries).scopes[scope].clone()
    }

    fn refusal(scope: &str, changes: &[(&str, &str)], to: Option<&str>) -> String {
        let plan = Plan::new(&Scope::new("service", scope).unwrap(), &view(scope, changes), to);
        plan.map_or_else(|f| f.message, |plan| format!("planned {plan:?}"))
    }

    #[test]
    fn what_cannot_end_well_is_refused_before_it_begins() {
        assert_eq!(refusal("main", &[], Some("pg-1")), "pg-1 leads main already");
        assert_eq!(refusal("main", &[], Some("pg-9")), "main has no member pg-9: it has pg-1, pg-2, pg-3, pg-4");
        assert_eq!(refusal("main", &[], Some("pg-3")), "pg-3 is not streaming, it is creating replica");
        assert_eq!(refusal("main", &[("leader", "")], None), "main has no leader: there is nobody to hand over from");
        assert_eq!(
            refusal("main", &[("members/pg-2", "")], None),
            "no replica of main can take over from pg-1: pg-3 is not streaming, it is creating replica; \
             pg-4 is not streaming, it is creating replica"
        );
        assert_eq!(
            refusal("main", &[("failover", r#"{"leader":"pg-1","member":"pg-2"}"#)], None),
            "a switchover of main to pg-2 is under way already: wait for its end"
        );
        assert_eq!(refusal("web", &[], None), "web is no Postgres scope: its bots elect their leader themselves");
    }

    #[test]
    fn a_replica_that_connects_again_is_waited_for_by_the_leader() {
        let between = r#"{"kind":"postgres","state":"running","role":"replica"}"#;
        let planned = view("main", &[("members/pg-2", between), ("members/pg-3", ""), ("members/pg-4", "")]);
        let scope = Scope::new("service", "main").unwrap();
        assert_eq!(Plan::new(&scope, &planned, Some("pg-2")).unwrap().to.as_deref(), Some("pg-2"));
        assert_eq!(Plan::new(&scope, &planned, None).unwrap().to, None);
    }

    #[test]
    fn the_request_is_a_compare_and_swap_in_patronis_words() {
        let scope = Scope::new("service", "main").unwrap();
        let plan = Plan::new(&scope, &view("main", &[]), Some("pg-2")).unwrap();
        let compare = [Compare::ValueIs(scope.leader(), String::from("pg-1")), Compare::Absent(scope.failover())];
        assert_eq!(plan.transaction.compare, compare);
        let value = r#"{"leader":"pg-1","member":"pg-2"}"#;
        assert_eq!(plan.transaction.then, [Write::put(scope.failover(), value)]);
    }

    #[test]
    fn it_ends_with_a_new_primary_or_with_an_empty_request() {
        let plan = Plan::new(&Scope::new("service", "main").unwrap(), &view("main", &[]), None).unwrap();
        let asked = ("failover", r#"{"leader":"pg-1"}"#);
        let primary = r#"{"state":"running","role":"primary"}"#;
        assert_eq!(plan.progress(&view("main", &[asked])), Progress::Under);
        assert_eq!(plan.progress(&view("main", &[asked, ("leader", "")])), Progress::Under);
        assert_eq!(plan.progress(&view("main", &[asked, ("leader", "pg-2")])), Progress::Under);
        assert_eq!(plan.progress(&view("main", &[("failover", "{}"), ("leader", "")])), Progress::Under);
        let done = view("main", &[("failover", "{}"), ("leader", "pg-2"), ("members/pg-2", primary)]);
        assert_eq!(plan.progress(&done), Progress::Done(String::from("pg-2")));
        let chosen = Plan::new(&Scope::new("service", "main").unwrap(), &view("main", &[]), Some("pg-2")).unwrap();
        assert_eq!(chosen.progress(&done), Progress::Done(String::from("pg-2")));
        let other = view("main", &[("failover", "{}"), ("leader", "pg-3"), ("members/pg-3", primary)]);
        assert_eq!(chosen.progress(&other), Progress::Other(String::from("pg-3")), "it was not asked for");
        assert_eq!(plan.progress(&other), Progress::Done(String::from("pg-3")), "anybody will do");
        assert_eq!(plan.progress(&view("main", &[("failover", "{}")])), Progress::Refused);
    }
}
