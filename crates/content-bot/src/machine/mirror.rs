//! The local mirror as the machine knows it: which commits it holds whole, and the fetch that is under way. Not a disk.

use std::collections::BTreeSet;

use bots_core::machine::Time;
use serde::{Deserialize, Serialize};

use super::{
    FetchResult, JobId,
    backoff::{Backoff, Dice},
};

/// How many commits a mirror keeps: enough to roll back a few times, few enough to bound the disk.
pub const KEPT_MAX: usize = 16;

/// How often in a row a fetch may leave a doubt about a commit before it counts as unfit. With the back-off in between these
/// are some fifteen seconds: a replica has caught up by then, and a submodule that was pushed behind its site is there.
pub const DOUBTS_MAX: u32 = 5;

/// A commit that the mirror holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// 40 hex digits.
    pub sha: String,
    /// The first line of its message, shortened.
    pub subject: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Fetch {
    job: JobId,
    sha: String,
}

/// How a fetch ended, for the machine around.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fetched {
    /// The mirror holds the commit.
    Whole,
    /// The commit must be quarantined.
    Unfit { sha: String, reason: String },
    /// The origin does not have the commit.
    Vanished { sha: String },
    /// To be tried again.
    Failed,
}

/// What the mirror holds and what is being fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Mirror {
    /// Oldest first.
    holds: Vec<Commit>,
    fetch: Option<Fetch>,
    /// Commits that the origin does not give out: not asked for again until its reference moves.
    vanished: BTreeSet<String>,
    /// The commit that the last fetches have left a doubt about, and how many.
    doubts: Option<(String, u32)>,
    backoff: Backoff,
}

impl Mirror {
    pub(super) fn new(holds: Vec<Commit>) -> Self {
        Self { holds, fetch: None, vanished: BTreeSet::new(), doubts: None, backoff: Backoff::default() }
    }

    pub(super) fn commit(&self, sha: &str) -> Option<&Commit> {
        self.holds.iter().find(|c| c.sha == sha)
    }

    pub(super) fn holds(&self, sha: &str) -> bool {
        self.commit(sha).is_some()
    }

    pub(super) const fn len(&self) -> usize {
        self.holds.len()
    }

    pub(super) fn newest(&self) -> Option<&Commit> {
        self.holds.last()
    }

    pub(super) fn fetching(&self) -> Option<&str> {
        self.fetch.as_ref().map(|f| f.sha.as_str())
    }

    pub(super) fn has_vanished(&self, sha: &str) -> bool {
        self.vanished.contains(sha)
    }

    pub(super) const fn backoff(&self) -> &Backoff {
        &self.backoff
    }

    /// Whether a fetch may begin now.
    pub(super) fn is_free(&self, now: Time) -> bool {
        self.fetch.is_none() && self.backoff.allows(now)
    }

    pub(super) fn begin(&mut self, job: JobId, sha: String) {
        self.fetch = Some(Fetch { job, sha });
    }

    /// The reference points elsewhere: what failed before says nothing of the new commit.
    pub(super) fn origin_moved(&mut self) {
        self.backoff.reset();
        self.vanished.clear();
    }

    /// Takes in the end of a fetch; nothing if it is not the one that is waited for.
    pub(super) fn ended(
        &mut self,
        now: Time,
        job: JobId,
        holds: Vec<Commit>,
        result: FetchResult,
        dice: &mut Dice,
    ) -> Option<Fetched> {
        let sha = self.fetch.take_if(|f| f.job == job)?.sha;
        self.holds = holds;
        let short = short(&sha).to_owned();
        let doubts = self.doubts.take_if(|(doubtful, _)| *doubtful == sha).map_or(0, |(_, doubts)| doubts);
        Some(match result {
            FetchResult::Complete if self.holds(&sha) => {
                self.backoff.reset();
                Fetched::Whole
            }
            FetchResult::Complete => {
                self.backoff.failed(now, format!("commit {short} was fetched, but the mirror lost it"), dice);
                Fetched::Failed
            }
            FetchResult::Doubtful { reason } if doubts + 1 < DOUBTS_MAX => {
                if doubts == 0 {
                    // Earlier failures were the way to the origin's, which is open now.
                    self.backoff.reset();
                }
                self.doubts = Some((sha, doubts + 1));
                self.backoff.failed(now, format!("commit {short} is in doubt: {reason}"), dice);
                Fetched::Failed
            }
            FetchResult::Unfit { reason } | FetchResult::Doubtful { reason } => {
                self.backoff.reset();
                Fetched::Unfit { sha, reason }
            }
            FetchResult::Vanished => {
                self.vanished.insert(sha.clone());
                Fetched::Vanished { sha }
            }
            FetchResult::Failed { why } => {
                // It says nothing of the commit, neither way.
                if doubts > 0 {
                    self.doubts = Some((sha, doubts));
                }
                self.backoff.failed(now, why, dice);
                Fetched::Failed
            }
        })
    }

    /// The reference points at a commit that the origin did not give out. Perhaps it has moved meanwhile, perhaps a
    /// replica of the origin lags: the reference is looked at again before the commit is asked for again.
    pub(super) fn postpone(&mut self, now: Time, why: String, dice: &mut Dice) {
        self.backoff.failed(now, why, dice);
    }

    /// The reference still points at a commit that the origin did not give out: ask again when the back-off allows.
    pub(super) fn named_again(&mut self, sha: &str) {
        self.vanished.remove(sha);
    }

    pub(super) fn vanished(&self) -> impl Iterator<Item = &str> {
        self.vanished.iter().map(String::as_str)
    }

    /// A commit can no longer be read.
    pub(super) fn damaged(&mut self, sha: &str) {
        self.holds.retain(|c| c.sha != sha);
    }

    /// Takes out the oldest commit above the limit that is not among `needed`.
    pub(super) fn take_surplus(&mut self, needed: &BTreeSet<&str>) -> Option<Commit> {
        if self.holds.len() <= KEPT_MAX {
            return None;
        }
        let oldest = self.holds.iter().position(|c| !needed.contains(c.sha.as_str()))?;
        Some(self.holds.remove(oldest))
    }
}

/// The part of a commit's name that people read.
pub(super) fn short(sha: &str) -> &str {
    sha.get(..8).unwrap_or(sha)
}
