//! The follower: keeps an eye on the lock, and sees to it that no push gets lost.

use bots_core::machine::Time;

use super::{Action, State};

pub(super) fn act(state: &mut State, now: Time, out: &mut Vec<Action>) {
    let mut asked = Vec::new();
    if state.leadership.looks_free(&state.view) && state.lock_asked_again.is_none_or(|at| at <= now) {
        state.lock_asked_again = None;
        state.leadership.acquire(now, &mut state.membership, &state.view, Vec::new(), &mut asked);
    }
    out.extend(asked.into_iter().map(Action::Dcs));
}
