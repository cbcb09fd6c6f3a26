//! The export: the live commit as files on disk, for programs that want no HTTP. When to put a tree in place, whom to tell of
//! it, when an old one may go. Not the files themselves.
//!
//! Every bot exports, leading or not: files are wanted where it stands. It follows `revision/live`, as the web bots do.

use std::collections::BTreeMap;

use bots_core::machine::{Deadline, Span, Time};
use serde::Serialize;

use super::{
    Action, JobId, State,
    backoff::{Backoff, Dice},
    report,
};

/// The exit code of a bot that should export once, and could not.
const EXIT_NOT_EXPORTED: u8 = 1;

/// What the operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExportSettings {
    /// How long a tree stays after the link has left it: whoever has a file of it open finds the others too.
    pub grace: Span,
    /// Somebody is to be told of every new tree.
    pub tells: bool,
    /// The bot ends once the live commit is in place, or after this time without it.
    pub one_time: Option<Span>,
}

/// The trees on disk when a bot starts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trees {
    /// The one that the link names.
    pub linked: Option<String>,
    /// The others.
    pub others: Vec<String>,
}

/// What is on disk, and what is being done about it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Export {
    /// The tree that the link names.
    linked: Option<String>,
    /// Whether this process has put it there, or looked it through.
    sound: bool,
    /// Trees that the link has left, and until when they stay. Nothing: found at the start, and not dated yet.
    old: BTreeMap<String, Option<Time>>,
    job: Option<(JobId, String)>,
    backoff: Backoff,
    /// The tree that everybody has been told of.
    told: Option<String>,
    telling: Option<(JobId, String)>,
    tell_backoff: Backoff,
    /// The first step of this process.
    began: Option<Time>,
}

impl Export {
    pub(super) fn found(trees: Trees) -> Self {
        let old = trees.others.into_iter().map(|sha| (sha, None)).collect();
        Self { linked: trees.linked, old, ..Self::default() }
    }

    pub(super) fn linked(&self) -> Option<&str> {
        self.linked.as_deref()
    }

    fn is_in_place(&self, sha: &str) -> bool {
        self.sound && self.linked.as_deref() == Some(sha)
    }

    fn is_told(&self, sha: &str) -> bool {
        self.told.as_deref() == Some(sha)
    }

    /// Takes in the end of the work on a tree.
    pub(super) fn ended(&mut self, now: Time, job: JobId, result: Result<(), String>, dice: &mut Dice) {
        let Some((_, sha)) = self.job.take_if(|(running, _)| *running == job) else { return };
        match result {
            Ok(()) => {
                self.backoff.reset();
                let left = self.linked.replace(sha.clone()).filter(|left| *left != sha);
                self.old.extend(left.map(|left| (left, None)));
                self.old.remove(&sha);
                self.sound = true;
                self.tell_backoff.reset();
            }
            Err(why) => self.backoff.failed(now, why, dice),
        }
    }

    /// Takes in whether everybody was told.
    pub(super) fn told(&mut self, now: Time, job: JobId, result: Result<(), String>, dice: &mut Dice) {
        let Some((_, sha)) = self.telling.take_if(|(running, _)| *running == job) else { return };
        match result {
            Ok(()) => {
                self.tell_backoff.reset();
                self.told = Some(sha);
            }
            // The news of an older tree is no news any more.
            Err(_) if self.linked.as_ref() != Some(&sha) => self.tell_backoff.reset(),
            Err(why) => self.tell_backoff.failed(now, why, dice),
        }
    }

    /// Dates the trees that the link has left, and yields one whose time is over.
    fn expired(&mut self, now: Time, grace: Span) -> Option<String> {
        for until in self.old.values_mut() {
            until.get_or_insert(now + grace);
        }
        // A program that is told of a tree works in it.
        let busy = [&self.job, &self.telling].map(|work| work.as_ref().map(|(_, sha)| sha));
        let over = |(sha, until): (&String, &Option<Time>)| {
            (until.is_some_and(|until| until <= now) && !busy.contains(&Some(sha))).then(|| sha.clone())
        };
        let sha = self.old.iter().find_map(over)?;
        self.old.remove(&sha);
        Some(sha)
    }

    /// Whether the tree that the link names is safe.
    pub(super) fn keeps_linked(&self) -> bool {
        self.linked.as_ref().is_none_or(|linked| !self.old.contains_key(linked))
    }

    pub(super) fn troubles(&self, now: Time) -> impl Iterator<Item = String> {
        [self.backoff.trouble(now), self.tell_backoff.trouble(now)].into_iter().flatten()
    }
}

/// Does what is missing.
pub(super) fn act(state: &mut State, now: Time, out: &mut Vec<Action>) {
    let Some(settings) = state.settings.export else { return };
    let live = state.pointers().live().map(|live| live.sha.clone());
    if let Some(sha) = live
        && !state.export.is_in_place(&sha)
        && state.export.job.is_none()
        && state.export.backoff.allows(now)
        && state.mirror.holds(&sha)
    {
        let job = state.next_job();
        state.export.job = Some((job, sha.clone()));
        out.push(Action::ExportTree { job, sha });
    }
    if let Some(sha) = state.export.linked.clone()
        && settings.tells
        && state.export.is_in_place(&sha)
        && !state.export.is_told(&sha)
        && state.export.telling.is_none()
        && state.export.tell_backoff.allows(now)
    {
        let job = state.next_job();
        state.export.telling = Some((job, sha.clone()));
        out.push(Action::TellOfTree { job, sha });
    }
    while let Some(sha) = state.export.expired(now, settings.grace) {
        out.push(Action::RemoveTree { sha });
    }
}

/// How a bot that exports once ends, if it is time.
pub(super) fn over(state: &mut State, now: Time) -> Option<(u8, String)> {
    let settings = state.settings.export?;
    let patience = settings.one_time?;
    let began = *state.export.began.get_or_insert(now);
    let live = state.pointers().live().map(|live| live.sha.clone());
    if let Some(sha) = live.filter(|sha| state.export.is_in_place(sha))
        && (!settings.tells || state.export.is_told(&sha))
    {
        return Some((0, format!("commit {sha} is exported")));
    }
    if now < began + patience {
        return None;
    }
    let report = report::report(state, now);
    let why = report.troubles.into_iter().next().unwrap_or_else(|| format!("it waits for {}", report.waiting_for));
    Some((EXIT_NOT_EXPORTED, format!("nothing was exported within {patience}: {why}")))
}

/// When it wants a step.
pub(super) fn deadlines(state: &State) -> Vec<Deadline> {
    let Some(settings) = state.settings.export else { return Vec::new() };
    let due = |at: Option<Time>, reason: &str| at.map(|at| Deadline { at, reason: reason.to_owned() });
    let export = &state.export;
    let one_time = settings.one_time.and_then(|patience| export.began.map(|began| began + patience));
    let old = export.old.values().filter_map(|until| *until).min();
    [
        due(export.backoff.retry_at(), "export the live commit again"),
        due(export.tell_backoff.retry_at(), "tell of the exported tree again"),
        due(old, "remove a tree that is not linked any more"),
        due(one_time, "the time to export is over"),
    ]
    .into_iter()
    .flatten()
    .collect()
}
