//! What an operator asks of the publication: a pin holds one commit live, a promotion spares the candidate its trial. Keys of the
//! operator's own, which the leader reads.

use bots_core::{
    dcs::{Scope, View},
    machine::Time,
    wire::{Pin, Promotion},
};

use super::{State, origin::Tip};

/// Follows the pin.
pub(super) fn heed_pin(state: &mut State, now: Time) {
    let (scope, view) = (&state.settings.scope, &state.view);
    let wanted = match pinned(scope, view) {
        Some(sha) => Some(sha),
        // Somebody wants the publication held, and it cannot be read at what: it is held where it is.
        None if view.get(&scope.revision_pin()).is_some() => {
            let held = state.pin.as_ref().map(|tip| tip.sha.clone());
            held.or_else(|| state.pointers().live().map(|live| live.sha.clone()))
        }
        None => None,
    };
    if state.pin.as_ref().map(|tip| &tip.sha) != wanted.as_ref() {
        state.pin = wanted.map(|sha| Tip { sha, detected: now });
        // What failed before says nothing of this commit.
        state.mirror.origin_moved();
    }
}

fn pinned(scope: &Scope, view: &View) -> Option<String> {
    view.json::<Pin>(&scope.revision_pin()).map(|pin| pin.sha).filter(|sha| is_commit(sha))
}

/// Trouble with the pin: it is there, and cannot be followed.
pub(super) fn trouble(scope: &Scope, view: &View) -> Option<String> {
    let key = scope.revision_pin();
    let unreadable = view.get(&key).is_some() && pinned(scope, view).is_none();
    unreadable.then(|| format!("the key {key} names no commit by its 40 hex digits, and nothing new is published: `botctl content unpin` removes it"))
}

/// Whether an operator lets this candidate go live as it is.
pub(super) fn is_promoted(scope: &Scope, view: &View, sha: &str) -> bool {
    view.json::<Promotion>(&scope.revision_promote()).is_some_and(|promotion| promotion.sha == sha)
}

fn is_commit(sha: &str) -> bool {
    sha.len() == 40 && sha.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
