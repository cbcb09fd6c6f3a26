//! The plan: what befalls whom, when and for how long, all from one seed. What comes of it, real processes decide.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::random::Random;

/// Members of the Postgres cluster, and of etcd.
pub(super) const MEMBERS: usize = 3;

/// One fault in so many may befall a member beside another.
const TOGETHER_ONE_IN: u64 = 4;

/// From one fault to the next, in milliseconds.
const PAUSE_MS: (u64, u64) = (300, 6_000);

/// What befalls the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// A bot is killed, and started again after a while
    BotKilled,
    /// A bot stands still for a while
    BotFrozen,
    /// A bot is asked to stop, and started again
    BotRestarted,
    /// A guard is killed
    GuardKilled,
    /// A guard stands still for a while
    GuardFrozen,
    /// A postmaster is killed
    ServerKilled,
    /// A postmaster stands still for a while; its sessions go on
    ServerFrozen,
    /// Bot, guard and server are killed at once
    NodeLost,
    /// Bot, guard and server stand still for a while
    NodeFrozen,
    /// A member of etcd is killed, and started again
    EtcdKilled,
    /// All of etcd stands still for a while
    EtcdFrozen,
    /// A member of etcd stands still for a while: its connections stay open, and the others go on
    EtcdMemberFrozen,
    /// All but one of etcd's members are killed, and started again
    EtcdQuorumLost,
    /// All of etcd answers slowly for a while: it stands still most of the time
    EtcdSlow,
    /// A node hears from nobody and nobody hears from it, but for the clients
    NodeCutOff,
    /// A node and etcd do not hear from each other; the nodes do
    NodeCutFromEtcd,
    /// A node and the other nodes do not hear from each other; etcd hears all
    NodeCutFromNodes,
    /// Nothing gets from one of all nodes and etcd members to another; the way back is open
    OneWayCut,
    /// A member of etcd hears from nobody and nobody hears from it
    EtcdMemberCutOff,
    /// What a node sends and is sent is lost in part
    NodeLossy,
    /// A node's disk is full for a while
    DiskFull,
    /// A node's disk takes no write for a while
    DiskStalled,
    /// A node's disk takes a few writes a second for a while
    DiskSlow,
    /// An operator asks for a switchover
    Switchover,
    /// An operator restarts a server
    ServerRestarted,
    /// An operator has a replica made anew
    Reinitialized,
}

/// What a fault needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    Network,
    Disk,
    SlowDisk,
}

/// One thing that is to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// When, from the beginning on.
    pub at: Duration,
    /// What.
    pub fault: Fault,
    /// For how long, where it ends.
    pub length: Duration,
    /// To whom, if not to the leader.
    pub member: usize,
    /// To the leader, if there is one: there it hurts.
    pub to_leader: bool,
    /// Whom else it takes, where it takes two.
    pub other: usize,
    /// It may befall a member that another fault has befallen, where the two go together.
    pub together: bool,
}

impl Fault {
    /// How long it lasts, in milliseconds; nothing for what does not end.
    const fn span_ms(self) -> (u64, u64) {
        match self {
            Self::BotKilled => (50, 12_000),
            Self::BotFrozen | Self::NodeLost => (200, 15_000),
            Self::BotRestarted => (10, 3_000),
            Self::GuardFrozen | Self::ServerFrozen | Self::EtcdKilled | Self::EtcdSlow => (50, 8_000),
            Self::EtcdFrozen | Self::EtcdMemberFrozen | Self::EtcdQuorumLost | Self::EtcdMemberCutOff => (50, 9_000),
            Self::NodeFrozen | Self::NodeCutOff | Self::NodeCutFromEtcd | Self::NodeCutFromNodes => (200, 15_000),
            Self::OneWayCut | Self::NodeLossy | Self::DiskFull | Self::DiskSlow => (200, 12_000),
            Self::DiskStalled => (50, 10_000),
            Self::GuardKilled | Self::ServerKilled | Self::Switchover | Self::ServerRestarted | Self::Reinitialized => {
                (0, 0)
            }
        }
    }

    /// Whether it may befall a member that `standing` has befallen. Never so that nobody is left to stop a server in time, neither bot nor
    /// guard nor a disk that lets processes die: that is nobody's promise.
    pub(super) const fn goes_with(self, standing: Self) -> bool {
        use Fault::{
            BotFrozen, BotKilled, BotRestarted, DiskFull, DiskSlow, DiskStalled, GuardFrozen, GuardKilled, NodeFrozen,
            NodeLost, ServerFrozen, ServerKilled,
        };
        matches!(
            (standing, self),
            (BotKilled | BotFrozen | BotRestarted, GuardKilled | ServerKilled | ServerFrozen | DiskFull | DiskSlow)
                | (NodeLost, DiskFull | DiskSlow)
                | (NodeFrozen, GuardKilled | ServerKilled | DiskFull | DiskSlow)
                | (GuardFrozen, GuardKilled | ServerKilled | DiskFull | DiskSlow)
                | (
                    ServerFrozen,
                    BotKilled | BotFrozen | GuardKilled | ServerKilled | DiskFull | DiskSlow | DiskStalled
                )
                | (
                    DiskFull | DiskSlow,
                    BotKilled
                        | BotFrozen
                        | NodeLost
                        | NodeFrozen
                        | GuardKilled
                        | GuardFrozen
                        | ServerKilled
                        | ServerFrozen
                )
                | (DiskStalled, GuardKilled | ServerKilled | ServerFrozen)
        )
    }

    pub(super) const fn need(self) -> Need {
        match self {
            Self::NodeCutOff
            | Self::NodeCutFromEtcd
            | Self::NodeCutFromNodes
            | Self::OneWayCut
            | Self::EtcdMemberCutOff
            | Self::NodeLossy => Need::Network,
            Self::DiskFull | Self::DiskStalled => Need::Disk,
            Self::DiskSlow => Need::SlowDisk,
            Self::BotKilled
            | Self::BotFrozen
            | Self::BotRestarted
            | Self::GuardKilled
            | Self::GuardFrozen
            | Self::ServerKilled
            | Self::ServerFrozen
            | Self::NodeLost
            | Self::NodeFrozen
            | Self::EtcdKilled
            | Self::EtcdFrozen
            | Self::EtcdMemberFrozen
            | Self::EtcdQuorumLost
            | Self::EtcdSlow
            | Self::Switchover
            | Self::ServerRestarted
            | Self::Reinitialized => Need::Nothing,
        }
    }
}

/// What is to happen within `whole`, out of `faults`.
#[must_use]
pub fn plan(seed: u64, whole: Duration, faults: &[Fault]) -> Vec<Planned> {
    let mut random = Random::new(seed);
    let mut at = Duration::ZERO;
    let mut plan = Vec::new();
    while at < whole
        && let Some(fault) = faults.get(random.index(faults.len())).copied()
    {
        let length = random.pause(fault.span_ms());
        let (member, other) = (random.index(MEMBERS), random.index(2 * MEMBERS));
        let to_leader = random.next().is_multiple_of(2);
        let together = random.next().is_multiple_of(TOGETHER_ONE_IN);
        plan.push(Planned { at, fault, length, member, to_leader, other, together });
        at += Duration::from_millis(random.between(PAUSE_MS));
    }
    plan
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use clap::ValueEnum;

    use super::{Fault, plan};

    #[test]
    fn no_two_faults_leave_a_server_to_itself() {
        let faults = Fault::value_variants();
        let no_bot = [Fault::BotKilled, Fault::BotFrozen, Fault::BotRestarted, Fault::NodeFrozen];
        assert!(
            no_bot.iter().all(|fault| !fault.goes_with(Fault::GuardFrozen) && !Fault::GuardFrozen.goes_with(*fault))
        );
        assert!(faults.iter().all(|fault| !fault.goes_with(*fault)), "one place is not taken twice");
        assert!(faults.iter().any(|fault| fault.goes_with(Fault::DiskFull)));
    }

    #[test]
    fn a_seed_gives_one_plan_and_in_time_every_fault() {
        let whole = Duration::from_secs(1_800);
        let faults = Fault::value_variants();
        let one = plan(7, whole, faults);
        assert_eq!(one, plan(7, whole, faults));
        assert_ne!(one, plan(8, whole, faults));
        assert_eq!(one.iter().map(|planned| planned.fault).collect::<BTreeSet<_>>().len(), faults.len());
        assert!(one.iter().all(|planned| planned.at < whole && planned.length <= Duration::from_secs(15)));
        assert!(plan(7, whole, &[]).is_empty());
    }
}
