//! `make bench-idle`: what each bot costs when nothing happens: memory, processor time, requests to etcd.

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use fleet::{
    Fleet,
    bots::Bot,
    demo::{healthy, start},
    program::{print, run_program},
    usage::{TICKS_PER_SECOND, cpu_ticks, pss_kib, round},
};
use serde::Serialize;

/// How long the fleet is left alone before it is measured: start-up work has ended by then, and its pages are settled.
const QUIET_BEFORE: Duration = Duration::from_secs(15);

/// Measures every bot of an idle fleet.
#[derive(Debug, Parser)]
struct Args {
    /// How long to measure
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/idle.json")]
    report: PathBuf,
}

/// What one bot's process has used so far.
#[derive(Debug, Clone, Copy)]
struct Used {
    ticks: u64,
    etcd_requests: u64,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Line {
    scope: String,
    bot: String,
    state: String,
    /// Proportional set size: shared pages count by their share.
    pss_kib: u64,
    cpu_seconds_per_minute: f64,
    etcd_requests_per_minute: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    run_program("bench-idle", run(&args)).await
}

async fn run(args: &Args) -> Result<()> {
    let mut fleet = start(|line| drop(print(&format!("  {line}\n")))).await?;
    tokio::time::sleep(QUIET_BEFORE).await;
    healthy(&mut fleet).await?;
    print(&format!("  measuring for {} s\n", args.seconds))?;
    let guards: BTreeMap<String, u32> =
        fleet.postgres.iter().filter_map(|node| Some((node.bot.name.clone(), node.guard()?))).collect();
    let before = used_by_all(&mut fleet, &guards).await?;
    let began = std::time::Instant::now();
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    let after = used_by_all(&mut fleet, &guards).await?;
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    let mut lines = Vec::new();
    for (bot, (before, after)) in fleet.bots().zip(before.into_iter().zip(after)) {
        lines.push(line(bot, &guards, before, after, minutes).await?);
    }
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&lines).context("write the figures as JSON")?;
    fs::write(&args.report, json + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&table(&lines))?;
    fleet.stop().await
}

async fn used_by_all(fleet: &mut Fleet, guards: &BTreeMap<String, u32>) -> Result<Vec<Used>> {
    let mut all = Vec::new();
    for bot in fleet.bots() {
        all.push(used(bot, guards).await?);
    }
    Ok(all)
}

/// The bot's own processes: with the guard that it may have, without its server or its app.
fn processes(bot: &mut Bot, guards: &BTreeMap<String, u32>) -> Result<Vec<u32>> {
    Ok([bot.process()?.pid()].into_iter().chain(guards.get(&bot.name).copied()).collect())
}

/// What they have used.
async fn used(bot: &mut Bot, guards: &BTreeMap<String, u32>) -> Result<Used> {
    let ticks = processes(bot, guards)?.into_iter().map(cpu_ticks).sum::<Result<u64>>()?;
    let metrics = bot.get("/metrics").await?.text;
    let counted = metrics.lines().filter(|line| line.starts_with("bots_etcd_requests_total"));
    let counts = counted.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok());
    Ok(Used { ticks, etcd_requests: counts.sum() })
}

async fn line(bot: &mut Bot, guards: &BTreeMap<String, u32>, before: Used, after: Used, minutes: f64) -> Result<Line> {
    let pss_kib = processes(bot, guards)?.into_iter().map(pss_kib).sum::<Result<u64>>()?;
    Ok(Line {
        scope: bot.scope.clone(),
        bot: bot.name.clone(),
        state: bot.report().await?.role,
        pss_kib,
        cpu_seconds_per_minute: round((after.ticks - before.ticks) as f64 / TICKS_PER_SECOND / minutes),
        etcd_requests_per_minute: round((after.etcd_requests - before.etcd_requests) as f64 / minutes),
    })
}

fn table(lines: &[Line]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["BOT", "STATE", "MEMORY (PSS)", "CPU S/MIN", "ETCD REQUESTS/MIN"]);
    for line in lines {
        table.add_row([
            format!("{}/{}", line.scope, line.bot),
            line.state.clone(),
            format!("{:.1} MiB", line.pss_kib as f64 / 1_024.0),
            format!("{:.2}", line.cpu_seconds_per_minute),
            format!("{:.0}", line.etcd_requests_per_minute),
        ]);
    }
    let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    format!("\n{lines}\n")
}
