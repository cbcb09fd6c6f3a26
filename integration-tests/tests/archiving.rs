//! An archive that is slow holds nobody up: a primary that goes down gives its lock away with its last word, and archives the rest
//! afterwards.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet::{Fleet, fleet::MAIN, http::Http, sql::Writer, wait::until};
use hyper::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(60);
/// So long a segment takes to be archived.
const ARCHIVING: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_archive_holds_no_switchover_up() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    let second = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != first).context("a replica")?;
    configure(&fleet, &first, &json!({"archive_mode": "on", "archive_command": "true"})).await?;
    for name in [&second, &first] {
        until(&format!("{name} knows of it"), STEP, || async {
            let shown = shows(&fleet, name).await.unwrap_or_default();
            if shown["pending_restart"] == true { Ok(()) } else { Err(shown.to_string()) }
        })
        .await?;
        let url = format!("{}/restart", fleet.postgres_bot(name)?.bot.api_url);
        let answer = Http::new().send(Method::POST, &url, Some("application/json"), Bytes::from("{}")).await?;
        ensure!(answer.status == 200, "POST /restart of {name} answers {}", answer.status);
    }
    ensure!(fleet.postgres_up(STEP).await? == first, "{first} leads on");
    // Beside the data directory, one for each member.
    let command = format!("sleep {} && cp %p ../archived-%f", ARCHIVING.as_secs());
    configure(&fleet, &first, &json!({"archive_mode": "on", "archive_command": command})).await?;
    // Since the primary was restarted, it connects again.
    until(&format!("{second} streams"), STEP, || async {
        let shown = shows(&fleet, &second).await.unwrap_or_default();
        if shown["replication_state"] == "streaming" { Ok(()) } else { Err(shown.to_string()) }
    })
    .await?;

    let writer = Writer::start(&fleet.superuser()).await?;
    let began = Instant::now();
    let done = fleet.botctl(["switchover", MAIN, "--to", &second, "--force"]).await?;
    ensure!(done.code == Some(0), "switchover: {done:?}");
    ensure!(fleet.new_primary(&first, STEP).await? == second, "{second} leads");
    writer.writes_after(Instant::now(), STEP).await?;
    let gap = writer.longest_gap_since(began);
    println!("switchover of a primary with a slow archive: {gap} ms without a write");
    ensure!(Duration::from_millis(gap) < ARCHIVING / 2, "clients waited for the archive: {gap} ms");
    ensure!(fleet.postgres_bot(&first)?.postmaster().is_some(), "what is left of {first} archives");
    ensure!(archived(&folder(&fleet, &first)?).is_empty(), "its last segment cannot be archived yet");
    until("it follows", STEP, || async {
        let shown = shows(&fleet, &first).await.unwrap_or_default();
        if shown["role"] == "replica" && shown["state"] == "running" { Ok(()) } else { Err(shown.to_string()) }
    })
    .await?;
    ensure!(!archived(&folder(&fleet, &first)?).is_empty(), "its last segment is in the archive");

    // Whoever ends a bot waits for the archive; clients do not.
    let began = Instant::now();
    let bot = fleet.postgres_bot_mut(&second)?;
    bot.bot.process()?.signal(Signal::TERM);
    let (ended, waited) = (bot.bot.process()?.ended(STEP).await?, began.elapsed());
    bot.bot.stop();
    ensure!(ended.success(), "the bot ends with {ended}");
    ensure!(waited > ARCHIVING / 2, "{second} ended after {waited:?}, before its archiver");
    ensure!(!archived(&folder(&fleet, &second)?).is_empty(), "its last segment is in the archive");
    ensure!(fleet.new_primary(&second, STEP).await? == first, "{first} leads again");
    let gap = writer.longest_gap_since(began);
    println!("stop of a primary with a slow archive: {gap} ms without a write");
    ensure!(Duration::from_millis(gap) < ARCHIVING / 2, "clients waited for the archive: {gap} ms");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

async fn configure(fleet: &Fleet, at: &str, parameters: &Value) -> Result<()> {
    let url = format!("{}/config", fleet.postgres_bot(at)?.bot.api_url);
    let body = Bytes::from(json!({"postgresql": {"parameters": parameters}}).to_string());
    let answer = Http::new().send(Method::PATCH, &url, Some("application/json"), body).await?;
    ensure!(answer.status == 200, "PATCH /config answers {}", answer.status);
    Ok(())
}

async fn shows(fleet: &Fleet, name: &str) -> Result<Value> {
    let url = format!("{}/patroni", fleet.postgres_bot(name)?.bot.api_url);
    Ok(serde_json::from_str(&Http::new().get(&url).await?.text)?)
}

fn folder(fleet: &Fleet, name: &str) -> Result<PathBuf> {
    Ok(fleet.postgres_bot(name)?.data_dir.parent().context("a folder")?.to_owned())
}

fn archived(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("archived-")).collect()
}
