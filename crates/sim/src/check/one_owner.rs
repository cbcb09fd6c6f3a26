//! A timeline has one owner: what was written on it is one history, whoever has a copy.

use std::collections::BTreeMap;

use bots_core::wire::Timeline;

use super::{Check, Seen};
use crate::world::{NodeId, World};

#[derive(Debug, Default)]
pub(super) struct OneOwner {
    /// Who was writable on a timeline first; of the cluster that etcd knows, for there is one.
    owners: BTreeMap<(String, Timeline), NodeId>,
}

impl Check for OneOwner {
    fn requirement(&self) -> &'static str {
        "S2 no two members are ever writable on one timeline"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::Writable { node } = seen else { return Ok(()) };
        let Some(body) = world.nodes[node.0].postgres() else { return Ok(()) };
        let Some(system_id) = body.disk.system_id.clone() else { return Ok(()) };
        let timeline = body.disk.wal.timeline();
        let owner = *self.owners.entry((system_id, timeline)).or_insert(*node);
        if owner == *node {
            return Ok(());
        }
        let name = |id: NodeId| &world.nodes[id.0].name;
        Err(format!("{} is writable on timeline {timeline}, as {} was", name(*node), name(owner)))
    }
}
