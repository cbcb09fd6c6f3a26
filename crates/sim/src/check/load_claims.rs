//! S5: no load message is answered twice, and never more bots than the maximum serve under a claim that is sure to hold.

use std::collections::BTreeMap;

use bots_core::wire::Kind;
use web_bot::machine::Role;

use super::{Check, Seen};
use crate::{web::SERVING_MAX, world::World};

#[derive(Debug)]
pub(super) struct LoadClaims;

impl Check for LoadClaims {
    fn requirement(&self) -> &'static str {
        "S5 no load message is answered twice, and serving never exceeds the maximum"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        if !matches!(seen, Seen::Moment) {
            return Ok(());
        }
        let mut claimed: BTreeMap<u32, &str> = BTreeMap::new();
        for node in world.nodes.iter().filter(|node| node.kind == Kind::Web && !node.frozen.holds_bot()) {
            let Some(state) = node.web_state() else { continue };
            if !matches!(state.role(), Role::Waking | Role::Serving) {
                continue;
            }
            let Some(slot) = state.slot_for_sure(node.clock.local(world.now)) else { continue };
            if let Some(other) = claimed.insert(slot, &node.name) {
                return Err(format!("{other} and {} both answer load message {slot}", node.name));
            }
        }
        if claimed.len() > usize::try_from(SERVING_MAX).unwrap_or(0) {
            return Err(format!("{} bots serve, at most {SERVING_MAX} may: {claimed:?}", claimed.len()));
        }
        Ok(())
    }
}
