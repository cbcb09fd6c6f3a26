//! `make bench-failover`: our Postgres bots and Patroni side by side, put through the same faults under the same client.

mod contender;
mod faults;
mod report;
mod rows;

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use fleet::{
    bots::postgres_bin_dir,
    orphans,
    patroni::{self, Patroni},
    process::{Program, system_binary},
    program::{print, run_program},
    scratch::Scratch,
};
use futures_util::future::{join_all, try_join_all};

use crate::{
    contender::{Contender, Tool},
    report::{Idle, Machine, Report, Round, Rounds},
    rows::{Fault, Row},
};

/// How long the clusters are left alone before they are measured idle: start-up work has ended by then.
const QUIET_BEFORE: Duration = Duration::from_secs(15);

/// Between the same fault at two clusters that then wait for their leases together: the quick ones have recovered before
/// the next is hit, and no two recover at the same moment.
const STAGGER: Duration = Duration::from_secs(2);

/// A fault that fails this often at a cluster is not done to it again: each failure takes a deadline of a minute.
const FAILURES_MAX: usize = 2;

/// A program says its version within this.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

/// Measures what a client loses when something happens to a Postgres cluster: kept by our bots, and by Patroni.
///
/// Every tool keeps a cluster of three servers of its own, on an etcd of its own; all have the same PostgreSQL and the same
/// settings. A client tries to insert at every member every 10 ms. The figures are what it sees:
///
///   gap   the longest time without an acknowledged insert
///   both  for how long two members acknowledged inserts
///
/// with the least, the median and the greatest of the rounds, and the ratio of the medians to that of the first column.
/// Replication is asynchronous unless the row says otherwise. Below is how many acknowledged inserts were gone in the end.
///
/// Patroni is installed from PyPI into the target folder. Where that is impossible, our bots are measured alone. Killed
/// nodes refuse connections at once, as a machine does that restarts; one without power is silent, which has a row of its own.
/// No watchdog device is used.
///
/// $BOTS_SCRATCH is where the clusters live (default: the system's temporary folder).
#[derive(Debug, Parser)]
#[command(verbatim_doc_comment)]
struct Args {
    /// How often every fault is done to every cluster
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// What is compared; the ratios are to the first of them
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Tool::Bot, Tool::BotFast, Tool::Patroni, Tool::PatroniFast])]
    tools: Vec<Tool>,
    /// These rows alone, in this order; what an earlier run has left of the others in the report stays there
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Row>,
    /// How long they are measured idle
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    idle: u64,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/failover.json")]
    report: PathBuf,
    /// Leave the scratch folders behind, with the logs and every step of our bots
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    run_program("bench-failover", run(Args::parse())).await
}

/// Says whether every round came to its end.
async fn run(mut args: Args) -> Result<bool> {
    orphans::adopt()?;
    let tools = Scratch::new()?;
    let logs = tools.dir("logs", None)?;
    let patroni = install(&mut args.tools, &tools, &logs).await;
    let machine = machine(&logs).await?;
    say(&format!("start {} clusters of three", args.tools.len()));
    let starting = args.tools.iter().map(|tool| Contender::start(*tool, patroni.as_ref(), args.keep));
    let mut contenders = try_join_all(starting).await?;
    try_join_all(contenders.iter().map(Contender::settled)).await?;
    let all = args.only.is_empty();
    let rows = if all { Row::value_variants().to_vec() } else { args.only };
    let idle =
        if rows.contains(&Row::Idle) { Box::pin(measure_idle(&mut contenders, args.idle)).await? } else { Vec::new() };
    let mut measured = Rounds::new();
    for round in 1..=usize::from(args.rounds) {
        for row in &rows {
            let Row::Fault(fault) = row else { continue };
            let left_out = failed_too_often(&measured, *fault);
            for (tool, outcome) in Box::pin(strike(&mut contenders, *fault, round, &left_out)).await {
                record(&mut measured, (*fault, tool), round, outcome);
            }
            Box::pin(leave_out_the_broken(&mut contenders)).await;
        }
    }
    let failures: usize = measured.values().map(|(_, failures)| failures.len()).sum();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("read the clock")?;
    let mut report = Report::new(machine, measured, idle, now.as_secs());
    if !all {
        report.add_earlier(&args.report);
    }
    report.write(&args.report)?;
    print(&report.tables())?;
    print(&format!("\n{failures} rounds failed; the figures are in {}\n", args.report.display()))?;
    Ok(failures == 0)
}

/// Installs Patroni if it is to be measured; where that fails, says so and takes it off the list.
async fn install(tools: &mut Vec<Tool>, scratch: &Scratch, logs: &std::path::Path) -> Option<Patroni> {
    if !tools.iter().any(|tool| tool.is_patroni()) {
        return None;
    }
    say(&format!("Patroni {} from PyPI, or as it was installed before", patroni::VERSION));
    match Patroni::install(scratch, logs).await {
        Ok(patroni) => Some(patroni),
        Err(error) => {
            eprintln!("bench-failover: PATRONI IS NOT MEASURED, it cannot be installed: {error:#}");
            tools.retain(|tool| !tool.is_patroni());
            None
        }
    }
}

async fn machine(logs: &std::path::Path) -> Result<Machine> {
    let version = async |program: Program| -> Result<String> {
        let said = program.args(["--version"]).run(logs, VERSION_DEADLINE).await?.stdout;
        Ok(said.lines().next().unwrap_or_default().to_owned())
    };
    let memory = fs::read_to_string("/proc/meminfo").context("read the size of the memory")?;
    let memory =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    Ok(Machine {
        cores: std::thread::available_parallelism().context("count the cores")?.get(),
        memory_mib: memory.map_or(0, |kib: u64| kib / 1_024),
        postgres: version(Program::new("postgres-version", postgres_bin_dir()?.join("postgres"))).await?,
        etcd: version(Program::new("etcd-version", system_binary("etcd", &[])?)).await?,
        patroni: patroni::VERSION.to_owned(),
    })
}

/// Measures all clusters in the same minute: nothing happens in any of them.
async fn measure_idle(contenders: &mut [Contender], seconds: u64) -> Result<Vec<Idle>> {
    say(&format!("idle for {seconds} s"));
    tokio::time::sleep(QUIET_BEFORE).await;
    let before = try_join_all(contenders.iter_mut().map(Contender::used)).await?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    try_join_all(contenders.iter_mut().zip(&before).map(|(contender, before)| contender.idle_since(before))).await
}

/// Does the fault to every cluster: one after the other, in another order every round, each when all have settled; those
/// that then wait for a lease, wait together.
async fn strike(
    contenders: &mut [Contender],
    fault: Fault,
    round: usize,
    left_out: &BTreeSet<Tool>,
) -> Vec<(Tool, Result<Round>)> {
    let _seen_again_in_the_round = join_all(contenders.iter().map(Contender::settled)).await;
    let mut struck: Vec<&mut Contender> = contenders.iter_mut().filter(|c| !left_out.contains(&c.tool)).collect();
    let count = struck.len().max(1);
    if fault.waits() {
        let striking = struck.into_iter().zip(1..).map(|(contender, nth)| async move {
            let place = (nth + round) % count;
            let delay = STAGGER * u32::try_from(place).unwrap_or(0);
            (contender.tool, Box::pin(contender.suffer(fault, delay)).await)
        });
        return join_all(striking).await;
    }
    let mut outcomes = Vec::new();
    for nth in 0..struck.len() {
        let contender = &mut struck[(nth + round) % count];
        outcomes.push((contender.tool, Box::pin(contender.suffer(fault, Duration::ZERO)).await));
    }
    outcomes
}

fn failed_too_often(measured: &Rounds, fault: Fault) -> BTreeSet<Tool> {
    let of_it = measured.iter().filter(|((of, _), (_, failures))| *of == fault && failures.len() >= FAILURES_MAX);
    of_it.map(|((_, tool), _)| *tool).collect()
}

fn record(measured: &mut Rounds, key: (Fault, Tool), round: usize, outcome: Result<Round>) {
    let (rounds, failures) = measured.entry(key).or_default();
    let (fault, tool) = key;
    match outcome {
        Ok(seen) => {
            let two = if seen.two_primaries_ms > 0 {
                format!("; two primaries for {} ms", seen.two_primaries_ms)
            } else {
                String::new()
            };
            say(&format!("{round}: {fault:40} {tool:17} {:6} ms  {}; {} lost{two}", seen.gap_ms, seen.note, seen.lost));
            rounds.push(seen);
        }
        Err(error) => {
            // The rest is the ends of all clusters' logs.
            let why = format!("{error:#}").lines().next().unwrap_or_default().to_owned();
            eprintln!("bench-failover: {fault}, {tool}, round {round} FAILED: {why}");
            failures.push(format!("round {round}: {why}"));
        }
    }
}

/// Brings back keepers that a failed round has left dead, and drops clusters that do not come to rest.
async fn leave_out_the_broken(contenders: &mut Vec<Contender>) {
    let mut index = 0;
    while let Some(contender) = contenders.get_mut(index) {
        let started = contender.start_missing();
        let settled = match started {
            Ok(()) => contender.settled().await.map(drop),
            Err(error) => Err(error),
        };
        match settled {
            Ok(()) => index += 1,
            Err(error) => {
                eprintln!("bench-failover: {} is left out from now on: {error:#}", contender.tool);
                contenders.remove(index);
            }
        }
    }
}

fn say(line: &str) {
    // Nobody reads any more: the figures are still written.
    let _unread = print(&format!("  {line}\n"));
}
