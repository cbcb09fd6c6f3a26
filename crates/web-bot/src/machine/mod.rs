//! The web bot's machine: pure, total, deterministic. It decides everything and performs nothing.
//!
//! ```text
//!  Initializing ──► Preparing ──► Idle ◄──────────────┐
//!   (etcd, name)    (content)      │ load message     │
//!                                  ▼ claimed          │
//!                                Waking ──────────────┤ wake failed or message gone
//!                        app died ▲ │ ready           │
//!                                 │ ▼                 │
//!                                Serving ──► Draining ┘ message gone or left behind, then requests done
//!
//!  any of them ──► Stopping (asked to stop: drain, give everything back, exit)
//!  any of them ──► Failed   (another live bot has our name: exit at once)
//! ```
//!
//! Files: `role` (the table of edges), `roles` (one step function a role), `content` (which commits), `slots` (the place in
//! the serving set), `app` (the user's process), `proof` (whether it comes up on a candidate), `database` (what it means for
//! us), `scaling` (the leader's count), `budget` (how often it may change), `behind` (others have what this bot lacks),
//! `pressure` (stalls of the processor), `outward` (member key, route, report), `route`, `board` and `settings`.

#![warn(clippy::wildcard_enum_match_arm)]

mod app;
mod behind;
mod board;
mod budget;
mod content;
mod database;
mod event;
mod invariants;
mod outward;
mod pressure;
mod proof;
mod role;
mod roles;
mod route;
mod scaling;
mod settings;
mod slots;

use bots_core::{
    dcs::{DcsEvent, Revision, View},
    leadership::{Leadership, LeadershipChange},
    machine::{Deadline, Machine, Report, Span, Step, Time, TransitionTable},
    membership::{Membership, MembershipChange, MembershipEvent, RETRY_AFTER},
    wire::WebLoad,
};
use serde::Serialize;

pub use self::{
    app::{
        APP_PROVEN_AFTER, APP_STOP_GRACE, CRASHES_HELD_MAX, DATABASE_SETTLE, RESTART_BACKOFF_MAX, RESTART_BACKOFF_MIN,
        STARTS_FAILED_MAX,
    },
    behind::CATCH_UP_MAX,
    budget::{ACTIONS_PER_HOUR_MAX, CHANGES_KEPT_FOR_RISES, SCALE_INS_PER_HOUR_MAX},
    content::{PREPARE_BACKOFF_MAX, PREPARE_BACKOFF_MIN, REVISIONS_KEPT},
    database::{FAILOVER_SETTLE, FREEZE_MAX, PROBE_COUNTS, PROBE_PAUSE},
    event::{Action, Event},
    pressure::{STALL_COUNTS, STALLED_WEIGHT},
    proof::{PROOF_BACKOFF_MIN, PROOFS_FAILED_MAX},
    role::Role,
    roles::DRAIN_NOTICE,
    route::Route,
    scaling::{SCALE_INS_PER_WINDOW, SLOTS_PER_CHANGE_MAX},
    settings::{ConnectionBudget, Live, Mode, SLOTS_MAX, ScalingSettings, Settings},
    slots::RECLAIM_GRACE,
};
use self::{
    app::{App, Recipe, instances_max},
    behind::Behind,
    board::Board,
    content::Content,
    database::Database,
    outward::Shared,
    pressure::Pressure,
    role::EDGES,
    roles::Drain,
    scaling::Scaling,
    settings::{Effective, Overrides},
    slots::{Sight, Slots},
};

/// Everything the bot knows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    settings: Settings,
    epoch_unix_ms: u64,
    /// The moment of the last step.
    stepped_at: Time,
    role: Role,
    since: Time,
    /// The roles that the last step went through, the first being the one that it began in.
    path: Vec<Role>,
    view: View,
    overrides: Overrides,
    membership: Membership,
    leadership: Leadership,
    /// Somebody else has the lock although the view shows it free: how far the view reached, and until when to trust
    /// the refusal more than the view.
    lock_refused: Option<(Revision, Time)>,
    content: Content,
    behind: Behind,
    slots: Slots,
    app: App,
    database: Database,
    scaling: Scaling,
    drain: Option<Drain>,
    drains: u64,
    load: Option<WebLoad>,
    pressure: Pressure,
    route: Route,
    shared: Shared,
    ended: bool,
}

/// The web bot's machine.
#[derive(Debug, Clone, Copy)]
pub struct WebMachine;

impl Machine for WebMachine {
    const KIND: &'static str = "web";
    const TRANSITIONS: TransitionTable<Role> = TransitionTable { initial: Role::Initializing, edges: EDGES };

    type State = State;
    type Event = Event;
    type Action = Action;
    type Role = Role;

    fn step(mut state: State, now: Time, event: Event) -> Step<State, Action> {
        let mut out = Vec::new();
        state.stepped_at = now;
        state.path = vec![state.role];
        if !state.ended {
            state.take_in(now, event, &mut out);
            state.advance(now, &mut out);
        }
        Step { state, actions: out }
    }

    fn timer_fired() -> Event {
        Event::TimerFired
    }

    fn deadline(state: &State) -> Option<Deadline> {
        let next = state.next_deadline()?;
        // What was due and is still there waits for something else: look again, but not at once.
        let at = if next.at <= state.stepped_at { state.stepped_at + RETRY_AFTER } else { next.at };
        Some(Deadline { at, ..next })
    }

    fn role(state: &State) -> Role {
        state.role
    }

    fn report(state: &State, now: Time) -> Report {
        state.report(now)
    }

    fn invariants(state: &State) -> Result<(), String> {
        state.check()
    }
}

impl State {
    /// A bot that has just been started. `instance` tells this process from any other of the same name; `epoch_unix_ms` is
    /// the wall time at the origin of the machine's clock, to show, and to count an hour's scaling actions by, never to decide
    /// anything else.
    #[must_use]
    pub fn new(settings: Settings, instance: impl Into<String>, epoch_unix_ms: u64) -> Self {
        let scopes = [Some(&settings.scope), Some(&settings.content), settings.database.as_ref()];
        Self {
            epoch_unix_ms,
            stepped_at: Time::ZERO,
            role: WebMachine::TRANSITIONS.initial,
            since: Time::ZERO,
            path: vec![WebMachine::TRANSITIONS.initial],
            view: View::of(scopes.into_iter().flatten().map(bots_core::dcs::Scope::prefix)),
            overrides: Overrides::default(),
            membership: Membership::new(settings.scope.clone(), settings.name.clone(), instance, settings.ttl),
            leadership: Leadership::new(settings.scope.leader(), settings.name.clone()),
            lock_refused: None,
            content: Content::new(settings.content.clone(), format!("{}/{}", settings.scope.name(), settings.name)),
            behind: Behind::default(),
            slots: Slots::new(settings.scope.clone()),
            app: App::new(instances_max(&settings.live)),
            database: Database::default(),
            scaling: Scaling::new(settings.scope.clone()),
            drain: None,
            drains: 0,
            load: None,
            pressure: Pressure::default(),
            route: Route::Refuse { state: Role::Initializing.to_string() },
            shared: Shared::default(),
            ended: false,
            settings,
        }
    }

    /// The prefixes of the store that the bot watches.
    #[must_use]
    pub fn prefixes(&self) -> Vec<String> {
        self.view.prefixes().map(str::to_owned).collect()
    }

    /// What it knows of the store.
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// Whether the database fails over, as far as it knows, and nobody is to come or go meanwhile.
    #[must_use]
    pub fn holds_still(&self) -> bool {
        self.database.is_frozen(self.stepped_at)
    }

    /// The role.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// The roles that the last step went through, the first being the one that it began in.
    #[must_use]
    pub fn path(&self) -> &[Role] {
        &self.path
    }

    /// Where requests go at the moment.
    #[must_use]
    pub const fn route(&self) -> &Route {
        &self.route
    }

    /// The load message that is ours under a lease that we have not heard to be lost.
    #[must_use]
    pub const fn slot(&self) -> Option<u32> {
        self.slots.held()
    }

    /// The load message that is ours for sure at `now`: the lease that binds the claim lives.
    #[must_use]
    pub fn slot_for_sure(&self, now: Time) -> Option<u32> {
        self.slots.held().filter(|_| self.membership.lease(now).is_some())
    }

    /// Whether the lock of the scope is ours at `now`.
    #[must_use]
    pub fn leads(&self, now: Time) -> bool {
        self.leadership.fence(now, &self.membership).is_some()
    }

    fn take_in(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Dcs(event) => self.take_in_dcs(now, event, out),
            Event::NameProbed { instance } => {
                self.take_in_membership(now, &MembershipEvent::NameProbed { instance }, out);
            }
            Event::TimerFired => {}
            Event::ShutdownRequested => self.stop(now),
            Event::Reconfigured(live) => self.reconfigure(live),
            Event::ContentPrepared { id, sha } => self.content.prepared(id, &sha),
            Event::ContentFailed { id, sha, why } => self.content.failed(now, id, &sha, &why),
            Event::ContentRefused { id, sha, why } => self.content.refused(id, &sha, why),
            Event::AppReady { instance } => self.app.ready(now, instance),
            // An app that waits for its database is not made better by another start.
            Event::AppHung { .. } if self.database.is_frozen(now) || self.role != Role::Serving => {}
            Event::AppHung { instance, how } => self.app.hung(now, instance, &how),
            Event::AppExited { instance, how } => self.app.exited(now, instance, &how),
            Event::AppNotStarted { instance, how } => self.app.not_started(now, instance, &how),
            Event::DatabaseProbed { id, answers } => self.database.probed(now, id, answers),
            Event::LoadMeasured(load) => self.load = Some(load),
            Event::ProcessorStalled => self.pressure.stalled(now),
            Event::InFlightEnded { id } => {
                if let Some(drain) = self.drain.as_mut().filter(|d| d.is(id)) {
                    drain.end();
                }
            }
        }
    }

    /// Goes by new settings from now on. What an operator has set in the store still wins over them.
    fn reconfigure(&mut self, live: Live) {
        self.app.bound(instances_max(&live));
        self.settings.live = live;
        self.overrides.observe(&self.settings, &self.view);
    }

    fn take_in_dcs(&mut self, now: Time, event: DcsEvent, out: &mut Vec<Action>) {
        self.view.apply(&event);
        self.overrides.observe(&self.settings, &self.view);
        if let DcsEvent::Answered { id, outcome } = &event {
            self.slots.answered(now, *id, outcome, self.seen());
            self.scaling.answered(now, *id, outcome);
        }
        let lock = self.leadership.on_event(now, &event, &self.view, &self.membership);
        self.take_in_membership(now, &MembershipEvent::Dcs(event), out);
        match lock {
            Some(LeadershipChange::Won(_)) => self.scaling.begin(now),
            Some(LeadershipChange::Lost(_) | LeadershipChange::Yielded) => {
                self.scaling.end();
                self.database.forget_silence();
            }
            Some(LeadershipChange::Refused) => self.lock_refused = Some((self.seen(), now + RETRY_AFTER)),
            None => {}
        }
    }

    /// How far our knowledge of our own scope reaches.
    fn seen(&self) -> Revision {
        self.view.revision(&self.settings.scope.prefix())
    }

    fn take_in_membership(&mut self, now: Time, event: &MembershipEvent, out: &mut Vec<Action>) {
        let mut asked = Vec::new();
        let change = self.membership.on_event(now, event, &self.view, &mut asked);
        out.extend(asked.into_iter().map(Action::from));
        match change {
            Some(MembershipChange::Lost(_)) => {
                self.slots.lease_lost();
                self.slots.hold_off_until(now + RECLAIM_GRACE);
            }
            Some(MembershipChange::Joined) => {
                let grace = if self.shared.has_joined_before() { RECLAIM_GRACE } else { Span::ZERO };
                self.slots.hold_off_until(now + grace);
            }
            Some(MembershipChange::Duplicate { api_url }) => self.fail(now, &api_url, out),
            None => {}
        }
    }

    /// Everything that follows from what is known by now.
    fn advance(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.ended {
            return;
        }
        let mut asked = Vec::new();
        self.membership.advance(now, &mut asked);
        out.extend(asked.into_iter().map(Action::from));
        self.content.observe(&self.view);
        self.app.observe(now, self.settings.database.as_ref(), &self.view);
        // Files need no database.
        let database = self.settings.database.as_ref().filter(|_| self.settings.mode == Mode::App);
        self.database.observe(now, database, &self.view);
        self.behind.observe(now, self.is_behind(now));
        let board = Board::read(&self.view, &self.settings.scope);
        self.play(now, &board, out);
        self.content.advance(now, &self.commits_in_use(), &self.view, out);
        self.lead(now, &board, out);
        self.send_outward(now, out);
        self.finish(now, out);
    }

    fn commits_in_use(&self) -> std::collections::BTreeSet<String> {
        let mut commits = self.app.commits();
        commits.extend(self.route.sha().map(str::to_owned));
        commits
    }

    /// Runs for leader, and scales while it is: any bot, idle ones too.
    fn lead(&mut self, now: Time, board: &Board, out: &mut Vec<Action>) {
        if self.role == Role::Stopping {
            // The next leader need not wait until the last request has ended.
            let mut asked = Vec::new();
            self.leadership.yield_lock(now, &mut self.membership, Vec::new(), &mut asked);
            out.extend(asked.into_iter().map(Action::Dcs));
        }
        let runs = !matches!(self.role, Role::Initializing | Role::Stopping | Role::Failed);
        if !runs || !self.view.is_watched() {
            return;
        }
        let seen = self.seen();
        self.lock_refused = self.lock_refused.filter(|(view, until)| *view == seen && now < *until);
        let mut asked = Vec::new();
        let open = self.lock_refused.is_none() && self.leadership.looks_free(&self.view);
        if open && self.membership.is_registered() {
            self.leadership.acquire(now, &mut self.membership, &self.view, Vec::new(), &mut asked);
        }
        out.extend(asked.into_iter().map(Action::Dcs));
        let Some(fence) = self.leadership.fence(now, &self.membership) else { return };
        let figures = self.figures(now, board);
        self.scaling.advance(&figures, fence, &self.leadership, &mut self.membership, out);
        if self.scaling.doubts() {
            self.database.ask(now, out);
        } else {
            self.database.forget_silence();
        }
    }

    fn effective(&self) -> Effective {
        let bots_max = self.settings.live.connections.and_then(|budget| self.database.bots_max(budget));
        Effective::of(&self.settings, &self.overrides).within(bots_max)
    }

    /// The commit to serve: while the database fails over, the one that is served.
    fn servable(&self) -> Option<&str> {
        let frozen = self.database.is_frozen(self.stepped_at);
        self.route.sha().filter(|_| frozen).or_else(|| self.content.servable())
    }

    fn sight<'v>(&self, now: Time, board: &'v Board) -> Sight<'v> {
        Sight {
            now,
            board,
            view: self.seen(),
            watched: self.view.is_watched(),
            max: self.effective().scaling.max,
            vacated: self.settings.live.connections.is_none() || !self.app.has_leavers(),
        }
    }

    /// What an instance of the app is to be made of, as far as it is known.
    fn recipe(&self) -> Option<Recipe> {
        if self.database.is_frozen(self.stepped_at)
            && let Some(running) = self.app.serving_recipe()
        {
            return Some(running);
        }
        let sha = self.servable()?.to_owned();
        let database_hosts = self.app.hosts().to_vec();
        if self.settings.database.is_some() && database_hosts.is_empty() {
            return None;
        }
        let Effective { cdn_url, restart, .. } = self.effective();
        Some(Recipe { sha, database_hosts, cdn_url, restart, configuration: self.settings.live.configuration })
    }

    fn next_deadline(&self) -> Option<Deadline> {
        if self.ended {
            return None;
        }
        let now = self.stepped_at;
        let board = Board::read(&self.view, &self.settings.scope);
        let sight = self.sight(now, &board);
        let leads = self.leadership.fence(now, &self.membership).is_some() && self.view.is_watched();
        let recipe = (self.settings.mode == Mode::App).then(|| self.recipe()).flatten();
        Deadline::earliest([
            self.membership.deadline(),
            self.leadership.deadline(),
            self.lock_refused.map(|(_, at)| Deadline { at, reason: String::from("ask again for the lock") }),
            self.content.deadline(),
            self.behind_deadline(),
            self.slots.deadline(&sight, &self.membership),
            self.app.deadline(now, recipe.as_ref()),
            self.database.deadline(now),
            self.pressure.deadline(now).filter(|_| self.is_stalled()),
            self.drain.as_ref().and_then(Drain::deadline),
            leads.then(|| self.scaling.deadline(&self.figures(now, &board))).flatten(),
        ])
    }

    /// The only way to change role.
    fn become_role(&mut self, now: Time, role: Role) {
        WebMachine::TRANSITIONS.assert_allows(self.role, role);
        if self.role != role {
            self.role = role;
            self.since = now;
            self.path.push(role);
        }
    }
}
