//! The difference between what etcd asks for and what the proxy shows, as commands: what closes first, what opens after.
//!
//! Primary: every member has a place, and only the leader's takes connections. A place that is not the leader's drains
//! while its check says that it is a primary, and is ready while its check says that it is not: should etcd and the bot be
//! gone, the checks bring up whoever is promoted then.
//!
//! Replicas, web: who should serve is ready and the check decides; who should not any more drains, then gives its place
//! back. It does not drain if its check is bad, unless it is a web bot that says that it finishes its requests.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use bots_core::{
    dcs::Revision,
    machine::{Span, Time},
    wire::EdgeStand,
};
use serde::{Serialize, Serializer};

use super::{
    Admin, Backend, Command, Place, Server, Snapshot,
    wanted::{Door, Target, Wanted},
};

/// What must be remembered between two looks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Memory {
    /// The generation whose leader was seen to take connections, or does on our word. From then on its check decides, until
    /// it says itself that it accepts no writes.
    vouched: Option<Revision>,
    /// Since when a place has been draining.
    #[serde(serialize_with = "as_pairs")]
    draining: BTreeMap<Place, Time>,
}

/// JSON has no maps by place.
fn as_pairs<S: Serializer>(map: &BTreeMap<Place, Time>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(map)
}

/// The difference.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Plan {
    pub(super) commands: Vec<Command>,
    /// Members that have no place, since all are taken.
    pub(super) homeless: Vec<(Backend, String)>,
    /// The leader, and where it is checked, if its check overrules etcd.
    pub(super) overruled: Option<(String, SocketAddr)>,
}

/// When the difference is looked for, and how old what is known of the proxy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) now: Time,
    pub(super) seen_at: Time,
}

impl Moment {
    /// Whether nothing can have happened since the look that the machine knows of.
    fn is_fresh(self) -> bool {
        self.seen_at == self.now
    }
}

impl Memory {
    /// Another process answers, or it is not known what the last one has heard.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// When a drain is to be cut off.
    pub(super) fn next_cut(&self, timeout: Span) -> Option<Time> {
        self.draining.values().min().map(|since| *since + timeout)
    }

    /// The difference between what is wanted and what was shown.
    pub(super) fn plan(&mut self, moment: Moment, wanted: &Wanted, shown: &Snapshot, drain_timeout: Span) -> Plan {
        let mut draft = Draft::new(moment, drain_timeout, wanted);
        if wanted.leader.is_none() {
            self.vouched = None;
        }
        let shown_places: BTreeSet<&Place> = shown.servers.iter().map(|s| &s.place).collect();
        self.draining.retain(|place, _| shown_places.contains(place));
        for backend in Backend::ALL {
            let servers: Vec<&Server> = shown.of(backend).collect();
            // A backend that the configuration does not have is not served.
            if !servers.is_empty() {
                self.backend(backend, &servers, &mut draft);
            }
        }
        let Draft { mut closing, opening, homeless, overruled, .. } = draft;
        closing.extend(opening);
        Plan { commands: closing, homeless, overruled }
    }

    fn backend(&mut self, backend: Backend, servers: &[&Server], draft: &mut Draft<'_>) {
        if backend == Backend::Primary {
            draft.opens_leader = self.opens_leader(servers, draft.wanted);
        }
        let mut taken: BTreeSet<&Place> = BTreeSet::new();
        let mut newcomers = Vec::new();
        for target in draft.wanted.of(backend) {
            let own = |s: &&&Server| s.serve == Some(target.serve) && !taken.contains(&s.place);
            let in_use = servers.iter().filter(own).min_by_key(|s| s.admin);
            match in_use {
                Some(server) => {
                    taken.insert(&server.place);
                    self.draining.remove(&server.place);
                    self.settle(server, target, draft);
                }
                None => newcomers.push(target),
            }
        }
        for server in servers.iter().filter(|s| !taken.contains(&s.place)) {
            self.leave(server, draft);
        }
        let rests = |s: &&&Server| s.admin == Admin::Maint && s.sessions == 0 && !taken.contains(&s.place);
        let mut free = servers.iter().filter(rests);
        for target in newcomers {
            match free.next() {
                Some(server) => self.settle(server, target, draft),
                None => draft.homeless.push((backend, target.name.clone())),
            }
        }
    }

    /// Whether the leader is about to be opened to new connections.
    fn opens_leader(&self, servers: &[&Server], wanted: &Wanted) -> bool {
        let Some(target) = wanted.of(Backend::Primary).iter().find(|t| t.door == Door::Open) else { return false };
        let vouched = self.vouched == wanted.leader.as_ref().map(|l| l.generation);
        let own = servers.iter().find(|s| s.serve == Some(target.serve));
        own.is_none_or(|s| s.admin != Admin::Ready || (!s.up && !vouched))
    }

    /// Brings a place to what its member should have.
    fn settle(&mut self, server: &Server, target: &Target, draft: &mut Draft<'_>) {
        let place = || server.place.clone();
        let moves = server.serve != Some(target.serve) || server.check != Some(target.check);
        if moves {
            draft.opening.push(Command::SetAddress { place: place(), serve: target.serve, check: target.check });
        }
        let weight = if moves { target.weight() } else { target.weight_after(server.weight) };
        if server.weight != weight {
            draft.opening.push(Command::SetWeight { place: place(), weight });
        }
        if target.door == Door::Closing {
            return Self::close(server, draft);
        }
        if target.door == Door::Shut {
            // A place that comes from rest is taken for healthy until its first check. A check that failed at the last
            // look may have passed since: nobody else stays open when the leader is opened, and nobody is let out of a
            // drain on old news.
            let fresh = draft.moment.is_fresh();
            let quiet = match server.admin {
                Admin::Maint => Admin::Drain,
                _ if server.up || draft.opens_leader => Admin::Drain,
                Admin::Drain if !fresh => Admin::Drain,
                Admin::Drain | Admin::Ready => Admin::Ready,
            };
            if server.admin != quiet {
                let closes = server.admin == Admin::Ready;
                let commands = if closes { &mut draft.closing } else { &mut draft.opening };
                commands.push(Command::SetAdmin { place: place(), admin: quiet });
            }
            // Those that have come in since the last look are shut, too.
            if server.sessions > 0 || (server.up && server.admin == Admin::Ready) {
                draft.closing.push(Command::ShutSessions { place: place() });
            }
            return;
        }
        if server.admin != Admin::Ready {
            draft.opening.push(Command::SetAdmin { place: place(), admin: Admin::Ready });
        }
        if server.place.backend == Backend::Primary {
            self.vouch(server, target, draft);
        }
    }

    /// Takes the leader for healthy, once for each time that it comes to accept writes; from then on its check decides.
    fn vouch(&mut self, server: &Server, target: &Target, draft: &mut Draft<'_>) {
        let generation = draft.wanted.leader.as_ref().map(|l| l.generation);
        if self.vouched == generation {
            if !server.up && server.admin != Admin::Maint {
                draft.overruled = Some((target.name.clone(), target.check));
            }
            return;
        }
        let serves = server.up && server.admin == Admin::Ready;
        if !serves {
            // Also one that was up at the last look: what its check has found since, and the bad answers that it has
            // counted, are of a time in which it did not lead.
            draft.opening.push(Command::SetUp { place: server.place.clone() });
        }
        if !serves || draft.moment.is_fresh() {
            self.vouched = generation;
        }
    }

    /// Lets no new connection in, and leaves those alone that are there. From rest it takes none either.
    fn close(server: &Server, draft: &mut Draft<'_>) {
        let drain = || Command::SetAdmin { place: server.place.clone(), admin: Admin::Drain };
        match server.admin {
            Admin::Ready => draft.closing.push(drain()),
            Admin::Maint => draft.opening.push(drain()),
            Admin::Drain => {}
        }
    }

    /// Empties a place that nobody should have.
    fn leave(&mut self, server: &Server, draft: &mut Draft<'_>) {
        let place = || server.place.clone();
        if server.admin == Admin::Maint {
            self.draining.remove(&server.place);
            return;
        }
        let since = *self.draining.entry(place()).or_insert(draft.moment.now);
        let late = draft.moment.now >= since + draft.drain_timeout;
        // A web bot that leaves answers its check with 503, and what it was sent before to the end. One that is down and says
        // nothing of itself has nothing to finish.
        let at_once = match server.place.backend {
            Backend::Primary => true,
            Backend::Replicas => !server.up,
            Backend::Web => !server.up && server.serve.is_none_or(|serve| !draft.wanted.finishing.contains(&serve)),
        };
        if at_once || (server.admin == Admin::Drain && late) {
            draft.closing.push(Command::SetAdmin { place: place(), admin: Admin::Maint });
            draft.closing.push(Command::ShutSessions { place: place() });
        } else if server.admin == Admin::Ready {
            // Whether it has sessions is seen after that: none can come in any more.
            draft.closing.push(Command::SetAdmin { place: place(), admin: Admin::Drain });
        } else if server.sessions == 0 {
            draft.closing.push(Command::SetAdmin { place: place(), admin: Admin::Maint });
        }
    }
}

/// The leader that the proxy is seen to route to: healthy, and no session goes to any other member.
pub(super) fn routed<'w>(wanted: &'w Wanted, shown: &Snapshot) -> Option<&'w super::wanted::Leader> {
    let leader = wanted.leader.as_ref()?;
    let target = wanted.of(Backend::Primary).iter().find(|t| t.door == Door::Open)?;
    let is_leaders = |s: &Server| s.serve == Some(target.serve);
    let takes = |s: &Server| s.admin == Admin::Ready && s.up;
    let open = shown.of(Backend::Primary).any(|s| is_leaders(s) && takes(s));
    let others_shut = shown.of(Backend::Primary).filter(|s| !is_leaders(s)).all(|s| !takes(s) && s.sessions == 0);
    (open && others_shut).then_some(leader)
}

/// How far the proxy is seen to have come with holding connections for a leader that is about to hand over.
pub(super) fn stand(wanted: &Wanted, shown: &Snapshot) -> EdgeStand {
    let closing = wanted.of(Backend::Primary).iter().find(|t| t.door == Door::Closing);
    let Some((leader, target)) = wanted.leader.as_ref().zip(closing) else { return EdgeStand::default() };
    // One that is only down for the moment may come up before anybody looks again.
    let quiet = |s: &Server| s.admin != Admin::Ready || (s.serve != Some(target.serve) && !s.up);
    let holds = shown.of(Backend::Primary).all(quiet);
    let sessions = shown.of(Backend::Primary).any(|s| s.sessions > 0);
    let known = holds.then_some(leader.generation);
    EdgeStand { holds: known, drained: known.filter(|_| !sessions) }
}

/// The place of the leader for whom connections are held, unless another takes them meanwhile.
pub(super) fn held_place(wanted: &Wanted, shown: &Snapshot) -> Option<Place> {
    let target = wanted.of(Backend::Primary).iter().find(|t| t.door == Door::Closing)?;
    let another_takes = shown.of(Backend::Primary).any(|s| s.admin == Admin::Ready && s.up);
    let mut own = shown.of(Backend::Primary).filter(|s| s.serve == Some(target.serve) && s.admin == Admin::Drain);
    own.next().filter(|_| !another_takes).map(|s| s.place.clone())
}

struct Draft<'w> {
    moment: Moment,
    opens_leader: bool,
    drain_timeout: Span,
    wanted: &'w Wanted,
    closing: Vec<Command>,
    opening: Vec<Command>,
    homeless: Vec<(Backend, String)>,
    overruled: Option<(String, SocketAddr)>,
}

impl<'w> Draft<'w> {
    const fn new(moment: Moment, drain_timeout: Span, wanted: &'w Wanted) -> Self {
        Self {
            moment,
            opens_leader: false,
            drain_timeout,
            wanted,
            closing: Vec::new(),
            opening: Vec::new(),
            homeless: Vec::new(),
            overruled: None,
        }
    }
}
