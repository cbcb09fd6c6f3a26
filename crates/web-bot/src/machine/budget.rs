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

/// How many of the changes within an hour may lower the count. Every rise beyond the maximum needs a fall before it, so bounding the falls
/// bounds the swing, and a rise is never refused for want of budget that falls have used up.
pub const SCALE_INS_PER_HOUR_MAX: usize = 30;

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

    pub(super) fn may_act(&self) -> bool {
        self.changes.len() < ACTIONS_PER_HOUR_MAX
    }

    pub(super) fn may_scale_in(&self) -> bool {
        self.may_act() && self.changes.iter().filter(|change| change.lowered).count() < SCALE_INS_PER_HOUR_MAX
    }

    /// How long until the oldest change is an hour old.
    pub(super) fn eases_in(&self) -> Span {
        let ends = self.changes.first().map_or(0, |oldest| oldest.at_unix_ms.saturating_add(HOUR.as_millis()));
        Span::from_millis(ends.saturating_sub(self.unix_ms))
    }

    /// What a change demands of the record and writes into it.
    pub(super) fn spend(&self, lowered: bool) -> (Compare, Write) {
        let unchanged = match self.modified {
            Some(revision) => Compare::ModifiedAt(self.key.clone(), revision),
            None => Compare::Absent(self.key.clone()),
        };
        let mut history = LoadHistory { changes: self.changes.clone() };
        history.changes.push(LoadChange { at_unix_ms: self.unix_ms, lowered });
        (unchanged, Write::put(self.key.clone(), serde_json::to_string(&history).unwrap_or_default()))
    }
}
