//! Whoever changes the count of load messages adds that to the record of changes, in one transaction: the hour's budget is one
//! for all leaders.

use bots_core::{
    dcs::{Outcome, Write},
    wire::{Kind, LoadHistory},
};

use super::{Check, Seen};
use crate::world::{Node, World};

#[derive(Debug)]
pub(super) struct CountedChanges;

impl Check for CountedChanges {
    fn requirement(&self) -> &'static str {
        "S5 every change of the count is on record for the next leader"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::Applied(applied) = seen else { return Ok(()) };
        if !matches!(applied.outcome, Outcome::Done(_)) {
            return Ok(());
        }
        let scope = Node::scope_of(Kind::Web);
        let (prefix, history) = (scope.load_prefix(), scope.load_history());
        let is_message = |key: &str| key.starts_with(&prefix) && !key.ends_with("/claim") && key != history;
        let changed = applied.transaction.then.iter().any(|write| match write {
            Write::Put { key, .. } | Write::Delete { key } => is_message(key),
        });
        if !changed {
            return Ok(());
        }
        let changes_in = |value: &str| serde_json::from_str(value).map_or(0, |h: LoadHistory| h.changes.len());
        let name = &world.nodes[applied.node.0].name;
        for (write, before) in applied.transaction.then.iter().zip(applied.before) {
            if let Write::Put { key, value, .. } = write
                && *key == history
            {
                let (before, after) = (before.as_ref().map_or(0, |kv| changes_in(&kv.value)), changes_in(value));
                // No run is an hour long.
                return if after == before + 1 {
                    Ok(())
                } else {
                    Err(format!("{name} makes a record of {before} changes one of {after}"))
                };
            }
        }
        Err(format!("{name} changes the count and leaves no record of it"))
    }
}
