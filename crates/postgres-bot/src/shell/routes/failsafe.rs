//! `/failsafe`: who may vouch for a primary without etcd, and what members ask each other then.

use axum::{body::Bytes, extract::State as Extract, http::StatusCode, response::Response};

use super::{Site, read, say, show::raw_json};
use crate::{
    machine::Ask,
    shell::members::{ACCEPTED, Question},
};

/// `GET /failsafe`: the members that are counted.
pub(super) async fn show(Extract(site): Extract<Site>) -> Response {
    let state = site.state();
    match state.view().value(&state.settings().scope.failsafe()) {
        Some(roll) => raw_json(roll.to_owned()),
        None => say(StatusCode::BAD_GATEWAY, "failsafe mode is off"),
    }
}

/// `POST /failsafe`: a primary without etcd asks whether it may lead on.
pub(super) async fn lead(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let question: Question = match read(&body) {
        Ok(question) => question,
        Err(refused) => return *refused,
    };
    let Some(generation) = question.generation else {
        return say(StatusCode::BAD_REQUEST, "generation: it is missing: only bots of this kind can be vouched for");
    };
    answer(&site, &question.to, Ask::Lead { leader: question.name, generation }).await
}

/// `POST /failsafe/candidate`: a member asks whether it may be elected.
pub(super) async fn stand(Extract(site): Extract<Site>, body: Bytes) -> Response {
    match read::<Question>(&body) {
        Ok(question) => answer(&site, &question.to, Ask::Stand { candidate: question.name }).await,
        Err(refused) => *refused,
    }
}

async fn answer(site: &Site, to: &str, ask: Ask) -> Response {
    let state = site.state();
    let name = &state.settings().name;
    if to != name {
        return say(StatusCode::MISDIRECTED_REQUEST, format!("to: `{to}` is asked, and this is {name}"));
    }
    // Patroni's word for a member that is a primary itself.
    let code = if state.leads(bots_core::shell::Clock::now()) {
        StatusCode::INTERNAL_SERVER_ERROR
    } else {
        StatusCode::CONFLICT
    };
    match site.inner.desk.ask(&site.inner.events, ask).await {
        Some(Ok(())) => say(StatusCode::OK, ACCEPTED),
        Some(Err(why)) => say(code, why),
        None => say(StatusCode::SERVICE_UNAVAILABLE, "the bot ends, or is asked too much"),
    }
}
