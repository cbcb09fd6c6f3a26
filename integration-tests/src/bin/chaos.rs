//! `make chaos`: faults on real processes, from one seed, and what came of them.

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, anyhow};
use clap::{Parser, ValueEnum};
use fleet::{
    chaos::{self, Fault, Mode, Wish},
    program::{print, run_program},
};

/// Kills, freezes, cuts off and starves bots, guards, servers and etcd under writing clients
///
/// As root every node gets a network namespace and a disk of its own, which are made and removed by the run; what the machine
/// or the user cannot do is left out, and said. The same seed and faults give the same plan.
#[derive(Debug, Parser)]
struct Args {
    /// For how long
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Decides what is to happen when; what comes of it, real processes decide
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How commits wait for replicas
    #[arg(long, value_enum, default_value_t = Mode::Async)]
    mode: Mode,
    /// Let the primary go on without etcd while the others agree
    #[arg(long)]
    failsafe: bool,
    /// These faults alone
    #[arg(long, value_enum, value_delimiter = ',')]
    faults: Vec<Fault>,
    /// Where the figures go
    #[arg(long, default_value = "target/chaos/report.json")]
    report: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let work = async { run(&args).await.map_err(|error| anyhow!("{error:#}\nagain: {}", again(&args))) };
    run_program("chaos", work).await
}

async fn run(args: &Args) -> Result<()> {
    fleet::orphans::adopt()?;
    let faults = if args.faults.is_empty() { Fault::value_variants().to_vec() } else { args.faults.clone() };
    let length = Duration::from_secs(args.seconds);
    let wish = Wish { seed: args.seed, length, mode: args.mode, failsafe: args.failsafe, faults };
    let outcome = chaos::run(&wish, |line| drop(print(&format!("  {line}\n")))).await?;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&outcome).context("write the figures as JSON")?;
    fs::write(&args.report, json.clone() + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&format!("{json}\n"))?;
    outcome.check()
}

/// The command that does the same again.
fn again(args: &Args) -> String {
    let name = |value: Option<clap::builder::PossibleValue>| value.map(|v| v.get_name().to_owned()).unwrap_or_default();
    let mode = name(args.mode.to_possible_value());
    let mut command = format!("chaos --seed {} --seconds {} --mode {mode}", args.seed, args.seconds);
    if args.failsafe {
        command += " --failsafe";
    }
    if !args.faults.is_empty() {
        let faults = args.faults.iter().map(|fault| name(fault.to_possible_value())).collect::<Vec<_>>();
        command += &format!(" --faults {}", faults.join(","));
    }
    command
}
