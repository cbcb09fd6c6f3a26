//! `make chaos`: faults on real processes, from one seed, and what came of them.

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use fleet::{
    chaos,
    demo::{asked_to_stop, print},
};

/// Kills and freezes bots, guards, servers and etcd under writing clients
#[derive(Debug, Parser)]
struct Args {
    /// For how long
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Decides what happens when, as far as real processes let it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the figures go
    #[arg(long, default_value = "target/chaos/report.json")]
    report: PathBuf,
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
            eprintln!("chaos: {error:#}\nagain: chaos --seed {} --seconds {}", args.seed, args.seconds);
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    fleet::orphans::adopt()?;
    let length = Duration::from_secs(args.seconds);
    let outcome = chaos::run(args.seed, length, |line| drop(print(&format!("  {line}\n")))).await?;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&outcome).context("write the figures as JSON")?;
    fs::write(&args.report, json.clone() + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&format!("{json}\n"))?;
    outcome.check()
}
