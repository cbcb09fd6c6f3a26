//! Everything that a content bot knows, and how an event changes it.

use std::collections::BTreeSet;

use bots_core::{
    dcs::{DcsEvent, Scope, View},
    leadership::{Leadership, LeadershipChange},
    machine::{Deadline, Machine, Span, Time},
    membership::{Membership, MembershipAction, MembershipChange, MembershipEvent, RETRY_AFTER},
    wire::PushHint,
};
use serde::Serialize;

use super::{
    Action, Commit, ContentMachine, Event, JobId, KEPT_MAX, Reference, Role,
    backoff::Dice,
    canary::{CanarySettings, Trial},
    export::{self, Export, ExportSettings, Trees},
    flip::{Flip, Flipped},
    follower, leader,
    mirror::{Mirror, short},
    origin::{Origin, Tip},
    publication::{self, Pointers, Publication},
    purge::{self, Purge, PurgeSettings},
    push::{Announcement, Push},
    report,
};

/// The bot duplicates another's name, or was misused in another way that the operator must mend.
const EXIT_CONTRADICTED: u8 = 3;

/// What the operator decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// The content scope.
    pub scope: Scope,
    /// The web scopes that serve the site: their bots acknowledge candidates.
    pub web_scopes: BTreeSet<Scope>,
    /// The bot's name.
    pub name: String,
    /// Tells this process from any other of the same name; also the seed of its jitter.
    pub instance: String,
    /// The version of the bot.
    pub version: String,
    /// Where the bot's API answers; ends in `/status`.
    pub api_url: String,
    /// Where web bots fetch packs; they add `/pack/<sha>`.
    pub pack_url: String,
    /// The repository, without credentials.
    pub origin: String,
    /// What to publish.
    pub reference: Reference,
    /// The length of the lease.
    pub ttl: Span,
    /// How often the leader looks at the origin, give or take a tenth.
    pub poll_interval: Span,
    /// A leader whose origin has not answered for so long is not ready; nothing if it always is.
    pub stale_after: Option<Span>,
    /// How long the web bots may take to prepare a candidate.
    pub prepare_timeout: Span,
    /// Whether and how a candidate is tried on one web bot.
    pub canary: Option<CanarySettings>,
    /// Whether and how caches in front are purged.
    pub purge: Option<PurgeSettings>,
    /// Whether and how the live commit is put on disk.
    pub export: Option<ExportSettings>,
    /// Pushes are announced, so that one which the poll finds first is one whose announcement was lost.
    pub pushes_expected: bool,
}

/// Everything that a content bot knows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct State {
    pub(super) settings: Settings,
    role: Role,
    since: Time,
    epoch_unix_ms: u64,
    stepped_at: Option<Time>,
    pub(super) view: View,
    pub(super) membership: Membership,
    pub(super) leadership: Leadership,
    /// The lock was refused though the view shows it free: the view lags, and asking again at once would be a storm.
    pub(super) lock_asked_again: Option<Time>,
    pub(super) origin: Origin,
    /// The commit that an operator wants published, wherever the reference points.
    pub(super) pin: Option<Tip>,
    pub(super) trial: Trial,
    pub(super) purge: Purge,
    pub(super) export: Export,
    pub(super) mirror: Mirror,
    pub(super) publication: Publication,
    pub(super) flip: Flip,
    pub(super) push: Push,
    /// How many announcements never came.
    pub(super) pushes_missed: u64,
    pub(super) dice: Dice,
    jobs: u64,
}

/// Where a bot stands among the others.
enum Standing {
    /// Not one of them yet.
    Joining,
    /// Not sure to be one of them.
    Detached,
    Following,
    Leading,
}

impl State {
    /// A bot that starts with a mirror that holds `holds`, oldest first. `epoch_unix_ms` is the wall time at
    /// [`Time::ZERO`]: for people to read.
    #[must_use]
    pub fn new(settings: Settings, holds: Vec<Commit>, epoch_unix_ms: u64) -> Self {
        let prefixes = Self::prefixes(&settings);
        let membership = Membership::new(settings.scope.clone(), &settings.name, &settings.instance, settings.ttl);
        let seed = settings.instance.bytes().fold(0, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(u64::from(b)));
        Self {
            role: ContentMachine::TRANSITIONS.initial,
            since: Time::ZERO,
            epoch_unix_ms,
            stepped_at: None,
            view: View::of(prefixes),
            membership,
            leadership: Leadership::new(settings.scope.leader(), &settings.name),
            lock_asked_again: None,
            origin: Origin::new(),
            pin: None,
            trial: Trial::default(),
            purge: Purge::default(),
            export: Export::default(),
            mirror: Mirror::new(holds),
            publication: Publication::new(),
            flip: Flip::default(),
            push: Push::default(),
            pushes_missed: 0,
            dice: Dice::new(seed),
            jobs: 0,
            settings,
        }
    }

    /// The same bot, with trees of an earlier life on its disk.
    #[must_use]
    pub fn with_trees(self, trees: Trees) -> Self {
        Self { export: Export::found(trees), ..self }
    }

    /// The prefixes that a bot with these settings watches: its own scope and those of the web bots that it waits for.
    #[must_use]
    pub fn prefixes(settings: &Settings) -> Vec<String> {
        let web = settings.web_scopes.iter().map(Scope::prefix);
        std::iter::once(settings.scope.prefix()).chain(web).collect()
    }

    /// The node of the diagram.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// Whether the bot holds the commit whole.
    #[must_use]
    pub fn holds(&self, sha: &str) -> bool {
        self.mirror.holds(sha)
    }

    /// The commit whose files the link names.
    #[must_use]
    pub fn exported(&self) -> Option<&str> {
        self.export.linked()
    }

    /// Whether etcd answers and the name is ours: the bot does its work, leading or not.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        match self.role {
            Role::Follower | Role::Watching | Role::Fetching | Role::Preparing => true,
            Role::Initializing | Role::Detached | Role::Stopped => false,
        }
    }

    /// Whether this bot leads and has not heard of the origin for too long: what it publishes may be old.
    #[must_use]
    pub fn is_stale(&self, now: Time) -> bool {
        let heard = self.origin.answered().filter(|_| self.role.leads() && leader::looks(self));
        heard.zip(self.settings.stale_after).is_some_and(|(heard, after)| now >= heard + after)
    }

    /// The last publication under this leader that has reached every serving web bot.
    #[must_use]
    pub const fn flipped(&self) -> Option<Flipped> {
        self.flip.last()
    }

    /// How many pushes the poll found whose announcement never came.
    #[must_use]
    pub const fn pushes_missed(&self) -> u64 {
        self.pushes_missed
    }

    /// How many announcements came again.
    #[must_use]
    pub const fn pushes_replayed(&self) -> u64 {
        self.push.replayed()
    }

    /// Since when the bot has been in its role.
    pub(super) const fn since(&self) -> Time {
        self.since
    }

    /// The commit that is to be published: what the operator has pinned, or else what the reference points at.
    pub(super) fn goal(&self) -> Option<&Tip> {
        self.pin.as_ref().or_else(|| self.origin.tip())
    }

    pub(super) fn unix_ms(&self, at: Time) -> u64 {
        self.epoch_unix_ms.saturating_add(at.as_millis())
    }

    pub(super) fn pointers(&self) -> Pointers {
        Pointers::of(&self.settings.scope, &self.view)
    }

    pub(super) const fn next_job(&mut self) -> JobId {
        self.jobs += 1;
        JobId(self.jobs)
    }

    pub(super) fn take(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        self.stepped_at = Some(now);
        match event {
            Event::Dcs(event) => self.dcs(now, event, out),
            Event::NameProbed { instance } => self.member(now, &MembershipEvent::NameProbed { instance }, out),
            Event::TimerFired => {}
            Event::ShutdownRequested => self.stop(now, 0, String::from("asked to stop"), out),
            Event::PushReceived(announcement) => self.announced(announcement),
            Event::Polled { job, result } => leader::polled(self, now, job, result),
            Event::FetchEnded { job, holds, result } => {
                match self.mirror.ended(now, job, holds, result, &mut self.dice) {
                    Some(fetched) if self.role.leads() => leader::fetched(self, now, fetched),
                    Some(fetched) => follower::not_fetched(self, now, fetched),
                    None => {}
                }
            }
            Event::CommitDamaged { sha } => self.mirror.damaged(&sha),
            Event::CanaryRead { job, asked, failed, why } => self.trial.read(job, asked, failed, why),
            Event::TreeExported { job, result } => self.export.ended(now, job, result, &mut self.dice),
            Event::ToldOfTree { job, result } => self.export.told(now, job, result, &mut self.dice),
            Event::Purged { job, result } => self.purge.ended(now, job, result, &mut self.dice),
        }
        self.settle(now, out);
    }

    fn announced(&mut self, announcement: Announcement) {
        let hint: Option<PushHint> = self.view.json(&self.settings.scope.push());
        let tip = announcement.tip.clone();
        if self.push.received(announcement, hint.as_ref()) && self.role.leads() {
            self.origin.announced(tip);
        }
    }

    fn dcs(&mut self, now: Time, event: DcsEvent, out: &mut Vec<Action>) {
        self.view.apply(&event);
        if let DcsEvent::Answered { id, outcome } = &event {
            if let Some(revision) = self.publication.answered(now, *id, outcome) {
                self.flip.begin(now, revision);
            }
            self.push.answered(now, *id, outcome);
        }
        let event = MembershipEvent::Dcs(event);
        self.member(now, &event, out);
        if let MembershipEvent::Dcs(event) = &event {
            // What else the lock's change means is read from the lock itself in `settle`.
            match self.leadership.on_event(now, event, &self.view, &self.membership) {
                Some(LeadershipChange::Refused) => self.lock_asked_again = Some(now + RETRY_AFTER),
                Some(LeadershipChange::Won(_) | LeadershipChange::Lost(_) | LeadershipChange::Yielded) | None => {}
            }
        }
    }

    fn member(&mut self, now: Time, event: &MembershipEvent, out: &mut Vec<Action>) {
        let mut asked = Vec::new();
        let change = self.membership.on_event(now, event, &self.view, &mut asked);
        out.extend(asked.into_iter().map(action));
        match change {
            Some(MembershipChange::Duplicate { api_url }) => {
                let name = self.membership.name();
                let message =
                    format!("another live bot uses the name {name} ({api_url}): give this one another `name`");
                self.stop(now, EXIT_CONTRADICTED, message, out);
            }
            Some(MembershipChange::Joined | MembershipChange::Lost(_)) | None => {}
        }
    }

    /// Does what the state asks for, and brings the role in line with it: one edge a step at most.
    fn settle(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.role == Role::Stopped {
            return;
        }
        if let Some((code, message)) = export::over(self, now) {
            self.stop(now, code, message, out);
            return;
        }
        let mut asked = Vec::new();
        self.membership.advance(now, &mut asked);
        out.extend(asked.into_iter().map(action));
        let role = match self.standing(now) {
            Standing::Joining => Role::Initializing,
            Standing::Detached => {
                // Whatever we knew of the lock is worth nothing now; it is asked for afresh.
                self.leadership.abandon();
                Role::Detached
            }
            Standing::Following => {
                follower::act(self, now, out);
                export::act(self, now, out);
                Role::Follower
            }
            Standing::Leading => {
                if !self.role.leads() {
                    self.take_office(now);
                }
                leader::act(self, now, out);
                export::act(self, now, out);
                self.leading_role()
            }
        };
        self.enter(role, now);
        self.hand_on(now, out);
        let mut asked = Vec::new();
        self.membership.publish(now, report::member(self, now).to_json(), &mut asked);
        out.extend(asked.into_iter().map(action));
    }

    /// Writes down what was announced here.
    fn hand_on(&mut self, now: Time, out: &mut Vec<Action>) {
        if !self.is_ready() {
            return;
        }
        let (now_unix_ms, mut asked) = (self.unix_ms(now), Vec::new());
        self.push.forward(now, now_unix_ms, &mut self.membership, &self.view, &mut asked);
        out.extend(asked.into_iter().map(Action::Dcs));
    }

    /// Where the bot stands among the others.
    fn standing(&self, now: Time) -> Standing {
        let attached = self.membership.lease(now).is_some();
        match self.role {
            Role::Initializing | Role::Detached => {
                if attached && self.membership.is_registered() && self.view.is_complete() {
                    Standing::Following
                } else if self.role == Role::Initializing {
                    Standing::Joining
                } else {
                    Standing::Detached
                }
            }
            Role::Follower | Role::Watching | Role::Fetching | Role::Preparing | Role::Stopped => {
                if !attached {
                    Standing::Detached
                } else if self.leadership.fence(now, &self.membership).is_none() {
                    Standing::Following
                } else {
                    Standing::Leading
                }
            }
        }
    }

    fn leading_role(&self) -> Role {
        if self.pointers().candidate.is_some() || self.publication.is_posting() {
            Role::Preparing
        } else if self.mirror.fetching().is_some() {
            Role::Fetching
        } else {
            Role::Watching
        }
    }

    fn take_office(&mut self, now: Time) {
        self.origin.begin(now, &self.settings.reference);
        self.mirror.origin_moved();
        self.publication = Publication::new();
    }

    /// The only way to change the role.
    fn enter(&mut self, role: Role, now: Time) {
        if role == self.role {
            return;
        }
        ContentMachine::TRANSITIONS.assert_allows(self.role, role);
        if self.role.leads() && !role.leads() {
            self.origin = Origin::new();
            self.publication = Publication::new();
            self.flip = Flip::default();
            self.trial = Trial::default();
            self.purge = Purge::default();
        }
        self.role = role;
        self.since = now;
    }

    fn stop(&mut self, now: Time, code: u8, message: String, out: &mut Vec<Action>) {
        let mut asked = Vec::new();
        self.membership.leave(&mut asked);
        out.extend(asked.into_iter().map(action));
        out.push(Action::Exit { code, message });
        self.enter(Role::Stopped, now);
    }

    /// When the machine wants a step of its own accord.
    pub(super) fn deadline(&self) -> Option<Deadline> {
        let lease_end = match self.role {
            Role::Stopped | Role::Initializing | Role::Detached => None,
            Role::Follower | Role::Watching | Role::Fetching | Role::Preparing => {
                due(self.membership.valid_until(), "the lease may have run out")
            }
        };
        Deadline::earliest([self.plan(), self.ahead(lease_end)])
    }

    /// The next thing that the machine does if nothing happens and etcd goes on answering.
    pub(super) fn plan(&self) -> Option<Deadline> {
        if self.stepped_at.is_none() {
            return Some(Deadline { at: Time::ZERO, reason: String::from("begin") });
        }
        let own = match self.role {
            Role::Stopped => return None,
            Role::Initializing | Role::Detached => vec![],
            Role::Follower => vec![self.follower_deadline()],
            Role::Watching | Role::Fetching | Role::Preparing => self.leader_deadlines(),
        };
        let handing_on = self.push.retry_at().filter(|_| self.push.is_pending() && self.is_ready());
        let handing_on = due(handing_on, "write the announcement of a push down again");
        let shared = [self.membership.deadline(), self.leadership.deadline(), handing_on];
        let export = export::deadlines(self).into_iter().map(Some);
        Deadline::earliest(own.into_iter().chain(shared).chain(export).map(|d| self.ahead(d)))
    }

    /// What the last step has seen and left alone waits for an event, not for time.
    fn ahead(&self, deadline: Option<Deadline>) -> Option<Deadline> {
        deadline.filter(|d| self.stepped_at.is_none_or(|at| d.at > at))
    }

    fn follower_deadline(&self) -> Option<Deadline> {
        let retry = self.mirror.backoff().retry_at().filter(|_| follower::wanted(self, &self.pointers()).is_some());
        due(retry, "fetch again")
    }

    fn leader_deadlines(&self) -> Vec<Option<Deadline>> {
        let pointers = self.pointers();
        let retry = self.mirror.backoff().retry_at().filter(|_| leader::wanted(self, &pointers).is_some());
        let prepare = pointers.candidate().filter(|c| self.mirror.holds(&c.sha));
        let prepare = prepare.and_then(|_| self.publication.prepare_until(self.settings.prepare_timeout));
        let trial = self.settings.canary.map(|canary| self.trial.due(canary)).unwrap_or_default();
        let trial = trial.into_iter().map(|at| due(Some(at), "read the canary's pages, or judge them"));
        let others = [
            due(self.origin.due().filter(|_| leader::looks(self)), "look at the origin"),
            due(retry, "fetch again"),
            due(prepare, "the web bots' time to prepare is over"),
            due(self.publication.retry_at(), "try again to change the publication"),
            due(purge::due(self, &pointers), "purge the caches in front"),
            due(self.origin.missed_at(), "an announcement that has not come is taken for lost"),
        ];
        others.into_iter().chain(trial).collect()
    }

    pub(super) fn invariants(&self) -> Result<(), String> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        let leads = self.role.leads();
        check(leads || !self.origin.is_looking(), "only the leader waits for a look at the origin")?;
        check(leads || !self.publication.has_request(), "only the leader changes the publication")?;
        check(
            !leads || self.stepped_at.is_some_and(|at| self.leadership.fence(at, &self.membership).is_some()),
            "the leader holds the lock under a live lease",
        )?;
        let fetching = self.mirror.fetching();
        check(fetching.is_none_or(|sha| !self.mirror.holds(sha)), "a commit that is held is not fetched")?;
        let in_use = publication::in_use(&self.view, &self.settings.web_scopes).len();
        check(!leads || self.mirror.len() <= KEPT_MAX + 3 + in_use, "the mirror is bounded")?;
        check(self.export.keeps_linked(), "the tree that the link names is not about to be removed")?;
        check(!leads || self.role == self.leading_role(), "the leader's role says what is on its way")?;
        check(
            self.origin.tip().is_none_or(|tip| tip.sha.len() == 40),
            &format!("a commit has 40 digits, not {:?}", self.origin.tip().map(|t| short(&t.sha))),
        )
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
