//! What is going to happen, in order of time; what happens at one time, in the order in which it was decided.

use std::collections::BTreeMap;

use bots_core::machine::Time;

/// The future, as far as it is decided.
#[derive(Debug)]
pub struct Queue<T> {
    items: BTreeMap<(Time, u64), T>,
    pushed: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), pushed: 0 }
    }
}

impl<T> Queue<T> {
    /// Decides that `item` happens at `at`.
    pub fn push(&mut self, at: Time, item: T) {
        self.pushed += 1;
        self.items.insert((at, self.pushed), item);
    }

    /// When the next thing happens.
    #[must_use]
    pub fn next_at(&self) -> Option<Time> {
        self.items.keys().next().map(|(at, _)| *at)
    }

    /// Takes the next thing.
    pub fn pop(&mut self) -> Option<(Time, T)> {
        self.items.pop_first().map(|((at, _), item)| (at, item))
    }
}
