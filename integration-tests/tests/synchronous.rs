//! The synchronous modes on real servers: who is waited for, who may lead, and that nothing which was acknowledged is lost when
//! a node is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bots_core::wire::SyncRecord;
use fleet::{
    Fleet,
    fleet::MAIN,
    process::signal_pid,
    wait::{millis, until},
    writers::{Writers, longest_gap, lost, two_writable},
};
use rustix::process::Signal;
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quorum_mode_loses_nothing_with_the_primarys_node() -> Result<()> {
    let (mut fleet, primary) = cluster(3, &json!({"ttl": 5, "synchronous_mode": "quorum"})).await?;
    let others = others(&fleet, &primary);
    let key = synchronous(&fleet, &primary, |key| key.voters().len() == 2).await?;
    ensure!(key.quorum == 1, "{key:?}");
    let names = format!("ANY 1 (\"{}\", \"{}\")", others[0], others[1]);
    told(&fleet, &primary, &names).await?;
    shown(&fleet, &primary, &others, "/quorum", "quorum_standby").await?;
    for round in 0..2 {
        let primary = fleet.postgres_up(STEP).await?;
        loses_the_primarys_node(&mut fleet, &primary, &format!("quorum, round {round}")).await?;
        let primary = fleet.postgres_up(STEP).await?;
        synchronous(&fleet, &primary, |key| key.voters().len() == 2 && key.quorum == 1).await?;
    }
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_synchronous_standby_is_replaced_and_the_next_one_takes_over() -> Result<()> {
    let (mut fleet, primary) = cluster(3, &json!({"ttl": 5, "synchronous_mode": true})).await?;
    let key = synchronous(&fleet, &primary, |key| key.voters().len() == 1).await?;
    let chosen = key.voters().pop_first().unwrap();
    told(&fleet, &primary, &format!("FIRST 1 (\"{chosen}\")")).await?;
    shown(&fleet, &primary, std::slice::from_ref(&chosen), "/sync", "sync_standby").await?;
    let asynchronous = others(&fleet, &primary).into_iter().find(|name| *name != chosen).context("a third")?;
    ensure!(fleet.postgres_bot(&asynchronous)?.bot.get("/async").await?.status == 200, "the third is asynchronous");
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let moment = writers.now();
    fleet.postgres_bot_mut(&chosen)?.kill_node();
    let key = synchronous(&fleet, &primary, |key| key.voters().len() == 1 && !key.voters().contains(&chosen)).await?;
    ensure!(key.voters().contains(&asynchronous) && key.quorum == 0, "{key:?}");
    writers.acknowledged_by(None, writers.now(), STEP).await?;
    let acknowledged = writers.finish().await?;
    println!("synchronous standby killed: {} ms without a write", millis(longest_gap(&acknowledged, moment)));
    fleet.postgres_bot_mut(&chosen)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    let new = loses_the_primarys_node(&mut fleet, &primary, "on").await?;
    ensure!(new == asynchronous, "{new} leads, and {asynchronous} had everything");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_that_is_stopped_is_not_waited_for() -> Result<()> {
    let (mut fleet, primary) = cluster(3, &json!({"ttl": 5, "synchronous_mode": true})).await?;
    let mut gaps = Vec::new();
    for _ in 0..3 {
        let writers = Writers::start(&fleet.superuser(), STEP).await?;
        let key = synchronous(&fleet, &primary, |key| key.voters().len() == 1).await?;
        let chosen = key.voters().pop_first().context("a synchronous standby")?;
        told(&fleet, &primary, &format!("FIRST 1 (\"{chosen}\")")).await?;
        let asked = writers.now();
        let bot = fleet.postgres_bot_mut(&chosen)?;
        bot.bot.ask_to_stop();
        let ended = bot.bot.process()?.ended(STEP).await?;
        let stopped = writers.now();
        ensure!(ended.success(), "{ended}");
        writers.acknowledged_by(None, stopped, STEP).await?;
        let acknowledged = writers.finish().await?;
        let gap = longest_gap(&acknowledged, asked);
        println!("{chosen} stopped after {} ms; {} ms without a write", millis(stopped - asked), millis(gap));
        gaps.push(gap);
        ensure!(lost(&fleet.superuser(), &acknowledged).await? == 0, "writes were lost");
        fleet.postgres_bot_mut(&chosen)?.bot.start()?;
        fleet.postgres_up(STEP).await?;
    }
    // It is asked to stop, and not dead: nobody finds that out by waiting for it.
    gaps.sort();
    ensure!(gaps[1] < Duration::from_millis(300), "{gaps:?}");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_mode_acknowledges_nothing_alone_and_the_other_goes_on() -> Result<()> {
    let (mut fleet, primary) = cluster(2, &json!({"ttl": 5, "synchronous_mode": true})).await?;
    let standby = others(&fleet, &primary).remove(0);
    for strict in [false, true] {
        configure(&fleet, &json!({"ttl": 5, "synchronous_mode": true, "synchronous_mode_strict": strict})).await?;
        synchronous(&fleet, &primary, |key| key.voters().contains(&standby)).await?;
        told(&fleet, &primary, &format!("FIRST 1 (\"{standby}\")")).await?;
        let writers = Writers::start(&fleet.superuser(), STEP).await?;
        let killed = writers.now();
        fleet.postgres_bot_mut(&standby)?.kill_node();
        if strict {
            tokio::time::sleep(Duration::from_secs(4)).await;
        } else {
            writers.acknowledged_by(None, killed + Duration::from_millis(200), STEP).await?;
        }
        let back = writers.now();
        fleet.postgres_bot_mut(&standby)?.bot.start()?;
        fleet.caught_up(&standby, STEP).await?;
        writers.acknowledged_by(None, writers.now(), STEP).await?;
        let login = fleet.superuser();
        let acknowledged = writers.finish().await?;
        let settled = killed + Duration::from_millis(300);
        let alone = acknowledged.iter().filter(|write| write.at > settled && write.at < back).count();
        ensure!(!strict || alone == 0, "{alone} writes were acknowledged by the primary alone");
        println!("strict {strict}: {} ms without a write", millis(longest_gap(&acknowledged, killed)));
        ensure!(lost(&login, &acknowledged).await? == 0, "writes were lost");
    }
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_does_not_wait_for_the_lease() -> Result<()> {
    let (mut fleet, primary) = cluster(3, &json!({"ttl": 30, "synchronous_mode": "quorum", "takeover": true})).await?;
    synchronous(&fleet, &primary, |key| key.voters().len() == 2).await?;
    // The leases that the members began with are shorter.
    for _ in 0..3 {
        let primary = fleet.postgres_up(STEP).await?;
        synchronous(&fleet, &primary, |key| key.voters().len() == 2).await?;
        let began = Instant::now();
        loses_the_primarys_node(&mut fleet, &primary, "takeover, ttl 30").await?;
        ensure!(began.elapsed() < Duration::from_secs(25), "it waited for the lease");
    }
    let primary = fleet.postgres_up(STEP).await?;
    synchronous(&fleet, &primary, |key| key.voters().len() == 2).await?;
    loses_touch_with_the_primarys_node(&mut fleet, &primary).await?;
    fleet.stop().await
}

/// The node of the primary stands still, so that it closes no connection, as one without power: it is missed long before its lease
/// of 30 s ends. Then it goes on.
async fn loses_touch_with_the_primarys_node(fleet: &mut Fleet, primary: &str) -> Result<()> {
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let moment = writers.now();
    let frozen = fleet.postgres_bot_mut(primary)?.freeze_node()?;
    let new = fleet.new_primary(primary, STEP).await;
    let led = writers.now() - moment;
    // The server first, which is the worst that can be.
    frozen.iter().rev().for_each(|pid| signal_pid(*pid, Signal::CONT));
    let port = fleet.postgres_bot(&new?)?.port;
    writers.acknowledged_by(Some(port), moment, STEP).await?;
    fleet.postgres_up(STEP).await?;
    let acknowledged = writers.finish().await?;
    let gap = longest_gap(&acknowledged, moment);
    println!("node silent, takeover, ttl 30: another led after {} ms; {} ms without a write", millis(led), millis(gap));
    ensure!(led < Duration::from_secs(15), "it waited for the lease");
    ensure!(lost(&fleet.superuser(), &acknowledged).await? == 0, "writes were lost");
    ensure!(two_writable(&acknowledged) == Duration::ZERO, "two servers took writes");
    Ok(())
}

/// Kills the node of the primary, waits for another, and brings the old one back; says who leads.
async fn loses_the_primarys_node(fleet: &mut Fleet, primary: &str, how: &str) -> Result<String> {
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let (moment, began) = (writers.now(), Instant::now());
    fleet.postgres_bot_mut(primary)?.kill_node();
    let new = fleet.new_primary(primary, STEP).await?;
    let port = fleet.postgres_bot(&new)?.port;
    let led = began.elapsed();
    writers.acknowledged_by(Some(port), moment, STEP).await?;
    fleet.postgres_bot_mut(primary)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    writers.acknowledged_by(None, writers.now(), STEP).await?;
    let acknowledged = writers.finish().await?;
    let gone = lost(&fleet.superuser(), &acknowledged).await?;
    let gap = longest_gap(&acknowledged, moment);
    println!("node lost, {how}: {new} led after {} ms; {} ms without a write", millis(led), millis(gap));
    ensure!(gone == 0, "{gone} of {} acknowledged writes are lost", acknowledged.len());
    ensure!(two_writable(&acknowledged) == Duration::ZERO, "two servers took writes");
    Ok(new)
}

async fn cluster(members: usize, config: &Value) -> Result<(Fleet, String)> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(members)?;
    let primary = fleet.postgres_up(Duration::from_secs(90)).await?;
    configure(&fleet, config).await?;
    Ok((fleet, primary))
}

async fn configure(fleet: &Fleet, config: &Value) -> Result<()> {
    fleet.store.put(MAIN, "config", &config.to_string()).await
}

fn others(fleet: &Fleet, primary: &str) -> Vec<String> {
    fleet.postgres.iter().map(|p| p.bot.name.clone()).filter(|name| name != primary).collect()
}

/// Waits until the `sync` key is the primary's and as wanted.
async fn synchronous(fleet: &Fleet, primary: &str, wanted: impl Fn(&SyncRecord) -> bool) -> Result<SyncRecord> {
    until("the sync key is as wanted", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        let text = now.value("sync").ok_or("there is none")?;
        let key: SyncRecord = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let good = key.leader.as_deref() == Some(primary) && wanted(&key);
        if good { Ok(key) } else { Err(text.to_owned()) }
    })
    .await
}

async fn told(fleet: &Fleet, primary: &str, names: &str) -> Result<()> {
    let login = fleet.superuser().at(fleet.postgres_bot(primary)?.port);
    login.wait_for("SHOW synchronous_standby_names", names, STEP).await
}

/// What the API says of the standbys that are waited for.
async fn shown(fleet: &Fleet, primary: &str, waited_for: &[String], path: &str, role: &str) -> Result<()> {
    for name in waited_for {
        let bot = &fleet.postgres_bot(name)?.bot;
        until(&format!("{name} answers {path}"), STEP, || async {
            let answer = bot.get(path).await.map_err(|error| format!("{error:#}"))?;
            if answer.status == 200 { Ok(()) } else { Err(answer.text) }
        })
        .await?;
        let answer = bot.get("/async").await?;
        ensure!(answer.status == 503, "/async of {name}: {answer:?}");
    }
    let cluster: Value = serde_json::from_str(&fleet.postgres_bot(primary)?.bot.get("/cluster").await?.text)?;
    let of_role = cluster["members"].as_array().context("members")?.iter().filter(|m| m["role"] == role);
    ensure!(of_role.count() == waited_for.len(), "{cluster}");
    Ok(())
}
