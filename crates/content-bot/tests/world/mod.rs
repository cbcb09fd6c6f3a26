//! A small world for content machines: etcd in memory, time that stands still until it is moved, and an origin, mirrors
//! and web bots that do what the test says. Shared by the transcripts and the exploration.

#![allow(dead_code, unreachable_pub, reason = "each test uses its own part")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bots_core::{
    dcs::{Change, DcsAction, DcsEvent, LeaseId, MemoryDcs, Outcome, Revision, Scope, Transaction, Write},
    machine::{Machine, Report, Span, Time},
    wire::{Canary, ContentRevision, Kind, Member, MemberHead, WebFacts},
};
use content_bot::machine::{
    Action, CanarySettings, Commit, ContentMachine, Event, ExportSettings, FetchResult, JobId, PollResult,
    PurgeSettings, Reference, Role, Settings, State,
};

pub const TTL: Span = Span::from_secs(5);
pub const PREPARE_TIMEOUT: Span = Span::from_secs(10);

/// Long work that a bot has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    Poll,
    Fetch(String),
    Read(String),
    Purge,
    Export(String),
    Tell,
}

/// What becomes of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Answered,
    /// Made, but the answer is lost.
    AnswerLost,
    /// Neither made nor answered.
    Lost,
}

pub struct Bot {
    pub state: State,
    pub inbox: VecDeque<Event>,
    pub jobs: BTreeMap<JobId, Job>,
    pub cut: bool,
    pub exited: Option<u8>,
    /// What lies on its disk.
    pub disk: Vec<Commit>,
    lease: Option<LeaseId>,
    grant: Option<Span>,
    renew_at: Time,
    cursors: BTreeMap<String, Option<Revision>>,
}

/// When a leader that hears nothing of its origin is not ready any more.
const STALE_AFTER: Span = Span::from_secs(30);

pub struct World {
    pub now: Time,
    pub dcs: MemoryDcs,
    pub bots: BTreeMap<String, Bot>,
    pub edges: BTreeSet<(Role, Role)>,
    pub log: Vec<String>,
    pub fate: Fate,
    /// For bots that start from now on.
    pub canary: Option<CanarySettings>,
    pub purge: Option<PurgeSettings>,
    pub export: Option<ExportSettings>,
    /// The instance that answers when a name is probed.
    pub namesake: Option<String>,
    instances: u64,
}

pub fn site() -> Scope {
    Scope::new("service", "site").expect("valid")
}

pub fn web() -> Scope {
    Scope::new("service", "web").expect("valid")
}

/// The commit that a letter stands for.
pub fn sha(letter: &str) -> String {
    letter.repeat(40 / letter.len())
}

/// Text with commits written as letters again.
pub fn brief(text: &str) -> String {
    ('a'..='f').fold(text.to_owned(), |text, c| {
        let letter = c.to_string();
        text.replace(&letter.repeat(40), &format!("<{c}>")).replace(&letter.repeat(8), &format!("<{c}>"))
    })
}

impl World {
    pub fn new() -> Self {
        Self {
            now: Time::from_millis(1_000),
            dcs: MemoryDcs::new(),
            bots: BTreeMap::new(),
            edges: BTreeSet::new(),
            log: Vec::new(),
            fate: Fate::Answered,
            canary: None,
            purge: None,
            export: None,
            namesake: None,
            instances: 0,
        }
    }

    /// Starts a bot whose disk holds `disk`.
    pub fn start(&mut self, name: &str, reference: &str, disk: Vec<Commit>) {
        self.instances += 1;
        let settings = Settings {
            scope: site(),
            web_scopes: BTreeSet::from([web()]),
            name: name.to_owned(),
            instance: format!("instance-{}", self.instances),
            version: String::from("0.1.0"),
            api_url: format!("http://{name}/status"),
            pack_url: format!("http://{name}"),
            origin: String::from("https://git.example/site.git"),
            reference: Reference::parse(reference),
            ttl: TTL,
            poll_interval: Span::from_secs(10),
            prepare_timeout: PREPARE_TIMEOUT,
            stale_after: Some(STALE_AFTER),
            pushes_expected: true,
            canary: self.canary,
            purge: self.purge,
            export: self.export,
        };
        let cursors = State::prefixes(&settings).into_iter().map(|p| (p, None)).collect();
        let bot = Bot {
            state: State::new(settings, disk.clone(), 1_700_000_000_000),
            inbox: VecDeque::new(),
            jobs: BTreeMap::new(),
            cut: false,
            exited: None,
            disk,
            lease: None,
            grant: None,
            renew_at: Time::ZERO,
            cursors,
        };
        self.bots.insert(name.to_owned(), bot);
    }

    pub fn bot(&mut self, name: &str) -> &mut Bot {
        self.bots.get_mut(name).unwrap_or_else(|| panic!("no bot {name}"))
    }

    pub fn names(&self) -> Vec<String> {
        self.bots.keys().cloned().collect()
    }

    /// One step of one bot, checked, with its actions performed.
    pub fn step(&mut self, name: &str, event: Event) {
        let now = self.now;
        let bot = self.bot(name);
        if bot.exited.is_some() {
            return;
        }
        let before = bot.state.clone();
        let from = before.role();
        let step = ContentMachine::step(before.clone(), now, event.clone());
        let again = ContentMachine::step(before, now, event);
        assert_eq!(step, again, "the same step twice gives the same result");
        bot.state = step.state;
        let to = bot.state.role();
        ContentMachine::invariants(&bot.state).unwrap_or_else(|broken| panic!("{name} at {now}: {broken}"));
        let _report = ContentMachine::report(&bot.state, now);
        if from != to {
            ContentMachine::TRANSITIONS.assert_allows(from, to);
            self.edges.insert((from, to));
            self.log.push(format!("{name}: {from} -> {to}"));
        }
        for action in step.actions {
            self.perform(name, action);
        }
    }

    fn perform(&mut self, name: &str, action: Action) {
        match action {
            Action::Dcs(DcsAction::GrantLease { ttl }) => self.bot(name).grant = Some(ttl),
            // Leases here are renewed by the tests.
            Action::Dcs(DcsAction::PaceLease { .. }) => {}
            Action::Dcs(DcsAction::RevokeLease { lease }) => {
                if !self.bot(name).cut {
                    self.dcs.revoke(lease);
                }
                self.bot(name).lease = None;
            }
            Action::Dcs(DcsAction::Transact { id, transaction }) => {
                let outcome = self.transact(name, &transaction);
                self.bot(name).inbox.push_back(Event::Dcs(DcsEvent::Answered { id, outcome }));
            }
            Action::ProbeName { api_url } => {
                self.log.push(format!("{name} > probe {api_url}"));
                let instance = self.namesake.clone();
                self.bot(name).inbox.push_back(Event::NameProbed { instance });
            }
            Action::PollOrigin { job } => {
                self.log.push(format!("{name} > look at the origin"));
                self.bot(name).jobs.insert(job, Job::Poll);
            }
            Action::FetchCommit { job, sha } => {
                self.log.push(format!("{name} > fetch {sha}"));
                self.bot(name).jobs.insert(job, Job::Fetch(sha));
            }
            Action::ForgetCommit { sha } => {
                self.log.push(format!("{name} > forget {sha}"));
                self.bot(name).disk.retain(|c| c.sha != sha);
            }
            Action::ReadCanary { job, url, sha } => {
                self.log.push(format!("{name} > read {url} for {sha}"));
                self.bot(name).jobs.insert(job, Job::Read(sha));
            }
            Action::PurgeCaches { job, sha } => {
                self.log.push(format!("{name} > purge for {sha}"));
                self.bot(name).jobs.insert(job, Job::Purge);
            }
            Action::ExportTree { job, sha } => {
                self.log.push(format!("{name} > export {sha}"));
                self.bot(name).jobs.insert(job, Job::Export(sha));
            }
            Action::TellOfTree { job, sha } => {
                self.log.push(format!("{name} > tell of {sha}"));
                self.bot(name).jobs.insert(job, Job::Tell);
            }
            Action::RemoveTree { sha } => self.log.push(format!("{name} > remove the tree {sha}")),
            Action::Exit { code, message } => {
                self.log.push(format!("{name} > exit {code}: {message}"));
                self.bot(name).exited = Some(code);
            }
        }
    }

    fn transact(&mut self, name: &str, transaction: &Transaction) -> Outcome {
        let fate = if self.bot(name).cut { Fate::Lost } else { self.fate };
        let outcome = match fate {
            Fate::Answered => self.dcs.transact(self.now, transaction),
            Fate::AnswerLost => {
                let _made = self.dcs.transact(self.now, transaction);
                Outcome::Unknown(String::from("no answer"))
            }
            Fate::Lost => Outcome::Unknown(String::from("no answer")),
        };
        let publishes = transaction.then.iter().any(|w| write_key(w).contains("/revision/"));
        if publishes && matches!(outcome, Outcome::Done(_)) {
            let holder = self.dcs.get(&site().leader()).map(|kv| kv.value.as_str());
            assert_eq!(holder, Some(name), "only the holder of the lock changes the publication");
        }
        let writes: Vec<String> = transaction.then.iter().filter_map(write_line).collect();
        if !writes.is_empty() {
            let ending = match &outcome {
                Outcome::Done(_) => "",
                Outcome::Refused { .. } => " (refused)",
                Outcome::Unknown(_) => " (no answer)",
            };
            self.log.push(format!("{name} > {}{ending}", writes.join(", ")));
        }
        outcome
    }

    /// Hands a bot the next thing that waits for it; `false` if nothing does.
    pub fn deliver(&mut self, name: &str) -> bool {
        let now = self.now;
        if let Some(event) = self.bot(name).inbox.pop_front() {
            self.step(name, event);
            return true;
        }
        if self.bot(name).exited.is_some() {
            return false;
        }
        let reaches = !self.bot(name).cut;
        let event = reaches.then(|| self.lease_news(name).or_else(|| self.watch_news(name))).flatten();
        if let Some(event) = event {
            self.step(name, Event::Dcs(event));
            return true;
        }
        let due = ContentMachine::deadline(&self.bot(name).state).is_some_and(|d| d.at <= now);
        if due {
            self.step(name, Event::TimerFired);
        }
        due
    }

    fn lease_news(&mut self, name: &str) -> Option<DcsEvent> {
        let now = self.now;
        self.dcs.expire(now);
        let (lease, grant) = (self.bot(name).lease, self.bot(name).grant);
        if let Some(lease) = lease {
            if !self.dcs.lease_lives(lease) {
                self.bot(name).lease = None;
                return Some(DcsEvent::LeaseLost { lease, why: String::from("expired") });
            }
            if self.bot(name).renew_at <= now {
                assert!(self.dcs.keep_alive(now, lease), "it lives");
                self.bot(name).renew_at = now + TTL.divided_by(2);
                return Some(DcsEvent::LeaseRenewed { lease, valid_until: now + TTL });
            }
        }
        let ttl = grant.filter(|_| lease.is_none())?;
        let lease = self.dcs.grant(now, ttl);
        let bot = self.bot(name);
        bot.grant = None;
        bot.lease = Some(lease);
        bot.renew_at = now + ttl.divided_by(2);
        Some(DcsEvent::LeaseGranted { lease, valid_until: now + ttl })
    }

    fn watch_news(&mut self, name: &str) -> Option<DcsEvent> {
        let cursors = self.bot(name).cursors.clone();
        for (prefix, cursor) in cursors {
            let revision = self.dcs.revision();
            let event = match cursor.map(|seen| self.dcs.changes_after(&prefix, seen)) {
                Some(Ok(changes)) if changes.is_empty() => continue,
                Some(Ok(changes)) => DcsEvent::Changed { prefix: prefix.clone(), revision, changes },
                None | Some(Err(_)) => {
                    let (revision, entries) = self.dcs.list(&prefix);
                    DcsEvent::Listed { prefix: prefix.clone(), revision, entries }
                }
            };
            self.bot(name).cursors.insert(prefix, Some(revision));
            return Some(event);
        }
        None
    }

    /// Cuts a bot off from etcd.
    pub fn cut(&mut self, name: &str) {
        self.bot(name).cut = true;
        let prefixes: Vec<String> = self.bot(name).cursors.keys().cloned().collect();
        for prefix in prefixes {
            self.step(name, Event::Dcs(DcsEvent::WatchLost { prefix, why: String::from("cut off") }));
        }
    }

    /// Lets a bot reach etcd again; its watches begin with a list.
    pub fn heal(&mut self, name: &str) {
        let bot = self.bot(name);
        bot.cut = false;
        for cursor in bot.cursors.values_mut() {
            *cursor = None;
        }
    }

    /// Delivers everything that waits, until nothing does.
    pub fn settle(&mut self) {
        for _round in 0..10_000 {
            let mut busy = false;
            for name in self.names() {
                busy |= self.deliver(&name);
            }
            if !busy {
                return;
            }
        }
        panic!("the bots do not come to rest:\n{}", self.log.join("\n"));
    }

    /// The next moment at which anything happens of itself.
    pub fn next_moment(&self) -> Option<Time> {
        let bots = self.bots.values().filter(|b| b.exited.is_none()).flat_map(|bot| {
            let deadline = ContentMachine::deadline(&bot.state).map(|d| d.at);
            let renewal = bot.lease.filter(|_| !bot.cut).map(|_| bot.renew_at);
            [deadline, renewal]
        });
        bots.chain([self.dcs.next_expiry()]).flatten().min()
    }

    /// Lets time pass, moment by moment.
    pub fn advance(&mut self, span: Span) {
        let until = self.now + span;
        self.settle();
        while let Some(at) = self.next_moment().filter(|at| *at <= until) {
            assert!(at > self.now, "a deadline that no step takes up: {:?}", self.deadlines());
            self.now = at;
            self.dcs.expire(at);
            self.settle();
        }
        self.now = until;
    }

    fn deadlines(&self) -> Vec<String> {
        let line = |(name, bot): (&String, &Bot)| {
            format!("{name} {}: {:?}", bot.state.role(), ContentMachine::deadline(&bot.state))
        };
        self.bots.iter().map(line).collect()
    }

    /// Ends the look that a bot has started.
    pub fn end_poll(&mut self, name: &str, result: PollResult) {
        let Some(job) = self.bot(name).jobs.iter().find(|(_, j)| **j == Job::Poll).map(|(id, _)| *id) else {
            self.log.push(format!("({name} does not look at the origin)"));
            return;
        };
        self.bot(name).jobs.remove(&job);
        self.step(name, Event::Polled { job, result });
    }

    /// Ends the fetch that a bot has started.
    pub fn end_fetch(&mut self, name: &str, result: FetchResult) {
        let fetch = self.bot(name).jobs.iter().find_map(|(id, job)| match job {
            Job::Fetch(sha) => Some((*id, sha.clone())),
            Job::Poll | Job::Read(_) | Job::Purge | Job::Export(_) | Job::Tell => None,
        });
        let Some((job, sha)) = fetch else {
            self.log.push(format!("({name} does not fetch)"));
            return;
        };
        self.bot(name).jobs.remove(&job);
        if result == FetchResult::Complete {
            let subject = format!("subject of {}", &sha[..1]);
            self.bot(name).disk.push(Commit { sha, subject });
        }
        let holds = self.bot(name).disk.clone();
        self.step(name, Event::FetchEnded { job, holds, result });
    }

    /// Ends the reading of the canary that a bot has started.
    pub fn end_reading(&mut self, name: &str, asked: u64, failed: u64, why: Option<&str>) {
        let Some(job) = self.job_of(name, |job| matches!(job, Job::Read(_))) else { return };
        self.step(name, Event::CanaryRead { job, asked, failed, why: why.map(str::to_owned) });
    }

    /// Ends the purge that a bot has started.
    pub fn end_purge(&mut self, name: &str, result: Result<(), String>) {
        let Some(job) = self.job_of(name, |job| *job == Job::Purge) else { return };
        self.step(name, Event::Purged { job, result });
    }

    /// Ends the work on a tree that a bot has started.
    pub fn end_export(&mut self, name: &str, result: Result<(), String>) {
        let Some(job) = self.job_of(name, |job| matches!(job, Job::Export(_))) else { return };
        self.step(name, Event::TreeExported { job, result });
    }

    /// Ends the telling that a bot has started.
    pub fn end_telling(&mut self, name: &str, result: Result<(), String>) {
        let Some(job) = self.job_of(name, |job| *job == Job::Tell) else { return };
        self.step(name, Event::ToldOfTree { job, result });
    }

    fn job_of(&mut self, name: &str, which: impl Fn(&Job) -> bool) -> Option<JobId> {
        let Some(job) = self.bot(name).jobs.iter().find(|(_, job)| which(job)).map(|(id, _)| *id) else {
            self.log.push(format!("({name} does no such work)"));
            return None;
        };
        self.bot(name).jobs.remove(&job);
        Some(job)
    }

    /// A web bot says what it holds; without a slot it is idle.
    pub fn web_says(&mut self, name: &str, facts: &WebFacts) {
        let head = MemberHead {
            kind: Kind::Web,
            state: String::from("serving"),
            role: String::from("member"),
            version: String::new(),
            api_url: String::new(),
            instance: String::new(),
            node: String::new(),
            since_unix_ms: 0,
        };
        self.put(&web().member(name), &Member::new(head, facts).to_json());
    }

    pub fn put(&mut self, key: &str, value: &str) {
        let _done = self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::put(key, value)]));
    }

    pub fn delete(&mut self, key: &str) {
        let _done = self.dcs.transact(self.now, &Transaction::new(Vec::new(), vec![Write::delete(key)]));
    }

    pub fn live(&self) -> Option<ContentRevision> {
        self.revision(&site().revision_live())
    }

    pub fn candidate(&self) -> Option<ContentRevision> {
        self.revision(&site().revision_candidate())
    }

    pub fn canary_key(&self) -> Option<Canary> {
        self.dcs.get(&site().revision_canary()).map(|kv| serde_json::from_str(&kv.value).expect("a canary"))
    }

    fn revision(&self, key: &str) -> Option<ContentRevision> {
        self.dcs.get(key).map(|kv| serde_json::from_str(&kv.value).expect("a revision"))
    }

    /// Every value that a key has had since `after`.
    pub fn changes(&self, after: Revision) -> Vec<Change> {
        self.dcs.changes_after(&site().prefix(), after).expect("nothing is compacted")
    }

    pub fn report(&mut self, name: &str) -> Report {
        let now = self.now;
        ContentMachine::report(&self.bot(name).state, now)
    }
}

fn write_key(write: &Write) -> &str {
    match write {
        Write::Put { key, .. } | Write::Delete { key } => key,
    }
}

/// A write as a line; members' own keys are left out.
fn write_line(write: &Write) -> Option<String> {
    match write {
        Write::Put { key, value, lease: _ } => {
            let key = site().strip(key)?.to_owned();
            (!key.starts_with("members/")).then(|| format!("{key} = {value}"))
        }
        Write::Delete { key } => site().strip(key).map(|key| format!("delete {key}")),
    }
}
