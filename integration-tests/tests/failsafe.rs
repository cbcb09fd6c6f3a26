//! etcd is gone for 40 s. In failsafe mode nobody notices, also while one of three members is down, and also of two members;
//! without it, the primary takes no writes from before the end of its lease until etcd is back. Never do two take writes.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    fleet::MAIN,
    http::Http,
    sql::Writer,
    wait::until,
    writers::{Writers, two_writable},
};
use hyper::Method;
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(60);
/// How long etcd is gone: many leases.
const OUTAGE: Duration = Duration::from_secs(40);
/// Without failsafe mode, the primary takes writes again this soon after etcd answers: it has to hear of it, to get a lease,
/// to win its lock and to start in place.
const BACK_WITHIN_MS: u64 = 6_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_failsafe_mode_nobody_notices_that_etcd_is_gone() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(3)?;
    let primary = fleet.postgres_up(STEP).await?;
    switch_failsafe_mode_on(&fleet, 3).await?;
    let down = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != primary).context("a replica")?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;

    let frozen = Instant::now();
    fleet.etcd.freeze();
    tokio::time::sleep(OUTAGE / 2).await;
    let answer = fleet.postgres_bot(&primary)?.bot.get("/primary").await?;
    ensure!(answer.status == 200, "in failsafe mode, the primary is one: {answer:?}");
    let shown: Value = serde_json::from_str(&fleet.postgres_bot(&primary)?.bot.get("/patroni").await?.text)?;
    ensure!(shown["failsafe_mode_is_active"] == true, "{shown}");
    // One of three is down, and the other two are a majority.
    fleet.postgres_bot_mut(&down)?.kill_node();
    tokio::time::sleep(OUTAGE / 2).await;
    let why = fleet.postgres_bot(&primary)?.bot.report().await?;
    ensure!(why.doing.contains("without etcd"), "its report does not say so: {why:?}");
    fleet.etcd.thaw();
    until("the primary has its lock again", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        if now.leader() == Some(primary.as_str()) { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(2 * fleet.ttl_s)).await;
    let gap = writer.longest_gap_since(frozen);
    println!("etcd gone for {OUTAGE:?}, a member down for half of it: {gap} ms without a write");
    ensure!(writer.refused() == 0, "{} writes were refused: {}", writer.refused(), writer.last_error());
    fleet.postgres_bot_mut(&down)?.bot.start()?;
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "{leads} leads, and {primary} did all the time");

    // The members that vouched for it may be elected as ever.
    fleet.postgres_bot_mut(&primary)?.kill_node();
    let killed = Instant::now();
    let new = fleet.new_primary(&primary, STEP).await?;
    println!("{new} leads {} ms after {primary} was lost, with the support of the third", killed.elapsed().as_millis());
    fleet.postgres_bot_mut(&primary)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    let both = two_writable(&writers.finish().await?);
    ensure!(both == Duration::ZERO, "two servers took writes for {both:?}");
    writer.finish().await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_of_two_members_stops_when_nobody_vouches_for_it() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    switch_failsafe_mode_on(&fleet, 2).await?;
    let other = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != primary).context("a replica")?;
    let writer = Writer::start(&fleet.superuser()).await?;
    fleet.etcd.freeze();
    tokio::time::sleep(OUTAGE / 4).await;
    ensure!(writer.refused() == 0, "{} writes were refused: {}", writer.refused(), writer.last_error());
    // A bot that is restarted is missed by nobody, though it does not know what it promised.
    fleet.postgres_bot_mut(&other)?.bot.kill();
    fleet.postgres_bot_mut(&other)?.bot.start()?;
    tokio::time::sleep(OUTAGE / 4).await;
    ensure!(writer.refused() == 0, "{} writes were refused: {}", writer.refused(), writer.last_error());
    fleet.postgres_bot_mut(&other)?.bot.freeze()?;
    let alone = Instant::now();
    until("the primary takes no more writes", STEP, || async {
        let answer = fleet.postgres_bot(&primary).unwrap().bot.get("/primary").await.map_err(|e| format!("{e:#}"))?;
        if answer.status == 503 { Ok(()) } else { Err(format!("{answer:?}")) }
    })
    .await?;
    let stopped = alone.elapsed();
    println!("the only member that vouches for it stands still: the primary stops after {} ms", stopped.as_millis());
    ensure!(stopped < Duration::from_secs(6), "it wrote for {stopped:?} though nobody vouched for it");
    fleet.postgres_bot_mut(&other)?.bot.thaw()?;
    let thawed = Instant::now();
    fleet.etcd.thaw();
    let back = writer.writes_after(thawed, STEP).await?;
    println!("etcd back: writable after {back} ms");
    fleet.postgres_up(STEP).await?;
    writer.finish().await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_failsafe_mode_the_primary_is_back_as_soon_as_etcd_is() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let frozen = Instant::now();
    fleet.etcd.freeze();
    tokio::time::sleep(OUTAGE).await;
    let thawed = Instant::now();
    fleet.etcd.thaw();
    let back = writer.writes_after(thawed, STEP).await?;
    let gap = writer.longest_gap_since(frozen);
    println!("etcd gone for {OUTAGE:?}: {gap} ms without a write, the next {back} ms after etcd was back");
    ensure!(back < BACK_WITHIN_MS, "etcd was back for {back} ms before the next write");
    let leads = fleet.postgres_up(STEP).await?;
    println!("{primary} led before, {leads} leads after");
    let tally = writer.finish().await?;
    println!("{tally:?}");
    fleet.stop().await
}

/// An API that other machines reach and that has no password, as Patroni's may be: nobody changes anything by it, and members know each
/// other all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_whose_api_has_no_password_vouch_for_each_other() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    fleet.postgres_up(STEP).await?;
    for member in &mut fleet.postgres {
        let own = member.bot.api_url.trim_start_matches("http://").to_owned();
        let port = own.rsplit(':').next().context("a port")?;
        let open = format!("restapi:\n  listen: 0.0.0.0:{port}\n  connect_address: {own}\n");
        let config = fs::read_to_string(&member.bot.config)?;
        let opened = config.replace(&format!("restapi:\n  listen: {own}\n"), &open);
        ensure!(opened != config, "{config}");
        fs::write(&member.bot.config, opened)?;
        member.bot.kill();
        member.bot.start()?;
    }
    let primary = fleet.postgres_up(STEP).await?;
    switch_failsafe_mode_on(&fleet, 2).await?;
    let writer = Writer::start(&fleet.superuser()).await?;

    fleet.etcd.freeze();
    tokio::time::sleep(OUTAGE / 2).await;
    let stranger = Http::new();
    for (path, body) in [("failsafe", json!({"name": "pg-9"})), ("failsafe/candidate", json!({"name": "pg-9"}))] {
        let url = format!("{}/{path}", fleet.postgres_bot(&primary)?.bot.api_url);
        let answer = stranger.send(Method::POST, &url, Some("application/json"), body.to_string().into()).await?;
        ensure!(answer.status == 403, "a stranger at {url}: {answer:?}");
    }
    fleet.etcd.thaw();
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "{leads} leads, and {primary} did all the time");
    ensure!(writer.refused() == 0, "{} writes were refused: {}", writer.refused(), writer.last_error());
    writer.finish().await?;
    fleet.stop().await
}

/// In the `config` key, and then until every member is on the roll.
async fn switch_failsafe_mode_on(fleet: &Fleet, members: usize) -> Result<()> {
    let now = fleet.store.look(MAIN).await.map_err(anyhow::Error::msg)?;
    let mut config: Value = serde_json::from_str(now.value("config").context("a configuration")?)?;
    config["failsafe_mode"] = json!(true);
    fleet.store.put(MAIN, "config", &config.to_string()).await?;
    until("every member is in the failsafe key", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        let roll: Value = serde_json::from_str(now.value("failsafe").unwrap_or("{}")).map_err(|e| e.to_string())?;
        if roll.as_object().is_some_and(|roll| roll.len() == members) { Ok(()) } else { Err(roll.to_string()) }
    })
    .await
}
