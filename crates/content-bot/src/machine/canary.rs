//! The canary: one serving web bot serves the candidate before the others do, and its pages are read for a while. Not the
//! reading itself.
//!
//! Which bot it is stands in etcd, so that a new leader goes on with it. What was read is begun anew by every leader, and
//! whenever the canary was away or could not help its answers: what passes by itself must not condemn a commit for good.

use std::collections::BTreeSet;

use bots_core::{
    dcs::{Revision, Scope, View},
    machine::{Span, Time},
    wire::{Canary, ContentRevision, WebLoad},
};
use serde::Serialize;

use super::{
    JobId,
    mirror::short,
    publication::{Move, Web, webs},
};

/// Between two readings of the canary's pages.
pub const CANARY_EVERY: Span = Span::from_millis(500);

/// How long failures must have been seen before they count. From the loss of the database's primary to the end of its lease,
/// five seconds by default, apps fail and no web bot can know why.
pub const FAILOVER_SHOWS: Span = Span::from_secs(6);

/// How many canaries may go away while they try the candidate: also one that has come back and gone again without having served it, for
/// an app that has crashed may not come up any more. Machines fail and are restarted one by one; so many in one trial are the commit's
/// doing.
pub const LOSSES_MAX: u32 = 5;

/// What the operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CanarySettings {
    /// How long its pages are read before all bots follow.
    pub observe: Span,
    /// How long it may take until it serves the candidate, and has been read, while it is there.
    pub timeout: Span,
    /// How many of a hundred pages may fail.
    pub failures_percent_max: u64,
}

/// The trial of one candidate.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Trial {
    /// The key that is followed.
    canary: Option<(Revision, Canary)>,
    /// How often a canary went away while it tried this candidate.
    losses: u32,
    /// What the canary had answered by the end of its database's failover, which says nothing of the commit.
    excused: WebLoad,
    /// Where the canary is, and since when.
    presence: Presence,
    serving_since: Option<Time>,
    read: Option<(JobId, Time)>,
    next_read: Option<Time>,
    asked: u64,
    failed: u64,
    why: Option<String>,
    /// Since when something speaks against the commit.
    against_since: Option<Time>,
}

/// Where the canary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
enum Presence {
    /// Not looked for yet.
    #[default]
    Unknown,
    /// It serves visitors; its time counts.
    There(Time),
    /// Its database fails over: it holds still, and nothing that it answers says anything of the commit.
    Excused,
    /// It does not serve any more.
    Gone(Time),
}

impl Trial {
    /// Follows the keys: which bot is the canary, whether it is there, and since when it serves the candidate.
    pub(super) fn observe(
        &mut self,
        now: Time,
        settings: Option<CanarySettings>,
        scope: &Scope,
        webs: &BTreeSet<Scope>,
        view: &View,
        sha: Option<&str>,
    ) {
        let key = scope.revision_canary();
        let canary = view.json::<Canary>(&key).filter(|canary| Some(canary.sha.as_str()) == sha);
        let found = canary.and_then(|canary| Some((view.get(&key)?.modified, canary)));
        if self.canary != found {
            let sha_of = |canary: &Option<(Revision, Canary)>| canary.as_ref().map(|(_, canary)| canary.sha.clone());
            let losses = if sha_of(&self.canary) == sha_of(&found) { self.losses } else { 0 };
            *self = Self { canary: found, losses, ..Self::default() };
        }
        let Some((_, canary)) = self.canary.clone() else { return };
        let Some(bot) = find(&serving(view, webs), &canary.member).cloned() else {
            if !matches!(self.presence, Presence::Gone(_)) {
                self.losses = self.losses.saturating_add(u32::from(matches!(self.presence, Presence::There(_))));
                self.begin_anew(Presence::Gone(now));
            }
            return;
        };
        match (bot.facts.database_fails_over(), self.presence) {
            (true, Presence::Excused) | (false, Presence::There(_)) => {}
            (true, Presence::Unknown | Presence::There(_) | Presence::Gone(_)) => self.begin_anew(Presence::Excused),
            (false, Presence::Excused) if bot.facts.serving.as_ref() == Some(&canary.sha) => {
                self.begin_anew(Presence::There(now));
                self.excused = bot.facts.load.unwrap_or_default();
            }
            (false, Presence::Unknown | Presence::Excused | Presence::Gone(_)) => {
                self.begin_anew(Presence::There(now));
            }
        }
        self.follow(now, &canary, &bot);
        let against = settings.filter(|_| self.serving_since.is_some());
        let against = against.and_then(|settings| self.verdict(settings, &canary, bot.facts.load));
        self.against_since = against.map(|_why| self.against_since.unwrap_or(now));
    }

    /// What was read says nothing any more.
    fn begin_anew(&mut self, presence: Presence) {
        let (canary, losses) = (self.canary.take(), self.losses);
        *self = Self { canary, losses, presence, ..Self::default() };
    }

    /// Whether it serves the candidate.
    fn follow(&mut self, now: Time, canary: &Canary, bot: &Web) {
        let counts = matches!(self.presence, Presence::There(_));
        match (counts && bot.facts.serving.as_ref() == Some(&canary.sha), self.serving_since) {
            (true, None) => {
                self.serving_since = Some(now);
                self.next_read = Some(now);
            }
            (true, Some(_)) => {}
            (false, _) => {
                self.serving_since = None;
                self.next_read = None;
            }
        }
    }

    /// The next step of a candidate that can be served; `late` are those who have not prepared it in time.
    pub(super) fn decide(
        &self,
        now: Time,
        settings: CanarySettings,
        webs: &BTreeSet<Scope>,
        view: &View,
        candidate: &ContentRevision,
        late: Vec<String>,
    ) -> Option<Move> {
        let all = serving(view, webs);
        let publish = || Some(Move::Publish { revision: candidate.clone(), late });
        let quarantine = |reason| Some(Move::Quarantine { sha: candidate.sha.clone(), reason });
        let choose = |not: Option<&str>| {
            let ready = |(member, bot): &&(String, Web)| bot.has(&candidate.sha) && Some(member.as_str()) != not;
            let first = all.iter().filter(ready).min_by_key(|(_, bot)| !bot.serves());
            first.map(|(member, _)| Move::Try { sha: candidate.sha.clone(), member: member.clone() })
        };
        let Some((_, canary)) = &self.canary else {
            // Nobody serves: there is nobody to try it on, and nobody to harm.
            return if all.is_empty() { publish() } else { choose(None) };
        };
        let Some(bot) = find(&all, &canary.member) else {
            if self.losses >= LOSSES_MAX {
                let (member, losses) = (&canary.member, self.losses);
                return quarantine(format!("its canaries went away {losses} times while they tried it, last {member}"));
            }
            // One that is restarted comes back, and the trial goes on.
            let given_up = matches!(self.presence, Presence::Gone(since) if since + settings.timeout <= now);
            return if all.is_empty() { publish().filter(|_| given_up) } else { choose(Some(&canary.member)) };
        };
        let Presence::There(since) = self.presence else { return None };
        if self.serving_since.is_some_and(|since| since + settings.observe <= now) && self.asked > 0 {
            let proven = self.against_since.is_some_and(|since| since + FAILOVER_SHOWS <= now);
            return match self.verdict(settings, canary, bot.facts.load) {
                None => publish(),
                Some(reason) => quarantine(reason).filter(|_| proven),
            };
        }
        if since + settings.timeout > now {
            return None;
        }
        let trouble = bot.facts.trouble.clone();
        let why = trouble.or_else(|| self.why.clone()).unwrap_or_else(|| String::from("it does not say why"));
        let (member, observe, timeout) = (&canary.member, settings.observe, settings.timeout);
        quarantine(format!("{member}, its canary, did not serve it for {observe} within {timeout}: {why}"))
    }

    /// What speaks against the commit, if anything does. Pages and visitors are judged apart: many good answers of one kind
    /// would hide the bad ones of the other.
    fn verdict(&self, settings: CanarySettings, canary: &Canary, load: Option<WebLoad>) -> Option<String> {
        let too_many =
            |failed: u64, of: u64| failed.saturating_mul(100) > of.saturating_mul(settings.failures_percent_max);
        let member = &canary.member;
        if too_many(self.failed, self.asked) {
            let why = self.why.as_deref().unwrap_or("no reason is known");
            return Some(format!("{} of {} pages of {member}, its canary, failed: {why}", self.failed, self.asked));
        }
        let load = load.unwrap_or_default();
        // It counts from the beginning of its process, and of the commit.
        let excused = if self.excused.requests <= load.requests { self.excused } else { WebLoad::default() };
        let requests = load.requests - excused.requests;
        let errors = load.errors.saturating_sub(excused.errors);
        too_many(errors, requests).then(|| {
            format!("{errors} of {requests} requests at {member}, its canary, were answered with 500 or above")
        })
    }

    /// What is to be read now: where, and which commit is expected.
    pub(super) fn reading(&self, now: Time, webs: &BTreeSet<Scope>, view: &View) -> Option<(String, String)> {
        let (_, canary) = self.canary.as_ref()?;
        let due = self.read.is_none() && self.next_read.is_some_and(|at| at <= now);
        let (_, bot) = serving(view, webs).into_iter().find(|(member, _)| due && *member == canary.member)?;
        Some((bot.facts.url, canary.sha.clone()))
    }

    pub(super) const fn begin_reading(&mut self, now: Time, job: JobId) {
        self.read = Some((job, now));
    }

    /// Takes in what was read.
    pub(super) fn read(&mut self, job: JobId, asked: u64, failed: u64, why: Option<String>) {
        let Some((_, began)) = self.read.take_if(|(reading, _)| *reading == job) else { return };
        self.asked = self.asked.saturating_add(asked);
        self.failed = self.failed.saturating_add(failed);
        self.why = why.or_else(|| self.why.take());
        self.next_read = self.next_read.map(|_| began + CANARY_EVERY);
    }

    /// When something is due if nothing happens.
    pub(super) fn due(&self, settings: CanarySettings) -> Vec<Time> {
        let idle = self.read.is_none();
        let observed = self.serving_since.filter(|_| idle).map(|since| since + settings.observe);
        let reading = self.next_read.filter(|_| idle);
        let proven = self.against_since.map(|since| since + FAILOVER_SHOWS);
        let timeout = match self.presence {
            Presence::There(since) | Presence::Gone(since) => Some(since + settings.timeout),
            Presence::Unknown | Presence::Excused => None,
        };
        [observed, reading, proven, timeout].into_iter().flatten().collect()
    }

    /// What is tried on whom, for the report.
    pub(super) fn shown(&self) -> Option<String> {
        let (_, canary) = self.canary.as_ref()?;
        let (commit, member) = (short(&canary.sha), &canary.member);
        let tried = match self.serving_since {
            Some(_) => {
                format!("{member} to serve {commit} well: {} of {} pages failed so far", self.failed, self.asked)
            }
            None => format!("{member} to serve {commit} before the others"),
        };
        Some(match self.presence {
            Presence::Unknown | Presence::There(_) => tried,
            Presence::Excused => format!("the failover of {member}'s database to end, so that it can try {commit}"),
            Presence::Gone(_) => format!("{member} to come back, or another one to try {commit}"),
        })
    }
}

/// The web bot with this name.
fn find<'w>(all: &'w [(String, Web)], member: &str) -> Option<&'w Web> {
    all.iter().find(|(name, _)| name == member).map(|(_, bot)| bot)
}

/// The serving web bots, by `scope/name`.
fn serving(view: &View, scopes: &BTreeSet<Scope>) -> Vec<(String, Web)> {
    let named = |web: Web| (format!("{}/{}", web.scope, web.name), web);
    webs(view, scopes).into_iter().filter(Web::holds_slot).map(named).collect()
}
