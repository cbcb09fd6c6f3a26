//! What a Postgres bot must not do: touch data that is not its cluster's, run without its programs, take another's name
//! or port. Each is one clear line, the right exit code, and nothing is changed.

use std::{fs, net::TcpListener, time::Duration};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{Passwords, PostgresBot},
    fleet::MAIN,
    process::Finished,
    wait::until,
};

const STEP: Duration = Duration::from_secs(60);

/// The one line that a bot complains with, whatever else it logged.
fn complains(finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    ensure!(finished.code == Some(code), "exit code {:?}, not {code}: {}", finished.code, finished.stderr);
    let all = format!("{}{}", finished.stdout, finished.stderr);
    let line = all.lines().find(|line| words.iter().all(|word| line.contains(word)));
    line.map(drop).with_context(|| format!("no line has {words:?}: {all}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_of_another_cluster_is_left_alone() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(STEP).await?;
    // A cluster of the same etcd under another name, whose member is then pointed at the first one's scope.
    let mut foreign = PostgresBot::new(&fleet.place(), "other", "pg-9", &fleet.passwords)?;
    foreign.bot.start()?;
    until("the other cluster is up", STEP, || async {
        let now = fleet.store.look("other").await?;
        now.primary().map(str::to_owned).ok_or_else(|| now.summary())
    })
    .await?;
    ensure!(foreign.stop(), "the other cluster stops");
    let control = fs::read(foreign.data_dir.join("global/pg_control")).context("read pg_control")?;
    let config = fs::read_to_string(&foreign.bot.config)?.replace("scope: other", "scope: main");
    fs::write(&foreign.bot.config, config)?;
    let finished = foreign.bot.run_to_end().await?;
    complains(&finished, 3, &["system identifier"])?;
    ensure!(fs::read(foreign.data_dir.join("global/pg_control"))? == control, "its data was touched");
    let now = fleet.store.scope(MAIN).await?;
    ensure!(now.leader() == Some("pg-1"), "the cluster goes on: {}", now.summary());
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_or_port_in_use_and_missing_programs_are_refused() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(STEP).await?;

    let duplicate = PostgresBot::new(&fleet.place(), "twin", "pg-1", &fleet.passwords)?;
    let config = fs::read_to_string(&duplicate.bot.config)?.replace("scope: twin", "scope: main");
    fs::write(&duplicate.bot.config, config)?;
    complains(&duplicate.bot.run_to_end().await?, 3, &["name", "pg-1"])?;
    ensure!(!duplicate.data_dir.exists() || fs::read_dir(&duplicate.data_dir)?.next().is_none(), "it made data");

    let blocked = PostgresBot::new(&fleet.place(), "ports", "pg-2", &Passwords::new())?;
    let api = TcpListener::bind(blocked.bot.api_url.trim_start_matches("http://")).context("take its API's port")?;
    complains(&blocked.bot.run_to_end().await?, 4, &["restapi.listen", "in use"])?;
    drop(api);
    let server = TcpListener::bind(("127.0.0.1", blocked.port)).context("take its server's port")?;
    complains(&blocked.bot.run_to_end().await?, 4, &["postgresql.listen", "in use"])?;
    drop(server);

    let config = fs::read_to_string(&blocked.bot.config)?;
    let bin_dir = config.lines().find(|line| line.trim().starts_with("bin_dir:")).context("the file has bin_dir")?;
    fs::write(&blocked.bot.config, config.replace(bin_dir, "  bin_dir: /nonexistent"))?;
    complains(&blocked.bot.run_to_end().await?, 4, &["bin_dir", "/nonexistent"])?;

    ensure!(fleet.postgres_up(STEP).await? == "pg-1", "the cluster never noticed");
    fleet.stop().await
}
