//! The leader: looks at what stands in etcd, at the origin's reference and at the mirror, and does what is missing.
//!
//! Level-triggered: nothing here remembers an event. Every change is one transaction that carries the lock's revision
//! and both pointers' revisions, so that a stale leader and a late write are refused; none brings a commit forward that is
//! quarantined or pinned away by then.

use std::collections::BTreeSet;

use bots_core::{
    dcs::{Compare, DcsAction, Transaction},
    leadership::Fence,
    machine::Time,
    wire::{ContentRevision, PushHint},
};

use super::{
    Action, JobId, Reference, State,
    mirror::{Fetched, short},
    operator,
    origin::Tip,
    publication::{self, Move, Pointers, Readiness},
    purge,
};

/// What is missing, begun.
pub(super) fn act(state: &mut State, now: Time, out: &mut Vec<Action>) {
    let Some(fence) = state.leadership.fence(now, &state.membership) else { return };
    heed_pushes(state, now);
    operator::heed_pin(state, now);
    let pointers = state.pointers();
    state.publication.observe(now, state.membership.scope(), &state.view, &pointers);
    watch_trial(state, now, &pointers, out);
    let live = pointers.live.as_ref().map(|live| live.modified).zip(pointers.live().map(|live| live.sha.as_str()));
    state.flip.observe(now, live, || publication::webs(&state.view, &state.settings.web_scopes));
    let purged = purge::stands(&state.view, &state.settings.scope.revision_purged());
    state.purge.observe(now, &pointers, purged);
    if state.publication.is_settled()
        && let Some(change) = decide(state, now, &pointers).or_else(|| state.purge.record())
    {
        begin(state, now, fence, &pointers, change, out);
    }
    if state.mirror.is_free(now)
        && let Some(sha) = wanted(state, &pointers)
    {
        let job = state.next_job();
        state.mirror.begin(job, sha.clone());
        out.push(Action::FetchCommit { job, sha });
    }
    if looks(state) && state.origin.due().is_some_and(|due| due <= now) {
        let job = state.next_job();
        state.origin.look(now, job);
        out.push(Action::PollOrigin { job });
    }
    if let Some((job, sha)) = purge::begin(state, now, &pointers) {
        out.push(Action::PurgeCaches { job, sha });
    }
    forget(state, &pointers, out);
}

/// Follows the canary, and has its pages read.
fn watch_trial(state: &mut State, now: Time, pointers: &Pointers, out: &mut Vec<Action>) {
    let (scope, webs) = (&state.settings.scope, &state.settings.web_scopes);
    let candidate = pointers.candidate().map(|c| c.sha.as_str());
    state.trial.observe(now, state.settings.canary, scope, webs, &state.view, candidate);
    if let Some((url, sha)) = state.trial.reading(now, webs, &state.view) {
        let job = state.next_job();
        state.trial.begin_reading(now, job);
        out.push(Action::ReadCanary { job, url, sha });
    }
}

/// Whether there is anything to look at: a pinned commit never moves.
pub(super) const fn looks(state: &State) -> bool {
    matches!(state.settings.reference, Reference::Named(_) | Reference::Range(_))
}

/// Takes in the end of a look at the origin.
pub(super) fn polled(state: &mut State, now: Time, job: JobId, result: super::PollResult) {
    match state.origin.polled(now, job, result, state.settings.poll_interval, &mut state.dice) {
        Some(true) => state.mirror.origin_moved(),
        Some(false) => {
            if let Some(tip) = state.origin.tip() {
                state.mirror.named_again(&tip.sha);
            }
        }
        None => {}
    }
}

/// Takes in what a fetch brought.
pub(super) fn fetched(state: &mut State, now: Time, fetched: Fetched) {
    match fetched {
        Fetched::Whole | Fetched::Failed => {}
        Fetched::Unfit { sha, reason } => state.publication.found_unfit(sha, reason),
        Fetched::Vanished { sha } => {
            if state.goal().is_none_or(|tip| tip.sha != sha) {
                return;
            }
            let commit = short(&sha);
            let why = match &state.settings.reference {
                Reference::Named(_) | Reference::Range(_) | Reference::Pinned(_) if state.pin.is_some() => format!(
                    "commit {commit} is pinned, and the origin does not give it out: push it, or `botctl content unpin`"
                ),
                Reference::Named(name) | Reference::Range(name) => format!(
                    "{name} points at commit {commit}, and the origin does not give it out: \
                     force-pushed away, or a replica of the origin lags"
                ),
                Reference::Pinned(_) => {
                    format!("the origin does not give out commit {commit}: push it, or correct git.ref")
                }
            };
            state.mirror.postpone(now, why, &mut state.dice);
            if looks(state) && state.pin.is_none() {
                state.origin.look_soon();
            } else {
                state.mirror.named_again(&sha);
            }
        }
    }
}

/// The commit that the reference asks us to publish, if it is not live and may be.
pub(super) fn target<'s>(state: &'s State, pointers: &Pointers) -> Option<&'s Tip> {
    state.goal().filter(|tip| !pointers.live_is(&tip.sha) && !is_quarantined(state, &tip.sha))
}

/// The commit that is to be fetched next: the newest first, then whatever web bots may ask us for.
pub(super) fn wanted(state: &State, pointers: &Pointers) -> Option<String> {
    let target = target(state, pointers).map(|tip| tip.sha.as_str());
    // While a change is under way, the pointers are about to move.
    let pointed_at = match state.publication.is_settled() {
        true => [pointers.candidate(), pointers.live()],
        false => [None, None],
    };
    let others = pointed_at.into_iter().flatten().map(|r| r.sha.as_str());
    let is_missing =
        |sha: &&str| !state.mirror.holds(sha) && !state.mirror.has_vanished(sha) && !is_quarantined(state, sha);
    target.into_iter().chain(others).find(is_missing).map(str::to_owned)
}

/// The next change of the publication.
fn decide(state: &State, now: Time, pointers: &Pointers) -> Option<Move> {
    if let Some(unfit) = state.publication.unfit() {
        return Some(Move::Quarantine { sha: unfit.sha.clone(), reason: unfit.reason.clone() });
    }
    let held = |tip: &&Tip| state.mirror.holds(&tip.sha);
    let ready = target(state, pointers).filter(held);
    let candidate = match (&pointers.candidate, pointers.candidate()) {
        (None, _) => return ready.map(|tip| post(state, tip, pointers)),
        (Some(_), None) => return Some(Move::Withdraw),
        (Some(_), Some(candidate)) => candidate,
    };
    if let Some(tip) = ready.filter(|tip| tip.sha != candidate.sha) {
        return Some(post(state, tip, pointers));
    }
    if is_obsolete(state, pointers, candidate) {
        return Some(Move::Withdraw);
    }
    if !state.mirror.holds(&candidate.sha) {
        return None;
    }
    let (view, webs) = (&state.view, &state.settings.web_scopes);
    if let Some((member, why)) = publication::refusal(view, webs, &candidate.sha) {
        let reason = format!("{member} can never serve it: {why}");
        return Some(Move::Quarantine { sha: candidate.sha.clone(), reason });
    }
    let readiness = Readiness::of(view, webs, &candidate.sha);
    let all_ready = readiness.late.is_empty() && view.is_watched();
    let promoted = operator::is_promoted(&state.settings.scope, view, &candidate.sha);
    if !readiness.can_be_served || !(all_ready || promoted || is_time_over(state, now)) {
        return None;
    }
    let late = readiness.late;
    match state.settings.canary.filter(|_| !promoted) {
        Some(settings) => state.trial.decide(now, settings, webs, view, candidate, late),
        None => Some(Move::Publish { revision: candidate.clone(), late }),
    }
}

/// Whether the web bots' time to prepare the candidate is over.
fn is_time_over(state: &State, now: Time) -> bool {
    state.publication.prepare_until(state.settings.prepare_timeout).is_some_and(|at| at <= now)
}

/// A candidate that waits, although its time is over, because nobody could serve it.
pub(super) fn held<'s>(state: &State, pointers: &'s Pointers, now: Time) -> Option<(&'s ContentRevision, Readiness)> {
    let candidate = pointers.candidate().filter(|c| state.mirror.holds(&c.sha) && is_time_over(state, now))?;
    let readiness = Readiness::of(&state.view, &state.settings.web_scopes, &candidate.sha);
    (!readiness.can_be_served).then_some((candidate, readiness))
}

/// Whether a candidate can, may or need not go live any more.
fn is_obsolete(state: &State, pointers: &Pointers, candidate: &ContentRevision) -> bool {
    let pinned_away = state.pin.as_ref().is_some_and(|pin| pin.sha != candidate.sha);
    let tip = state.goal().map(|tip| tip.sha.as_str());
    let back_to_live = tip.is_some_and(|tip| pointers.live_is(tip));
    let unobtainable = state.mirror.has_vanished(&candidate.sha)
        && tip != Some(candidate.sha.as_str())
        && (tip.is_some() || state.origin.is_missing());
    pinned_away
        || pointers.live_is(&candidate.sha)
        || back_to_live
        || is_quarantined(state, &candidate.sha)
        || unobtainable
}

fn post(state: &State, tip: &Tip, pointers: &Pointers) -> Move {
    let subject = state.mirror.commit(&tip.sha).map(|c| c.subject.clone()).unwrap_or_default();
    Move::Post {
        revision: ContentRevision {
            sha: tip.sha.clone(),
            generation: pointers.generation_next(&state.settings.scope, &state.view),
            reference: state.settings.reference.as_str().to_owned(),
            origin: state.settings.origin.clone(),
            subject,
            detected_unix_ms: state.unix_ms(tip.detected),
        },
    }
}

fn begin(state: &mut State, now: Time, fence: Fence, pointers: &Pointers, change: Move, out: &mut Vec<Action>) {
    let scope = state.membership.scope();
    let mut compare = state.leadership.guard(fence).to_vec();
    compare.extend(pointers.unchanged(scope));
    if let Some(sha) = change.shows() {
        compare.push(Compare::Absent(scope.quarantine(sha)));
        // A late one must not overtake a trial that has begun since, nor what an operator has pinned since.
        compare.extend([scope.revision_canary(), scope.revision_pin()].map(|key| match state.view.get(&key) {
            Some(kv) => Compare::ModifiedAt(key, kv.modified),
            None => Compare::Absent(key),
        }));
    }
    let then = change.writes(scope, &state.view, state.unix_ms(now));
    let id = state.membership.next_request();
    out.push(Action::Dcs(DcsAction::Transact { id, transaction: Transaction::new(compare, then) }));
    state.publication.begin(id, change);
}

/// Those announcements that other bots wrote down: our own were heeded when they came.
fn heed_pushes(state: &mut State, now: Time) {
    state.push.look_answers();
    let key = state.membership.scope().push();
    if let Some(modified) = state.view.get(&key).map(|kv| kv.modified)
        && state.origin.is_news(modified)
    {
        let hint: PushHint = state.view.json(&key).unwrap_or_default();
        if hint.by != state.membership.name() {
            state.origin.announced(hint.tip);
        }
    }
    if state.origin.missed(now) && state.settings.pushes_expected {
        state.pushes_missed = state.pushes_missed.saturating_add(1);
    }
}

/// Lets go of the oldest commits above the limit. Those stay that are on their way, live, or in some web bot's hands.
pub(super) fn forget(state: &mut State, pointers: &Pointers, out: &mut Vec<Action>) {
    let tip = state.goal().map(|tip| tip.sha.clone());
    let in_use = publication::in_use(&state.view, &state.settings.web_scopes);
    let pointed_at = [pointers.live(), pointers.candidate()].into_iter().flatten().map(|r| r.sha.as_str());
    let needed: BTreeSet<&str> =
        tip.as_deref().into_iter().chain(pointed_at).chain(in_use.iter().map(String::as_str)).collect();
    while let Some(commit) = state.mirror.take_surplus(&needed) {
        out.push(Action::ForgetCommit { sha: commit.sha });
    }
}

pub(super) fn is_quarantined(state: &State, sha: &str) -> bool {
    state.publication.unfit().is_some_and(|u| u.sha == sha)
        || state.view.get(&state.membership.scope().quarantine(sha)).is_some()
}
