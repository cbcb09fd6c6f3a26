//! The canary: one serving web bot serves the candidate before the others do, and its pages are read for a while. Not the
//! reading itself.
//!
//! Which bot it is stands in etcd, so that a new leader goes on with it. What was read is begun anew by every leader.

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

/// What the operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CanarySettings {
    /// How long its pages are read before all bots follow.
    pub observe: Span,
    /// How long it may take until it serves the candidate, and has been read.
    pub timeout: Span,
    /// How many of a hundred pages may fail.
    pub failures_percent_max: u64,
}

/// The trial of one candidate.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Trial {
    /// The candidate, and when this leader first saw a canary for it.
    began: Option<(String, Time)>,
    /// The key that is followed.
    canary: Option<(Revision, Canary)>,
    serving_since: Option<Time>,
    read: Option<(JobId, Time)>,
    next_read: Option<Time>,
    asked: u64,
    failed: u64,
    why: Option<String>,
}

impl Trial {
    /// Follows the keys: which bot is the canary, and since when it serves the candidate.
    pub(super) fn observe(&mut self, now: Time, scope: &Scope, webs: &BTreeSet<Scope>, view: &View, sha: Option<&str>) {
        let key = scope.revision_canary();
        let canary = view.json::<Canary>(&key).filter(|canary| Some(canary.sha.as_str()) == sha);
        let found = canary.and_then(|canary| Some((view.get(&key)?.modified, canary)));
        if self.canary != found {
            let began = self.began.take().filter(|(tried, _)| Some(tried.as_str()) == sha);
            let began = began.or_else(|| found.as_ref().map(|(_, canary)| (canary.sha.clone(), now)));
            *self = Self { began, canary: found, ..Self::default() };
        }
        let Some((_, canary)) = &self.canary else { return };
        let serves = serving(view, webs).into_iter().find(|(member, _)| *member == canary.member);
        let serves = serves.is_some_and(|(_, bot)| bot.facts.serving.as_ref() == Some(&canary.sha));
        match (serves, self.serving_since) {
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
        let choose = |not: Option<&str>| {
            let ready = |(member, bot): &&(String, Web)| bot.has(&candidate.sha) && Some(member.as_str()) != not;
            let first = all.iter().filter(ready).min_by_key(|(_, bot)| !bot.serves());
            first.map(|(member, _)| Move::Try { sha: candidate.sha.clone(), member: member.clone() })
        };
        let Some((_, canary)) = &self.canary else {
            // Nobody serves: there is nobody to try it on, and nobody to harm.
            return if all.is_empty() { publish() } else { choose(None) };
        };
        if self.serving_since.is_some_and(|since| since + settings.observe <= now) && self.asked > 0 {
            let bot = all.iter().find(|(member, _)| *member == canary.member).map(|(_, bot)| bot);
            let verdict = self.verdict(settings, canary, bot.and_then(|bot| bot.facts.load));
            let quarantine = |reason| Some(Move::Quarantine { sha: candidate.sha.clone(), reason });
            return verdict.map_or_else(publish, quarantine);
        }
        if self.timeout_at(settings).is_some_and(|at| at <= now) {
            let trouble = all.iter().find(|(m, _)| *m == canary.member).and_then(|(_, bot)| bot.facts.trouble.clone());
            let why = trouble.or_else(|| self.why.clone()).unwrap_or_else(|| String::from("it does not say why"));
            let reason = format!(
                "{}, its canary, did not serve it for {} within {}: {why}",
                canary.member, settings.observe, settings.timeout
            );
            return Some(Move::Quarantine { sha: candidate.sha.clone(), reason });
        }
        match all.iter().any(|(member, _)| *member == canary.member) {
            true => None,
            false => choose(Some(&canary.member)),
        }
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
        let WebLoad { requests, errors, .. } = load.unwrap_or_default();
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

    fn timeout_at(&self, settings: CanarySettings) -> Option<Time> {
        self.began.as_ref().map(|(_, began)| *began + settings.timeout)
    }

    /// When something is due if nothing happens.
    pub(super) fn due(&self, settings: CanarySettings) -> Option<Time> {
        let observed = self.serving_since.filter(|_| self.read.is_none()).map(|since| since + settings.observe);
        let reading = self.next_read.filter(|_| self.read.is_none());
        let timeout = self.canary.as_ref().and_then(|_| self.timeout_at(settings));
        [observed, reading, timeout].into_iter().flatten().min()
    }

    /// What is tried on whom, for the report.
    pub(super) fn shown(&self) -> Option<String> {
        let (_, canary) = self.canary.as_ref()?;
        let (commit, member) = (short(&canary.sha), &canary.member);
        Some(match self.serving_since {
            Some(_) => {
                format!("{member} to serve {commit} well: {} of {} pages failed so far", self.failed, self.asked)
            }
            None => format!("{member} to serve {commit} before the others"),
        })
    }
}

/// The serving web bots, by `scope/name`.
fn serving(view: &View, scopes: &BTreeSet<Scope>) -> Vec<(String, Web)> {
    let named = |web: Web| (format!("{}/{}", web.scope, web.name), web);
    webs(view, scopes).into_iter().filter(Web::holds_slot).map(named).collect()
}
