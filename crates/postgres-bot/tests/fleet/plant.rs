//! Mistakes made on purpose, each a change of what a machine is told or of what it asks for: they prove that the search sees what it
//! looks for. All but the last are of the simulator's list (`crates/sim/src/plant.rs`).

use bots_core::dcs::{Compare, Outcome, Revision, Transaction};

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plant {
    /// Steps under a lock do not carry the lock.
    UnguardedWrites,
    /// The guard does not act at the fence.
    GuardSleeps,
    /// A lost answer counts as a good one.
    UnknownIsDone,
    /// Commits wait for nobody, whoever is named.
    WaitsForNobody,
}

/// What a machine asks of etcd turns into.
pub(crate) fn alter_request(plant: Option<Plant>, transaction: &mut Transaction) {
    if plant == Some(Plant::UnguardedWrites) {
        transaction.compare.retain(|compare| match compare {
            Compare::CreatedAt(..) => false,
            Compare::LeaseIs(key, _) => !key.ends_with("/leader"),
            Compare::Absent(_) | Compare::Present(_) | Compare::ValueIs(..) | Compare::ModifiedAt(..) => true,
        });
    }
}

/// What etcd's answer turns into.
pub(crate) fn alter_outcome(plant: Option<Plant>, revision: Revision, outcome: Outcome) -> Outcome {
    match (plant, outcome) {
        (Some(Plant::UnknownIsDone), Outcome::Unknown(_)) => Outcome::Done(revision),
        (_, outcome) => outcome,
    }
}
