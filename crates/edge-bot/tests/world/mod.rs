//! A small world for edge machines: etcd in memory, time that stands still until it is moved, and a model of HAProxy's
//! servers that does what 2.6 was seen to do (`tests/haproxy.rs` holds the real one to the same).

#![allow(dead_code, unreachable_pub, reason = "shared by tests, each of which is a crate of its own")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    net::SocketAddr,
};

use bots_core::{
    dcs::{DcsAction, DcsEvent, LeaseId, MemoryDcs, Outcome, Revision, Scope, Transaction, Write},
    machine::{Machine, Span, Time},
    wire::{EdgeFacts, EdgeStand, Kind, Member, MemberHead, PostgresFacts, WebFacts, WebLoad},
};
use edge_bot::machine::{
    Action, Admin, Backend, Command, EdgeMachine, Event, JobId, Look, Place, Role, Server, Settings, Snapshot, Started,
    State,
};

pub const TTL: Span = Span::from_secs(5);
pub const DRAIN: Span = Span::from_secs(30);

/// Places of every backend: few, so that they run out.
const PLACES: usize = 3;

pub struct World {
    pub now: Time,
    pub dcs: MemoryDcs,
    pub state: Option<State>,
    pub edges: BTreeSet<(Role, Role)>,
    pub log: Vec<String>,
    pub proxy: Option<Proxy>,
    /// How the next starts of the proxy end, if not well.
    pub start_fails: Option<String>,
    /// The addresses of host names.
    pub hosts: BTreeMap<String, String>,
    /// Whether etcd can be reached.
    pub cut: bool,
    pub exited: Option<u8>,
    /// The instance that answers when a name is probed.
    pub namesake: Option<String>,
    inbox: VecDeque<Event>,
    lease: Option<LeaseId>,
    grant: Option<Span>,
    cursors: BTreeMap<String, Option<Revision>>,
    instances: u32,
    pids: u32,
}

#[derive(Default)]
pub struct Proxy {
    pub pid: u32,
    pub silent: bool,
    /// Undoes what it is told, now in this way and now in that.
    pub stubborn: bool,
    /// Batches of commands that it was given.
    pub batches: u32,
    pub servers: Vec<Server>,
    watched: bool,
}

pub fn scope(name: &str) -> Scope {
    Scope::new("service", name).expect("valid")
}

impl World {
    pub fn new() -> Self {
        Self {
            now: Time::from_millis(1_000),
            dcs: MemoryDcs::new(),
            state: None,
            edges: BTreeSet::new(),
            log: Vec::new(),
            proxy: None,
            start_fails: None,
            hosts: BTreeMap::new(),
            cut: false,
            exited: None,
            namesake: None,
            inbox: VecDeque::new(),
            lease: None,
            grant: None,
            cursors: BTreeMap::new(),
            instances: 0,
            pids: 100,
        }
    }

    /// Starts a bot; one that ran before is gone without a word.
    pub fn start(&mut self, start_proxy: bool, stop_proxy: bool) {
        self.instances += 1;
        let settings = Settings {
            scope: scope("edge"),
            postgres: Some(scope("main")),
            replicas: true,
            web: Some(scope("web")),
            name: String::from("edge-1"),
            instance: format!("instance-{}", self.instances),
            version: String::from("0.1.0"),
            api_url: String::from("http://10.0.0.99:8008/status"),
            ttl: TTL,
            drain_timeout: DRAIN,
            start_proxy,
            stop_proxy,
        };
        self.cursors = State::prefixes(&settings).into_iter().map(|p| (p, None)).collect();
        self.state = Some(State::new(settings, 1_700_000_000_000));
        self.lease = None;
        self.grant = None;
        self.exited = None;
        self.inbox.clear();
        if let Some(proxy) = &mut self.proxy {
            proxy.watched = false;
        }
    }

    pub fn state(&self) -> &State {
        self.state.as_ref().expect("started")
    }

    /// A proxy with all places at rest.
    pub fn run_proxy(&mut self) {
        self.pids += 1;
        let place = |backend: Backend, n: usize| Server {
            place: Place { backend, slot: format!("s{n}") },
            serve: Some("127.0.0.1:1".parse().expect("an address")),
            check: None,
            admin: Admin::Maint,
            up: false,
            weight: 100,
            sessions: 0,
        };
        let servers = Backend::ALL.into_iter().flat_map(|b| (1..=PLACES).map(move |n| place(b, n))).collect();
        self.proxy = Some(Proxy { pid: self.pids, servers, ..Proxy::default() });
    }

    /// The proxy's process ends.
    pub fn end_proxy(&mut self) {
        let Some(proxy) = self.proxy.take() else { return };
        if proxy.watched {
            self.inbox.push_back(Event::ProxyExited { pid: proxy.pid });
        }
    }

    pub fn server(&mut self, place: &str) -> &mut Server {
        let servers = &mut self.proxy.as_mut().expect("a proxy").servers;
        servers.iter_mut().find(|s| s.place.to_string() == place).unwrap_or_else(|| panic!("no server {place}"))
    }

    /// The proxy's own check of a server has come to another result.
    pub fn check(&mut self, place: &str, up: bool) {
        let server = self.server(place);
        server.up = up;
        if !up && server.place.backend == Backend::Primary {
            server.sessions = 0;
        }
    }

    pub fn put(&mut self, key: &str, value: &str) {
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::put(key, value)]));
    }

    pub fn delete(&mut self, key: &str) {
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::delete(key)]));
    }

    /// A Postgres member; its number is its address unless it gives a host name.
    pub fn postgres(&mut self, name: &str, role: &str, state: &str, host: Option<&str>) {
        self.put(&scope("main").member(name), &member(name, role, state, host));
    }

    /// Another one leads, and both members say so, all in one transaction.
    pub fn swap(&mut self, from: &str, to: &str) {
        let main = scope("main");
        let writes = vec![
            Write::put(main.leader(), to),
            Write::put(main.member(from), member(from, "replica", "running", None)),
            Write::put(main.member(to), member(to, "primary", "running", None)),
        ];
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), writes));
    }

    /// The primary is about to hand over: it takes writes, and wants no new connections.
    pub fn hands_over(&mut self, name: &str) {
        let key = scope("main").member(name);
        let Some(member) = self.dcs.get(&key).and_then(|kv| Member::from_json(&kv.value)) else { return };
        let facts = PostgresFacts { handing_over: true, ..member.facts().expect("Postgres facts") };
        self.put(&key, &Member::new(member.head, &facts).to_json());
    }

    pub fn web(&mut self, name: &str, state: &str, in_flight_milli: u64) {
        let number = name.rsplit('-').next().expect("a number");
        let facts = WebFacts {
            url: format!("http://10.0.1.{number}:8080"),
            load: Some(WebLoad { in_flight_milli, ..WebLoad::default() }),
            ..WebFacts::default()
        };
        let value =
            Member::new(head(Kind::Web, state, "member", &format!("http://10.0.1.{number}:8008/status")), &facts);
        self.put(&scope("web").member(name), &value.to_json());
    }

    fn step(&mut self, event: Event) {
        if self.exited.is_some() {
            return;
        }
        let before = self.state.clone().expect("started");
        let from = before.role();
        let step = EdgeMachine::step(before.clone(), self.now, event.clone());
        assert_eq!(step, EdgeMachine::step(before, self.now, event), "the same step twice gives the same result");
        let to = step.state.role();
        EdgeMachine::invariants(&step.state).unwrap_or_else(|broken| panic!("at {}: {broken}", self.now));
        let _report = EdgeMachine::report(&step.state, self.now);
        self.state = Some(step.state);
        if from != to {
            self.edges.insert((from, to));
            self.log.push(format!("{from} -> {to}"));
        }
        for action in step.actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Dcs(DcsAction::GrantLease { ttl }) => self.grant = Some(ttl),
            // Leases here are renewed by the tests.
            Action::Dcs(DcsAction::PaceLease { .. }) => {}
            Action::Dcs(DcsAction::RevokeLease { lease }) => {
                if !self.cut {
                    self.dcs.revoke(lease);
                }
                self.lease = None;
            }
            Action::Dcs(DcsAction::Transact { id, transaction }) => {
                let outcome = if self.cut {
                    Outcome::Unknown(String::from("no answer"))
                } else {
                    self.dcs.transact(self.now, &transaction)
                };
                if matches!(outcome, Outcome::Done(_)) {
                    transaction.then.iter().for_each(|write| self.hold_is_true(write));
                    self.log.extend(transaction.then.iter().filter_map(shared));
                }
                self.inbox.push_back(Event::Dcs(DcsEvent::Answered { id, outcome }));
            }
            Action::ProbeName { .. } => {
                let instance = self.namesake.clone();
                self.inbox.push_back(Event::NameProbed { instance });
            }
            Action::ObserveProxy { job } => self.look(job),
            Action::ApplyRoutes { job, commands } => {
                for command in &commands {
                    self.log.push(format!("> {}", shown(command)));
                    if self.proxy.as_ref().is_some_and(|p| !p.silent) {
                        self.apply(command);
                    }
                }
                self.undo();
                self.look(job);
            }
            Action::StartProxy { job } => {
                self.log.push(String::from("> start the proxy"));
                let result = match self.start_fails.clone() {
                    Some(why) => Started::Failed { why },
                    None => {
                        self.run_proxy();
                        Started::Done
                    }
                };
                self.inbox.push_back(Event::ProxyStarted { job, result });
            }
            Action::WatchProxy { pid } => {
                self.log.push(format!("> watch process {pid}"));
                if let Some(proxy) = self.proxy.as_mut().filter(|p| p.pid == pid) {
                    proxy.watched = true;
                }
            }
            Action::StopProxy { pid } => self.log.push(format!("> ask process {pid} to end")),
            Action::KillProxy { pid } => {
                self.log.push(format!("> end process {pid}"));
                self.end_proxy();
            }
            Action::ResolveHost { host } => {
                self.log.push(format!("> look up {host}"));
                let address = self.hosts.get(&host).map(|a| a.parse().expect("an address"));
                self.inbox.push_back(Event::HostResolved { host, address });
            }
            Action::Exit { code, message } => {
                self.log.push(format!("> exit {code}: {message}"));
                self.exited = Some(code);
            }
        }
    }

    /// Whoever is told that connections are held may rely on it.
    fn hold_is_true(&self, write: &Write) {
        let Some(EdgeStand { holds: Some(generation), .. }) = stand(write) else { return };
        let leader = self.dcs.get(&scope("main").leader()).filter(|kv| kv.modified == generation);
        let Some(leader) = leader.filter(|_| !self.cut) else { return };
        let address = format!("10.0.0.{}:5432", leader.value.trim_start_matches("pg-"));
        let servers = self.proxy.iter().flat_map(|p| &p.servers).filter(|s| s.place.backend == Backend::Primary);
        let mut own = servers.filter(|s| s.serve.is_some_and(|serve| serve.to_string() == address));
        let lets_in = own.any(|s| s.admin == Admin::Ready);
        assert!(!lets_in, "it says that it holds, and {address} takes connections\n{}", self.servers());
    }

    fn undo(&mut self) {
        let Some(proxy) = &mut self.proxy else { return };
        proxy.batches += 1;
        for server in proxy.servers.iter_mut().filter(|s| proxy.stubborn && s.place.backend == Backend::Web) {
            match proxy.batches % 2 {
                0 => server.weight = 50,
                _ => server.check = None,
            }
        }
    }

    fn look(&mut self, job: JobId) {
        let look = match &self.proxy {
            Some(proxy) if proxy.silent => Look::Silent { why: String::from("no answer within 2s") },
            Some(proxy) => Look::Up {
                snapshot: Snapshot { pid: proxy.pid, servers: proxy.servers.clone() },
                complaints: Vec::new(),
            },
            None => Look::Absent { why: String::from("nobody listens") },
        };
        self.inbox.push_back(Event::ProxyObserved { job, look });
    }

    fn apply(&mut self, command: &Command) {
        let before = self.open_primaries().len();
        match command {
            Command::SetAddress { place, serve, check } => {
                let server = self.server(&place.to_string());
                (server.serve, server.check) = (Some(*serve), Some(*check));
            }
            Command::SetAdmin { place, admin } => {
                let server = self.server(&place.to_string());
                server.up = match (server.admin, admin) {
                    (_, Admin::Maint) => false,
                    (Admin::Maint, Admin::Ready | Admin::Drain) => true,
                    (Admin::Ready | Admin::Drain, Admin::Ready | Admin::Drain) => server.up,
                };
                server.admin = *admin;
            }
            Command::SetWeight { place, weight } => self.server(&place.to_string()).weight = *weight,
            Command::SetUp { place } => self.server(&place.to_string()).up = true,
            Command::ShutSessions { place } => self.server(&place.to_string()).sessions = 0,
        }
        // Checks may bring up several; the bot's own word never does, not even between two commands.
        let open = self.open_primaries();
        assert!(open.len() <= before.max(1), "{command:?} opens one more to the primary's clients: {open:?}");
    }

    /// The servers that take new connections for the primary.
    pub fn open_primaries(&self) -> Vec<SocketAddr> {
        let servers = self.proxy.iter().flat_map(|p| &p.servers);
        let takes = |s: &&Server| s.place.backend == Backend::Primary && s.admin == Admin::Ready && s.up;
        servers.filter(takes).filter_map(|s| s.serve).collect()
    }

    /// Lets everything happen that needs no time.
    pub fn settle(&mut self) {
        for _ in 0..500 {
            if !self.deliver() {
                return;
            }
        }
        panic!("the bot and its world never come to rest:\n{}", self.log.join("\n"));
    }

    fn deliver(&mut self) -> bool {
        if self.state.is_none() || self.exited.is_some() {
            return false;
        }
        if let Some(event) = self.inbox.pop_front() {
            self.step(event);
            return true;
        }
        if let Some(ttl) = self.grant.take_if(|_| !self.cut) {
            let lease = self.dcs.grant(self.now, ttl);
            self.lease = Some(lease);
            self.step(Event::Dcs(DcsEvent::LeaseGranted { lease, valid_until: self.now + ttl }));
            return true;
        }
        let watched = if self.cut { None } else { self.watch_news() };
        if let Some(event) = watched {
            self.step(Event::Dcs(event));
            return true;
        }
        let due = EdgeMachine::deadline(self.state()).is_some_and(|d| d.at <= self.now);
        if due {
            self.step(Event::TimerFired);
        }
        due
    }

    fn watch_news(&mut self) -> Option<DcsEvent> {
        for (prefix, cursor) in &mut self.cursors {
            let prefix = prefix.clone();
            match *cursor {
                None => {
                    let (revision, entries) = self.dcs.list(&prefix);
                    *cursor = Some(revision);
                    return Some(DcsEvent::Listed { prefix, revision, entries });
                }
                Some(seen) => {
                    let revision = self.dcs.revision();
                    let changes = self.dcs.changes_after(&prefix, seen).expect("not compacted");
                    *cursor = Some(revision);
                    if !changes.is_empty() {
                        return Some(DcsEvent::Changed { prefix, revision, changes });
                    }
                }
            }
        }
        None
    }

    /// etcd cannot be reached any more.
    pub fn cut(&mut self) {
        self.cut = true;
        for (prefix, cursor) in &mut self.cursors {
            *cursor = None;
            let why = String::from("reset");
            self.inbox.push_back(Event::Dcs(DcsEvent::WatchLost { prefix: prefix.clone(), why }));
        }
    }

    /// Somebody asks the bot to end.
    pub fn shutdown(&mut self) {
        self.step(Event::ShutdownRequested);
    }

    /// Time passes; leases are renewed and timers fire on the way.
    pub fn pass(&mut self, span: Span) {
        let end = self.now + span;
        while self.now < end {
            let next = self.state.as_ref().filter(|_| self.exited.is_none()).and_then(EdgeMachine::deadline);
            let renewal = self.now + Span::from_secs(1);
            self.now = next.map_or(end, |d| d.at).max(self.now + Span::from_millis(1)).min(renewal).min(end);
            if let Some(lease) = self.lease.filter(|_| !self.cut)
                && self.dcs.keep_alive(self.now, lease)
            {
                let valid_until = self.now + TTL;
                self.inbox.push_back(Event::Dcs(DcsEvent::LeaseRenewed { lease, valid_until }));
            }
            self.dcs.expire(self.now);
            self.settle();
        }
    }

    pub fn servers(&self) -> String {
        let Some(proxy) = &self.proxy else { return String::from("(no proxy)\n") };
        let mut out = String::new();
        for s in proxy.servers.iter().filter(|s| s.admin != Admin::Maint) {
            let serve = s.serve.map_or_else(|| String::from("-"), |a: SocketAddr| a.to_string());
            let health = if s.up { "up" } else { "down" };
            let admin = format!("{:?}", s.admin).to_lowercase();
            let _infallible =
                writeln!(out, "{} {serve} {admin} {health} weight {} sessions {}", s.place, s.weight, s.sessions);
        }
        if out.is_empty() { String::from("(all at rest)\n") } else { out }
    }
}

/// What stands in the key of a Postgres member.
fn member(name: &str, role: &str, state: &str, host: Option<&str>) -> String {
    let number = name.rsplit('-').next().expect("a number");
    let host = host.map_or_else(|| format!("10.0.0.{number}"), str::to_owned);
    let facts = PostgresFacts { conn_url: format!("postgres://{host}:5432/postgres"), ..PostgresFacts::default() };
    Member::new(head(Kind::Postgres, state, role, &format!("http://{host}:8008/patroni")), &facts).to_json()
}

fn head(kind: Kind, state: &str, role: &str, api_url: &str) -> MemberHead {
    MemberHead {
        kind,
        state: state.to_owned(),
        role: role.to_owned(),
        version: String::from("0.1.0"),
        api_url: api_url.to_owned(),
        instance: String::from("other"),
        node: state.to_owned(),
        since_unix_ms: 0,
    }
}

fn shown(command: &Command) -> String {
    match command {
        Command::SetAddress { place, serve, check } => format!("{place}: address {serve}, check {check}"),
        Command::SetAdmin { place, admin } => format!("{place}: {}", format!("{admin:?}").to_lowercase()),
        Command::SetWeight { place, weight } => format!("{place}: weight {weight}"),
        Command::SetUp { place } => format!("{place}: up"),
        Command::ShutSessions { place } => format!("{place}: shut sessions"),
    }
}

/// What is said to the primary.
fn stand(write: &Write) -> Option<EdgeStand> {
    let Write::Put { key, value, .. } = write else { return None };
    (*key == scope("main").edge(&scope("edge"), "edge-1")).then(|| EdgeStand::from_json(value))
}

/// What of a write the others wait for.
fn shared(write: &Write) -> Option<String> {
    if let Some(stand) = stand(write) {
        let shown = |what: &str, of: Option<Revision>| of.map(|of| format!("{what} generation {}", of.0));
        let both = [shown("holds", stand.holds), shown("drained", stand.drained)].into_iter().flatten();
        let text = both.collect::<Vec<_>>().join(", ");
        return Some(format!("tells the primary: {}", if text.is_empty() { "stands before it" } else { &text }));
    }
    let Write::Put { key, value, .. } = write else { return None };
    let member = Member::from_json(value).filter(|_| key.contains("/edge/members/"))?;
    let facts: EdgeFacts = member.facts()?;
    let routed = match (facts.leader, facts.generation) {
        (Some(leader), Some(generation)) => format!("routes to {leader} (generation {})", generation.0),
        (None, None) => String::from("routes to nobody"),
        half => panic!("half a route: {half:?}"),
    };
    let trouble = facts.trouble.map_or_else(String::new, |t| format!("; trouble: {t}"));
    Some(format!("says: {}, {routed}{trouble}", member.head.state))
}
