//! `make bench-edge`: how soon a HAProxy routes to a new leader: driven by our edge bot, and by its health checks alone.

mod probe;
mod standin;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bots_core::dcs::{Revision, Write};
use clap::Parser;
use fleet::{
    Fleet,
    fleet::MAIN,
    free_port,
    process::{Process, Program, system_binary},
    program::{asked_to_stop, print},
    store,
    wait::millis,
};
use serde::Serialize;

use crate::{
    probe::{Change, Probe, routes_to},
    standin::StandIn,
};

/// No change takes this long unless something is wrong: the checks of the stock proxy take up to nine seconds.
const DEADLINE: Duration = Duration::from_secs(30);

/// What a change at the edge should take at most: slower ones are named, each with its moment.
const GOAL: Duration = Duration::from_millis(100);

/// Between two changes at the edge alone: its checks, a second apart, are met at every phase in the course of the run.
const PAUSE_MIN: Duration = Duration::from_millis(150);
const PAUSE_STEP: Duration = Duration::from_millis(37);

/// Measures how long after the change of the leader key a HAProxy sends new connections to the new leader.
///
/// Two stand-ins for Postgres members say their names to whoever connects, and answer the health checks. The leader key is
/// put over in a real etcd, together with both member keys; the health checks turn at the same moment. A client connects
/// every millisecond. Times count from when the transaction was sent.
///
///   edge   HAProxy driven by our edge bot, with its own health checks as the fallback
///   stock  HAProxy with Patroni's sample configuration: option httpchk, inter 3s fall 3 rise 2
///
///   ROUTED   until a new connection reaches the new leader
///   SHUT     until a session with the old leader is shut
///   ASTRAY   connections that reached the old leader meanwhile, and would have met a server that takes no writes
///   REFUSED  connections that were closed meanwhile: those that the old leader had when its sessions were shut
#[derive(Debug, Parser)]
#[command(verbatim_doc_comment)]
struct Args {
    /// How often the leader changes in front of both
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// How often besides in front of the edge alone, which needs no pause
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(0..=10000))]
    flips: u16,
    /// Where the figures go
    #[arg(long, default_value = "target/bench/edge.json")]
    report: PathBuf,
    /// Leave the logs, and with them the edge bot's steps, for a look
    #[arg(long)]
    keep_logs: bool,
}

/// Figures of one proxy.
#[derive(Debug, Serialize)]
struct Figures {
    changes: usize,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    shut_p50_ms: Option<f64>,
    shut_p99_ms: Option<f64>,
    astray: usize,
    refused: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    edge: Figures,
    stock: Figures,
    /// How many times as long the stock proxy takes, by the medians.
    ratio: f64,
}

/// The two members, one of which leads, and the two proxies.
struct Bench {
    fleet: Fleet,
    members: [StandIn; 2],
    leader: usize,
    stock_port: u16,
    /// Runs for as long as it is kept.
    stock: Process,
}

/// A change that has been made.
struct Changed {
    /// When it was sent to etcd.
    moment: Instant,
    /// The revision at which the leader key was written: the edge bot's log has it, too.
    generation: Revision,
    /// Who leads now.
    new: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let ended = tokio::select! {
        ended = Box::pin(run(&args)) => ended,
        asked = asked_to_stop() => asked,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-edge: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let mut bench = Box::pin(Bench::start(args.keep_logs)).await?;
    let (mut edge, mut stock) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        let (at_edge, at_stock) = Box::pin(bench.change_both()).await?;
        let (by_edge, by_checks) = (millis(at_edge.routed), millis(at_stock.routed));
        print(&format!("  {round}: edge {by_edge} ms, stock {by_checks} ms\n"))?;
        edge.push(at_edge);
        stock.push(at_stock);
    }
    for flip in 0..args.flips {
        tokio::time::sleep(PAUSE_MIN + PAUSE_STEP * u32::from(flip % 27)).await;
        let (generation, change) = bench.change_edge().await?;
        if change.routed > GOAL {
            print(&format!("  generation {}: {} ms\n", generation.0, millis(change.routed)))?;
        }
        edge.push(change);
    }
    let Bench { fleet, stock: stock_proxy, .. } = bench;
    drop(stock_proxy);
    fleet.stop().await?;
    let (edge, stock) = (Figures::of(&edge)?, Figures::of(&stock)?);
    let report = Report { ratio: stock.p50_ms / edge.p50_ms, edge, stock };
    print(&report.table())?;
    write(&args.report, &report)?;
    print(&format!("the figures are in {}\n", args.report.display()))
}

impl Bench {
    async fn start(keep_logs: bool) -> Result<Self> {
        let mut fleet = Fleet::with_etcd(1).await?;
        if keep_logs {
            fleet.step_logs = true;
            print(&format!("the logs are in {}\n", fleet.keep_logs().display()))?;
        }
        let members = [StandIn::start("one").await?, StandIn::start("two").await?];
        members[0].lead(true);
        announce(&fleet, &members, 0).await?;
        fleet.add_edge()?;
        let stock_port = free_port()?;
        let stock = stock_proxy(&fleet, &members, stock_port)?;
        let bench = Self { fleet, members, leader: 0, stock_port, stock };
        bench.at_rest(true).await?;
        Ok(bench)
    }

    /// Both proxies route to the leader.
    async fn at_rest(&self, both: bool) -> Result<()> {
        let leader = &self.members[self.leader].name;
        routes_to(self.fleet.edge()?.primary, leader, DEADLINE).await?;
        if both {
            routes_to(self.stock_port, leader, DEADLINE).await?;
        }
        self.fleet.acknowledged(DEADLINE).await.map(drop)
    }

    async fn change_both(&mut self) -> Result<(Change, Change)> {
        self.at_rest(true).await?;
        let old = &self.members[self.leader].name;
        let edge = Probe::begin(self.fleet.edge()?.primary, old).await?;
        let stock = Probe::begin(self.stock_port, old).await?;
        let Changed { moment, new, .. } = self.change().await?;
        let (edge, stock) = tokio::join!(edge.end(moment, &new, DEADLINE), stock.end(moment, &new, DEADLINE));
        Ok((edge?, stock?))
    }

    async fn change_edge(&mut self) -> Result<(Revision, Change)> {
        self.at_rest(false).await?;
        let edge = Probe::begin(self.fleet.edge()?.primary, &self.members[self.leader].name).await?;
        let Changed { moment, generation, new } = self.change().await?;
        Ok((generation, edge.end(moment, &new, DEADLINE).await?))
    }

    /// The other one leads from now on.
    async fn change(&mut self) -> Result<Changed> {
        let (old, new) = (self.leader, 1 - self.leader);
        self.leader = new;
        self.members[old].lead(false);
        self.members[new].lead(true);
        let moment = Instant::now();
        let generation = announce(&self.fleet, &self.members, new).await?;
        Ok(Changed { moment, generation, new: self.members[new].name.clone() })
    }
}

/// Writes who leads, all in one transaction; yields its revision.
async fn announce(fleet: &Fleet, members: &[StandIn; 2], leader: usize) -> Result<Revision> {
    let scope = store::scope(MAIN)?;
    let mut writes = vec![Write::put(scope.leader(), members[leader].name.clone())];
    for (nth, member) in members.iter().enumerate() {
        writes.push(Write::put(scope.member(&member.name), member.member(nth == leader)));
    }
    fleet.store.write(writes).await
}

fn stock_proxy(fleet: &Fleet, members: &[StandIn; 2], port: u16) -> Result<Process> {
    let config = fleet.scratch.file("stock.cfg", include_str!("stock.cfg"), None)?;
    let [one, two] = members;
    let program = Program::new("stock-haproxy", system_binary("haproxy", &["/usr/sbin".into()])?)
        .args([String::from("-db"), String::from("-f"), config.display().to_string()])
        .env("STOCK_LISTEN", format!("127.0.0.1:{port}"))
        .env("STOCK_ONE", one.serve.to_string())
        .env("STOCK_ONE_CHECK", one.check.port().to_string())
        .env("STOCK_TWO", two.serve.to_string())
        .env("STOCK_TWO_CHECK", two.check.port().to_string());
    program.start(fleet.logs())
}

impl Figures {
    fn of(changes: &[Change]) -> Result<Self> {
        ensure!(!changes.is_empty(), "nothing was measured");
        let routed: Vec<Duration> = changes.iter().map(|c| c.routed).collect();
        let shut: Vec<Duration> = changes.iter().filter_map(|c| c.shut).collect();
        Ok(Self {
            changes: changes.len(),
            p50_ms: percentile(&routed, 50).unwrap_or_default(),
            p99_ms: percentile(&routed, 99).unwrap_or_default(),
            max_ms: percentile(&routed, 100).unwrap_or_default(),
            shut_p50_ms: percentile(&shut, 50),
            shut_p99_ms: percentile(&shut, 99),
            astray: changes.iter().map(|c| c.astray).sum(),
            refused: changes.iter().map(|c| c.refused).sum(),
        })
    }
}

/// The smallest that so many of a hundred do not exceed, in milliseconds.
fn percentile(of: &[Duration], percent: usize) -> Option<f64> {
    let mut sorted = of.to_vec();
    sorted.sort();
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).map(|length| (length.as_secs_f64() * 10_000.0).round() / 10.0)
}

impl Report {
    fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(["PROXY", "CHANGES", "ROUTED P50", "P99", "MAX", "SHUT P50", "P99", "ASTRAY", "REFUSED"]);
        for (name, of) in [("edge", &self.edge), ("stock", &self.stock)] {
            let ms = |length: Option<f64>| length.map_or_else(|| String::from("-"), |length| format!("{length:.1} ms"));
            let cells = [Some(of.p50_ms), Some(of.p99_ms), Some(of.max_ms), of.shut_p50_ms, of.shut_p99_ms].map(ms);
            let mut row = vec![name.to_owned(), of.changes.to_string()];
            row.extend(cells);
            row.extend([of.astray.to_string(), of.refused.to_string()]);
            table.add_row(row);
        }
        let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
        format!("\n{lines}\nthe stock proxy takes {:.0} times as long, by the medians\n", self.ratio)
    }
}

fn write(path: &Path, report: &Report) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(report).context("write the report as JSON")?;
    fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))
}
