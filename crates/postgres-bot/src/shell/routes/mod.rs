//! The bot's API in Patroni's shapes, so that what exists for Patroni (checks, dashboards, playbooks) keeps working.

mod config;
mod failsafe;
mod health;
mod liveness;
mod metrics;
mod operator;
mod show;
mod switchover;

use std::sync::{Arc, atomic::AtomicU64};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bots_core::shell::{Context, Etcd, Events, Metrics, Pulse};
use tokio::sync::{Mutex, watch};

use super::{
    hands::Hands,
    kinship::Kinship,
    members::{self, Desk},
    reload::Reload,
    server::Connection,
};
use crate::machine::{Event, State};

/// What the handlers look at.
#[derive(Clone)]
pub(super) struct Site {
    inner: Arc<Inner>,
}

struct Inner {
    /// The machine's state after its last step.
    state: watch::Receiver<Arc<State>>,
    /// For reads and writes that operators ask for.
    etcd: Etcd,
    hands: Arc<Hands>,
    metrics: Metrics,
    pulse: Pulse,
    /// The way to the machine, for commands, and how many have been given.
    events: Events<Event>,
    commands: AtomicU64,
    reload: Arc<Reload>,
    /// Where other members' questions wait for the machine.
    desk: Arc<Desk>,
    /// How those who ask are known.
    kinship: Kinship,
    /// A connection of the API's own: peers that stand for leader want to know what is true now.
    connection: Mutex<Option<Connection>>,
}

impl Site {
    /// Handlers for the bot with this state.
    pub(super) fn new(
        context: &Context<Event>,
        state: watch::Receiver<Arc<State>>,
        (hands, reload): (Arc<Hands>, Arc<Reload>),
        (desk, kinship): (Arc<Desk>, Kinship),
    ) -> Self {
        let (etcd, metrics, events) = (context.dcs.etcd().clone(), context.metrics.clone(), context.events.clone());
        let (commands, connection, pulse) = (AtomicU64::new(0), Mutex::default(), context.pulse.clone());
        Self {
            inner: Arc::new(Inner {
                state,
                etcd,
                hands,
                metrics,
                pulse,
                events,
                commands,
                reload,
                desk,
                kinship,
                connection,
            }),
        }
    }

    /// All routes, and apart from them those that judge themselves who asks.
    pub(super) fn router(self) -> (Router, Router) {
        let check = |which: health::Check| {
            get(move |site, query| health::answer(site, query, which))
                .options(move |site, query| health::answer(site, query, which))
        };
        let mut router = Router::new();
        for (path, which) in health::CHECKS {
            router = router.route(path, check(*which));
        }
        let asked = Router::new()
            .route(members::LEAD, post(failsafe::lead))
            .route(members::STAND, post(failsafe::stand))
            .layer(DefaultBodyLimit::max(members::QUESTION_BYTES_MAX));
        let (members, self_authenticated) =
            if self.inner.kinship.judges() { (Router::new(), asked) } else { (asked, Router::new()) };
        let router = router
            .route("/patroni", get(show::patroni).options(show::patroni))
            .route("/cluster", get(show::cluster))
            .route("/history", get(show::history))
            .route("/liveness", get(liveness::answer).options(liveness::answer))
            .route("/readiness", get(health::readiness).options(health::readiness))
            .route("/metrics", get(metrics::all))
            .route("/config", get(config::show).patch(config::patch).put(config::put))
            .route("/switchover", post(switchover::ask).delete(switchover::withdraw))
            .route("/failover", post(switchover::ask_failover).delete(switchover::withdraw))
            .route("/restart", post(operator::restart).delete(operator::drop_restart))
            .route("/reinitialize", post(operator::reinitialize))
            .route(members::LEAD, get(failsafe::show))
            .route("/reload", post(operator::reload));
        (router.merge(members).with_state(self.clone()), self_authenticated.with_state(self))
    }

    fn state(&self) -> Arc<State> {
        Arc::clone(&self.inner.state.borrow())
    }
}

/// A refusal with its reason.
fn say(code: StatusCode, text: impl Into<String>) -> Response {
    (code, format!("{}\n", text.into())).into_response()
}

/// Reads a body as JSON whatever it calls itself, as Patroni does: `curl -d` calls it a form.
fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Box<Response>> {
    serde_json::from_slice(body)
        .map_err(|e| Box::new(say(StatusCode::BAD_REQUEST, format!("the body cannot be used: {e}"))))
}
