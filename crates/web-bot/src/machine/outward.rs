//! What the world sees: the route of requests, the member key, the report.

use bots_core::{
    machine::{Machine, Report, Span, Time},
    wire::{Kind, Member, MemberHead, WebFacts, WebLoad},
};
use serde::Serialize;

use super::{
    Action, Mode, Role, Route, STALLED_WEIGHT, State, WebMachine, board::Board, budget::Budget, content::short,
    pressure::weighed, scaling::Figures,
};

/// What an idle bot says that could not answer a load message now: who sends requests sends none there, not even those that
/// wake a site.
const RESTING: &str = "resting";

/// What was last shared, to tell news from figures.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Shared {
    /// The member value without its load.
    solid: String,
    /// How many bots the load called for when it was last shared.
    bots: u32,
    joined: bool,
}

impl Shared {
    /// Whether the bot was a member once; remembers that it is now.
    pub(super) fn has_joined_before(&mut self) -> bool {
        std::mem::replace(&mut self.joined, true)
    }
}

impl State {
    /// Route first, then what depends on it, then the word to the others.
    pub(super) fn send_outward(&mut self, now: Time, out: &mut Vec<Action>) {
        let route = self.wanted_route();
        if route != self.route {
            if route.sha() != self.route.sha() {
                // What was counted of one commit says nothing of another.
                self.load = self.load.map(|load| WebLoad { requests: 0, errors: 0, ..load });
            }
            self.route = route;
            out.push(Action::SetRoute(self.route.clone()));
        }
        self.app.sweep(self.settings.live.drain_timeout, out);
        out.extend(self.drain.as_mut().and_then(super::Drain::question));
        let board = Board::read(&self.view, &self.settings.scope);
        let sight = self.sight(now, &board);
        self.slots.tidy(&sight, &mut self.membership, out);
        self.publish(now, out);
    }

    fn publish(&mut self, now: Time, out: &mut Vec<Action>) {
        let leads = self.leads(now);
        let head = MemberHead {
            kind: Kind::Web,
            state: if self.is_resting() { String::from(RESTING) } else { self.role.to_string() },
            role: String::from(if leads { "leader" } else { "member" }),
            version: self.settings.version.clone(),
            api_url: self.settings.api_url.clone(),
            instance: self.membership.instance().to_owned(),
            node: self.role.to_string(),
            since_unix_ms: self.epoch_unix_ms.saturating_add(self.since.as_millis()),
        };
        let mut facts = WebFacts {
            url: self.settings.url.clone(),
            serving: self.route.sha().map(str::to_owned),
            prepared: self.acknowledged().map(str::to_owned),
            refused: self.refusal(),
            slot: self.slots.serving_for(),
            load: None,
            stalled: false,
            trouble: self.troubles().into_iter().next(),
        };
        let solid = Member::new(head.clone(), &facts).to_json();
        facts.load = self.load.filter(|_| self.role == Role::Serving).or_else(|| self.knocks());
        facts.stalled = self.is_stalled();
        let bots = self.effective().scaling.bots_for(weighed(&facts));
        let value = Member::new(head, &facts).to_json();
        let mut asked = Vec::new();
        // Load that calls for another bot is news; load that wobbles is a figure.
        if solid != self.shared.solid || bots > self.shared.bots {
            self.shared.solid = solid;
            self.shared.bots = bots;
            self.membership.publish(now, value, &mut asked);
        } else {
            self.shared.bots = self.shared.bots.min(bots.max(1));
            self.membership.publish_soft(now, value, &mut asked);
        }
        out.extend(asked.into_iter().map(Action::from));
    }

    /// It is idle, and would not wake for a request.
    fn is_resting(&self) -> bool {
        self.role == Role::Idle && !self.may_serve(self.stepped_at)
    }

    /// Nobody serves and nobody has to: the first request is held while the site wakes.
    pub(super) fn is_asleep(&self) -> bool {
        let sleeps = self.role == Role::Idle && self.effective().scaling.min == 0 && !self.is_resting();
        // A claim of our own may show before the answer to it: whoever waits here waits for that.
        sleeps && Board::read(&self.view, &self.settings.scope).is_unclaimed_but_by(&self.settings.name)
    }

    /// Whether to send requests here: this bot serves, or holds them until it does while nobody else would answer them sooner.
    #[must_use]
    pub fn takes_requests(&self) -> bool {
        let prefix = self.settings.scope.members_prefix();
        let serves = |m: Member| m.head.node == Role::Serving.to_string();
        let somebody = || self.view.below(&prefix).filter_map(|kv| Member::from_json(&kv.value)).any(serves);
        self.role == Role::Serving || (self.route == Route::Hold && !somebody())
    }

    /// The requests that wait here for the site to wake.
    pub(super) fn knocks(&self) -> Option<WebLoad> {
        self.load.filter(|load| load.in_flight_milli > 0 && self.is_asleep())
    }

    /// Whether requests wait at another idle bot and none do here: it should be the one to wake.
    pub(super) fn yields_to_knocks(&self) -> bool {
        let prefix = self.settings.scope.members_prefix();
        let members = self.view.below(&prefix).filter_map(|kv| Member::from_json(&kv.value));
        let knocked = |m: Member| {
            let waits = m.facts::<WebFacts>().and_then(|facts| facts.load).is_some_and(|load| load.in_flight_milli > 0);
            m.head.node == Role::Idle.to_string() && waits
        };
        self.knocks().is_none() && members.into_iter().any(knocked)
    }

    /// The load of all serving bots, as they share it, and the requests that wait at idle ones.
    pub(super) fn figures<'v>(&self, now: Time, board: &'v Board) -> Figures<'v> {
        let prefix = self.settings.scope.members_prefix();
        let members = self.view.below(&prefix).filter_map(|kv| Member::from_json(&kv.value));
        let counts = |m: &Member| [Role::Serving, Role::Idle].iter().any(|role| m.head.node == role.to_string());
        let serving = members.filter(|m| m.head.kind == Kind::Web && counts(m));
        let loads = serving.filter_map(|m| m.facts::<WebFacts>()).map(|facts| weighed(&facts));
        let unix_ms = self.epoch_unix_ms.saturating_add(now.as_millis());
        Figures {
            now,
            unix_ms,
            budget: Budget::read(&self.view, &self.settings.scope, unix_ms),
            board,
            frozen: self.database.is_frozen(now),
            database_answers: self.database.answers(now),
            view: self.seen(),
            total_milli: loads.fold(0, u64::saturating_add),
            settings: self.effective().scaling,
        }
    }

    fn troubles(&self) -> Vec<String> {
        let known = [
            self.database.trouble(self.stepped_at),
            self.content.trouble(),
            self.app.trouble(),
            self.effective().trouble,
            self.scaling.trouble(),
        ];
        known.into_iter().flatten().collect()
    }

    pub(super) fn report(&self, now: Time) -> Report {
        let mut report = Report::new(self.role, self.since, now)
            .doing(self.doing())
            .waiting_for(self.waiting_for())
            .next(WebMachine::deadline(self), now);
        for (alternative, because) in self.why_not(now) {
            report = report.why_not(alternative, because);
        }
        let store =
            (!self.view.is_watched()).then(|| String::from("the watch of etcd is broken: what is known may be old"));
        let stall = self
            .is_stalled()
            .then(|| format!("work waits for a processor: a request in flight counts for {STALLED_WEIGHT}"));
        for trouble in self.troubles().into_iter().chain(self.membership.trouble()).chain(store).chain(stall) {
            report = report.trouble(trouble);
        }
        report
    }

    fn doing(&self) -> String {
        let sha = self.route.sha().or_else(|| self.content.servable()).map_or("nothing", short);
        let leads =
            if self.leads(self.stepped_at) { format!("; leads: {}", self.scaling.reasoning()) } else { String::new() };
        let place = self.slots.serving_for().map_or_else(String::new, |slot| format!(" for load message {slot}"));
        let what = match self.role {
            Role::Initializing => String::from("asks etcd for a lease, a name and a first look"),
            Role::Preparing => format!("fetches the content of {}", self.content.scope_name()),
            Role::Idle if self.is_resting() => format!("rests with commit {sha}"),
            Role::Idle => format!("stands by with commit {sha}"),
            Role::Waking => format!("brings up commit {sha}{place}"),
            Role::Serving => format!("serves commit {sha}{place}"),
            Role::Draining => format!("lets the last requests to commit {sha} end"),
            Role::Stopping => String::from("lets the last requests end, then exits"),
            Role::Failed => String::from("exits"),
        };
        what + &leads
    }

    fn waiting_for(&self) -> String {
        match self.role {
            Role::Initializing => String::from("etcd"),
            Role::Preparing => self.content.waiting_for(),
            Role::Idle if self.is_resting() => String::from("what keeps it from serving to end"),
            Role::Idle => String::from("a load message that nobody has claimed"),
            Role::Waking => String::from("the app to answer its health check"),
            Role::Serving => String::from("a new revision, or the end of its load message"),
            Role::Draining => String::from("the requests in flight"),
            Role::Stopping => String::from("the requests in flight and the app's end"),
            Role::Failed => String::from("nothing"),
        }
    }

    fn why_not(&self, now: Time) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        if self.role == Role::Preparing {
            found.push(("serve", self.content.waiting_for()));
        }
        if self.role == Role::Idle {
            let because = if let Some(slot) = self.slots.asking_for() {
                format!("load message {slot} is being claimed")
            } else if !self.may_serve(now) {
                self.why_not_ready(now)
            } else if now < self.slots.not_before() {
                let left: Span = self.slots.not_before().since(now);
                format!("bots that kept serving through an outage may claim first, for {left} more")
            } else {
                String::from("every load message is claimed: load asks for no more bots")
            };
            found.push(("serve", because));
        }
        found.extend(self.why_it_serves_on().map(|because| ("rest", because)));
        if !self.leads(now) && self.role != Role::Failed {
            let because = match self.leadership.holder(&self.view) {
                Some(holder) if holder != self.membership.name() => format!("{holder} holds the lock"),
                Some(_) | None => String::from("the lock is being asked for"),
            };
            found.push(("lead", because));
        }
        found
    }

    fn why_not_ready(&self, now: Time) -> String {
        if self.effective().drained {
            return format!(
                "an operator drained it: botctl web wake {} {}",
                self.settings.scope.name(),
                self.settings.name
            );
        }
        if self.is_left_behind(now) {
            return format!("others serve what is not here yet: it waits for {}", self.content.waiting_for());
        }
        let no_hosts = self.settings.mode == Mode::App && self.app.hosts().is_empty();
        match &self.settings.database {
            Some(database) if no_hosts => {
                format!("no member of the database scope {} is known: is its bot up?", database.name())
            }
            Some(_) | None if self.content.servable().is_none() => self.content.waiting_for(),
            Some(_) | None => String::from("the app failed of late: the next try has to wait"),
        }
    }
}
