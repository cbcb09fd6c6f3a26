//! A small fleet: two or three real machines, the model of etcd, servers that behave as theirs do, and what may happen next.
//!
//! Time stands still while anybody has anything to do, and then jumps to the next deadline: of a machine, a guard or a lease.
//! What comes in which order, and where a fault strikes, is for the search to choose.

use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use bots_core::{
    dcs::{LeaseId, MemoryDcs, RequestId, Revision, Scope, Transaction},
    machine::{Machine, Span, Time},
};
use postgres_bot::machine::{
    Ask, AskId, AskedId, Job, JobId, Postgres, PostgresBot, ProbeId, RemoveData, Rules, Settings, State, Tags, Watchdog,
};
use serde_json::json;

use crate::{
    fingerprint::{Grain, Parsed, fingerprint},
    plant::Plant,
    server::{Process, Server},
};

/// The leases of the store in memory end when the fleet says so.
const LEASE_FOR_EVER: Span = Span::from_secs(1_000_000_000);

/// Nobody here counts from the past for longer than a lease or a promise. Two states that differ by less than a step in when things are
/// due are taken for one: that a search comes to its end is worth more than trying each by itself.
const GRAIN: Grain = Grain { age_step: 500, age_max: 5_500, due_step: 500 };

/// What a fleet is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) members: usize,
    pub(crate) synchronous: &'static str,
    pub(crate) takeover: bool,
    pub(crate) failsafe: bool,
    pub(crate) plant: Option<Plant>,
}

/// What may go wrong yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Bots that are killed, servers that crash, machines that lose power.
    pub(crate) crashes: u32,
    /// Questions to etcd, or answers, that are lost.
    pub(crate) lost: u32,
    /// Members that are cut from etcd until their lease is gone.
    pub(crate) cuts: u32,
    /// Clients' writes.
    pub(crate) writes: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) ttl: Span,
    pub(crate) expires: Time,
}

/// A member: its bot, what that waits for, and its server.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) name: String,
    /// Nothing while the bot does not run.
    pub(crate) state: Option<State>,
    pub(crate) lives: u32,
    /// It cannot reach etcd.
    pub(crate) cut: bool,
    pub(crate) asked: VecDeque<(RequestId, Transaction)>,
    pub(crate) granting: Option<Span>,
    /// It was shown etcd's changes up to here.
    pub(crate) shown: Revision,
    pub(crate) naming: bool,
    pub(crate) inspecting: bool,
    pub(crate) observing: bool,
    pub(crate) told: Postgres,
    pub(crate) job: Option<(JobId, Job)>,
    pub(crate) probe: Option<(ProbeId, Vec<String>)>,
    pub(crate) asking: VecDeque<(AskId, Ask, String)>,
    /// What it has answered to the last question of another.
    pub(crate) said: Option<(AskedId, Result<(), String>)>,
    pub(crate) server: Server,
}

#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    pub(crate) options: Options,
    pub(crate) budget: Budget,
    pub(crate) now: Time,
    pub(crate) dcs: Rc<MemoryDcs>,
    pub(crate) leases: BTreeMap<LeaseId, Lease>,
    pub(crate) members: Vec<Rc<Member>>,
    /// The members in words, as far as they have not changed since.
    parsed: Vec<Option<Rc<Parsed>>>,
    /// Clients' writes that were acknowledged.
    pub(crate) acknowledged: Vec<u32>,
    pub(crate) written: u32,
    /// How many clusters were begun.
    pub(crate) clusters: u32,
    /// The identifier that the cluster was given first.
    pub(crate) identifier: Option<String>,
    /// Whoever makes the next step dies after so many of its actions.
    pub(crate) dies_after: Option<usize>,
    /// So many actions the first step of the last move asked for, if it made one.
    pub(crate) actions: Option<usize>,
}

/// A move, after so many actions of which the bot that makes a step because of it dies.
pub(crate) type Way = (Move, Option<usize>);

/// Something that may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move {
    /// A member's own machine tells its bot something.
    Local(usize),
    EndJob(usize),
    /// etcd carries out a member's oldest question, and answers.
    Answer(usize),
    Watch(usize),
    Probe(usize),
    AskMember(usize),
    /// A standby receives what its upstream has.
    Stream(usize),
    /// Nobody has anything to do: time jumps to the next deadline.
    Wait,
    Start(usize),
    Mend(usize),
    Write(usize),
    KillBot(usize),
    /// A bot is killed, and what it had just begun comes to nothing.
    KillBotAndJob(usize),
    CrashServer(usize),
    LosePower(usize),
    LoseQuestion(usize),
    LoseAnswer(usize),
    Cut(usize),
    /// Nobody can reach etcd, in fleets that can do without it for a while.
    Outage,
}

pub(crate) fn scope() -> Scope {
    Scope::new("service", "main").expect("a good scope")
}

fn settings(name: &str, lives: u32, options: Options) -> Settings {
    Settings {
        scope: scope(),
        name: name.to_owned(),
        instance: format!("{name}-{lives}"),
        version: String::from("1.0"),
        api_url: format!("http://{name}:8008/patroni"),
        conn_url: format!("postgres://{name}:5432/postgres"),
        epoch_unix_ms: 1_767_225_600_000,
        tags: Tags::default(),
        parameters: BTreeMap::new(),
        bootstrap_config: json!({
            "ttl": 5,
            "maximum_lag_on_failover": 0,
            "synchronous_mode": options.synchronous,
            "takeover": options.takeover,
            "failsafe_mode": options.failsafe,
        }),
        rules: Rules::default(),
        use_pg_rewind: None,
        remove_data: RemoveData::default(),
        watchdog: Watchdog::default(),
    }
}

impl Member {
    fn new(name: String) -> Self {
        Self {
            name,
            state: None,
            lives: 0,
            cut: false,
            asked: VecDeque::new(),
            granting: None,
            shown: Revision(0),
            naming: false,
            inspecting: false,
            observing: false,
            told: Postgres::Down,
            job: None,
            probe: None,
            asking: VecDeque::new(),
            said: None,
            server: Server::new(),
        }
    }

    /// The bot is gone, and all that it waited for.
    pub(crate) fn bot_ends(&mut self) {
        let fresh = Self::new(self.name.clone());
        let old = std::mem::replace(self, fresh);
        (self.lives, self.cut, self.server) = (old.lives, old.cut, old.server);
        self.server.unheard = false;
    }

    fn starts(&mut self, options: Options) {
        self.lives += 1;
        self.state = Some(State::new(settings(&self.name, self.lives, options)));
    }

    /// A deadline of the bot that has come.
    pub(crate) fn is_due(&self, now: Time) -> bool {
        self.state.as_ref().and_then(PostgresBot::deadline).is_some_and(|deadline| deadline.at <= now)
    }

    pub(crate) fn lease(&self) -> Option<LeaseId> {
        self.state.as_ref().and_then(|state| state.membership().lease_id())
    }
}

impl Fleet {
    /// Machines that have just been installed.
    pub(crate) fn new(options: Options, budget: Budget) -> Self {
        let members = (1..=options.members).map(|n| {
            let mut member = Member::new(format!("pg{n}"));
            member.starts(options);
            Rc::new(member)
        });
        Self {
            options,
            budget,
            now: Time::from_millis(10_000),
            dcs: Rc::new(MemoryDcs::new()),
            leases: BTreeMap::new(),
            members: members.collect(),
            parsed: vec![None; options.members],
            acknowledged: Vec::new(),
            written: 0,
            clusters: 0,
            identifier: None,
            dies_after: None,
            actions: None,
        }
    }

    pub(crate) fn member(&mut self, at: usize) -> &mut Member {
        self.parsed[at] = None;
        Rc::make_mut(&mut self.members[at])
    }

    pub(crate) fn named(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| member.name == name)
    }

    /// What may happen now, before time passes. What a machine tells its own bot changes nothing for others: it comes first, in one order.
    /// What is asked of etcd is answered in every order; of all else, what one member has to do comes before what the next one has, for
    /// it is to that one whether it sees it now or later.
    fn due(&self) -> Vec<Move> {
        let all = 0..self.members.len();
        if let Some(at) = all.clone().find(|at| self.has_local(*at)) {
            return vec![Move::Local(at)];
        }
        let mut moves: Vec<Move> =
            all.clone().filter(|at| !self.members[*at].asked.is_empty()).map(Move::Answer).collect();
        let answers = moves.len();
        for at in all {
            if moves.len() > answers {
                break;
            }
            let member = &self.members[at];
            let wanted = [
                (member.job.is_some(), Move::EndJob(at)),
                (member.state.is_some() && !member.cut && member.shown < self.dcs.revision(), Move::Watch(at)),
                (member.probe.is_some(), Move::Probe(at)),
                (!member.asking.is_empty(), Move::AskMember(at)),
                (self.lags(at), Move::Stream(at)),
            ];
            moves.extend(wanted.into_iter().filter(|(is_due, _)| *is_due).map(|(_, a_move)| a_move));
        }
        if moves.is_empty() && self.next_moment().is_some() {
            moves.push(Move::Wait);
        }
        moves
    }

    /// Everything that may happen next. What a machine tells its own bot comes before any fault but the bot's death at it.
    pub(crate) fn moves(&self) -> Vec<Move> {
        let mut moves = self.due();
        if !matches!(moves[..], [Move::Local(_)]) {
            let rests = matches!(moves[..], [] | [Move::Wait]);
            moves.extend(self.faults(rests));
        }
        moves
    }

    /// What goes wrong, and what is mended: bots are started and ways to etcd cut and mended while nobody has anything else to do, which
    /// spares the search orders that make no difference.
    fn faults(&self, rests: bool) -> Vec<Move> {
        let mut moves = Vec::new();
        let Budget { crashes, lost, cuts, writes } = self.budget;
        for (at, member) in self.members.iter().enumerate() {
            let (runs, up) = (member.state.is_some(), member.server.process != Process::Down);
            let lease_gone = member.lease().is_none_or(|lease| !self.leases.contains_key(&lease));
            let asks = !member.asked.is_empty() && !member.cut;
            let wanted = [
                (!runs && rests, Move::Start(at)),
                (member.cut && lease_gone && rests, Move::Mend(at)),
                (writes > 0 && member.server.process == Process::Primary, Move::Write(at)),
                (crashes > 0 && runs, Move::KillBot(at)),
                (crashes > 0 && member.job.is_some(), Move::KillBotAndJob(at)),
                (crashes > 0 && up, Move::CrashServer(at)),
                (crashes > 0 && runs, Move::LosePower(at)),
                (lost > 0 && asks, Move::LoseQuestion(at)),
                (lost > 0 && asks, Move::LoseAnswer(at)),
                (cuts > 0 && runs && !member.cut && rests, Move::Cut(at)),
            ];
            moves.extend(wanted.into_iter().filter(|(may_be, _)| *may_be).map(|(_, a_move)| a_move));
        }
        if cuts > 0 && rests && self.options.failsafe && self.members.iter().all(|member| !member.cut) {
            moves.push(Move::Outage);
        }
        moves
    }

    /// What happens if nothing goes wrong.
    pub(crate) fn next_due(&self) -> Option<Move> {
        self.due().first().copied()
    }

    /// Makes a move. The bot that makes a step because of it dies after so many of its actions, if it shall.
    ///
    /// # Errors
    /// What is broken by it.
    pub(crate) fn make(&mut self, (a_move, dies_after): Way) -> Result<(), String> {
        (self.dies_after, self.actions) = (dies_after, None);
        match a_move {
            Move::Local(at) => self.local(at)?,
            Move::EndJob(at) => self.end_job(at)?,
            Move::Answer(at) => self.answer(at, true, true)?,
            Move::LoseAnswer(at) => {
                self.budget.lost -= 1;
                self.answer(at, true, false)?;
            }
            Move::LoseQuestion(at) => {
                self.budget.lost -= 1;
                self.answer(at, false, false)?;
            }
            Move::Watch(at) => self.watch(at)?,
            Move::Probe(at) => self.probe(at)?,
            Move::AskMember(at) => self.ask_member(at)?,
            Move::Stream(at) => self.stream(at),
            Move::Wait => self.wait()?,
            Move::Start(at) => {
                let options = self.options;
                self.member(at).starts(options);
            }
            Move::Mend(at) => self.member(at).cut = false,
            Move::Cut(at) => {
                self.budget.cuts -= 1;
                self.member(at).cut = true;
            }
            Move::Outage => {
                self.budget.cuts -= 1;
                (0..self.members.len()).for_each(|at| self.member(at).cut = true);
            }
            Move::Write(at) => self.write(at),
            Move::KillBot(at) => {
                self.budget.crashes -= 1;
                self.kill_bot(at, true)?;
            }
            Move::KillBotAndJob(at) => {
                self.budget.crashes -= 1;
                self.kill_bot(at, false)?;
            }
            Move::CrashServer(at) => {
                self.budget.crashes -= 1;
                self.server_ends(at);
            }
            Move::LosePower(at) => {
                self.budget.crashes -= 1;
                let member = self.member(at);
                member.server.ends();
                member.bot_ends();
            }
        }
        let identifier = self.dcs.get(&scope().initialize()).map(|kv| kv.value.clone());
        if self.identifier.is_none() {
            self.identifier = identifier.filter(|id| !id.is_empty());
        }
        self.forget_history();
        self.check_state()
    }

    /// The next moment at which anything happens by itself.
    fn next_moment(&self) -> Option<Time> {
        let bots = self.members.iter().filter_map(|member| member.state.as_ref());
        let deadlines = bots.filter_map(PostgresBot::deadline).map(|deadline| deadline.at);
        let fences = self.members.iter().filter_map(|member| member.server.fence);
        // A lease that is renewed is renewed when half of it is over at the latest.
        let renewed: Vec<LeaseId> = self.members.iter().filter(|m| !m.cut).filter_map(|m| m.lease()).collect();
        let leases = self.leases.iter().map(|(id, lease)| {
            if renewed.contains(id) { lease.expires - lease.ttl.divided_by(2) } else { lease.expires }
        });
        deadlines.chain(fences).chain(leases).filter(|at| *at > self.now).min()
    }

    /// Time jumps there.
    fn wait(&mut self) -> Result<(), String> {
        self.now = self.next_moment().unwrap_or(self.now);
        self.renew()?;
        self.expire();
        for at in 0..self.members.len() {
            let fenced = self.members[at].server.fence.is_some_and(|fence| fence <= self.now);
            if fenced && self.options.plant != Some(Plant::GuardSleeps) {
                self.server_ends(at);
            }
        }
        Ok(())
    }

    fn expire(&mut self) {
        let gone: Vec<LeaseId> =
            self.leases.iter().filter(|(_, lease)| lease.expires <= self.now).map(|(id, _)| *id).collect();
        for lease in gone {
            self.revoke(lease);
        }
    }

    pub(crate) fn grant(&mut self, ttl: Span) -> LeaseId {
        let lease = Rc::make_mut(&mut self.dcs).grant(self.now, LEASE_FOR_EVER);
        self.leases.insert(lease, Lease { ttl, expires: self.now + ttl });
        lease
    }

    pub(crate) fn revoke(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        Rc::make_mut(&mut self.dcs).revoke(lease);
    }

    /// What everybody has been shown is forgotten.
    fn forget_history(&mut self) {
        let shown = self.members.iter().filter(|member| member.state.is_some()).map(|member| member.shown).min();
        let dcs = Rc::make_mut(&mut self.dcs);
        dcs.compact(shown.unwrap_or(dcs.revision()));
    }

    /// Two states with one fingerprint are one.
    pub(crate) fn fingerprint(&mut self) -> u64 {
        for at in 0..self.members.len() {
            if self.parsed[at].is_none() {
                self.parsed[at] = Some(Rc::new(Parsed::new(&format!("{:?}", self.members[at]))));
            }
        }
        let shown: Vec<bool> = self.members.iter().map(|member| member.shown == self.dcs.revision()).collect();
        let rest = Parsed::new(&format!(
            "{:?} {:?} {shown:?} {:?} {} {:?} {:?}",
            self.budget,
            self.leases,
            self.acknowledged,
            self.written,
            self.identifier,
            self.dcs.list("/")
        ));
        let members = self.parsed.iter().flatten().map(Rc::as_ref);
        let parts: Vec<&Parsed> = members.chain([&rest]).collect();
        fingerprint(&parts, self.now.as_millis(), GRAIN)
    }
}
