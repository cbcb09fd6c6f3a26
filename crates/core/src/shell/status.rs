//! The status hub: what the bot is right now, for the API. It asks the machine when somebody asks it; it keeps nothing.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::clock::Clock;
use crate::machine::{Machine, Report, Time};

/// Who this process is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The bot's name.
    pub name: String,
    /// Its scope.
    pub scope: String,
    /// The namespace of the scope.
    pub namespace: String,
    /// The kind of bot.
    pub kind: String,
    /// What tells this process from any other of the same name.
    pub instance: String,
    /// The version of the program.
    pub version: String,
}

/// What the health endpoints answer: 200 for `true`, 503 for `false`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `/health`: the thing that the bot keeps is up.
    pub healthy: bool,
    /// `/liveness`: the bot itself works; a supervisor restarts it otherwise.
    pub alive: bool,
    /// `/readiness`: work may be sent here.
    pub ready: bool,
}

/// The answer of `/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Who.
    #[serde(flatten)]
    pub identity: Identity,
    /// How many steps the machine has taken; grows with every change.
    pub revision: u64,
    /// What it answers to the health checks.
    pub health: Health,
    /// What it is, what it waits for and why.
    pub report: Report,
    /// The machine's whole state.
    pub state: Value,
}

/// Shares the machine's state with the API. Clones share.
#[derive(Clone)]
pub struct StatusHub {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    steps: AtomicU64,
    role_changes: watch::Sender<u64>,
    stepped: watch::Sender<u64>,
    source: OnceLock<Source>,
    store_trouble: Mutex<Option<String>>,
}

/// The machine's answers at a moment: report, state and health.
type Source = Box<dyn Fn(Time) -> (Report, Value, Health) + Send + Sync>;

impl StatusHub {
    /// A hub for a bot that is still starting.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let inner = Inner {
            identity,
            steps: AtomicU64::new(0),
            role_changes: watch::Sender::new(0),
            stepped: watch::Sender::new(0),
            source: OnceLock::new(),
            store_trouble: Mutex::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Who this process is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    /// What the bot is at this moment.
    #[must_use]
    pub fn status(&self) -> Status {
        let now = Clock::now();
        let (mut report, state, health) = match self.inner.source.get() {
            Some(source) => source(now),
            None => (Report::new("starting", now, now).doing("starts"), Value::Null, STARTING),
        };
        report.troubles.extend(self.store_trouble());
        Status { identity: self.inner.identity.clone(), revision: self.steps(), health, report, state }
    }

    /// What the health checks get at this moment.
    #[must_use]
    pub fn health(&self) -> Health {
        self.inner.source.get().map_or(STARTING, |source| source(Clock::now()).2)
    }

    /// Wakes after every step; the value is the number of steps.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.inner.stepped.subscribe()
    }

    /// Wakes after every change of role; the value is the number of the step.
    #[must_use]
    pub fn subscribe_to_roles(&self) -> watch::Receiver<u64> {
        self.inner.role_changes.subscribe()
    }

    /// Says what is wrong with the way to the store; nothing once it answers.
    pub fn set_store_trouble(&self, trouble: Option<String>) {
        *self.inner.store_trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Shows the state in `cell` from now on. Once; later calls change nothing.
    pub(super) fn attach<M>(&self, cell: StateCell<M::State>, health: fn(&M::State, Time) -> Health)
    where
        M: Machine<State: Send + 'static> + 'static,
    {
        let source: Source = Box::new(move |now| {
            cell.read(|state| {
                let json = serde_json::to_value(state).unwrap_or_default();
                (M::report(state, now), json, health(state, now))
            })
        });
        let _second = self.inner.source.set(source);
    }

    pub(super) fn stepped(&self, role_changed: bool) {
        let steps = self.inner.steps.fetch_add(1, Ordering::Relaxed) + 1;
        self.inner.stepped.send_replace(steps);
        if role_changed {
            self.inner.role_changes.send_replace(steps);
        }
    }

    fn steps(&self) -> u64 {
        self.inner.steps.load(Ordering::Relaxed)
    }

    fn store_trouble(&self) -> Option<String> {
        self.inner.store_trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

const STARTING: Health = Health { healthy: false, alive: true, ready: false };

/// The one copy of the state: the runtime steps it in place, the API reads it.
pub(super) struct StateCell<S>(Arc<Mutex<Option<S>>>);

impl<S> Clone for StateCell<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> StateCell<S> {
    pub(super) fn new(state: S) -> Self {
        Self(Arc::new(Mutex::new(Some(state))))
    }

    pub(super) fn read<R>(&self, look: impl FnOnce(&S) -> R) -> R {
        let held = self.0.lock().expect("a panic in a step ends the process");
        look(held.as_ref().expect("the state is away only while the lock is held"))
    }

    /// Replaces the state by what `change` makes of it.
    pub(super) fn update<R>(&self, change: impl FnOnce(S) -> (S, R)) -> R {
        let mut held = self.0.lock().expect("a panic in a step ends the process");
        let (state, result) = change(held.take().expect("the state is away only while the lock is held"));
        *held = Some(state);
        result
    }
}
