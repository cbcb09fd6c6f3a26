//! Who can reach whom. Delays are drawn where something is sent; here is only what is cut.

use std::collections::{BTreeMap, BTreeSet};

use super::{Item, NodeId};

/// What does not get through between a machine and etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// What the machine sends.
    pub requests: bool,
    /// What etcd sends.
    pub replies: bool,
}

/// The network.
#[derive(Debug, Default)]
pub struct Network {
    store: BTreeMap<NodeId, Cut>,
    peers: BTreeSet<(NodeId, NodeId)>,
    /// etcd takes long to answer.
    pub(super) slow_store: bool,
    /// What was sent into a cut and is sent again when it ends.
    pub(super) held: Vec<(NodeId, Item)>,
}

impl Network {
    /// Cuts a machine from etcd.
    pub fn cut_from_store(&mut self, node: NodeId, cut: Cut) {
        self.store.insert(node, cut);
    }

    /// Mends it; gives out what was held.
    pub(super) fn mend_store(&mut self, node: NodeId) -> Vec<Item> {
        self.store.remove(&node);
        let (free, held) = std::mem::take(&mut self.held).into_iter().partition(|(of, _)| *of == node);
        self.held = held;
        let free: Vec<(NodeId, Item)> = free;
        free.into_iter().map(|(_, item)| item).collect()
    }

    /// Whether a machine's requests reach etcd.
    #[must_use]
    pub fn requests_pass(&self, node: NodeId) -> bool {
        self.store.get(&node).is_none_or(|cut| !cut.requests)
    }

    /// Whether etcd's answers reach a machine.
    #[must_use]
    pub fn replies_pass(&self, node: NodeId) -> bool {
        self.store.get(&node).is_none_or(|cut| !cut.replies)
    }

    /// Cuts two machines from each other.
    pub fn cut_peers(&mut self, a: NodeId, b: NodeId) {
        self.peers.insert((a.min(b), a.max(b)));
    }

    /// Mends it.
    pub fn mend_peers(&mut self, a: NodeId, b: NodeId) {
        self.peers.remove(&(a.min(b), a.max(b)));
    }

    /// Whether two machines can reach each other.
    #[must_use]
    pub fn peers_meet(&self, a: NodeId, b: NodeId) -> bool {
        a == b || !self.peers.contains(&(a.min(b), a.max(b)))
    }

    /// The machines that are cut from etcd.
    #[must_use]
    pub fn cut_off(&self) -> Vec<NodeId> {
        self.store.keys().copied().collect()
    }

    /// The machines that are cut from each other.
    #[must_use]
    pub fn parted(&self) -> Vec<(NodeId, NodeId)> {
        self.peers.iter().copied().collect()
    }
}
