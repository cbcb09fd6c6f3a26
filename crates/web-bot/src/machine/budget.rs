//! The hour's budget of scaling actions. The record of them lives in the store, so that it outlives every leader: each change
//! of the count adds itself, in its own transaction, and is refused if somebody else has added one meanwhile.
//!
//! Its times are wall time, the only one that leaders share. A clock that is wrong by so much that an action seems to lie
//! more than an hour ahead or behind renews the budget; nothing else depends on it.

pub use bots_core::wire::ACTIONS_PER_HOUR_MAX;
use bots_core::{
    dcs::{Compare, Revision, Scope, View, Write},
    machine::Span,
    wire::{LoadChange, LoadHistory},
};

/// How many of the changes within an hour may lower the count.
pub const SCALE_INS_PER_HOUR_MAX: usize = 30;

/// So many of the hour's changes are kept for rises: no fall takes them, and each of them at least doubles the count, as far as one change
/// may go. From nothing to [`SLOTS_MAX`](bots_core::wire::SLOTS_MAX) that takes seventeen, so no load is refused a bot because load came
/// and went before: a scaler that runs short leaves the fleet large.
pub const CHANGES_KEPT_FOR_RISES: usize = 20;

const HOUR: Span = Span::from_secs(3_600);

/// The record as the view shows it at one moment.
pub(super) struct Budget {
    key: String,
    modified: Option<Revision>,
    unix_ms: u64,
    /// The changes of the last hour, oldest first.
    changes: Vec<LoadChange>,
}

impl Budget {
    pub(super) fn read(view: &View, scope: &Scope, unix_ms: u64) -> Self {
        let key = scope.load_history();
        let recorded: LoadHistory = view.json(&key).unwrap_or_default();
        let mut changes = recorded.changes;
        changes.retain(|change| change.at_unix_ms.abs_diff(unix_ms) < HOUR.as_millis());
        changes.sort_by_key(|change| change.at_unix_ms);
        Self { modified: view.get(&key).map(|kv| kv.modified), key, unix_ms, changes }
    }

    fn counted(&self) -> usize {
        self.changes.iter().filter(|change| !change.forced).count()
    }

    pub(super) fn may_act(&self) -> bool {
        self.counted() < ACTIONS_PER_HOUR_MAX
    }

    /// What is left is for rises alone.
    pub(super) fn runs_short(&self) -> bool {
        self.counted() + CHANGES_KEPT_FOR_RISES >= ACTIONS_PER_HOUR_MAX
    }

    pub(super) fn may_scale_in(&self) -> bool {
        let falls = self.changes.iter().filter(|change| change.lowered && !change.forced).count();
        !self.runs_short() && falls < SCALE_INS_PER_HOUR_MAX
    }

    /// How long until the oldest change is an hour old.
    pub(super) fn eases_in(&self) -> Span {
        let ends = self.changes.first().map_or(0, |oldest| oldest.at_unix_ms.saturating_add(HOUR.as_millis()));
        Span::from_millis(ends.saturating_sub(self.unix_ms))
    }

    /// What a change demands of the record and writes into it.
    pub(super) fn spend(&self, lowered: bool, forced: bool) -> (Compare, Write) {
        let unchanged = match self.modified {
            Some(revision) => Compare::ModifiedAt(self.key.clone(), revision),
            None => Compare::Absent(self.key.clone()),
        };
        let mut history = LoadHistory { changes: self.changes.clone() };
        history.changes.push(LoadChange { at_unix_ms: self.unix_ms, lowered, forced });
        (unchanged, Write::put(self.key.clone(), serde_json::to_string(&history).unwrap_or_default()))
    }
}
