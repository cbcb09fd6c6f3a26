//! `make bench-failover` in its shortest form, without Patroni: the figures are written, and nothing is left.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use fleet::{
    process::{Program, workspace_binary},
    scratch::{Scratch, processes_below},
};

/// One cluster and two faults, on two busy cores.
const BENCH_DEADLINE: Duration = Duration::from_secs(180);

#[tokio::test]
async fn the_shortest_run_reports_its_figures_and_leaves_nothing() -> Result<()> {
    let scratch = Scratch::new()?;
    let report = scratch.path().join("report.json");
    let bench = Program::new("bench-failover", workspace_binary("bench-failover")?)
        .env("BOTS_SCRATCH", scratch.path().to_string_lossy())
        .args(["--tools", "bot", "--only", "switchover,keeper-killed,idle", "--rounds", "1", "--idle", "1"])
        .args(["--report", &*report.to_string_lossy()]);
    let ended = bench.run(scratch.path(), BENCH_DEADLINE).await?;
    println!("{}", ended.stdout);
    ensure!(ended.code == Some(0), "it ends with {:?}:\n{}{}", ended.code, ended.stdout, ended.stderr);
    let figures: serde_json::Value = serde_json::from_str(&fs::read_to_string(&report)?).context("read the report")?;
    for (at, fault) in ["switchover", "keeper-killed"].iter().enumerate() {
        let series = &figures["faults"][at];
        ensure!(series["fault"] == *fault && series["tool"] == "bot" && series["median_ms"].is_u64(), "{series}");
        let round = &series["rounds"][0];
        ensure!(round["gap_ms"].as_u64() > Some(0) && round["two_primaries_ms"] == 0, "{round}");
    }
    ensure!(figures["idle"][0]["pss_mib"].as_f64() > Some(0.0), "{}", figures["idle"]);
    let left = processes_below(scratch.path());
    ensure!(left.is_empty(), "left behind: {left:?}");
    let files = fs::read_dir(scratch.path()).context("look into the scratch folder")?.flatten();
    let left: Vec<_> =
        files.map(|file| file.file_name()).filter(|f| f.to_string_lossy().starts_with("bots-")).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
