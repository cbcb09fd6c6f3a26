//! Content: which commits are wanted, which stand ready, which one to serve, which ones may go.
//!
//! The candidate is prepared in the background and acknowledged; the live commit is served as soon as it stands ready.
//! Preparing is long work: started by an action, ended by an event with the same number.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    dcs::{Scope, View},
    machine::{Deadline, Span, Time},
    wire::{Canary, ContentFacts, ContentRevision, Member, Refused},
};
use serde::Serialize;

use super::Action;

/// How many prepared revisions stay on disk, so that a rollback needs no network.
pub const REVISIONS_KEPT: usize = 3;

/// The first pause after a failed preparation; doubled with every further one.
pub const PREPARE_BACKOFF_MIN: Span = Span::from_millis(500);

/// The longest pause between two tries: an origin that was mended is noticed within this time.
pub const PREPARE_BACKOFF_MAX: Span = Span::from_secs(30);

/// So often content bots alone are asked for a pack, if there are any: one that is restarted is back by then, and the origin is
/// spared a fetch of every web bot, which may be one of the whole history.
const FAILURES_BEFORE_ORIGIN: u32 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
enum Entry {
    Fetching {
        id: u64,
        failures: u32,
    },
    Prepared,
    Failed {
        why: String,
        failures: u32,
        retry_at: Time,
    },
    /// Never to be served here: no further try would end otherwise.
    Refused {
        why: String,
    },
}

/// The sub-machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Content {
    scope: Scope,
    /// This bot, as a canary is named.
    member: String,
    live: Option<ContentRevision>,
    /// What may become live: newer than what is, and not in quarantine.
    candidate: Option<ContentRevision>,
    /// This bot is the canary: it serves the candidate before the others do.
    tries_candidate: bool,
    entries: BTreeMap<String, Entry>,
    /// The commits that have been live, the newest first.
    recent: Vec<String>,
    retained: Vec<String>,
    last_id: u64,
    trouble: Option<String>,
}

impl Content {
    pub(super) const fn new(scope: Scope, member: String) -> Self {
        Self {
            scope,
            member,
            live: None,
            candidate: None,
            tries_candidate: false,
            entries: BTreeMap::new(),
            recent: Vec::new(),
            retained: Vec::new(),
            last_id: 0,
            trouble: None,
        }
    }

    /// The commit that every bot shall serve.
    pub(super) fn live(&self) -> Option<&str> {
        self.live.as_ref().map(|r| r.sha.as_str())
    }

    /// The scope that the content comes from.
    pub(super) fn scope_name(&self) -> &str {
        self.scope.name()
    }

    /// The live commit, if it does not stand ready here. Who tries a newer one lacks nothing.
    pub(super) fn lacks(&self) -> Option<&str> {
        let tries = self.candidate.as_ref().is_some_and(|c| self.tries_candidate && self.is_prepared(&c.sha));
        self.live().filter(|sha| !tries && !self.is_prepared(sha))
    }

    pub(super) fn is_prepared(&self, sha: &str) -> bool {
        self.entries.get(sha) == Some(&Entry::Prepared)
    }

    /// The commit to serve: the live one if it stands ready. If it cannot be prepared, the last good one, so that trouble
    /// with content never takes the site down; whether that is to be served while others have the live one is not decided
    /// here.
    pub(super) fn servable(&self) -> Option<&str> {
        let tried = self.candidate.as_ref().filter(|_| self.tries_candidate).map(|r| r.sha.as_str());
        if let Some(candidate) = tried.filter(|sha| self.is_prepared(sha)) {
            return Some(candidate);
        }
        let live = self.live()?;
        match self.entries.get(live) {
            Some(Entry::Prepared) => Some(live),
            Some(Entry::Failed { .. } | Entry::Refused { .. } | Entry::Fetching { failures: 1.., .. }) => {
                self.newest_published()
            }
            Some(Entry::Fetching { failures: 0, .. }) | None => None,
        }
    }

    /// The candidate, if it stands ready.
    pub(super) fn ready_candidate(&self) -> Option<&str> {
        self.candidate.as_ref().map(|r| r.sha.as_str()).filter(|sha| self.is_prepared(sha))
    }

    /// The newest commit that has been live and stands ready.
    pub(super) fn newest_published(&self) -> Option<&str> {
        self.recent.iter().map(String::as_str).find(|sha| self.is_prepared(sha))
    }

    /// Trouble with content, one line.
    pub(super) fn trouble(&self) -> Option<String> {
        let failed = self.entries.iter().find_map(|(sha, entry)| match entry {
            Entry::Failed { why, .. } => Some(format!("commit {} cannot be prepared: {why}", short(sha))),
            Entry::Refused { why } => Some(format!("commit {} can never be served: {why}", short(sha))),
            Entry::Fetching { .. } | Entry::Prepared => None,
        });
        self.trouble.clone().or(failed)
    }

    /// The candidate, if it can never be served here: what the content bot quarantines it for.
    pub(super) fn refusal(&self) -> Option<Refused> {
        let sha = &self.candidate.as_ref()?.sha;
        match self.entries.get(sha)? {
            Entry::Refused { why } => Some(Refused { sha: sha.clone(), why: why.clone() }),
            Entry::Failed { .. } | Entry::Fetching { .. } | Entry::Prepared => None,
        }
    }

    /// What the bot waits for before it can serve.
    pub(super) fn waiting_for(&self) -> String {
        match self.live() {
            None => format!("a live revision of the content scope {}: is its content bot up?", self.scope.name()),
            Some(sha) => format!("commit {} to be fetched", short(sha)),
        }
    }

    /// Looks at what the store asks for. What was wanted stays wanted if the keys are gone: an empty store must not
    /// take a site down.
    pub(super) fn observe(&mut self, view: &View) {
        self.trouble = None;
        if let Some(live) = self.read(view, &self.scope.revision_live()) {
            if self.recent.first() != Some(&live.sha) {
                self.recent.retain(|sha| *sha != live.sha);
                self.recent.insert(0, live.sha.clone());
                self.recent.truncate(REVISIONS_KEPT);
            }
            self.live = Some(live);
        }
        let published = self.live.as_ref().map_or(0, |live| live.generation);
        self.candidate = self
            .read(view, &self.scope.revision_candidate())
            .filter(|c| c.generation > published && view.get(&self.scope.quarantine(&c.sha)).is_none());
        let canary: Option<Canary> = view.json(&self.scope.revision_canary());
        let is_ours = |c: &ContentRevision| canary.is_some_and(|k| k.member == self.member && k.sha == c.sha);
        self.tries_candidate = self.candidate.as_ref().is_some_and(is_ours);
    }

    fn read(&mut self, view: &View, key: &str) -> Option<ContentRevision> {
        let revision: Option<ContentRevision> = view.json(key);
        let usable = revision.filter(|r| is_commit_id(&r.sha));
        if usable.is_none() && view.get(key).is_some() {
            self.trouble = Some(format!("{key} does not name a commit by its 40 hex digits: publish it again"));
        }
        usable
    }

    /// Starts what is wanted and missing, and lets go what nobody needs. `in_use` are the commits of which responses may
    /// still be under way.
    pub(super) fn advance(&mut self, now: Time, in_use: &BTreeSet<String>, view: &View, out: &mut Vec<Action>) {
        let wanted: Vec<ContentRevision> = [self.live.clone(), self.candidate.clone()].into_iter().flatten().collect();
        self.entries.retain(|sha, entry| match entry {
            Entry::Failed { .. } | Entry::Refused { .. } => wanted.iter().any(|r| r.sha == *sha),
            Entry::Fetching { .. } | Entry::Prepared => true,
        });
        for revision in wanted {
            let failures = match self.entries.get(&revision.sha) {
                None => 0,
                Some(Entry::Failed { failures, retry_at, .. }) if *retry_at <= now => *failures,
                Some(Entry::Failed { .. } | Entry::Refused { .. } | Entry::Fetching { .. } | Entry::Prepared) => {
                    continue;
                }
            };
            self.last_id += 1;
            self.entries.insert(revision.sha.clone(), Entry::Fetching { id: self.last_id, failures });
            let pack_urls = self.sources(view, &revision.sha);
            let asks_origin = pack_urls.is_empty() || failures >= FAILURES_BEFORE_ORIGIN;
            out.push(Action::PrepareContent {
                id: self.last_id,
                pack_urls,
                origin: if asks_origin { revision.origin } else { String::new() },
                reference: revision.reference,
                sha: revision.sha,
            });
        }
        self.retain(in_use, out);
    }

    /// Where a pack of the commit may be had: bots that say they hold it first.
    fn sources(&self, view: &View, sha: &str) -> Vec<String> {
        let prefix = self.scope.members_prefix();
        let facts = view.below(&prefix).filter_map(|kv| Member::from_json(&kv.value)?.facts::<ContentFacts>());
        let mut found: Vec<ContentFacts> = facts.filter(|f| !f.pack_url.is_empty()).collect();
        found.sort_by_key(|f| f.holds.as_deref() != Some(sha));
        found.into_iter().map(|f| format!("{}/pack/{sha}", f.pack_url.trim_end_matches('/'))).collect()
    }

    fn retain(&mut self, in_use: &BTreeSet<String>, out: &mut Vec<Action>) {
        let Some(live) = self.live() else { return };
        let mut keep: BTreeSet<String> = in_use.clone();
        keep.insert(live.to_owned());
        keep.extend(self.candidate.as_ref().map(|r| r.sha.clone()));
        for sha in &self.recent {
            if keep.len() < REVISIONS_KEPT {
                keep.insert(sha.clone());
            }
        }
        self.entries.retain(|sha, entry| matches!(entry, Entry::Fetching { .. }) || keep.contains(sha));
        keep.extend(self.entries.keys().cloned());
        let keep: Vec<String> = keep.into_iter().collect();
        if keep != self.retained {
            self.retained.clone_from(&keep);
            out.push(Action::RetainContent { shas: keep });
        }
    }

    /// A preparation has ended well.
    pub(super) fn prepared(&mut self, id: u64, sha: &str) {
        if let Some(entry) = self.fetching(id, sha) {
            *entry = Entry::Prepared;
        }
    }

    /// A preparation has failed: try again later, and ever later.
    pub(super) fn failed(&mut self, now: Time, id: u64, sha: &str, why: &str) {
        if let Some(entry) = self.fetching(id, sha) {
            let failures = match entry {
                Entry::Fetching { failures, .. } => *failures + 1,
                Entry::Prepared | Entry::Failed { .. } | Entry::Refused { .. } => 1,
            };
            let retry_at = now + backoff(PREPARE_BACKOFF_MIN, PREPARE_BACKOFF_MAX, failures);
            *entry = Entry::Failed { why: why.to_owned(), failures, retry_at };
        }
    }

    /// A preparation has shown that the commit can never be served here.
    pub(super) fn refused(&mut self, id: u64, sha: &str, why: String) {
        if let Some(entry) = self.fetching(id, sha) {
            *entry = Entry::Refused { why };
        }
    }

    fn fetching(&mut self, id: u64, sha: &str) -> Option<&mut Entry> {
        self.entries.get_mut(sha).filter(|entry| matches!(entry, Entry::Fetching { id: mine, .. } if *mine == id))
    }

    /// When the sub-machine wants a step of its own accord.
    pub(super) fn deadline(&self) -> Option<Deadline> {
        let retries = self.entries.values().filter_map(|entry| match entry {
            Entry::Failed { retry_at, .. } => Some(*retry_at),
            Entry::Fetching { .. } | Entry::Refused { .. } | Entry::Prepared => None,
        });
        retries.min().map(|at| Deadline { at, reason: String::from("try again to prepare the content") })
    }
}

/// The pause after the `failures`th failure in a row: doubled each time, within bounds.
pub(super) fn backoff(min: Span, max: Span, failures: u32) -> Span {
    let doubled = min.times(1_u64.checked_shl(failures.saturating_sub(1).min(32)).unwrap_or(u64::MAX));
    doubled.min(max)
}

/// Commits are directories on disk and paths in URLs: nothing but 40 lower-case hex digits will do.
fn is_commit_id(sha: &str) -> bool {
    sha.len() == 40 && sha.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The first digits of a commit, for people.
pub(super) fn short(sha: &str) -> &str {
    sha.get(..8).unwrap_or(sha)
}
