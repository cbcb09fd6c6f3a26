//! `make demo`: a whole fleet on loopback that looks after itself, with a live view, until Ctrl-C.

use std::{io::IsTerminal, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use fleet::{
    Fleet,
    demo::{cache, introduction, start},
    program::{asked_to_stop, print},
    wait::{millis, timed},
};
use serde_json::Value;

/// Between two looks at the fleet.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Starts three etcd members, three Postgres bots, a content bot, four web bots and an edge bot, and shows them until Ctrl-C.
#[derive(Debug, Parser)]
struct Args {
    /// Start, wait until all is healthy, print what was started, and stop
    #[arg(long)]
    once: bool,
    /// Leave the scratch folder behind
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    // Whatever ends this, dropping the fleet stops every process that it has started.
    let ended = tokio::select! {
        ended = Box::pin(run(&args)) => ended,
        asked = asked_to_stop() => asked,
    };
    match ended {
        Ok(()) => {
            let _nobody_reads = print("stopped, nothing is left\n");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let say = |line: &str| drop(print(&format!("  {line}\n")));
    let _nobody_reads = print("starting\n");
    let (mut fleet, took) = timed(start(say)).await?;
    if args.keep {
        fleet.scratch.keep();
    }
    let folder = fleet.scratch.path().display().to_string();
    let seconds = took / 1_000;
    let introduction = format!("a fleet is up after {seconds} s, under {folder}\n\n{}", introduction(&fleet)?);
    if args.once {
        print(&introduction)?;
        print(&format!("\n{}", table(&fleet).await?))?;
        return fleet.stop().await;
    }
    if std::io::stdout().is_terminal() {
        live(&fleet, &introduction).await
    } else {
        append(&fleet, &introduction).await
    }
}

/// Draws the fleet again and again, under the introduction.
async fn live(fleet: &Fleet, introduction: &str) -> Result<()> {
    loop {
        let table = table(fleet).await.unwrap_or_else(|error| format!("{error:#}\n"));
        print(&format!("\x1b[H\x1b[J{introduction}\n{table}\nCtrl-C stops all of it.\n"))?;
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Prints the fleet whenever a bot has become something else.
async fn append(fleet: &Fleet, introduction: &str) -> Result<()> {
    print(introduction)?;
    let (mut before, began) = (Vec::new(), std::time::Instant::now());
    loop {
        match standing(fleet).await {
            Ok(now) if now != before => {
                let seconds = millis(began.elapsed()) / 1_000;
                print(&format!("\nafter {seconds} s:\n{}", table(fleet).await.unwrap_or_default()))?;
                before = now;
            }
            Ok(_) => {}
            Err(error) => print(&format!("{error:#}\n"))?,
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn table(fleet: &Fleet) -> Result<String> {
    let listed = fleet.botctl(["list"]).await?;
    let purged = cache(fleet)?.purged();
    let purges = match purged.last() {
        Some(sha) => format!("the cache was purged {} times, last for {}\n", purged.len(), sha.get(..7).unwrap_or(sha)),
        None => String::new(),
    };
    Ok(listed.stdout + &listed.stderr + &purges)
}

/// What each bot is, without what changes all the time.
async fn standing(fleet: &Fleet) -> Result<Vec<String>> {
    let listed = fleet.botctl(["list", "--format", "json"]).await?;
    let rows: Vec<Value> = serde_json::from_str(&listed.stdout).context("read what botctl lists")?;
    let fields = ["scope", "name", "role", "state", "leader", "timeline", "revision"];
    let one =
        |row: &Value| fields.iter().filter_map(|f| row.get(*f)).map(Value::to_string).collect::<Vec<_>>().join(" ");
    Ok(rows.iter().map(one).collect())
}
