//! Which edges of the state diagrams were taken: a fleet that never went somewhere has not been tried there.

use std::{collections::BTreeMap, fmt::Display};

use bots_core::machine::{Machine, RoleName};

/// Edges, with how often each was taken.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    taken: BTreeMap<(&'static str, String, String), u64>,
}

impl Coverage {
    /// An edge was taken.
    pub fn took(&mut self, kind: &'static str, from: impl Display, to: impl Display) {
        *self.taken.entry((kind, from.to_string(), to.to_string())).or_default() += 1;
    }

    /// Adds what another run has taken.
    pub fn merge(&mut self, other: &Self) {
        for (edge, count) in &other.taken {
            *self.taken.entry(edge.clone()).or_default() += count;
        }
    }

    /// The declared edges that were never taken.
    #[must_use]
    pub fn missing<M: Machine>(&self) -> Vec<String>
    where
        M::Role: RoleName,
    {
        let never =
            |from: &M::Role, to: &M::Role| !self.taken.contains_key(&(M::KIND, from.to_string(), to.to_string()));
        let edges = M::TRANSITIONS.edges.iter().filter(|edge| never(&edge.from, &edge.to));
        edges.map(|edge| format!("{} {} -> {}: {}", M::KIND, edge.from, edge.to, edge.when)).collect()
    }
}
