//! The rows of the table: what is done to a cluster, what it is set to for that, and what of its client's figures counts.

use std::{fmt, time::Duration};

use clap::{ValueEnum, builder::PossibleValue};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How long a keeper stands still: longer than any of the leases.
pub(crate) const KEEPER_FROZEN: Duration = Duration::from_secs(60);

/// How long a whole node stands still: longer than any of the leases, too.
pub(crate) const NODE_FROZEN: Duration = Duration::from_secs(45);

/// How long etcd is away: longer than any of the leases.
pub(crate) const ETCD_DOWN: Duration = Duration::from_secs(40);

/// After this a supervisor has started a killed keeper again: systemd's default.
pub(crate) const SUPERVISOR_PAUSE: Duration = Duration::from_millis(100);

/// What is done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Fault {
    /// The primary's postmaster is killed; the cluster is asynchronous, so it is to come back in place
    ServerKilled,
    /// The same in a synchronous cluster that is told to fail over at once
    ServerLost,
    /// An operator asks for another primary
    Switchover,
    /// The primary's keeper and all processes of its Postgres are killed at once
    NodeLost,
    /// The same in a cluster whose commits wait for a quorum
    NodeLostQuorum,
    /// The same, but the node falls silent and closes no connection, as a machine without power
    NodeSilentQuorum,
    /// The primary's keeper alone is killed, and started again as a supervisor does
    KeeperRestarted,
    /// The primary's keeper alone is killed, and not started again
    KeeperKilled,
    /// The primary's keeper alone stands still for a minute
    KeeperFrozen,
    /// The primary's keeper and all processes of its Postgres stand still for 45 s, and go on
    NodeFrozen,
    /// All of etcd is away for 40 s
    EtcdDown,
    /// The same with failsafe mode
    EtcdDownFailsafe,
    /// The same with failsafe mode, and the node of a replica is lost with etcd
    EtcdDownFailsafeTwo,
}

/// A row of the table: a fault, or what a cluster costs without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Row {
    /// Nothing is done
    Idle,
    /// See [`Fault`]
    Fault(Fault),
}

/// What of a round is the row's figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Measure {
    /// The longest time without an acknowledged write
    Gap,
    /// For how long two members acknowledged writes
    Both,
}

/// All rows, in the order of the table.
const ROWS: [Row; 14] = [
    Row::Fault(Fault::ServerKilled),
    Row::Fault(Fault::ServerLost),
    Row::Fault(Fault::Switchover),
    Row::Fault(Fault::NodeLost),
    Row::Fault(Fault::NodeLostQuorum),
    Row::Fault(Fault::NodeSilentQuorum),
    Row::Fault(Fault::KeeperRestarted),
    Row::Fault(Fault::KeeperKilled),
    Row::Fault(Fault::KeeperFrozen),
    Row::Fault(Fault::NodeFrozen),
    Row::Fault(Fault::EtcdDown),
    Row::Fault(Fault::EtcdDownFailsafe),
    Row::Fault(Fault::EtcdDownFailsafeTwo),
    Row::Idle,
];

impl ValueEnum for Row {
    fn value_variants<'a>() -> &'a [Self] {
        &ROWS
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Idle => Some(PossibleValue::new("idle").help("Nothing is done: what the keepers cost")),
            Self::Fault(fault) => fault.to_possible_value(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ServerKilled => "postmaster killed",
            Self::ServerLost => "postmaster killed, synchronous, fail over",
            Self::Switchover => "switchover",
            Self::NodeLost => "node lost",
            Self::NodeLostQuorum => "node lost, quorum commit",
            Self::NodeSilentQuorum => "node silent, quorum commit",
            Self::KeeperRestarted => "bot killed and restarted",
            Self::KeeperKilled => "bot killed, not restarted",
            Self::KeeperFrozen => "bot frozen 60 s",
            Self::NodeFrozen => "node frozen 45 s, thawed",
            Self::EtcdDown => "etcd down 40 s",
            Self::EtcdDownFailsafe => "etcd down 40 s, failsafe",
            Self::EtcdDownFailsafeTwo => "etcd down 40 s, failsafe, replica lost",
        })
    }
}

impl Fault {
    /// Whether there is much waiting in it. The clusters can wait together: nearly nothing happens meanwhile.
    pub(crate) const fn waits(self) -> bool {
        match self {
            Self::ServerKilled | Self::ServerLost | Self::Switchover => false,
            Self::NodeLost
            | Self::NodeLostQuorum
            | Self::NodeSilentQuorum
            | Self::KeeperRestarted
            | Self::KeeperKilled
            | Self::KeeperFrozen
            | Self::NodeFrozen
            | Self::EtcdDown
            | Self::EtcdDownFailsafe
            | Self::EtcdDownFailsafeTwo => true,
        }
    }

    /// What the row shows.
    pub(crate) const fn measure(self) -> Measure {
        match self {
            Self::KeeperKilled | Self::KeeperFrozen | Self::NodeFrozen => Measure::Both,
            Self::ServerKilled
            | Self::ServerLost
            | Self::Switchover
            | Self::NodeLost
            | Self::NodeLostQuorum
            | Self::NodeSilentQuorum
            | Self::KeeperRestarted
            | Self::EtcdDown
            | Self::EtcdDownFailsafe
            | Self::EtcdDownFailsafeTwo => Measure::Gap,
        }
    }

    /// What the cluster's configuration has for it, beyond what it began with.
    pub(crate) fn settings(self) -> Settings {
        match self {
            Self::ServerLost => Settings { synchronous: Some("on"), fail_over_at_once: true, ..Settings::default() },
            Self::NodeLostQuorum | Self::NodeSilentQuorum => {
                Settings { synchronous: Some("quorum"), takeover: true, ..Settings::default() }
            }
            Self::EtcdDownFailsafe | Self::EtcdDownFailsafeTwo => Settings { failsafe: true, ..Settings::default() },
            Self::ServerKilled
            | Self::Switchover
            | Self::NodeLost
            | Self::KeeperRestarted
            | Self::KeeperKilled
            | Self::KeeperFrozen
            | Self::NodeFrozen
            | Self::EtcdDown => Settings::default(),
        }
    }
}

/// What a row needs of the cluster's configuration. The names and values are Patroni's, which our bots read, too; `takeover`
/// is ours, and nothing to Patroni.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Settings {
    pub(crate) synchronous: Option<&'static str>,
    pub(crate) fail_over_at_once: bool,
    pub(crate) failsafe: bool,
    pub(crate) takeover: bool,
}

impl Settings {
    /// What `PATCH /config` makes the configuration say so by: what is not wanted is taken away.
    pub(crate) fn patch(self) -> Value {
        let at_once = self.fail_over_at_once.then_some(0);
        let failsafe = self.failsafe.then_some(true);
        let takeover = self.takeover.then_some(true);
        json!({
            "synchronous_mode": self.synchronous,
            "primary_start_timeout": at_once,
            "failsafe_mode": failsafe,
            "takeover": takeover,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::{Fault, Row};

    #[test]
    fn every_fault_has_a_row() {
        for fault in Fault::value_variants() {
            assert!(Row::value_variants().contains(&Row::Fault(*fault)), "{fault:?}");
        }
    }
}
