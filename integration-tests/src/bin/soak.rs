//! `make soak`: a Postgres cluster at a lease of 5 s on a machine that has no time and a disk that has none either. Nobody may
//! lead, start or stop anything that was not asked for; and how close it came is in the figures.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use fleet::{
    Fleet,
    fleet::MAIN,
    logs::errors,
    process::{Process, Program},
    program::{print, run_program},
    steps::StepLog,
    wait::millis,
    writers::{Writers, longest_gap, lost},
};
use serde::Serialize;

/// How long the cluster may take to come up, before it is loaded.
const UP_DEADLINE: Duration = Duration::from_secs(120);

/// Between two looks at the cluster.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Between two lines of progress.
const SAY_INTERVAL: Duration = Duration::from_secs(60);

/// What one disk-burning process writes and makes durable at a time, and where it begins anew.
const BURN_BLOCK: usize = 4 * 1024 * 1024;
const BURN_FILE: u64 = 256 * 1024 * 1024;

/// The lease, in seconds: our default.
const TTL_S: u64 = 5;

/// Cores and disks that had something to do for less of the time than this, in percent, were not busy: what did not happen then would
/// not have happened at rest either.
const BUSY_PERCENT_MIN: f64 = 95.0;

/// Of the lease, a primary keeps this much for stopping its server: the fence.
const FENCE: Duration = Duration::from_secs(TTL_S / 5);

/// Keeps a cluster on a busy machine and reports every failover that nobody asked for
///
/// The load is processes of the run's own: two for each core that only count, and four that write and fsync without end on the
/// disk that etcd and Postgres are on. A client inserts at the primary all the time.
#[derive(Debug, Parser)]
struct Args {
    /// For how long
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Processes that only count, for each core
    #[arg(long, default_value_t = 2)]
    cpu_burners: usize,
    /// Processes that write and fsync
    #[arg(long, default_value_t = 4)]
    disk_burners: usize,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/soak.json")]
    report: PathBuf,
    /// Be such a process: count
    #[arg(long, hide = true)]
    burn_cpu: bool,
    /// Be such a process: write in this folder
    #[arg(long, hide = true)]
    burn_disk: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Figures {
    minutes: u64,
    ttl_s: u64,
    cores: usize,
    cpu_burners: usize,
    disk_burners: usize,
    /// How busy all cores were, in percent.
    cpu_busy_percent: f64,
    /// How much of the time the disk had something to do, in percent; nothing where the kernel does not say.
    disk_busy_percent: Option<f64>,
    /// Everything that happened to the cluster though nobody asked for it.
    alarms: Vec<String>,
    acknowledged: usize,
    lost: usize,
    longest_gap_ms: u64,
    renewals_of_the_primary: usize,
    /// The least time that was left on the primary's lease when a renewal had been answered.
    smallest_margin_ms: Option<u64>,
    /// The least time that was left until the primary would have stopped its server.
    smallest_margin_to_the_fence_ms: Option<u64>,
    /// The same as the first, of the replicas' leases.
    smallest_margin_of_a_replica_ms: Option<u64>,
    /// What the bots have logged as errors.
    errors: Vec<String>,
}

/// The least that was left.
#[derive(Debug, Default)]
struct Margins {
    primary: Option<Duration>,
    replica: Option<Duration>,
    renewals: usize,
}

/// What the kernel has counted so far.
struct Busy {
    at: Instant,
    cpu_all: u64,
    cpu_idle: u64,
    disk_ms: Option<u64>,
}

/// Those that burn end by a signal's default: they never come to wait for one.
fn main() -> ExitCode {
    let args = Args::parse();
    let burnt = if args.burn_cpu {
        burn_cpu()
    } else if let Some(folder) = &args.burn_disk {
        burn_disk(folder)
    } else {
        return supervise(&args);
    };
    burnt.map_or_else(
        |error| {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

#[tokio::main]
async fn supervise(args: &Args) -> ExitCode {
    run_program("soak", run(args)).await
}

async fn run(args: &Args) -> Result<()> {
    fleet::orphans::adopt()?;
    let mut fleet = Fleet::with_etcd(3).await?;
    (fleet.ttl_s, fleet.step_logs) = (TTL_S, true);
    fleet.add_postgres(3)?;
    fleet.postgres_up(UP_DEADLINE).await?;
    let ended = Box::pin(soak(&mut fleet, args)).await;
    if !ended.as_ref().is_ok_and(|figures| figures.check().is_ok()) {
        print(&format!("logs are kept in {}\n", fleet.keep_logs().display()))?;
    }
    let figures = ended?;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&figures).context("write the figures as JSON")?;
    fs::write(&args.report, json.clone() + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&format!("{json}\n"))?;
    figures.warning().map_or(Ok(()), |warning| print(&format!("{warning}\n")))?;
    fleet.stop().await?;
    figures.check()
}

/// Loads the machine, watches the cluster, and lets the machine rest again.
async fn soak(fleet: &mut Fleet, args: &Args) -> Result<Figures> {
    let length = Duration::from_secs(args.minutes * 60);
    let cores = std::thread::available_parallelism().context("count the cores")?.get();
    let device = device_of(fleet.scratch.path());
    let mut logs: Vec<StepLog> = fleet.postgres.iter().map(|node| StepLog::new(node.bot.step_log())).collect();
    let writers = Writers::start(&fleet.superuser(), UP_DEADLINE).await?;
    // What was renewed before there was load does not count.
    logs.iter_mut().try_for_each(|log| log.renewals().map(drop))?;
    let standing = standing(fleet).await?;
    let burners = start_burners(fleet, args, cores)?;
    let (before, began) = (Busy::now(device.as_deref())?, Instant::now());
    let mut margins = Margins::default();
    let (mut alarms, mut said) = (Vec::new(), began);
    while began.elapsed() < length {
        tokio::time::sleep(LOOK_INTERVAL).await;
        for log in &mut logs {
            margins.add(log)?;
        }
        // etcd may be slow to answer: what happened meanwhile is still to be seen at the next look.
        let now = self::standing(fleet).await;
        let alarm = now.ok().filter(|now| *now != standing).map(|now| format!("{now}, and it was {standing}"));
        if let Some(alarm) = alarm.filter(|alarm| alarms.last().is_none_or(|last: &String| !last.ends_with(alarm))) {
            alarms.push(format!("{} s: {alarm}", began.elapsed().as_secs()));
            print(&format!("  ALARM {}\n", alarms.last().map_or("", String::as_str)))?;
        }
        if said.elapsed() > SAY_INTERVAL {
            said = Instant::now();
            let (minutes, margin) = (began.elapsed().as_secs() / 60, margins.primary.map_or(0, millis));
            print(&format!("  {minutes} min: {} renewals, {margin} ms left at the least\n", margins.renewals))?;
        }
    }
    let busy = Busy::now(device.as_deref())?;
    drop(burners);
    fleet.postgres_up(UP_DEADLINE).await?;
    let writes = writers.finish().await?;
    let own = |log: &str| errors(log).map(str::to_owned).collect::<Vec<_>>();
    let errors = fleet.postgres.iter().flat_map(|node| own(&node.bot.log()));
    Ok(Figures {
        minutes: args.minutes,
        ttl_s: TTL_S,
        cores,
        cpu_burners: args.cpu_burners * cores,
        disk_burners: args.disk_burners,
        cpu_busy_percent: busy.cpu_percent_since(&before),
        disk_busy_percent: busy.disk_percent_since(&before),
        alarms,
        acknowledged: writes.len(),
        lost: lost(&fleet.superuser(), &writes).await?,
        longest_gap_ms: millis(longest_gap(&writes, Duration::ZERO)),
        renewals_of_the_primary: margins.renewals,
        smallest_margin_ms: margins.primary.map(millis),
        smallest_margin_to_the_fence_ms: margins.primary.map(|left| millis(left.saturating_sub(FENCE))),
        smallest_margin_of_a_replica_ms: margins.replica.map(millis),
        errors: errors.collect(),
    })
}

impl Figures {
    /// Whether it held.
    ///
    /// # Errors
    /// What has not.
    fn check(&self) -> Result<()> {
        let Self { alarms, errors, renewals_of_the_primary, lost, .. } = self;
        ensure!(alarms.is_empty(), "nobody asked for this:\n{}", alarms.join("\n"));
        ensure!(errors.is_empty(), "errors were logged:\n{}", errors.join("\n"));
        ensure!(*renewals_of_the_primary > 0, "no renewal was seen: the figures are of nothing");
        ensure!(*lost == 0, "{lost} acknowledged writes are gone");
        let busy = self.cpu_busy_percent;
        ensure!(
            busy >= BUSY_PERCENT_MIN,
            "the cores were busy for {busy} % of the time, and it takes {BUSY_PERCENT_MIN} % to show anything: raise --cpu-burners"
        );
        Ok(())
    }

    /// What the run does not show, though it held; one line.
    fn warning(&self) -> Option<String> {
        let busy = match self.disk_busy_percent {
            Some(busy) if busy >= BUSY_PERCENT_MIN => return None,
            Some(busy) => format!("the disk was busy for {busy} % of the time"),
            None => String::from("the kernel does not say how busy the disk was"),
        };
        Some(format!("WARNING: {busy}: below {BUSY_PERCENT_MIN} % this run shows nothing of a busy disk"))
    }
}

impl Margins {
    fn add(&mut self, log: &mut StepLog) -> Result<()> {
        for renewal in log.renewals()? {
            if renewal.role == "primary" {
                self.primary = self.primary.into_iter().chain([renewal.left]).min();
                self.renewals += 1;
            } else {
                self.replica = self.replica.into_iter().chain([renewal.left]).min();
            }
        }
        Ok(())
    }
}

/// Who leads, and which processes serve: nothing of it may change.
async fn standing(fleet: &Fleet) -> Result<String> {
    let now = fleet.store.scope(MAIN).await?;
    let server = |pid: Option<u32>| pid.map_or_else(|| String::from("none"), |pid| pid.to_string());
    let servers = fleet.postgres.iter().map(|node| format!("{} {}", node.bot.name, server(node.postmaster())));
    Ok(format!("leader {}; servers {}", now.leader().unwrap_or("none"), servers.collect::<Vec<_>>().join(", ")))
}

/// Starts the load: it ends when dropped.
fn start_burners(fleet: &Fleet, args: &Args, cores: usize) -> Result<Vec<Process>> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut burners = Vec::new();
    for number in 0..args.cpu_burners * cores {
        let burner = Program::new(format!("cpu-burner-{number}"), &own).args(["--burn-cpu"]);
        burners.push(burner.start(fleet.logs())?);
    }
    for number in 0..args.disk_burners {
        let folder = fleet.scratch.dir(&format!("disk-burner-{number}"), None)?;
        let burner = Program::new(format!("disk-burner-{number}"), &own);
        burners.push(burner.args(["--burn-disk", &*folder.to_string_lossy()]).start(fleet.logs())?);
    }
    Ok(burners)
}

fn burn_cpu() -> Result<()> {
    let mut count = 0_u64;
    loop {
        count = std::hint::black_box(count.wrapping_mul(3).wrapping_add(1));
    }
}

fn burn_disk(folder: &Path) -> Result<()> {
    let mut file = fs::File::create(folder.join("burnt")).context("make a file to burn")?;
    let block = vec![0x5A_u8; BURN_BLOCK];
    loop {
        file.seek(SeekFrom::Start(0)).context("begin anew")?;
        for _ in 0..BURN_FILE / BURN_BLOCK as u64 {
            file.write_all(&block).context("burn")?;
            file.sync_data().context("make it durable")?;
        }
    }
}

/// The disk that a folder is on, as `/proc/diskstats` calls it; nothing if it is on none.
fn device_of(folder: &Path) -> Option<String> {
    let device = fs::metadata(folder).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device).to_string(), rustix::fs::minor(device).to_string());
    let disks = fs::read_to_string("/proc/diskstats").ok()?;
    disks.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.next()? == major && fields.next()? == minor).then(|| fields.next().map(str::to_owned))?
    })
}

impl Busy {
    fn now(device: Option<&str>) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("read what the cores do")?;
        let all = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("read /proc/stat")?;
        let ticks: Vec<u64> = all.split_whitespace().filter_map(|ticks| ticks.parse().ok()).collect();
        // user, nice, system, idle, waiting for the disk, interrupts (twice), stolen; guests are in user.
        let [cpu_all, cpu_idle] = [ticks.iter().take(8).sum(), ticks.iter().skip(3).take(2).sum()];
        let disks = fs::read_to_string("/proc/diskstats").unwrap_or_default();
        let disk_ms = disks.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Behind the numbers and the name, the tenth figure is how long the disk had something to do.
            (fields.get(2).copied() == device && device.is_some()).then(|| fields.get(12)?.parse().ok())?
        });
        Ok(Self { at: Instant::now(), cpu_all, cpu_idle, disk_ms })
    }

    fn cpu_percent_since(&self, before: &Self) -> f64 {
        let (all, idle) = (self.cpu_all - before.cpu_all, self.cpu_idle - before.cpu_idle);
        fleet::usage::round(100.0 - idle as f64 * 100.0 / all.max(1) as f64)
    }

    fn disk_percent_since(&self, before: &Self) -> Option<f64> {
        let busy = self.disk_ms?.checked_sub(before.disk_ms?)?;
        Some(fleet::usage::round(busy as f64 * 100.0 / (self.at - before.at).as_millis().max(1) as f64))
    }
}
