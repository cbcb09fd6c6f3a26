//! Doing what is planned, as far as the fleet is in a state for it, and mending it when its time is over.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::Signal;
use tokio::task::AbortHandle;

use super::plan::{Fault, MEMBERS, Need, Planned};
use crate::{
    Fleet,
    disk::Disk,
    etcd::member_name,
    fleet::MAIN,
    network::{Network, Way, between},
    process::{Process, signal_pid},
    wait::millis,
};

/// Who leads is asked for this long: the plan does not wait for an etcd that is away.
const LOOK_DEADLINE: Duration = Duration::from_millis(300);

/// A slow etcd stands still for the first and goes on for the second, again and again.
const SLOW_ETCD: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(40));

/// A slow disk takes so many writes a second: each commit waits for several of them.
const SLOW_DISK_WRITES: u32 = 10;

/// The faults as they befall a fleet.
pub(super) struct Deeds<'f> {
    pub(super) fleet: &'f mut Fleet,
    due: Vec<Due>,
    /// What has befallen each member and is not mended yet: one fault, seldom two.
    standing: Vec<Vec<Fault>>,
    etcd_busy: bool,
    network_busy: bool,
    /// How often each was done.
    pub(super) done: BTreeMap<Fault, u64>,
    /// How often each was not, for its place was taken by another.
    pub(super) skipped: u64,
    /// What operators have asked for; nobody waits for them.
    operators: Vec<Process>,
    /// Data directories that bots have put aside and an operator has deleted.
    pub(super) deleted_asides: u64,
}

/// A fault that will be mended.
#[derive(Debug)]
struct Due {
    at: Instant,
    fault: Fault,
    mend: Mend,
}

/// What mends a fault.
#[derive(Debug)]
enum Mend {
    Start(usize),
    Thaw(usize),
    /// Processes of this member, which may be gone by then.
    Continue(usize, Vec<u32>),
    StartEtcd(Vec<usize>),
    ThawEtcd,
    QuickenEtcd(AbortHandle),
    Open(Vec<Way>),
    Keep(Vec<Way>),
    Free(usize),
    GoOn(usize),
    Quicken(usize),
}

impl Mend {
    /// The member that it frees, if it is one's.
    const fn member(&self) -> Option<usize> {
        match self {
            Self::Start(member)
            | Self::Thaw(member)
            | Self::Continue(member, _)
            | Self::Free(member)
            | Self::GoOn(member)
            | Self::Quicken(member) => Some(*member),
            Self::StartEtcd(_) | Self::ThawEtcd | Self::QuickenEtcd(_) | Self::Open(_) | Self::Keep(_) => None,
        }
    }
}

impl<'f> Deeds<'f> {
    pub(super) fn new(fleet: &'f mut Fleet) -> Self {
        Self {
            fleet,
            due: Vec::new(),
            standing: vec![Vec::new(); MEMBERS],
            etcd_busy: false,
            network_busy: false,
            done: BTreeMap::new(),
            skipped: 0,
            operators: Vec::new(),
            deleted_asides: 0,
        }
    }

    /// Whether this machine can do it at all.
    pub(super) fn can(fleet: &Fleet, fault: Fault) -> bool {
        let disks = || fleet.postgres.iter().map(|node| fleet.ground.disk(&node.bot.name));
        match fault.need() {
            Need::Nothing => true,
            Need::Network => fleet.ground.network().is_some(),
            Need::Disk => disks().all(|disk| disk.is_some()),
            Need::SlowDisk => disks().all(|disk| disk.is_some_and(|disk| disk.group().is_some())),
        }
    }

    /// When the next fault is to be mended.
    pub(super) fn next_mend(&self) -> Option<Instant> {
        self.due.iter().map(|due| due.at).min()
    }

    /// Does it, if its place is free; says what was done.
    pub(super) async fn befall(&mut self, planned: Planned) -> Result<Option<String>> {
        tokio::task::block_in_place(|| self.delete_asides())?;
        let member = if planned.to_leader { self.leader().await.unwrap_or(planned.member) } else { planned.member };
        let did = tokio::task::block_in_place(|| self.befall_member(planned, member))?;
        match &did {
            Some(_) => *self.done.entry(planned.fault).or_default() += 1,
            None => self.skipped += 1,
        }
        Ok(did)
    }

    fn befall_member(&mut self, planned: Planned, member: usize) -> Result<Option<String>> {
        let name = self.fleet.postgres[member].bot.name.clone();
        let lasting =
            if planned.length.is_zero() { String::new() } else { format!(", for {} ms", millis(planned.length)) };
        let did = match planned.fault {
            Fault::BotKilled
            | Fault::BotFrozen
            | Fault::BotRestarted
            | Fault::GuardKilled
            | Fault::GuardFrozen
            | Fault::ServerKilled
            | Fault::ServerFrozen
            | Fault::NodeLost
            | Fault::NodeFrozen => self.befall_processes(planned, member)?.then(|| format!("{name}{lasting}")),
            Fault::EtcdKilled
            | Fault::EtcdFrozen
            | Fault::EtcdMemberFrozen
            | Fault::EtcdQuorumLost
            | Fault::EtcdSlow => self.befall_etcd(planned).map(|who| format!("{who}{lasting}")),
            Fault::NodeCutOff
            | Fault::NodeCutFromEtcd
            | Fault::NodeCutFromNodes
            | Fault::OneWayCut
            | Fault::EtcdMemberCutOff
            | Fault::NodeLossy => self.befall_network(planned, &name)?.map(|who| format!("{who}{lasting}")),
            Fault::DiskFull | Fault::DiskStalled | Fault::DiskSlow => {
                self.befall_disk(planned, member)?.then(|| format!("{name}{lasting}"))
            }
            Fault::Switchover => self.ask(&["switchover", MAIN, "--force"])?,
            Fault::ServerRestarted => self.ask(&["restart", &format!("{MAIN}/{name}"), "--force"])?,
            Fault::Reinitialized => self.ask(&["reinit", &format!("{MAIN}/{name}"), "--force"])?,
        };
        Ok(did)
    }

    /// Whether a fault may befall a member beside what stands there.
    fn is_free(&self, planned: Planned, member: usize) -> bool {
        match self.standing[member].as_slice() {
            [] => true,
            [standing] => planned.together && planned.fault.goes_with(*standing),
            _two => false,
        }
    }

    fn befall_processes(&mut self, planned: Planned, member: usize) -> Result<bool> {
        if !self.is_free(planned, member) {
            return Ok(false);
        }
        let node = &mut self.fleet.postgres[member];
        let freeze = |pid: u32| {
            signal_pid(pid, Signal::STOP);
            Mend::Continue(member, vec![pid])
        };
        let kill = |pid: Option<u32>| pid.inspect(|pid| signal_pid(*pid, Signal::KILL)).is_some();
        let mend = match planned.fault {
            Fault::GuardKilled => return Ok(kill(node.guard())),
            Fault::ServerKilled => return Ok(kill(node.postmaster())),
            Fault::GuardFrozen => node.guard().map(freeze),
            Fault::ServerFrozen => node.postmaster().map(freeze),
            Fault::BotFrozen => {
                node.bot.freeze()?;
                Some(Mend::Thaw(member))
            }
            Fault::NodeFrozen => Some(Mend::Continue(member, node.freeze_node()?)),
            Fault::BotRestarted => {
                node.bot.stop();
                Some(Mend::Start(member))
            }
            Fault::NodeLost => {
                node.kill_node();
                Some(Mend::Start(member))
            }
            _killed => {
                node.bot.kill();
                Some(Mend::Start(member))
            }
        };
        Ok(self.later(planned, mend))
    }

    fn befall_etcd(&mut self, planned: Planned) -> Option<String> {
        if std::mem::replace(&mut self.etcd_busy, true) {
            return None;
        }
        let etcd = &mut self.fleet.etcd;
        let one = planned.member;
        let (who, mend) = match planned.fault {
            Fault::EtcdKilled | Fault::EtcdQuorumLost => {
                let spared = |index: &usize| (*index == one) == (planned.fault == Fault::EtcdKilled);
                let killed: Vec<usize> = (0..MEMBERS).filter(spared).collect();
                killed.iter().for_each(|index| etcd.kill_member(*index));
                let who = killed.iter().map(|index| member_name(*index)).collect::<Vec<_>>().join(" and ");
                (who, Mend::StartEtcd(killed))
            }
            Fault::EtcdSlow => {
                let all = etcd.processes();
                let slowing = tokio::spawn(async move {
                    loop {
                        all.iter().for_each(|pid| signal_pid(*pid, Signal::STOP));
                        tokio::time::sleep(SLOW_ETCD.0).await;
                        all.iter().for_each(|pid| signal_pid(*pid, Signal::CONT));
                        tokio::time::sleep(SLOW_ETCD.1).await;
                    }
                });
                (String::from("all of it"), Mend::QuickenEtcd(slowing.abort_handle()))
            }
            Fault::EtcdMemberFrozen => {
                etcd.freeze_member(one);
                (member_name(one), Mend::ThawEtcd)
            }
            _frozen => {
                etcd.freeze();
                (String::from("all of it"), Mend::ThawEtcd)
            }
        };
        self.later(planned, Some(mend)).then_some(who)
    }

    fn befall_network(&mut self, planned: Planned, name: &str) -> Result<Option<String>> {
        let Some(network) = self.fleet.ground.network() else { return Ok(None) };
        if std::mem::replace(&mut self.network_busy, true) {
            return Ok(None);
        }
        let nodes: Vec<String> = self.fleet.postgres.iter().map(|node| node.bot.name.clone()).collect();
        let etcd: Vec<String> = (0..MEMBERS).map(member_name).collect();
        let all = [nodes.clone(), etcd.clone()].concat();
        let node = [name.to_owned()];
        let of_etcd = [member_name(planned.other % MEMBERS)];
        let (who, ways) = match planned.fault {
            Fault::NodeCutFromEtcd => (format!("{name} and etcd"), between(&node, &etcd)),
            Fault::NodeCutFromNodes => (format!("{name} and the other nodes"), between(&node, &nodes)),
            Fault::EtcdMemberCutOff => (of_etcd[0].clone(), between(&of_etcd, &all)),
            Fault::OneWayCut => {
                let other = all.iter().filter(|other| *other != name).cycle().nth(planned.other);
                let other = other.context("there are other nodes")?.clone();
                // From the leader and to it: which of both, the plan has no figure of its own for.
                let from_it = planned.member.is_multiple_of(2);
                let (from, to) = if from_it { (name.to_owned(), other) } else { (other, name.to_owned()) };
                (format!("{from} to {to}"), vec![Way { from, to }])
            }
            _all_of_it => (name.to_owned(), between(&node, &all)),
        };
        let mend = if planned.fault == Fault::NodeLossy {
            network.lose(&ways)?;
            Mend::Keep(ways)
        } else {
            network.cut(&ways)?;
            Mend::Open(ways)
        };
        Ok(self.later(planned, Some(mend)).then_some(who))
    }

    fn befall_disk(&mut self, planned: Planned, member: usize) -> Result<bool> {
        let Some(disk) = self.disk(member).filter(|_| self.is_free(planned, member)) else { return Ok(false) };
        let mend = match planned.fault {
            Fault::DiskFull => {
                disk.fill()?;
                Mend::Free(member)
            }
            Fault::DiskStalled => {
                disk.stall()?;
                Mend::GoOn(member)
            }
            _slow => {
                disk.limit(SLOW_DISK_WRITES)?;
                Mend::Quicken(member)
            }
        };
        Ok(self.later(planned, Some(mend)))
    }

    fn ask(&mut self, args: &[&str]) -> Result<Option<String>> {
        let botctl = self.fleet.operator()?.args(args.iter().copied());
        self.operators.retain_mut(|operator| operator.exit().is_none());
        self.operators.push(botctl.start(self.fleet.logs())?);
        Ok(Some(format!("botctl {}", args.join(" "))))
    }

    async fn leader(&self) -> Option<usize> {
        let look = tokio::time::timeout(LOOK_DEADLINE, self.fleet.store.look(MAIN)).await;
        let leader = look.ok()?.ok()?.leader()?.to_owned();
        self.fleet.postgres.iter().position(|node| node.bot.name == leader)
    }

    fn later(&mut self, planned: Planned, mend: Option<Mend>) -> bool {
        let Some(mend) = mend else { return false };
        if let Some(member) = mend.member() {
            self.standing[member].push(planned.fault);
        }
        self.due.push(Due { at: Instant::now() + planned.length, fault: planned.fault, mend });
        true
    }

    /// Mends what is due.
    pub(super) fn mend_due(&mut self) -> Result<()> {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.due).into_iter().partition(|due| due.at <= now);
        self.due = later;
        self.mend(due)
    }

    /// Mends everything; operators do not wait any longer.
    pub(super) fn mend_all(&mut self) -> Result<()> {
        let due = std::mem::take(&mut self.due);
        self.operators.clear();
        self.mend(due)?;
        tokio::task::block_in_place(|| self.delete_asides())
    }

    /// A bot keeps a few data directories that it could not rewind, and then asks an operator to look at them and to delete them. Here
    /// that is done at once, but on a disk that may stand still.
    fn delete_asides(&mut self) -> Result<()> {
        for (node, standing) in self.fleet.postgres.iter().zip(&self.standing) {
            if !standing.is_empty() {
                continue;
            }
            let (folder, name) = (node.data_dir.parent(), node.data_dir.file_name());
            let (folder, name) = folder.zip(name).context("a data directory in a folder")?;
            let prefix = format!("{}.diverged", name.to_string_lossy());
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with(&prefix) {
                    fs::remove_dir_all(entry.path())?;
                    self.deleted_asides += 1;
                }
            }
        }
        Ok(())
    }

    fn mend(&mut self, due: Vec<Due>) -> Result<()> {
        tokio::task::block_in_place(|| due.into_iter().try_for_each(|due| self.mend_one(due)))
    }

    fn mend_one(&mut self, due: Due) -> Result<()> {
        if let Some(member) = due.mend.member() {
            self.standing[member].retain(|fault| *fault != due.fault);
        }
        match due.mend {
            Mend::Start(member) => self.fleet.postgres[member].bot.start()?,
            Mend::Thaw(member) => self.fleet.postgres[member].bot.thaw()?,
            Mend::Continue(_member, pids) => {
                // The server first, which is the worst that can be.
                pids.iter().rev().for_each(|pid| signal_pid(*pid, Signal::CONT));
            }
            Mend::StartEtcd(members) => {
                self.etcd_busy = false;
                members.into_iter().try_for_each(|index| self.fleet.etcd.start_member(index))?;
            }
            Mend::ThawEtcd => {
                self.etcd_busy = false;
                self.fleet.etcd.thaw();
            }
            Mend::QuickenEtcd(slowing) => {
                self.etcd_busy = false;
                slowing.abort();
                self.fleet.etcd.thaw();
            }
            Mend::Open(ways) => {
                self.network_busy = false;
                self.network()?.open(&ways)?;
            }
            Mend::Keep(ways) => {
                self.network_busy = false;
                self.network()?.keep(&ways)?;
            }
            Mend::Free(member) => self.disk(member).context("a disk")?.free()?,
            Mend::GoOn(member) => self.disk(member).context("a disk")?.go_on()?,
            Mend::Quicken(member) => self.disk(member).context("a disk")?.limit(0)?,
        }
        Ok(())
    }

    fn network(&self) -> Result<&Network> {
        self.fleet.ground.network().context("a network")
    }

    fn disk(&self, member: usize) -> Option<&Disk> {
        self.fleet.ground.disk(&self.fleet.postgres[member].bot.name)
    }
}
