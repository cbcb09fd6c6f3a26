//! The purge: caches in front of the site forget the old revision once every serving bot serves the new one, and again a
//! little later, for what was cached in between. Not the requests themselves.
//!
//! How far it has come stands in etcd, so that a new leader goes on and nothing is purged without end.

use bots_core::{
    dcs::{Revision, View},
    machine::{Span, Time},
    wire::{ContentRevision, Purged},
};
use serde::Serialize;

use super::{
    JobId, State,
    backoff::{Backoff, Dice},
    publication::{self, Move, Pointers},
};

/// How often caches are purged for one publication.
pub const PURGE_ROUNDS: u32 = 2;

/// What the operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PurgeSettings {
    /// How long after the first purge the second one is due.
    pub again_after: Span,
}

/// How far the purge for the live revision has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Purge {
    /// The live key's last change, and when this leader saw it first.
    live: Option<(Revision, Time)>,
    job: Option<(JobId, Purged)>,
    /// What was done and does not stand in etcd yet.
    done: Option<Purged>,
    /// When the first round was done or found done.
    first_round: Option<(u64, Time)>,
    backoff: Backoff,
}

impl Purge {
    /// Follows the live revision.
    pub(super) fn observe(&mut self, now: Time, pointers: &Pointers, stands: Purged) {
        let modified = pointers.live.as_ref().map(|live| live.modified);
        if self.live.map(|(seen, _)| seen) != modified {
            self.live = modified.map(|modified| (modified, now));
            self.backoff.reset();
        }
        self.done.take_if(|done| stands >= *done);
        if stands.rounds == 1 && self.first_round.is_none_or(|(generation, _)| generation != stands.generation) {
            self.first_round = Some((stands.generation, now));
        }
    }

    /// What must be written down.
    pub(super) fn record(&self) -> Option<Move> {
        self.done.map(|purged| Move::Record { purged })
    }

    /// Takes in the end of a round.
    pub(super) fn ended(&mut self, now: Time, job: JobId, result: Result<(), String>, dice: &mut Dice) {
        let Some((_, purged)) = self.job.take_if(|(running, _)| *running == job) else { return };
        match result {
            Ok(()) => {
                self.backoff.reset();
                self.done = Some(purged);
                if purged.rounds == 1 {
                    self.first_round = Some((purged.generation, now));
                }
            }
            Err(why) => self.backoff.failed(now, why, dice),
        }
    }

    pub(super) const fn backoff(&self) -> &Backoff {
        &self.backoff
    }
}

/// The round that is missing, and when it may begin.
fn missing(state: &State, pointers: &Pointers) -> Option<(Purged, Time)> {
    let settings = state.settings.purge?;
    let live = pointers.live()?;
    if state.purge.job.is_some() || state.purge.done.is_some() {
        return None;
    }
    let stands = stands(&state.view, &state.settings.scope.revision_purged());
    let (seen, rounds, due) = match state.purge.live {
        Some((_, seen)) if stands.generation < live.generation => (seen, 1, seen),
        Some((_, seen)) if stands.generation == live.generation && stands.rounds < PURGE_ROUNDS => {
            let first = state.purge.first_round.map_or(seen, |(_, at)| at);
            (seen, stands.rounds + 1, first + settings.again_after)
        }
        Some(_) | None => return None,
    };
    // Who is not there yet by then will be, and is not waited for.
    let waited_for = behind(state, live).then(|| seen + state.settings.prepare_timeout);
    let retry = state.purge.backoff.retry_at();
    let due = [Some(due), waited_for, retry].into_iter().flatten().max()?;
    Some((Purged { generation: live.generation, rounds }, due))
}

fn behind(state: &State, live: &ContentRevision) -> bool {
    !publication::behind(&state.view, &state.settings.web_scopes, &live.sha).is_empty()
}

/// What stands in etcd.
pub(super) fn stands(view: &View, key: &str) -> Purged {
    view.json(key).unwrap_or_default()
}

/// The round that is due, begun.
pub(super) fn begin(state: &mut State, now: Time, pointers: &Pointers) -> Option<(JobId, String)> {
    let (purged, _) = missing(state, pointers).filter(|(_, due)| *due <= now)?;
    let sha = pointers.live()?.sha.clone();
    let job = state.next_job();
    state.purge.job = Some((job, purged));
    Some((job, sha))
}

/// When a round is due.
pub(super) fn due(state: &State, pointers: &Pointers) -> Option<Time> {
    missing(state, pointers).map(|(_, due)| due)
}
