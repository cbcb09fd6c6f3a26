//! No sorcerer's apprentice: a machine that asks to be woken again and again without anything happening burns a processor
//! for ever.

use std::collections::{BTreeMap, VecDeque};

use bots_core::machine::{Span, Time};

use super::{Check, Seen};
use crate::world::{NodeId, World};

pub(super) const REQUIREMENT: &str = "every reaction has a budget and a stop";

/// A machine may wake by itself this often …
const WAKES_MAX: usize = 150;
/// … within this time. A machine that arms its timer for the past again and again reaches three times that.
const WITHIN: Span = Span::from_secs(2);

#[derive(Debug, Default)]
pub(super) struct Quiet {
    wakes: BTreeMap<NodeId, VecDeque<Time>>,
}

impl Check for Quiet {
    fn requirement(&self) -> &'static str {
        REQUIREMENT
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::TimerFired { node } = seen else { return Ok(()) };
        let wakes = self.wakes.entry(*node).or_default();
        wakes.push_back(world.now);
        while wakes.front().is_some_and(|at| world.now.since(*at) > WITHIN) {
            wakes.pop_front();
        }
        if wakes.len() > WAKES_MAX {
            let name = &world.nodes[node.0].name;
            return Err(format!("{name} was woken {} times within {WITHIN} by its own deadlines", wakes.len()));
        }
        Ok(())
    }
}
