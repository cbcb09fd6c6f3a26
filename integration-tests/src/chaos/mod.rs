//! Chaos on real processes: from one seed, bots, guards, servers and etcd are killed and frozen, networks cut, disks filled and
//! stalled, and operators ask for things, while a client writes to every member all the time. Then all is mended, and what was
//! acknowledged is looked at.

mod deeds;
mod plan;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Serialize;

pub use self::plan::{Fault, Planned, plan};
use self::{deeds::Deeds, plan::MEMBERS};
use crate::{
    Fleet,
    fleet::MAIN,
    ground::Ground,
    logs,
    wait::{millis, until},
    writers::{Acknowledged, Writers, longest_gap, missing, missing_bytes, two_writable},
};

/// How long the cluster may take to come up, and to come to rest once all is mended: a back-off may reach half a minute,
/// and a member may need a rewind and a new copy.
const SETTLE_DEADLINE: Duration = Duration::from_secs(150);

/// How much log an asynchronous failover may lose: what the clusters here are configured with.
const LOSS_BYTES_MAX: i64 = 1_048_576;

/// How commits wait for replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Not at all
    Async,
    /// For one that is named
    On,
    /// For any that make a quorum
    Quorum,
    /// The same, and they take the lead from a primary that they see gone before its lease ends
    Takeover,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Decides what is to happen when.
    pub seed: u64,
    /// For how long.
    pub length: Duration,
    /// How commits wait.
    pub mode: Mode,
    /// Whether the primary may go on without etcd while the others agree.
    pub failsafe: bool,
    /// What may befall it.
    pub faults: Vec<Fault>,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// How long faults befell the fleet, in seconds.
    pub seconds: u64,
    /// How commits waited.
    pub mode: Mode,
    /// Whether failsafe mode was on.
    pub failsafe: bool,
    /// How often each fault was done.
    pub faults: BTreeMap<Fault, u64>,
    /// How many were not, for another had their place or there was nothing to do it to.
    pub skipped: u64,
    /// How many data directories bots have put aside, and an operator has deleted.
    pub deleted_asides: u64,
    /// What this machine could not do, and why.
    pub left_out: Vec<String>,
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Acknowledged writes that are gone. Where replication is asynchronous, a failover may lose the last ones.
    pub lost: usize,
    /// The most that was lost of one timeline, in bytes of log.
    pub lost_bytes: i64,
    /// How often another member became primary.
    pub terms: usize,
    /// For how long two members took writes at one time.
    pub two_writable_ms: u64,
    /// The longest time in which nobody took a write.
    pub longest_gap_ms: u64,
    /// From the last mend to a cluster at rest.
    pub settled_ms: u64,
    /// What the bots have logged as errors, and what their servers have said of damaged data.
    pub errors: Vec<String>,
}

impl Wish {
    /// Everything that can befall an asynchronous cluster.
    #[must_use]
    pub fn new(seed: u64, length: Duration) -> Self {
        let faults = Fault::value_variants().to_vec();
        Self { seed, length, mode: Mode::Async, failsafe: false, faults }
    }

    /// The first configuration of the cluster.
    fn dcs(&self) -> String {
        let mut lines = String::new();
        let mode = match self.mode {
            Mode::Async => None,
            Mode::On => Some("on"),
            Mode::Quorum | Mode::Takeover => Some("quorum"),
        };
        if let Some(mode) = mode {
            let _infallible = writeln!(lines, "    synchronous_mode: \"{mode}\"");
        }
        if self.mode == Mode::Takeover {
            lines += "    takeover: true\n";
        }
        if self.failsafe {
            lines += "    failsafe_mode: true\n";
        }
        lines
    }
}

impl Outcome {
    /// Whether what must hold has held.
    ///
    /// # Errors
    /// What has not.
    pub fn check(&self) -> Result<()> {
        let Self { two_writable_ms, lost, lost_bytes, mode, errors, .. } = self;
        ensure!(*two_writable_ms == 0, "two members took writes at one time, for {two_writable_ms} ms");
        ensure!(
            *mode == Mode::Async || *lost == 0,
            "{lost} acknowledged writes are gone, and {mode:?} waits for replicas"
        );
        ensure!(*lost_bytes <= LOSS_BYTES_MAX, "{lost_bytes} bytes of acknowledged writes are gone");
        ensure!(errors.is_empty(), "errors were logged:\n{}", errors.join("\n"));
        Ok(())
    }
}

/// Lets faults befall a fleet; `say` is told each. If that ends badly, the logs are left behind.
///
/// # Errors
/// If the fleet does not come up, or does not come to rest.
pub async fn run(wish: &Wish, mut say: impl FnMut(&str)) -> Result<Outcome> {
    let mut fleet = Fleet::on(Ground::of_its_own(), MEMBERS).await?;
    fleet.dcs = wish.dcs();
    let ended = Box::pin(run_on(&mut fleet, wish, &mut say)).await;
    let well = ended.as_ref().is_ok_and(|outcome| outcome.check().is_ok());
    let (logs, folder) = (fleet.keep_logs().to_owned(), fleet.scratch.path().to_owned());
    let stopped = fleet.stop().await;
    if well && stopped.is_ok() {
        std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    } else {
        say(&format!("logs are kept in {}", logs.display()));
    }
    let outcome = ended?;
    stopped?;
    Ok(outcome)
}

async fn run_on(fleet: &mut Fleet, wish: &Wish, say: &mut impl FnMut(&str)) -> Result<Outcome> {
    fleet.add_postgres(MEMBERS)?;
    let left_out = left_out(fleet, &wish.faults);
    left_out.iter().for_each(|what| say(&format!("LEFT OUT: {what}")));
    fleet.postgres_up(SETTLE_DEADLINE).await?;
    in_force(fleet, wish).await?;
    let writers = Writers::start(&fleet.superuser(), SETTLE_DEADLINE).await?;
    let mut deeds = Deeds::new(fleet);
    Box::pin(wreak(&mut deeds, wish, say)).await?;
    deeds.mend_all()?;
    say("all is mended");
    let mended = Instant::now();
    let (faults, skipped, deleted_asides) = (std::mem::take(&mut deeds.done), deeds.skipped, deeds.deleted_asides);
    let ended = fleet.postgres.iter_mut().filter_map(|node| (!node.bot.is_running()).then(|| node.bot.name.clone()));
    let ended: Vec<String> = ended.collect();
    ensure!(ended.is_empty(), "ended by themselves, and nobody starts them again: {}", ended.join(", "));
    fleet.postgres_up(SETTLE_DEADLINE).await.context("the cluster comes to rest")?;
    let settled = mended.elapsed();
    writers.acknowledged_by(None, writers.now(), SETTLE_DEADLINE).await?;
    let acknowledged = writers.finish().await?;
    let missing = missing(&fleet.superuser(), &acknowledged).await?;
    Ok(Outcome {
        seed: wish.seed,
        seconds: wish.length.as_secs(),
        mode: wish.mode,
        failsafe: wish.failsafe,
        faults,
        skipped,
        deleted_asides,
        left_out,
        acknowledged: acknowledged.len(),
        lost: missing.len(),
        lost_bytes: missing_bytes(&missing),
        terms: terms(&acknowledged),
        two_writable_ms: millis(two_writable(&acknowledged)),
        longest_gap_ms: millis(longest_gap(&acknowledged, Duration::ZERO)),
        settled_ms: millis(settled),
        errors: errors(fleet)?,
    })
}

/// Does what is planned, and mends it.
async fn wreak(deeds: &mut Deeds<'_>, wish: &Wish, say: &mut impl FnMut(&str)) -> Result<()> {
    let began = Instant::now();
    let mut plan = plan(wish.seed, wish.length, &wish.faults).into_iter().peekable();
    while began.elapsed() < wish.length {
        let next = plan.peek().map(|planned| began + planned.at);
        let next = next.into_iter().chain(deeds.next_mend()).min().unwrap_or(began + wish.length);
        tokio::time::sleep_until(next.min(began + wish.length).into()).await;
        deeds.mend_due()?;
        let Some(planned) = plan.next_if(|planned| planned.at <= began.elapsed()) else { continue };
        if !Deeds::can(deeds.fleet, planned.fault) {
            continue;
        }
        if let Some(what) = deeds.befall(planned).await? {
            say(&format!("{:6.1} s  {:?}: {what}", began.elapsed().as_secs_f64(), planned.fault));
        }
    }
    Ok(())
}

/// Waits until the cluster is in the mode that is asked for: a run in another would prove nothing.
async fn in_force(fleet: &Fleet, wish: &Wish) -> Result<()> {
    until(&format!("{:?}, failsafe {} in force", wish.mode, wish.failsafe), SETTLE_DEADLINE, || async {
        let now = fleet.store.look(MAIN).await?;
        let named = now.synchronous();
        let failsafe = now.value("failsafe").map_or(0, |members| members.matches("pg-").count());
        if (wish.mode == Mode::Async || named) && (!wish.failsafe || failsafe >= MEMBERS) {
            return Ok(());
        }
        Err(format!("sync: {:?}, failsafe: {:?}", now.value("sync"), now.value("failsafe")))
    })
    .await
}

/// What of the faults this machine cannot do, and why.
fn left_out(fleet: &Fleet, faults: &[Fault]) -> Vec<String> {
    let cannot = faults.iter().filter(|fault| !Deeds::can(fleet, **fault)).map(|fault| format!("{fault:?}"));
    let cannot: Vec<String> = cannot.collect();
    if cannot.is_empty() {
        return Vec::new();
    }
    vec![format!("{} ({})", cannot.join(", "), fleet.ground.missing().join("; "))]
}

/// How often another member than the last one took writes.
fn terms(acknowledged: &[Acknowledged]) -> usize {
    acknowledged.windows(2).filter(|pair| pair[0].port != pair[1].port).count()
}

/// What the bots have logged as errors, and what their servers have said of damaged data, by their names.
fn errors(fleet: &Fleet) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in &fleet.postgres {
        let name = &node.bot.name;
        all.extend(logs::errors(&node.bot.log()).map(|line| format!("{name}: {line}")));
        let servers = node.server_log();
        let log = std::fs::read(&servers).with_context(|| format!("read {}", servers.display()))?;
        all.extend(logs::damage(&String::from_utf8_lossy(&log)).map(|line| format!("{name}'s server: {line}")));
    }
    Ok(all)
}
