//! What clients were promised: every write that a server acknowledged, and where it stands in the log.

use bots_core::{machine::Time, wire::Lsn};

use crate::world::NodeId;

/// An acknowledged write.
#[derive(Debug, Clone, Copy)]
pub struct Ack {
    /// When.
    pub at: Time,
    /// By whom.
    pub node: NodeId,
    /// Where it stands in the log of whoever has it.
    pub index: usize,
    /// Which record it is.
    pub serial: u64,
    /// Where it ends.
    pub end: Lsn,
    /// By a server that stood still past its fence and was about to be killed: nobody vouches for it.
    pub overdue: bool,
}

/// All acknowledged writes, in order.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The writes.
    pub acks: Vec<Ack>,
    records: u64,
}

impl Ledger {
    /// The number of a new record; no two records of any server have the same.
    pub const fn next_record(&mut self) -> u64 {
        self.records += 1;
        self.records
    }
}
