//! One Postgres cluster through its life: bootstrap, crash, loss of the primary's node, rewind, switchover, clean end.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    fleet::MAIN,
    process::signal_pid,
    scratch::{owner_of, processes_below},
    sql::{Login, Writer},
    wait::until,
};
use rustix::process::Signal;

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_keeps_one_writable_primary_through_its_life() -> Result<()> {
    let mut fleet = Fleet::with_etcd(3).await?;
    fleet.add_postgres(3)?;
    let primary = bootstraps_from_empty_directories(&mut fleet).await?;
    speaks_patronis_keys(&fleet, &primary).await?;
    answers_by_role(&fleet, &primary).await?;
    crashes_in_place(&mut fleet, &primary).await?;
    let new = loses_its_node(&mut fleet, &primary).await?;
    returns_by_rewind(&mut fleet, &primary, &new).await?;
    switches_over(&mut fleet, &new, &primary).await?;
    a_stopped_primary_hands_over(&mut fleet, &primary).await?;
    leaves_nothing_behind(fleet).await
}

async fn bootstraps_from_empty_directories(fleet: &mut Fleet) -> Result<String> {
    let began = Instant::now();
    let primary = fleet.postgres_up(Duration::from_secs(90)).await?;
    report("bootstrap of three", began);
    let login = fleet.superuser();
    login.execute("CREATE TABLE kept (word text); INSERT INTO kept VALUES ('first')").await?;
    for bot in &fleet.postgres {
        login.at(bot.port).wait_for("SELECT word FROM kept", "first", STEP).await?;
    }
    let roles = login.ask(
        "SELECT string_agg(rolname, ',' ORDER BY rolname) FROM pg_roles WHERE rolname IN ('replicator', 'rewinder')",
    );
    ensure!(roles.await? == "replicator,rewinder", "the cluster has its users");
    Ok(primary)
}

async fn speaks_patronis_keys(fleet: &Fleet, primary: &str) -> Result<()> {
    let now = fleet.store.scope(MAIN).await?;
    let sysid = fleet.superuser().ask("SELECT system_identifier FROM pg_control_system()").await?;
    ensure!(now.value("initialize") == Some(sysid.as_str()), "initialize holds {:?}", now.value("initialize"));
    let config: serde_json::Value = serde_json::from_str(now.value("config").context("config")?)?;
    ensure!(config["ttl"] == 5, "config holds {config}");
    let member: serde_json::Value = serde_json::from_str(now.value(&format!("members/{primary}")).context("member")?)?;
    for field in ["conn_url", "api_url", "state", "role", "version", "xlog_location", "timeline"] {
        ensure!(!member[field].is_null(), "the member key has no {field}: {member}");
    }
    let all = now.below("").map(|(_, value)| value).collect::<String>();
    ensure!(!all.contains(&fleet.passwords.superuser), "a password stands in etcd");
    Ok(())
}

async fn answers_by_role(fleet: &Fleet, primary: &str) -> Result<()> {
    for postgres in &fleet.postgres {
        let leads = postgres.bot.name == primary;
        for (path, wanted) in [("/primary", leads), ("/replica", !leads), ("/health", true), ("/liveness", true)] {
            let status = postgres.bot.get(path).await?.status;
            let code = if wanted { 200 } else { 503 };
            ensure!(status == code, "{path} of {} answers {status}", postgres.bot.name);
        }
        let why = fleet.botctl(["why", &format!("{MAIN}/{}", postgres.bot.name)]).await?;
        let role = if leads { "  is       primary, for " } else { "  is       replica, for " };
        ensure!(why.code == Some(0) && why.stdout.contains(role), "botctl why: {why:?}");
    }
    let listed = fleet.botctl(["list", MAIN, "--format", "json"]).await?;
    let rows: Vec<serde_json::Value> = serde_json::from_str(&listed.stdout).context("read what botctl lists")?;
    let leaders = rows.iter().filter(|row| row["leader"] == true).map(|row| &row["name"]).collect::<Vec<_>>();
    ensure!(rows.len() == fleet.postgres.len() && leaders == [primary], "botctl lists {}", listed.stdout);
    Ok(())
}

/// Asynchronous cluster, crashed primary: it comes back in place, since another would lack writes.
async fn crashes_in_place(fleet: &mut Fleet, primary: &str) -> Result<()> {
    let writer = Writer::start(&fleet.superuser()).await?;
    let crashed = Instant::now();
    let old = fleet.postgres_bot(primary)?.crash_postmaster()?;
    new_server(fleet, primary, old).await?;
    writer.writes_after(Instant::now(), STEP).await?;
    println!("crash in place: {} ms without a write", writer.longest_gap_since(crashed));
    ensure!(fleet.postgres_up(STEP).await? == primary, "the primary has moved");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "a crash in place lost writes: {tally:?}");
    let timeline = fleet.store.scope(MAIN).await?.postgres(primary).and_then(|f| f.timeline);
    ensure!(timeline.is_some_and(|t| t.0 == 1), "a crash in place begins no timeline: {timeline:?}");
    Ok(())
}

async fn loses_its_node(fleet: &mut Fleet, primary: &str) -> Result<String> {
    let login = fleet.superuser();
    let own = login.at(fleet.postgres_bot(primary)?.port);
    let writer = Writer::start(&login).await?;
    // What the primary acknowledges from here on reaches nobody: its data will have diverged.
    // They connect again after the crash, each in its own time.
    let senders = fleet::wait::until("two replicas stream", STEP, || async {
        let senders = walsenders(&own).await.map_err(|error| format!("{error:#}"))?;
        if senders.len() == 2 { Ok(senders) } else { Err(format!("{senders:?}")) }
    })
    .await?;
    senders.iter().for_each(|pid| signal_pid(*pid, Signal::STOP));
    own.execute("INSERT INTO kept VALUES ('never replicated')").await?;
    let killed = Instant::now();
    fleet.postgres_bot_mut(primary)?.kill_node();
    senders.iter().for_each(|pid| signal_pid(*pid, Signal::KILL));
    let new = fleet.new_primary(primary, STEP).await?;
    writer.writes_after(Instant::now(), STEP).await?;
    let gap = writer.longest_gap_since(killed);
    println!("loss of the primary's node: {gap} ms without a write");
    ensure!(gap < 15_000, "{gap} ms without a primary, with leases of 5 s");
    ensure!(login.ask("SELECT count(*) FROM kept WHERE word = 'first'").await? == "1", "replicated rows are kept");
    fleet.postgres_up(STEP).await?;
    let tally = writer.finish().await?;
    ensure!(tally.acknowledged > 0, "{tally:?}");
    let now = fleet.store.scope(MAIN).await?;
    ensure!(now.value("history").is_some_and(|h| h.contains("[[1,")), "history holds {:?}", now.value("history"));
    Ok(new)
}

async fn returns_by_rewind(fleet: &mut Fleet, old: &str, new: &str) -> Result<()> {
    let began = Instant::now();
    fleet.postgres_bot_mut(old)?.bot.start()?;
    fleet.caught_up(old, STEP).await?;
    report("return of the old primary", began);
    let bot = fleet.postgres_bot(old)?;
    let login = fleet.superuser().at(bot.port);
    ensure!(
        login.ask("SELECT count(*) FROM kept WHERE word = 'never replicated'").await? == "0",
        "it has not diverged"
    );
    let log = bot.bot.log();
    ensure!(log.contains("rewind"), "the log tells nothing of a rewind");
    let kept_aside = fs::read_dir(bot.data_dir.parent().unwrap())?.count();
    ensure!(kept_aside >= 1, "the data folder is there");
    ensure!(fleet.postgres_up(STEP).await? == new, "the new primary keeps leading");
    Ok(())
}

async fn switches_over(fleet: &mut Fleet, old: &str, to: &str) -> Result<()> {
    let writer = Writer::start(&fleet.superuser()).await?;
    let began = Instant::now();
    let done = fleet.botctl(["switchover", MAIN, "--to", to, "--force"]).await?;
    ensure!(done.code == Some(0), "botctl switchover ends with {:?}: {}{}", done.code, done.stdout, done.stderr);
    report("switchover", began);
    ensure!(fleet.new_primary(old, STEP).await? == to, "{to} leads");
    writer.writes_after(Instant::now(), STEP).await?;
    println!("switchover: {} ms without a write", writer.longest_gap_since(began));
    ensure!(fleet.postgres_up(STEP).await? == to, "{to} leads, all follow");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "a switchover lost writes: {tally:?}");
    let now = fleet.store.scope(MAIN).await?;
    ensure!(!now.switchover_pending(), "the request stands: {:?}", now.value("failover"));
    let refused = fleet.botctl(["switchover", MAIN, "--to", to, "--force"]).await?;
    ensure!(refused.code == Some(1) && refused.stderr.contains("leads main already"), "{refused:?}");
    Ok(())
}

/// SIGTERM at the primary's bot: the lock is given back at once, nobody waits for a lease to run out.
async fn a_stopped_primary_hands_over(fleet: &mut Fleet, primary: &str) -> Result<()> {
    let writer = Writer::start(&fleet.superuser()).await?;
    let began = Instant::now();
    let bot = fleet.postgres_bot_mut(primary)?;
    bot.bot.process()?.signal(Signal::TERM);
    let status = bot.bot.process()?.ended(STEP).await?;
    ensure!(status.success(), "the bot ends with {status}");
    ensure!(bot.postmaster().is_none(), "its server still runs");
    bot.bot.stop();
    fleet.new_primary(primary, STEP).await?;
    writer.writes_after(Instant::now(), STEP).await?;
    println!("stop of the primary's bot: {} ms without a write", writer.longest_gap_since(began));
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "a clean stop lost writes: {tally:?}");
    fleet.postgres_bot_mut(primary)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    Ok(())
}

async fn leaves_nothing_behind(fleet: Fleet) -> Result<()> {
    let folder = fleet.scratch.path().to_owned();
    for bot in &fleet.postgres {
        ensure!(owner_of(&bot.data_dir)? == owner_of(bot.data_dir.parent().unwrap())?, "the data folder has its owner");
    }
    fleet.stop().await?;
    until("every process has gone", STEP, || async {
        let left = processes_below(&folder);
        if left.is_empty() { Ok(()) } else { Err(left.join("; ")) }
    })
    .await
}

async fn new_server(fleet: &Fleet, name: &str, old: u32) -> Result<()> {
    let bot = fleet.postgres_bot(name)?;
    until(&format!("{name} has a new server"), STEP, || async {
        bot.postmaster().filter(|pid| *pid != old).map(drop).ok_or_else(|| String::from("the old one, or none"))
    })
    .await
}

async fn walsenders(login: &Login) -> Result<Vec<u32>> {
    let pids = login.ask("SELECT coalesce(string_agg(pid::text, ','), '') FROM pg_stat_replication").await?;
    Ok(pids.split(',').filter_map(|pid| pid.parse().ok()).collect())
}

fn report(what: &str, began: Instant) {
    println!("{what}: {} ms", began.elapsed().as_millis());
}
