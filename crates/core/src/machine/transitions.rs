//! The transition table: every edge of a state diagram, declared once and used four times (assert, explore, draw, print).

use std::fmt::{Debug, Display, Write};

use serde::Serialize;

/// The name of a node in a state diagram.
pub trait RoleName: Copy + Ord + Debug + Display + Serialize + 'static {}
impl<T: Copy + Ord + Debug + Display + Serialize + 'static> RoleName for T {}

/// One edge: from, to, and what takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge<R> {
    /// The role before.
    pub from: R,
    /// The role after.
    pub to: R,
    /// What takes the edge, in a few words.
    pub when: &'static str,
}

impl<R> Edge<R> {
    /// An edge.
    pub const fn new(from: R, to: R, when: &'static str) -> Self {
        Self { from, to, when }
    }
}

/// All edges of one machine.
#[derive(Debug, Clone, Copy)]
pub struct TransitionTable<R: 'static> {
    /// Where every machine starts.
    pub initial: R,
    /// The edges, in the order in which the diagram shows them.
    pub edges: &'static [Edge<R>],
}

impl<R: RoleName> TransitionTable<R> {
    /// Whether the edge is declared. Staying in a role is not an edge and always allowed.
    #[must_use]
    pub fn allows(&self, from: R, to: R) -> bool {
        from == to || self.edges.iter().any(|e| e.from == from && e.to == to)
    }

    /// Asserts that the edge is declared: an undeclared edge is a programmer's error and stops the bot.
    ///
    /// # Panics
    /// If the table does not have the edge.
    pub fn assert_allows(&self, from: R, to: R) {
        assert!(self.allows(from, to), "the transition table has no edge {from} -> {to}");
    }

    /// The diagram as Mermaid source, as it stands in `docs/machines/`.
    #[must_use]
    pub fn mermaid(&self) -> String {
        let mut out = format!("stateDiagram-v2\n    [*] --> {}\n", self.initial);
        for e in self.edges {
            let _infallible = writeln!(out, "    {} --> {}: {}", e.from, e.to, e.when);
        }
        out
    }
}
