//! `/failsafe`: who may vouch for a primary without etcd, and what members ask each other then.

use axum::{
    body::Bytes,
    extract::State as Extract,
    http::{HeaderMap, StatusCode},
    response::Response,
};

use super::{Site, read, say, show::raw_json};
use crate::{
    machine::Ask,
    shell::members::{ACCEPTED, LEAD, Question, STAND},
};

/// Where the log of a member ends that vouches for a primary, as a number: Patroni's header.
const LSN: &str = "lsn";

/// Patroni's words for a member that is a primary itself.
const LEADS: &str = "Running as a leader";

/// `GET /failsafe`: the members that are counted.
pub(super) async fn show(Extract(site): Extract<Site>) -> Response {
    let state = site.state();
    match state.view().value(&state.settings().scope.failsafe()).filter(|_| !state.is_failsafe_off()) {
        Some(roll) => raw_json(roll.to_owned()),
        None => off(),
    }
}

/// `POST /failsafe`: a primary without etcd asks whether it may lead on.
pub(super) async fn lead(Extract(site): Extract<Site>, headers: HeaderMap, body: Bytes) -> Response {
    if !site.inner.kinship.admits(&headers, LEAD, &body) {
        return stranger();
    }
    if site.state().is_failsafe_off() {
        return off();
    }
    let question: Question = match read(&body) {
        Ok(question) => question,
        Err(refused) => return *refused,
    };
    let Some(generation) = question.generation else {
        return say(StatusCode::BAD_REQUEST, "generation: it is missing: only bots of this kind can be vouched for");
    };
    let mut answer = answer(&site, &question.to, Ask::Lead { leader: question.name, generation }).await;
    if answer.status() == StatusCode::OK
        && let Some(server) = site.state().server()
    {
        answer.headers_mut().insert(LSN, server.position.0.into());
    }
    answer
}

fn off() -> Response {
    say(StatusCode::BAD_GATEWAY, "failsafe mode is off")
}

/// `POST /failsafe/candidate`: a member asks whether it may be elected.
pub(super) async fn stand(Extract(site): Extract<Site>, headers: HeaderMap, body: Bytes) -> Response {
    if !site.inner.kinship.admits(&headers, STAND, &body) {
        return stranger();
    }
    match read::<Question>(&body) {
        Ok(question) => answer(&site, &question.to, Ask::Stand { candidate: question.name }).await,
        Err(refused) => *refused,
    }
}

fn stranger() -> Response {
    let why = "this is asked by members of the cluster, known by the password of postgresql.authentication.replication: it must be \
               the same on all members";
    say(StatusCode::FORBIDDEN, why)
}

async fn answer(site: &Site, to: &str, ask: Ask) -> Response {
    let state = site.state();
    let name = &state.settings().name;
    if to != name {
        return say(StatusCode::MISDIRECTED_REQUEST, format!("to: `{to}` is asked, and this is {name}"));
    }
    let leads = state.leads(bots_core::shell::Clock::now());
    match site.inner.desk.ask(&site.inner.events, ask).await {
        Some(Ok(())) => say(StatusCode::OK, ACCEPTED),
        Some(Err(_it_leads)) if leads => say(StatusCode::INTERNAL_SERVER_ERROR, LEADS),
        Some(Err(why)) => say(StatusCode::CONFLICT, why),
        None => say(StatusCode::SERVICE_UNAVAILABLE, "the bot ends, or is asked too much"),
    }
}
