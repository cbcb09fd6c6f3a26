//! `make torture`: content and web bots are killed at every step of a publication, and what they serve is compared with what
//! was pushed.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use fleet::{
    program::{print, run_program},
    torture::{self, Wish},
};

/// Kills content and web bots at every step of a publication, under readers that compare every byte
#[derive(Debug, Parser)]
struct Args {
    /// How many commits are pushed into a kill
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// Decides who is killed when; what comes of it, real processes decide
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the figures go
    #[arg(long, default_value = "target/torture.json")]
    report: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let again = format!("torture --seed {} --rounds {}", args.seed, args.rounds);
    let work = async { run(&args).await.map_err(|error| anyhow!("{error:#}\nagain: {again}")) };
    run_program("torture", work).await
}

async fn run(args: &Args) -> Result<()> {
    fleet::orphans::adopt()?;
    let wish = Wish { seed: args.seed, rounds: args.rounds };
    let outcome = torture::run(wish, |line| drop(print(&format!("  {line}\n")))).await?;
    if let Some(folder) = args.report.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&outcome).context("write the figures as JSON")?;
    fs::write(&args.report, json.clone() + "\n").with_context(|| format!("write {}", args.report.display()))?;
    print(&format!("{json}\n"))?;
    outcome.check()
}
