//! Callbacks hear what becomes of a server, in Patroni's words.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet::{Fleet, fleet::MAIN, http::Http, wait::until};
use hyper::Method;
use serde_json::json;

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callbacks_hear_what_becomes_of_a_server() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    let second = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != first).context("a replica")?;
    // As an operator adds them later: with a restart of each bot, which its server does not notice.
    for bot in &mut fleet.postgres {
        let folder = bot.data_dir.parent().context("a folder")?.to_owned();
        let script = folder.join("told.sh");
        // It takes its time, as one does on a busy machine: nothing may be lost by that.
        fs::write(&script, format!("#!/bin/sh\nsleep 0.3\necho \"$@\" >> {}\n", heard(&folder).display()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let mut config = fs::OpenOptions::new().append(true).open(&bot.bot.config)?;
        writeln!(config, "  callbacks:")?;
        for name in ["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"] {
            writeln!(config, "    {name}: \"{} of '{}'\"", script.display(), bot.bot.name)?;
        }
        bot.bot.kill();
        bot.bot.start()?;
    }
    ensure!(fleet.postgres_up(STEP).await? == first, "{first} leads on");
    hears(&fleet, &first, "on_start primary").await?;
    hears(&fleet, &second, "on_start replica").await?;

    let config = json!({"postgresql": {"parameters": {"work_mem": "5MB"}}});
    let url = format!("{}/config", fleet.postgres_bot(&first)?.bot.api_url);
    let body = Bytes::from(config.to_string());
    let answer = Http::new().send(Method::PATCH, &url, Some("application/json"), body).await?;
    ensure!(answer.status == 200, "PATCH /config answers {}", answer.status);
    hears(&fleet, &first, "on_reload primary").await?;
    hears(&fleet, &second, "on_reload replica").await?;

    let url = format!("{}/restart", fleet.postgres_bot(&second)?.bot.api_url);
    let answer = Http::new().send(Method::POST, &url, Some("application/json"), Bytes::from("{}")).await?;
    ensure!(answer.status == 200, "POST /restart answers {}", answer.status);
    hears(&fleet, &second, "on_restart replica").await?;
    fleet.postgres_up(STEP).await?;

    let done = fleet.botctl(["switchover", MAIN, "--to", &second, "--force"]).await?;
    ensure!(done.code == Some(0), "switchover: {done:?}");
    hears(&fleet, &second, "on_role_change primary").await?;
    hears(&fleet, &first, "on_stop primary").await?;
    hears(&fleet, &first, "on_role_change replica").await?;
    fleet.stop().await
}

fn heard(folder: &Path) -> PathBuf {
    folder.join("heard")
}

async fn hears(fleet: &Fleet, name: &str, what: &str) -> Result<()> {
    let folder = fleet.postgres_bot(name)?.data_dir.parent().context("a folder")?.to_owned();
    let wanted = format!("of {name} {what} {MAIN}");
    until(&format!("{name} hears {what}"), STEP, || async {
        let text = fs::read_to_string(heard(&folder)).unwrap_or_default();
        if text.lines().any(|line| line == wanted) { Ok(()) } else { Err(text) }
    })
    .await
}
