//! Switchover and failover on request: the wish goes into the `failover` key; the members act on it. The answer waits for
//! what comes of it.

use std::time::Duration;

use axum::{body::Bytes, extract::State as Extract, http::StatusCode, response::Response};
use bots_core::{
    dcs::{Compare, KeyValue, Outcome, Revision, Transaction, Write},
    shell::Clock,
    wire::{FailoverRequest, Member, PostgresFacts, tags},
};
use serde::Deserialize;

use super::{Site, operator::moment, read, say};
use crate::machine::State;

/// How long the answer waits for the outcome.
const OUTCOME_DEADLINE: Duration = Duration::from_secs(30);

/// The body of a request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wish {
    leader: Option<String>,
    #[serde(alias = "member")]
    candidate: Option<String>,
    scheduled_at: Option<String>,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Switchover,
    Failover,
}

impl Asked {
    const fn word(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Failover => "failover",
        }
    }

    const fn past(self) -> &'static str {
        match self {
            Self::Switchover => "switched",
            Self::Failover => "failed",
        }
    }
}

/// `POST /switchover`.
pub(super) async fn ask(Extract(site): Extract<Site>, body: Bytes) -> Response {
    perform(&site, &body, Asked::Switchover).await.unwrap_or_else(|refusal| *refusal)
}

/// `POST /failover`.
pub(super) async fn ask_failover(Extract(site): Extract<Site>, body: Bytes) -> Response {
    perform(&site, &body, Asked::Failover).await.unwrap_or_else(|refusal| *refusal)
}

/// `DELETE /switchover`.
pub(super) async fn withdraw(Extract(site): Extract<Site>) -> Response {
    let key = site.state().settings().scope.failover();
    let found = match site.inner.etcd.get(&key).await {
        Ok(found) => found.filter(|kv| request_in(kv).scheduled_at.is_some()),
        Err(error) => return say(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    let Some(found) = found else { return say(StatusCode::NOT_FOUND, "no switchover is scheduled") };
    let unchanged = Compare::ModifiedAt(key.clone(), found.modified);
    let transaction = Transaction::new(vec![unchanged], vec![Write::put(key, "{}")]);
    match site.inner.etcd.transact(&transaction).await {
        Outcome::Done(_) => say(StatusCode::OK, "scheduled switchover deleted"),
        Outcome::Refused { .. } => say(StatusCode::CONFLICT, "the switchover has changed meanwhile: look again"),
        Outcome::Unknown(why) => say(StatusCode::SERVICE_UNAVAILABLE, format!("etcd did not answer: {why}")),
    }
}

/// Why a wish is not granted.
type Refusal = Box<Response>;

fn refuse<T>(code: StatusCode, why: impl Into<String>) -> Result<T, Refusal> {
    Err(Box::new(say(code, why)))
}

async fn perform(site: &Site, body: &[u8], asked: Asked) -> Result<Response, Refusal> {
    let wish: Wish = read(body)?;
    let state = site.state();
    complete(&wish, asked, state.dynamic().pause)?;
    // As Patroni has it: whoever names the leader wants a switchover.
    let asked = if wish.leader.is_some() { Asked::Switchover } else { asked };
    let scheduled = wish.scheduled_at.is_some();
    let leader = state.leadership().holder(state.view()).map(str::to_owned);
    if !scheduled {
        possible(&state, &wish, leader.as_deref(), asked)?;
    }
    let key = state.settings().scope.failover();
    let found = match site.inner.etcd.get(&key).await {
        Ok(found) => found,
        Err(error) => return refuse(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    let pending = found.as_ref().map(request_in).unwrap_or_default();
    if !pending.is_empty() && pending.scheduled_at.is_none() {
        return refuse(StatusCode::CONFLICT, "another switchover is under way already: wait for its end");
    }
    let unchanged = match &found {
        Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
        None => Compare::Absent(key.clone()),
    };
    let wanted = wish.candidate.clone();
    let request = FailoverRequest { leader: wish.leader, member: wish.candidate, scheduled_at: wish.scheduled_at };
    let value = serde_json::to_string(&request).unwrap_or_default();
    let transaction = Transaction::new(vec![unchanged], vec![Write::put(key, value)]);
    match site.inner.etcd.transact(&transaction).await {
        Outcome::Done(_) if scheduled => Ok(say(StatusCode::ACCEPTED, "Switchover scheduled")),
        Outcome::Done(revision) => {
            let waiting = Waiting { before: leader, wanted, revision, asked };
            Ok(waiting.outcome(site).await)
        }
        Outcome::Refused { .. } => refuse(StatusCode::CONFLICT, "another switchover was asked for meanwhile"),
        Outcome::Unknown(why) => refuse(StatusCode::SERVICE_UNAVAILABLE, format!("etcd did not answer: {why}")),
    }
}

/// Whether the wish says all that it must, and nothing that contradicts itself.
fn complete(wish: &Wish, asked: Asked, paused: bool) -> Result<(), Refusal> {
    let bad = |why: &str| refuse(StatusCode::BAD_REQUEST, why);
    match asked {
        Asked::Failover if wish.candidate.is_none() => {
            return bad("Failover could be performed only to a specific candidate");
        }
        Asked::Switchover if wish.leader.is_none() => {
            return bad("Switchover could be performed only from a specific leader");
        }
        Asked::Failover | Asked::Switchover => {}
    }
    if let Some(at) = &wish.scheduled_at {
        if asked == Asked::Failover {
            return bad("Failover can't be scheduled");
        }
        if paused {
            return bad("Can't schedule switchover in the paused state");
        }
        if let Err((code, why)) = moment(at, "switchover", Clock::unix_ms()) {
            return refuse(code, why);
        }
    }
    if paused && wish.candidate.is_none() {
        return bad("Switchover is possible only to a specific candidate in a paused state");
    }
    if wish.leader.is_some() && wish.leader == wish.candidate {
        return bad("Switchover target and source are the same");
    }
    Ok(())
}

/// What this member can see to be impossible; the leader decides in the end.
fn possible(state: &State, wish: &Wish, leader: Option<&str>, asked: Asked) -> Result<(), Refusal> {
    let (view, scope) = (state.view(), &state.settings().scope);
    let impossible = |why: String| refuse(StatusCode::PRECONDITION_FAILED, why);
    if wish.leader.is_some() && wish.leader.as_deref() != leader {
        return impossible(format!("leader name does not match: it is {}", leader.unwrap_or("nobody")));
    }
    let Some(candidate) = &wish.candidate else {
        let prefix = scope.members_prefix();
        let alone = view.entries_below(&prefix).iter().all(|(name, _)| Some(*name) == leader);
        let why = format!("{} is not possible: cluster does not have members except leader", asked.word());
        return if alone { impossible(why) } else { Ok(()) };
    };
    if Some(candidate.as_str()) == leader {
        return impossible(format!("{candidate} leads already"));
    }
    let found = view.value(&scope.member(candidate)).and_then(Member::from_json);
    let Some(member) = found else {
        return impossible(format!("candidate {candidate} does not exist in the cluster"));
    };
    let facts: PostgresFacts = member.facts().unwrap_or_default();
    if asked == Asked::Switchover && !state.loses_nothing_by(candidate) {
        return impossible(String::from("candidate name does not match with sync_standby"));
    }
    if tags::nofailover(&facts.tags) {
        let why = "no good candidates have been found";
        return impossible(format!("{} is not possible: {why}: {candidate} has the tag nofailover", asked.word()));
    }
    Ok(())
}

/// A wish that is in etcd.
struct Waiting {
    /// Who led before.
    before: Option<String>,
    /// Who shall lead.
    wanted: Option<String>,
    revision: Revision,
    asked: Asked,
}

impl Waiting {
    /// Waits until another member takes writes, or the wish is dropped.
    async fn outcome(&self, site: &Site) -> Response {
        let mut changes = site.inner.state.clone();
        let wait = async {
            loop {
                if let Some(answer) = self.look(&changes.borrow_and_update()) {
                    return answer;
                }
                if changes.changed().await.is_err() {
                    return say(StatusCode::SERVICE_UNAVAILABLE, "the bot ends");
                }
            }
        };
        let waited = tokio::time::timeout(OUTCOME_DEADLINE, wait).await;
        waited.unwrap_or_else(|_elapsed| {
            say(StatusCode::SERVICE_UNAVAILABLE, format!("{} status unknown: it takes long", self.title()))
        })
    }

    fn look(&self, state: &State) -> Option<Response> {
        let (view, scope) = (state.view(), &state.settings().scope);
        let leader = state.leadership().holder(view);
        if let Some(leader) = leader.filter(|leader| Some(*leader) != self.before.as_deref()) {
            let member = Member::from_json(view.value(&scope.member(leader))?)?;
            let serves = member.head.role == "primary" && member.head.state == "running";
            let past = self.asked.past();
            let text = match self.wanted.as_deref().filter(|wanted| *wanted != leader) {
                None => format!("Successfully {past} over to \"{leader}\""),
                Some(wanted) => format!("{} over to \"{leader}\" instead of \"{wanted}\"", capital(past)),
            };
            return serves.then(|| say(StatusCode::OK, text));
        }
        // A view that is older than the wish would show it as dropped.
        let current = view.revision(&scope.prefix()) >= self.revision;
        let request = view.get(&scope.failover());
        let dropped = current && request.is_none_or(|kv| request_in(kv).is_empty() && kv.modified > self.revision);
        let why = state.trouble().unwrap_or("the leader refused it; its log and botctl why say more");
        (dropped && leader.is_some())
            .then(|| say(StatusCode::SERVICE_UNAVAILABLE, format!("{} failed: {why}", self.title())))
    }

    fn title(&self) -> String {
        capital(self.asked.word())
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn request_in(found: &KeyValue) -> FailoverRequest {
    serde_json::from_str(&found.value).unwrap_or_default()
}
