//! `make demo` and `make tour` as a person runs them: what they print, how they end, and that nothing is left.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use fleet::{
    process::{Program, workspace_binary},
    scratch::{Scratch, processes_below},
    wait::until,
};
use rustix::process::Signal;

/// The whole tour, on two busy cores.
const TOUR_DEADLINE: Duration = Duration::from_secs(240);

/// What the tour shows, in this order.
const STEPS: [&str; 14] = [
    "start the fleet",
    "write an entry",
    "push new content",
    "push a bad commit",
    "crash the primary's server",
    "lose the primary's node",
    "switch over",
    "switch over through the edge",
    "bring the node back",
    "load the site",
    "push under load",
    "end the load",
    "count what is left",
    "stop the fleet",
];

/// Nothing may be left below the folder: no process and no file.
async fn nothing_is_left(scratch: &Scratch) -> Result<()> {
    until("nothing is left", Duration::from_secs(20), || async {
        let processes = processes_below(scratch.path());
        let files = fs::read_dir(scratch.path()).into_iter().flatten().flatten();
        let names = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let left = processes.into_iter().chain(names.filter(|name| name.starts_with("bots-"))).collect::<Vec<_>>();
        if left.is_empty() { Ok(()) } else { Err(left.join("; ")) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_stops_everything_when_it_is_asked_to() -> Result<()> {
    let scratch = Scratch::new()?;
    let demo = Program::new("demo", workspace_binary("demo")?).env("BOTS_SCRATCH", scratch.path().to_string_lossy());
    let mut process = demo.start(scratch.path())?;
    let log = process.log().to_owned();
    until("the demo shows its fleet", TOUR_DEADLINE, || async {
        let text = fs::read_to_string(&log).unwrap_or_default();
        if text.contains("(leader)") { Ok(()) } else { Err(text) }
    })
    .await?;
    let text = fs::read_to_string(&log).context("read what the demo prints")?;
    for told in [
        "psql 'postgresql://",
        "git push",
        "BOTCTL_ETCD=127.0.0.1:",
        "switchover main",
        "http://127.0.0.1:",
        "purges it",
    ] {
        ensure!(text.contains(told), "the demo does not print {told}: {text}");
    }
    for bot in ["pg-1", "pg-2", "pg-3", "content-1", "web-1", "web-2", "web-3", "web-4", "edge-1"] {
        ensure!(text.contains(bot), "the demo does not show {bot}: {text}");
    }
    process.signal(Signal::INT);
    let status = process.ended(Duration::from_secs(60)).await?;
    ensure!(status.success(), "the demo ends with {status}");
    nothing_is_left(&scratch).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tour_holds_and_reports_every_step() -> Result<()> {
    let scratch = Scratch::new()?;
    let report = scratch.path().join("report.json");
    let tour = Program::new("tour", workspace_binary("tour")?)
        .env("BOTS_SCRATCH", scratch.path().to_string_lossy())
        .args(["--report", &*report.to_string_lossy()]);
    let ended = tour.run(scratch.path(), TOUR_DEADLINE).await?;
    println!("{}", ended.stdout);
    ensure!(ended.code == Some(0), "the tour ends with {:?}:\n{}{}", ended.code, ended.stdout, ended.stderr);
    let steps: Vec<serde_json::Value> = serde_json::from_str(&fs::read_to_string(&report)?)?;
    let names: Vec<&str> = steps.iter().filter_map(|step| step["name"].as_str()).collect();
    ensure!(names == STEPS, "the report has other steps: {names:?}");
    for step in &steps {
        ensure!(step["name"].is_string() && step["ok"] == true && step["milliseconds"].is_u64(), "{step}");
    }
    nothing_is_left(&scratch).await
}
