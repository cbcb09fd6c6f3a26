//! S1: never two members that can acknowledge a write.

use super::{Check, Seen};
use crate::world::{Frozen, World};

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
        let writable = |node: &&crate::world::Node| {
            node.frozen != Frozen::Machine && node.postgres().is_some_and(|body| body.accepts_writes())
        };
        let mut writers = world.nodes.iter().filter(writable);
        match (writers.next(), writers.next()) {
            (Some(a), Some(b)) => Err(format!("{} and {} accept writes at the same time", a.name, b.name)),
            (_, _) => Ok(()),
        }
    }
}
