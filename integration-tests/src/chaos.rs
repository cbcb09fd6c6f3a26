//! Chaos on real processes: from one seed, bots, guards, servers and etcd are killed and frozen, and switchovers asked for,
//! while a client writes to every member all the time. Then all is mended, and what was acknowledged is looked at.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde::Serialize;

use crate::{
    Fleet,
    fleet::MAIN,
    process::{Process, Program, signal_pid, workspace_binary},
    wait::millis,
    writers::{Acknowledged, Writers, longest_gap, lost, two_writable},
};

/// Members of the Postgres cluster, and of etcd.
const MEMBERS: usize = 3;

/// How long the cluster may take to come up, and to come to rest once all is mended: a back-off may reach half a minute,
/// and a member may need a rewind and a new copy.
const SETTLE_DEADLINE: Duration = Duration::from_secs(150);

/// From one fault to the next, in milliseconds.
const PAUSE_MS: (u64, u64) = (300, 6_000);

/// What befalls the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// A bot is killed, and started again after a while.
    BotKilled,
    /// A bot stands still for a while.
    BotFrozen,
    /// A bot is asked to stop, and started again.
    BotRestarted,
    /// A guard is killed.
    GuardKilled,
    /// A guard stands still for a while.
    GuardFrozen,
    /// A postmaster is killed.
    ServerKilled,
    /// A postmaster stands still for a while; its sessions go on.
    ServerFrozen,
    /// Bot, guard and server are killed at once.
    NodeLost,
    /// A member of etcd is killed, and started again.
    EtcdKilled,
    /// All of etcd stands still for a while.
    EtcdFrozen,
    /// An operator asks for a switchover.
    Switchover,
}

impl Fault {
    const ALL: [Self; 11] = [
        Self::BotKilled,
        Self::BotFrozen,
        Self::BotRestarted,
        Self::GuardKilled,
        Self::GuardFrozen,
        Self::ServerKilled,
        Self::ServerFrozen,
        Self::NodeLost,
        Self::EtcdKilled,
        Self::EtcdFrozen,
        Self::Switchover,
    ];
}

/// What mends a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mend {
    Start(usize),
    Thaw(usize),
    /// A guard or a server of this member; the process may be gone by then.
    Continue(usize, u32),
    StartEtcd(usize),
    ThawEtcd,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// How long faults befell the fleet, in seconds.
    pub seconds: u64,
    /// How often each did.
    pub faults: BTreeMap<Fault, u64>,
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Acknowledged writes that are gone. Replication is asynchronous: a failover may lose the last ones.
    pub lost: usize,
    /// How often another member became primary.
    pub terms: usize,
    /// For how long two members took writes at one time.
    pub two_writable_ms: u64,
    /// The longest time in which nobody took a write.
    pub longest_gap_ms: u64,
    /// From the last mend to a cluster at rest.
    pub settled_ms: u64,
    /// What the bots have logged as errors.
    pub errors: Vec<String>,
}

impl Outcome {
    /// Whether what must hold has held.
    ///
    /// # Errors
    /// What has not.
    pub fn check(&self) -> Result<()> {
        let both = self.two_writable_ms;
        ensure!(both == 0, "two members took writes at one time, for {both} ms");
        ensure!(self.errors.is_empty(), "errors were logged:\n{}", self.errors.join("\n"));
        Ok(())
    }
}

/// SplitMix64: small, and the same everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    const fn between(&mut self, (low, high): (u64, u64)) -> u64 {
        low + self.next() % (high - low + 1)
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(len).unwrap_or(1)).unwrap_or(0)
    }

    /// Most pauses are short, some are long.
    fn pause(&mut self, low: u64, high: u64) -> Duration {
        let high = if self.next().is_multiple_of(2) { low + (high - low) / 5 } else { high };
        Duration::from_millis(self.between((low, high)))
    }
}

struct Chaos {
    fleet: Fleet,
    random: Random,
    due: Vec<(Instant, Mend)>,
    /// Members with a fault that is not mended yet: one at a time.
    busy: Vec<bool>,
    etcd_busy: bool,
    faults: BTreeMap<Fault, u64>,
    /// What operators have asked for; nobody waits for them.
    operators: Vec<Process>,
}

/// Lets faults befall a fleet for `length`; `say` is told each.
///
/// # Errors
/// If the fleet does not come up, or does not come to rest.
pub async fn run(seed: u64, length: Duration, mut say: impl FnMut(&str)) -> Result<Outcome> {
    let mut fleet = Fleet::with_etcd(MEMBERS).await?;
    fleet.add_postgres(MEMBERS)?;
    fleet.postgres_up(SETTLE_DEADLINE).await?;
    let writers = Writers::start(&fleet.superuser(), SETTLE_DEADLINE).await?;
    let mut chaos = Chaos {
        fleet,
        random: Random(seed),
        due: Vec::new(),
        busy: vec![false; MEMBERS],
        etcd_busy: false,
        faults: BTreeMap::new(),
        operators: Vec::new(),
    };
    let began = Instant::now();
    let mut next = began;
    while began.elapsed() < length {
        let until = chaos.due.iter().map(|(at, _)| *at).chain([next, began + length]).min().unwrap_or(next);
        tokio::time::sleep_until(until.into()).await;
        chaos.mend_due(Instant::now())?;
        if Instant::now() >= next {
            let fault = Fault::ALL[chaos.random.index(Fault::ALL.len())];
            if let Some(what) = chaos.befall(fault).await? {
                *chaos.faults.entry(fault).or_default() += 1;
                say(&format!("{:6.1} s  {fault:?}: {what}", began.elapsed().as_secs_f64()));
            }
            next = Instant::now() + Duration::from_millis(chaos.random.between(PAUSE_MS));
        }
    }
    chaos.mend_all()?;
    say("all is mended");
    let mended = (Instant::now(), writers.now());
    let Chaos { mut fleet, faults, operators, .. } = chaos;
    drop(operators);
    fleet.postgres_up(SETTLE_DEADLINE).await.context("the cluster comes to rest")?;
    let settled = mended.0.elapsed();
    writers.acknowledged_by(None, writers.now(), SETTLE_DEADLINE).await?;
    let acknowledged = writers.finish().await?;
    let outcome = Outcome {
        seed,
        seconds: length.as_secs(),
        faults,
        acknowledged: acknowledged.len(),
        lost: lost(&fleet.superuser(), &acknowledged).await?,
        terms: terms(&acknowledged),
        two_writable_ms: millis(two_writable(&acknowledged)),
        longest_gap_ms: millis(longest_gap(&acknowledged, Duration::ZERO)),
        settled_ms: millis(settled),
        errors: errors(&fleet),
    };
    if outcome.check().is_err() {
        say(&format!("logs are kept in {}", fleet.keep_logs().display()));
    }
    fleet.stop().await?;
    Ok(outcome)
}

impl Chaos {
    /// Does it, if the fleet is in a state for it; says what was done.
    async fn befall(&mut self, fault: Fault) -> Result<Option<String>> {
        let member = self.victim().await;
        if self.busy[member] && !matches!(fault, Fault::EtcdKilled | Fault::EtcdFrozen | Fault::Switchover) {
            return Ok(None);
        }
        let node = &mut self.fleet.postgres[member];
        let name = node.bot.name.clone();
        let pause = match fault {
            Fault::BotKilled => {
                node.bot.kill();
                self.later(Mend::Start(member), (50, 12_000))
            }
            Fault::BotFrozen => {
                node.bot.freeze()?;
                self.later(Mend::Thaw(member), (50, 15_000))
            }
            Fault::BotRestarted => {
                node.bot.stop();
                self.later(Mend::Start(member), (10, 3_000))
            }
            Fault::GuardKilled => {
                let Some(guard) = node.guard() else { return Ok(None) };
                signal_pid(guard, Signal::KILL);
                return Ok(Some(name));
            }
            Fault::GuardFrozen => {
                let Some(guard) = node.guard() else { return Ok(None) };
                signal_pid(guard, Signal::STOP);
                self.later(Mend::Continue(member, guard), (50, 8_000))
            }
            Fault::ServerKilled => {
                let Some(server) = node.postmaster() else { return Ok(None) };
                signal_pid(server, Signal::KILL);
                return Ok(Some(name));
            }
            Fault::ServerFrozen => {
                let Some(server) = node.postmaster() else { return Ok(None) };
                signal_pid(server, Signal::STOP);
                self.later(Mend::Continue(member, server), (50, 8_000))
            }
            Fault::NodeLost => {
                node.kill_node();
                self.later(Mend::Start(member), (200, 15_000))
            }
            Fault::EtcdKilled | Fault::EtcdFrozen if self.etcd_busy => return Ok(None),
            Fault::EtcdKilled => {
                self.fleet.etcd.kill_member(member);
                self.etcd_busy = true;
                let pause = self.later(Mend::StartEtcd(member), (200, 8_000));
                return Ok(Some(format!("etcd-{}, for {} ms", member + 1, millis(pause))));
            }
            Fault::EtcdFrozen => {
                self.fleet.etcd.freeze();
                self.etcd_busy = true;
                let pause = self.later(Mend::ThawEtcd, (50, 9_000));
                return Ok(Some(format!("all of it, for {} ms", millis(pause))));
            }
            Fault::Switchover => {
                let botctl = Program::new("botctl", workspace_binary("botctl")?);
                let botctl = botctl.env("BOTCTL_ETCD", self.fleet.etcd.hosts()).args(["switchover", MAIN, "--force"]);
                self.operators.push(botctl.start(self.fleet.logs())?);
                return Ok(Some(String::from("asked for")));
            }
        };
        self.busy[member] = true;
        Ok(Some(format!("{name}, for {} ms", millis(pause))))
    }

    /// Any member; the leader more often than its share, for there it hurts.
    async fn victim(&mut self) -> usize {
        let any = self.random.index(MEMBERS);
        if !self.random.next().is_multiple_of(2) {
            return any;
        }
        let look = tokio::time::timeout(Duration::from_millis(300), self.fleet.store.look(MAIN)).await;
        let leader = look.ok().and_then(Result::ok).and_then(|now| now.primary().map(str::to_owned));
        self.fleet.postgres.iter().position(|node| Some(&node.bot.name) == leader.as_ref()).unwrap_or(any)
    }

    fn later(&mut self, mend: Mend, (low, high): (u64, u64)) -> Duration {
        let pause = self.random.pause(low, high);
        self.due.push((Instant::now() + pause, mend));
        pause
    }

    fn mend_due(&mut self, now: Instant) -> Result<()> {
        let (due, later) = self.due.drain(..).partition(|(at, _)| *at <= now);
        self.due = later;
        let due: Vec<(Instant, Mend)> = due;
        due.into_iter().try_for_each(|(_, mend)| self.mend(mend))
    }

    fn mend_all(&mut self) -> Result<()> {
        std::mem::take(&mut self.due).into_iter().try_for_each(|(_, mend)| self.mend(mend))
    }

    fn mend(&mut self, mend: Mend) -> Result<()> {
        match mend {
            Mend::Start(member) => {
                self.busy[member] = false;
                self.fleet.postgres[member].bot.start()?;
            }
            Mend::Thaw(member) => {
                self.busy[member] = false;
                self.fleet.postgres[member].bot.thaw()?;
            }
            Mend::Continue(member, pid) => {
                self.busy[member] = false;
                signal_pid(pid, Signal::CONT);
            }
            Mend::StartEtcd(member) => {
                self.etcd_busy = false;
                self.fleet.etcd.start_member(member)?;
            }
            Mend::ThawEtcd => {
                self.etcd_busy = false;
                self.fleet.etcd.thaw();
            }
        }
        Ok(())
    }
}

/// How often another member than the last one took writes.
fn terms(acknowledged: &[Acknowledged]) -> usize {
    acknowledged.windows(2).filter(|pair| pair[0].port != pair[1].port).count()
}

/// What the bots have logged as errors: a human would have to look.
fn errors(fleet: &Fleet) -> Vec<String> {
    let logs = fleet.postgres.iter().map(|node| (node.bot.name.clone(), node.bot.log()));
    logs.flat_map(|(name, log)| {
        let errors: Vec<String> =
            log.lines().filter(|line| line.contains("ERROR")).map(|line| format!("{name}: {line}")).collect();
        errors
    })
    .collect()
}
