//! The follower: keeps an eye on the lock, sees to it that no push gets lost, and fetches what goes live.
//!
//! A mirror that lags by a hundred commits costs a takeover the time of all of them, just when the site has no leader.

use bots_core::machine::Time;

use super::{
    Action, State, leader,
    mirror::{Fetched, short},
    publication::Pointers,
};

pub(super) fn act(state: &mut State, now: Time, out: &mut Vec<Action>) {
    let mut asked = Vec::new();
    if state.leadership.looks_free(&state.view) && state.lock_asked_again.is_none_or(|at| at <= now) {
        state.lock_asked_again = None;
        state.leadership.acquire(now, &mut state.membership, &state.view, Vec::new(), &mut asked);
    }
    out.extend(asked.into_iter().map(Action::Dcs));
    let pointers = state.pointers();
    // Whoever is about to lead has newer things to fetch.
    if !state.leadership.looks_free(&state.view)
        && state.mirror.is_free(now)
        && let Some(sha) = wanted(state, &pointers)
    {
        let job = state.next_job();
        state.mirror.begin(job, sha.clone());
        out.push(Action::FetchCommit { job, sha });
    }
    leader::forget(state, &pointers, out);
}

/// The live commit, if it is not here.
pub(super) fn wanted(state: &State, pointers: &Pointers) -> Option<String> {
    let live = pointers.live()?;
    let missing = !state.mirror.holds(&live.sha) && !leader::is_quarantined(state, &live.sha);
    missing.then(|| live.sha.clone())
}

/// The live commit could not be had: later it may.
pub(super) fn not_fetched(state: &mut State, now: Time, fetched: Fetched) {
    let (sha, why) = match fetched {
        Fetched::Whole | Fetched::Failed => return,
        Fetched::Vanished { sha } => (sha, String::from("the origin does not give it out")),
        Fetched::Unfit { sha, reason } => (sha, reason),
    };
    state.mirror.postpone(now, format!("commit {} cannot be had: {why}", short(&sha)), &mut state.dice);
    state.mirror.named_again(&sha);
}
