//! The proof of a candidate: an instance of the app is started on it beside the one that serves, before the bot says that it
//! stands ready, and is held until the candidate goes live. Not what serves, which is `app`'s.
//!
//! What serves comes first: where both want a start, the instance of the candidate makes way. And a failure speaks against the
//! candidate only while nothing else is known to be to blame: not the database, and not the machine.

use bots_core::{
    machine::{Deadline, Span, Time},
    wire::Refused,
};
use serde::Serialize;

use super::{
    Action, State,
    app::{App, RESTART_BACKOFF_MAX, Recipe},
    content::{backoff, short},
};

/// An app that does not come up on a candidate this often in a row never will. Fewer, and a moment's weakness of the machine
/// or the database would condemn a good commit.
pub const PROOFS_FAILED_MAX: u32 = 3;

/// The pause after a first failure on a candidate; doubled with each further one. So the tries span 7.5 s at least: more than the
/// lease of a primary that is lost (5 s), in which the store shows nothing of it, and the second that a question to it may take.
pub const PROOF_BACKOFF_MIN: Span = Span::from_millis(2_500);

/// What is known of the candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Proof {
    pub(super) recipe: Recipe,
    /// Failures in a row that speak against it.
    failures: u32,
    /// All failures in a row.
    tries: u32,
    retry_at: Time,
    /// When the last try failed, until it is known whether that counts.
    in_doubt: Option<Time>,
    why: Option<String>,
}

impl Proof {
    const fn of(recipe: Recipe) -> Self {
        Self { recipe, failures: 0, tries: 0, retry_at: Time::ZERO, in_doubt: None, why: None }
    }

    const fn is_over(&self) -> bool {
        self.failures >= PROOFS_FAILED_MAX
    }

    /// An instance of it has not come up, or has not stayed. Whether that counts is judged afterwards.
    pub(super) fn failed(&mut self, now: Time, why: String) {
        self.put_off(now, why);
        self.in_doubt = Some(now);
    }

    /// It could not be tried.
    pub(super) fn put_off(&mut self, now: Time, why: String) {
        self.tries += 1;
        self.retry_at = now + backoff(PROOF_BACKOFF_MIN, RESTART_BACKOFF_MAX, self.tries);
        self.why = Some(why);
    }

    /// An instance of it is healthy, which says nothing yet about how long it will be.
    pub(super) fn came_up(&mut self) {
        self.why = None;
    }

    /// An instance of it was healthy for long.
    pub(super) const fn stayed_up(&mut self) {
        (self.failures, self.tries) = (0, 0);
    }

    /// When the next try is due, if there is one.
    pub(super) fn deadline(&self, now: Time) -> Option<Deadline> {
        let due = !self.is_over() && self.retry_at > now;
        due.then(|| Deadline { at: self.retry_at, reason: String::from("start the app on the candidate again") })
    }

    pub(super) fn trouble(&self) -> Option<String> {
        let why = self.why.as_ref()?;
        Some(format!("the app does not come up on the candidate {}: {why}", short(&self.recipe.sha)))
    }
}

impl App {
    /// Follows the candidate; what is known of an earlier one is forgotten.
    pub(super) fn follow(&mut self, candidate: Option<Recipe>) {
        match (&mut self.proof, candidate) {
            (Some(proof), Some(candidate)) if proof.recipe.sha == candidate.sha => proof.recipe = candidate,
            (proof, candidate) => *proof = candidate.map(Proof::of),
        }
    }

    /// What the instance is tried on, if it is on the candidate.
    pub(super) fn trial_of(&mut self, recipe: &Recipe) -> Option<&mut Proof> {
        self.proof.as_mut().filter(|proof| proof.recipe.sha == recipe.sha)
    }

    /// Starts an instance on the candidate if none runs and nothing else is to be started.
    pub(super) fn prove(&mut self, now: Time, wanted: &Recipe, start_timeout: Span, out: &mut Vec<Action>) {
        let may = |proof: &&Proof| !proof.is_over() && proof.in_doubt.is_none() && proof.retry_at <= now;
        let tries = self.proof.as_ref().filter(may);
        let Some(recipe) = tries.map(|proof| proof.recipe.clone()) else { return };
        if self.is_free_for_proof() && !self.is_due(now, wanted) && self.has_room() {
            self.start(now, &recipe, start_timeout, out);
        }
    }

    /// Whether requests could be sent to an instance on that commit at once.
    pub(super) fn is_proven(&self, sha: &str) -> bool {
        self.instances_up().any(|recipe| recipe.sha == sha)
    }

    /// The candidate, if the app never comes up on it.
    pub(super) fn refusal(&self) -> Option<Refused> {
        let proof = self.proof.as_ref().filter(|proof| proof.is_over())?;
        let why = proof.why.as_deref().unwrap_or_default();
        Some(Refused { sha: proof.recipe.sha.clone(), why: format!("{why} ({} times in a row)", proof.failures) })
    }
}

impl State {
    /// Whether the last failure on the candidate counts: if the database answers a question that is asked after it. An app whose
    /// database is away would come up on no commit.
    pub(super) fn judge_candidate(&mut self, now: Time, out: &mut Vec<Action>) {
        let Some(since) = self.app.proof.as_ref().and_then(|proof| proof.in_doubt) else { return };
        let frozen = self.database.is_frozen(now);
        let counts = if frozen { Some(false) } else { self.database.answered_since(since) };
        match (counts, &mut self.app.proof) {
            (Some(counts), Some(proof)) => {
                proof.in_doubt = None;
                proof.failures += u32::from(counts);
                if !self.leads(now) {
                    self.database.forget_silence();
                }
            }
            (None, _) | (Some(_), None) => self.database.ask(now, out),
        }
    }

    /// What an instance on the candidate is to be made of, beside what serves. It is run in the way in which the app is known to run: a
    /// wrong configuration of this bot must not speak against a commit.
    pub(super) fn candidate_recipe(&self, wanted: &Recipe) -> Option<Recipe> {
        let sha = self.content.ready_candidate().filter(|sha| *sha != wanted.sha)?;
        let configuration = self.app.serving_recipe().map_or(wanted.configuration, |serving| serving.configuration);
        Some(Recipe { sha: sha.to_owned(), configuration, ..wanted.clone() })
    }

    /// The newest commit that could be served at once. Where an app serves, a candidate is one when the app runs on it.
    pub(super) fn acknowledged(&self) -> Option<&str> {
        let proven = |sha: &&str| self.app.serving().is_none() || self.app.is_proven(sha);
        let candidate = self.content.ready_candidate().filter(proven);
        candidate.or_else(|| self.content.newest_published())
    }

    /// The candidate, if it can never be served here.
    pub(super) fn refusal(&self) -> Option<Refused> {
        self.content.refusal().or_else(|| self.app.refusal())
    }
}
