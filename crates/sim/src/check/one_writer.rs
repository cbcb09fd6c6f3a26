//! S1: never two members that can acknowledge a write.

use super::{Check, Seen};
use crate::world::{Frozen, NodeId, World};

#[derive(Debug)]
pub(super) struct OneWriter;

impl Check for OneWriter {
    fn requirement(&self) -> &'static str {
        "S1 never two members that can acknowledge a write"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        if !matches!(seen, Seen::Moment) {
            return Ok(());
        }
        // Once voters have promised to receive nothing more, an old primary may take writes for a while, and acknowledge none.
        let able = |id: &NodeId| !world.plan.takeover || world.can_acknowledge(*id);
        let writable = |id: &NodeId| {
            let node = &world.nodes[id.0];
            let moves = node.frozen != Frozen::Machine && !world.is_overdue(*id);
            moves && node.postgres().is_some_and(|body| body.accepts_writes()) && able(id)
        };
        let mut writers = world.ids().filter(writable).map(|id| &world.nodes[id.0]);
        match (writers.next(), writers.next()) {
            (Some(a), Some(b)) => Err(format!("{} and {} accept writes at the same time", a.name, b.name)),
            (_, _) => Ok(()),
        }
    }
}
