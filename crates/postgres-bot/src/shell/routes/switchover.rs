//! Switchover and failover on request: the wish goes into the `failover` key; the members act on it. The answer waits for
//! what comes of it.

use std::time::Duration;

use axum::{body::Bytes, extract::State as Extract, http::StatusCode, response::Response};
use bots_core::{
    dcs::{Compare, KeyValue, Outcome, Transaction, Write},
    wire::{FailoverRequest, Member, unix_ms_from_rfc3339},
};
use serde::Deserialize;

use super::{Site, read, say};
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

/// `POST /switchover`.
pub(super) async fn ask(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let needs_leader = |wish: &Wish| wish.leader.is_some();
    let otherwise = "Switchover could be performed only from a specific leader";
    perform(&site, &body, needs_leader, otherwise).await.unwrap_or_else(|refusal| *refusal)
}

/// `POST /failover`.
pub(super) async fn ask_failover(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let needs_candidate = |wish: &Wish| wish.candidate.is_some();
    let otherwise = "Failover could be performed only to a specific candidate";
    perform(&site, &body, needs_candidate, otherwise).await.unwrap_or_else(|refusal| *refusal)
}

/// `DELETE /switchover`.
pub(super) async fn withdraw(Extract(site): Extract<Site>) -> Response {
    let key = site.state().settings().scope.failover();
    let found = match site.inner.etcd.get(&key).await {
        Ok(found) => found.filter(|kv| !is_nothing(kv)),
        Err(error) => return say(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    let Some(found) = found else { return say(StatusCode::NOT_FOUND, "no switchover is asked for") };
    let unchanged = Compare::ModifiedAt(key.clone(), found.modified);
    let transaction = Transaction::new(vec![unchanged], vec![Write::put(key, "{}")]);
    match site.inner.etcd.transact(&transaction).await {
        Outcome::Done(_) => say(StatusCode::OK, "the switchover is withdrawn"),
        Outcome::Refused { .. } => say(StatusCode::CONFLICT, "the switchover has changed meanwhile: look again"),
        Outcome::Unknown(why) => say(StatusCode::SERVICE_UNAVAILABLE, format!("etcd did not answer: {why}")),
    }
}

/// Why a wish is not granted.
type Refusal = Box<Response>;

fn refuse<T>(code: StatusCode, why: impl Into<String>) -> Result<T, Refusal> {
    Err(Box::new(say(code, why)))
}

async fn perform(
    site: &Site,
    body: &[u8],
    complete: impl Fn(&Wish) -> bool,
    otherwise: &str,
) -> Result<Response, Refusal> {
    let wish: Wish = read(body)?;
    if !complete(&wish) {
        return refuse(StatusCode::BAD_REQUEST, otherwise);
    }
    let state = site.state();
    let leader = possible(&state, &wish)?;
    let key = state.settings().scope.failover();
    let found = match site.inner.etcd.get(&key).await {
        Ok(found) => found,
        Err(error) => return refuse(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    if found.as_ref().is_some_and(|kv| !is_nothing(kv)) {
        return refuse(
            StatusCode::CONFLICT,
            "another switchover is asked for already: wait for it, or DELETE /switchover",
        );
    }
    let unchanged = match &found {
        Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
        None => Compare::Absent(key.clone()),
    };
    let scheduled = wish.scheduled_at.is_some();
    let request = FailoverRequest { leader: wish.leader, member: wish.candidate, scheduled_at: wish.scheduled_at };
    let value = serde_json::to_string(&request).unwrap_or_default();
    let transaction = Transaction::new(vec![unchanged], vec![Write::put(key, value)]);
    match site.inner.etcd.transact(&transaction).await {
        Outcome::Done(_) if scheduled => Ok(say(StatusCode::ACCEPTED, "Switchover scheduled")),
        Outcome::Done(revision) => Ok(outcome(site, leader.as_deref(), revision).await),
        Outcome::Refused { .. } => refuse(StatusCode::CONFLICT, "another switchover was asked for meanwhile"),
        Outcome::Unknown(why) => refuse(StatusCode::SERVICE_UNAVAILABLE, format!("etcd did not answer: {why}")),
    }
}

/// What this member can see to be impossible; the leader decides in the end. Yields the present leader.
fn possible(state: &State, wish: &Wish) -> Result<Option<String>, Refusal> {
    let (view, scope) = (state.view(), &state.settings().scope);
    let leader = state.leadership().holder(view).map(str::to_owned);
    let impossible = |why: String| refuse(StatusCode::PRECONDITION_FAILED, why);
    if wish.leader.is_some() && wish.leader != leader {
        return impossible(format!("leader name does not match: it is {}", leader.as_deref().unwrap_or("nobody")));
    }
    if let Some(candidate) = &wish.candidate {
        if Some(candidate) == leader.as_ref() {
            return impossible(format!("{candidate} leads already"));
        }
        if view.get(&scope.member(candidate)).is_none() {
            return impossible(format!("candidate {candidate} does not exist in the cluster"));
        }
    }
    if let Some(at) = &wish.scheduled_at
        && unix_ms_from_rfc3339(at).is_none()
    {
        let why = format!("scheduled_at: `{at}` is not a time such as 2026-07-24T12:00:00+00:00");
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, why);
    }
    Ok(leader)
}

/// Waits until another member takes writes, or the wish is dropped.
async fn outcome(site: &Site, before: Option<&str>, asked: bots_core::dcs::Revision) -> Response {
    let mut changes = site.inner.state.clone();
    let wait = async {
        loop {
            if let Some(answer) = look(&changes.borrow_and_update(), before, asked) {
                return answer;
            }
            if changes.changed().await.is_err() {
                return say(StatusCode::SERVICE_UNAVAILABLE, "the bot ends");
            }
        }
    };
    let waited = tokio::time::timeout(OUTCOME_DEADLINE, wait).await;
    waited.unwrap_or_else(|_elapsed| say(StatusCode::SERVICE_UNAVAILABLE, "Switchover status unknown: it takes long"))
}

fn look(state: &State, before: Option<&str>, asked: bots_core::dcs::Revision) -> Option<Response> {
    let (view, scope) = (state.view(), &state.settings().scope);
    let leader = state.leadership().holder(view);
    if let Some(leader) = leader.filter(|leader| Some(*leader) != before) {
        let member = Member::from_json(view.value(&scope.member(leader))?)?;
        let serves = member.head.role == "primary" && member.head.state == "running";
        return serves.then(|| say(StatusCode::OK, format!("Successfully switched over to \"{leader}\"")));
    }
    // A view that is older than the wish would show it as dropped.
    let current = view.revision(&scope.prefix()) >= asked;
    let dropped = current && view.get(&scope.failover()).is_none_or(|kv| is_nothing(kv) && kv.modified > asked);
    let why = state.trouble().unwrap_or("the leader refused it; its log and botctl why say more");
    (dropped && leader.is_some()).then(|| say(StatusCode::SERVICE_UNAVAILABLE, format!("Switchover failed: {why}")))
}

fn is_nothing(found: &KeyValue) -> bool {
    serde_json::from_str::<FailoverRequest>(&found.value).is_ok_and(|request| request.is_empty())
}
