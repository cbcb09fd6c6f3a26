//! One postgres bot in a hand-made world: a store in memory, a clock that stands still, a server that does as it is told.
//! It watches over what holds in every step: the invariants, one job at a time, no deadline that never moves, no server
//! that takes writes without a lease (S6), no data changed for nobody.

pub(crate) mod show;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bots_core::{
    dcs::{DcsAction, DcsEvent, MemoryDcs, Outcome, RequestId, Revision, Scope, Transaction, Write},
    machine::{Machine, Span, Step, Time},
    wire::{Kind, Lsn, Member, MemberHead, PostgresFacts, Timeline},
};
use postgres_bot::machine::{
    Action, AskId, CommandId, Event, Job, JobError, JobId, JobResult, Postgres, PostgresBot, ProbeId, RemoveData, Role,
    Rules, Running, Server, Settings, State, StopMode, Tags, Watchdog,
};
use serde_json::json;

/// The system identifier of the cluster in all tests.
pub(crate) const SYSTEM_ID: &str = "71";
/// So many timers may fire at one moment; more is a deadline that does not move.
const TIMERS_AT_ONCE_MAX: usize = 10;
/// The leases of the store in memory end when a test says so.
const LEASE_FOR_EVER: Span = Span::from_secs(1_000_000_000);

/// How an answer of the store goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Done and answered.
    Answered,
    /// Done; the answer is lost.
    AnswerLost,
    /// The question is lost.
    QuestionLost,
}

/// A bot and everything around it.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) now: Time,
    pub(crate) dcs: MemoryDcs,
    /// The bot has been shown the store's changes up to here.
    pub(crate) shown: Revision,
    /// The bot's questions to the store, the oldest first.
    pub(crate) asked: VecDeque<(RequestId, Transaction)>,
    pub(crate) granting: Option<Span>,
    /// A lease that takes the place of another is granted as soon as it is asked for.
    pub(crate) grants_at_once: bool,
    pub(crate) job: Option<(JobId, Job)>,
    pub(crate) probe: Option<ProbeId>,
    pub(crate) slots_asked: Option<ProbeId>,
    /// The bot's last question to the members of the failsafe key.
    pub(crate) asking: Option<AskId>,
    /// The bot waits to hear what is in the data directory.
    pub(crate) inspecting: bool,
    /// The bot waits to hear who bears its name.
    pub(crate) naming: bool,
    /// A server runs, or is being started.
    pub(crate) running: bool,
    /// That server may take writes.
    pub(crate) writable: bool,
    /// Its guard's fence, if it has one.
    fence: Option<Time>,
    /// That server runs on since before the bot's start, with a fence or without one, and was not taken over yet.
    pub(crate) kept: Option<bool>,
    /// The server is on its way up, read-only: it may be told so again with another upstream.
    coming_up: bool,
    /// The server is down but for its archiver.
    pub(crate) closed: bool,
    /// It is that of a cluster in the making, which nobody else can have a copy of.
    pub(crate) newborn: bool,
    pub(crate) exited: bool,
    /// How many commands operators have given.
    commands: u64,
    /// The lease is renewed whenever time passes.
    pub(crate) renewing: bool,
    /// Writes to the bot's own member key are done at once.
    pub(crate) shares_at_once: bool,
    /// Every edge that was taken.
    pub(crate) edges: BTreeSet<(Role, Role)>,
    /// What the bot did since somebody looked.
    pub(crate) log: Vec<String>,
    configured: BTreeMap<String, String>,
    shares: VecDeque<(RequestId, Transaction)>,
}

/// The settings of a bot called `name`.
pub(crate) fn settings(name: &str) -> Settings {
    Settings {
        scope: scope(),
        name: name.to_owned(),
        instance: format!("{name}-a"),
        version: String::from("1.0"),
        api_url: format!("http://{name}:8008/patroni"),
        conn_url: format!("postgres://{name}:5432/postgres"),
        // 2026-01-01T00:00:00Z
        epoch_unix_ms: 1_767_225_600_000,
        tags: Tags::default(),
        parameters: BTreeMap::new(),
        bootstrap_config: json!({"ttl": 5}),
        rules: Rules::default(),
        use_pg_rewind: None,
        remove_data: RemoveData::default(),
        watchdog: Watchdog::default(),
    }
}

/// The scope of all tests.
pub(crate) fn scope() -> Scope {
    Scope::new("service", "main").expect("a good scope")
}

/// A server that answers.
pub(crate) fn server(in_recovery: bool, timeline: u32, position: u64) -> Server {
    let at = Lsn(position);
    let (received, replayed) = if in_recovery { (at, at) } else { (Lsn(0), Lsn(0)) };
    Server {
        in_recovery,
        timeline: Timeline(timeline),
        position: at,
        received,
        replayed,
        streaming: false,
        ..Server::default()
    }
}

/// What another member says of itself.
pub(crate) fn member(name: &str, role: &str, state: &str, facts: PostgresFacts) -> Member {
    let head = MemberHead {
        kind: Kind::Postgres,
        state: state.to_owned(),
        role: role.to_owned(),
        version: String::from("1.0"),
        api_url: format!("http://{name}:8008/patroni"),
        instance: format!("{name}-a"),
        node: String::new(),
        since_unix_ms: 0,
    };
    Member::new(head, &PostgresFacts { conn_url: format!("postgres://{name}:5432/postgres"), ..facts })
}

impl World {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            state: State::new(settings),
            now: Time::from_millis(10_000),
            dcs: MemoryDcs::new(),
            shown: Revision(0),
            asked: VecDeque::new(),
            granting: None,
            grants_at_once: false,
            job: None,
            probe: None,
            slots_asked: None,
            asking: None,
            inspecting: false,
            naming: false,
            running: false,
            writable: false,
            kept: None,
            coming_up: false,
            closed: false,
            fence: None,
            newborn: false,
            exited: false,
            commands: 0,
            renewing: true,
            shares_at_once: true,
            edges: BTreeSet::new(),
            log: Vec::new(),
            configured: BTreeMap::new(),
            shares: VecDeque::new(),
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.state.role()
    }

    /// The end of this bot's process: a new one begins over, under its old name, on the same data and the same store.
    pub(crate) fn restart(&mut self, settings: Settings) {
        let old = std::mem::replace(self, Self::new(settings));
        self.now = old.now + Span::from_secs(1);
        (self.dcs, self.edges) = (old.dcs, old.edges);
    }

    /// The same, and the server runs on in its guard's care.
    pub(crate) fn restart_beside_server(&mut self, settings: Settings) {
        let (kept, fence) = (self.running.then_some(self.writable), self.fence);
        self.restart(settings);
        (self.running, self.kept) = (kept.is_some(), kept);
        self.fence = fence.filter(|_| kept == Some(true));
    }

    /// What runs, as an inspection shows it.
    pub(crate) const fn shown_running(&self) -> Running {
        match (self.running, self.kept) {
            (false, _) => Running::No,
            (true, Some(_)) => Running::Guarded { fence: self.fence },
            (true, None) => Running::LeftBehind { fence: None },
        }
    }

    /// Whether the server, if it runs, takes writes.
    #[allow(dead_code, reason = "of one of the two tests that share this")]
    pub(crate) fn takes_writes(&self) -> bool {
        self.writable || self.kept == Some(true)
    }

    pub(crate) fn step(&mut self, event: Event) {
        let mut from = self.role();
        let said = self.log.len();
        let Step { state, actions } = PostgresBot::step(self.state.clone(), self.now, event.clone());
        self.state = state;
        for to in self.state.passed().to_vec() {
            assert!(PostgresBot::TRANSITIONS.allows(from, to), "no edge {from} -> {to}");
            self.edges.insert((from, to));
            self.newborn &= to != Role::Primary;
            self.log.push(format!("{from} -> {to}"));
            from = to;
        }
        let broken = PostgresBot::invariants(&self.state);
        assert_eq!(broken, Ok(()), "after {event:?}\n{:#?}", self.state);
        for action in actions {
            self.perform(action);
        }
        if std::env::var_os("EXPLORE_TRACE").is_some() {
            let short: String = format!("{event:?}").chars().take(200).collect();
            eprintln!("{} {short}\n    {}", self.now, self.log[said..].join("\n    "));
        }
        self.check_writer(&event);
        while let Some((id, transaction)) = self.shares.pop_front() {
            self.settle(id, &transaction, Fate::Answered);
        }
        if self.grants_at_once && self.state.membership().lease_id().is_some() {
            self.grant();
        }
    }

    /// A server that may take writes has a lease that is not about to end, or is being stopped at once.
    fn check_writer(&self, event: &Event) {
        let stopped_at_once = matches!(&self.job, Some((_, Job::Stop { mode: StopMode::Immediate { .. } })));
        // One that was not taken over yet has its guard, which goes by the earlier life's lease.
        if !self.writable || self.newborn || stopped_at_once || self.kept.is_some() {
            return;
        }
        let (membership, leadership) = (self.state.membership(), self.state.leadership());
        let fenced_in = membership.valid_until().is_some_and(|until| self.now < until - self.state.fence_margin());
        let locked = leadership.fence(self.now, membership).is_some();
        assert!(
            !self.exited && (fenced_in && locked || self.state.is_vouched_for(self.now)),
            "a writer without a good lease after {event:?}\n{:#?}",
            self.state
        );
    }

    /// What a job may do under the circumstances in which it was asked for.
    fn check_job(&self, job: &Job) {
        let me = &self.state.settings().name;
        let leader = self.state.view().value(&scope().leader());
        let led_by_another = self.state.view().is_watched() && leader.is_some_and(|leader| leader != me);
        match job {
            Job::SetAside { .. } | Job::Rewind { .. } | Job::Clone { .. } => {
                assert!(
                    led_by_another && !self.running,
                    "{job:?} with a server or without a leader\n{:#?}",
                    self.state
                );
            }
            Job::DiscardUnfinished { .. } | Job::Initialize => {
                assert!(!self.running, "{job:?} with a server\n{:#?}", self.state);
            }
            Job::StartPrimary | Job::StartStandby { .. } => {
                let as_it_was = self.kept == Some(*job == Job::StartPrimary);
                let redirected = self.coming_up && *job != Job::StartPrimary;
                assert!(!self.running || as_it_was || redirected, "{job:?} with a server\n{:#?}", self.state);
            }
            Job::CreateRoles
            | Job::Complete
            | Job::Follow { .. }
            | Job::Promote { .. }
            | Job::Checkpoint
            | Job::Drain
            | Job::Stop { .. } => {}
        }
    }

    fn perform(&mut self, action: Action) {
        assert!(!self.exited, "after its end, the bot asks for {action:?}");
        let shown = show::action(&action, self);
        match action {
            Action::Dcs(DcsAction::Transact { id, transaction })
                if self.shares_at_once && self.is_share(&transaction) =>
            {
                self.log.push(show::share(&transaction));
                self.shares.push_back((id, transaction));
                return;
            }
            Action::Dcs(DcsAction::Transact { id, transaction }) => self.asked.push_back((id, transaction)),
            Action::Dcs(DcsAction::GrantLease { ttl }) => {
                assert_eq!(self.granting.replace(ttl), None, "a lease is asked for twice");
            }
            // Leases here are renewed by the tests.
            Action::Dcs(DcsAction::PaceLease { .. }) => {}
            Action::Dcs(DcsAction::RevokeLease { lease }) => {
                self.dcs.revoke(lease);
            }
            Action::Run { id, job } => {
                assert!(self.job.is_none(), "{job:?} is started while {:?} runs", self.job);
                self.check_job(&job);
                if matches!(job, Job::StartPrimary | Job::StartStandby { .. }) {
                    (self.running, self.kept) = (true, None);
                    self.coming_up = job != Job::StartPrimary;
                }
                self.newborn |= job == Job::StartPrimary && self.role() == Role::Bootstrapping;
                self.writable |= matches!(job, Job::StartPrimary | Job::Promote { .. });
                self.job = Some((id, job));
            }
            Action::Cancel { id } => {
                assert!(
                    self.job.take().is_some_and(|(running, _)| running == id),
                    "a job is given up that does not run"
                );
            }
            Action::ProbePeers { id, .. } => self.probe = Some(id),
            Action::AskMembers { id, .. } => self.asking = Some(id),
            Action::AnswerMember { .. } => {}
            Action::Configure { parameters, rules: _ } => self.configured = parameters,
            Action::Exit { .. } => {
                self.exited = true;
                // In its guard's care, if it was not stopped.
                self.kept = self.running.then_some(self.writable);
            }
            Action::InspectData => self.inspecting = true,
            Action::ProbeName { .. } => self.naming = true,
            Action::SetFence { at, watchdog } => {
                if let Some(order) = watchdog {
                    assert!(order.until > at, "the device acts at {}, before the guard", order.until);
                }
                let until = self.state.membership().valid_until();
                let leased = until.is_some_and(|until| at < until);
                assert!(
                    leased || self.closed || self.state.is_vouched_for(self.now),
                    "a fence at {at} behind the lease's end {until:?}"
                );
                // Moved on with the lease: no news.
                if self.fence.replace(at).is_some() {
                    return;
                }
            }
            Action::Observe | Action::ChangeSlots { .. } => {}
            Action::LookAtSlots { id, .. } => self.slots_asked = Some(id),
        }
        self.log.push(shown);
    }

    fn is_share(&self, transaction: &Transaction) -> bool {
        let mine = scope().member(&self.state.settings().name);
        transaction.then.iter().all(|write| matches!(write, Write::Put { key, .. } if *key == mine))
    }

    /// Answers the oldest open question. Says how, if the store answered.
    pub(crate) fn answer(&mut self, fate: Fate) -> Option<Outcome> {
        let (id, transaction) = self.asked.pop_front()?;
        Some(self.settle(id, &transaction, fate))
    }

    fn settle(&mut self, id: RequestId, transaction: &Transaction, fate: Fate) -> Outcome {
        let unknown = || Outcome::Unknown(String::from("deadline exceeded"));
        let outcome = match fate {
            Fate::Answered => self.dcs.transact(self.now, transaction),
            Fate::AnswerLost => {
                self.dcs.transact(self.now, transaction);
                unknown()
            }
            Fate::QuestionLost => unknown(),
        };
        self.step(Event::Dcs(DcsEvent::Answered { id, outcome: outcome.clone() }));
        outcome
    }

    /// Shows the bot what changed in the store.
    pub(crate) fn watch(&mut self) {
        if !self.state.view().is_watched() || self.dcs.revision() == self.shown {
            return;
        }
        let prefix = scope().prefix();
        let changes = self.dcs.changes_after(&prefix, self.shown).expect("nothing is compacted here");
        self.shown = self.dcs.revision();
        self.step(Event::Dcs(DcsEvent::Changed { prefix, revision: self.shown, changes }));
    }

    pub(crate) fn list(&mut self) {
        let prefix = scope().prefix();
        let (revision, entries) = self.dcs.list(&prefix);
        self.shown = revision;
        self.step(Event::Dcs(DcsEvent::Listed { prefix, revision, entries }));
    }

    pub(crate) fn break_watch(&mut self) {
        let why = String::from("connection refused");
        self.step(Event::Dcs(DcsEvent::WatchLost { prefix: scope().prefix(), why }));
    }

    /// Somebody else writes.
    pub(crate) fn put(&mut self, key: &str, value: &str) {
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::put(scope().key(key), value)]));
    }

    /// The same, under a lease of its own.
    pub(crate) fn put_leased(&mut self, key: &str, value: &str) {
        let lease = self.dcs.grant(self.now, LEASE_FOR_EVER);
        let write = Write::put_leased(scope().key(key), value, lease);
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![write]));
    }

    /// Another member promises to receive nothing from the present leader in its present term, if there is one.
    pub(crate) fn put_promise(&mut self, of: &str) {
        if let Some(lock) = self.dcs.get(&scope().leader()) {
            let term = json!({"created": lock.created, "modified": lock.modified});
            self.put_leased(&format!("promises/{of}"), &term.to_string());
        }
    }

    pub(crate) fn delete(&mut self, key: &str) {
        self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::delete(scope().key(key))]));
    }

    pub(crate) fn grant(&mut self) {
        if let Some(ttl) = self.granting.take() {
            let lease = self.dcs.grant(self.now, LEASE_FOR_EVER);
            let valid_until = self.now + ttl;
            self.step(Event::Dcs(DcsEvent::LeaseGranted { lease, valid_until }));
        }
    }

    pub(crate) fn renew(&mut self) {
        if let Some(lease) = self.state.membership().lease_id() {
            if !self.dcs.lease_lives(lease) {
                return self.tell_lease_lost();
            }
            let valid_until = self.now + self.state.membership().lease_ttl();
            self.step(Event::Dcs(DcsEvent::LeaseRenewed { lease, valid_until }));
        }
    }

    /// The store drops the lease; the bot hears of it only by [`World::tell_lease_lost`].
    pub(crate) fn expire(&mut self) {
        if let Some(lease) = self.state.membership().lease_id() {
            self.dcs.revoke(lease);
        }
    }

    pub(crate) fn tell_lease_lost(&mut self) {
        self.expire();
        if let Some(lease) = self.state.membership().lease_id() {
            self.step(Event::Dcs(DcsEvent::LeaseLost { lease, why: String::from("it has expired") }));
        }
    }

    /// Whether the running job can come to a good end: some need a server that runs.
    pub(crate) fn may_end_well(&self) -> bool {
        self.job.as_ref().is_none_or(|(_, job)| match job {
            Job::StartPrimary
            | Job::StartStandby { .. }
            | Job::CreateRoles
            | Job::Follow { .. }
            | Job::Promote { .. }
            | Job::Checkpoint
            | Job::Drain => self.running,
            Job::Initialize
            | Job::Complete
            | Job::DiscardUnfinished { .. }
            | Job::SetAside { .. }
            | Job::Clone { .. }
            | Job::Stop { .. }
            | Job::Rewind { .. } => true,
        })
    }

    /// The running job comes to a good end, with the server on `timeline` at `position`.
    pub(crate) fn job_done(&mut self, timeline: u32, position: u64, clean: bool) {
        let Some((id, job)) = self.job.take() else { return };
        self.note_end(&job, true);
        let result = match job {
            Job::Initialize => JobResult::Initialized { system_id: SYSTEM_ID.to_owned() },
            Job::StartPrimary => JobResult::Started(server(false, timeline, position)),
            Job::StartStandby { .. } => JobResult::Started(server(true, timeline, position)),
            Job::Promote { timeline: Timeline(to), .. } => {
                // Timelines are counted only as far as they matter here: each comes from the one before.
                let ancestry = vec![(Timeline(to.saturating_sub(1)), Lsn(position))];
                JobResult::Promoted { server: server(false, to, position), ancestry }
            }
            Job::Stop { .. } => JobResult::Stopped { shutdown_checkpoint: clean.then_some(Lsn(position)) },
            Job::CreateRoles
            | Job::Complete
            | Job::DiscardUnfinished { .. }
            | Job::SetAside { .. }
            | Job::Clone { .. }
            | Job::Follow { .. }
            | Job::Checkpoint
            | Job::Drain
            | Job::Rewind { .. } => JobResult::Done,
        };
        self.step(Event::JobEnded { id, result: Ok(result) });
    }

    pub(crate) fn job_failed(&mut self, why: &str) {
        if let Some((id, job)) = self.job.take() {
            self.note_end(&job, false);
            self.step(Event::JobEnded {
                id,
                result: Err(JobError { why: why.to_owned(), elsewhere: why.starts_with("the source failed") }),
            });
        }
    }

    fn note_end(&mut self, job: &Job, good: bool) {
        let starts = matches!(job, Job::StartPrimary | Job::StartStandby { .. });
        self.coming_up &= !starts;
        let stops = matches!(job, Job::Stop { .. });
        if starts && !good || stops && good {
            self.server_ends();
        }
    }

    const fn server_ends(&mut self) {
        (self.running, self.writable, self.newborn, self.kept, self.fence) = (false, false, false, None, None);
        (self.coming_up, self.closed) = (false, false);
    }

    /// Every process of the server is gone.
    pub(crate) fn server_exits(&mut self, how: &str) {
        self.server_ends();
        self.step(Event::PostgresExited { how: how.to_owned() });
    }

    /// Whether all that is left of a primary may be its archiver.
    pub(crate) const fn may_close(&self) -> bool {
        self.running && self.writable && matches!(self.job, Some((_, Job::Stop { mode: StopMode::Fast })))
    }

    /// All that is left of a primary is its archiver.
    pub(crate) fn server_closes(&mut self, position: u64) {
        (self.writable, self.closed) = (false, true);
        self.step(Event::PostgresClosed { shutdown_checkpoint: Lsn(position) });
    }

    pub(crate) fn observe(&mut self, postgres: Postgres) {
        if postgres == Postgres::Down {
            self.server_ends();
        }
        self.step(Event::PostgresObserved(postgres));
    }

    /// Lets time pass, and every timer fire that falls into it.
    pub(crate) fn pass(&mut self, span: Span) {
        let until = self.now + span;
        let mut fired_now = 0;
        while !self.exited {
            let due = PostgresBot::deadline(&self.state).map(|d| d.at.max(self.now)).filter(|at| *at <= until);
            let Some(at) = due else { break };
            fired_now = if at == self.now { fired_now + 1 } else { 0 };
            let next = PostgresBot::deadline(&self.state);
            assert!(fired_now <= TIMERS_AT_ONCE_MAX, "a deadline that does not move: {next:?}\n{:#?}", self.state);
            self.now = at;
            self.renew_if_wanted();
            self.step(Event::TimerFired);
        }
        self.now = until;
        self.renew_if_wanted();
    }

    fn renew_if_wanted(&mut self) {
        if self.renewing && !self.exited {
            self.renew();
        }
    }

    /// The number of the next command.
    pub(crate) fn next_command(&mut self) -> CommandId {
        self.commands += 1;
        CommandId(self.commands)
    }

    /// The settings that the shell was told last.
    pub(crate) fn configured(&self) -> &BTreeMap<String, String> {
        &self.configured
    }
}
