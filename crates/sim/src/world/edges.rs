//! Edges as a primary sees them that is about to hand over: keys that say how far they have come. They answer late, with a
//! word from another term, or never. What they do with a proxy is explored in their own crate.

use bots_core::{
    leadership::generation,
    wire::{EdgeStand, Kind},
};

use super::{Item, Node, World, users::UserItem};

/// The edges that may stand there.
const EDGES: [&str; 2] = ["edge-1", "edge-2"];

impl World {
    /// Before a switchover, edges may come to stand before the cluster, and most of them will answer.
    pub(super) fn place_edges(&mut self) {
        for (edge, name) in EDGES.iter().enumerate() {
            if self.rng.chance(300) {
                self.write_by_hand(key(name), EdgeStand::default().to_json());
            }
            for drained in [false, true] {
                if self.rng.chance(800) {
                    let delay = self.rng.span(5, 2_500);
                    self.after(delay, Item::User(UserItem::EdgeAnswers { edge, drained }));
                }
            }
        }
    }

    /// An edge that stands there says how far it has come.
    pub(super) fn edge_answers(&mut self, edge: usize, drained: bool) {
        let Some(key) = EDGES.get(edge).map(|name| key(name)).filter(|key| self.store.value(key).is_some()) else {
            return;
        };
        let leader = self.store.dcs().get(&Node::scope_of(Kind::Postgres).leader()).map(generation);
        let of = if self.rng.chance(100) { None } else { leader };
        if self.store.answers() {
            self.write_by_hand(key, EdgeStand { holds: of, drained: of.filter(|_| drained) }.to_json());
        }
    }
}

fn key(name: &str) -> String {
    let scope = Node::scope_of(Kind::Postgres);
    scope.key(&format!("edges/edge/{name}"))
}
