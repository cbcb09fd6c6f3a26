//! Bots die and stand still beside servers that go on: a bot that comes back in time is not missed, and one that does not
//! leaves no second primary behind.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    sql::Writer,
    wait::{millis, until},
    writers::{Writers, longest_gap, lost, two_writable},
};

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_comes_back_in_time_is_not_missed() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let replica = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != primary);
    let replica = replica.context("there is a replica")?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let before = writer.refused();
    for name in [&primary, &replica, &primary] {
        let killed = Instant::now();
        let bot = fleet.postgres_bot_mut(name)?;
        let postmaster = bot.postmaster();
        bot.bot.kill();
        // As a supervisor does it.
        tokio::time::sleep(Duration::from_millis(100)).await;
        bot.bot.start()?;
        fleet.postgres_up(STEP).await?;
        // Past the end of every lease that the old bot had.
        tokio::time::sleep(Duration::from_secs(fleet.ttl_s + 1)).await;
        let leads = fleet.postgres_up(STEP).await?;
        ensure!(leads == primary, "{leads} leads, and {primary} did before {name}'s bot was killed");
        let bot = fleet.postgres_bot(name)?;
        ensure!(bot.postmaster() == postmaster, "the server of {name} was started anew");
        println!("bot of {name} killed and started: {} ms without a write", writer.longest_gap_since(killed));
    }
    let refused = writer.refused() - before;
    ensure!(refused == 0, "{refused} writes were refused: {}", writer.last_error());
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_does_not_come_back_leaves_no_second_primary() -> Result<()> {
    outlived(Fate::Killed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_stands_still_leaves_no_second_primary() -> Result<()> {
    outlived(Fate::Frozen).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_guard_takes_its_server_along_and_it_comes_back() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writer = Writer::start(&fleet.superuser()).await?;
    let killed = Instant::now();
    let bot = fleet.postgres_bot(&primary)?;
    let (guard, postmaster) = (bot.guard().context("a guard")?, bot.postmaster());
    fleet::process::signal_pid(guard, rustix::process::Signal::KILL);
    let back = writer.writes_after(killed + Duration::from_millis(50), STEP).await?;
    println!("guard killed: writable again after {back} ms");
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "restarted in place, and yet {leads} leads");
    ensure!(fleet.postgres_bot(&primary)?.postmaster() != postmaster, "the server lived on without its guard");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "writes were lost: {tally:?}");
    fleet.stop().await
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Killed,
    Frozen,
}

async fn outlived(fate: Fate) -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let moment = writers.now();
    let began = Instant::now();
    let bot = fleet.postgres_bot_mut(&primary)?;
    let old_port = bot.port;
    match fate {
        Fate::Killed => bot.bot.kill(),
        Fate::Frozen => bot.bot.freeze()?,
    }
    let new = fleet.new_primary(&primary, STEP).await?;
    let new_port = fleet.postgres_bot(&new)?.port;
    let led = began.elapsed();
    writers.acknowledged_by(Some(new_port), moment, STEP).await?;
    let server = fleet.postgres_bot(&primary)?;
    ensure!(server.postmaster().is_none(), "the old server lives on without its bot");
    match fate {
        Fate::Killed => fleet.postgres_bot_mut(&primary)?.bot.start()?,
        Fate::Frozen => fleet.postgres_bot_mut(&primary)?.bot.thaw()?,
    }
    fleet.postgres_up(STEP).await?;
    let acknowledged = writers.finish().await?;
    let (both, gap) = (two_writable(&acknowledged), longest_gap(&acknowledged, moment));
    let last =
        acknowledged.iter().filter(|write| write.port == old_port && write.at > moment).map(|write| write.at).max();
    let first = acknowledged.iter().find(|write| write.port == new_port).map(|write| write.at);
    println!(
        "old primary wrote for {} ms more; the next led after {} ms; {} ms without a write",
        last.map_or(0, |last| millis(last - moment)),
        millis(led),
        millis(gap)
    );
    ensure!(both == Duration::ZERO, "two servers took writes for {both:?}");
    let (last, first) = (last.context("the old primary wrote on")?, first.context("the new primary wrote")?);
    ensure!(last < first, "the old primary wrote until {last:?}, the new one from {first:?} on");
    ensure!(last - moment < Duration::from_secs(fleet.ttl_s), "the old primary wrote beyond its lease");
    let missing = lost(&fleet.superuser(), &acknowledged).await?;
    println!("{missing} of {} acknowledged writes lost: the cluster is asynchronous", acknowledged.len());
    until("the old primary streams", STEP, || async {
        let now = fleet.store.look(fleet::fleet::MAIN).await.map_err(|e| format!("{e:#}"))?;
        if now.streaming().contains(&primary.as_str()) { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    fleet.stop().await
}
