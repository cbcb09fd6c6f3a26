//! The roles: one step function each, and what entering or leaving one brings with it.

use bots_core::machine::{Deadline, Span, Time};
use serde::Serialize;

use super::{
    Action, Mode, Role, Route, State,
    app::{Condition, Recipe},
    board::Board,
    slots::Standing,
};

/// How long a draining bot goes on taking new requests after it has said that it leaves: proxies and clients learn of it
/// through the store within a fraction of this, so none of them meets a closed door.
pub const DRAIN_NOTICE: Span = Span::from_secs(1);

/// How long after the last SIGKILL a stopping bot waits for the end of its children before it leaves regardless.
const EXIT_MARGIN: Span = Span::from_secs(2);

/// How often a role may hand over to the next within one step; longer than the longest chain, which goes from
/// `Initializing` to `Serving`.
const HANDOVERS_MAX: usize = 8;

/// The way out of the serving set: notice, closed door, end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Drain {
    id: u64,
    notice_until: Time,
    until: Time,
    /// New requests are refused.
    closed: bool,
    /// The shell was asked to say when nothing is in flight.
    awaited: bool,
    done: bool,
    /// Stopping: the code and line to exit with, and the moment to go even if a child has not ended.
    exit_by: Time,
}

impl Drain {
    fn begin(id: u64, now: Time, timeout: Span) -> Self {
        let until = now + DRAIN_NOTICE + timeout;
        Self {
            id,
            notice_until: now + DRAIN_NOTICE.min(timeout),
            until,
            closed: false,
            awaited: false,
            done: false,
            exit_by: until + super::APP_STOP_GRACE + EXIT_MARGIN,
        }
    }

    /// Nothing was being served: nothing is in flight.
    fn at_once(id: u64, now: Time) -> Self {
        let exit_by = now + super::APP_STOP_GRACE + EXIT_MARGIN;
        Self { id, notice_until: now, until: now, closed: true, awaited: true, done: true, exit_by }
    }

    pub(super) const fn is(&self, id: u64) -> bool {
        self.id == id
    }

    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn end(&mut self) {
        self.done = self.closed;
    }

    fn advance(&mut self, now: Time) {
        self.closed |= now >= self.notice_until;
        self.done |= now >= self.until;
    }

    /// The question to ask of the shell, once the door is closed.
    pub(super) fn question(&mut self) -> Option<Action> {
        let due = self.closed && !std::mem::replace(&mut self.awaited, self.closed);
        due.then_some(Action::AwaitInFlight { id: self.id })
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        let (at, reason) = if !self.closed {
            (self.notice_until, "take no new requests")
        } else if !self.done {
            (self.until, "cut off the requests in flight")
        } else {
            (self.exit_by, "leave without waiting for the app")
        };
        Some(Deadline { at, reason: reason.to_owned() })
    }
}

impl State {
    /// Lets roles act until none hands over to another.
    pub(super) fn play(&mut self, now: Time, board: &Board, out: &mut Vec<Action>) {
        let sight = self.sight(now, board);
        self.slots.observe(&sight, &self.membership);
        for _ in 0..HANDOVERS_MAX {
            let before = self.role;
            match self.role {
                Role::Initializing => self.initializing(now),
                Role::Preparing => self.preparing(now),
                Role::Idle => self.idle(now, board, out),
                Role::Waking => self.waking(now, board, out),
                Role::Serving => self.serving(now, board, out),
                Role::Draining => self.draining(now),
                Role::Stopping => self.stopping(now),
                Role::Failed => {}
            }
            if self.role == before {
                break;
            }
        }
    }

    fn initializing(&mut self, now: Time) {
        if self.view.is_complete() && self.membership.is_registered() {
            self.become_role(now, Role::Preparing);
        }
    }

    fn preparing(&mut self, now: Time) {
        if self.content.servable().is_some() {
            self.become_role(now, Role::Idle);
        }
    }

    fn idle(&mut self, now: Time, board: &Board, out: &mut Vec<Action>) {
        let sight = self.sight(now, board);
        let wakes = self.may_serve(now) && !self.yields_to_knocks();
        if wakes || self.slots.asking_for().is_some() {
            self.slots.seek(&sight, &mut self.membership, out);
        }
        if self.slots.held().is_some() {
            self.become_role(now, Role::Waking);
        }
    }

    /// Whether a claimed load message could be answered.
    pub(super) fn may_serve(&self, now: Time) -> bool {
        if self.effective().drained || self.is_left_behind(now) {
            return false;
        }
        match self.settings.mode {
            Mode::Static => self.content.servable().is_some(),
            Mode::App => self.recipe().is_some_and(|recipe| self.app.may_start(now, &recipe)),
        }
    }

    fn waking(&mut self, now: Time, board: &Board, out: &mut Vec<Action>) {
        if self.look_for_place(now, board, out) != Standing::Keep {
            self.rest(now);
            return;
        }
        match self.run_app(now, out) {
            Condition::Up => self.become_role(now, Role::Serving),
            Condition::Coming => {}
            Condition::Hopeless => self.rest(now),
        }
    }

    fn serving(&mut self, now: Time, board: &Board, out: &mut Vec<Action>) {
        if self.look_for_place(now, board, out) != Standing::Keep {
            self.slots.stop_asking();
            self.begin_drain(now);
            self.become_role(now, Role::Draining);
            return;
        }
        match self.run_app(now, out) {
            Condition::Up => {}
            Condition::Coming | Condition::Hopeless => self.become_role(now, Role::Waking),
        }
    }

    fn draining(&mut self, now: Time) {
        let app_died = self.settings.mode == Mode::App && self.app.serving().is_none();
        let Some(drain) = &mut self.drain else { return };
        drain.advance(now);
        if drain.done || app_died {
            self.rest(now);
        }
    }

    fn stopping(&mut self, now: Time) {
        if let Some(drain) = &mut self.drain {
            drain.advance(now);
            if drain.done {
                self.app.rest();
            }
        }
    }

    fn look_for_place(&mut self, now: Time, board: &Board, out: &mut Vec<Action>) -> Standing {
        if self.effective().drained || self.is_left_behind(now) {
            // Given back once the last request has ended; the message stays, for another bot.
            return Standing::Withdrawn;
        }
        let sight = self.sight(now, board);
        self.slots.keep(&sight, &mut self.membership, out)
    }

    /// Brings the app to what shall run now; a static site is always up.
    fn run_app(&mut self, now: Time, out: &mut Vec<Action>) -> Condition {
        match self.settings.mode {
            Mode::Static => match self.servable().or(self.route.sha()) {
                Some(_) => Condition::Up,
                None => Condition::Coming,
            },
            // While a new live commit is fetched, what runs stays wanted as it is.
            Mode::App => match self.recipe().or_else(|| self.app.recipe()) {
                Some(recipe) => self.run_instances(now, &recipe, out),
                None => Condition::Coming,
            },
        }
    }

    /// While the database fails over, what is known of the candidate stays as it is: an app would not come up.
    fn run_instances(&mut self, now: Time, recipe: &Recipe, out: &mut Vec<Action>) -> Condition {
        let (frozen, timeout) = (self.database.is_frozen(now), self.settings.live.app_start_timeout);
        if !frozen {
            let candidate = self.candidate_recipe(recipe);
            self.app.follow(candidate);
        }
        let condition = self.app.advance(now, recipe, timeout, out);
        self.judge_candidate(now, out);
        if !frozen {
            self.app.prove(now, recipe, timeout, out);
        }
        condition
    }

    /// Back to `Idle`: nothing runs, the place is given back.
    fn rest(&mut self, now: Time) {
        self.app.rest();
        self.drain = None;
        self.slots.give_back(now);
        self.become_role(now, Role::Idle);
    }

    fn begin_drain(&mut self, now: Time) {
        self.drains += 1;
        self.drain = Some(Drain::begin(self.drains, now, self.settings.live.drain_timeout));
    }

    /// Asked to stop. A second time: no more waiting.
    pub(super) fn stop(&mut self, now: Time) {
        match self.role {
            Role::Serving => self.begin_drain(now),
            // A drain that is under way goes on.
            Role::Draining => {}
            Role::Initializing | Role::Preparing | Role::Idle | Role::Waking => {
                self.drains += 1;
                self.drain = Some(Drain::at_once(self.drains, now));
            }
            Role::Stopping => {
                self.drains += 1;
                self.drain = Some(Drain { exit_by: now, ..Drain::at_once(self.drains, now) });
            }
            Role::Failed => return,
        }
        self.slots.stop_asking();
        self.become_role(now, Role::Stopping);
    }

    /// Another live process has our name: it may serve under it, we must not.
    pub(super) fn fail(&mut self, now: Time, api_url: &str, out: &mut Vec<Action>) {
        if self.role == Role::Stopping {
            return;
        }
        self.drain = None;
        self.become_role(now, Role::Failed);
        let name = self.membership.name().to_owned();
        let scope = self.settings.scope.name().to_owned();
        let message = format!(
            "another live bot in scope {scope} uses the name {name} and answers at {api_url}: \
             give this one another `name`, or stop that one"
        );
        self.send_outward(now, out);
        self.ended = true;
        out.push(Action::Exit { code: 3, message });
    }

    /// The end of `Stopping`: everything is given back with the lease.
    pub(super) fn finish(&mut self, now: Time, out: &mut Vec<Action>) {
        let Some(drain) = self.drain.as_ref().filter(|d| d.done && self.role == Role::Stopping) else { return };
        if !self.app.is_gone() && now < drain.exit_by {
            return;
        }
        let mut asked = Vec::new();
        self.membership.leave(&mut asked);
        out.extend(asked.into_iter().map(Action::from));
        self.ended = true;
        out.push(Action::Exit { code: 0, message: String::from("stopped as asked") });
    }

    /// Where requests should go now.
    pub(super) fn wanted_route(&self) -> Route {
        let refuse = || Route::Refuse { state: self.role.to_string() };
        let closing = self.drain.is_some();
        match self.role {
            Role::Idle if self.is_asleep() => Route::Hold,
            Role::Initializing | Role::Preparing | Role::Idle | Role::Failed => refuse(),
            Role::Waking => Route::Hold,
            Role::Draining | Role::Stopping if self.drain.as_ref().is_none_or(Drain::is_closed) => refuse(),
            Role::Serving | Role::Draining | Role::Stopping => match self.settings.mode {
                Mode::Static => {
                    let sha = self.servable().or(self.route.sha());
                    sha.map_or_else(refuse, |sha| Route::Static { sha: sha.to_owned(), closing })
                }
                Mode::App => self.app.serving().map_or_else(refuse, |(instance, sha)| Route::App {
                    instance,
                    sha: sha.to_owned(),
                    closing,
                }),
            },
        }
    }
}
