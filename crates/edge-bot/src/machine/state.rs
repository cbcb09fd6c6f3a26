//! Everything that an edge bot knows, and how an event changes it.

use std::net::SocketAddr;

use bots_core::{
    dcs::{Revision, Scope, View},
    machine::{Deadline, Machine, Span, Time},
    membership::{Membership, MembershipAction, MembershipChange, MembershipEvent},
    wire::EdgeStand,
};
use serde::Serialize;

use super::{
    Action, Admin, Backend, Command, EdgeMachine, Event, Role,
    names::Names,
    plan::{self, Memory, Moment},
    proxy::{Proxy, Seen},
    report,
    standing::Standing,
    wanted::{self, Door, Wanted},
};

/// The bot duplicates another's name.
const EXIT_CONTRADICTED: u8 = 3;

/// So long connections are held for a primary that is about to hand over, and then go to it again, even if etcd cannot be
/// asked. It goes on or gives up in less than a third of that.
pub const HOLD_MAX: Span = Span::from_secs(10);

/// Connections are held for a primary that is about to hand over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Hold {
    generation: Revision,
    since: Time,
}

impl Hold {
    fn until(&self) -> Time {
        self.since + HOLD_MAX
    }
}

/// What the operator decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// The edge's own scope.
    pub scope: Scope,
    /// The Postgres scope to route to, if any.
    pub postgres: Option<Scope>,
    /// Whether replicas are routed to.
    pub replicas: bool,
    /// The web scope to route to, if any.
    pub web: Option<Scope>,
    /// The bot's name.
    pub name: String,
    /// Tells this process from any other of the same name.
    pub instance: String,
    /// The version of the bot.
    pub version: String,
    /// Where the bot's API answers; ends in `/status`.
    pub api_url: String,
    /// The length of the lease.
    pub ttl: Span,
    /// How long sessions with a server that goes may take to end.
    pub drain_timeout: Span,
    /// Whether the bot starts the proxy if none runs.
    pub start_proxy: bool,
    /// Whether the proxy goes when the bot is asked to stop.
    pub stop_proxy: bool,
}

/// Everything that an edge bot knows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    pub(super) settings: Settings,
    role: Role,
    since: Time,
    epoch_unix_ms: u64,
    stepped_at: Option<Time>,
    pub(super) view: View,
    pub(super) membership: Membership,
    /// The name was ours once: nobody else's bot of this name has a say over this proxy.
    joined: bool,
    pub(super) names: Names,
    pub(super) proxy: Proxy,
    memory: Memory,
    /// The primary that is about to hand over, and since when connections are held for it.
    hold: Option<Hold>,
    /// What the primary is told.
    stand: EdgeStand,
    standing: Option<Standing>,
    /// What etcd asked for when it was last known.
    pub(super) wanted: Wanted,
    pub(super) homeless: Vec<(Backend, String)>,
    pub(super) overruled: Option<(String, SocketAddr)>,
    /// Stopping: when the proxy is ended without waiting for its sessions.
    kill_at: Option<Time>,
}

impl State {
    /// A bot that has just been started. `epoch_unix_ms` is the wall time at [`Time::ZERO`]: for people to read.
    #[must_use]
    pub fn new(settings: Settings, epoch_unix_ms: u64) -> Self {
        let prefixes = Self::prefixes(&settings);
        let membership = Membership::new(settings.scope.clone(), &settings.name, &settings.instance, settings.ttl);
        Self {
            role: EdgeMachine::TRANSITIONS.initial,
            since: Time::ZERO,
            epoch_unix_ms,
            stepped_at: None,
            view: View::of(prefixes),
            membership,
            joined: false,
            names: Names::default(),
            proxy: Proxy::new(),
            memory: Memory::default(),
            hold: None,
            stand: EdgeStand::default(),
            standing: settings.postgres.as_ref().map(|s| Standing::new(s.edge(&settings.scope, &settings.name))),
            wanted: Wanted::default(),
            homeless: Vec::new(),
            overruled: None,
            kill_at: None,
            settings,
        }
    }

    /// The prefixes that a bot with these settings watches: its own scope and those that it routes to.
    #[must_use]
    pub fn prefixes(settings: &Settings) -> Vec<String> {
        let others = settings.postgres.iter().chain(&settings.web);
        std::iter::once(&settings.scope).chain(others).map(Scope::prefix).collect()
    }

    /// The node of the diagram.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// Whether connections that come in find the proxy.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.proxy.is_up()
    }

    /// The name and generation of the leader that the proxy was last seen to route to; nothing while new connections for
    /// the primary are held.
    #[must_use]
    pub fn routed(&self) -> Option<(&str, Revision)> {
        plan::routed(&self.wanted, self.proxy.snapshot()).map(|leader| (leader.name.as_str(), leader.generation))
    }

    pub(super) const fn since(&self) -> Time {
        self.since
    }

    pub(super) fn unix_ms(&self, at: Time) -> u64 {
        self.epoch_unix_ms.saturating_add(at.as_millis())
    }

    pub(super) fn take(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        self.stepped_at = Some(now);
        match event {
            Event::Dcs(event) => {
                self.view.apply(&event);
                if let (Some(standing), Some(scope)) = (&mut self.standing, &self.settings.postgres) {
                    standing.on_event(now, &event);
                    let shown = self.view.get(standing.key()).map(|kv| kv.modified);
                    standing.shown(shown, self.view.revision(&scope.prefix()));
                }
                self.member(now, &MembershipEvent::Dcs(event), out);
            }
            Event::NameProbed { instance } => self.member(now, &MembershipEvent::NameProbed { instance }, out),
            Event::TimerFired => {}
            Event::ShutdownRequested => self.stop(now, out),
            Event::ProxyObserved { job, look } => match self.proxy.observed(now, job, look) {
                Seen::Another(pid) => {
                    self.memory.forget();
                    out.push(Action::WatchProxy { pid });
                }
                Seen::Nothing => self.memory.forget(),
                Seen::Same | Seen::OldNews => {}
            },
            Event::ProxyStarted { job, result } => self.proxy.ended_start(now, job, result),
            Event::ProxyExited { pid } => {
                if self.proxy.exited(now, pid) {
                    self.memory.forget();
                }
            }
            Event::HostResolved { host, address } => self.names.resolved(now, &host, address),
        }
        match self.role {
            Role::Initializing | Role::Starting | Role::Keeping | Role::Routing => self.settle(now, out),
            Role::Stopping => self.finish(now, out),
            Role::Stopped => {}
        }
    }

    fn member(&mut self, now: Time, event: &MembershipEvent, out: &mut Vec<Action>) {
        let mut asked = Vec::new();
        let change = self.membership.on_event(now, event, &self.view, &mut asked);
        out.extend(asked.into_iter().map(action));
        match change {
            Some(MembershipChange::Joined) => self.joined = true,
            Some(MembershipChange::Duplicate { api_url }) if self.role != Role::Stopping => {
                let name = self.membership.name();
                let message =
                    format!("another live bot uses the name {name} ({api_url}): give this one another `name`");
                self.exit(now, EXIT_CONTRADICTED, message, out);
            }
            Some(MembershipChange::Duplicate { .. } | MembershipChange::Lost(_)) | None => {}
        }
    }

    /// Does what the state asks for, and brings the role in line with it: one edge a step at most.
    fn settle(&mut self, now: Time, out: &mut Vec<Action>) {
        let mut asked = Vec::new();
        self.membership.advance(now, &mut asked);
        out.extend(asked.into_iter().map(action));
        let known = self.joined && self.view.is_complete() && self.view.is_watched();
        if known {
            self.names.want(now, &wanted::hosts(&self.settings, &self.view), out);
            self.wanted = Wanted::read(&self.settings, &self.view, &self.names);
            self.bound_hold(now);
            if self.proxy.is_free() {
                self.apply_wanted(now, out);
            }
        } else if self.proxy.is_free() && self.is_hold_over(now) {
            self.release_unwatched(now, out);
        }
        self.proxy.advance(now, self.settings.start_proxy, out);
        let role = match (self.proxy.is_known(), self.proxy.is_up(), known) {
            (false, _, _) => Role::Initializing,
            (true, false, _) => Role::Starting,
            (true, true, false) => Role::Keeping,
            (true, true, true) => Role::Routing,
        };
        self.enter(role, now);
        self.stand(now, out);
        let mut asked = Vec::new();
        self.membership.publish(now, report::member(self).to_json(), &mut asked);
        out.extend(asked.into_iter().map(action));
    }

    /// Asks for what the proxy does not show yet.
    fn apply_wanted(&mut self, now: Time, out: &mut Vec<Action>) {
        let timeout = self.settings.drain_timeout;
        let mut memory = self.memory.clone();
        let moment = Moment { now, seen_at: self.proxy.seen_at() };
        let plan = memory.plan(moment, &self.wanted, self.proxy.snapshot(), timeout);
        self.homeless = plan.homeless;
        self.overruled = plan.overruled;
        if self.proxy.apply(now, plan.commands, out) {
            self.memory = memory;
        }
    }

    /// Lets connections go again to a leader that has not handed over in its time.
    fn bound_hold(&mut self, now: Time) {
        let handing_over = self.wanted.leader.as_ref().filter(|leader| leader.hands_over);
        self.hold = handing_over.map(|leader| match self.hold {
            Some(hold) if hold.generation == leader.generation => hold,
            Some(_) | None => Hold { generation: leader.generation, since: now },
        });
        if self.is_hold_over(now) {
            self.wanted.release();
        } else if self.hold.is_some() {
            self.proxy.look_soon();
        }
    }

    /// Connections have been held for a primary for as long as they may be.
    pub(super) fn is_hold_over(&self, now: Time) -> bool {
        self.hold.is_some_and(|hold| now >= hold.until())
    }

    /// The same while etcd cannot be asked, where no other route is touched: a leader that goes on without etcd would have no
    /// clients.
    fn release_unwatched(&mut self, now: Time, out: &mut Vec<Action>) {
        match plan::held_place(&self.wanted, self.proxy.snapshot()) {
            Some(place) => {
                let open = Command::SetAdmin { place, admin: Admin::Ready };
                let _again_after_the_next_look = self.proxy.apply(now, vec![open], out);
            }
            None => self.hold = None,
        }
    }

    /// Tells the primary how far we are.
    fn stand(&mut self, now: Time, out: &mut Vec<Action>) {
        // One that does not route yet is not worth waiting for.
        let routes = self.role == Role::Routing;
        let Some(standing) = self.standing.as_mut().filter(|s| self.joined && (routes || s.is_there())) else { return };
        let held = self.hold.filter(|hold| routes && self.wanted.closes(hold.generation));
        self.stand = match held {
            Some(hold) if self.proxy.has_shown_since(hold.since) => plan::stand(&self.wanted, self.proxy.snapshot()),
            // Commands are under way that may have been asked for before, or for another place.
            Some(hold) if self.stand.holds == Some(hold.generation) => self.stand.clone(),
            Some(_) | None => EdgeStand::default(),
        };
        let mut asked = Vec::new();
        standing.share(now, self.stand.to_json(), &mut self.membership, &mut asked);
        out.extend(asked.into_iter().map(Action::Dcs));
    }

    /// Asked to stop: a proxy that is to go is asked to finish its sessions first.
    fn stop(&mut self, now: Time, out: &mut Vec<Action>) {
        match self.proxy.pid() {
            Some(pid) if self.settings.stop_proxy && self.role != Role::Stopping => {
                let mut asked = Vec::new();
                self.membership.leave(&mut asked);
                out.extend(asked.into_iter().map(action));
                out.push(Action::StopProxy { pid });
                self.kill_at = Some(now + self.settings.drain_timeout);
                self.enter(Role::Stopping, now);
            }
            Some(_) | None => self.exit(now, 0, String::from("asked to stop"), out),
        }
    }

    /// The end of `Stopping`: the proxy has gone, or has had its time.
    fn finish(&mut self, now: Time, out: &mut Vec<Action>) {
        let late = self.kill_at.is_some_and(|at| now >= at);
        match self.proxy.pid() {
            Some(pid) if late => {
                out.push(Action::KillProxy { pid });
                self.exit(
                    now,
                    0,
                    String::from("asked to stop, and the proxy with it: its last sessions were cut"),
                    out,
                );
            }
            Some(_) => {}
            None => self.exit(now, 0, String::from("asked to stop, and the proxy with it"), out),
        }
    }

    fn exit(&mut self, now: Time, code: u8, message: String, out: &mut Vec<Action>) {
        let mut asked = Vec::new();
        self.membership.leave(&mut asked);
        out.extend(asked.into_iter().map(action));
        out.push(Action::Exit { code, message });
        self.enter(Role::Stopped, now);
    }

    /// The only way to change the role.
    fn enter(&mut self, role: Role, now: Time) {
        if role == self.role {
            return;
        }
        EdgeMachine::TRANSITIONS.assert_allows(self.role, role);
        self.role = role;
        self.since = now;
    }

    /// When the machine wants a step of its own accord.
    pub(super) fn deadline(&self) -> Option<Deadline> {
        if self.stepped_at.is_none() {
            return Some(Deadline { at: Time::ZERO, reason: String::from("begin") });
        }
        let all = match self.role {
            Role::Stopped => vec![],
            Role::Stopping => vec![due(self.kill_at, "cut the proxy's last sessions")],
            Role::Initializing | Role::Starting | Role::Keeping => {
                vec![
                    self.membership.deadline(),
                    self.proxy.deadline(self.settings.start_proxy),
                    self.standing.as_ref().and_then(Standing::deadline),
                    due(self.hold.as_ref().map(Hold::until), "let connections go to the leader again"),
                ]
            }
            Role::Routing => vec![
                self.membership.deadline(),
                self.proxy.deadline(self.settings.start_proxy),
                self.names.deadline(),
                self.standing.as_ref().and_then(Standing::deadline),
                due(self.hold.as_ref().map(Hold::until), "let connections go to the leader again"),
                due(self.memory.next_cut(self.settings.drain_timeout), "cut sessions with a server that goes"),
            ],
        };
        // What the last step has seen and left alone waits for an event, not for time.
        let ahead = |d: &Deadline| self.stepped_at.is_none_or(|at| d.at > at);
        Deadline::earliest(all.into_iter().map(|d| d.filter(ahead)))
    }

    pub(super) fn invariants(&self) -> Result<(), String> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        let open = self.wanted.of(Backend::Primary).iter().filter(|t| t.door != Door::Shut).count();
        check(open <= 1, "no more than one member is routed to as the primary")?;
        check(open == 0 || self.wanted.leader.is_some(), "who is routed to as the primary leads")?;
        let up = matches!(self.role, Role::Keeping | Role::Routing);
        check(!up || self.proxy.is_up(), "routes are kept where a proxy answers")?;
        check(self.role != Role::Routing || self.view.is_complete(), "routes come from a complete view")?;
        check((self.role == Role::Stopping) <= self.kill_at.is_some(), "a stop has an end")
    }
}

fn due(at: Option<Time>, reason: &str) -> Option<Deadline> {
    at.map(|at| Deadline { at, reason: reason.to_owned() })
}

fn action(asked: MembershipAction) -> Action {
    match asked {
        MembershipAction::Dcs(action) => Action::Dcs(action),
        MembershipAction::ProbeName { api_url } => Action::ProbeName { api_url },
    }
}
