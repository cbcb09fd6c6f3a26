//! One bot's machine joined to the in-memory store, for transcripts and exploration. What the shell would do, on
//! command. Not a place for checks.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::collections::{BTreeMap, VecDeque};

use bots_core::{
    dcs::{Change, DcsAction, DcsEvent, LeaseId, MemoryDcs, Outcome, RequestId, Revision, Scope, Transaction},
    machine::{Machine, Span, Time},
};
use web_bot::machine::{Action, Event, Live, Mode, Role, ScalingSettings, Settings, State, WebMachine};

/// The wall time at the origin of the machines' clocks.
pub const EPOCH_UNIX_MS: u64 = 1_700_000_000_000;

/// The settings of the bot `name` in the scopes of the demo.
pub fn settings(name: &str, mode: Mode, scaling: ScalingSettings) -> Settings {
    let scope = |name: &str| Scope::new("service", name).expect("a valid name");
    Settings {
        scope: scope("web"),
        content: scope("site"),
        database: (mode == Mode::App).then(|| scope("main")),
        name: name.to_owned(),
        version: String::from("0.1.0"),
        api_url: format!("http://{name}:8008"),
        url: format!("http://{name}:8080"),
        mode,
        ttl: Span::from_secs(5),
        live: Live {
            configuration: 0,
            app_start_timeout: Span::from_secs(10),
            drain_timeout: Span::from_secs(5),
            cdn_url: None,
            connections: None,
            scaling,
        },
    }
}

/// A bot and what is under way between it and the world.
#[derive(Debug, Clone)]
pub struct Bot {
    state: Option<State>,
    pub live: Live,
    pub questions: VecDeque<(RequestId, Transaction)>,
    pub wants_lease: Option<Span>,
    pub lease: Option<LeaseId>,
    pub seen: BTreeMap<String, Revision>,
    pub preparing: VecDeque<(u64, String)>,
    pub apps: BTreeMap<u64, bool>,
    pub awaited: Option<u64>,
    pub probed: Option<String>,
    pub database_probe: Option<u64>,
    pub exit: Option<u8>,
}

impl Bot {
    pub fn new(settings: Settings, instance: &str) -> Self {
        Self {
            live: settings.live.clone(),
            state: Some(State::new(settings, instance, EPOCH_UNIX_MS)),
            questions: VecDeque::new(),
            wants_lease: None,
            lease: None,
            seen: BTreeMap::new(),
            preparing: VecDeque::new(),
            apps: BTreeMap::new(),
            awaited: None,
            probed: None,
            database_probe: None,
            exit: None,
        }
    }

    pub fn state(&self) -> &State {
        self.state.as_ref().expect("a step always gives the state back")
    }

    /// The event of new settings, which differ from the last in what `change` does to them.
    pub fn reconfigured(&mut self, change: impl FnOnce(&mut Live)) -> Event {
        change(&mut self.live);
        Event::Reconfigured(self.live.clone())
    }

    pub fn role(&self) -> Role {
        WebMachine::role(self.state())
    }

    /// One step; performs what the store and the processes need to know and returns all actions.
    pub fn step(&mut self, now: Time, event: Event, dcs: &mut MemoryDcs) -> Vec<Action> {
        let state = self.state.take().expect("a step always gives the state back");
        let step = WebMachine::step(state, now, event);
        self.state = Some(step.state);
        for action in &step.actions {
            self.perform(action, dcs);
        }
        step.actions
    }

    fn perform(&mut self, action: &Action, dcs: &mut MemoryDcs) {
        match action {
            Action::Dcs(DcsAction::GrantLease { ttl }) => self.wants_lease = Some(*ttl),
            // Leases here are renewed by the tests.
            Action::Dcs(DcsAction::PaceLease { .. }) => {}
            Action::Dcs(DcsAction::RevokeLease { lease }) => {
                dcs.revoke(*lease);
                self.lease = self.lease.filter(|l| l != lease);
            }
            Action::Dcs(DcsAction::Transact { id, transaction }) => {
                self.questions.push_back((*id, transaction.clone()));
            }
            Action::ProbeName { api_url } => self.probed = Some(api_url.clone()),
            Action::PrepareContent { id, sha, .. } => self.preparing.push_back((*id, sha.clone())),
            Action::StartApp { instance, .. } => {
                self.apps.insert(*instance, false);
            }
            Action::StopApp { instance, .. } => {
                if let Some(stopping) = self.apps.get_mut(instance) {
                    *stopping = true;
                }
            }
            Action::ProbeDatabase { id, .. } => self.database_probe = Some(*id),
            Action::AwaitInFlight { id } => self.awaited = Some(*id),
            Action::Exit { code, .. } => self.exit = Some(*code),
            Action::SetRoute(_) | Action::RetainContent { .. } => {}
        }
    }

    /// Grants the lease that was asked for.
    pub fn granted(&mut self, now: Time, dcs: &mut MemoryDcs) -> Option<Event> {
        let ttl = self.wants_lease.take()?;
        let lease = dcs.grant(now, ttl);
        self.lease = Some(lease);
        Some(Event::Dcs(DcsEvent::LeaseGranted { lease, valid_until: now + ttl }))
    }

    /// Renews the lease, or finds out that it is gone.
    pub fn renewed(&mut self, now: Time, ttl: Span, dcs: &mut MemoryDcs) -> Option<Event> {
        let lease = self.lease?;
        if dcs.keep_alive(now, lease) {
            return Some(Event::Dcs(DcsEvent::LeaseRenewed { lease, valid_until: now + ttl }));
        }
        self.lease = None;
        Some(Event::Dcs(DcsEvent::LeaseLost { lease, why: String::from("the store does not know it") }))
    }

    /// The next thing that a watch shows: the first list, then changes.
    pub fn watched(&mut self, dcs: &MemoryDcs) -> Option<Event> {
        for prefix in self.state().prefixes() {
            let Some(seen) = self.seen.get(&prefix).copied() else {
                return Some(Event::Dcs(self.list(dcs, &prefix)));
            };
            let changes = dcs.changes_after(&prefix, seen).expect("nothing is compacted here");
            if let Some(revision) = changes.iter().map(revision_of).max() {
                self.seen.insert(prefix.clone(), revision);
                return Some(Event::Dcs(DcsEvent::Changed { prefix, revision, changes }));
            }
        }
        None
    }

    pub fn list(&mut self, dcs: &MemoryDcs, prefix: &str) -> DcsEvent {
        let (revision, entries) = dcs.list(prefix);
        self.seen.insert(prefix.to_owned(), revision);
        DcsEvent::Listed { prefix: prefix.to_owned(), revision, entries }
    }

    /// The answer to the oldest question, made true in the store first.
    pub fn answered(&mut self, now: Time, dcs: &mut MemoryDcs) -> Option<Event> {
        let (id, transaction) = self.questions.pop_front()?;
        let outcome = dcs.transact(now, &transaction);
        Some(Event::Dcs(DcsEvent::Answered { id, outcome }))
    }

    /// The oldest question's answer is lost. `None` if there is no question.
    pub fn unanswered(&mut self) -> Option<(Transaction, Event)> {
        let (id, transaction) = self.questions.pop_front()?;
        let outcome = Outcome::Unknown(String::from("timed out"));
        Some((transaction, Event::Dcs(DcsEvent::Answered { id, outcome })))
    }
}

fn revision_of(change: &Change) -> Revision {
    match change {
        Change::Put(kv) => kv.modified,
        Change::Deleted { revision, .. } => *revision,
    }
}

/// A commit for tests: one digit, forty times.
pub fn sha(digit: char) -> String {
    std::iter::repeat_n(digit, 40).collect()
}

/// The value of a revision key.
pub fn revision(sha: &str, generation: u64) -> String {
    serde_json::json!({"sha": sha, "generation": generation, "ref": "main", "origin": "https://git.example/site.git"})
        .to_string()
}
